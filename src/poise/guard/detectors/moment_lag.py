"""Moment lag: gradients outgrow the second moments that should tame them.

Formula: x = ln adam_ratio, where adam_ratio = sqrt(mean g^2 / max(v, eps^2)) is StableAdamW's RMS; level and sigma
robust over 64 steps (see ``places.py``). Alarm when two readings running lie above level + max(ln 2, k sigma / 2)
and the ratio itself is at least ``least`` (v is meant to be the mean of g^2: a ratio of 1 is how Adam is built).
k follows from the allowed false alarms.
Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", arXiv
2304.13013: loss spikes follow within 1 to 8 steps of the RMS shooting up.
Differs from the paper: it clips the update by this RMS; here it only tells, and against the run's own level. With v
including this gradient the ratio is at most 1 / sqrt(1 - beta2), 4.5 at 0.95, so the bar is a factor of 2. One
odd batch lifts the ratio for one step, a gradient that grows on by 1.3 a step holds it near 3: hence two running.
Acts: every step once 32 ratios are known (at the start v knows too few gradients); once in an event.
Cost: a median over 64 floats every fourth step. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Streaks, Tracks, finite, tail_sigmas

CARD: Final = Card(
    name="moment_lag",
    kind="detector",
    title="Alarm when gradients outgrow Adam's second moments, which leads spikes by a few steps",
    citation="Wortsman et al. 2023, arXiv 2304.13013 (StableAdamW)",
    formula="ln sqrt(mean g^2 / v) - median_64 > max(ln 2, k sigma / 2), twice running",
    acts="every step once 32 ratios are known, before the optimizer",
    cost="a median over 64 floats every fourth step",
    off="guard.enabled = false",
    differs="tells instead of clipping the update; judged against the run's own level",
)


class MomentLag:
    """Raises ``moment_lag`` (warning) when the Adam ratio of the whole model stays far above its level."""

    name = "moment_lag"

    def __init__(
        self,
        *,
        alarms_per_10k: float = 0.5,
        factor: float = 2.0,
        least: float = 1.5,
        window: int = 64,
        min_values: int = 32,
        relearn_after: int = 100,
    ) -> None:
        """Ratios below ``factor`` times their level or below ``least`` are normal; windows are in steps."""
        assert factor > 1.0
        self._sigmas = tail_sigmas(alarms_per_10k) / 2
        self._floor = math.log(factor)
        self._least = least
        self._tracks = Tracks(
            window=window, at_least=min_values, min_values=min_values, relearn_after=relearn_after, refresh=4
        )
        self._events = Events(quiet_after=50)
        self._streaks = Streaks()

    def update(self, signals: Signals) -> Alarm | None:
        """Return a warning if the ratio has just stayed up for a second step."""
        step, ratio = signals.step, signals.extra.get("adam_ratio", math.nan)
        self._tracks.forget_from(step)
        self._events.forget_from(step)
        self._streaks.forget_from(step)
        if not math.isfinite(ratio) or ratio <= 0.0:
            return None
        x = math.log(ratio)
        level = self._tracks.level("")
        if level is None:
            self._tracks.learn("", step, x)
            return None
        out = ratio >= self._least and x - level.value > max(self._floor, self._sigmas * level.sigma)
        running = self._streaks.count("", step, out)
        if not out:
            self._tracks.learn("", step, x)
            return None
        self._tracks.hold("", step, x)
        if running < 2 or not self._events.begins("", step):
            return None
        usual = math.exp(level.value)
        return Alarm(
            kind="moment_lag",
            severity="warning",
            step=step,
            signal="adam_ratio",
            value=ratio,
            expected=usual,
            detector=self.name,
            message=f"gradients are {ratio:.2f} times the size that the second moments know (usually {usual:.2f})"
            f"{self._leader(signals)}",
        )

    def expect_change(self, places: Sequence[str] = ()) -> None:
        """Learn the level anew, whichever ``places`` have their moments reset: the ratio is the whole model's."""
        self._tracks.restart()

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

    @staticmethod
    def _leader(signals: Signals) -> str:
        ratios = finite(signals.places("adam_ratio").items())
        if not ratios:
            return ""
        place = max(ratios, key=lambda name: ratios[name])
        return f"; largest at {place}: {ratios[place]:.2f}"
