"""Before a run: what is known to break about anybody's configuration. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Finding": "poise.preflight.settings",
    "Report": "poise.preflight.check",
    "Settings": "poise.preflight.settings",
    "PRESETS": "poise.preflight.presets",
    "check_model": "poise.preflight.own_model",
    "check_settings": "poise.preflight.check:check",
    "preset": "poise.preflight.presets",
    "read_settings": "poise.preflight.read",
}
"""Public name -> module that defines it (``module:name`` where the names differ)."""

__all__ = ["PRESETS", "Finding", "Report", "Settings", "check_model", "check_settings", "preset", "read_settings"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'poise.preflight' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


if TYPE_CHECKING:
    from poise.preflight.check import Report
    from poise.preflight.check import check as check_settings
    from poise.preflight.own_model import check_model
    from poise.preflight.presets import PRESETS, preset
    from poise.preflight.read import read_settings
    from poise.preflight.settings import Finding, Settings
