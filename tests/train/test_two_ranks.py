"""Two processes over gloo train the same run as one: sharded weights, the same data, one set of files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from poise.core.journal import read, timeline
from poise.train.recipe import load
from poise.train.run import train

CODE = """
import json, sys
from pathlib import Path
from poise.hardware import distributed
from poise.train.recipe import load
from poise.train.run import resume, train
recipe, folder, how = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], sys.argv[3]
outcome = train(load("nano", recipe), folder) if how == "train" else resume(folder, {"train": {"steps": 30}})
assert outcome.reason == "finished", outcome
distributed.leave(0)
"""


def launch(arguments: list[str]) -> None:
    """Start two ranks as torchrun would, and wait for both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(subprocess.Popen([sys.executable, "-c", CODE, *arguments], env=env, stderr=subprocess.PIPE))
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-3000:]


@pytest.mark.dist
def test_two_ranks_train_and_resume_like_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    schedule = {"kind": "constant", "warmup_steps": 5}  # the same rates whatever the number of steps
    values = {**tiny, "train": {**tiny["train"], "steps": 20}, "optim": {**tiny["optim"], "schedule": schedule}}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    folder = tmp_path / "run"
    launch([str(tmp_path / "recipe.json"), str(folder), "train"])
    launch([str(tmp_path / "recipe.json"), str(folder), "resume"])
    steps = [r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 31))
    alone = tmp_path / "alone"
    values["train"]["steps"] = 30
    train(load("nano", values), alone)
    single = [r for r in timeline(read(alone / "journal.jsonl")) if r["type"] == "step"]
    assert [r["sample"] for r in steps] == [r["sample"] for r in single]
    assert [r["loss"] for r in steps] == pytest.approx([r["loss"] for r in single], rel=2e-3)
    assert [r["loss"] for r in steps[:5]] == pytest.approx([r["loss"] for r in single[:5]], rel=1e-5)
