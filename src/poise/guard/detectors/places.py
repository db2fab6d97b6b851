"""Robust levels of many readings at once, one for each place in the model.

A detector that watches places keeps one short history for each: its level is the median of the window, its
noise (one standard deviation) the larger of

    1.4826 median|x - level|                  how far values usually are from the level
    (95th percentile of x - level) / 1.645    how far the upper tail reaches

Unlike differences between neighbours, distances from the level also see the slow wandering of readings that an
optimizer has smoothed; the second line keeps a place whose healthy values are skewed (the head, embeddings) from
being judged by the calm of its middle.

Conventions shared by the detectors that use this file:
    * the model as a whole is the place ``""``;
    * windows count steps, and hold at least ``at_least`` points where readings are taken rarely;
    * what a detector flags it does not ``learn`` but ``hold``; after ``relearn_after`` steps in a row the held
      values become the new window, once they have stopped moving;
    * everything seen at or after a step that comes again is dropped: the host went back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from poise.core.types import Signals

MAD_TO_SIGMA = 1.4826
"""Turns a median absolute deviation into a standard deviation for Gaussian noise."""

NORMAL_95 = 1.645
"""The 95th percentile of a standard normal variable."""

TINY = 1e-4
"""Added to every noise, so that a constant series has one."""

MIN_SETTLED = 10
"""Fewer held points than this do not show that a new level has stopped moving."""

REFRESH = 8
"""A level is computed anew after so many learned values."""


def tail_sigmas(alarms_per_10k: float, chances: int = 1) -> float:
    """Return the robust standard deviations that noise exceeds ``alarms_per_10k`` times in 10 000 readings.

    Assumes Laplace noise on the logarithmic scale, whose tail is far heavier than a Gaussian's: gradient norms
    need it. For scale b the median deviation is b ln 2, hence P(x > k sigma) = exp(-1.4826 ln 2 k) / 2.

    Args:
        alarms_per_10k: false alarms allowed in 10 000 steps, above 0.
        chances: readings judged at each step; the allowance is shared among them.

    >>> round(tail_sigmas(0.5), 2), round(tail_sigmas(0.5, chances=10), 2)
    (8.96, 11.2)
    """
    assert alarms_per_10k > 0.0 and chances >= 1
    share = min(alarms_per_10k / 1e4 / chances, 0.5)
    return max(math.log(1 / (2 * share)) / (MAD_TO_SIGMA * math.log(2)), 1.0)


def finite(readings: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the readings that are finite numbers."""
    return {place: value for place, value in readings if math.isfinite(value)}


def everywhere(signals: Signals, reading: str) -> dict[str, float]:
    """Return the finite values of a reading by place; the whole model is the place ``""``."""
    values = finite(signals.places(reading).items())
    whole = signals.extra.get(reading, math.nan)
    if math.isfinite(whole):
        values[""] = whole
    return values


def named(place: str) -> str:
    """Return how a message calls a place.

    >>> named("block.3"), named("")
    ('block.3', 'the whole model')
    """
    return place or "the whole model"


def others(places: Iterable[str], most: int = 4) -> str:
    """Return ``"; also at a, b"`` for further findings at the same step, or an empty string.

    >>> others(["block.1", "head"]), others([])
    ('; also at block.1, head', '')
    """
    found = [named(place) for place in places]
    if not found:
        return ""
    return f"; also at {', '.join(found[:most])}" + (f" and {len(found) - most} more" if len(found) > most else "")


@dataclass(frozen=True, slots=True)
class Level:
    """What a reading usually is: median and robust standard deviation."""

    value: float
    sigma: float


class Tracks:
    """One robust level for each place.

    Args:
        window: steps that a level looks back.
        at_least: points it looks back where there are fewer than this in the window.
        min_values: points before there is a level.
        relearn_after: steps in a row above the bar before a new level is accepted.
        refresh: a level is computed anew after so many learned values (a saving; 1 for rare readings).
    """

    def __init__(
        self, *, window: int, at_least: int, min_values: int, relearn_after: int = 100, refresh: int = REFRESH
    ) -> None:
        assert min_values >= 1 and at_least >= min_values, "a level needs the points it asks for"
        self.window = window
        self.at_least = at_least
        self.min_values = min_values
        self.relearn_after = relearn_after
        self.refresh = refresh
        self._seen: dict[str, deque[tuple[int, float]]] = {}
        self._held: dict[str, deque[tuple[int, float]]] = {}
        self._level: dict[str, tuple[Level, int]] = {}
        self._newest = 0

    def level(self, place: str) -> Level | None:
        """Return the level of a place; ``None`` while there are too few values."""
        cached = self._level.get(place)
        return None if cached is None else cached[0]

    def points(self, place: str) -> list[tuple[int, float]]:
        """Return the learned (step, value) pairs of a place, oldest first."""
        return list(self._seen.get(place, ()))

    def learn(self, place: str, step: int, x: float) -> None:
        """Take a value that nothing was wrong with into the window. ``x`` must be finite."""
        assert math.isfinite(x)
        self._newest = max(self._newest, step)
        self._held.pop(place, None)
        seen = self._seen.setdefault(place, deque())
        seen.append((step, x))
        while len(seen) > self.at_least and seen[0][0] <= step - self.window:
            seen.popleft()
        cached = self._level.get(place)
        if cached is not None and cached[1] + 1 < self.refresh:
            self._level[place] = (cached[0], cached[1] + 1)
        else:
            self._refresh(place)

    def hold(self, place: str, step: int, x: float) -> bool:
        """Put a flagged value aside; return whether the held values have just become the new level."""
        assert math.isfinite(x)
        self._newest = max(self._newest, step)
        held = self._held.setdefault(place, deque())
        held.append((step, x))
        if step - held[0][0] < self.relearn_after or len(held) < MIN_SETTLED:
            return False
        values = [value for _, value in held]
        half = len(values) // 2
        level = self.level(place)
        moved = abs(median(values[:half]) - median(values[half:]))
        if level is not None and moved > max(3 * level.sigma, 0.2):
            while len(held) > MIN_SETTLED and held[0][0] < step - self.relearn_after:
                held.popleft()
            return False
        self._seen[place] = self._held.pop(place)
        self._refresh(place)
        return True

    def forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later: a host went back without restoring this memory."""
        if step > self._newest:
            return
        self._newest = step - 1
        for series in (self._seen, self._held):
            for place in list(series):
                points = series[place]
                before = len(points)
                while points and points[-1][0] >= step:
                    points.pop()
                if not points:
                    del series[place]
                if series is self._seen and len(points) < before:
                    self._refresh(place)

    def restart(self, places: Iterable[str] = ()) -> None:
        """Learn ``places`` (all where empty) anew: somebody changed on purpose what their readings depend on."""
        for place in list(places) or [*self._seen, *self._held]:
            self._seen.pop(place, None)
            self._held.pop(place, None)
            self._level.pop(place, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON-able values."""
        return {
            "seen": {place: [list(point) for point in points] for place, points in self._seen.items()},
            "held": {place: [list(point) for point in points] for place, points in self._held.items()},
            "level": {place: [level.value, level.sigma, age] for place, (level, age) in self._level.items()},
            "newest": self._newest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen = {place: deque((int(s), float(x)) for s, x in points) for place, points in state["seen"].items()}
        self._held = {place: deque((int(s), float(x)) for s, x in points) for place, points in state["held"].items()}
        self._level = {
            place: (Level(float(value), float(sigma)), int(age))
            for place, (value, sigma, age) in state["level"].items()
        }
        self._newest = int(state["newest"])

    def _refresh(self, place: str) -> None:
        values = [x for _, x in self._seen.get(place, ())]
        if len(values) < self.min_values:
            self._level.pop(place, None)
            return
        middle = median(values)
        upper = sorted(values)[min(int(0.95 * len(values)), len(values) - 1)] - middle
        sigma = max(MAD_TO_SIGMA * median(abs(x - middle) for x in values), upper / NORMAL_95) + TINY
        self._level[place] = (Level(middle, sigma), 0)


class Events:
    """Which troubles are under way, so that each is told once.

    Args:
        quiet_after: steps without the trouble before it counts as a new one.
    """

    def __init__(self, quiet_after: int) -> None:
        self.quiet_after = quiet_after
        self._last: dict[str, int] = {}

    def begins(self, place: str, step: int) -> bool:
        """Note that there is trouble at ``place``; return whether it has just begun."""
        last = self._last.get(place)
        self._last[place] = step
        return last is None or step - last > self.quiet_after

    def forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later."""
        if any(last >= step for last in self._last.values()):
            self._last = {place: last for place, last in self._last.items() if last < step}

    def state_dict(self) -> dict[str, int]:
        """Return the memory as JSON-able values."""
        return dict(self._last)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what ``state_dict`` returned."""
        self._last = {place: int(step) for place, step in state.items()}


class Streaks:
    """How many readings in a row something has been true, place by place."""

    def __init__(self) -> None:
        self._run: dict[str, list[int]] = {}

    def count(self, place: str, step: int, true: bool) -> int:
        """Note whether it is true now; return for how many readings in a row it has been."""
        if not true:
            self._run.pop(place, None)
            return 0
        run = self._run.setdefault(place, [])
        run.append(step)
        if len(run) > KEEP_STREAK:
            del run[0]
        return len(run)

    def forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later."""
        for place in list(self._run):
            run = self._run[place]
            while run and run[-1] >= step:
                run.pop()
            if not run:
                del self._run[place]

    def state_dict(self) -> dict[str, list[int]]:
        """Return the memory as JSON-able values."""
        return {place: list(run) for place, run in self._run.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Take over what ``state_dict`` returned."""
        self._run = {place: [int(step) for step in run] for place, run in state.items()}


KEEP_STREAK = 16
"""Longer streaks are as good as this one."""
