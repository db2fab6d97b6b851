"""Gradient run-up: the norm rises multiplicatively for several steps running, before the loss does.

Formula: x = ln grad_norm, ``level`` and ``sigma`` robust over 64 steps (see ``places.py``). A run is a series of
successive values, each at least ``step_factor`` times the one before, the first already above the level by that
factor and 3 sigma (in a run of two by 2.5 and 5 sigma). With n values in the run it is an alarm when

    x - level >= max(ln total(n), 2 k sigma / (n + 1)),    total(2) = 6, total(3) = 3.5, total(4 or more) = 2.5

k follows from the allowed false alarms. A single outlier, however tall, has n = 1 and is never an alarm.
Source: BLOOM-176B's first loss spike (bigscience chronicles): the norm went 0.24, 0.95, 2.4, 16, 145, 960 and the
loss jumped at the last; no paper. A run shows at its second value, three steps before that jump.
Differs from published rules: those judge single steps, and healthy norms have single outliers of 14 times.
Acts: every step once 20 norms are known; once in an event. Cost: a median over 64 floats every fourth step.
Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Tracks, tail_sigmas

CARD: Final = Card(
    name="grad_runup",
    kind="detector",
    title="Alarm when the gradient norm rises multiplicatively for several steps running",
    citation="the run-up before BLOOM-176B's loss spike, bigscience chronicles 2022; no paper",
    formula="n values in a row each 1.5 times the one before, ending 6 (n=2), 3.5 (n=3), 2.5 (n>=4) times the level",
    acts="every step once 20 norms are known, before the optimizer",
    cost="medians over 64 floats every fourth step",
    off="guard.enabled = false",
    differs="needs two rising values: a single outlier of any height is left alone",
)

TOTALS: Final = {2: 6.0, 3: 3.5}
LONG_RUN_TOTAL: Final = 2.5
LONGEST_GAP: Final = 64
"""Norms further apart than this many steps are not successive."""


class GradRunup:
    """Raises ``grad_runup`` (warning) while the norm climbs away from its level."""

    name = "grad_runup"

    def __init__(
        self, *, alarms_per_10k: float = 0.5, step_factor: float = 1.5, window: int = 64, min_values: int = 20
    ) -> None:
        """Allow ``alarms_per_10k`` false alarms in 10 000 steps; ``window`` is in steps."""
        assert step_factor > 1.0
        self._sigmas = tail_sigmas(alarms_per_10k)
        self._rise = math.log(step_factor)
        self._tracks = Tracks(window=window, at_least=window // 2, min_values=min_values, relearn_after=50, refresh=4)
        self._events = Events(quiet_after=50)
        self._run: list[tuple[int, float]] = []

    def update(self, signals: Signals) -> Alarm | None:
        """Return a warning if a run-up has just become clear."""
        step, norm = signals.step, signals.grad_norm
        self._forget_from(step)
        if not math.isfinite(norm) or norm <= 0.0:
            return None
        x = math.log(norm)
        level = self._tracks.level("")
        if level is None:
            self._tracks.learn("", step, x)
            return None
        above = x - level.value
        rising = bool(self._run) and x - self._run[-1][1] >= self._rise and step - self._run[-1][0] <= LONGEST_GAP
        if not rising:
            self._run = []
        if rising or above >= max(self._rise, 3 * level.sigma):
            self._run.append((step, x))
        if above >= max(math.log(2), self._sigmas * level.sigma / 2):
            self._tracks.hold("", step, x)
        else:
            self._tracks.learn("", step, x)
        n = len(self._run)
        if n == 2 and self._run[0][1] - level.value < max(math.log(2.5), 5 * level.sigma):
            return None  # an outlier after a largish value is no run-up yet
        total = math.log(TOTALS.get(n, LONG_RUN_TOTAL))
        if n < 2 or above < max(total, 2 * self._sigmas * level.sigma / (n + 1)):
            return None
        if not self._events.begins("", step):
            return None
        usual = math.exp(level.value)
        path = ", ".join(f"{math.exp(value):.3g}" for _, value in self._run)
        return Alarm(
            kind="grad_runup",
            severity="warning",
            step=step,
            signal="grad_norm",
            value=norm,
            expected=usual,
            detector=self.name,
            message=f"gradient norm is running away from its level {usual:.3g}: {path}",
        )

    def state_dict(self) -> State:
        """Return window, run and events, exact."""
        return {
            "tracks": self._tracks.state_dict(),
            "events": self._events.state_dict(),
            "run": [list(point) for point in self._run],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._tracks.load_state_dict(state["tracks"])
        self._events.load_state_dict(state["events"])
        self._run = [(int(step), float(x)) for step, x in state["run"]]

    def _forget_from(self, step: int) -> None:
        self._tracks.forget_from(step)
        self._events.forget_from(step)
        while self._run and self._run[-1][0] >= step:
            self._run.pop()
