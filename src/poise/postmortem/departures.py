"""Longer troubles of a loss curve, with hindsight: chaos, slow divergence, level shifts, collapse, no learning.

With s a short running median of x = ln loss (``SHORT`` steps on both sides) and b its best value so far, a departure is
a stretch with

    s - b > max(ln 1.08, noise of s)

that lasts ``LONG`` steps, or reaches the log's end and has climbed all the while. It is

    chaotic          erratic: neighbouring values differ ``ERRATIC`` times as much as in the calm before, by 4 % and
                     more; or above the first losses (a model that knows nothing) by a factor
    early_transient  the same for a few steps at the very start, settling by itself
    level_shift      up within a few steps, and staying
    fast_spike       up within a few steps, and back after long
    slow_divergence  otherwise: it climbed

A **level shift** below that is found where the trend steps up by itself (``spikes.offset``), clearly against the same
measure elsewhere in the log. A **collapse** is a fall by a quarter within ``FALL`` steps, to the lowest level so far,
twice as deep as any fall over as many steps before. A **plateau** is a run that does not learn: from its beginning to
its end the loss has fallen by less than two fifths, and no more in the second half. That is about what the
frequencies of the tokens alone give.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from poise.core.types import Severity
from poise.postmortem.event import Event, Kind, Recovery
from poise.postmortem.spikes import AFTER, offset, recovery
from poise.postmortem.trend import MAD_TO_SIGMA, Bools, Floats, Trend, bridged, running_median

SHORT: Final = 10
LONG: Final = 150
ABOVE: Final = math.log(1.08)
NOISES: Final = 8.0

START: Final = 60
"""Steps, and at most as many points, within which a departure belongs to the start."""

UNTRAINED: Final = math.log(6.0)
"""A log whose first losses are above it begins with an untrained model, whatever its first step is called."""

FEWEST: Final = 16
TRANSIENT: Final = math.log(2.0)
"""A loss beyond twice that of knowing nothing is no harmless transient."""

ERRATIC: Final = 3.0
ROUGH: Final = 0.04
QUICK: Final = 50
"""Steps within which a rise is a step, not a climb."""

CLIMB: Final = 20
"""Steps of a climb at the log's end from which on it is no spike in the making: those rise within a dozen."""

SMALLEST_SHIFT: Final = math.log(1.01)
SHIFT_NOISES: Final = 8.0
FALL: Final = 72
DROP: Final = -math.log(0.75)
STUCK: Final = math.log(0.6)
STUCK_POINTS, STUCK_STEPS = 30, 500
KNOWN: Final = 450
"""Steps that have to be known before a fall can be called too fast: a young run falls fast."""


def departures(trend: Trend) -> list[Event]:
    """Return stretches in which the loss stands far above its best, in order."""
    found = _start(trend)
    ended = found[-1].end if found else int(trend.steps[0]) - 1
    lead = int(np.searchsorted(trend.steps, ended, side="right"))
    short = trend.x.copy()
    short[lead:] = running_median(trend.x[lead:], max(2, trend.points(SHORT)))
    best = np.full(len(short), math.inf)
    best[lead:] = np.minimum.accumulate(short[lead:])
    width = 2 * max(2, trend.points(SHORT)) + 1
    noise = 1.25 * min(_calm(trend), 2.0 * _roughness(trend.x[lead:])) / math.sqrt(width)
    off = np.zeros(len(short), dtype=bool)
    off[lead:] = short[lead:] - best[lead:] > max(ABOVE, NOISES * noise)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], _joined(trend, off).astype(np.int8), [0]])))
    for first, end in edges.reshape(-1, 2):
        event = _departure(trend, short, int(first), int(end) - 1)
        if event is not None:
            found.append(event)
    return found


def shifts(trend: Trend, blocked: Bools) -> list[Event]:
    """Return small steps upwards that stay, away from everything else."""
    n, reach = len(trend.x), trend.points(AFTER)
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
    tall = (steps > bar) & (steps > SHIFT_NOISES * errors)
    found = []
    for group in np.split(np.flatnonzero(tall), np.flatnonzero(np.diff(np.flatnonzero(tall)) > 8) + 1):
        if len(group):
            i = int(at[group[np.argmax(steps[group])]])
            found.append(_shift(trend, i, float(steps[group].max())))
    return found


def collapses(trend: Trend, blocked: Bools) -> list[Event]:
    """Return falls that are too fast to be learning."""
    gap = trend.points(FALL)
    short = running_median(bridged(trend.x, blocked), max(2, trend.points(4)))  # spikes fall fast, too
    if len(short) < 3 * gap:
        return []
    fall = np.zeros(len(short))
    fall[gap:] = short[:-gap] - short[gap:]
    lowest = short <= np.minimum.accumulate(short) + 1e-12
    apart, memory = trend.points(256), trend.points(512)
    earlier = np.zeros(len(short))
    if len(short) > apart:
        padded = np.concatenate([np.zeros(memory - 1), fall[:-apart]])
        earlier[apart:] = _running_max(padded, memory)
    known = trend.steps > trend.steps[0] + KNOWN
    bad = known & lowest & (fall > np.maximum(DROP, 2.0 * earlier)) & ~blocked
    if not bad.any():
        return []
    hit = int(np.flatnonzero(bad)[0])
    window = np.arange(max(0, hit - gap), min(len(short), hit + gap))
    steepest = window[np.argmin(np.gradient(short[window]))] if len(window) > 2 else hit
    start = int(max(0, steepest - trend.points(4)))
    bottom = int(np.argmin(short[hit : hit + 4 * gap])) + hit
    level = float(np.median(trend.x[max(0, start - gap) : start + 1]))
    return [_event(trend, "collapse", "critical", start, bottom, bottom, level, "never")]


def plateaus(trend: Trend) -> list[Event]:
    """Return the stretch in which a run does not learn, from its beginning to the log's end."""
    x, steps, n = trend.x, trend.steps, len(trend.x)
    begins = steps[0] <= START or x[0] > UNTRAINED
    if not begins or n < STUCK_POINTS or steps[-1] - steps[0] < STUCK_STEPS:
        return []
    third, last = float(np.median(x[n // 2 : 3 * n // 4])), float(np.median(x[3 * n // 4 :]))
    noise = 3.0 * float(np.median(trend.sigma)) / math.sqrt(n / 4)
    if last - x[0] < STUCK or last > x[0] + math.log(1.05) or abs(third - last) > max(math.log(1.01), noise):
        return []
    first = int(np.flatnonzero(running_median(x, max(2, trend.points(SHORT))) <= last + math.log(1.03))[0])
    event = _event(trend, "plateau", "warning", first, n - 1, n - 1, float(x[0]), "never")
    return [dataclasses.replace(event, value=math.exp(last), lasting=math.nan)]


# -- parts ---------------------------------------------------------------------------------------------


def _running_max(x: Floats, width: int) -> Floats:
    """Return the largest of each ``width`` neighbouring values, (N - width + 1,), in time independent of ``width``."""
    n = len(x)
    blocks = -(-n // width)
    padded = np.concatenate([x, np.full(blocks * width - n, -math.inf)]).reshape(blocks, width)
    ahead = np.maximum.accumulate(padded, axis=1).ravel()
    behind = np.maximum.accumulate(padded[:, ::-1], axis=1)[:, ::-1].ravel()
    out: Floats = np.maximum(behind[: n - width + 1], ahead[width - 1 : n])
    return out


def _calm(trend: Trend) -> float:
    """Return the noise of single points in the calmer half of the log."""
    return float(np.quantile(trend.sigma, 0.25))


def _start(trend: Trend) -> list[Event]:
    """Return what a run does above the loss with which it started, in its first steps."""
    known_nothing = float(trend.x[0])
    excess, short = trend.x - known_nothing, running_median(trend.x, 2)
    bar = max(math.log(1.1), 4.0 * _roughness(trend.x))
    early = np.flatnonzero((excess > bar) & _within_start(trend))
    begins = trend.steps[0] <= START or known_nothing > UNTRAINED
    if not len(early) or not begins or len(trend.x) < FEWEST:
        return []
    first = int(early[0])
    below = np.flatnonzero(short[first + 1 :] <= known_nothing)  # a dip of a point or two is no end
    last = first + int(below[0]) if len(below) else len(trend.x) - 1
    peak = first + int(np.argmax(excess[first : last + 1]))
    ended = last < len(trend.x) - 1
    length = int(trend.steps[last] - trend.steps[first])
    harmless = excess[peak] < TRANSIENT and length <= START and ended
    kind: Kind = "early_transient" if harmless else "chaotic"
    severity: Severity = "note" if harmless else "critical"
    return [_event(trend, kind, severity, first, peak, last, known_nothing, "returned" if ended else "never")]


def _within_start(trend: Trend) -> Bools:
    inside: Bools = trend.steps <= trend.steps[0] + START
    inside[START:] = False
    return inside


def _joined(trend: Trend, off: Bools) -> Bools:
    """Return ``off`` with gaps of up to ``SHORT`` steps, and of two points, closed."""
    out, at = off.copy(), np.flatnonzero(off)
    gaps = np.flatnonzero((np.diff(at) > 1) & (np.diff(at) <= max(3, trend.points(2 * SHORT))))
    for i in gaps:
        out[at[i] : at[i + 1]] = True
    return out


def _departure(trend: Trend, short: Floats, first: int, last: int) -> Event | None:
    steps = trend.steps
    at_end = last == len(steps) - 1
    lowest = int(np.flatnonzero(short[: first + 1] <= short[: first + 1].min())[-1])
    start = _foot(trend, short, first)
    length = int(steps[last] - steps[start])
    peak = first + int(np.argmax(trend.x[first : last + 1]))
    level = float(short[: first + 1].min())
    height = float(np.median(short[first : last + 1])) - level
    climb = int(steps[first + int(np.argmax(short[first : last + 1] > level + 0.8 * height))] - steps[start])
    rough, calm = _roughness(trend.x[start : last + 1]), _roughness(trend.x[max(0, start - 2 * len(short)) : start])
    erratic = rough > ROUGH and (rough > ERRATIC * calm or start < len(steps) // 10)
    still_up = at_end and last - start >= 8 and short[last] > short[start] + 2 * ABOVE
    if length < LONG and not still_up:
        return None
    back: Recovery = "never" if at_end else "returned"
    if erratic and length >= LONG:
        return _event(trend, "chaotic", "critical", lowest, peak, last, level, back)
    still_climbs = at_end and length > CLIMB and height < 0.8 * (float(short[last]) - level)
    if climb <= QUICK and last - first > 4 and not still_climbs:
        if at_end and length < LONG:
            return _event(trend, "fast_spike", "critical", start, peak, last, level, "open")
        if at_end:
            return _event(trend, "level_shift", "critical", start, peak, last, level, "never")
        back, lasting = recovery(trend, start, last, height)
        kind: Kind = "level_shift" if back == "never" else "fast_spike"
        return dataclasses.replace(_event(trend, kind, "critical", start, peak, last, level, back), lasting=lasting)
    return _event(trend, "slow_divergence", "critical", lowest, peak, last, level, back)


def _foot(trend: Trend, short: Floats, first: int) -> int:
    """Return where the climb to ``first`` began: after the last point that was still about as low as the best."""
    best = float(short[: first + 1].min())
    low = np.flatnonzero(short[: first + 1] <= best + 2.0 * float(trend.sigma[first]) / math.sqrt(5))
    foot = int(low[-1]) if len(low) else first
    raised = np.flatnonzero(trend.x[foot : first + 1] > best + max(4.0 * float(trend.sigma[first]), ABOVE / 2))
    return foot + int(raised[0]) if len(raised) else foot


def _roughness(x: Floats) -> float:
    """Return how much neighbouring values differ, robustly."""
    if len(x) < 4:
        return 0.0
    return MAD_TO_SIGMA * float(np.median(np.abs(np.diff(x)))) / math.sqrt(2)


def _shift(trend: Trend, at: int, height: float) -> Event:
    reach = trend.points(AFTER)
    window = np.arange(at - reach // 2, at + reach // 2)
    inner = window[2:-2]
    jumps = [float(np.median(trend.x[i : i + reach // 2]) - np.median(trend.x[i - reach // 2 : i])) for i in inner]
    where = int(inner[int(np.argmax(jumps))]) if len(inner) else at
    level = float(np.median(trend.x[max(0, where - reach // 2) : where]))
    start = int(trend.steps[where])
    severity: Severity = "critical" if height > math.log(1.05) else "warning"
    return Event(
        kind="level_shift",
        severity=severity,
        start=start,
        peak=start,
        end=int(trend.steps[min(len(trend.steps) - 1, where + reach)]),
        baseline=math.exp(level),
        value=math.exp(level + height),
        points=reach,
        recovery="never",
        lasting=math.expm1(height),
    )


def _event(
    trend: Trend, kind: Kind, severity: Severity, first: int, peak: int, last: int, level: float, back: Recovery
) -> Event:
    tail = trend.x[last - min(4, last - first) : last + 1]
    return Event(
        kind=kind,
        severity=severity,
        start=int(trend.steps[first]),
        peak=int(trend.steps[peak]),
        end=int(trend.steps[last]),
        baseline=math.exp(level),
        value=math.exp(float(trend.x[peak])),
        points=last - first + 1,
        recovery=back,
        lasting=math.expm1(float(np.median(tail)) - level) if back == "never" else math.nan,
    )
