"""Code it, run it, crash it, restart it: the resumed run is the same run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.core.errors import UserError
from poise.core.journal import read, timeline
from poise.train import loop
from poise.train.observers import Observer, StepReport
from poise.train.recipe import load
from poise.train.run import resume, train


class Stopper(Observer):
    """Raises a signal at a step, as an operator or a scheduler would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, report: StepReport) -> None:
        if report.signals.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def history(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("type", "step", "loss", "grad_norm", "lr", "tokens", "sample", "action")
    return [tuple(r.get(k) for k in keys) for r in timeline(read(folder / "journal.jsonl"))]


def final_checkpoint(folder: Path) -> dict[str, str]:
    """Hashes of the committed files of the last checkpoint, without what holds times."""
    last = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    manifest = json.loads((last / "manifest.json").read_text())
    return {"step": manifest["step"], "meta": manifest["meta"]}


def weights(folder: Path, recipe: Any) -> list[torch.Tensor]:
    """All tensors of the newest checkpoint: model, optimizer moments and step counts."""
    from poise.data.store import open_tokens
    from poise.hardware import distributed
    from poise.train.run import assemble, read_recipe

    recipe = read_recipe(folder)
    run = assemble(recipe, folder, open_tokens(Path(recipe.data.dir)), distributed.init(), [])
    run.restore(None)
    assert run.journal is not None
    run.journal.close()
    tensors = list(run.model.state_dict().values())
    for state in run.optimizer.state_dict()["state"].values():
        tensors += [v for v in state.values() if isinstance(v, torch.Tensor)]
    assert len(tensors) > 10
    return tensors


def test_20_plus_20_equals_40(tiny: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    recipe = load("nano", tiny)
    outcome = train(recipe, tmp_path / "run", observers=[Stopper(20)])
    assert outcome == loop.Outcome("stopped", 20, "SIGTERM asked for it")
    again = resume(tmp_path / "run")
    assert again is not None and again.reason == "finished"
    assert history(tmp_path / "run") == history(straight)
    assert final_checkpoint(tmp_path / "run") == final_checkpoint(straight)
    ours, theirs = weights(tmp_path / "run", recipe), weights(straight, recipe)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_stop_between_saves_loses_nothing(tiny: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    train(load("nano", tiny), tmp_path / "run", observers=[Stopper(13)])
    resume(tmp_path / "run")
    assert history(tmp_path / "run") == history(straight)


def test_a_finished_run_says_so(straight: Path) -> None:
    assert resume(straight) is None


def test_damaged_newest_checkpoint_is_noticed_and_the_one_before_used(
    tiny: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(load("nano", tiny), folder, observers=[Stopper(30)])
    newest = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    assert newest.name.endswith("30")
    largest = max((p for p in newest.iterdir() if p.suffix == ".distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    resume(folder)
    restart = next(r for r in read(folder / "journal.jsonl") if r["type"] == "restart")
    assert restart["step"] == 20 and restart["damaged_checkpoints"]
    assert history(folder) == history(straight)


def test_kill_9_then_resume(tiny: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny))
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from poise.train.recipe import load\nfrom poise.train.run import train\n"
        "from poise.train.observers import Observer\nimport os, signal\n"
        "class Die(Observer):\n"
        "    def on_step(self, report):\n"
        "        if report.signals.step == 27: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(load('nano', json.loads(Path({str(recipe)!r}).read_text())), {str(folder)!r}, observers=[Die()])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    records = read(folder / "journal.jsonl")
    assert records[-1]["type"] == "step" and records[-1]["step"] == 27
    again = resume(folder)
    assert again is not None and again.reason == "finished"
    assert history(folder) == history(straight)


def test_resume_may_extend_a_finished_run(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    again = resume(folder, {"train": {"steps": 44}})
    assert again is not None and (again.reason, again.step) == ("finished", 44)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"model": {"d_model": 64}}, "cannot change 'model'"),
        ({"seed": 3}, "cannot change 'seed'"),
        ({"train": {"seq_len": 16}}, "cannot change 'train.seq_len'"),
    ],
)
def test_resume_refuses_what_a_checkpoint_fixes(straight: Path, over: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resume(straight, over)


def test_a_checkpoint_from_another_recipe_is_refused(tiny: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    other = {**tiny, "model": {**tiny["model"], "n_layers": 1}}
    folder = tmp_path / "run"
    train(load("nano", other), folder, observers=[Stopper(2)])
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(straight / "checkpoints", folder / "checkpoints")
    with pytest.raises(UserError, match="another recipe") as error:
        resume(folder)
    assert "\n" not in str(error.value)


def test_time_is_not_part_of_the_history(straight: Path) -> None:
    assert time.time() - read(straight / "journal.jsonl")[0]["time"] < 600
    assert len(history(straight)) == 40 + 4
