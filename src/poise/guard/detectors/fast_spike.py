"""Fast loss spike: the loss of a step stands clearly above the level of the steps before it.

Formula: ``RobustRule`` (see ``robust.py``) on x = ln loss, with a window of 32 steps for the level, 128 for
the noise, 6 robust standard deviations and at least +5 %.
Differs from published rules: medians instead of mean and standard deviation; flagged values stay out of the
windows; a non-finite value never enters; a lasting new level is learned after a while.
Acts: on every step once 20 values are known. A loss of zero or below has no logarithm and is not judged.
Cost: a few medians over 128 floats a step, on the CPU. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import RobustRule

CARD = Card(
    name="fast_spike",
    kind="detector",
    title="Robust outlier rule on the logarithm of the loss",
    citation="median and MAD rule: Hampel 1974, The influence curve and its role in robust estimation",
    formula="ln loss - median_32 > max(6 * 1.4826 median_128|d ln loss| / sqrt 2, ln 1.05)",
    acts="every step once 20 values are known, before the optimizer",
    cost="medians over 128 floats a step",
    off="guard.enabled = false",
    differs="flagged values stay out of the windows; a lasting new level is learned",
)


class FastSpike:
    """Raises ``fast_spike`` (critical), and ``level_shift`` (warning) when it accepts a new level."""

    name = "fast_spike"

    def __init__(
        self,
        *,
        window: int = 32,
        scale_window: int = 128,
        sigma: float = 6.0,
        floor: float = 0.05,
        min_values: int = 20,
        relearn_after: int = 50,
    ) -> None:
        """Windows and ``relearn_after`` are in steps; ``floor`` is relative (0.05 means +5 %)."""
        self._rule = RobustRule(
            window=window,
            scale_window=scale_window,
            n_sigma=sigma,
            floor=math.log1p(floor),
            min_values=min_values,
            relearn_after=relearn_after,
        )

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if the loss stands above its level; learn from it otherwise."""
        if not math.isfinite(signals.loss) or signals.loss <= 0.0:
            return None
        verdict = self._rule.update(signals.step, math.log(signals.loss))
        if verdict.kind in ("learning", "normal"):
            return None
        level = math.exp(verdict.level)
        shifted = verdict.kind == "relearned"
        rise = f"loss {signals.loss:.4g} is {signals.loss / level - 1:+.1%} against its level {level:.4g}"
        return Alarm(
            kind="level_shift" if shifted else "fast_spike",
            severity="warning" if shifted else "critical",
            step=signals.step,
            signal="loss",
            value=signals.loss,
            expected=level,
            detector=self.name,
            message=f"{rise} and stays there; taken as the new level"
            if shifted
            else f"{rise}; the bar is {math.expm1(verdict.bar):+.1%}",
        )

    def state_dict(self) -> State:
        """Return the windows, exact."""
        return self._rule.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._rule.load_state_dict(state)
