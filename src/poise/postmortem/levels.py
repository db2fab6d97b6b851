"""Steps of a loss curve from one level to another, with hindsight: small ones upwards that stay, large ones downwards.

A **level shift** is found where the trend steps up by itself (``spikes.offset``), clearly against the same measure
elsewhere in the log, and is still there as far on as can be told (``spikes.recovery``); what has gone by then was a
low, long spike.

A **collapse** is a fall by a quarter or more, within one of ``SPANS``, below where the curve before it leads (x against
ln t) and below its best, far beyond its noise; not in a run's first descent. Several such falls at equal distances are
epochs: a model that has seen its data before does better on them at once. That is a note (``level_drop``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from poise.core.types import Severity
from poise.postmortem.event import Event
from poise.postmortem.spikes import offset, reach_of, recovery
from poise.postmortem.trend import MAD_TO_SIGMA, Bools, Floats, Trend, bridged, running_median

SMALLEST_SHIFT: Final = math.log(1.01)
SHIFT_NOISES: Final = 8.0
KNOWN: Final = 450
"""Steps that have to be known first: a young run falls fast, and not evenly."""

KNOWN_POINTS: Final = 40
SPANS: Final = (50, 200, 800)
"""Steps within which a collapse can happen."""

DROP: Final = -math.log(0.75)
FIRST_DESCENT: Final = math.log(2.0)
"""How far the loss has fallen from its beginning before a fall can be too deep."""

FALL_NOISES: Final = 8.0


def shifts(trend: Trend, blocked: Bools) -> list[Event]:
    """Return small steps upwards away from everything else: those that stay, and those that were low, long spikes."""
    n, reach = len(trend.x), trend.points(reach_of(trend))
    if n < 4 * reach:
        return []
    short = running_median(trend.x, max(2, reach // 4))
    aside = reach // 4 + 1
    at = np.arange(reach, n - reach, max(1, reach // 8))
    jumps = short[at + aside] - short[at - aside]
    usual = MAD_TO_SIGMA * float(np.median(np.abs(jumps - running_median(jumps, 16)))) + 1e-9
    bar = max(SMALLEST_SHIFT, SHIFT_NOISES * usual)
    young = trend.steps[at] < trend.steps[0] + 2 * KNOWN
    free = ~np.array([blocked[max(0, i - reach) : i + reach].any() for i in at])
    steps, errors = np.zeros(len(at)), np.full(len(at), math.inf)
    for k in np.flatnonzero((jumps > 0.5 * bar) & free & ~young):
        steps[k], errors[k] = offset(trend, int(at[k]), int(at[k]))[:2]
    tall = np.flatnonzero((steps > bar) & (steps > SHIFT_NOISES * errors))
    found = []
    for group in np.split(tall, np.flatnonzero(np.diff(tall) > 8) + 1):
        if len(group):
            i, height = int(at[group[np.argmax(steps[group])]]), float(steps[group].max())
            if not _lands_on_older(trend, i, height, reach):
                found.append(_shift(trend, i, height, reach))
    return found


def collapses(trend: Trend) -> list[Event]:
    """Return falls that are too fast to be learning: at most one, and epochs."""
    reach = trend.points(reach_of(trend))
    n = len(trend.x)
    if n < KNOWN_POINTS or n < reach:
        return []
    raised = trend.residual > 4.0 * trend.sigma
    half = max(2, trend.points(4))
    short = running_median(bridged(trend.x, raised), half)
    noise = MAD_TO_SIGMA * float(np.median(np.abs(short - running_median(trend.x, 10 * half)))) + 1e-4
    falls = sorted({hit for span in SPANS for hit in _falls(trend, short, trend.points(span), reach, noise)})
    if not falls:
        return []
    apart = [falls[0]]
    for hit in falls[1:]:
        if hit - apart[-1] > max(reach // 2, trend.points(KNOWN) // 3):
            apart.append(hit)
    if len(apart) >= 2 and _evenly(trend, apart):
        return [_drop(trend, short, hit, half) for hit in apart]
    return [_collapse(trend, short, apart[0], half)]


# -- parts ---------------------------------------------------------------------------------------------


def _lands_on_older(trend: Trend, at: int, height: float, reach: int) -> bool:
    """Whether the loss only goes back to where it was before it had stepped down, a while ago."""
    for back in (1.5, 2.5, 4.0):
        first = at - int(back * reach)
        if first >= reach and abs(offset(trend, first, at)[0]) < 0.3 * height:
            return True
    return False


def _falls(trend: Trend, short: Floats, span: int, reach: int, noise: float) -> list[int]:
    """Return where the loss falls by too much within ``span`` points, as indices of the beginnings."""
    n, steps = len(short), trend.steps.astype(np.float64)
    first = max(reach, KNOWN_POINTS // 2, int(np.searchsorted(trend.steps, trend.steps[0] + KNOWN)))
    if span < 2 or n - span <= first:
        return []
    at = np.arange(first, n - span)
    best = np.minimum.accumulate(short)
    usual = running_median(trend.x, reach)[at - reach // 2]
    descended = short[0] - np.maximum(best[at], usual) > FIRST_DESCENT
    fell = short[at] - short[at + span]
    candidates = at[
        descended & (fell > DROP) & (best[at] - short[at + span] > 0.5 * DROP) & (fell > FALL_NOISES * noise)
    ]
    out: list[int] = []
    u = np.log(np.maximum(steps - min(steps[0], 0.0) + 1.0, 1.0))
    for i in candidates.tolist():
        if out and i - out[-1] <= span:
            continue
        back = slice(max(0, i - reach), i)
        slope = min(float(np.polyfit(u[back], trend.x[back], 1)[0]), 0.0)
        expected = short[i] + slope * (u[i + span] - u[i])
        if expected - short[i + span] > max(DROP, FALL_NOISES * noise):
            out.append(i)
    return [_steepest(short, i, span) for i in out]


def _steepest(short: Floats, i: int, span: int) -> int:
    """Return where within a fall the loss falls fastest."""
    inner = short[i : i + span + 1]
    return i + int(np.argmin(np.diff(inner)))


def _evenly(trend: Trend, at: list[int]) -> bool:
    """Whether falls lie at equal distances, from each other and from the beginning."""
    where = trend.steps[at].astype(np.float64)
    gaps = np.diff(where)
    first = where[0] - float(trend.steps[0])
    usual = float(np.median(gaps))
    return bool(
        (np.abs(gaps / usual - np.rint(gaps / usual)) < 0.1).all() and abs(first / usual - round(first / usual)) < 0.15
    )


def _drop(trend: Trend, short: Floats, hit: int, half: int) -> Event:
    return dataclasses.replace(
        _collapse(trend, short, hit, half), kind="level_drop", severity="note", recovery="returned"
    )


def _collapse(trend: Trend, short: Floats, hit: int, half: int) -> Event:
    """Return a fall as an event: until the old level is there again, or the fall is over."""
    before = short[max(0, hit - 4 * half) : hit + 1]
    level = float(before.max()) if len(before) else float(short[hit])
    start = int(max(0, hit - half))
    above = np.flatnonzero(short[hit + half :] > level - 0.3 * DROP)
    later = np.flatnonzero(short[hit:] < level - DROP)
    deep = hit + int(later[0]) if len(later) else hit
    back = [hit + half + int(i) for i in above if hit + half + int(i) > deep]
    last = len(short) - 1
    span = back[0] if back else min(last, hit + trend.points(SPANS[-1]))
    bottom = deep + int(np.argmin(short[deep : span + 1]))
    value = float(short[bottom])
    severity: Severity = "critical" if level - value > math.log(2.0) else "warning"
    return Event(
        kind="collapse",
        severity=severity,
        start=int(trend.steps[start]),
        peak=int(trend.steps[bottom]),
        end=int(trend.steps[span if back else bottom]),
        baseline=math.exp(level),
        value=math.exp(value),
        points=(span if back else bottom) - start + 1,
        recovery="returned" if back else "never",
        lasting=math.nan if back else math.expm1(value - level),
    )


def _shift(trend: Trend, at: int, height: float, reach: int) -> Event:
    window = np.arange(at - reach // 2, at + reach // 2)
    inner = window[2:-2]
    jumps = [float(np.median(trend.x[i : i + reach // 2]) - np.median(trend.x[i - reach // 2 : i])) for i in inner]
    where = int(inner[int(np.argmax(jumps))]) if len(inner) else at
    level = float(np.median(trend.x[max(0, where - reach // 2) : where]))
    came_back, lasting = recovery(trend, where, where, height)
    last = min(len(trend.x) - 1, where + reach)
    if came_back == "returned":  # a low, long spike
        last = _sunk(trend, where, level, height)
    severity: Severity = "critical" if height > math.log(1.05) and came_back != "returned" else "warning"
    peak = where + int(np.argmax(running_median(trend.x[where : last + 1], max(2, reach // 20))))
    return Event(
        kind="fast_spike" if came_back == "returned" else "level_shift",
        severity=severity,
        start=int(trend.steps[where]),
        peak=int(trend.steps[peak if came_back == "returned" else where]),
        end=int(trend.steps[last]),
        baseline=math.exp(level),
        value=math.exp(level + height),
        points=last - where + 1,
        recovery="never" if came_back == "partly" else came_back,
        lasting=lasting if came_back == "returned" else math.expm1(height),
    )


def _sunk(trend: Trend, where: int, level: float, height: float) -> int:
    """Return where a low, long spike has sunk to a fifth of its height, against the line through both its sides."""
    reach = trend.points(reach_of(trend))
    n = len(trend.x)
    short = running_median(trend.x, max(2, reach // 20))
    far = min(n - 1, where + 8 * reach)
    later = float(np.median(trend.x[max(where + 1, far - reach // 2) : far + 1]))
    steps = trend.steps.astype(np.float64)
    line = level + (min(later, level) - level) * (steps - steps[where]) / max(steps[far] - steps[where], 1.0)
    down = np.flatnonzero(short[where + 2 : far + 1] - line[where + 2 : far + 1] < 0.2 * height)
    return where + 2 + int(down[0]) if len(down) else far
