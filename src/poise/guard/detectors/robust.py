"""Robust statistics of a noisy, drifting series, kept up to date cheaply; several detectors are built on them.

Three parts:
    ``Window``      the values of the last steps in order and sorted, so that a quantile costs nothing
    ``Tail``        how far into the tail a bar must lie to give a wanted rate of false alarms
    ``RobustRule``  a one-sided outlier rule with a fixed number of deviations, for notes on norms

Windows count steps, not points, so that a log of every tenth step is judged by the same span of training; where
that leaves too few points, a least number of points is kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

MAD_TO_SIGMA = 1.4826
"""A median absolute deviation times this is the standard deviation of Gaussian noise."""

IQR_TO_SIGMA = 1 / 1.349
"""The same for the distance between the quartiles."""

TINY = 1e-4
"""Added to sigma, so that a constant series has one."""

MIN_SHIFT_POINTS = 10
"""Fewer points than this do not show that a new level has stopped moving."""


class Window:
    """The points of the last ``span`` steps, and at least ``least`` of them, in order and sorted.

    A push costs a binary search and a short move of memory; quantiles are look-ups.
    """

    __slots__ = ("_ordered", "least", "points", "span")

    def __init__(self, span: int, least: int) -> None:
        self.span = span
        self.least = least
        self.points: deque[tuple[int, float]] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self.points)

    def push(self, step: int, value: float) -> list[tuple[int, float]]:
        """Add a point and return those that fell out."""
        self.points.append((step, value))
        insort(self._ordered, value)
        fell: list[tuple[int, float]] = []
        while len(self.points) > self.least and self.points[0][0] <= step - self.span:
            fell.append(self.points.popleft())
            del self._ordered[bisect_left(self._ordered, fell[-1][1])]
        return fell

    def drop_last(self, count: int) -> None:
        """Forget the newest ``count`` points, as far as they are there."""
        for _ in range(min(count, len(self.points))):
            _, value = self.points.pop()
            del self._ordered[bisect_left(self._ordered, value)]

    def forget_from(self, step: int) -> None:
        """Drop the points at ``step`` and later: the run went back."""
        while self.points and self.points[-1][0] >= step:
            self.drop_last(1)

    def replace(self, points: Iterable[tuple[int, float]]) -> None:
        """Forget everything and take over ``points``."""
        self.points = deque((int(step), float(value)) for step, value in points)
        self._ordered = sorted(value for _, value in self.points)

    def quantile(self, share: float) -> float:
        """Return the value below which ``share`` of the values lie, without interpolation."""
        return self._ordered[min(int(share * len(self._ordered)), len(self._ordered) - 1)]

    @property
    def median(self) -> float:
        """The middle value, or the mean of the two middle ones."""
        half = len(self._ordered) // 2
        if len(self._ordered) % 2:
            return self._ordered[half]
        return 0.5 * (self._ordered[half - 1] + self._ordered[half])

    @property
    def sigma(self) -> float:
        """Robust standard deviation: the distance between the quartiles, scaled for Gaussian noise."""
        return IQR_TO_SIGMA * (self.quantile(0.75) - self.quantile(0.25)) + TINY

    def state_dict(self) -> list[list[float]]:
        """Return the points as JSON-able values."""
        return [list(point) for point in self.points]


class Tail:
    """The upper tail of a standardised statistic, and the bar that it exceeds at a wanted rate.

    Peaks over a threshold: excursions above ``START`` come with frequency zeta a point, and their peak lies ``beta``
    above it in the mean. For an exponential tail the value that is exceeded with probability p per point is

        bar = START + beta ln(zeta / p)

    A Gaussian tail falls faster, so that the bar is then a little high; a run whose data give heavier tails gets a
    higher bar by itself. An excursion is counted once, when the statistic is back below ``BACK``. Three things keep
    real events that went unnoticed from making the rule blind: an excursion of more than ``longest`` points is no
    noise, one peak counts at most ``WORST``, and the bar stays between ``LOWEST`` and ``HIGHEST``. Old counts fade
    with ``memory`` points. While little was seen the prior speaks: ``PRIOR`` points of a tail a little heavier than
    a Gaussian one.
    Source: Pickands 1975, Statistical inference using extreme order statistics; the exponential is the
    generalised Pareto distribution of shape 0. Counting excursions instead of points is Leadbetter 1983.
    """

    START = 2.0
    BACK = 1.0
    PRIOR = 200.0
    PRIOR_ZETA = 0.03
    PRIOR_BETA = 0.5
    WORST = 2.5
    LOWEST = 4.5
    HIGHEST = 7.0

    __slots__ = ("_excess", "_length", "_over", "_peak", "_seen", "longest", "memory")

    def __init__(self, longest: int = 1, memory: int = 10_000) -> None:
        self.longest = longest
        self.memory = memory
        self._seen = self.PRIOR
        self._over = self.PRIOR * self.PRIOR_ZETA
        self._excess = self._over * self.PRIOR_BETA
        self._peak = 0.0
        self._length = 0

    def learn(self, z: float) -> None:
        """Take in one value of a healthy step."""
        if self._seen >= self.memory:
            fade = 1.0 - 1.0 / self.memory
            self._seen *= fade
            self._over *= fade
            self._excess *= fade
        self._seen += 1.0
        if z > self.START or (self._length and z > self.BACK):
            self._peak = max(self._peak, z - self.START)
            self._length += 1
            return
        if 0 < self._length <= self.longest:
            self._over += 1.0
            self._excess += min(self._peak, self.WORST)
        self.interrupt()

    def interrupt(self) -> None:
        """Forget the excursion that is under way: it was flagged, or values are missing."""
        self._peak, self._length = 0.0, 0

    def bar(self, probability: float) -> float:
        """Return the value that a healthy step exceeds with this probability."""
        zeta, beta = self._over / self._seen, self._excess / self._over
        bar = self.START + beta * math.log(max(zeta / probability, 1.0))
        return min(max(bar, self.LOWEST), self.HIGHEST)

    def state_dict(self) -> list[float]:
        """Return the sums and the excursion under way."""
        return [self._seen, self._over, self._excess, self._peak, float(self._length)]

    def load_state_dict(self, state: list[float]) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen, self._over, self._excess, self._peak, length = map(float, state)
        self._length = int(length)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says about one value: ``level`` and ``bar`` are on the logarithmic scale."""

    kind: Literal["learning", "normal", "flagged", "relearned"]
    level: float
    bar: float


class Plateaued:
    """Values above a bar, kept until they show that they have stopped moving."""

    __slots__ = ("_since", "after", "points")

    def __init__(self, after: int) -> None:
        self.after = after
        self.points: deque[tuple[int, float]] = deque()
        self._since: int | None = None

    def add(self, step: int, x: float) -> None:
        """Keep one more value; those older than ``after`` steps go."""
        self._since = step if self._since is None else self._since
        self.points.append((step, x))
        while len(self.points) > MIN_SHIFT_POINTS and self.points[0][0] <= step - self.after:
            self.points.popleft()

    def clear(self) -> None:
        """Start afresh."""
        self.points.clear()
        self._since = None

    def forget_from(self, step: int) -> None:
        """Drop the values at ``step`` and later."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        if not self.points:
            self._since = None

    def settled(self, step: int, tolerance: float) -> bool:
        """Whether it has lasted ``after`` steps and both halves have the same median."""
        if self._since is None or step - self._since < self.after or len(self.points) < MIN_SHIFT_POINTS:
            return False
        values = [x for _, x in self.points]
        half = len(values) // 2
        return abs(median(values[:half]) - median(values[half:])) <= tolerance

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON-able values."""
        return {"points": [list(point) for point in self.points], "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.points = deque((int(s), float(x)) for s, x in state["points"])
        self._since = state["since"]


class RobustRule:
    """A one-sided outlier rule for x, the logarithm of a positive reading, with a fixed number of deviations.

        level = median of x over the last ``window`` steps
        sigma = 1.4826 median|x_i - x_(i-1)| / sqrt(2) over the last ``scale_window`` steps
        flagged if x - level > max(n_sigma sigma, floor)

    Differences, unlike deviations from the level, do not take a falling series for noise. A flagged value stays out
    of the windows; after ``relearn_after`` steps in a row above the bar at a level that has stopped moving, that
    level is the new normal: the windows are refilled from it and the rule says so, once.

    Args:
        window, scale_window: in steps; at least half as many points are kept.
        n_sigma: how many robust standard deviations are too many.
        floor: log-distance below which nothing is flagged, however quiet the series.
        min_values: values needed before the first judgement.
        relearn_after: steps in a row above the bar before a new level is accepted.
    """

    def __init__(
        self, *, window: int, scale_window: int, n_sigma: float, floor: float, min_values: int, relearn_after: int
    ) -> None:
        assert min_values >= 3, "two differences are the least a median makes sense of"
        self.n_sigma = n_sigma
        self.floor = floor
        self.min_values = min_values
        self._seen = 0
        self._last = math.nan
        self._values = Window(window, max(window // 2, 2))
        self._changes = Window(scale_window, max(scale_window // 2, min_values))
        self._held = Plateaued(relearn_after)

    def update(self, step: int, x: float) -> Verdict:
        """Judge ``x`` at ``step`` and learn from it unless it is flagged. ``x`` must be finite."""
        assert math.isfinite(x)
        self._forget_from(step)
        if self._seen < self.min_values or len(self._changes) < 2:
            self._learn(step, x)
            return Verdict("learning", x, math.inf)
        level = self._values.median
        sigma = MAD_TO_SIGMA * self._changes.median / math.sqrt(2) + TINY
        bar = max(self.n_sigma * sigma, self.floor)
        if x - level <= bar:
            self._held.clear()
            self._learn(step, x)
            return Verdict("normal", level, bar)
        self._held.add(step, x)
        if not self._held.settled(step, max(3 * sigma, self.floor / 2)):
            return Verdict("flagged", level, bar)
        points = list(self._held.points)
        self._held.clear()
        self._values.replace([])
        self._changes.replace([])
        self._seen, self._last = 0, math.nan
        for point in points:
            self._learn(*point)
        return Verdict("relearned", level, bar)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON-able values."""
        return {
            "seen": self._seen,
            "last": None if math.isnan(self._last) else self._last,
            "values": self._values.state_dict(),
            "changes": self._changes.state_dict(),
            "held": self._held.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen = int(state["seen"])
        self._last = math.nan if state["last"] is None else float(state["last"])
        self._values.replace(state["values"])
        self._changes.replace(state["changes"])
        self._held.load_state_dict(state["held"])

    def _learn(self, step: int, x: float) -> None:
        if self._seen:
            self._changes.push(step, abs(x - self._last))
        self._values.push(step, x)
        self._last = x
        self._seen += 1

    def _forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later: a host went back without restoring this memory."""
        if self._values.points and self._values.points[-1][0] >= step:
            self._values.forget_from(step)
            self._changes.forget_from(step)
            self._last = self._values.points[-1][1] if self._values.points else math.nan
            self._seen = len(self._changes) + 1 if self._values.points else 0
        self._held.forget_from(step)
