"""The policy: waiting, patience, escalation, cool-down, budgets, and what it says when it gives up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from poise.core.errors import UserError
from poise.core.types import (
    Alarm,
    Clip,
    Decision,
    Halt,
    LowerLr,
    Proceed,
    QkClip,
    RaisePrecision,
    ResetMoments,
    Rollback,
    Signals,
    Skip,
    Verdict,
    Watch,
)
from poise.guard.episode import Episode
from poise.guard.ladder import ORDER
from poise.guard.ledger import PolicyConfig
from poise.guard.policy import ABILITIES, Policy
from poise.guard.responses.dispatch import abilities, carry_out

LEVEL = 3.0


def alarm(step: int, kind: str, severity: str = "critical", value: float = math.nan, **more: object) -> Alarm:
    expected = more.pop("expected", 1.0 if kind.startswith("grad") else LEVEL)
    place = str(more.pop("place", ""))
    return Alarm(kind, severity, step, "loss", value, expected, "test", f"{kind} seen", place)  # type: ignore[arg-type]


class Trainer:
    """A loop in miniature. ``loss_at`` gives a step's loss, ``extra_alarms`` its further alarms.

    A loss 5 % above ``LEVEL`` is flagged; a rollback goes to the newest early enough checkpoint.
    """

    def __init__(
        self,
        loss_at: Callable[[int, Trainer], float],
        checkpoints: Sequence[int] = (),
        config: PolicyConfig | None = None,
        extra_alarms: Callable[[int], Sequence[Alarm]] = lambda step: (),
        verdict: Callable[[int], Verdict | None] = lambda step: None,
        can: frozenset[str] = ABILITIES,
        ask_first: bool = True,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        self.loss_at, self.extra_alarms, self.verdict = loss_at, extra_alarms, verdict
        self.checkpoints, self.extra = list(checkpoints), extra or {}
        self.policy = Policy(config or PolicyConfig(), self.newest if ask_first else None, can)
        self.step, self.lr, self.shown = 0, 1e-3, 0
        self.log: list[tuple[int, str]] = []
        self.decisions: list[Decision] = []
        self.halted: str | None = None
        self.asked: list[object] = []

    def newest(self, at_most: int) -> int | None:
        return max((s for s in self.checkpoints if s <= at_most), default=None)

    def run(self, steps: int) -> Trainer:
        for _ in range(steps):
            self.step += 1
            self.shown += 1
            loss = self.loss_at(self.step, self)
            alarms = list(self.extra_alarms(self.step))
            if not math.isfinite(loss):
                alarms.insert(0, alarm(self.step, "nonfinite"))
            elif loss > 1.05 * LEVEL:
                alarms.insert(0, alarm(self.step, "fast_spike", value=loss))
            signals = Signals(self.step, loss, 1.0, self.lr, 0, self.extra)
            decision = self.policy.decide(signals, alarms, self.verdict(self.step))
            self.decisions.append(decision)
            if decision.action != "proceed" or decision.reason:
                self.log.append((self.step, decision.action))
            restored = carry_out(decision, self)
            if restored is not None:
                self.step = restored
            if self.halted is not None:
                break
        return self

    def actions(self) -> list[tuple[int, str]]:
        return [(step, action) for step, action in self.log if action not in ("proceed", "watch")]

    def rollback(self, at_most: int, drop_data: bool) -> int:
        assert drop_data
        self.asked.append(at_most)
        found = self.newest(at_most)
        if found is None:
            raise UserError(f"no verified checkpoint at or before step {at_most}")
        self.checkpoints = [s for s in self.checkpoints if s <= found]
        return found

    def scale_lr(self, factor: float, rewarm: int = 0) -> None:
        self.asked.append(("lr", round(factor, 6), rewarm))
        if not rewarm:
            self.lr *= factor

    def reset_moments(self, places: Sequence[str] = ()) -> None:
        self.asked.append(("reset", tuple(places)))

    def qk_clip(self, places: Sequence[str], threshold: float) -> None:
        self.asked.append(("qk", tuple(places), threshold))

    def raise_precision(self, places: Sequence[str]) -> None:
        self.asked.append(("fp32", tuple(places)))

    def drop_data(self, first: int, last: int) -> None:
        raise AssertionError("nobody asks for this")

    def halt(self, reason: str) -> None:
        self.halted = reason


def steady(step: int, trainer: Trainer) -> float:
    return LEVEL


def spike(start: int, height: float = 0.4, rise: int = 10, fall: int = 40) -> Callable[[int, Trainer], float]:
    """A spike as real runs have them: up in some ten steps, back in some tens."""

    def loss(step: int, trainer: Trainer) -> float:
        t = step - start
        if t < 0:
            return LEVEL
        return LEVEL * (1 + height * (t + 1) / rise if t < rise else 1 + height * math.exp(-(t - rise) / fall * 3))

    return loss


def nan_at(*steps: int) -> Callable[[int, Trainer], float]:
    return lambda step, trainer: math.nan if trainer.shown in steps else LEVEL


def test_a_healthy_run_is_left_alone() -> None:
    assert Trainer(steady).run(200).log == []


def test_a_spike_that_recovers_is_watched_and_nothing_else() -> None:
    trainer = Trainer(spike(50), checkpoints=[0, 25, 40]).run(200)
    assert trainer.actions() == []
    assert trainer.log[0] == (51, "watch")
    assert (
        trainer.log[-1][1] == "proceed" and "nothing had to be done" in trainer.decisions[trainer.log[-1][0] - 1].reason
    )


def test_one_odd_step_is_left_alone() -> None:
    trainer = Trainer(lambda step, t: 4.0 if step == 50 else LEVEL).run(120)
    assert trainer.log[0] == (50, "watch")
    assert [step for step, _ in trainer.log] == [50, 52]
    assert trainer.policy.state_dict()["episode"] is None


def test_coming_back_from_a_dip_is_no_damage() -> None:
    def dip(step: int, trainer: Trainer) -> float:
        return 0.7 * LEVEL if 300 <= step < 320 else LEVEL

    def back(step: int) -> list[Alarm]:  # the detector has learned the dip
        return [alarm(step, "fast_spike", expected=0.7 * LEVEL)] if 320 <= step < 360 else []

    assert Trainer(dip, [0, 250], extra_alarms=back).run(600).actions() == []


def test_damage_that_stays_is_rolled_back_after_the_wait() -> None:
    def stays(step: int, trainer: Trainer) -> float:
        return LEVEL * 1.06 if step >= 50 and trainer.shown < 200 else LEVEL

    trainer = Trainer(stays, checkpoints=[0, 25, 49]).run(240)
    assert trainer.actions() == [(150, "rollback")]
    assert "+6.0% against its level 3 after 100 steps" in trainer.decisions[149].reason


def test_the_wait_is_cut_short_when_the_loss_runs_away() -> None:
    trainer = Trainer(
        lambda step, t: LEVEL * (1 + 0.02 * (step - 49)) if step >= 50 and t.shown < 120 else LEVEL, checkpoints=[0, 40]
    ).run(200)
    (step, action), *rest = trainer.actions()
    assert action == "rollback" and 85 <= step <= 100 and rest == []


@pytest.mark.parametrize("kind", ["slow_divergence", "chaotic"])
def test_what_looks_hopeless_is_watched_for_a_while_all_the_same(kind: str) -> None:
    def hopeless(step: int) -> list[Alarm]:
        return [alarm(step, kind)] if 60 <= step < 200 else []

    stays = Trainer(lambda s, t: LEVEL * 1.1 if s >= 50 and t.shown < 92 else LEVEL, [0, 40], extra_alarms=hopeless)
    assert stays.run(91).actions() == [(90, "rollback")]
    assert Trainer(spike(50), [0, 40], extra_alarms=lambda s: hopeless(s) if s < 90 else []).run(200).actions() == []


def test_waiting_goes_on_while_the_loss_comes_back_sooner_than_a_rollback_would_pay() -> None:
    slow = spike(200, height=0.5, rise=10, fall=300)
    assert Trainer(slow, checkpoints=[0]).run(600).actions() == []
    slower = spike(200, height=0.5, rise=10, fall=450)
    near = Trainer(lambda step, t: slower(step, t) if t.shown <= 320 else LEVEL, checkpoints=[0, 190]).run(500)
    assert [action for _, action in near.actions()] == ["rollback"]


def test_an_action_that_does_not_help_is_not_repeated() -> None:
    trainer = Trainer(lambda step, t: LEVEL * 1.5 if step >= 50 else LEVEL, checkpoints=[]).run(800)
    assert [action for _, action in trainer.actions()] == ["reset_moments", "lower_lr"]
    assert any("reset moments did not help" in d.reason for d in trainer.decisions)
    assert "nothing is left to try" in trainer.decisions[-1].reason or any(
        "nothing is left to try" in d.reason for d in trainer.decisions
    )
    assert trainer.halted is None


def test_an_action_that_helped_is_said_to_have_helped() -> None:
    def mended(step: int, trainer: Trainer) -> float:
        return LEVEL if step < 50 or ("reset", ()) in trainer.asked else LEVEL * 1.5

    trainer = Trainer(mended).run(300)
    assert [action for _, action in trainer.actions()] == ["reset_moments"]
    assert any("the loss is back" in d.reason and "after reset moments" in d.reason for d in trainer.decisions)


def test_recurrence_after_a_rollback_goes_further_back_with_half_the_rate_and_then_halts() -> None:
    def always(step: int, trainer: Trainer) -> float:
        return LEVEL * 2 if step >= 60 else LEVEL

    trainer = Trainer(always, checkpoints=[0, 20, 40, 55]).run(600)
    rollbacks = [d for d in trainer.decisions if isinstance(d, Rollback)]
    assert [(d.at_most, d.lr_factor) for d in rollbacks] == [(59, 1.0), (54, 0.5)]
    assert trainer.halted is not None
    assert "went back to step 55 and then 40" in trainer.halted and "it came back each time" in trainer.halted


def test_a_rollback_that_helped_is_said_to_have_helped() -> None:
    trainer = Trainer(lambda step, t: LEVEL * 1.5 if 60 <= t.shown <= 100 else LEVEL, checkpoints=[0, 50]).run(400)
    assert [action for _, action in trainer.actions()] == ["rollback"]
    assert any("the rollback to step 50 helped" in d.reason for d in trainer.decisions)
    assert trainer.policy.state_dict()["ledger"]["tried"] == []


def test_an_odd_gradient_with_an_odd_loss_is_skipped_twice_and_then_clipped() -> None:
    def odd(step: int) -> list[Alarm]:
        return [alarm(step, "grad_spike", "note")] if step >= 50 else []

    trainer = Trainer(lambda step, t: 4.0 if step >= 50 else LEVEL, extra_alarms=odd).run(54)
    assert [action for _, action in trainer.log] == ["skip", "skip", "clip", "clip", "clip"]
    clip = trainer.decisions[-1]
    assert isinstance(clip, Clip) and clip.max_norm == 1.0


def test_an_odd_gradient_alone_is_no_matter() -> None:
    trainer = Trainer(steady, extra_alarms=lambda step: [alarm(step, "grad_spike", "note")]).run(20)
    assert {type(d) for d in trainer.decisions} == {Proceed}


@pytest.mark.parametrize(("weights", "action"), [("sound", "skip"), ("damaged", "clip")])
def test_the_probe_decides_between_the_batch_and_the_weights(weights: str, action: str) -> None:
    verdict = Verdict("data" if weights == "sound" else "optimizer", "measured", ("x",), weights=weights)  # type: ignore[arg-type]
    trainer = Trainer(
        lambda step, t: 6.0 if step >= 50 else LEVEL,
        extra_alarms=lambda step: [alarm(step, "grad_spike", "note")] if step >= 50 else [],
        verdict=lambda step: verdict if step >= 50 else None,
    ).run(60)
    assert {a for _, a in trainer.log} == {action}


def test_sound_weights_and_odd_batches_in_a_row_are_left_out_from_the_second_on() -> None:
    sound = Verdict("data", "measured", ("x",), weights="sound")
    trainer = Trainer(lambda step, t: 6.0 if 50 <= step < 60 else LEVEL, verdict=lambda step: sound).run(80)
    assert trainer.log[0] == (50, "watch")
    assert trainer.actions() == [(step, "skip") for step in range(51, 60)]
    assert all(d.again for d in trainer.decisions if isinstance(d, Skip)), "only the batches are to blame"


def test_a_rate_that_replaces_the_weights_is_lowered() -> None:
    def large(step: int) -> list[Alarm]:
        return [alarm(step, "large_updates", value=0.1, expected=0.02)] if step == 9 else []

    trainer = Trainer(steady, extra_alarms=large).run(20)
    assert trainer.actions() == [(9, "lower_lr")] and trainer.lr == pytest.approx(2e-4)
    young = Trainer(steady, extra_alarms=large, checkpoints=[0]).run(9)
    assert young.actions() == [(9, "rollback")] and young.step == 0 and young.lr == pytest.approx(2e-4)


def test_a_loss_that_follows_the_rate_gets_its_old_rate_back() -> None:
    def jump(step: int) -> list[Alarm]:
        return [alarm(step, "lr_jump", "warning", value=4e-3, expected=1e-3)] if step == 50 else []

    def build(checkpoints: list[int]) -> Trainer:
        trainer = Trainer(
            lambda step, t: LEVEL * 1.3 if t.shown == 52 else LEVEL,
            checkpoints=checkpoints,
            extra_alarms=jump,
            verdict=lambda step: Verdict("schedule", "likely", ("the rate",)) if step == 52 else None,
        )
        trainer.run(49).lr = 4e-3
        return trainer.run(20)

    back = next(d for d in build([0, 45]).decisions if isinstance(d, Rollback))
    assert back.lr_factor == pytest.approx(1 / 4)
    lower = next(d for d in build([]).decisions if isinstance(d, LowerLr))
    assert lower.factor == pytest.approx(1 / 4)


def wild(length: int, times: float = 30.0, seen: float = 1e-3) -> Trainer:
    """A run whose schedule multiplies its rate by ``times`` from step 50 on, for ``length`` steps."""
    trainer = Trainer(
        steady,
        extra_alarms=lambda step: (
            [alarm(step, "lr_jump", "warning", value=trainer.lr, expected=trainer.lr / times)] if step == 50 else []
        ),
    )
    trainer.run(1).lr = seen
    trainer.run(24).lr = 1e-3
    trainer.run(24).lr *= times
    trainer.run(length).lr /= times
    return trainer.run(60)


def test_a_wild_rate_is_not_used_and_a_passing_one_needs_nothing_else() -> None:
    trainer = wild(3)
    assert [a for _, a in trainer.actions()] == ["skip"] * 3
    assert trainer.lr == pytest.approx(1e-3)


def test_a_wild_rate_that_stays_is_cut_back_and_the_cut_ends_with_it() -> None:
    trainer = wild(20)
    assert [a for _, a in trainer.actions()] == ["skip"] * 5 + ["lower_lr", "lower_lr"]
    assert trainer.lr == pytest.approx(1e-3)
    assert "taken back" in trainer.decisions[69].reason


def test_a_rate_that_was_used_before_is_a_restart_and_not_wild() -> None:
    assert wild(20, seen=2e-2).actions() == []


def test_a_loss_raised_by_a_restart_of_the_schedule_is_left_alone() -> None:
    def restart(step: int) -> list[Alarm]:
        return [alarm(step, "lr_jump", "note", value=1e-3, expected=1e-5)] if step == 50 else []

    trainer = Trainer(lambda s, t: LEVEL * 1.2 if s >= 52 else LEVEL, [0, 45], extra_alarms=restart).run(400)
    assert trainer.actions() == []


def test_a_new_rate_right_after_a_resume_is_wanted() -> None:
    policy = Policy(PolicyConfig())
    policy.resumed(49)
    jump = alarm(50, "lr_jump", "warning", value=3e-2, expected=1e-3)
    assert policy.decide(Signals(50, LEVEL, 1.0, 3e-2, 0), [jump]).action == "proceed"


def test_runaway_logits_are_clipped_and_a_clip_that_does_not_help_is_followed_by_a_rollback() -> None:
    def logits(values: dict[int, float]) -> Callable[[int], list[Alarm]]:
        return lambda step: (
            [alarm(step, "logit_growth", value=values[step], expected=20.0, place="block.1")] if step in values else []
        )

    helped = Trainer(steady, extra_alarms=logits({50: 120.0, 70: 90.0}), checkpoints=[0]).run(100)
    assert [type(d) for d in helped.decisions if d.action != "proceed"] == [QkClip, QkClip]
    assert helped.asked == [("qk", ("block.1",), 40.0)] * 2
    growing = {50 + 10 * i: 120.0 + i for i in range(6)}
    useless = Trainer(steady, extra_alarms=logits(growing), checkpoints=[0]).run(105)
    assert [a for _, a in useless.actions()] == ["qk_clip"] * 5 + ["rollback"]
    assert "did not help" in useless.decisions[99].reason
    alone = Trainer(steady, extra_alarms=logits({50: 120.0, 60: 150.0}), can=frozenset()).run(100)
    assert [a for _, a in alone.log] == ["watch", "proceed"]


def test_damaged_weights_are_restored() -> None:
    def jumps(step: int) -> list[Alarm]:
        return [alarm(step, "weight_jump", value=0.4, expected=0.1, place="block.0")] if step in (57, 58) else []

    trainer = Trainer(steady, extra_alarms=jumps, checkpoints=[0, 40, 50]).run(58)
    assert trainer.actions()[0] == (57, "rollback") and trainer.asked[0] == 46


def test_a_small_silent_change_of_weights_is_watched_and_the_second_is_undone() -> None:
    def jumps(step: int) -> list[Alarm]:
        return [alarm(step, "weight_jump", value=0.11, expected=0.1, place="block.0")] if step in (50, 60) else []

    trainer = Trainer(steady, extra_alarms=jumps, checkpoints=[0, 40]).run(60)
    assert [entry for entry in trainer.log if entry[1] != "proceed"] == [(50, "watch"), (60, "rollback")]
    lost = Trainer(lambda s, t: LEVEL * 1.4 if t.shown == 50 else LEVEL, extra_alarms=jumps, checkpoints=[0, 30]).run(
        50
    )
    assert lost.actions() == [(50, "rollback")]


def test_batches_as_odd_as_the_one_before_are_left_out_also_where_nothing_is_flagged() -> None:
    sound = Verdict("data", "measured", ("x",), weights="sound")

    trainer = Trainer(
        lambda step, t: 3.14 if 50 <= t.shown < 60 else LEVEL,
        extra_alarms=lambda s: [alarm(s, "fast_spike", value=3.14)] if s in (50, 51) else [],
        verdict=lambda step: sound,
    ).run(80)
    assert [a for _, a in trainer.actions()] == ["skip"] * 9


@pytest.mark.parametrize("lost", [False, True])
def test_logits_that_were_scaled_up_are_clipped_unless_the_loss_is_lost(lost: bool) -> None:
    def both(step: int) -> list[Alarm]:
        growth = alarm(step, "logit_growth", value=120.0, expected=20.0, place="block.1")
        return [growth, alarm(step, "weight_jump", value=0.4, expected=0.1, place="block.1")] if step == 50 else []

    trainer = Trainer(
        lambda step, t: LEVEL * 1.4 if lost and t.shown == 50 else LEVEL, extra_alarms=both, checkpoints=[0, 30]
    ).run(60)
    assert [a for _, a in trainer.actions()] == (["rollback"] if lost else ["qk_clip"])


def test_a_stale_moment_is_reset_where_it_is() -> None:
    stale = lambda step: [alarm(step, "stale_moment", place="block.2")] if step in (50, 51, 52) else []  # noqa: E731
    trainer = Trainer(steady, extra_alarms=stale).run(60)
    assert trainer.asked == [("reset", ("block.2",))]


def test_repeated_batches_are_not_trained_on_as_long_as_the_budget_lasts() -> None:
    again = lambda step: [alarm(step, "repeated_data")] if step >= 50 else []  # noqa: E731
    trainer = Trainer(steady, extra_alarms=again, config=PolicyConfig(max_skips=3)).run(55)
    assert [a for _, a in trainer.log] == ["skip"] * 3 + ["watch"] * 3


def test_one_nan_is_skipped_and_the_end_is_said() -> None:
    trainer = Trainer(nan_at(50)).run(60)
    assert trainer.log == [(50, "skip"), (51, "proceed")]
    assert trainer.decisions[50].reason == "over after 1 non-finite step"


def test_lasting_nan_goes_back_twice_and_halts() -> None:
    def nan(step: int, trainer: Trainer) -> float:
        return math.nan if step >= 30 else LEVEL

    trainer = Trainer(nan, checkpoints=[0, 10, 20]).run(200)
    assert [(d.at_most, d.lr_factor) for d in trainer.decisions if isinstance(d, Rollback)] == [(29, 1.0), (19, 0.5)]
    assert trainer.halted is not None and "went back to step 20 and then 10" in trainer.halted
    assert "if it stays, look for a fault" in trainer.halted
    nowhere = Trainer(nan).run(100)
    assert nowhere.halted is not None and nowhere.step == 35
    assert "skipped 5 steps; there is no checkpoint before it" in nowhere.halted


def test_a_host_that_cannot_go_back_is_believed() -> None:
    trainer = Trainer(lambda step, t: math.nan if step >= 30 else LEVEL, ask_first=False).run(60)
    assert trainer.halted is not None and "no verified checkpoint" in trainer.halted


def test_budgets() -> None:
    often = Trainer(nan_at(*range(10, 100, 4)), config=PolicyConfig(max_skips=5)).run(100)
    assert often.halted is not None and "5 steps were skipped within 1000" in often.halted
    spent = PolicyConfig(max_rollbacks=1, cool_down=1)
    twice = Trainer(nan_at(*range(30, 36), *range(80, 200)), checkpoints=[0, 20], config=spent).run(200)
    assert twice.halted is not None and "no rollback is left in the budget" in twice.halted
    never = Trainer(nan_at(*range(30, 99)), checkpoints=[0], config=PolicyConfig(max_rollbacks=0)).run(99)
    assert [a for _, a in never.log] == ["skip"] * 5 + ["halt"]


def test_an_overflow_under_a_loss_scale_is_the_scalers_business() -> None:
    signals = Signals(5, 3.0, math.inf, 1e-3, 0, {"loss_scale": 65536.0})
    policy = Policy(PolicyConfig(skip_patience=0))
    for _ in range(20):
        assert isinstance(policy.decide(signals, [alarm(5, "nonfinite")]), Skip)
    at_one = Signals(6, 3.0, math.inf, 1e-3, 0, {"loss_scale": 1.0})
    assert not isinstance(policy.decide(at_one, [alarm(6, "nonfinite")]), Skip)


def test_a_gradient_that_overflows_at_one_place_raises_its_precision_once() -> None:
    policy = Policy(PolicyConfig(skip_patience=2), lambda at_most: 0)
    verdict = Verdict("precision", "likely", ("x",), place="block.3")
    actions = [
        policy.decide(Signals(step, 3.0, math.inf, 1e-3, 0, {"loss_scale": 1.0}), [alarm(step, "nonfinite")], verdict)
        for step in range(10, 14)
    ]
    assert [type(a) for a in actions] == [Skip, Skip, RaisePrecision, Rollback]
    assert isinstance(actions[2], RaisePrecision) and actions[2].places == ("block.3",)


@pytest.mark.parametrize("cut", [49, 51, 60, 120, 151, 160])
def test_the_state_is_exact(cut: int) -> None:
    def stays(step: int, trainer: Trainer) -> float:
        return LEVEL * 1.3 if step >= 50 and trainer.shown < 260 else LEVEL

    def odd(step: int) -> list[Alarm]:
        return [alarm(step, "grad_spike", "note")] if step % 7 == 0 else []

    straight = Trainer(stays, checkpoints=[0, 30], extra_alarms=odd).run(400)
    first = Trainer(stays, checkpoints=[0, 30], extra_alarms=odd).run(cut)
    saved = json.loads(json.dumps(first.policy.state_dict()))
    first.policy = Policy(PolicyConfig(), first.newest)
    first.policy.load_state_dict(saved)
    assert first.policy.state_dict() == saved
    assert first.run(400 - cut).decisions == straight.decisions


def test_observing_gives_one_advice_for_a_trouble() -> None:
    policy = Policy(PolicyConfig(), lambda at_most: 0, observing=True)
    actions = []
    for step in range(1, 500):
        loss = LEVEL * 1.4 if step >= 50 else LEVEL
        alarms = [alarm(step, "fast_spike", value=loss)] if step >= 50 else []
        actions.append(policy.decide(Signals(step, loss, 1.0, 1e-3, 0), alarms).action)
    assert [a for a in actions if a not in ("proceed", "watch")] == ["rollback"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip_patience", -1),
        ("cool_down", -1),
        ("max_rollbacks", -1),
        ("max_skips", 0),
        ("budget_steps", 0),
        ("watch_steps", 0),
        ("check_steps", 0),
        ("lasting", 0.0),
        ("lasting", math.nan),
        ("qk_threshold", math.inf),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"guard\.{name} is"):
        PolicyConfig(**{name: value})  # type: ignore[arg-type]


def test_every_cause_has_an_order_of_actions() -> None:
    from typing import get_args

    from poise.core.types import Cause

    assert set(ORDER) == set(get_args(Cause))
    assert {name for names in ORDER.values() for name in names} <= ABILITIES


def test_abilities_of_a_host() -> None:
    trainer = Trainer(steady)
    assert abilities(trainer) == ABILITIES

    class Plain:
        cannot = ("rollback",)

    assert abilities(Plain()) == {"lower_lr", "reset_moments"}  # type: ignore[arg-type]


def test_watching_is_taking_the_step() -> None:
    assert isinstance(Watch(), Proceed) and not isinstance(Halt(), Proceed)
    assert isinstance(ResetMoments(), Decision)


def test_an_episode_knows_where_its_loss_is_going() -> None:
    episode = Episode(onset=10, level=2.0)
    for i in range(20):
        episode.see(10 + i, 3.0 - 0.02 * i, flagged=True)
    assert episode.falling() and episode.per_step == pytest.approx(-0.02)
    assert episode.steps_to_level() == pytest.approx((episode.smooth - 2.0) / 0.02)
    assert Episode.of(json.loads(json.dumps(episode.state()))) == episode
    episode.see(31, math.nan, flagged=True)
    assert len(episode.losses) == 20
