"""A one-sided outlier rule for a noisy, drifting series, built on medians only.

Rule, for x the logarithm of a positive reading (a loss, a norm):

    level = median of x over the last ``window`` steps
    sigma = 1.4826 median|x_i - x_(i-1)| / sqrt(2) over the last ``scale_window`` steps
    flagged if x - level > max(n_sigma sigma, floor)

1.4826 turns a median absolute deviation into a standard deviation for Gaussian noise; the difference of
two independent values has sqrt(2) times the noise of one. Differences, unlike deviations from the level,
do not take a falling loss for noise. The rule is one-sided: a median lags behind a falling series, so a
steep descent makes the rule more tolerant, never less.

Three choices that published rules get wrong:
    * a flagged value stays out of both windows, so that one spike cannot hide the next;
    * windows count steps, not points, so that a thinned-out log is judged by the same span of training;
      where that leaves too few points, the newest half-window of points is taken;
    * after ``relearn_after`` steps in a row above the bar at a level that has stopped moving, that level
      is the new normal: the windows are refilled from it and the rule says so, once.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

MAD_TO_SIGMA = 1.4826
TINY = 1e-4
"""Added to sigma, so that a constant series has one."""

MIN_SHIFT_POINTS = 10
"""Fewer points than this do not show that a new level has stopped moving."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says about one value: ``level`` and ``bar`` are on the logarithmic scale."""

    kind: Literal["learning", "normal", "flagged", "relearned"]
    level: float
    bar: float


class RobustRule:
    """The rule above with its memory.

    Args:
        window, scale_window: in steps.
        n_sigma: how many robust standard deviations are too many.
        floor: log-distance below which nothing is flagged, however quiet the series.
        min_values: values needed before the first judgement.
        relearn_after: steps in a row above the bar before a new level is accepted.
    """

    def __init__(
        self,
        *,
        window: int,
        scale_window: int,
        n_sigma: float,
        floor: float,
        min_values: int,
        relearn_after: int,
    ) -> None:
        assert min_values >= 3, "two differences are the least a median makes sense of"
        self.window = window
        self.scale_window = scale_window
        self.n_sigma = n_sigma
        self.floor = floor
        self.min_values = min_values
        self.relearn_after = relearn_after
        self._seen: deque[tuple[int, float]] = deque()
        self._held: deque[tuple[int, float]] = deque()
        self._held_since: int | None = None

    def update(self, step: int, x: float) -> Verdict:
        """Judge ``x`` at ``step`` and learn from it unless it is flagged. ``x`` must be finite."""
        assert math.isfinite(x)
        self._forget_from(step)
        if len(self._seen) < self.min_values:
            self._learn(step, x)
            return Verdict("learning", x, math.inf)
        level, sigma = self._level(step), self._sigma(step)
        bar = max(self.n_sigma * sigma, self.floor)
        if x - level <= bar:
            self._held.clear()
            self._held_since = None
            self._learn(step, x)
            return Verdict("normal", level, bar)
        if self._held_since is None:
            self._held_since = step
        self._held.append((step, x))
        while len(self._held) > MIN_SHIFT_POINTS and self._held[0][0] <= step - self.relearn_after:
            self._held.popleft()
        if step - self._held_since >= self.relearn_after and self._settled(sigma):
            self._seen, self._held, self._held_since = self._held, deque(), None
            return Verdict("relearned", level, bar)
        return Verdict("flagged", level, bar)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON-able values."""
        return {
            "seen": [list(point) for point in self._seen],
            "held": [list(point) for point in self._held],
            "held_since": self._held_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen = deque((int(s), float(x)) for s, x in state["seen"])
        self._held = deque((int(s), float(x)) for s, x in state["held"])
        self._held_since = state["held_since"]

    def _learn(self, step: int, x: float) -> None:
        self._seen.append((step, x))
        keep = max(self.scale_window // 2, self.min_values)
        while len(self._seen) > keep and self._seen[0][0] < step - self.scale_window:
            self._seen.popleft()

    def _forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later: a host went back without restoring this memory."""
        while self._seen and self._seen[-1][0] >= step:
            self._seen.pop()
        while self._held and self._held[-1][0] >= step:
            self._held.pop()
        if not self._held:
            self._held_since = None

    def _recent(self, step: int, steps: int) -> list[float]:
        """Return the values of the last ``steps`` steps, and of at least ``steps // 2`` points."""
        points = list(self._seen)
        at_least = len(points) - max(steps // 2, 2)
        return [x for i, (s, x) in enumerate(points) if s >= step - steps or i >= at_least]

    def _level(self, step: int) -> float:
        return median(self._recent(step, self.window))

    def _sigma(self, step: int) -> float:
        values = self._recent(step, self.scale_window)
        changes = [abs(b - a) for a, b in pairwise(values)]
        return MAD_TO_SIGMA * median(changes) / math.sqrt(2) + TINY

    def _settled(self, sigma: float) -> bool:
        """Whether the values above the bar have stopped moving: both halves have the same median."""
        values = [x for _, x in self._held]
        half = len(values) // 2
        if len(values) < MIN_SHIFT_POINTS:
            return False
        return abs(median(values[:half]) - median(values[half:])) <= max(3 * sigma, self.floor / 2)
