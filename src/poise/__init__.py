"""poise: stable language-model pre-training.

The names below are imported when first used, so that ``import poise`` costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Batch": "poise.core.types",
    "Signals": "poise.core.types",
    "Alarm": "poise.core.types",
    "Decision": "poise.core.types",
    "Proceed": "poise.core.types",
    "Skip": "poise.core.types",
    "Clip": "poise.core.types",
    "LowerLr": "poise.core.types",
    "ResetMoments": "poise.core.types",
    "Rollback": "poise.core.types",
    "DropData": "poise.core.types",
    "Halt": "poise.core.types",
    "Host": "poise.core.host",
    "Card": "poise.core.registry",
    "UserError": "poise.core.errors",
    "Conflict": "poise.core.errors",
    "Guard": "poise.guard.guard",
    "GuardConfig": "poise.guard.config",
    "watch": "poise.guard.signals.watch",
    "Chain": "poise.optim.chain",
    "Spec": "poise.model.spec",
    "PRESETS": "poise.model.presets",
    "build_model": "poise.model.build:build",
    "apply": "poise.face",
    "load_hf": "poise.face",
    "count": "poise.model.counts",
    "prepare": "poise.data.prepare",
    "open_tokens": "poise.data.store",
    "Loader": "poise.data.feed.loader",
    "CheckpointStore": "poise.hardware.checkpoint",
    "Recipe": "poise.train.recipe",
    "train_recipe": "poise.train.run:train",
    "resume_run": "poise.train.run:resume",
    "write_report": "poise.dashboard.report",
    "read_log": "poise.postmortem.log",
}
"""Public name -> module that defines it (``module:name`` where the names differ)."""

_ROOMS = frozenset({"guard", "integrations", "optim", "postmortem"})
"""Rooms that can be reached without importing them by name: ``poise.postmortem.read_log``."""

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'poise' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from poise.core.errors import Conflict, UserError  # noqa: F401
    from poise.core.types import Batch, Signals  # noqa: F401
