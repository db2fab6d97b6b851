"""Two processes over gloo train the same run as one: sharded weights, the same data, one set of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.ranks import launch

from poise.core.journal import read, timeline
from poise.hardware import distributed
from poise.train.recipe import load
from poise.train.run import resume, train


def one_rank(rank: int, values: dict[str, Any], folder: str, how: str) -> None:
    outcome = train(load("nano", values), folder) if how == "train" else resume(folder, {"train": {"steps": 30}})
    assert outcome.reason == "finished", outcome
    distributed.leave(0)


@pytest.mark.dist
def test_two_ranks_train_and_resume_like_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    schedule = {"kind": "constant", "warmup_steps": 5}  # the same rates whatever the number of steps
    values = {**tiny, "train": {**tiny["train"], "steps": 20}, "optim": {**tiny["optim"], "schedule": schedule}}
    folder = tmp_path / "run"
    launch(one_rank, values, str(folder), "train")
    launch(one_rank, values, str(folder), "resume")
    steps = [r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 31))
    alone = tmp_path / "alone"
    values["train"]["steps"] = 30
    train(load("nano", values), alone)
    single = [r for r in timeline(read(alone / "journal.jsonl")) if r["type"] == "step"]
    assert [r["sample"] for r in steps] == [r["sample"] for r in single]
    assert [r["loss"] for r in steps] == pytest.approx([r["loss"] for r in single], rel=2e-3)
    assert [r["loss"] for r in steps[:5]] == pytest.approx([r["loss"] for r in single[:5]], rel=1e-5)
