"""A step as the policy sees it: readings, alarms, verdict."""

from __future__ import annotations

from dataclasses import dataclass

from poise.core.types import Alarm, Signals, Verdict

LOSS_KINDS = frozenset({"fast_spike", "slow_divergence", "chaotic"})
ODD_GRADIENT = frozenset({"grad_spike", "grad_runup"})


@dataclass(frozen=True)
class Now:
    """A step as the policy sees it."""

    signals: Signals
    alarms: tuple[Alarm, ...]
    verdict: Verdict | None

    @property
    def step(self) -> int:
        return self.signals.step

    @property
    def cause(self) -> str:
        return "unknown" if self.verdict is None else self.verdict.cause

    @property
    def told_apart(self) -> bool:
        """Whether an experiment has told an odd batch from odd weights."""
        return self.verdict is not None and self.verdict.weights != "unknown"

    @property
    def odd_gradient(self) -> Alarm | None:
        return next((a for a in self.alarms if a.kind in ODD_GRADIENT), None)

    @property
    def messages(self) -> str:
        return "; ".join(alarm.message for alarm in self.alarms)

    def find(self, *kinds: str) -> Alarm | None:
        """The first critical alarm of one of ``kinds``."""
        return next((a for a in self.alarms if a.severity == "critical" and a.kind in kinds), None)
