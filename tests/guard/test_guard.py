"""The guard: building, deciding, remembering, and the two lines in anybody's loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from poise.core import config as configs
from poise.core.errors import UserError
from poise.core.types import Alarm, Decision, Halt, Proceed, Rollback, Signals, Skip, Watch
from poise.guard.config import GuardConfig, Mode
from poise.guard.detectors.nonfinite import NonFinite
from poise.guard.guard import Guard, TrainingHalted, build
from poise.guard.ledger import PolicyConfig
from poise.guard.policy import Policy


def signals(step: int, loss: float = 3.0, grad_norm: float = 1.0) -> Signals:
    return Signals(step=step, loss=loss, grad_norm=grad_norm, lr=1e-3, tokens=step)


def calm(guard: Guard, steps: int) -> None:
    for step in range(1, steps + 1):
        assert guard.decide(signals(step, 3.0 + 0.01 * (step % 3))) == Proceed()


def test_importing_the_guard_imports_no_torch() -> None:
    code = "import sys; import poise.guard.guard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_decisions_carry_their_alarms_and_serialise() -> None:
    guard = build(GuardConfig())
    calm(guard, 40)
    decision = guard.decide(signals(41, 6.0, 50.0))
    assert isinstance(decision, Skip)
    assert [(alarm.kind, alarm.severity) for alarm in decision.alarms] == [
        ("fast_spike", "critical"),
        ("grad_spike", "note"),
    ]
    assert json.loads(json.dumps(dataclasses.asdict(decision)))["alarms"][0]["value"] == 6.0
    assert isinstance(guard.decide(signals(42, math.nan, 1.0)), Skip)
    note = guard.decide(signals(43, 3.0, 50.0))
    assert isinstance(note, Proceed) and [alarm.kind for alarm in note.alarms] == ["grad_spike"]


def test_disabled_guard_lets_everything_through() -> None:
    guard = build(GuardConfig(enabled=False))
    for step in range(1, 60):
        assert guard.decide(signals(step, math.nan, math.nan)) == Proceed()


def test_observer_sees_every_decision() -> None:
    seen: list[tuple[int, str]] = []
    guard = build(GuardConfig(), observer=lambda s, decision: seen.append((s.step, decision.action)))
    guard.decide(signals(1))
    guard.decide(signals(2, math.inf))
    assert seen == [(1, "proceed"), (2, "skip")]


def test_state_round_trip_and_keep_policy() -> None:
    """Restored, the guard decides as it would have; after a rollback only its windows go back."""
    guard = build(GuardConfig(skip_patience=1))
    calm(guard, 40)
    saved = json.loads(json.dumps(guard.state_dict()))
    straight = [guard.decide(signals(step, math.nan)) for step in (41, 42)]
    assert [type(decision) for decision in straight] == [Skip, Rollback]

    again = build(GuardConfig(skip_patience=1))
    again.load_state_dict(saved)
    assert [repr(again.decide(signals(step, math.nan))) for step in (41, 42)] == list(map(repr, straight))

    guard.load_state_dict(saved, keep_policy=True)
    assert guard.state_dict()["detectors"] == saved["detectors"]
    assert guard.state_dict()["policy"] != saved["policy"]
    further = [guard.decide(signals(step, math.nan)) for step in (41, 42)][1]
    assert isinstance(further, Rollback) and further.at_most == 39  # not to step 40 again

    with pytest.raises(UserError, match="format 99"):
        guard.load_state_dict({**saved, "format": 99})


def test_rule_survives_a_detector_that_is_new_since_the_checkpoint() -> None:
    guard = build(GuardConfig())
    calm(guard, 30)
    saved = guard.state_dict()
    del saved["detectors"]["grad_spike"]
    build(GuardConfig()).load_state_dict(saved)


def test_two_detectors_of_one_name_are_refused() -> None:
    from poise.guard.detectors.nonfinite import NonFinite

    with pytest.raises(UserError, match="same name"):
        Guard([NonFinite(), NonFinite()], Policy(PolicyConfig()))


def test_config() -> None:
    config = configs.build(GuardConfig, {"alarms_per_10k": 2, "skip_patience": 2, "mode": "observe"})
    assert (config.alarms_per_10k, config.policy.skip_patience) == (2.0, 2)
    assert configs.build(GuardConfig, configs.to_dict(config)) == config
    for name, value in {"mode": "atc", "alarms_per_10k": 0.0, "every": -1, "skip_patience": -1}.items():
        with pytest.raises(UserError, match=rf"guard\.{name} is"):
            GuardConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "kind"), [("act", Skip), ("observe", Watch), ("halt", Halt)])
def test_modes(mode: Mode, kind: type[Decision]) -> None:
    guard = build(GuardConfig(mode=mode))
    guard.decide(signals(1))
    decision = guard.decide(signals(2, math.nan))
    assert type(decision) is kind
    if isinstance(decision, Watch):
        assert isinstance(decision.would, Skip) and "observing; would skip" in decision.reason


def test_a_detector_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(NonFinite):
        name = "broken"

        def update(self, signals: Signals) -> Alarm | None:
            raise IndexError("no such point")

    guard = Guard([Broken(), NonFinite()], Policy(PolicyConfig()))
    with caplog.at_level(logging.ERROR, "poise"):
        assert isinstance(guard.decide(signals(1)), Proceed)
        assert isinstance(guard.decide(signals(2, math.nan)), Skip)
    assert caplog.text.count("detector broken failed") == 1


def test_observing_never_acts() -> None:
    guard = build(GuardConfig(mode="observe"), lambda at_most: 0)
    for step in range(1, 300):
        loss = math.nan if step in (50, 51) else 3.0 + 0.01 * (step % 3) + (2.0 if step > 100 else 0.0)
        assert isinstance(guard.decide(signals(step, loss)), Proceed)


def test_what_is_measured_on_alarm_names_the_cause() -> None:
    asked: list[int] = []

    def examine(s: Signals) -> dict[str, float]:
        asked.append(s.step)
        return {"probe_expected": 3.0, "probe_loss": 3.01, "sequence_loss_max": 9.0, "sequence_loss_median": 8.0}

    guard = build(GuardConfig(), examine=examine)
    for step in range(1, 60):
        guard.decide(signals(step, 3.0 + 0.01 * (step % 3)))
    decision = guard.decide(signals(60, 8.0, 50.0))
    assert asked == [60]
    assert decision.verdict is not None and decision.verdict.weights == "sound"
    assert (decision.verdict.cause, decision.verdict.certainty) == ("data", "measured")
    assert isinstance(decision, Skip) and "the weights are sound" in decision.reason


def test_tokens_agree_as_long_as_decisions_do() -> None:
    one, other = build(GuardConfig()), build(GuardConfig())
    for step in range(1, 10):
        one.decide(signals(step))
        other.decide(signals(step))
    assert one.token == other.token
    one.decide(signals(10))
    other.decide(signals(10, math.nan))
    assert one.token != other.token < 2**24


class Loop:
    """A plain training loop with the guard's two lines, and two ways to spoil a step before it looks."""

    def __init__(self, config: GuardConfig | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.guard = Guard.for_run(self.net, self.optimizer, config)
        self.step = 0

    def once(self, nan_gradient: bool = False, factor: float = 1.0) -> bool:
        self.step += 1
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(self.step))
        loss = (self.net(x) - 5).square().mean() * factor
        loss.backward()
        if nan_gradient:
            self.net.weight.grad[0, 1] = math.nan
        allowed = self.guard.allows(loss)
        if allowed:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return allowed

    def weights(self) -> list[torch.Tensor]:
        moments = [value.clone() for state in self.optimizer.state.values() for value in state.values()]
        return [p.detach().clone() for p in self.net.parameters()] + moments


def test_plain_loop_survives_a_nan_gradient(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    assert all(loop.once() for _ in range(10))
    before = loop.weights()
    with caplog.at_level(logging.WARNING, "poise"):
        assert not loop.once(nan_gradient=True)
    assert "grad_norm is nan" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, loop.weights(), strict=True))
    assert all(loop.once() for _ in range(10))
    assert all(torch.isfinite(p).all() for p in loop.weights())


def test_plain_loop_halts_when_nan_stays() -> None:
    loop = Loop()
    loop.once()
    for _ in range(5):
        assert not loop.once(nan_gradient=True)
    with pytest.raises(TrainingHalted, match=r"halted at step 7.*skipped 5 steps.*Mend: "):
        loop.once(nan_gradient=True)


def test_plain_loop_lets_a_lasting_spike_through_clipped_and_loudly(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    assert all(loop.once() for _ in range(40))
    with caplog.at_level(logging.WARNING, "poise"):
        allowed = [loop.once(factor=10.0) for _ in range(6)]
    assert allowed == [False, False, True, True, True, True]
    assert "clipped to the usual" in caplog.text
    assert loop.once()


def test_plain_loop_with_a_host_goes_back() -> None:
    loop = Loop(GuardConfig(skip_patience=1))

    class Host:
        def __init__(self) -> None:
            self.went_back: list[int] = []

        def rollback(self, at_most: int, drop_data: bool) -> int:
            self.went_back.append(at_most)
            return at_most

    host = Host()
    loop.guard = Guard.for_run(loop.net, loop.optimizer, GuardConfig(skip_patience=1), host)  # type: ignore[arg-type]
    for _ in range(10):
        loop.once()
    assert [loop.once(nan_gradient=True) for _ in range(2)] == [False, False]
    assert host.went_back == [10]
    assert loop.guard.step == 10
    resumed = Guard.for_run(loop.net, loop.optimizer)
    resumed.load_state_dict(loop.guard.state_dict())
    mine, its = loop.guard.state_dict(), resumed.state_dict()
    assert mine.pop("loop")["step"] == its.pop("loop")["step"] == 10
    assert mine == its
    assert loop.once()


def test_clip_decision_clips_in_a_plain_loop() -> None:
    from poise.core.types import Clip

    class Always(Policy):
        def decide(self, signals: Signals, alarms: object, verdict: object = None) -> Decision:
            return Clip(max_norm=0.01)

    loop = Loop()
    loop.guard._policy = Always(PolicyConfig())
    loss = loop.net(torch.ones(2, 4)).sum()
    loss.backward()
    assert loop.guard.allows(loss)
    assert float(
        torch.nn.utils.get_total_norm([p.grad for p in loop.net.parameters() if p.grad is not None])
    ) == pytest.approx(0.01, rel=1e-3)


def test_halt_without_a_host_raises_also_from_other_policies() -> None:
    class Never(Policy):
        def decide(self, signals: Signals, alarms: object, verdict: object = None) -> Decision:
            return Halt(reason="no more")

    loop = Loop()
    loop.guard._policy = Never(PolicyConfig())
    with pytest.raises(TrainingHalted, match="no more"):
        loop.once()


def test_optimizers_own_measure_is_used() -> None:
    loop = Loop()
    loop.optimizer.measure = lambda: torch.tensor(math.inf)  # type: ignore[attr-defined]
    loop.guard = Guard.for_run(loop.net, loop.optimizer)
    assert not loop.once()


def test_allows_needs_a_model() -> None:
    with pytest.raises(UserError, match="for_run"):
        build(GuardConfig()).allows(1.0)
