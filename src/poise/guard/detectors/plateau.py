"""Plateau: the loss does not fall although the learning rate is high and little has been learnt yet.

Over the last ``window`` steps, in three equal parts: the median of the newest part is not below the oldest part's by
more than the noise of such a median, the learning rate is at least half its highest so far, and the loss is within
``near`` of where the run started (ln V for a model that knows nothing). A late run that flattens out is no plateau.
A note only: a person should look at the learning rate, the warm-up and the data. Raised once a plateau, and again
after every ``window`` steps of it.
Source: no paper. Acts: every step after ``window`` steps, where the learning rate is known. Cost: about 4 microseconds.
Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import Window

CARD = Card(
    name="plateau",
    kind="detector",
    title="Note when the loss does not fall while the learning rate is high",
    citation="no paper",
    formula="median of the newest third of 600 steps not below the oldest third's; loss within 15 % of its start",
    acts="every step after 600 steps; a note only",
    cost="about 4 microseconds a step",
    off="guard.enabled = false",
)

MIN_POINTS = 10


class Plateau:
    """Raises ``plateau`` (note) when nothing is learnt for long although the learning rate is high."""

    name = "plateau"

    def __init__(self, *, window: int = 600, near: float = 0.15) -> None:
        """``window`` is in steps; ``near`` is the relative distance from the first loss."""
        self.window = window
        self.near = -math.log1p(-near)
        self._parts = [Window(window // 3, MIN_POINTS) for _ in range(3)]  # newest first
        self._start: float | None = None
        self._highest_lr = 0.0
        self._quiet_until = 0
        self._last = 0

    def update(self, signals: Signals) -> Alarm | None:
        """Return a note when the loss has not fallen for ``window`` steps."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        step, x = signals.step, math.log(signals.loss)
        if step <= self._last:
            for part in self._parts:
                part.forget_from(step)
            self._quiet_until = 0
        self._last = step
        self._start = x if self._start is None else self._start
        self._highest_lr = max(self._highest_lr, signals.lr)
        points = [(step, x)]
        for part in self._parts:
            points = [fell for point in points for fell in part.push(*point)]
        newest, _, oldest = self._parts
        if step < self._quiet_until or len(oldest) < MIN_POINTS or not points:
            return None  # ``points`` holds what fell out of the oldest part: the windows are full
        noise = 1.25 * max(newest.sigma, oldest.sigma) / math.sqrt(len(newest))
        if self._start - newest.median > self.near or oldest.median - newest.median > 2 * noise:
            return None
        if signals.lr <= 0.0 or signals.lr < 0.5 * self._highest_lr:
            return None
        self._quiet_until = step + self.window
        return Alarm(
            kind="plateau",
            severity="note",
            step=step,
            signal="loss",
            value=signals.loss,
            expected=math.exp(oldest.median),
            detector=self.name,
            message=f"no descent for {self.window} steps: {math.exp(oldest.median):.4g} before, "
            f"{math.exp(newest.median):.4g} now, {math.exp(self._start):.4g} at the start",
        )

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {
            "parts": [part.state_dict() for part in self._parts],
            "start": self._start,
            "highest_lr": self._highest_lr,
            "quiet_until": self._quiet_until,
            "last": self._last,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        for part, points in zip(self._parts, state["parts"], strict=True):
            part.replace(points)
        self._start = state["start"]
        self._highest_lr = state["highest_lr"]
        self._quiet_until = state["quiet_until"]
        self._last = state["last"]
