"""The guard in other people's loops, one file each, imported when first used: each needs its library."""

from __future__ import annotations

import importlib
from types import ModuleType

LOOPS = ("accelerate", "hf_trainer", "lightning", "olmo_core", "optimizer", "plain", "torchtitan")


def __getattr__(name: str) -> ModuleType:
    if name not in LOOPS:
        raise AttributeError(f"module 'poise.integrations' has no attribute '{name}'")
    return importlib.import_module(f"poise.integrations.{name}")
