"""A learning rate that has gone wild: ten times its course and more than the run has ever used.

Such a rate is a fault of the schedule, known before the first step is taken with it. So the steps are not taken for
a while (it may pass), then the guard cuts it back to its course, and takes the cut back when the fault is over. A
smaller jump, or the return to a rate used before (a restart of the schedule), is only evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from poise.core.types import Alarm

WILD = 10.0
"""Times its course at which a rate is a fault whatever the loss says."""

NEVER_USED = 3.0
"""A wild rate is also so many times the highest that the run has used."""

SEAM = 5
"""Steps after a resume in which a new rate is what somebody wanted."""


@dataclass
class Rate:
    """What is remembered of the learning rate; JSON-able and exact.

    Attributes:
        last: the rate of the step before.
        highest: the highest rate of a step that was no jump.
        jump: [step, rate before, rate after] of the last jump.
        cut: what the rate was multiplied by because of it; 1 when nothing was done.
        restart: the step at which the schedule last went back up to a rate used before; -1 for never.
        seam: where this process took the run up; not part of the state.
    """

    last: float = 0.0
    highest: float = 0.0
    jump: list[float] = field(default_factory=list)
    cut: float = 1.0
    restart: int = -1
    seam: int = -SEAM

    def see(self, step: int, lr: float, alarms: Sequence[Alarm]) -> float | None:
        """Take in a step's rate; return by how much to multiply it now that a fault is over, else ``None``."""
        found = next((a for a in alarms if a.kind == "lr_jump" and a.severity != "note"), None)
        before, self.last = self.last, lr
        if any(a.kind == "lr_jump" and a.severity == "note" and a.value > a.expected for a in alarms):
            self.restart = step
        if found is not None:
            self.jump = [step, found.expected, found.value]
        elif not self.in_force(step, lr):
            self.highest = max(self.highest, lr)
        if self.cut < 1.0 and 0.0 < lr <= before * math.sqrt(self.cut):
            back, self.cut = 1.0 / self.cut, 1.0
            return back
        return None

    def in_force(self, step: int, lr: float) -> bool:
        """Whether the last jump is still what the rate is."""
        return bool(self.jump) and step >= self.jump[0] and lr > math.sqrt(self.jump[1] * self.jump[2])

    def wild(self, step: int, lr: float) -> bool:
        """Whether the rate is a fault by itself."""
        if not self.in_force(step, lr) or self.jump[0] <= self.seam + SEAM:
            return False
        return self.jump[2] >= WILD * self.jump[1] and self.jump[2] >= NEVER_USED * self.highest

    def before_jump(self, step: int, lr: float, within: int) -> float | None:
        """The rate before a jump of the last ``within`` steps that is still in force."""
        recent = bool(self.jump) and step - self.jump[0] <= within and self.in_force(step, lr)
        return self.jump[1] if recent and 0 < self.jump[1] < lr else None

    def cut_back(self, lr: float) -> float:
        """Return what to multiply the rate by, and remember it."""
        self.cut *= self.jump[1] / lr
        factor, self.last = self.jump[1] / lr, self.jump[1]
        self.jump = []
        return factor

    def state(self) -> dict[str, Any]:
        """Return everything."""
        return {name: value for name, value in asdict(self).items() if name != "seam"}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Rate:
        """Return what ``state`` was made from."""
        return cls(**{**state, "jump": list(state["jump"])})
