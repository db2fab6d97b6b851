"""What a page draws of a log's loss: its points, its trend, and the range of values that a picture opens with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from poise.dashboard.curves import Line, view
from poise.postmortem.chart import peaks_of, roof
from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.steps import curve
from poise.postmortem.trend import Floats, Ints, fit

TREND_POINTS: Final = 100_000
"""Most points that a trend is fitted to; longer logs are fitted to medians of neighbours."""

_DECADES: Final = 1.5
"""Powers of ten that a loss spans from which on its scale is logarithmic."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a log is about, for drawing.

    Attributes:
        name: of the series; ``loss`` where there is one.
        every: its points.
        trend: the fitted trend; empty where there are too few points.
        log: whether its scale is logarithmic.
        span: the value range that a picture opens with, in the scale's own terms.
        steps: first and last step.
    """

    name: str
    every: Line
    trend: Line
    log: bool
    span: tuple[float, float]
    steps: tuple[float, float]

    @property
    def top(self) -> float:
        """The largest value in the picture."""
        return 10.0 ** self.span[1] if self.log else self.span[1]

    def inside(self, value: float) -> bool:
        """Return whether a value has a place in the picture."""
        low = 10.0 ** self.span[0] if self.log else self.span[0]
        return low <= value <= self.top


def curve_of(d: Diagnosis) -> Curve:
    """Return the log's loss with its trend, or what it has instead."""
    log = d.log
    steps, values = curve(log)
    name = next((n for n, series in log.series.items() if series[0] is steps), "")
    every = line_of(steps, values)
    finite = every.finite()
    trend = Line(np.empty(0), np.empty(0)) if _off_trend(d) else _trend(steps, values)
    positive = bool(len(finite)) and float(finite.values.min()) > 0
    log_scale = positive and math.log10(float(finite.values.max()) / float(finite.values.min())) >= _DECADES
    if log_scale:
        low, high = math.log10(float(finite.values.min())), math.log10(float(finite.values.max()))
        room = 0.04 * (high - low)
        span = (low - room, high + room)
    else:
        top = roof(finite.steps, finite.values, peaks_of(d))
        low, high = view(finite.values, finite.values)
        span = (low, min(high, top + 0.08 * (top - low)))
    ends = (float(steps[0]), float(steps[-1])) if len(steps) else (0.0, 1.0)
    return Curve(name, every, trend, log_scale, span, ends)


def _off_trend(d: Diagnosis) -> bool:
    """Return whether most of the log is off any trend, so that there is none to draw."""
    long = [e for e in d.events if e.severity != "note" and e.kind in ("chaotic", "slow_divergence", "nonfinite")]
    covered = sum(min(e.points, d.points) for e in long)
    return covered > 0.5 * d.points


def _trend(steps: Ints, values: Floats) -> Line:
    """Return the trend that the events were found against; of medians of neighbours where the log is very long."""
    good = np.isfinite(values) & (values > 0)
    steps, values = steps[good], values[good]
    if len(steps) < 8:
        return Line(np.empty(0), np.empty(0))
    size = -(-len(steps) // TREND_POINTS)
    if size > 1:
        rows = len(steps) // size
        steps = np.ascontiguousarray(steps[: rows * size].reshape(rows, size)[:, size // 2])
        values = np.median(values[: rows * size].reshape(rows, size), axis=1)
    found = fit(steps, values)
    return line_of(found.steps, np.exp(found.level))


def line_of(steps: Ints, values: Floats) -> Line:
    return Line(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64))


def between(line: Line, first: float, last: float) -> Line:
    low, high = np.searchsorted(line.steps, first), np.searchsorted(line.steps, last, side="right")
    return Line(line.steps[low:high], line.values[low:high])


def trend_between(trend: Line, first: float, last: float) -> Line:
    """Return the trend there, also between the points of a coarse one."""
    inner = between(trend, first, last)
    if len(inner) >= 10 or not len(trend):
        return inner.thinned(500)
    steps = np.linspace(max(first, trend.steps[0]), min(last, trend.steps[-1]), 50)
    return Line(steps, np.interp(steps, trend.steps, trend.values))
