"""Large updates: each step replaces a tenth of the weights, so the learning rate is far too high from the start.

Formula: the median over the blocks of (RMS of the last update / RMS of the weights) is at least 0.1 for 5 steps in a
row. A rule of thumb for Adam calls 0.001 healthy; small models with high rates reach some hundredths. At a tenth the
weights are forgotten within ten steps. It shows during warm-up, long before the loss says anything: a loss that got
stuck at the entropy of single tokens has no spike.
Source: rule of thumb of practice (update-to-data ratio; e.g. Karpathy's lecture "makemore", part 3). The bar of 0.1
and the five steps are ours. Differs: taken over whole blocks, so that matrices that begin at zero do not count.
Acts: every step from the fourth reading on; once, and again after 100 steps. Without readings by block it is silent.
Cost: a median over the blocks. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State

CARD: Final = Card(
    name="large_updates",
    kind="detector",
    title="Alarm when every step replaces a tenth of the weights: the learning rate is far too high",
    citation="rule of thumb of practice (update-to-data ratio); no paper",
    formula="median over blocks of update RMS / weight RMS >= 0.1 for 5 steps in a row",
    acts="every step from the fourth reading on, also during warm-up",
    cost="a median over the blocks",
    off="guard.enabled = false",
    differs="taken over whole blocks, so that matrices that begin at zero do not count",
)

AGAIN: Final = 100
HEALTHY: Final = 0.01
"""What a small model with a sound learning rate shows."""


class LargeUpdates:
    """Raises ``large_updates`` (critical): value is the ratio, expected a healthy one."""

    name = "large_updates"

    def __init__(self, *, bar: float = 0.1, running: int = 5, skip_first: int = 3) -> None:
        """``bar`` is the share of the weights; ``running`` and ``skip_first`` count readings."""
        assert bar > 0.0 and running >= 1
        self._bar, self._running, self._skip_first = bar, running, skip_first
        self._seen = 0
        self._streak = 0
        self._quiet_until = 0
        self._last = 0

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if the updates have been too large for several steps."""
        if signals.step <= self._last:  # the run went back
            self._streak, self._quiet_until = 0, 0
        self._last = signals.step
        ratios = [r for place, r in signals.places("update_ratio").items() if "block" in place and math.isfinite(r)]
        if not ratios:
            return None
        self._seen += 1
        ratio = median(ratios)
        self._streak = self._streak + 1 if ratio >= self._bar else 0
        if self._seen <= self._skip_first or self._streak < self._running or signals.step < self._quiet_until:
            return None
        self._quiet_until = signals.step + AGAIN
        return Alarm(
            kind="large_updates",
            severity="critical",
            step=signals.step,
            signal="update_ratio",
            value=ratio,
            expected=HEALTHY,
            detector=self.name,
            message=f"each of the last {self._running} steps changed the weights by {ratio:.0%} of their size: the "
            f"learning rate {signals.lr:.3g} is far too high",
        )

    def state_dict(self) -> State:
        """Return the counters, exact."""
        return {"seen": self._seen, "streak": self._streak, "quiet_until": self._quiet_until, "last": self._last}

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen, self._streak = state["seen"], state["streak"]
        self._quiet_until, self._last = state["quiet_until"], state["last"]
