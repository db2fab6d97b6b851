"""The guard's settings: one flat table, with one default that fits an ordinary run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from poise.core.errors import UserError, nearest
from poise.guard.ledger import PolicyConfig

Mode = Literal["act", "observe", "halt"]


@dataclass(frozen=True)
class GuardConfig:
    """What the guard looks at, and how patient it is.

    Attributes:
        enabled: false lets every step through and measures nothing.
        mode: ``act`` carries its decisions out; ``observe`` says what it would do and never does it; ``halt`` ends
            the run where it would have to do more than watch.
        alarms_per_10k: false alarms that a healthy run may raise in 10 000 steps. Smaller is deafer.
        every: steps between two measurements of the layers (outputs, attention, weights); 0 never measures them.
        investigate: before the first rollback of a trouble, find its cause by experiment (``poise.guard.investigate``)
            where the host can rewind; costs a few dozen steps.
        watch_steps, check_steps, lasting, skip_patience, cool_down, max_rollbacks, max_skips, budget_steps,
            qk_threshold: see ``PolicyConfig``.
    """

    enabled: bool = True
    mode: Mode = "act"
    alarms_per_10k: float = 0.5
    every: int = 10
    investigate: bool = False
    watch_steps: int = 100
    check_steps: int = 50
    lasting: float = 0.03
    skip_patience: int = 5
    cool_down: int = 100
    max_rollbacks: int = 3
    max_skips: int = 50
    budget_steps: int = 1000
    qk_threshold: float = 100.0

    def __post_init__(self) -> None:
        modes = get_args(Mode)
        if self.mode not in modes:
            raise UserError(f"guard.mode is '{self.mode}'{nearest(self.mode, modes)}; use one of {', '.join(modes)}")
        if not (math.isfinite(self.alarms_per_10k) and 0 < self.alarms_per_10k <= 1000):
            raise UserError(f"guard.alarms_per_10k is {self.alarms_per_10k}; use a number above 0, at most 1000")
        if self.every < 0:
            raise UserError(f"guard.every is {self.every}; use 0 for never, or a number of steps")
        _ = self.policy  # its own checks

    @property
    def policy(self) -> PolicyConfig:
        """The policy's share of the settings."""
        shared = {f.name for f in fields(PolicyConfig)} & {f.name for f in fields(self)}
        return PolicyConfig(**{name: getattr(self, name) for name in shared}, measured_every=max(self.every, 1))
