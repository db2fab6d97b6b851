"""What happened to a run, from its log, with hindsight: ``find(log)``.

    nonfinite        loss or gradient norm is NaN or infinite
    early_transient  above the loss of knowing nothing (its first value), for a few steps at the very start: a note
    chaotic          far above the best level so far for long, and erratic; or far above the start
    slow_divergence  above the best level so far for long, having climbed there
    level_shift      a step upwards that stays, large or small
    fast_spike       up within a few steps, and down again (``spikes.py``)
    data_outlier     one odd batch: a note (``spikes.py``)
    level_drop       a fall at the end of an epoch: a note
    collapse         falling far faster than training can make it fall
    plateau          does not learn, from the beginning to the end of the log
    grad_spike       a gradient norm far above its level without a change of the loss: a note
    logit_growth     attention logits that grow without bound, where the log has them

The order is that of precedence: what lies inside an earlier kind is not told again. Cause, cost and advice are other
files' work. All lengths are in steps, whatever the logging interval. A log without a training loss is judged by its
validation loss.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from poise.postmortem import spikes
from poise.postmortem.departures import departures, plateaus
from poise.postmortem.event import Event
from poise.postmortem.levels import collapses, shifts
from poise.postmortem.log import Log
from poise.postmortem.readers.names import GRAD_NORM, LOSS, VAL_LOSS
from poise.postmortem.trend import Bools, Floats, Ints, Trend, fit

FEWEST: Final = 8
"""Finite points without which only non-finite ones are told."""

NOT_POSITIVE: Final = 0.05
"""Share of losses that are zero or negative above which the logarithm is no scale for them."""

NOISE_LEFT: Final = 0.08
"""Noise, as a share of the loss, that is much where the loss is lowest."""

CLOSE: Final = 50
"""Steps between two readings of one event of a gradient norm, or between two non-finite stretches."""

GRAD_BAR: Final = (8.0, math.log(2.0))
"""Deviations and rise of ln grad_norm above its trend."""

MAX_LOGIT: Final = 100.0
"""Attention logits above it saturate the softmax: QK-Clip's threshold (Kimi K2)."""


def find(log: Log) -> list[Event]:
    """Return the events of a log in the order of their starts."""
    found: list[Event] = []
    judged = next((name for name in (LOSS, VAL_LOSS) if name in log.series), None)
    if judged is not None:
        found += [dataclasses.replace(event, signal=judged) for event in _of_loss(*log.series[judged], log.loss_unit)]
    if GRAD_NORM in log.series:
        found += _of_gradient(*log.series[GRAD_NORM], found)
    for name, (steps, values) in log.series.items():
        if _is_max_logit(name):
            found += _of_logits(name, steps, values)
    return sorted(found, key=lambda event: (event.start, event.end))


# -- the loss ------------------------------------------------------------------------------------------


def _of_loss(steps: Ints, values: Floats, unit: str = "") -> list[Event]:
    found = _nonfinite(steps, values, LOSS)
    good = np.isfinite(values) & (values > 0)
    if good.sum() < FEWEST:
        return found
    if good.sum() < np.isfinite(values).sum() * (1.0 - NOT_POSITIVE):
        return found + _fell_to_zero(steps, values)  # its logarithm says nothing
    trend = fit(steps[good], values[good])
    blocked = np.zeros(len(trend.x), dtype=bool)
    sound = not _within_noise(trend)
    for event in collapses(trend) if sound else []:
        found.append(event)
        if event.kind == "collapse":
            _block(trend, blocked, event)
    for event in departures(trend, blocked) if sound else []:
        if event.kind == "chaotic":
            found = [other for other in found if other.kind != "collapse" or not _near(other, event)]
        found.append(event)
        _block(trend, blocked, event)
    few = len(trend.x) < spikes.FEW
    for rise in spikes.rises_of_few(trend, blocked) if few else spikes.rises(trend, blocked):
        event = _spike_of_few(trend, rise) if few else _spike(trend, rise)
        longer = next((i for i, other in enumerate(found) if _overlap(event, other)), None)
        if longer is not None:  # the ragged edge of something longer
            found[longer] = dataclasses.replace(found[longer], end=max(found[longer].end, event.end))
            _block(trend, blocked, found[longer])
            continue
        found.append(event)
        if event.kind != "data_outlier":
            _block(trend, blocked, event)
    for event in shifts(trend, blocked) if sound else []:
        found.append(event)
        _block(trend, blocked, event)
    if not any(event.kind in ("chaotic", "slow_divergence") for event in found):
        found += plateaus(trend, unit)
    return found


def _within_noise(trend: Trend) -> bool:
    """Whether the loss has fallen so far that its noise, which stays, is a large part of it: levels say little then."""
    low, high = np.quantile(trend.level, [1 / 3, 0.9])
    beneath, above = trend.level <= low, trend.level >= high
    noise = float(np.median(trend.sigma[beneath]))
    return high - low > math.log(1.5) and noise > NOISE_LEFT and noise > 2.5 * float(np.median(trend.sigma[above]))


def _fell_to_zero(steps: Ints, values: Floats) -> list[Event]:
    """Return the stretch of exact zeros with which a loss ends that was positive before."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    last = np.flatnonzero(values != 0.0)
    first = int(last[-1]) + 1 if len(last) else 0
    if first < FEWEST or len(values) - first < FEWEST or not (values[:first] > 0.0).all():
        return []
    level = float(np.median(values[max(0, first - CLOSE) : first]))
    end = int(steps[-1])
    return [
        Event(
            "collapse", "critical", int(steps[first]), int(steps[first]), end, level, 0.0, len(values) - first, "never"
        )
    ]


def _overlap(event: Event, other: Event) -> bool:
    return (
        other.severity != "note" and other.kind != "nonfinite" and event.start <= other.end and event.end >= other.start
    )


def _block(trend: Trend, blocked: Bools, event: Event) -> None:
    blocked |= (trend.steps >= event.start) & (trend.steps <= event.end)


def _spike(trend: Trend, rise: spikes.Rise) -> Event:
    start, peak, end = (int(trend.steps[i]) for i in (rise.first, rise.peak, rise.last))
    height = float(trend.residual[rise.peak])
    came_back, lasting = spikes.recovery(trend, rise.first, rise.last, height)
    if rise.odd:
        came_back = "returned"
    return Event(
        kind="data_outlier" if rise.odd else "fast_spike",
        severity="note" if rise.odd else "warning" if came_back in ("returned", "open") else "critical",
        start=start,
        peak=peak,
        end=end,
        baseline=math.exp(float(trend.level[rise.peak])),
        value=math.exp(float(trend.x[rise.peak])),
        points=rise.last - rise.first + 1,
        recovery=came_back,
        lasting=lasting,
    )


def _spike_of_few(trend: Trend, rise: spikes.Rise) -> Event:
    """Return a rise of a short log, measured against the points before it."""
    level = float(np.median(trend.x[max(0, rise.first - 8) : rise.first]))
    over = rise.last < len(trend.x) - 1
    return Event(
        kind="data_outlier" if rise.odd else "fast_spike",
        severity="note" if rise.odd else "warning",
        start=int(trend.steps[rise.first]),
        peak=int(trend.steps[rise.peak]),
        end=int(trend.steps[rise.last]),
        baseline=math.exp(level),
        value=math.exp(float(trend.x[rise.peak])),
        points=rise.last - rise.first + 1,
        recovery="returned" if over else "open",
    )


def _nonfinite(steps: Ints, values: Floats, signal: str) -> list[Event]:
    """Return an event for each stretch of non-finite values."""
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return []
    found = []
    for group in np.split(bad, np.flatnonzero(np.diff(steps[bad]) > CLOSE) + 1):
        first, last = int(group[0]), int(group[-1])
        before, after = values[:first][-CLOSE:], values[last + 1 :][:CLOSE]
        before, after = before[np.isfinite(before)], after[np.isfinite(after)]
        level = float(np.median(before)) if len(before) else math.nan
        later = float(np.median(after)) if len(after) else math.nan
        back = later <= 1.05 * level if len(before) else len(after) > 0
        alone = last == first and back and len(after) > 0
        found.append(
            Event(
                kind="nonfinite",
                severity="note" if first == 0 and back else "warning" if alone else "critical",
                start=int(steps[first]),
                peak=int(steps[first]),
                end=int(steps[last]),
                baseline=level,
                value=float(values[first]),
                points=len(group),
                recovery="never" if not len(after) else "returned" if back else "partly",
                lasting=later / level - 1.0 if len(before) and len(after) and level else math.nan,
                signal=signal,
            )
        )
    return found


# -- other series --------------------------------------------------------------------------------------


def _of_gradient(steps: Ints, values: Floats, known: list[Event]) -> list[Event]:
    """Return what only the gradient norm shows: non-finite ones, and outliers that the loss does not follow."""
    found = [
        dataclasses.replace(event, severity="note", recovery="returned") if event.recovery != "never" else event
        for event in _nonfinite(steps, values, GRAD_NORM)
        if not any(other.kind == "nonfinite" and _near(event, other) for other in known)
    ]
    good = np.isfinite(values) & (values > 0)
    if good.sum() < 4 * FEWEST:
        return found
    trend = fit(steps[good], values[good])
    tall = trend.residual > np.maximum(GRAD_BAR[0] * trend.sigma, GRAD_BAR[1])
    tall[: spikes.YOUNG] = False
    at = np.flatnonzero(tall)
    if not len(at):
        return found
    for group in np.split(at, np.flatnonzero(np.diff(trend.steps[at]) > CLOSE) + 1):
        peak = int(group[np.argmax(trend.residual[group])])
        event = Event(
            kind="grad_spike",
            severity="note",
            start=int(trend.steps[group[0]]),
            peak=int(trend.steps[peak]),
            end=int(trend.steps[group[-1]]),
            baseline=math.exp(float(trend.level[peak])),
            value=math.exp(float(trend.x[peak])),
            points=len(group),
            recovery="returned",
            signal=GRAD_NORM,
        )
        if not any(_near(event, other) for other in known):
            found.append(event)
    return found


def _near(event: Event, other: Event) -> bool:
    return event.start <= other.end + CLOSE and event.end >= other.start - CLOSE


def _is_max_logit(name: str) -> bool:
    plain = name.lower()
    return "logit" in plain and "max" in plain and "loss" not in plain


def _of_logits(name: str, steps: Ints, values: Floats) -> list[Event]:
    """Return an event where attention logits leave the range in which a softmax works, and go on growing."""
    good = np.isfinite(values)
    steps, values = steps[good], values[good]
    above = np.flatnonzero(values > MAX_LOGIT)
    if not len(above) or len(values) < FEWEST:
        return []
    first, peak = int(above[0]), int(np.argmax(values))
    start = float(np.median(values[: max(3, len(values) // 20)]))
    if values[peak] < 3.0 * max(start, 1.0) or (values > MAX_LOGIT).mean() < 0.02:
        return []
    ended = values[-1] <= MAX_LOGIT
    return [
        Event(
            kind="logit_growth",
            severity="warning",
            start=int(steps[first]),
            peak=int(steps[peak]),
            end=int(steps[above[-1]]),
            baseline=start,
            value=float(values[peak]),
            points=len(above),
            recovery="returned" if ended else "never",
            signal=name,
        )
    ]
