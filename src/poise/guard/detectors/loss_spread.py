"""Loss spread: one micro-batch or one rank stands far above the others for several steps.

Formula: x = ln(loss_spread), where loss_spread is the largest minus the mean loss over micro-batches and ranks; level
and sigma robust over 64 steps (see ``places.py``). Note when three readings running lie above
level + max(ln 3, k sigma / 3), each at least 0.1 nats. k follows from the allowed false alarms.
Source: own: a rank with broken memory or a bad data shard keeps standing out, an odd document does not.
Differs: nothing published. Acts: every step once 20 spreads above 0 are known; once in an event; a note only.
Cost: a median over 64 floats every eighth step. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Streaks, Tracks, tail_sigmas

CARD: Final = Card(
    name="loss_spread",
    kind="detector",
    title="Note when one micro-batch or rank stands far above the others for several steps",
    citation="own; no paper",
    formula="ln spread - median_64 > max(ln 3, k sigma / 3), three times running, and >= 0.1 nats",
    acts="every step once 20 spreads are known; a note only",
    cost="a median over 64 floats every eighth step",
    off="guard.enabled = false",
)


class LossSpread:
    """Raises ``loss_spread`` (note)."""

    name = "loss_spread"

    def __init__(
        self,
        *,
        alarms_per_10k: float = 0.5,
        factor: float = 3.0,
        least: float = 0.1,
        running: int = 3,
        window: int = 64,
        min_values: int = 20,
    ) -> None:
        """Spreads below ``factor`` times their level or ``least`` nats are normal; ``window`` is in steps."""
        assert factor > 1.0 and 1 <= running <= 16
        self._sigmas = tail_sigmas(alarms_per_10k) / running
        self._floor = math.log(factor)
        self._least = least
        self._running = running
        self._tracks = Tracks(window=window, at_least=window // 2, min_values=min_values, relearn_after=100)
        self._events = Events(quiet_after=50)
        self._streaks = Streaks()

    def update(self, signals: Signals) -> Alarm | None:
        """Return a note if the spread has been large for several steps."""
        step, spread = signals.step, signals.extra.get("loss_spread", math.nan)
        self._tracks.forget_from(step)
        self._events.forget_from(step)
        self._streaks.forget_from(step)
        if not math.isfinite(spread) or spread <= 0.0:
            return None
        x = math.log(spread)
        level = self._tracks.level("")
        if level is None:
            self._tracks.learn("", step, x)
            return None
        out = spread >= self._least and x - level.value > max(self._floor, self._sigmas * level.sigma)
        running = self._streaks.count("", step, out)
        if not out:
            self._tracks.learn("", step, x)
            return None
        self._tracks.hold("", step, x)
        if running < self._running or not self._events.begins("", step):
            return None
        usual = math.exp(level.value)
        return Alarm(
            kind="loss_spread",
            severity="note",
            step=step,
            signal="loss_spread",
            value=spread,
            expected=usual,
            detector=self.name,
            message=f"one micro-batch or rank has stood {spread:.3g} nats above the mean for {running} steps "
            f"(usually {usual:.2g}): look at its data and its hardware",
        )

    def state_dict(self) -> State:
        """Return window, streaks and events, exact."""
        return {
            "tracks": self._tracks.state_dict(),
            "events": self._events.state_dict(),
            "streaks": self._streaks.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._tracks.load_state_dict(state["tracks"])
        self._events.load_state_dict(state["events"])
        self._streaks.load_state_dict(state["streaks"])
