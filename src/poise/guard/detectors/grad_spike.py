"""Gradient-norm outlier: the norm of a step stands far above the norms of the steps before it.

Formula: ``RobustRule`` (see ``robust.py``) on x = ln grad_norm, with 8 robust standard deviations and at
least a doubling. Norms have heavy tails and clipping takes care of most outliers, so this is only a note:
evidence for a person, nothing that the policy acts on.
Acts: on every step once 20 values are known. A norm of zero (nothing to learn from, or none was logged) is
not judged. Cost: a few medians over 128 floats a step. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.robust import RobustRule

CARD = Card(
    name="grad_spike",
    kind="detector",
    title="Note when the gradient norm is far above its level",
    citation="median and MAD rule: Hampel 1974, The influence curve and its role in robust estimation",
    formula="ln norm - median_32 > max(8 * 1.4826 median_128|d ln norm| / sqrt 2, ln 2)",
    acts="every step once 20 values are known; a note only",
    cost="medians over 128 floats a step",
    off="guard.enabled = false",
)


class GradSpike:
    """Raises ``grad_spike`` (note), and ``level_shift`` (note) when it accepts a new level of the norm."""

    name = "grad_spike"

    def __init__(
        self,
        *,
        window: int = 32,
        scale_window: int = 128,
        sigma: float = 8.0,
        factor: float = 2.0,
        min_values: int = 20,
        relearn_after: int = 50,
    ) -> None:
        """Windows and ``relearn_after`` are in steps; norms below ``factor`` times their level are normal."""
        self._rule = RobustRule(
            window=window,
            scale_window=scale_window,
            n_sigma=sigma,
            floor=math.log(factor),
            min_values=min_values,
            relearn_after=relearn_after,
        )

    def update(self, signals: Signals) -> Alarm | None:
        """Return a note if the norm stands far above its level; learn from it otherwise."""
        if not math.isfinite(signals.grad_norm) or signals.grad_norm <= 0.0:
            return None
        verdict = self._rule.update(signals.step, math.log(signals.grad_norm))
        if verdict.kind in ("learning", "normal"):
            return None
        level = math.exp(verdict.level)
        times = signals.grad_norm / level
        rise = f"gradient norm {signals.grad_norm:.4g} is {times:.1f} times its level {level:.4g}"
        shifted = verdict.kind == "relearned"
        return Alarm(
            kind="level_shift" if shifted else "grad_spike",
            severity="note",
            step=signals.step,
            signal="grad_norm",
            value=signals.grad_norm,
            expected=level,
            detector=self.name,
            message=f"{rise} and stays there; taken as the new level" if shifted else rise,
        )

    def state_dict(self) -> State:
        """Return the windows, exact."""
        return self._rule.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._rule.load_state_dict(state)
