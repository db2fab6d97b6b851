"""Collapse: the loss falls far faster than training can make it fall; the model is being shown the answer.

For x = ln loss, with a reference window that ends ``gap`` steps ago:

    fall = median of the last ``recent`` steps - median of the reference
    raised if fall < -max(ln(1 / (1 - drop)), 10 sigma), the level is the lowest ever, and no fall over the same span
    in ``memory`` steps, the newest ``apart`` steps left out, was half as deep

The last condition keeps young runs out, whose loss does fall by a third in a hundred steps; nothing is judged before
such earlier falls are known. Typical causes: labels shifted by one place, a mask that lets a token see the next, a
loader that repeats itself. Raised once a collapse.
Source: no paper. Acts: on every step once about ``reference + gap + apart`` steps are known.
Cost: about 4 microseconds. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import Window

CARD = Card(
    name="collapse",
    kind="detector",
    title="Loss that falls suspiciously fast and far",
    citation="no paper",
    formula="median of 8 steps below median of 128 steps by 25 % and 10 sigma, twice as deep as any fall before",
    acts="every step once 450 steps are known; once a collapse",
    cost="about 4 microseconds a step",
    off="guard.enabled = false",
)

MIN_POINTS = 16


class Collapse:
    """Raises ``collapse`` (warning) once when the loss falls far faster than it ever did."""

    name = "collapse"

    def __init__(
        self,
        *,
        recent: int = 8,
        gap: int = 64,
        reference: int = 128,
        apart: int = 256,
        memory: int = 512,
        drop: float = 0.25,
    ) -> None:
        """Windows are in steps; ``drop`` is relative (0.25 means a quarter)."""
        self.drop = -math.log1p(-drop)
        self._recent = Window(recent, 3)
        self._between = Window(gap, MIN_POINTS // 2)
        self._reference = Window(reference, MIN_POINTS)
        self._best = math.inf
        self._falls = Window(apart, 2 * MIN_POINTS)
        self._known = Window(memory, MIN_POINTS)
        self._last = 0

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm at the step at which the fall has become sure."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        step, x = signals.step, math.log(signals.loss)
        if step <= self._last:
            for window in (self._recent, self._between, self._reference, self._falls, self._known):
                window.forget_from(step)
        self._last = step
        for older in self._recent.push(step, x):
            for oldest in self._between.push(*older):
                self._reference.push(*oldest)
        if len(self._reference) < MIN_POINTS:
            return None
        level, now = self._reference.median, self._recent.median
        fall = level - now
        lowest, self._best = now < self._best, min(self._best, now)
        deepest = self._known.quantile(1.0) if len(self._known) >= MIN_POINTS else math.inf
        bar = max(self.drop, 10 * self._reference.sigma, 2 * deepest)
        if fall <= bar or not lowest:
            for old in self._falls.push(step, fall):
                self._known.push(*old)
            return None
        for window in (self._between, self._reference, self._falls, self._known):
            window.replace([])
        return Alarm(
            kind="collapse",
            severity="warning",
            step=step,
            signal="loss",
            value=signals.loss,
            expected=math.exp(level),
            detector=self.name,
            message=f"loss fell from {math.exp(level):.4g} to {math.exp(now):.4g}, faster than it ever did: "
            "look for shifted labels, a leaking mask or repeated data",
        )

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {
            "recent": self._recent.state_dict(),
            "between": self._between.state_dict(),
            "reference": self._reference.state_dict(),
            "best": None if math.isinf(self._best) else self._best,
            "falls": self._falls.state_dict(),
            "known": self._known.state_dict(),
            "last": self._last,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._recent.replace(state["recent"])
        self._between.replace(state["between"])
        self._reference.replace(state["reference"])
        self._best = math.inf if state["best"] is None else state["best"]
        self._falls.replace(state["falls"])
        self._known.replace(state["known"])
        self._last = state["last"]
