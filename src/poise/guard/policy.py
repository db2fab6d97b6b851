"""From alarms to a decision: patience, cool-down, budget and escalation.

Only critical alarms move the policy; everything else rides along in a ``Proceed``.

    bad step                       Skip: the update is not taken, the run goes on with the next batch
    ``skip_patience`` bad in a row Rollback to a checkpoint before the trouble began; its data is dropped
    bad again in the cool-down     Rollback one checkpoint further, never to the same one again
    bad once more, or no budget    Halt, saying what was seen, what was tried and what to mend

The cool-down lasts until ``cool_down`` steps after the step at which the rollback was decided, so it covers
all of the way that is trained again. Where there is no checkpoint to go back to, a non-finite reading halts
and a spike is let through, loudly: spikes usually mend themselves, NaN never does. An isolated bad step costs
one batch and nothing else.

Sources: PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1) goes back about 100 steps and leaves out
200 to 500 batches; here the batches left out are those shown since the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from poise.core.errors import UserError
from poise.core.types import Alarm, Decision, Halt, Proceed, Rollback, Skip

MAX_TRIES = 2
"""Rollbacks for one trouble: the first, and one checkpoint further."""


@dataclass(frozen=True)
class PolicyConfig:
    """How patient the policy is.

    Attributes:
        skip_patience: bad steps in a row that are skipped before a rollback.
        cool_down: steps after a trouble in which a new one counts as the same.
        max_rollbacks: rollbacks within ``budget_steps`` steps before the run is halted; 0 means never to go
            back, as if there were no checkpoint.
        max_skips: skipped steps within ``budget_steps`` steps before skipping is given up.
        budget_steps: the span of both budgets, counted in steps really done.
    """

    skip_patience: int = 5
    cool_down: int = 100
    max_rollbacks: int = 3
    max_skips: int = 50
    budget_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("skip_patience", "cool_down", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"guard.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("max_skips", "budget_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"guard.{name} is {getattr(self, name)}; it must be at least 1")


class Policy:
    """Turns the alarms of each step into one decision.

    Args:
        config: patience, cool-down and budgets.
        can_rollback: says whether there is a verified checkpoint with a step of at most its argument. Without
            it the host is asked: a host that could not go back is known by the next step's number.
    """

    def __init__(self, config: PolicyConfig, can_rollback: Callable[[int], bool] | None = None) -> None:
        self.config = config
        self._can_rollback = can_rollback
        self._done = 0  # steps decided in all; goes on counting where step numbers go back
        self._streak = 0  # bad steps in a row
        self._onset: int | None = None  # the step at which the streak began
        self._letting_through = False  # a spike without a checkpoint: no more skipping in this streak
        self._skips: list[int] = []  # when (in steps done) something was skipped
        self._rollbacks: list[int] = []  # when a rollback was decided
        self._asked: int | None = None  # ``at_most`` of a rollback whose outcome is not known yet
        self._refused = False  # the host could not go back
        self._tried: list[int] = []  # checkpoints that this trouble went back to
        self._cool_until = 0  # last step of the cool-down

    def decide(self, step: int, alarms: Sequence[Alarm]) -> Decision:
        """Return what to do about ``step``, given the alarms it raised. Call it once for every step."""
        self._done += 1
        self._learn_outcome(step)
        if self._tried and step > self._cool_until:
            self._tried = []
        critical = [alarm for alarm in alarms if alarm.severity == "critical"]
        if not critical:
            return self._calm(tuple(alarms))
        self._streak += 1
        if self._onset is None:
            self._onset = step
        fatal = any(alarm.kind == "nonfinite" for alarm in critical)
        return self._react(step, critical[0], fatal, tuple(alarms))

    def state_dict(self) -> dict[str, Any]:
        """Return everything the policy remembers, JSON-able and exact."""
        return {
            "done": self._done,
            "streak": self._streak,
            "onset": self._onset,
            "letting_through": self._letting_through,
            "skips": list(self._skips),
            "rollbacks": list(self._rollbacks),
            "asked": self._asked,
            "refused": self._refused,
            "tried": list(self._tried),
            "cool_until": self._cool_until,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._done = state["done"]
        self._streak = state["streak"]
        self._onset = state["onset"]
        self._letting_through = state["letting_through"]
        self._skips = list(state["skips"])
        self._rollbacks = list(state["rollbacks"])
        self._asked = state["asked"]
        self._refused = state["refused"]
        self._tried = list(state["tried"])
        self._cool_until = state["cool_until"]

    def _learn_outcome(self, step: int) -> None:
        """See by the number of this step what became of the rollback that was decided last."""
        if self._asked is None:
            return
        if step - 1 <= self._asked:
            self._tried.append(step - 1)
            self._end_streak()
        else:
            self._refused = True
            self._rollbacks.pop()
        self._asked = None

    def _end_streak(self) -> None:
        self._streak, self._onset, self._letting_through, self._refused = 0, None, False, False

    def _calm(self, alarms: tuple[Alarm, ...]) -> Decision:
        reason = "; ".join(alarm.message for alarm in alarms)
        if self._streak:
            over = f"over after {_count(self._streak, 'bad step')} since step {self._onset}"
            reason = f"{over}; {reason}" if reason else over
        self._end_streak()
        return Proceed(reason=reason, alarms=alarms)

    def _react(self, step: int, alarm: Alarm, fatal: bool, alarms: tuple[Alarm, ...]) -> Decision:
        if self._letting_through and not fatal:
            return Proceed(reason=f"let through: {alarm.message}", alarms=alarms)
        if self._streak <= self.config.skip_patience:
            return self._skip(step, alarm, fatal, alarms)
        if len(self._tried) >= MAX_TRIES:
            return self._halt(step, alarm, fatal, alarms, "it came back each time")
        if 0 < self.config.max_rollbacks <= len(self._recent(self._rollbacks)):
            return self._halt(step, alarm, fatal, alarms, "no rollback is left in the budget")
        assert self._onset is not None
        at_most = min([self._onset - 1, *(tried - 1 for tried in self._tried)])
        if not self._can_go_back(at_most):
            if fatal or self._tried:
                return self._halt(step, alarm, fatal, alarms, f"there is no checkpoint at or before step {at_most}")
            self._letting_through = True
            reason = f"no checkpoint to go back to, so from here on it is let through: {alarm.message}"
            return Proceed(reason=reason, alarms=alarms)
        self._rollbacks.append(self._done)
        self._asked = at_most
        self._cool_until = max(self._cool_until, step + self.config.cool_down)
        reason = (
            f"{_count(self._streak, 'bad step')} in a row since step {self._onset} ({alarm.message}); "
            f"going back to a checkpoint at or before step {at_most}, with new data"
        )
        return Rollback(at_most=at_most, reason=reason, alarms=alarms)

    def _can_go_back(self, at_most: int) -> bool:
        if at_most < 0 or self._refused or self.config.max_rollbacks == 0:
            return False
        return self._can_rollback is None or self._can_rollback(at_most)

    def _skip(self, step: int, alarm: Alarm, fatal: bool, alarms: tuple[Alarm, ...]) -> Decision:
        if len(self._recent(self._skips)) >= self.config.max_skips:
            often = f"{self.config.max_skips} steps were skipped within {self.config.budget_steps}"
            if fatal:
                return self._halt(step, alarm, fatal, alarms, often)
            return Proceed(reason=f"{often}, so it is let through: {alarm.message}", alarms=alarms)
        self._skips.append(self._done)
        reason = f"{alarm.message}; skipped ({self._streak} in a row, patience {self.config.skip_patience})"
        return Skip(reason=reason, alarms=alarms)

    def _recent(self, when: list[int]) -> list[int]:
        """Drop what is older than the budget's span, and return the rest."""
        when[:] = [done for done in when if done > self._done - self.config.budget_steps]
        return when

    def _halt(self, step: int, alarm: Alarm, fatal: bool, alarms: tuple[Alarm, ...], why: str) -> Halt:
        tried = [f"skipped {_count(len(self._skips), 'step')}"] if self._skips else []
        if self._tried:
            tried.append(f"went back to step {' and then '.join(map(str, self._tried))}")
        elif self._rollbacks:
            tried.append(f"went back {_count(len(self._rollbacks), 'time')}")
        reason = (
            f"halted at step {step}: {alarm.message}, bad since step {self._onset}. "
            f"Tried: {', '.join(tried) or 'nothing'}; {why}. Mend: {_mend(fatal, bool(self._tried))}."
        )
        return Halt(reason=reason, alarms=alarms)


def _mend(fatal: bool, came_back: bool) -> str:
    lower = "lower the learning rate (half of it is a good first try) or lengthen the warm-up"
    if not fatal:
        return f"{lower}, then start again from a checkpoint well before the trouble"
    if came_back:
        return f"{lower}; if it stays, look for a fault in the data, the precision (fp16?) or the device"
    return f"look at the data and the precision (fp16?) of these steps; if they are sound, {lower}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
