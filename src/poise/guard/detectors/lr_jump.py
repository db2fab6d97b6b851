"""Learning-rate jump: the rate is higher than its own course explains.

Formula: expected = lr + max(lr - lr before, 0) per step, the straight line through the last two rates. Warning when

    lr_t >= 1.5 max(expected, lr) and lr_t > 1.05 (largest rate of the last 100 steps)

A linear warm-up from 1/N doubles at its second step and is on its line from the third; two rates have to be known.
Coming back to a rate held within the last 100 steps (after one step at another rate, or a short re-warm-up) is no
jump; coming back to a rate that the run used before that (a restart of the schedule) is a note. A drop to exactly 0
that the line does not lead to is a note.
Source: own; a resume with the wrong schedule and a changed batch size show like this. Differs: nothing published.
Acts: every step once two rates are known; each jump once. A rate that came by a jump is not learned for 100 steps.
Cost: none. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State

CARD: Final = Card(
    name="lr_jump",
    kind="detector",
    title="Alarm when the learning rate jumps above its own course",
    citation="own; no paper",
    formula="lr >= 1.5 times the line through the last two rates, and above the largest of the last 100 steps",
    acts="every step once two rates are known",
    cost="none",
    off="guard.enabled = false",
)


class LrJump:
    """Raises ``lr_jump``: warning for a jump up, note for a sudden drop to zero."""

    name = "lr_jump"

    def __init__(self, *, factor: float = 1.5, window: int = 100) -> None:
        """Rates below ``factor`` times the expected one are normal; ``window`` is in steps."""
        assert factor > 1.0 and window >= 1
        self._factor = factor
        self._window = window
        self._last: deque[tuple[int, float]] = deque(maxlen=3)
        self._rates: deque[tuple[int, float]] = deque()
        self._used = 0.0
        """The highest rate of the run that came without a jump."""
        self._jump: tuple[int, float] | None = None
        """Step of the last jump, and the rate there should have been."""

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if the rate has jumped since the last step."""
        step, lr = signals.step, signals.lr
        self._forget_from(step)
        if not math.isfinite(lr) or lr < 0.0:
            return None
        expected = self._expected(step)
        self._last.append((step, lr))
        while self._rates and self._rates[0][0] <= step - self._window:
            self._rates.popleft()
        highest = max((rate for _, rate in self._rates), default=0.0)
        if self._jump is not None and step - self._jump[0] >= self._window:
            self._jump = None
        if expected is None:
            self._rates.append((step, lr))
            self._used = max(self._used, lr)
            return None
        line, before = expected
        if before > 0.0 and lr >= self._factor * max(line, before) and lr > 1.05 * highest:
            times = f"{lr / max(line, before):.2g} times its course"
            if lr <= 1.05 * self._used:
                self._rates.append((step, lr))
                message = f"the learning rate went back to {lr:.3g}, {times}: a rate used before, so a restart"
                return self._alarm("note", step, lr, max(line, before), message)
            self._jump = (step, max(line, before))
            return self._alarm("warning", step, lr, self._jump[1], f"the learning rate jumped to {lr:.3g}, {times}")
        if self._jump is None or lr <= 1.25 * self._jump[1]:
            self._rates.append((step, lr))
            self._used = max(self._used, lr)
        if lr == 0.0 and before > 0.0 and line > 0.5 * before and before > 0.01 * highest:
            return self._alarm("note", step, lr, line, f"the learning rate fell from {before:.3g} to 0")
        return None

    def state_dict(self) -> State:
        """Return the rates, exact."""
        return {
            "last": [list(point) for point in self._last],
            "rates": [list(point) for point in self._rates],
            "jump": None if self._jump is None else list(self._jump),
            "used": self._used,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._last = deque(((int(step), float(lr)) for step, lr in state["last"]), maxlen=3)
        self._rates = deque((int(step), float(lr)) for step, lr in state["rates"])
        self._jump = None if state["jump"] is None else (int(state["jump"][0]), float(state["jump"][1]))

        self._used = float(state["used"])

    def _expected(self, step: int) -> tuple[float, float] | None:
        """Return the rate on the line through the last two, and the last; ``None`` before there are two."""
        if len(self._last) < 2:
            return None
        (s0, lr0), (s1, lr1) = list(self._last)[-2:]
        return max(lr1 + (lr1 - lr0) * (step - s1) / (s1 - s0), 0.0), lr1

    def _alarm(self, severity: str, step: int, lr: float, expected: float, message: str) -> Alarm:
        return Alarm(
            kind="lr_jump",
            severity="note" if severity == "note" else "warning",
            step=step,
            signal="lr",
            value=lr,
            expected=expected,
            detector=self.name,
            message=message,
        )

    def _forget_from(self, step: int) -> None:
        for points in (self._last, self._rates):
            while points and points[-1][0] >= step:
                points.pop()
        if self._jump is not None and self._jump[0] >= step:
            self._jump = None
