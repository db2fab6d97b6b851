"""Non-finite loss or gradient norm: always critical, at the first step.

Acts: on every step. Cost: two comparisons. Switch off: leave it out of the guard's detectors (and know
that one such update turns every weight into NaN). Source: common practice; the alarm comes before the
update, because weights and moments that have taken in one NaN never lose it.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State

CARD = Card(
    name="nonfinite",
    kind="detector",
    title="Alarm before the update when the loss or the gradient norm is NaN or infinite",
    citation="common practice; no paper",
    formula="not isfinite(loss) or not isfinite(grad_norm)",
    acts="every step, before the optimizer",
    cost="none",
    off="guard.enabled = false",
)


class NonFinite:
    """Raises a critical ``nonfinite`` alarm when the loss or the gradient norm is not a finite number."""

    name = "nonfinite"

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if a reading is NaN or infinite; remember the finite ones as what to expect."""
        readings = {"loss": signals.loss, "grad_norm": signals.grad_norm}
        bad = [signal for signal, value in readings.items() if not math.isfinite(value)]
        if not bad:
            self._last = readings
            return None
        return Alarm(
            kind="nonfinite",
            severity="critical",
            step=signals.step,
            signal=bad[0],
            value=readings[bad[0]],
            expected=self._last.get(bad[0], math.nan),
            detector=self.name,
            message=" and ".join(f"{signal} is {readings[signal]}" for signal in bad),
        )

    def state_dict(self) -> State:
        """Return the last finite readings."""
        return dict(self._last)

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._last = {signal: float(value) for signal, value in state.items()}
