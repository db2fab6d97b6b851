"""Fast loss spike: the loss stands clearly above its level, for one point or in the mean of a few.

For x = ln loss, causally at every step, with medians only:

    level   = median of x over the last ``window`` steps, minus half of what such a median lags behind a falling
              loss (the median of the residuals r = x - median of the last ``scale_window`` steps, where it is negative)
    s_1     = x - level
    s_k     = mean of the k - 1 smallest of the last k values of s_1, for k = 2, 4, 8
    sigma_k = robust standard deviation of s_k, measured on s_k itself (autocorrelated noise averages less), but at most
              twice ``WANDER`` times that of neighbouring values' differences, and once ``WANDER`` times where the
              loss falls steeply, so that the descent is not taken for noise
    flagged if s_k > max(bar_k sigma_k, ln(1 + floor)) for any k

A small rise that lasts is as sure a sign as a tall single point, and leaving the largest value out keeps one odd batch
from counting more than once. ``bar_k`` is not a number of sigmas that the user must guess: it follows from the run's
own tail and the wanted rate of false alarms (``Tail`` in ``robust.py``), so that a run with heavy-tailed noise has a
higher bar by itself.

One odd batch is not a spike: a spike lasts for tens of steps. Where every step is seen, one point alone must therefore
clear ``ALONE`` times the bar; between the bar and that, the next step decides (k = 2). A log of every fifth step
shows a short spike as one point, so there a single point above the bar is enough.

Source: the idea of medians and deviations is Hampel 1974; peaks over threshold Pickands 1975.
Differs from published spike rules: medians instead of mean and standard deviation; flagged values stay out of
the memory, also those that a later mean exposes; a non-finite value never enters; a lasting new level is learned.
Acts: on every step once ``min_values`` values are known. A loss of zero or below has no logarithm and is not judged.
Cost: about 20 microseconds a step. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections import deque

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import MAD_TO_SIGMA, TINY, Plateaued, Tail, Window

CARD = Card(
    name="fast_spike",
    kind="detector",
    title="Loss above its level, with a bar set by a wanted rate of false alarms",
    citation="Hampel 1974 (medians and deviations); Pickands 1975 (peaks over threshold)",
    formula="mean of the k-1 smallest of the last k of (ln loss - level) > max(bar_k sigma_k, ln 1.03), k = 1, 2, 4, 8",
    acts="every step once 20 values are known, before the optimizer",
    cost="about 20 microseconds a step",
    off="guard.enabled = false",
    differs="flagged values stay out of the memory; a lasting new level is learned; the bar follows the run's own tail",
)

SPANS = (1, 2, 4, 8)
ALONE = 2.0
SPAN_FLOOR = math.log(1.04)
"""A mean over points must rise at least so far: smaller rises that last are ``level_shift``'s subject."""

TRUST = 0.5
"""Share of the lag that is taken back: a young run's descent flattens, so that its past slope overstates the next."""

SPAN_VALUES = 32
"""Neighbouring means share most of their points: of fewer the spread is not known."""

WANDER = 1.5
QUIET = 50
"""Steps after a flagged point in which only single points are judged: means still hold the way back."""


class FastSpike:
    """Raises ``fast_spike`` (critical), and ``level_shift`` (warning) when it accepts a new level."""

    name = "fast_spike"

    def __init__(
        self,
        *,
        alarms_per_10k: float = 0.5,
        window: int = 32,
        scale_window: int = 128,
        sigma: float | None = None,
        floor: float = 0.03,
        min_values: int = 20,
        relearn_after: int = 100,
    ) -> None:
        """Windows and ``relearn_after`` are in steps; ``floor`` is relative (0.03 means +3 %).

        ``alarms_per_10k`` is the wanted number of false alarms in 10 000 steps; ``sigma`` replaces the bar that
        follows from it by a fixed number of robust deviations.
        """
        if not (math.isfinite(alarms_per_10k) and alarms_per_10k > 0):
            raise UserError(f"alarms_per_10k is {alarms_per_10k}; use a number above 0, for example 0.5")
        assert min_values >= 3
        self.probability = alarms_per_10k / 1e4 / len(SPANS)
        self.sigma = sigma
        self.floor = math.log1p(floor)
        self.min_values = min_values
        self._values = Window(window, window // 2)
        self._lags = Window(scale_window, scale_window // 4)
        self._spreads = {k: Window(2 * scale_window, (3 * scale_window) // 4) for k in SPANS}
        self._changes = Window(scale_window, scale_window // 2)
        self._tails = {k: Tail(longest=2 * k - 1) for k in SPANS}
        self._recent: deque[float] = deque(maxlen=SPANS[-1])
        self._held = Plateaued(relearn_after)
        self._last = 0
        self._flagged_at: int | None = None

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if the loss stands above its level; learn from it otherwise."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        step, x = signals.step, math.log(signals.loss)
        self._forget_from(step)
        gap, self._last = step - self._last, step
        if len(self._values) < max(self.min_values // 2, 3):
            self._values.push(step, x)
            return None
        raw = x - self._values.median
        lag = TRUST * min(self._lags.median, 0.0) if len(self._lags) else 0.0
        level = x - raw + lag
        self._recent.append(x - level)
        ready = len(self._spreads[1]) >= max(self.min_values // 2, 3)
        statistics = {k: self._statistic(k) for k in SPANS if len(self._recent) >= k}
        k, bar = self._worst(statistics, step, gap) if ready else (0, 0.0)
        if k == 0:
            self._held.clear()
            self._learn(step, x, raw, statistics)
            return None
        return self._flag(signals, x, level, k, bar)

    def state_dict(self) -> State:
        """Return the memory, exact."""
        return {
            "values": self._values.state_dict(),
            "lags": self._lags.state_dict(),
            "changes": self._changes.state_dict(),
            "spreads": [self._spreads[k].state_dict() for k in SPANS],
            "tails": [self._tails[k].state_dict() for k in SPANS],
            "recent": list(self._recent),
            "held": self._held.state_dict(),
            "last": self._last,
            "flagged_at": self._flagged_at,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._values.replace(state["values"])
        self._lags.replace(state["lags"])
        self._changes.replace(state["changes"])
        for k, spread, tail in zip(SPANS, state["spreads"], state["tails"], strict=True):
            self._spreads[k].replace(spread)
            self._tails[k].load_state_dict(tail)
        self._recent = deque(state["recent"], maxlen=SPANS[-1])
        self._held.load_state_dict(state["held"])
        self._last = state["last"]
        self._flagged_at = state["flagged_at"]

    def _statistic(self, k: int) -> float:
        if k == 1:
            return self._recent[-1]
        values = sorted(list(self._recent)[-k:])
        return sum(values[:-1]) / (k - 1)

    def _bar(self, k: int, gap: int) -> float:
        """Return the bar of one statistic, on the logarithmic scale."""
        shown = self._tails[k].bar(self.probability * gap) if self.sigma is None else self.sigma
        young = 1.0 + 10.0 / len(self._spreads[k])  # the spread of few values is itself uncertain
        return max(shown * young * self._sigma(k), self.floor if k == 1 else max(self.floor, SPAN_FLOOR))

    def _sigma(self, k: int) -> float:
        """Return the noise of one statistic, on the logarithmic scale."""
        if not self._changes or not self._lags:
            return self._spreads[k].sigma
        near = MAD_TO_SIGMA * self._changes.median / math.sqrt(2) + TINY
        falls = self._lags.median < -near
        return min(self._spreads[k].sigma, (WANDER if falls else 2 * WANDER) * near)

    def _worst(self, statistics: dict[int, float], step: int, gap: int) -> tuple[int, float]:
        """Return the first span whose statistic is above its bar, and the bar; (0, 0) where none is."""
        if statistics[1] < self.floor:
            return 0, 0.0
        quiet = self._quiet(step)
        for k, value in statistics.items():
            if value < self.floor or len(self._spreads[k]) < (10 if k == 1 else SPAN_VALUES):
                continue
            bar = self._bar(k, min(max(gap, 1), 10))
            if k == 1 and gap == 1 and not quiet:
                bar *= ALONE
            if value > bar and (k == 1 or not quiet):
                return k, bar
        return 0, 0.0

    def _quiet(self, step: int) -> bool:
        return self._flagged_at is not None and step - self._flagged_at <= QUIET

    def _learn(self, step: int, x: float, raw: float, statistics: dict[int, float]) -> None:
        if self._values.points:
            self._changes.push(step, abs(x - self._values.points[-1][1]))
        self._values.push(step, x)
        self._lags.push(step, raw)
        for k, value in statistics.items():
            spread = self._spreads[k]
            if len(spread) >= 64 and not self._quiet(step):
                self._tails[k].learn((value - spread.median) / self._sigma(k))
            spread.push(step, value)

    def _flag(self, signals: Signals, x: float, level: float, k: int, bar: float) -> Alarm:
        step = signals.step
        if k > 1:  # the mean exposed the k - 1 points before
            for window in (self._values, self._lags, self._changes, *self._spreads.values()):
                window.drop_last(k - 1)
        self._flagged_at = step
        for tail in self._tails.values():
            tail.interrupt()
        self._recent.clear()
        self._held.add(step, x)
        shifted = self._held.settled(step, max(3 * self._spreads[1].sigma, self.floor))
        if shifted:
            self._values.replace(self._held.points)
            self._held.clear()
        expected = math.exp(level)
        rise = f"loss {signals.loss:.4g} is {signals.loss / expected - 1:+.1%} against its level {expected:.4g}"
        span = f" over {k} points" if k > 1 else ""
        return Alarm(
            kind="level_shift" if shifted else "fast_spike",
            severity="warning" if shifted else "critical",
            step=step,
            signal="loss",
            value=signals.loss,
            expected=expected,
            detector=self.name,
            message=f"{rise} and stays there; taken as the new level"
            if shifted
            else f"{rise}; the bar{span} is {math.expm1(bar):+.1%}",
        )

    def _forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later: a host went back without restoring this memory."""
        if step > self._last:
            return
        for window in (self._values, self._lags, self._changes, *self._spreads.values()):
            window.forget_from(step)
        self._recent.clear()
        self._held.forget_from(step)
        self._flagged_at = None
        self._last = step - 1
