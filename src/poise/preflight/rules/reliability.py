"""Rules on checkpoints against hardware failures. No torch."""

from __future__ import annotations

import math
from typing import Final

from poise.preflight.rules.base import Rule, Verdict, rule, says
from poise.preflight.settings import Settings

DEVICE_MTTF_HOURS: Final = 54 * 24 * 16384 / 419
"""Mean hours between unexpected interruptions for one device: Llama 3 405B had 419 in 54 days on 16,384 GPUs."""

SAVE_SECONDS: Final = 60.0
"""What saving a checkpoint is assumed to cost."""


def mttf_hours(devices: int) -> float:
    """Return the expected hours between interruptions.

    >>> round(mttf_hours(16384), 1), round(mttf_hours(8) / 24)
    (3.1, 264)
    """
    return DEVICE_MTTF_HOURS / devices


def best_interval(mttf: float, save_seconds: float = SAVE_SECONDS) -> float:
    """Return Young's interval between checkpoints in seconds, sqrt(2 x save cost x mean time to failure).

    >>> round(best_interval(3.1 * 3600))
    1157
    """
    return math.sqrt(2 * save_seconds * mttf)


def _interval(s: Settings) -> Verdict | None:
    assert s.save_every is not None and s.devices is not None and s.step_seconds is not None
    mttf = 3600 * mttf_hours(s.devices)
    if s.save_every == 0:
        return None  # "no-checkpoints" speaks of it
    interval = s.save_every * s.step_seconds
    best = best_interval(mttf)
    lost = interval / (2 * mttf)
    failures = s.total_steps * s.step_seconds / mttf if s.total_steps else None
    if lost < 0.02 or (failures is not None and failures < 0.5):
        return None
    return Verdict(
        "critical" if interval > mttf else "warning" if lost > 0.05 else "note",
        f"{says(s, 'save_every', 'devices', 'step_seconds')}: {interval / 60:.3g} minutes between checkpoints, an "
        f"interruption expected every {mttf / 3600:.3g} hours; each loses {interval / 120:.3g} minutes on average, "
        f"{min(lost, 1.0):.1%} of the time",
        f"save_every = {max(1, round(min(best / s.step_seconds, 1e15)))} (Young's interval of {best / 60:.3g} minutes "
        f"if saving costs {SAVE_SECONDS:g} s)",
        also=("total_steps",),
    )


def _never(s: Settings) -> Verdict | None:
    assert s.save_every is not None and s.total_steps is not None
    if 0 < s.save_every <= s.total_steps or s.total_steps < 100:
        return None
    long = bool(s.step_seconds and s.step_seconds * s.total_steps > 24 * 3600)
    return Verdict(
        "critical" if long and (s.devices or 1) >= 64 else "warning",
        f"{says(s, 'save_every', 'total_steps')}: no checkpoint before the end",
        f"save_every = {max(1, s.total_steps // 50)}, at least every few hours",
        also=("step_seconds", "devices"),
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "save-interval",
        "checkpoints rarer than failures",
        "critical",
        ("save_every", "devices", "step_seconds"),
        _interval,
        source="Llama 3, arXiv 2407.21783 (419 unexpected interruptions in 54 days on 16,384 GPUs); Young 1974, "
        "A first order approximation to the optimum checkpoint interval",
        why="Half an interval is lost at every failure; with other hardware the rate is another, so this is an order "
        "of magnitude.",
    ),
    rule(
        "no-checkpoints",
        "no checkpoint before the end",
        "critical",
        ("save_every", "total_steps"),
        _never,
        source="practice: BLOOM saved every 100 steps; rollback needs a checkpoint from before the spike",
        why="Neither a failure nor a divergence can be rolled back.",
    ),
)
"""In the order of the file."""
