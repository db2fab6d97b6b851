"""The campaign's scores are what the journals say, and a campaign goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poise.core.errors import UserError
from poise.core.journal import read, to_json
from poise.studies import campaign as campaigns
from poise.studies.campaign import FACTS, Plan, Row, plan, run_campaign, score, wilson
from poise.studies.faults import CASES, KINDS
from poise.train.recipe import load

STEPS = 66
Records = list[dict[str, Any]]


def step(n: int, loss: float = 2.0) -> dict[str, Any]:
    return {"type": "step", "step": n, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens": n}


def alarm(n: int, kind: str = "fast_spike", severity: str = "critical", place: str = "") -> dict[str, Any]:
    fields = {"signal": "loss", "value": 1.0, "expected": 0.0, "detector": kind, "message": "", "place": place}
    return {"type": "event", "step": n, "kind": kind, "severity": severity, **fields}


def injected(n: int) -> dict[str, Any]:
    return {**alarm(n, "scaled_layer", "note"), "detector": "injector", "injected": "scaled_layer"}


def decision(n: int, action: str) -> dict[str, Any]:
    return {"type": "decision", "step": n, "action": action, "reason": ""}


def verdict(n: int, cause: str, certainty: str, place: str = "") -> dict[str, Any]:
    return {"type": "verdict", "step": n, "cause": cause, "certainty": certainty, "place": place, "evidence": []}


def ending(n: int = STEPS, loss: float = 2.0, reason: str = "finished") -> Records:
    return [{"type": "eval", "step": n, "loss": loss}, {"type": "end", "step": n, "reason": reason}]


Scored = Callable[..., Row]


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    """Score a run whose journal is given; a layer was scaled in it, or nothing (``kind=None``)."""

    def go(records: Records, kind: str | None = "scaled_layer", clean: Row | None = None, **facts: Any) -> Row:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "journal.jsonl").write_text("".join(to_json(r) + "\n" for r in records), encoding="utf-8")
        usual = {"outcome": "finished", "message": "", "nonfinite_after": [], "nonfinite_at_end": False, "seconds": 1.0}
        (folder / FACTS).write_text(json.dumps({**usual, **facts}), encoding="utf-8")
        recipe = load("demo", {"train": {"steps": STEPS}})
        return score(Plan(folder, recipe, "base", CASES[kind] if kind else None), clean)

    return go


def struck(*after: dict[str, Any], at: int = 30) -> Records:
    """A run with a fault at step ``at``; ``after`` follows the onset's step record and its later steps."""
    return [*map(step, range(1, at)), injected(at), *after, *ending()]


def test_an_alarm_at_the_onset_detects(scored: Scored) -> None:
    row = scored(struck(step(30), alarm(30, "weight_jump", place="block.1.fc1"), decision(30, "skip"), step(31)))
    assert row.struck and row.detected and row.delay == 0 and row.alarms == ("weight_jump",)
    assert row.place == "block.1.fc1" and row.place_right is True
    assert row.actions == {"skip": 1} and row.skipped == 1 and row.early_alarms == 0


@pytest.mark.parametrize(("last", "detected"), [(45, True), (46, False)])
def test_it_must_come_within_fifteen_steps(last: int, detected: bool, scored: Scored) -> None:
    row = scored(struck(*map(step, range(30, last + 1)), alarm(last)))
    assert (row.detected, row.delay) == (detected, last - 30)


def test_steps_done_are_counted_not_their_numbers(scored: Scored) -> None:
    """After a rollback the numbers go back; time does not."""
    back = {"type": "rollback", "step": 40, "to": 20}
    row = scored(struck(*map(step, range(30, 41)), back, *map(step, range(21, 32)), alarm(31)))
    assert row.delay == 21 and not row.detected and row.steps_undone == 20


def test_an_alarm_before_the_onset_is_false_and_a_note_is_none(scored: Scored) -> None:
    records = struck(step(30), alarm(30, severity="note"))
    records[10:10] = [alarm(10), decision(10, "skip")]
    row = scored(records)
    assert not row.detected and row.delay is None and (row.early_alarms, row.early_actions) == (1, 1)
    assert row.actions == {}


def test_watching_is_not_acting(scored: Scored) -> None:
    row = scored(struck(step(30), alarm(30, severity="warning"), decision(30, "watch"), decision(31, "lower_lr")))
    assert row.detected and row.actions == {"lower_lr": 1}


def test_the_surest_verdict_counts(scored: Scored) -> None:
    first = [step(30), alarm(30, place="block.3"), verdict(30, "data", "possible", "block.0")]
    row = scored(
        struck(*first, step(31), verdict(31, "hardware", "measured", "block.1"), verdict(31, "data", "likely"))
    )
    assert (row.cause, row.certainty, row.place) == ("hardware", "measured", "block.1")
    assert row.cause_right is True and row.place_right is True
    row = scored(struck(*first))
    assert row.cause_right is False and row.place_right is False
    row = scored(struck(step(30), alarm(30)))
    assert (row.cause, row.cause_right, row.place_right) == ("", False, False), "nothing said is not right"


def test_a_late_verdict_is_about_something_else(scored: Scored) -> None:
    row = scored(struck(*map(step, range(30, 120)), verdict(119, "hardware", "measured", "block.1")))
    assert row.cause == ""


def test_block_1_is_not_block_10(scored: Scored) -> None:
    assert scored(struck(step(30), alarm(30, place="block.10"))).place_right is False


def test_healthy_runs(scored: Scored) -> None:
    row = scored([*map(step, range(1, STEPS + 1)), alarm(STEPS), decision(STEPS, "skip"), *ending(loss=3.0)], kind=None)
    assert row.kind == "healthy" and row.actions == {"skip": 1} and row.early_alarms == 1
    assert row.cause_right is None and row.place_right is None and row.gap == 0.0


def test_final_losses_against_the_clean_run(scored: Scored) -> None:
    clean = scored([*map(step, range(1, STEPS + 1)), *ending()], kind=None)
    high = [step(n, 3.0 if n > STEPS - 20 else 2.0) for n in range(31, STEPS + 1)]
    row = scored([*map(step, range(1, 30)), injected(30), step(30), *high, *ending(loss=2.02)], clean=clean)
    assert row.train_loss == 3.0 and row.gap == pytest.approx(0.01) and row.train_gap == pytest.approx(0.5)
    halted = scored(struck(step(30), alarm(30))[:-2] + ending(30, reason="halted"), clean=clean, outcome="halted")
    assert math.isnan(halted.gap) and halted.outcome == "halted"


def test_damaged_weights_are_seen(scored: Scored) -> None:
    assert scored(struck(step(30)), nonfinite_after=[30]).nonfinite
    assert scored(struck(step(30)), nonfinite_at_end=True).nonfinite
    assert not scored(struck(step(30))).nonfinite


def test_wilson() -> None:
    """Against the roots of |p - x| = z sqrt(x (1 - x) / n), which is what the interval is."""
    for hits, n in ((0, 3), (1, 3), (3, 3), (17, 42), (42, 42)):
        low, high = wilson(hits, n)
        p, z = hits / n, 1.959964
        for x in (low, high):
            if 0 < x < 1:
                assert abs(p - x) == pytest.approx(z * math.sqrt(x * (1 - x) / n), abs=1e-9)
        assert 0 <= low <= p <= high <= 1
    assert wilson(0, 0) == (0.0, 1.0)


# -- whole campaigns, tiny -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "train": {**tiny["train"], "eval_every": STEPS, "save_every": 33}}


def test_a_campaign_runs_once_and_grows(over: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = tmp_path / "out", []
    monkeypatch.setattr("poise.train.run.write_report", lambda folder: None)

    def go(**more: Any) -> campaigns.Campaign:
        told.clear()
        return run_campaign(out, 1, **more, steps=STEPS, over=over, progress=lambda *x: told.append(x))

    result = go(kinds=["nan_gradient"], healthy=1)
    assert told == [("clean-s0", 1, 2), ("nan_gradient-s0", 2, 2)]
    healthy, fault = result.rows
    assert (healthy.kind, healthy.outcome, healthy.actions, healthy.gap) == ("healthy", "finished", {}, 0.0)
    assert fault.struck and fault.detected and fault.delay == 0 and not fault.nonfinite
    assert fault.skipped == 1, "the step with the NaN is not taken, and no other is lost"
    assert abs(fault.gap) < 0.05
    assert result.kinds == ("nan_gradient",) and result.faulty == (fault,)

    (out / "nan_gradient-s0" / FACTS).unlink()  # as if it had been killed
    again = go(kinds=["nan_gradient"], healthy=1)
    assert [name for name, *_ in told] == ["nan_gradient-s0"]
    assert again.rows[1].val_loss == fault.val_loss
    assert go(kinds=["nan_gradient"], healthy=1) == again and told == []

    records = read(out / "nan_gradient-s0" / "journal.jsonl")
    onset = [(r["type"], r.get("detector")) for r in records if r.get("step") == 30 and r["type"] in ("event", "step")]
    assert onset[:2] == [("event", "injector"), ("step", None)], "what the onset's step shows comes after it is said"

    table = benchmark().table(again)
    assert "nan_gradient" in table and "1/1 [0.21, 1.00]" in table and "false actions 0 (none)" in table
    with pytest.raises(UserError, match="other settings"):
        run_campaign(out, 1, ["nan_gradient"], 1, STEPS, over={**over, "optim": {"lr": 1e-4}})


def test_a_run_that_dies_is_a_row(over: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(campaigns, "train", dies)
    result = run_campaign(tmp_path / "out", 1, ["bit_flip"], 0, STEPS, over=over)
    row = result.of("bit_flip")[0]
    assert row.outcome == "died" and row.message == "RuntimeError: out of memory" and not row.detected
    assert math.isnan(row.val_loss) and "THE FAULT NEVER CAME" in benchmark().table(result)


def test_stopping_stops_the_campaign(over: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaigns, "train", lambda *a, **k: types.SimpleNamespace(reason="stopped", message=""))
    with pytest.raises(KeyboardInterrupt):
        run_campaign(tmp_path / "out", 1, ["bit_flip"], 0, STEPS, over=over)
    assert not list((tmp_path / "out").glob(f"*/{FACTS}")), "it is not a row"


def test_the_plan(over: dict[str, Any], tmp_path: Path) -> None:
    plans = plan(tmp_path, 3, None, 6, 300, over=over)
    faulty = [one for one in plans if one.case is not None]
    assert len(faulty) == 3 * len(CASES) >= 30 and len(plans) - len(faulty) == 6 + 3
    assert len({one.folder for one in plans}) == len(plans)
    for one in faulty:
        fault = one.fault
        assert fault is not None and one.recipe.guard.enabled
        assert "qk_norm" in one.recipe.model.methods or fault.kind == "qk_growth"
        assert (fault.at == 1) == (fault.kind == "high_lr") == (not fault.recoverable)
    onsets = {one.fault.at for one in faulty if one.fault and one.fault.kind == "bit_flip"}
    assert len(onsets) == 3, "the onset moves against checkpoints and regular readings"
    assert not any(one.recipe.guard.enabled for one in plan(tmp_path, 1, [], 1, 300, over=over, guarded=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, ["bit_flop"], 1, 300), "did you mean 'bit_flip'"),
        ((1, ["label_shift"], 1, 60), "needs at least 92"),
        ((0, None, 1, 300), "at least one seed"),
    ],
)
def test_a_campaign_that_cannot_be(arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path, *arguments)


def test_expected_places_are_in_the_model() -> None:
    layers = campaigns.BASE["model"]["n_layers"]
    places = [case.place for case in CASES.values() if case.place]
    assert places and all(int(place.split(".")[1]) < layers for place in places)
    assert all(kind.causes and "unknown" not in kind.causes for kind in KINDS.values())


def benchmark() -> types.ModuleType:
    """The command in ``benchmarks``, which is not a package."""
    path = Path(__file__).parents[2] / "benchmarks" / "campaign.py"
    spec = importlib.util.spec_from_file_location("campaign_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
