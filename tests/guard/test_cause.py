"""Causes: each signature gives its verdict, with evidence; an experiment beats a signature; nothing seen, unknown."""

from __future__ import annotations

import json
import math

import pytest

from poise.core.types import Alarm, Signals, Verdict
from poise.guard.cause import SEAM, WINDOW, Causes


def alarm(step: int, kind: str, severity: str = "warning", signal: str = "x", place: str = "") -> Alarm:
    return Alarm(kind, severity, step, signal, 5.0, 3.0, kind, f"{kind} at {step}", place)  # type: ignore[arg-type]


def spike(step: int) -> Alarm:
    return alarm(step, "fast_spike", "critical", "loss")


def name(*alarms: Alarm, measured: dict[str, float] | None = None, **signals: object) -> Verdict | None:
    step = alarms[-1].step
    causes = Causes()
    for at in sorted({a.step for a in alarms}):
        causes.see(at, [a for a in alarms if a.step == at])
    values = {"loss": 5.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 0, **signals}
    return causes.name(Signals(step=step, **values), measured or {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forerunner", "cause", "certainty", "place"),
    [
        (alarm(95, "repeated_data", "critical"), "software", "likely", ""),
        (alarm(98, "weight_jump", "critical", place="block.2"), "hardware", "likely", "block.2"),
        (alarm(90, "underflow"), "precision", "likely", ""),
        (alarm(90, "lr_jump"), "schedule", "likely", ""),
        (alarm(80, "logit_growth", "critical", place="block.1"), "architecture", "likely", "block.1"),
        (alarm(80, "entropy_collapse", place="block.3"), "architecture", "possible", "block.3"),
        (alarm(97, "stale_moment", "critical", place="block.0"), "optimizer", "likely", "block.0"),
        (alarm(97, "moment_lag"), "optimizer", "possible", ""),
        (alarm(97, "update_jump", place="embed"), "optimizer", "possible", "embed"),
    ],
)
def test_a_forerunner_names_the_cause(forerunner: Alarm, cause: str, certainty: str, place: str) -> None:
    verdict = name(forerunner, spike(100))
    assert verdict is not None
    assert (verdict.cause, verdict.certainty, verdict.place) == (cause, certainty, place)
    assert any(forerunner.message in sentence for sentence in verdict.evidence)


def test_without_a_forerunner_the_cause_is_unknown() -> None:
    assert name(spike(100)) == Verdict("unknown", "possible", ("fast_spike at 100", "no forerunner was seen"))


def test_scaled_queries_and_keys_are_the_layers_unless_the_loss_is_lost() -> None:
    both = [
        alarm(100, "logit_growth", "critical", place="block.1"),
        alarm(100, "weight_jump", "critical", place="block.1"),
    ]
    silent = name(*both)
    assert silent is not None and (silent.cause, silent.place) == ("architecture", "block.1")
    assert any("weight_jump" in sentence for sentence in silent.evidence)
    loud = name(*both, spike(100))
    assert loud is not None and loud.cause == "hardware"


def test_a_wild_rate_explains_what_it_did_to_the_weights() -> None:
    wild = Alarm("lr_jump", "warning", 95, "lr", 3e-2, 1e-3, "lr_jump", "the rate jumped")
    verdict = name(wild, alarm(99, "weight_jump", "critical", place="embed"), spike(100))
    assert verdict is not None and verdict.cause == "schedule"


def test_a_forerunner_too_long_ago_is_none() -> None:
    verdict = name(alarm(100 - WINDOW - 1, "lr_jump"), spike(100))
    assert verdict is not None and verdict.cause == "unknown"


def test_nothing_is_explained_where_nothing_is_wrong() -> None:
    assert name(alarm(100, "grad_spike", "note")) is None


def test_the_probe_tells_an_odd_batch_from_odd_weights() -> None:
    sound = name(spike(100), alarm(100, "lr_jump"), measured={"probe_expected": 3.0, "probe_loss": 3.1})
    assert sound is not None and (sound.cause, sound.certainty, sound.weights) == ("data", "measured", "sound")
    damaged = name(spike(100), measured={"probe_expected": 3.0, "probe_loss": 4.5})
    assert damaged is not None and (damaged.cause, damaged.weights) == ("optimizer", "damaged")
    assert "has loss 4.5 (3 when it was trained on)" in damaged.evidence[1]
    jump = name(alarm(95, "lr_jump"), spike(100), measured={"probe_expected": 3.0, "probe_loss": math.nan})
    assert jump is not None and (jump.cause, jump.weights) == ("schedule", "damaged")


def test_a_non_finite_gradient_names_its_place() -> None:
    bad = alarm(100, "nonfinite", "critical", "grad_norm")
    one = name(bad, loss=3.0, grad_norm=math.nan, extra={"nonfinite": 1.0, "nonfinite@block.1": 1.0})
    assert one is not None and (one.cause, one.certainty, one.place) == ("precision", "likely", "block.1")
    assert any("the loss itself was finite" in sentence for sentence in one.evidence)
    all_over = {"nonfinite@block.1": 3.0, "nonfinite@block.0": 3.0}
    many = name(bad, loss=math.nan, grad_norm=math.nan, extra=all_over)
    assert many is not None and (many.certainty, many.place) == ("possible", "")


def test_a_loss_that_blew_up_after_a_jump_of_the_rate_is_the_schedules() -> None:
    verdict = name(alarm(90, "lr_jump"), alarm(100, "nonfinite", "critical", "loss"), loss=math.nan)
    assert verdict is not None and verdict.cause == "schedule"


def test_chaos_blames_the_rate_but_not_for_sure() -> None:
    verdict = name(alarm(60, "chaotic", "critical", "loss"), lr=0.3)
    assert verdict is not None and (verdict.cause, verdict.certainty) == ("schedule", "possible")
    assert "0.3" in verdict.evidence[1]


def test_an_outlier_that_is_gone_is_the_datas() -> None:
    verdict = name(alarm(100, "data_outlier", "note", "loss"))
    assert verdict is not None and (verdict.cause, verdict.certainty) == ("data", "likely")


def test_a_seam_is_suspicious() -> None:
    causes = Causes()
    causes.resumed(90)
    for step, cause in ((91 + SEAM, "unknown"), (95, "software")):
        causes.see(step, [spike(step)])
        verdict = causes.name(Signals(step, 5.0, 1.0, 1e-3, 0), {})
        assert verdict is not None and verdict.cause == cause


def test_the_state_is_exact_and_going_back_forgets() -> None:
    causes = Causes()
    causes.see(90, [alarm(90, "lr_jump", place="x")])
    again = Causes()
    again.load_state_dict(json.loads(json.dumps(causes.state_dict())))
    assert again.state_dict() == causes.state_dict()
    again.see(100, [spike(100)])
    verdict = again.name(Signals(100, 5.0, 1.0, 1e-3, 0), {})
    assert verdict is not None and verdict.cause == "schedule"
    again.see(80, [spike(80)])
    verdict = again.name(Signals(80, 5.0, 1.0, 1e-3, 0), {})
    assert verdict is not None and verdict.cause == "unknown"
