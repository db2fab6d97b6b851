"""Slow divergence: the loss climbs away from its best level, step after step, and does not turn.

For x = ln loss, two ways to see it:

    climbing   the medians of the last four blocks of ``block`` steps rise one after the other, each by more than
               noise, the newest is still rising within itself, and it is above the best median so far by
               max(8 sigma, ln(1 + floor))
    lost       the median of ``long`` steps is above the best such median by max(8 sigma, ln(1 + floor)), and so was
               every short median of the last ``patience`` steps

Sigma of a median of n points is 1.25 / sqrt n times the robust deviation of differences of neighbouring values, and at
least the robust deviation of short medians about long ones, which is larger where the loss wanders; what the loss does
now counts for that ``2 long`` steps later, so that a climb is not taken for its own noise. "Best" is the lowest median
so far, so that a loss that comes down, however roughly, raises nothing. A fast spike climbs for a dozen steps and
turns, which is shorter than three blocks.
Source: common practice (a run whose loss is above its own minimum for long is lost); no paper.
Acts: on every step, as long as it holds. Cost: about 6 microseconds. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import MAD_TO_SIGMA, TINY, Window

CARD = Card(
    name="slow_divergence",
    kind="detector",
    title="Loss that climbs away from its best level and does not turn",
    citation="common practice; no paper",
    formula="four block medians in a row rising, the last above best by max(8 sigma, 5 %); or above best for long",
    acts="every step while it holds",
    cost="about 6 microseconds a step",
    off="guard.enabled = false",
)

MIN_POINTS = 4


class SlowDivergence:
    """Raises ``slow_divergence`` (critical) while the loss climbs or stays far above its best level."""

    name = "slow_divergence"

    def __init__(
        self, *, block: int = 7, long: int = 128, patience: int = 150, floor: float = 0.05, sigmas: float = 8.0
    ) -> None:
        """``block``, ``long`` and ``patience`` are in steps; ``floor`` is relative (0.05 means +5 %)."""
        self.patience = patience
        self.floor = math.log1p(floor)
        self.sigmas = sigmas
        self._blocks = [Window(block, MIN_POINTS) for _ in range(4)]  # newest first
        self._long = Window(long, 4 * MIN_POINTS)
        self._changes = Window(2 * long, 8 * MIN_POINTS)
        self._pending = Window(2 * long, 8 * MIN_POINTS)
        self._wander = Window(4 * long, 32 * MIN_POINTS)
        self._best: float | None = None
        self._best_long: float | None = None
        self._above_since: int | None = None
        self._last: tuple[int, float] | None = None

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm while the loss climbs away from its best level or stays far above it."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        step, x = signals.step, math.log(signals.loss)
        self._learn(step, x)
        newest, *_, oldest = self._blocks
        if any(len(block) < MIN_POINTS for block in self._blocks) or len(self._changes) < 2 * MIN_POINTS:
            return None
        sigma = MAD_TO_SIGMA * self._changes.median / math.sqrt(2) + TINY
        short, noise = newest.median, 1.25 * sigma / math.sqrt(len(newest))
        wander = self._wander.sigma if len(self._wander) >= 16 * MIN_POINTS else 0.0
        noise = max(noise, wander)
        best = min(oldest.median, self._best if self._best is not None else math.inf)
        self._best = best
        far = short - best > max(self.sigmas * noise, self.floor)
        steps_up = 3 * 1.25 * sigma / math.sqrt(len(newest))
        climbs = all(after.median - before.median > steps_up for after, before in pairwise(self._blocks))
        lost = self._is_lost(step, noise, short)
        if not (lost or (far and climbs and _rises(newest))):
            if len(self._long) >= 4 * MIN_POINTS:
                for old in self._pending.push(step, short - self._long.median):
                    self._wander.push(*old)
            return None
        expected = math.exp(best if not lost or self._best_long is None else self._best_long)
        way = "has stayed above" if lost else "climbs away from"
        return Alarm(
            kind="slow_divergence",
            severity="critical",
            step=step,
            signal="loss",
            value=signals.loss,
            expected=expected,
            detector=self.name,
            message=f"loss {math.exp(short):.4g} {way} its best level {expected:.4g} "
            f"({math.exp(short) / expected - 1:+.1%}) and does not turn",
        )

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {
            "blocks": [block.state_dict() for block in self._blocks],
            "long": self._long.state_dict(),
            "changes": self._changes.state_dict(),
            "pending": self._pending.state_dict(),
            "wander": self._wander.state_dict(),
            "best": self._best,
            "best_long": self._best_long,
            "above_since": self._above_since,
            "last": None if self._last is None else list(self._last),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        for block, points in zip(self._blocks, state["blocks"], strict=True):
            block.replace(points)
        self._long.replace(state["long"])
        self._changes.replace(state["changes"])
        self._pending.replace(state["pending"])
        self._wander.replace(state["wander"])
        self._best = state["best"]
        self._best_long = state["best_long"]
        self._above_since = state["above_since"]
        self._last = None if state["last"] is None else (int(state["last"][0]), float(state["last"][1]))

    def _learn(self, step: int, x: float) -> None:
        if self._last is not None and step <= self._last[0]:
            for window in (*self._blocks, self._long, self._changes, self._pending, self._wander):
                window.forget_from(step)
            self._above_since = None
        elif self._last is not None:
            self._changes.push(step, abs(x - self._last[1]))
        self._last = (step, x)
        self._long.push(step, x)
        points = [(step, x)]
        for block in self._blocks:
            points = [fell for point in points for fell in block.push(*point)]

    def _is_lost(self, step: int, noise: float, short: float) -> bool:
        """Whether the loss has been far above its best long-time level for ``patience`` steps."""
        if len(self._long) < 4 * MIN_POINTS:
            return False
        level = self._long.median
        best = self._best_long = min(level, self._best_long if self._best_long is not None else math.inf)
        bar = max(self.sigmas * noise, self.floor)
        if short - best <= bar:
            self._above_since = None
            return False
        self._above_since = step if self._above_since is None else self._above_since
        return level - best > bar and step - self._above_since >= self.patience


def _rises(block: Window) -> bool:
    """Whether the later half of a block is above its earlier half: a spike at its top is not."""
    values = [x for _, x in block.points]
    half = len(values) // 2
    return median(values[-half:]) > median(values[:half])
