"""Chaotic loss: erratic and far above where it should be; the learning rate or the set-up is wrong from the start.

Two signs:

    start     a model that knows nothing has a loss of ln V (V: size of the vocabulary), and that is where a run starts.
              A loss above its start L_0 (the larger of the first two) is worse than knowing nothing. A jump of a third
              for a few steps, settling by itself, is harmless and common where the warm-up is short. Alarm where
              e = ln(loss / L_0) exceeds ln 2 at one step, or where e > ``slack`` and the sum of e - ``slack`` over
              steps, which stays at 0 or above, exceeds ``budget``; in both cases only if e is also above 4 robust
              deviations of neighbouring points, so that a loss of small batches is not taken for chaos
    erratic   over the last ``window`` steps the robust deviation of ln loss between neighbouring points exceeds
              ``spread``, five times the calmest so far, and the median loss is a fifth above the lowest median
              so far

Source: the two signs are read off runs whose learning rate was up to 100 times too high; no paper.
Acts: from the eighth point on, as long as it holds. Cost: about 3 microseconds.
Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import MAD_TO_SIGMA, TINY, Window

CARD = Card(
    name="chaotic",
    kind="detector",
    title="Erratic loss far above where it should be",
    citation="no paper; the loss of an untrained model is ln V",
    formula="ln(loss / start) > ln 2, or its summed excess over 0.1 > 1.5; or deviation > 8 % and 20 % above best",
    acts="from the eighth point on, while it holds",
    cost="about 3 microseconds a step",
    off="guard.enabled = false",
)

MIN_POINTS = 12
FEWEST = 6
"""Changes that have to be known before a loss above its start can be told from noise."""

NOISES = 4.0
MAX_GAP = 5
"""A logged point stands for at most so many steps of excess."""


class Chaotic:
    """Raises ``chaotic`` (critical) while the loss is erratic and far above where it should be."""

    name = "chaotic"

    def __init__(
        self, *, budget: float = 1.5, slack: float = 0.1, window: int = 96, spread: float = 0.08, rise: float = 0.2
    ) -> None:
        """``budget`` is in steps times ln(loss / start), ``window`` in steps, ``rise`` relative."""
        self.budget = budget
        self.slack = slack
        self.spread = spread
        self.rise = math.log1p(rise)
        self._start: float | None = None
        self._seen = 0
        self._excess = 0.0
        self._values = Window(window, MIN_POINTS)
        self._changes = Window(window, MIN_POINTS)
        self._best: float | None = None
        self._calmest: float | None = None
        self._last: tuple[int, float] | None = None

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm while the loss is far above its start, or erratic and far above its best."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        step, x = signals.step, math.log(signals.loss)
        gap = 1
        if self._last is not None and step <= self._last[0]:
            self._values.forget_from(step)
            self._changes.forget_from(step)
        elif self._last is not None:
            gap = min(step - self._last[0], MAX_GAP)
            self._changes.push(step, abs(x - self._last[1]))
        self._last = (step, x)
        self._values.push(step, x)
        if self._seen < 2:
            self._start = x if self._start is None else max(self._start, x)
            self._seen += 1
            return None
        assert self._start is not None
        above = x - self._start
        self._excess = max(self._excess + gap * (above - self.slack), 0.0)
        erratic = self._is_erratic()
        noise = NOISES * self._noise()
        if above > max(math.log(2.0), noise) or (above > max(self.slack, noise) and self._excess > self.budget):
            return self._alarm(signals, self._start, "it has been above where the run began")
        if erratic:
            assert self._best is not None
            return self._alarm(signals, self._best, "the loss is erratic")
        return None

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {
            "start": self._start,
            "seen": self._seen,
            "excess": self._excess,
            "values": self._values.state_dict(),
            "changes": self._changes.state_dict(),
            "best": self._best,
            "calmest": self._calmest,
            "last": None if self._last is None else list(self._last),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._start = state["start"]
        self._seen = state["seen"]
        self._excess = state["excess"]
        self._values.replace(state["values"])
        self._changes.replace(state["changes"])
        self._best = state["best"]
        self._calmest = state["calmest"]
        self._last = None if state["last"] is None else (int(state["last"][0]), float(state["last"][1]))

    def _noise(self) -> float:
        """Return the robust deviation of neighbouring points; infinite while too few are known to tell."""
        if len(self._changes) < FEWEST:
            return math.inf
        return MAD_TO_SIGMA * self._changes.median / math.sqrt(2)

    def _is_erratic(self) -> bool:
        if len(self._changes) < MIN_POINTS:
            return False
        sigma, level = MAD_TO_SIGMA * self._changes.median / math.sqrt(2) + TINY, self._values.median
        self._calmest = sigma if self._calmest is None else min(self._calmest, sigma)
        self._best = level if self._best is None else min(self._best, level)
        return sigma > max(self.spread, 5 * self._calmest) and level - self._best > self.rise

    def _alarm(self, signals: Signals, expected: float, why: str) -> Alarm:
        level = math.exp(expected)
        return Alarm(
            kind="chaotic",
            severity="critical",
            step=signals.step,
            signal="loss",
            value=signals.loss,
            expected=level,
            detector=self.name,
            message=f"loss {signals.loss:.4g} where at most {level:.4g} is to be expected: {why}; "
            "the learning rate or the set-up is the first suspect",
        )
