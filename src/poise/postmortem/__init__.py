"""After the fact: anybody's training log, read, replayed and explained. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Comparison": "poise.postmortem.compare",
    "Diagnosis": "poise.postmortem.diagnosis",
    "Event": "poise.postmortem.event",
    "Log": "poise.postmortem.log",
    "read_log": "poise.postmortem.log",
    "beside": "poise.postmortem.diagnosis",
    "diagnose": "poise.postmortem.diagnosis",
    "Finding": "poise.postmortem.replay",
    "replay_log": "poise.postmortem.replay:replay",
}
"""Public name -> module that defines it (``module:name`` where the names differ)."""

__all__ = ["Comparison", "Diagnosis", "Event", "Finding", "Log", "beside", "diagnose", "read_log", "replay_log"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'poise.postmortem' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


if TYPE_CHECKING:
    from poise.postmortem.compare import Comparison
    from poise.postmortem.diagnosis import Diagnosis, beside, diagnose
    from poise.postmortem.event import Event
    from poise.postmortem.log import Log, read_log
    from poise.postmortem.replay import Finding
    from poise.postmortem.replay import replay as replay_log
