"""The policy: patience, escalation, cool-down, budgets, and what it says when it gives up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from poise.core.errors import UserError
from poise.core.types import Alarm, Decision, DropData, Halt, LowerLr, Proceed, ResetMoments, Rollback, Skip
from poise.guard.policy import Policy, PolicyConfig
from poise.guard.responses import carry_out


def alarm(step: int, kind: str, severity: str = "critical") -> Alarm:
    return Alarm(kind, severity, step, "loss", math.nan, 3.0, "test", f"{kind} seen")  # type: ignore[arg-type]


class Trainer:
    """A loop in miniature: bad steps are given, a rollback goes to the newest early enough checkpoint."""

    def __init__(
        self,
        config: PolicyConfig,
        bad: Callable[[int], str | None],
        checkpoints: list[int],
        ask_first: bool = True,
    ) -> None:
        self.checkpoints = checkpoints
        self.policy = Policy(config, self.has if ask_first else None)
        self.bad = bad
        self.step = 0
        self.log: list[tuple[int, str]] = []
        self.decisions: list[Decision] = []
        self.halted: str | None = None

    def has(self, at_most: int) -> bool:
        return any(step <= at_most for step in self.checkpoints)

    def run(self, steps: int) -> Trainer:
        for _ in range(steps):
            self.step += 1
            kind = self.bad(self.step)
            decision = self.policy.decide(self.step, [alarm(self.step, kind)] if kind else [])
            self.decisions.append(decision)
            if not isinstance(decision, Proceed) or decision.reason:
                self.log.append((self.step, decision.action))
            restored = carry_out(decision, self)
            if restored is not None:
                self.step = restored
            if self.halted is not None:
                break
        return self

    def rollback(self, at_most: int, drop_data: bool) -> int:
        assert drop_data
        if not self.has(at_most):
            raise UserError(f"no verified checkpoint at or before step {at_most}")
        return max(step for step in self.checkpoints if step <= at_most)

    def halt(self, reason: str) -> None:
        self.halted = reason

    def drop_data(self, first: int, last: int) -> None:
        raise AssertionError

    def scale_lr(self, factor: float) -> None:
        raise AssertionError

    def reset_moments(self) -> None:
        raise AssertionError


def between(first: int, last: int, kind: str = "nonfinite") -> Callable[[int], str | None]:
    return lambda step: kind if first <= step <= last else None


def always_from(first: int, kind: str) -> Callable[[int], str | None]:
    return between(first, 10**9, kind)


CONFIG = PolicyConfig(skip_patience=3, cool_down=20, max_rollbacks=3, max_skips=50, budget_steps=1000)


@pytest.mark.parametrize("kind", ["nonfinite", "fast_spike"])
def test_isolated_bad_step_is_skipped_and_noted(kind: str) -> None:
    trainer = Trainer(CONFIG, between(10, 10, kind), [0]).run(20)
    assert trainer.log == [(10, "skip"), (11, "proceed")]
    assert trainer.decisions[10].reason == "over after 1 bad step since step 10"
    assert trainer.decisions[11] == Proceed()


@pytest.mark.parametrize("severity", ["note", "warning"])
def test_lesser_alarms_ride_along(severity: str) -> None:
    decision = Policy(CONFIG).decide(5, [alarm(5, "grad_spike", severity)])
    assert isinstance(decision, Proceed)
    assert decision.reason == "grad_spike seen"
    assert [a.kind for a in decision.alarms] == ["grad_spike"]


@pytest.mark.parametrize("kind", ["nonfinite", "fast_spike"])
@pytest.mark.parametrize("ask_first", [True, False])
def test_patience_then_rollback_before_the_onset(kind: str, ask_first: bool) -> None:
    """Trouble that belongs to the data: it is gone after the rollback, and nothing more happens."""
    done: list[int] = []

    def bad(step: int) -> str | None:
        done.append(step)
        return kind if len(done) in range(57, 61) else None

    trainer = Trainer(CONFIG, bad, [0, 50, 56], ask_first).run(150)
    assert trainer.log == [(57, "skip"), (58, "skip"), (59, "skip"), (60, "rollback")]
    decision = trainer.decisions[59]
    assert isinstance(decision, Rollback)
    assert (decision.at_most, decision.drop_data) == (56, True)
    assert "4 bad steps in a row since step 57 (" in decision.reason
    assert trainer.halted is None
    assert trainer.step == 56 + 90


@pytest.mark.parametrize("kind", ["nonfinite", "fast_spike"])
def test_same_trouble_goes_one_checkpoint_further_then_halts(kind: str) -> None:
    """It comes back at the same step: never the same checkpoint twice, then the run ends with the story."""
    trainer = Trainer(CONFIG, always_from(57, kind), [0, 25, 50]).run(500)
    restores = [decision.at_most for decision in trainer.decisions if isinstance(decision, Rollback)]
    assert restores == [56, 49]
    assert trainer.log[-1] == (60, "halt")
    assert trainer.halted is not None
    for part in (
        "halted at step 60",
        f"{kind} seen",
        "since step 57",
        "50 and then 25",
        "Mend: ",
        "learning rate",
    ):
        assert part in trainer.halted


def test_trouble_right_after_a_rollback_goes_further_too() -> None:
    """A checkpoint that is itself bad: every step after it fails."""
    policy = Policy(CONFIG)
    found = [policy.decide(step, [alarm(step, "nonfinite")]) for step in [*range(51, 55), *range(51, 55)]]
    assert [d.action for d in found] == ["skip"] * 3 + ["rollback"] + ["skip"] * 3 + ["rollback"]
    assert isinstance(found[3], Rollback) and found[3].at_most == 50
    assert isinstance(found[7], Rollback) and found[7].at_most == 49


def test_after_the_cool_down_trouble_is_new_and_the_budget_counts() -> None:
    """Three separate troubles are rolled back, the fourth within 1000 steps halts."""
    onset = {57: 0, 157: 0, 257: 0, 357: 0}

    def bad(step: int) -> str | None:
        for first in onset:
            if first <= step < first + 4 and onset[first] < 4:
                onset[first] += 1
                return "nonfinite"
        return None

    trainer = Trainer(CONFIG, bad, [0, 50, 150, 250, 350]).run(600)
    assert [d.at_most for d in trainer.decisions if isinstance(d, Rollback)] == [56, 156, 256]
    assert trainer.log[-1] == (360, "halt")
    assert trainer.halted is not None and "no rollback is left in the budget" in trainer.halted


def test_budget_comes_back_with_time() -> None:
    onset = {57: 0, 157: 0, 257: 0, 357: 0}

    def bad(step: int) -> str | None:
        for first in onset:
            if first <= step < first + 4 and onset[first] < 4:
                onset[first] += 1
                return "nonfinite"
        return None

    config = PolicyConfig(skip_patience=3, cool_down=20, max_rollbacks=3, budget_steps=250)
    trainer = Trainer(config, bad, [0, 50, 150, 250, 350]).run(600)
    assert len([d for d in trainer.decisions if isinstance(d, Rollback)]) == 4
    assert trainer.halted is None


@pytest.mark.parametrize("ask_first", [True, False])
def test_without_a_checkpoint_nonfinite_halts(ask_first: bool) -> None:
    trainer = Trainer(CONFIG, always_from(5, "nonfinite"), [], ask_first).run(50)
    assert trainer.step == 8
    assert trainer.halted is not None and "checkpoint at or before step 4" in trainer.halted


@pytest.mark.parametrize("ask_first", [True, False])
def test_without_a_checkpoint_a_spike_is_let_through(ask_first: bool) -> None:
    """... with a reason on every step, and a later NaN is still caught."""
    trainer = Trainer(CONFIG, between(5, 30, "fast_spike"), [], ask_first).run(40)
    assert trainer.halted is None
    through = trainer.decisions[8:30]  # the host's refusal is known one step later than one's own knowledge
    assert all(isinstance(d, Proceed) and "let through" in d.reason for d in through)
    assert trainer.decisions[31] == Proceed()
    assert isinstance(trainer.policy.decide(41, [alarm(41, "nonfinite")]), Skip)


def test_no_rollback_allowed_is_like_no_checkpoint() -> None:
    config = PolicyConfig(skip_patience=1, max_rollbacks=0)
    assert Trainer(config, always_from(5, "nonfinite"), [0]).run(20).halted is not None
    assert Trainer(config, between(5, 9, "fast_spike"), [0]).run(20).halted is None


@pytest.mark.parametrize(("kind", "end"), [("nonfinite", Halt), ("fast_spike", Proceed)])
def test_skipping_is_given_up_when_it_becomes_a_habit(kind: str, end: type[Decision]) -> None:
    """Every other step bad: never five in a row, but half of the data is lost."""
    trainer = Trainer(PolicyConfig(max_skips=10), lambda step: kind if step % 2 else None, [0]).run(21)
    assert [d.action for d in trainer.decisions[:20:2]] == ["skip"] * 10
    assert type(trainer.decisions[20]) is end
    assert "10 steps were skipped" in trainer.decisions[20].reason


def test_state_round_trip_at_every_step() -> None:
    """Saved as JSON before any step of a long story and loaded, the policy decides the same."""
    story = Trainer(CONFIG, always_from(57, "nonfinite"), [0, 25, 50])
    steps: list[tuple[int, str | None]] = []
    original = story.bad
    story.bad = lambda step: steps.append((step, original(step))) or original(step)  # type: ignore[func-returns-value]
    story.run(500)
    for cut in range(50, len(steps)):
        first, second = Policy(CONFIG, story.has), Policy(CONFIG, story.has)
        for step, kind in steps[:cut]:
            first.decide(step, [alarm(step, kind)] if kind else [])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [second.decide(step, [alarm(step, kind)] if kind else []) for step, kind in steps[cut:]]
        assert [d.reason for d in rest] == [d.reason for d in story.decisions[cut:]]


@pytest.mark.parametrize(
    "values",
    [{"skip_patience": -1}, {"cool_down": -1}, {"max_rollbacks": -1}, {"max_skips": 0}, {"budget_steps": 0}],
)
def test_bad_settings(values: dict[str, int]) -> None:
    (name,) = values
    with pytest.raises(UserError, match=rf"guard\.{name} is"):
        PolicyConfig(**values)


class Recorder:
    """A host that writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def rollback(self, at_most: int, drop_data: bool) -> int:
        self.asked.append(("rollback", at_most, drop_data))
        return at_most - 1

    def drop_data(self, first: int, last: int) -> None:
        self.asked.append(("drop_data", first, last))

    def scale_lr(self, factor: float) -> None:
        self.asked.append(("scale_lr", factor))

    def reset_moments(self) -> None:
        self.asked.append("reset_moments")

    def halt(self, reason: str) -> None:
        self.asked.append(("halt", reason))


def test_carry_out_dispatches() -> None:
    host = Recorder()
    assert carry_out(Rollback(at_most=7, drop_data=False), host) == 6
    for decision in (DropData(first=3, last=4), LowerLr(factor=0.5), ResetMoments(), Halt(reason="enough")):
        assert carry_out(decision, host) is None
    assert carry_out(Skip(), host) is None and carry_out(Proceed(), host) is None
    assert host.asked == [
        ("rollback", 7, False),
        ("drop_data", 3, 4),
        ("scale_lr", 0.5),
        "reset_moments",
        ("halt", "enough"),
    ]
