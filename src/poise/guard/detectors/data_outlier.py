"""Isolated data outlier: the loss of one batch, or of two, was odd, and the next was as before.

A model that was hurt needs tens of steps to recover; where the loss is back at once, the batch was odd and the model
is not. The note comes after the fact, at the first step that is back:

    odd    x - level > max(sigmas sigma, ln(1 + floor)),  level and sigma as in ``RobustRule`` on x = ln loss
    back   x - level < a third of that, at most ``longest`` steps after the first odd one

A note only: the right reaction is none. A log that shows every third step or fewer cannot tell, and gets no notes.
Source: same batches being odd under different optimizers shows that the data are the cause; no paper.
Acts: on every step. Cost: about 4 microseconds. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import RobustRule

CARD = Card(
    name="data_outlier",
    kind="detector",
    title="Note after an odd batch that left no trace",
    citation="median and MAD rule: Hampel 1974",
    formula="ln loss above its level by max(5 sigma, ln 1.04) for at most 2 steps, then back",
    acts="at the step after; a note only",
    cost="about 4 microseconds a step",
    off="guard.enabled = false",
)


class DataOutlier:
    """Raises ``data_outlier`` (note) at the step after an odd batch that left no trace."""

    name = "data_outlier"

    def __init__(
        self, *, window: int = 32, scale_window: int = 128, sigmas: float = 5.0, floor: float = 0.04, longest: int = 2
    ) -> None:
        """Windows and ``longest`` are in steps; ``floor`` is relative (0.04 means +4 %)."""
        self.longest = longest
        self._rule = RobustRule(
            window=window,
            scale_window=scale_window,
            n_sigma=sigmas,
            floor=math.log1p(floor),
            min_values=20,
            relearn_after=50,
        )
        self._odd: tuple[int, int, float] | None = None
        """First and last odd step, and the largest loss."""

    def update(self, signals: Signals) -> Alarm | None:
        """Return a note if the steps just before were odd and this one is as before."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            self._odd = None
            return None
        step, x = signals.step, math.log(signals.loss)
        verdict = self._rule.update(step, x)
        if verdict.kind == "flagged":
            first, worst = (self._odd[0], self._odd[2]) if self._odd and self._odd[1] < step else (step, 0.0)
            self._odd = (first, step, max(worst, signals.loss))
            return None
        odd, self._odd = self._odd, None
        if odd is None or verdict.kind != "normal" or not odd[1] < step <= odd[0] + self.longest:
            return None
        if x - verdict.level > verdict.bar / 3:
            return None
        level = math.exp(verdict.level)
        which = f"step {odd[0]}" if odd[0] == odd[1] else f"steps {odd[0]} to {odd[1]}"
        return Alarm(
            kind="data_outlier",
            severity="note",
            step=step,
            signal="loss",
            value=odd[2],
            expected=level,
            detector=self.name,
            message=f"loss {odd[2]:.4g} at {which} was {odd[2] / level - 1:+.1%} off and is back at once: an odd batch",
        )

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {"rule": self._rule.state_dict(), "odd": None if self._odd is None else list(self._odd)}

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._rule.load_state_dict(state["rule"])
        odd = state["odd"]
        self._odd = None if odd is None else (int(odd[0]), int(odd[1]), float(odd[2]))
