"""Faults are real, and the guard's answer to them is what the demonstration says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from poise.core.journal import read, timeline
from poise.studies.demo import run_demo
from poise.studies.inject import Fault, Injector
from poise.train.recipe import load
from poise.train.run import train

FAULTS = (
    Fault("garbage_batch", at=26),
    Fault("high_lr", at=32, length=4, factor=100.0),
    Fault("inf_gradient", at=44),
    Fault("nan_gradient", at=47),
)


def over(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "train": {**tiny["train"], "steps": 60, "save_every": 5}}


def test_bare_dies_and_guarded_finishes(tiny: dict[str, Any], tmp_path: Path) -> None:
    demo = run_demo(tmp_path / "demo", over=over(tiny), faults=FAULTS)
    bare, guarded, clean = demo.row("bare"), demo.row("guarded"), demo.row("clean")
    assert math.isnan(bare.final_loss) and math.isnan(bare.val_loss)
    assert guarded.outcome == clean.outcome == "finished"
    assert guarded.skipped >= 2, "inf and NaN at the least"
    assert clean.skipped == clean.rollbacks == 0
    assert abs(demo.guarded_gap) < 0.25
    assert demo.page.read_text().count("garbage batch") >= 1
    records = read(tmp_path / "demo" / "guarded" / "journal.jsonl")
    assert {r["kind"] for r in records if "injected" in r} == {fault.kind for fault in FAULTS}


@pytest.mark.parametrize("kind", ["nan_gradient", "inf_gradient"])
def test_a_gradient_fault_reaches_an_unguarded_reading(kind: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    """The injected value really is in the gradient that the guard reads, at that step and no other."""
    train(load("nano", tiny), tmp_path / "run", before=Injector([Fault(kind, at=30)]).attach)
    records = read(tmp_path / "run" / "journal.jsonl")
    norms = {r["step"]: r["grad_norm"] for r in timeline(records) if r["type"] == "step"}
    assert [step for step, norm in norms.items() if not math.isfinite(norm)] == [30]
    decisions = [(r["step"], r["action"]) for r in records if r["type"] == "decision"]
    assert decisions == [(30, "skip")]


def test_high_lr_is_in_the_journal(tiny: dict[str, Any], tmp_path: Path) -> None:
    constant = {**tiny["optim"], "schedule": {"kind": "constant", "warmup_steps": 5}}
    values = {**tiny, "guard": {"enabled": False}, "optim": constant}
    fault = Fault("high_lr", at=20, length=2, factor=10.0)
    train(load("nano", values), tmp_path / "run", before=Injector([fault]).attach)
    lr = {r["step"]: r["lr"] for r in timeline(read(tmp_path / "run" / "journal.jsonl")) if r["type"] == "step"}
    assert [round(lr[step] / lr[19], 6) for step in (19, 20, 21, 22)] == [1, 10, 10, 1]
