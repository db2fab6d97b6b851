"""What the policy has tried: budgets, rollbacks and where they went, and what was mended where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from poise.core.errors import UserError
from poise.core.types import Alarm

MEND_MEMORY = 100
"""Steps after which the same mend at the same place counts as the first again."""

SMOOTH = 0.9
MARK_EVERY, MARKS = 25, 8
"""The smoothed loss is kept every so many steps, so many times."""

FLAT, DIP = 1.05, 0.9

MAX_TRIES = 2
"""Rollbacks for one trouble: the first, and one checkpoint further."""


@dataclass(frozen=True)
class PolicyConfig:
    """How patient the policy is. All in steps.

    Attributes:
        watch_steps: how long a spike may take to recover by itself.
        check_steps: after so many steps an action is judged.
        lasting: share above its level at which the loss counts as damaged, 0.03 for 3 %.
        skip_patience: non-finite steps in a row that are skipped before a rollback.
        cool_down: steps after a rollback in which a new trouble counts as the same.
        max_rollbacks: rollbacks within ``budget_steps`` steps; 0 means never to go back.
        max_skips: skipped steps within ``budget_steps`` steps before skipping is given up.
        budget_steps: the span of both budgets, counted in steps really done.
        qk_threshold: no attention logit stays above this after a QK-clip.
        measured_every: steps between two measurements of the layers: how late damage may be seen.
    """

    watch_steps: int = 100
    check_steps: int = 50
    lasting: float = 0.03
    skip_patience: int = 5
    cool_down: int = 100
    max_rollbacks: int = 3
    max_skips: int = 50
    budget_steps: int = 1000
    qk_threshold: float = 100.0
    measured_every: int = 10

    def __post_init__(self) -> None:
        for name in ("skip_patience", "cool_down", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"guard.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("max_skips", "budget_steps", "watch_steps", "check_steps", "measured_every"):
            if getattr(self, name) < 1:
                raise UserError(f"guard.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lasting", "qk_threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"guard.{name} is {value}; use a finite number above 0")


@dataclass
class Ledger:
    """Everything but the present trouble of the loss; JSON-able and exact.

    Attributes:
        done: steps decided in all; goes on counting where step numbers go back.
        streak, onset: non-finite steps in a row, and the first of them.
        skips, rollbacks: when (in steps done) something was skipped, and a rollback decided.
        asked: ``at_most`` of a rollback whose outcome is not known yet.
        refused: the host could not go back.
        tried: the checkpoints that this trouble went back to.
        cool_until: last step of the cool-down.
        mended: "kind@place" -> [step, reading, how many in a row] of the last mend.
        smooth, marks: smoothed loss of the steps that were not flagged, and what it was every ``MARK_EVERY`` of them.
    """

    done: int = 0
    streak: int = 0
    onset: int | None = None
    skips: list[int] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)
    asked: int | None = None
    refused: bool = False
    tried: list[int] = field(default_factory=list)
    cool_until: int = 0
    mended: dict[str, list[float]] = field(default_factory=dict)
    smooth: float = 0.0
    marks: list[float] = field(default_factory=list)

    def see_loss(self, loss: float, flagged: bool) -> None:
        """Take in a step's loss unless it was flagged."""
        if not flagged and math.isfinite(loss):
            self.smooth = loss if self.smooth == 0.0 else SMOOTH * self.smooth + (1.0 - SMOOTH) * loss
            if self.done % MARK_EVERY == 0:
                self.marks = [*self.marks, self.smooth][-MARKS:]

    def level(self, level: float) -> float:
        """Return the level to which a loss has to come back.

        It is ``level``, unless the loss has just dipped below a long flat stretch (easy or repeated data): coming back
        from there is no damage.
        """
        older = self.marks[: MARKS // 2]
        flat = len(self.marks) == MARKS and max(older) <= FLAT * min(older)
        return min(older) if flat and level < DIP * min(older) else level

    def learn_outcome(self, step: int) -> bool:
        """See by the number of this step what became of the last rollback; whether the run went back."""
        if self.asked is None:
            return False
        went_back = step - 1 <= self.asked
        if went_back:
            self.tried.append(step - 1)
            self.streak, self.onset, self.refused = 0, None, False
            self.mended.clear()
        else:
            self.refused = True
            self.rollbacks.pop()
        self.asked = None
        return went_back

    def skips_left(self, config: PolicyConfig) -> int:
        """Skips that the budget still has."""
        return config.max_skips - len(self._recent(self.skips, config))

    def no_rollback_left(self, config: PolicyConfig) -> bool:
        """Whether the budget of rollbacks is used up."""
        return 0 < config.max_rollbacks <= len(self._recent(self.rollbacks, config))

    def _recent(self, when: list[int], config: PolicyConfig) -> list[int]:
        """Drop what is older than the budget's span, and return the rest."""
        when[:] = [done for done in when if done > self.done - config.budget_steps]
        return when

    def at_most(self, onset: int) -> int:
        """The newest step to go back to from a trouble that began at ``onset``: never the same checkpoint again."""
        return min([onset - 1, *(tried - 1 for tried in self.tried)])

    def target(self, onset: int, config: PolicyConfig, checkpoint: Callable[[int], int | None] | None) -> int | None:
        """The checkpoint that a rollback would go to, as far as known; ``None`` if there is none."""
        at_most = self.at_most(onset)
        if at_most < 0 or self.refused or config.max_rollbacks == 0:
            return None
        if len(self.tried) >= MAX_TRIES or self.no_rollback_left(config):
            return None
        return at_most if checkpoint is None else checkpoint(at_most)

    def note_rollback(self, step: int, at_most: int, config: PolicyConfig) -> None:
        """A rollback was decided at ``step``."""
        self.rollbacks.append(self.done)
        self.asked = at_most
        self.cool_until = max(self.cool_until, step + config.cool_down)

    def note_mend(self, alarm: Alarm, step: int, prefix: str = "") -> None:
        """Something was done about ``alarm``."""
        before = self.last_mend(alarm, step, MEND_MEMORY, prefix)
        self.mended[prefix + _key(alarm)] = [step, alarm.value, 1 + (0 if before is None else before[2])]

    def last_mend(self, alarm: Alarm, step: int, within: int, prefix: str = "") -> list[float] | None:
        """[step, reading, how many] of the last mend of this at this place, if at most ``within`` steps ago."""
        before = self.mended.get(prefix + _key(alarm))
        return before if before is not None and 0 <= step - before[0] <= within else None

    def history(self) -> str:
        """What was tried, for a person."""
        tried = [f"skipped {count(len(self.skips), 'step')}"] if self.skips else []
        if self.tried:
            tried.append(f"went back to step {' and then '.join(map(str, self.tried))}")
        elif self.rollbacks:
            tried.append(f"went back {count(len(self.rollbacks), 'time')}")
        return ", ".join(tried) or "nothing"

    def state(self) -> dict[str, Any]:
        """Return everything, JSON-able and exact."""
        return {f.name: _copy(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Ledger:
        """Return what ``state`` was made from."""
        return cls(**{f.name: _copy(state[f.name]) for f in fields(cls)})


def count(n: int, what: str) -> str:
    """Return e.g. "1 step" or "2 steps"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _key(alarm: Alarm) -> str:
    return f"{alarm.kind}@{alarm.place}"


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return list(value) if isinstance(value, list) else value
