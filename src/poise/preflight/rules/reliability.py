"""Rules on checkpoints against hardware failures. No torch."""

from __future__ import annotations

import math
from typing import Final

from poise.preflight.rules.base import Rule, Verdict, dense_size, put, rule, says, short
from poise.preflight.settings import Settings

DEVICE_MTTF_HOURS: Final = 54 * 24 * 16384 / 419
"""Mean hours between unexpected interruptions for one device: Llama 3 405B had 419 in 54 days on 16,384 GPUs."""

MANY: Final = 1000
"""Devices from which on a run without checkpoints does not reach its end: an interruption about every two days."""

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


FLOPS: Final = (1e14, 6e14)
"""Operations per second and device that training reaches, from a slow to a fast accelerator of today."""

WORTH: Final = 1.5
"""Multiple of Young's interval up to which nothing is said."""


def estimated_seconds(s: Settings) -> tuple[float, float] | None:
    """Return (shortest, longest) wall time of a step: 6 operations for each weight and token, at ``FLOPS``."""
    size, tokens = dense_size(s), s.batch_tokens
    if not size or not tokens or not s.devices:
        return None
    work = 6.0 * size * tokens / s.devices
    return work / FLOPS[1], work / FLOPS[0]


def fitting_interval(s: Settings) -> int | None:
    """Return Young's interval in steps, as far as the time of a step is known or can be estimated."""
    if not s.devices:
        return None
    seconds = s.step_seconds
    if seconds is None:
        if (ends := estimated_seconds(s)) is None:
            return None
        seconds = math.sqrt(ends[0] * ends[1])
    return max(1, round(min(best_interval(3600 * mttf_hours(s.devices)) / seconds, 1e15)))


def _interval(s: Settings) -> Verdict | None:
    assert s.save_every is not None and s.devices is not None and s.step_seconds is not None
    mttf = 3600 * mttf_hours(s.devices)
    if s.save_every == 0:
        return None  # "no-checkpoints" speaks of it
    interval = s.save_every * s.step_seconds
    best = best_interval(mttf)
    lost = interval / (2 * mttf)
    failures = s.total_steps * s.step_seconds / mttf if s.total_steps else None
    if lost < 0.02 or interval <= WORTH * best or (failures is not None and failures < 0.5):
        return None
    return Verdict(
        "critical" if interval > mttf else "warning" if lost > 0.05 else "note",
        f"{says(s, 'save_every', 'devices', 'step_seconds')}: {interval / 60:.3g} minutes between checkpoints, an "
        f"interruption expected every {mttf / 3600:.3g} hours; each loses {interval / 120:.3g} minutes on average, "
        f"{min(lost, 1.0):.1%} of the time",
        f"{put(s, 'save_every', fitting_interval(s) or 1)} (Young's interval of {best / 60:.3g} minutes "
        f"if saving costs {SAVE_SECONDS:g} s)",
        also=("total_steps",),
    )


def _interval_estimated(s: Settings) -> Verdict | None:
    assert s.save_every is not None and s.devices is not None
    ends = estimated_seconds(s)
    if s.step_seconds is not None or s.save_every == 0 or ends is None:
        return None  # with a time that is said "save-interval" judges
    mttf, shortest = 3600 * mttf_hours(s.devices), s.save_every * ends[0]
    lost = shortest / (2 * mttf)
    failures = s.total_steps * ends[0] / mttf if s.total_steps else None
    if lost < 0.05 or shortest <= WORTH * best_interval(mttf) or (failures is not None and failures < 0.5):
        return None
    size, tokens = short(dense_size(s) or 0), short(s.batch_tokens or 0)
    return Verdict(
        "warning",
        f"{says(s, 'save_every', 'devices')}: {shortest / 60:.3g} minutes or more between checkpoints, an "
        f"interruption expected every {mttf / 3600:.3g} hours; {min(lost, 1.0):.1%} of the time is lost, or more",
        f"{put(s, 'save_every', fitting_interval(s) or 1)}, or say the time of a step",
        f"The time of a step is not said; {ends[0]:.2g} to {ends[1]:.2g} s are assumed: 6 x {size} "
        f"weights x {tokens} tokens, at {FLOPS[1]:g} to {FLOPS[0]:g} operations a second and device, "
        "and this is the shorter end. Half an interval is lost at every failure.",
        also=("total_steps", "params"),
    )


def _never(s: Settings) -> Verdict | None:
    assert s.save_every is not None and s.total_steps is not None
    if 0 < s.save_every <= s.total_steps or s.total_steps < 100:
        return None
    long = bool(s.step_seconds and s.step_seconds * s.total_steps > 24 * 3600)
    devices = s.devices or 1
    fitting = fitting_interval(s)
    steps = max(1, s.total_steps // 50 if fitting is None else min(fitting, s.total_steps // 50))
    return Verdict(
        "critical" if devices >= MANY or (long and devices >= 64) else "warning",
        f"{says(s, 'save_every', 'total_steps', 'devices')}: no checkpoint before the end",
        f"{put(s, 'save_every', steps)}, at least every few hours",
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
        "save-interval-estimated",
        "checkpoints rarer than failures, by an estimated time of a step",
        "warning",
        ("save_every", "devices", "batch_sequences", "seq_len"),
        _interval_estimated,
        source="as save-interval; Kaplan et al. 2020, arXiv 2001.08361, for 6 operations a weight and token",
        why="Half an interval is lost at every failure.",
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
