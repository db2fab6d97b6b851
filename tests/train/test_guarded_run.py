"""The guard in the trainer: skip, go back with new data, halt with the whole story; nothing bad is ever saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.cli.main import main
from poise.core.journal import read, timeline
from poise.core.types import Alarm, Skip
from poise.guard.detectors.nonfinite import NonFinite
from poise.studies.inject import Fault, Injector
from poise.train.loop import Outcome
from poise.train.recipe import load
from poise.train.run import resume, train
from poise.train.state import Run


def run_with(faults: list[Fault], values: dict[str, Any], folder: Path) -> tuple[Outcome, list[dict[str, Any]]]:
    outcome = train(load("nano", values), folder, before=Injector(faults).attach)
    return outcome, read(folder / "journal.jsonl")


def test_a_passing_fault_is_rolled_back_and_its_data_dropped(tiny: dict[str, Any], tmp_path: Path) -> None:
    outcome, records = run_with([Fault("nan_gradient", at=25, length=6)], tiny, tmp_path / "run")
    assert outcome.reason == "finished"
    rollback = next(r for r in records if r["type"] == "rollback")
    assert (rollback["step"], rollback["to"]) == (30, 20)
    assert (rollback["dropped_first"], rollback["dropped_last"]) == (20 * 4, 30 * 4 - 1)
    steps = [r for r in timeline(records) if r["type"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert next(r["sample"] for r in steps if r["step"] == 21) == 30 * 4, "the data goes on, the steps go back"
    again = {r["step"]: r["lr"] for r in steps}
    assert again[25] == pytest.approx(next(r["lr"] for r in records if r["type"] == "step" and r["step"] == 25))


def test_a_lasting_fault_halts_with_the_story(tiny: dict[str, Any], tmp_path: Path) -> None:
    outcome, records = run_with([Fault("nan_gradient", at=25, length=1000)], tiny, tmp_path / "run")
    assert outcome.reason == "halted"
    assert "Mend" in outcome.message and "\n" not in outcome.message
    assert [r["to"] for r in records if r["type"] == "rollback"] == [20, 10]
    assert records[-1]["type"] == "end" and records[-1]["reason"] == "halted"
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-????????"))
    assert kept, "a halted run can be resumed"
    assert resume(tmp_path / "run").reason == "finished"  # type: ignore[union-attr]


def test_a_skipped_step_leaves_weights_and_moments_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    snapshots: dict[str, list[torch.Tensor]] = {}

    def watch(run: Run) -> None:
        Injector([Fault("nan_gradient", at=30)]).attach(run)
        step = run.optimizer.step
        decide = run.guard.decide

        def everything() -> list[torch.Tensor]:
            moments = [v for s in run.optimizer.state.values() for v in s.values()]
            return [t.detach().clone() for t in [*run.model.parameters(), *moments]]

        def noted(signals: Any) -> Any:
            if signals.step in (30, 31):
                snapshots[f"before {signals.step}"] = everything()
            return decide(signals)

        run.guard.decide = noted  # type: ignore[method-assign]
        run.optimizer.step = step

    train(load("nano", tiny), tmp_path / "run", before=watch)
    assert all(torch.equal(a, b) for a, b in zip(snapshots["before 30"], snapshots["before 31"], strict=True))
    assert all(torch.isfinite(t).all() for t in snapshots["before 31"])


def test_no_checkpoint_in_the_middle_of_trouble(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Step 30 is due for a save, but is being skipped: the save waits for the next good step."""
    _, records = run_with([Fault("inf_gradient", at=30)], tiny, tmp_path / "run")
    assert [r["step"] for r in records if r["type"] == "save"] == [0, 10, 20, 31, 40]


def test_halted_exits_with_3(tokens_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Through the command line: a detector that flags every step halts the run, and says so."""
    monkeypatch.chdir(tmp_path)
    alarm = Alarm("nonfinite", "critical", 1, "loss", 0.0, 0.0, "test", "flagged by the test")
    monkeypatch.setattr(NonFinite, "update", lambda self, signals: alarm)
    words = ["train", "--data", str(tokens_dir), "--out", "run", "--data.vocab_size", "512", "--train.steps", "30"]
    words += ["--optim.schedule.warmup_steps", "2", "--train.batch_size", "2", "--train.seq_len", "16", "--json"]
    words += ["--model.n_layers", "1", "--model.d_model", "32", "--model.n_heads", "2", "--train.compile", "off"]
    assert main(words) == 3
    figures = json.loads(capsys.readouterr().out)
    assert figures["outcome"] == "halted"


def test_a_step_whose_batch_alone_was_bad_is_taken_again_with_the_next_one(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    def blame(run: Run) -> None:
        decide, blamed = run.guard.decide, []

        def judge(signals: Any) -> Any:
            decision = decide(signals)
            if signals.step == 20 and len(blamed) < 2:
                blamed.append(run.first_sample)
                return Skip(again=True, reason="odd batch")
            return decision

        run.guard.decide = judge  # type: ignore[method-assign]

    outcome = train(load("nano", tiny), tmp_path / "run", before=blame)
    records = read(tmp_path / "run" / "journal.jsonl")
    assert outcome.step == 40
    tries = [(r["sample"], r["action"]) for r in records if r["type"] == "step" and r["step"] == 20]
    assert tries == [(76, "skip"), (80, "skip"), (84, "proceed")]
    steps = [r for r in timeline(records) if r["type"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 41)) and steps[-1]["sample"] == 41 * 4
    assert [r["step"] for r in records if r["type"] == "save"] == [0, 10, 20, 30, 40]
