"""Distances in a log, in its own steps: how far apart points are, how long a step is, how many there are."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from poise.postmortem.event import Event
from poise.postmortem.log import Log
from poise.postmortem.trend import Floats, Ints

SPIKE_KINDS: Final = frozenset({"fast_spike", "slow_divergence", "level_shift", "chaotic", "nonfinite"})
"""Kinds in which the loss left its trend upwards, or was lost, through the state of the run."""

LOOK_AT: Final = 10_000
"""Points from which on their distance is taken from a sample."""

BENIGN_KINDS: Final = frozenset({"data_outlier", "early_transient", "grad_spike"})
"""Kinds that need no reaction."""

KNOWN_KINDS: Final = SPIKE_KINDS | BENIGN_KINDS | {"collapse", "plateau", "logit_growth"}
"""Kinds that the explanations know; a note of any other kind needs no reaction either."""

LOSSES: Final = ("loss", "val_loss")
"""Series whose trouble is the loss's."""

SHIFT_BLUR: Final = 10
"""Steps to which the start of a level shift is known."""

FACTOR: Final = 4.0
"""Relative rises from here on (+400 %) are told as factors."""


def curve(log: Log) -> tuple[Ints, Floats]:
    """Return the series that the log is about: its loss, else what there is instead."""
    for name in ("loss", "val_loss", "grad_norm"):
        if name in log.series:
            return log.series[name]
    return max(log.series.values(), key=lambda s: len(s[0]), default=(np.empty(0, np.int64), np.empty(0)))


def interval(log: Log) -> int:
    """Return the usual distance of two logged points, at least 1."""
    steps, _ = curve(log)
    if len(steps) > LOOK_AT:  # a few stretches say it as well
        at = np.linspace(0, len(steps) - 1000, 5).astype(np.int64)
        gaps = np.concatenate([np.diff(steps[i : i + 1000]) for i in at])
    else:
        gaps = np.diff(steps)
    return max(1, round(float(np.median(gaps)))) if len(gaps) else 1


def length(log: Log) -> int:
    """Return how many steps the log covers."""
    steps, _ = curve(log)
    return int(steps[-1] - steps[0]) + interval(log) if len(steps) else 0


def step_size(log: Log) -> float:
    """Return what one optimizer step is in the log's own count: 1 where it counts steps.

    A log that counts samples or tokens is scaled by what it says of its batch; where it says nothing, a logged point
    is taken for a step.
    """
    if log.step_unit not in ("samples", "tokens"):
        return 1.0
    names = ("global_batch_size", "batch_size") if log.step_unit == "samples" else ("tokens_per_step",)
    for name in names:
        try:
            size = float(log.settings.get(name, "nan"))
        except ValueError:
            continue
        if math.isfinite(size) and size >= 1.0:
            return size
    return float(interval(log))


def between(series: tuple[Ints, Floats], first: float, last: float) -> tuple[Ints, Floats]:
    """Return the points with first <= step <= last."""
    steps, values = series
    low, high = at_or_after(steps, first), at_or_after(steps, math.floor(last) + 1 if math.isfinite(last) else last)
    return steps[low:high], values[low:high]


def at_or_after(steps: Ints, step: float) -> int:
    """Return the place of the first point at or after a step.

    A number with a fraction would make ``searchsorted`` copy all of the steps first.
    """
    if not -(2.0**62) < step < 2.0**62:
        return len(steps) if step > 0 else 0
    return int(np.searchsorted(steps, math.ceil(step)))


def benign(event: Event) -> bool:
    """Return whether an event needs no reaction by its kind: known to be harmless, or a note of a kind not known."""
    return event.kind in BENIGN_KINDS or (event.severity == "note" and event.kind not in KNOWN_KINDS)


def of_loss(event: Event) -> bool:
    """Return whether an event is one of the loss, and not of a gradient norm or of logits."""
    return event.signal in LOSSES


def number(value: float) -> str:
    """Return a value for a sentence; large ones without an exponent, as far as that can be read.

    >>> number(0.000123456), number(4.0), number(65536.0), number(12345.6), number(3e8), number(float("nan"))
    ('0.000123', '4', '65536', '12346', '3e+08', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def rise_text(rise: float) -> str:
    """Return a relative rise in per cent, as a factor where it is large.

    >>> rise_text(0.379), rise_text(-0.021), rise_text(56.5)
    ('+38 %', '-2.1 %', 'x 57.5')
    """
    if rise >= FACTOR:
        return f"x {1 + rise:.3g}" if rise < 1e3 else f"x {1 + rise:.1e}"
    return f"{100 * rise:+.0f} %" if abs(rise) >= 0.095 else f"{100 * rise:+.2g} %"


def nth(count: int) -> str:
    """Return an ordinal number.

    >>> nth(1), nth(2), nth(11), nth(20), nth(103)
    ('1st', '2nd', '11th', '20th', '103rd')
    """
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"
