"""Longer troubles of a loss curve, with hindsight: chaos, slow divergence, large steps that stay, no learning.

With s a short running median of x = ln loss (``SHORT`` steps on both sides) and b its best value so far, a departure is
a stretch with

    s - b > max(ln 1.08, 8 noise)    somewhere, and more than half of that throughout

that lasts ``LONG`` steps, or reaches the log's end and has climbed all the while. The noise is that of s itself: its
robust deviation from a long median, which a wandering loss makes large. b is a record low, so that three times the
noise are added to it. A departure is

    chaotic          erratic: neighbouring values differ ``ERRATIC`` times as much as in the calm before, by 4 % and
                     more; or above the first losses (a model that knows nothing) by a factor
    early_transient  the same for a few steps at the very start, settling by itself
    level_shift      up within a few steps, and staying; what follows is judged from the new level
    fast_spike       up within a few steps, and back after long
    slow_divergence  otherwise: it climbed

A **plateau** is a run that does not learn: it began as an untrained model, has lost less than two fifths of its loss at
the log's end, is still where the frequencies of the tokens alone would put it, and falls no more.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from poise.core.types import Severity
from poise.postmortem.event import Event, Kind, Recovery
from poise.postmortem.spikes import recovery
from poise.postmortem.trend import MAD_TO_SIGMA, Bools, Floats, Trend, running_median

SHORT: Final = 10
SHORT_POINTS: Final = 5
RECORD: Final = 3.0
"""Deviations by which a record low of a noisy level lies below it."""

LONG: Final = 150
ABOVE: Final = math.log(1.08)
NOISES: Final = 8.0
TOGETHER: Final = 150
"""Steps between two departures of one trouble."""

START: Final = 60
"""Steps within which a departure belongs to the start."""

UNTRAINED: Final = math.log(7.0)
"""ln of nats: a log whose first losses are above it begins with an untrained model. The smallest usual vocabularies of
subwords give more, and no model that has learned anything has so much."""

IGNORANT: Final = math.log(5.5)
"""ln of nats: about what the frequencies of the tokens alone give is above it."""

PERPLEXITY: Final = math.log(19.0)
"""No loss begins above it, in nats or in bits: that is a perplexity."""

FEWEST: Final = 16
TRANSIENT: Final = math.log(2.0)
"""A loss beyond twice that of knowing nothing is no harmless transient."""

LOUDEST: Final = 0.03
"""Noise of the short median up to which it raises the bar where it is: what is louder may be the trouble itself."""

CALM, CALMEST = 0.2, 0.75
"""Share of a log that is taken to be calm at least, and how calm that share looks in a log that is calm throughout."""

ERRATIC: Final = 3.0
ROUGH: Final = 0.04
QUICK: Final = 50
"""Steps within which a rise is a step, not a climb."""

CLIMB: Final = 20
"""Steps of a climb at the log's end from which on it is no spike in the making: those rise within a dozen."""

STUCK: Final = math.log(0.6)
STUCK_POINTS, STUCK_STEPS = 30, 500


def departures(trend: Trend, blocked: Bools) -> list[Event]:
    """Return stretches in which the loss stands far above its best, in order.

    Args:
        trend: of the loss.
        blocked: points that something else explains, (N,).
    """
    start = _start(trend)
    found: list[Event] = []
    lead = int(np.searchsorted(trend.steps, start[-1].end, side="right")) if start else 0
    for _ in range(100):
        event = _next(trend, blocked, lead)
        if event is None:
            break
        if found and found[-1].kind != "level_shift":
            event = _one(found[-1], found, event)
        found.append(event)
        # what follows a new level is judged from there
        after = event.start + QUICK if event.kind == "level_shift" else event.end
        lead = max(lead + 1, int(np.searchsorted(trend.steps, after, side="right")))
    return start + found


def plateaus(trend: Trend, unit: str = "") -> list[Event]:
    """Return the stretch in which a run does not learn, from its beginning to the log's end."""
    nats = math.log(math.log(2.0)) if unit == "bits" else 0.0
    x, steps, n = trend.x, trend.steps, len(trend.x)
    if n < STUCK_POINTS or steps[-1] - steps[0] < STUCK_STEPS:
        return []
    first = float(np.median(x[:3]))
    third, last = float(np.median(x[n // 2 : 3 * n // 4])), float(np.median(x[3 * n // 4 :]))
    ignorant = UNTRAINED < first + nats < PERPLEXITY and last + nats > IGNORANT
    noise = 3.0 * float(np.median(trend.sigma)) / math.sqrt(n / 4)
    if not ignorant or last - first < STUCK or last > first + math.log(1.05):
        return []
    if abs(third - last) > max(math.log(1.01), noise):
        return []
    start = int(np.flatnonzero(running_median(x, max(2, trend.points(SHORT))) <= last + math.log(1.03))[0])
    event = _event(trend, "plateau", "warning", start, n - 1, n - 1, first, "never")
    return [dataclasses.replace(event, value=math.exp(last), lasting=math.nan)]


# -- the start -----------------------------------------------------------------------------------------


def _start(trend: Trend) -> list[Event]:
    """Return what a run does above the loss with which it started, in its first steps."""
    known_nothing = float(trend.x[0])
    excess, short = trend.x - known_nothing, running_median(trend.x, 2)
    bar = max(math.log(1.1), 4.0 * roughness(trend.x))
    begins = trend.steps[0] <= START or known_nothing > UNTRAINED
    early = (trend.steps <= trend.steps[0] + START) & (np.arange(len(trend.x)) < max(len(trend.x) // 5, 3))
    high = np.flatnonzero((excess > bar) & early)
    if not len(high) or not begins or len(trend.x) < FEWEST:
        return []
    first = int(high[0])
    below = np.flatnonzero(short[first + 1 :] <= known_nothing)  # a dip of a point or two is no end
    last = first + int(below[0]) if len(below) else len(trend.x) - 1
    peak = first + int(np.argmax(excess[first : last + 1]))
    ended = last < len(trend.x) - 1
    length = int(trend.steps[last] - trend.steps[first])
    harmless = excess[peak] < TRANSIENT and length <= START and ended
    kind: Kind = "early_transient" if harmless else "chaotic"
    severity: Severity = "note" if harmless else "critical"
    return [_event(trend, kind, severity, first, peak, last, known_nothing, "returned" if ended else "never")]


# -- one departure -------------------------------------------------------------------------------------


def _next(trend: Trend, blocked: Bools, lead: int) -> Event | None:
    """Return the first departure from ``lead`` on."""
    n = len(trend.x)
    if n - lead < 8:
        return None
    half = max(SHORT_POINTS, trend.points(SHORT)) if n - lead >= 60 else 2
    short = trend.x.copy()
    short[lead:] = running_median(trend.x[lead:], half)
    noise = _noise(trend, short, lead, half)
    best = np.full(n, math.inf)
    best[lead:] = np.minimum.accumulate(np.where(blocked[lead:], math.inf, short[lead:]))
    bar = np.maximum(ABOVE, NOISES * np.maximum(noise, np.minimum(_local(trend, short, lead, half), LOUDEST)))
    above = np.zeros(n)
    known = np.isfinite(best)
    above[known] = short[known] - best[known] - RECORD * noise
    above[blocked] = 0.0
    high = above > bar
    off = _joined(trend, above > 0.5 * bar)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], off.astype(np.int8), [0]])))
    total = np.concatenate([[0], np.cumsum(high)])
    for first, end in edges.reshape(-1, 2):
        if total[end] > total[first]:
            event = _departure(trend, short, noise, int(first), int(end) - 1, lead)
            if event is not None:
                return event
    return None


def _departure(trend: Trend, short: Floats, noise: float, first: int, last: int, lead: int) -> Event | None:
    steps = trend.steps
    at_end = last == len(steps) - 1
    length = int(steps[last] - steps[first])
    level = float(short[lead : first + 1].min())
    lowest = _foot(short, level + RECORD * noise, first, max(lead, first - (last - first) - 5))
    start = _edge(trend, level, lowest, first)
    peak = first + int(np.argmax(trend.x[first : last + 1]))
    height = float(np.median(short[first : last + 1])) - level
    climb = int(steps[first + int(np.argmax(short[first : last + 1] > level + 0.8 * height))] - steps[start])
    still_up = at_end and last - start >= 8 and short[last] > level + 2.0 * ABOVE
    if not still_up and (length < LONG or last - first < 8):
        return None
    rough, calm = roughness(trend.x[start : last + 1]), roughness(trend.x[max(lead, start - 400) : start])
    erratic = rough > ROUGH and (rough > ERRATIC * calm or start < len(steps) // 10)
    back: Recovery = "never" if at_end else "returned"
    if erratic and length >= LONG:
        return _event(trend, "chaotic", "critical", lowest, peak, last, level, back)
    still_climbs = at_end and length > CLIMB and height < 0.8 * (float(short[last]) - level)
    if climb <= QUICK and last - first > 4 and not still_climbs:
        if at_end and length < LONG:
            return _event(trend, "fast_spike", "critical", start, peak, last, level, "open")
        if at_end:
            return _event(trend, "level_shift", "critical", start, peak, last, level, "never")
        back, lasting = recovery(trend, start, min(start + trend.points(QUICK), last), height)
        told = not math.isnan(lasting)
        stayed = back == "never" if told else _flat(short, first, last, height)
        kind: Kind = "level_shift" if stayed else "fast_spike"
        back = "never" if stayed else back if told else "open"
        return dataclasses.replace(_event(trend, kind, "critical", start, peak, last, level, back), lasting=lasting)
    return _event(trend, "slow_divergence", "critical", lowest, peak, last, level, back)


def _one(before: Event, found: list[Event], event: Event) -> Event:
    """Return two departures as one where they follow each other closely, and take the first out of the list."""
    if event.start > before.end + TOGETHER:
        return event
    found.pop()
    worse = max(before, event, key=lambda e: (e.kind == "chaotic", e.kind == "slow_divergence", e.end - e.start))
    top = max(before, event, key=lambda e: e.value)
    return dataclasses.replace(
        event,
        kind=worse.kind,
        start=min(before.start, event.start),
        peak=top.peak,
        value=top.value,
        baseline=before.baseline,
        points=before.points + event.points,
    )


def _noise(trend: Trend, short: Floats, lead: int, half: int) -> float:
    """Return how far the short median strays from a long one, robustly."""
    part = short[lead:]
    if len(part) < 20 * half:
        return 1.25 * 2.0 * roughness(trend.x[lead:]) / math.sqrt(2 * half + 1)
    away = np.abs(part - running_median(trend.x[lead:], 10 * half))
    blocks = away[: len(away) // (5 * half) * 5 * half].reshape(-1, 5 * half)
    return MAD_TO_SIGMA / CALMEST * float(np.quantile(np.median(blocks, axis=1), CALM))  # what is chaotic is no measure


def _local(trend: Trend, short: Floats, lead: int, half: int) -> Floats:
    """Return how far the short median strays from a long one nearby, robustly, (N,)."""
    out = np.zeros(len(short))
    part = short[lead:]
    if len(part) >= 20 * half:
        away = np.abs(part - running_median(trend.x[lead:], 10 * half))
        out[lead:] = MAD_TO_SIGMA * running_median(away, 15 * half)
    return out


def _joined(trend: Trend, off: Bools) -> Bools:
    """Return ``off`` with gaps of up to twice ``SHORT`` steps, and of three points, closed."""
    out, at = off.copy(), np.flatnonzero(off)
    gaps = np.flatnonzero((np.diff(at) > 1) & (np.diff(at) <= max(3, trend.points(2 * SHORT))))
    for i in gaps:
        out[at[i] : at[i + 1]] = True
    return out


def _foot(short: Floats, low: float, first: int, since: int) -> int:
    """Return the last point before a climb that was still about as low as the best."""
    at = np.flatnonzero(short[since : first + 1] <= low)
    return since + int(at[-1]) if len(at) else since


def _edge(trend: Trend, level: float, foot: int, first: int) -> int:
    """Return the first point that stands clearly above the level, from the foot on."""
    clear = level + max(4.0 * float(trend.sigma[first]), ABOVE / 2)
    raised = np.flatnonzero(trend.x[foot : first + 1] > clear)
    return foot + int(raised[0]) if len(raised) else foot


def _flat(short: Floats, first: int, last: int, height: float) -> bool:
    """Whether a stretch stays up to its end, rather than coming down."""
    part = short[first : last + 1]
    third = max(1, len(part) // 3)
    return float(np.median(part[:third]) - np.median(part[-third:])) < 0.5 * height


def roughness(x: Floats) -> float:
    """Return how much neighbouring values differ, robustly, as a deviation."""
    if len(x) < 4:
        return 0.0
    return MAD_TO_SIGMA * float(np.median(np.abs(np.diff(x)))) / math.sqrt(2)


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
