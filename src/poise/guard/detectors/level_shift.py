"""Level shift that does not come back: the loss steps up a little and stays.

For x = ln loss, with three windows of steps, oldest first: reference, recent and newest:

    d = min(median of recent, median of newest) - median of reference
    w = median of newest - median of recent
    raised if d > max(bar sigma_w, ln(1 + floor)),   sigma_w and bar from the run's own history of w

The newest part keeps a spike that has recovered from counting. Medians replace the sums of Page (1954) and
Hinkley (1971), which are built for independent Gaussian noise. The noise of d is taken from w, which is as noisy but
hardly sees a trend, so that a slowly wandering loss has a higher bar and a falling one has not; w counts
``delay`` steps later, so that a shift is not taken for its own noise. While the loss falls d is negative, and a shift
within a steep descent goes unseen. Raised once a shift: the new level becomes the reference.

The model of what it must find: the 32B run of Marin stepped from 1.96 to 2.02 nats, came back to 1.975 only, and
was lost; no outlier rule sees that.
Acts: on every step once the reference and some history of d are there. Cost: about 5 microseconds a step.
Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import Tail, Window

CARD = Card(
    name="level_shift",
    kind="detector",
    title="Small rise of the loss that does not come back",
    citation="Page 1954, Continuous inspection schemes; Hinkley 1971, Inference about the change-point",
    formula="min(median_recent, median_newest) - median_reference of ln loss > max(bar sigma_w, ln 1.02)",
    acts="every step; once a shift",
    cost="about 5 microseconds a step",
    off="guard.enabled = false",
    differs="two medians instead of a cumulative sum; noise and bar from the statistic's own history",
)

MIN_POINTS = 12


class LevelShift:
    """Raises ``level_shift`` (warning) once for each lasting rise of the loss."""

    name = "level_shift"

    def __init__(
        self,
        *,
        alarms_per_10k: float = 0.5,
        reference: int = 256,
        recent: int = 192,
        newest: int = 32,
        history: int = 512,
        delay: int = 256,
        floor: float = 0.02,
    ) -> None:
        """Windows are in steps; ``floor`` is relative (0.02 means +2 %)."""
        if not (math.isfinite(alarms_per_10k) and alarms_per_10k > 0):
            raise UserError(f"alarms_per_10k is {alarms_per_10k}; use a number above 0, for example 0.5")
        self.probability = alarms_per_10k / 1e4
        self.floor = math.log1p(floor)
        self._reference = Window(reference, 3 * MIN_POINTS)
        self._recent = Window(recent, MIN_POINTS)
        self._newest = Window(newest, MIN_POINTS // 2)
        self._pending = Window(delay, 2 * MIN_POINTS)
        self._history = Window(history, 4 * MIN_POINTS)
        self._tail = Tail(longest=reference)
        self._last = 0

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm at the step at which a lasting rise has become sure."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        step, x = signals.step, math.log(signals.loss)
        if step <= self._last:
            self._go_back(step)
        self._last = step
        for point in self._recent.push(step, x):
            self._reference.push(*point)
        self._newest.push(step, x)
        if len(self._reference) < 3 * MIN_POINTS:
            return None
        level, recent, newest = self._reference.median, self._recent.median, self._newest.median
        rise, wander = min(recent, newest) - level, newest - recent
        bar = math.inf
        if len(self._history) >= 4 * MIN_POINTS:
            young = 1.0 + 50.0 / len(self._history)  # neighbouring values of w are nearly equal: few are very few
            bar = max(self._tail.bar(self.probability) * young * self._history.sigma, self.floor)
        if rise <= bar:
            for old in self._pending.push(step, wander):
                self._remember(*old)
            return None
        self._tail.interrupt()
        self._reference.replace(self._newest.points)
        self._recent.replace([])
        self._pending.replace([])
        expected = math.exp(level)
        now = math.exp(level + rise)
        return Alarm(
            kind="level_shift",
            severity="warning",
            step=step,
            signal="loss",
            value=now,
            expected=expected,
            detector=self.name,
            message=f"the loss has moved from {expected:.4g} to {now:.4g} ({now / expected - 1:+.1%}) "
            f"and does not come back; the bar is {math.expm1(bar):+.1%}",
        )

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {
            "reference": self._reference.state_dict(),
            "recent": self._recent.state_dict(),
            "newest": self._newest.state_dict(),
            "pending": self._pending.state_dict(),
            "history": self._history.state_dict(),
            "tail": self._tail.state_dict(),
            "last": self._last,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._reference.replace(state["reference"])
        self._recent.replace(state["recent"])
        self._newest.replace(state["newest"])
        self._pending.replace(state["pending"])
        self._history.replace(state["history"])
        self._tail.load_state_dict(state["tail"])
        self._last = state["last"]

    def _remember(self, step: int, wander: float) -> None:
        if len(self._history) >= 4 * MIN_POINTS:
            self._tail.learn((wander - self._history.median) / self._history.sigma)
        self._history.push(step, wander)

    def _go_back(self, step: int) -> None:
        """Drop what was seen at ``step`` or later: a host went back without restoring this memory."""
        for window in (self._reference, self._recent, self._newest, self._pending, self._history):
            window.forget_from(step)
