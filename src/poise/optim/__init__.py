"""The optimizer room's methods, one file each, and its names, imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

METHODS = (
    "poise.optim.rules.adamw",
    "poise.optim.shape.clip_global_norm",
)

_NAMES = {
    "Chain": "poise.optim.chain",
    "GradChain": "poise.optim.grad_chain",
    "AdamW": "poise.optim.rules.adamw",
    "ClipGlobalNorm": "poise.optim.shape.clip_global_norm",
    "guarded": "poise.integrations.optimizer",
}
"""Public name -> module that defines it. ``guarded`` lives with the other drop-ins; users look for it here."""

__all__ = ["METHODS", "AdamW", "Chain", "ClipGlobalNorm", "GradChain", "guarded"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'poise.optim' has no attribute '{name}'")
    return getattr(importlib.import_module(_NAMES[name]), name)
