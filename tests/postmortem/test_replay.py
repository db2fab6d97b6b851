"""The replay is the guard itself, shown the past only: every finding is what a run would have got at that step."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from poise.core.errors import UserError
from poise.core.types import Alarm, Decision, Rollback, Signals, Watch
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard, build
from poise.postmortem import Log, read_log, replay_log
from poise.postmortem import replay as module
from poise.postmortem.replay import Finding, signals_of

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"


def healthy(n: int = 400, seed: int = 0) -> np.ndarray:
    """A loss that falls from 10 towards 3 with 1 % noise."""
    steps = np.arange(1, n + 1)
    noise = np.random.default_rng(seed).normal(0.0, 0.01, n)
    return (3.0 + 7.0 * np.exp(-steps / 80)) * np.exp(noise)


def make(loss: np.ndarray, every: int = 1, **series: np.ndarray) -> Log:
    steps = np.arange(1, len(loss) + 1, dtype=np.int64) * every
    columns = {"loss": (steps, np.asarray(loss, dtype=np.float64))}
    columns |= {name: (steps[: len(values)], values) for name, values in series.items()}
    return Log(Path("run.csv"), "run", "table", columns, ())


def spiked() -> np.ndarray:
    loss = healthy()
    loss[250:290] *= 1 + 0.6 * np.exp(-np.arange(40) / 10)
    return loss


def alarms(found: list[Finding]) -> list[tuple[int, str]]:
    return [(f.step, f.kind) for f in found if f.severity != "note"]


def test_a_spike_is_found_at_its_first_step_and_nothing_before() -> None:
    found = list(replay_log(make(spiked())))
    assert alarms(found)[0] == (251, "fast_spike")
    assert found[0].trace == "run" and found[0].value == pytest.approx(spiked()[250])
    assert 2.5 < found[0].expected < 4.0


@pytest.mark.parametrize("grad_norm", [False, True])
def test_healthy_logs_raise_nothing(grad_norm: bool) -> None:
    for seed in range(5):
        norms = {"grad_norm": np.exp(np.random.default_rng(seed).normal(0, 0.2, 400))} if grad_norm else {}
        found = list(replay_log(make(healthy(seed=seed), **norms)))
        assert not alarms(found), (seed, found[0])


def test_nan_without_a_gradient_norm_is_found_at_the_first_step() -> None:
    found = list(replay_log(make(np.full(20, math.nan))))
    assert [(f.step, f.kind, f.severity) for f in found[:2]] == [
        (1, "nonfinite", "critical"),
        (2, "nonfinite", "critical"),
    ]
    assert {f.signal for f in found} == {"loss"}
    assert found[0].action != "proceed"


def test_only_the_past_is_seen() -> None:
    """Cutting the log off anywhere changes nothing about what was found before."""
    whole = list(replay_log(make(spiked())))
    for end in (200, 251, 260, 300):
        assert [f for f in whole if f.step <= end] == list(replay_log(make(spiked()[:end])))


def test_it_is_the_guard_of_a_run_that_only_observes() -> None:
    """Alarm for alarm what ``build`` and ``decide`` give on the same signals."""
    log = make(spiked(), grad_norm=np.ones(400), lr=np.full(400, 1e-3))
    config = GuardConfig(mode="observe")
    guard = build(config)
    expected = [
        (signals.step, alarm.kind, alarm.message)
        for signals in signals_of(log)
        for alarm in guard.decide(signals).alarms
    ]
    ours = [(f.step, f.kind, f.message) for f in replay_log(log, config) if f.detector != "policy"]
    assert ours == expected and expected


def test_the_mode_is_always_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[GuardConfig] = []

    def build_and_remember(config: GuardConfig) -> Guard:
        built.append(config)
        return build(config)

    monkeypatch.setattr(module, "build", build_and_remember)
    for mode in ("act", "halt", "observe"):
        list(replay_log(make(spiked()), GuardConfig(mode=mode, skip_patience=7)))
    assert built == [GuardConfig(mode="observe", skip_patience=7)] * 3


def test_settings_reach_the_guard() -> None:
    assert not list(replay_log(make(spiked()), GuardConfig(enabled=False)))


def test_missing_and_sparse_readings() -> None:
    steps = np.arange(1, 21, dtype=np.int64)
    series = {
        "loss": (steps, np.full(20, 2.0)),
        "lr": (np.array([5, 10]), np.array([0.1, 0.2])),
        "grad_norm": (np.array([10, 11]), np.array([3.0, math.nan])),
        "tokens": (np.array([1, 12]), np.array([64.0, math.nan])),
        "residual_rms@block.0": (np.array([10, 99]), np.array([7.0, 8.0])),
    }
    shown = list(signals_of(Log(Path("x"), "x", "table", series, ())))
    assert [s.lr for s in shown] == [0.0] * 4 + [0.1] * 5 + [0.2] * 11
    assert shown[9].grad_norm == 3.0 and math.isnan(shown[10].grad_norm)
    assert {s.grad_norm for s in [*shown[:9], *shown[11:]]} == {0.0}
    assert {s.tokens for s in shown} == {64}
    assert shown[9].extra == {"residual_rms@block.0": 7.0} and not any(s.extra for s in [*shown[:9], *shown[10:]])


@pytest.mark.parametrize("absent", ["grad_norm", "lr"])
def test_what_was_not_logged_is_not_judged(absent: str) -> None:
    """No detector speaks of a reading that the log does not have, spike or not."""
    there = {"grad_norm": np.ones(400), "lr": np.full(400, 1e-3)}
    del there[absent]
    found = list(replay_log(make(spiked(), **there)))
    assert found and not [f for f in found if f.signal.startswith(absent)]


class _Scripted:
    """A guard that gives the decisions of a list, and warns as a real one does."""

    def __init__(self, decisions: list[Decision]) -> None:
        self.decisions = decisions

    def decide(self, signals: Signals) -> Decision:
        logging.getLogger("poise").warning("step %d", signals.step)
        return self.decisions[signals.step - 1]


def test_would_be_actions_and_late_ones(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What an observing guard would do is the action; one that comes without an alarm is not lost."""
    alarm = Alarm("fast_spike", "critical", 1, "loss", 4.0, 3.0, "fast_spike", "loss is up")
    note = dataclasses.replace(alarm, severity="note", kind="grad_spike", step=0)
    back = Rollback(at_most=1, reason="still up")
    script: list[Decision] = [
        Watch(alarms=(alarm, note)),
        Watch(),
        Watch(would=back, reason="observing"),
        Watch(would=dataclasses.replace(back, alarms=(alarm,)), alarms=(alarm,)),
    ]
    monkeypatch.setattr(module, "build", lambda config: _Scripted(script))
    found = list(replay_log(make(np.array([4.0, 5.0, 6.0, 7.0]))))
    assert [(f.step, f.kind, f.action, f.detector) for f in found] == [
        (1, "fast_spike", "watch", "fast_spike"),
        (1, "grad_spike", "watch", "fast_spike"),
        (3, "fast_spike", "rollback", "policy"),
        (4, "fast_spike", "rollback", "fast_spike"),
    ]
    assert found[2].message == "still up" and found[2].value == 6.0
    assert (found[0].about, found[1].about) == (1, 0)
    assert not caplog.records  # nobody wants warnings of a run that is long over
    logging.getLogger("poise").warning("heard again")
    assert caplog.records


def test_a_log_without_a_loss_is_refused() -> None:
    log = Log(Path("x.csv"), "x", "table", {"val_loss": (np.arange(3), np.ones(3))}, ())
    with pytest.raises(UserError, match=r"'x.csv' has no loss"):
        list(replay_log(log))


@pytest.mark.skipif(not TRACES.is_dir(), reason="the labelled traces are not on this machine")
def test_labelled_traces() -> None:
    """A smoke test of the whole way; how good the rules are is measured elsewhere."""
    name = "gpt2_124m_llmc_nan_from_step1"
    found = list(replay_log(read_log(TRACES / f"{name}.csv")))
    assert (found[0].step, found[0].kind, found[0].trace) == (1, "nonfinite", name)
    name = "llama31_8b_mlperf_cisco_n8_run4"
    events = json.loads((TRACES / f"{name}.labels.json").read_text())["events"]
    found = list(replay_log(read_log(TRACES / f"{name}.csv")))
    for event in events:
        if event["kind"] == "fast_spike":
            assert any(event["start"] - 2 <= f.step <= event["end"] for f in found), event
