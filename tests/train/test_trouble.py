"""What breaks at 3 a.m.: full disks, damaged files, a second process, a wrong wish. Nothing lost, one clear line."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from poise.cli.main import main
from poise.core.errors import UserError
from poise.core.journal import Journal, read, timeline
from poise.hardware.checkpoint import CheckpointStore, SaveFailed
from poise.train.recipe import load
from poise.train.run import resume, train


def no_save_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from ``step`` on."""
    save = CheckpointStore.save

    def full(self: CheckpointStore, at: int, *rest: Any, **named: Any) -> Any:
        if at >= step:
            raise SaveFailed(f"step {at} was not saved: No space left on device")
        return save(self, at, *rest, **named)

    monkeypatch.setattr(CheckpointStore, "save", full)


def ends(folder: Path) -> list[str]:
    return [r["reason"] for r in read(folder / "journal.jsonl") if r["type"] == "end"]


def test_a_run_whose_last_state_cannot_be_saved_has_not_finished(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_save_from(20, patch)
        with pytest.raises(SaveFailed, match="No space left"):
            train(load("nano", tiny), tmp_path / "run")
    assert ends(tmp_path / "run") == []
    saves = [
        (r["step"], bool(r.get("failed"))) for r in read(tmp_path / "run" / "journal.jsonl") if r["type"] == "save"
    ]
    assert saves == [(0, False), (10, False), (20, True), (30, True)], "training went on with the older ones"
    again = resume(tmp_path / "run")  # there is space again
    assert again is not None and again.reason == "finished"


def test_no_room_for_the_first_checkpoint_is_said_before_training(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_save_from(0, monkeypatch)
    with pytest.raises(SaveFailed):
        train(load("nano", tiny), tmp_path / "run")
    assert not any(r["type"] == "step" for r in read(tmp_path / "run" / "journal.jsonl"))


def test_a_full_disk_under_the_journal_is_one_line(
    tokens_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Journal, kind: str, /, **fields: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/journal.jsonl")

    monkeypatch.setattr(Journal, "write", full)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(tokens_dir), "--data.vocab_size", "512", "--train.seq_len", "32"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("poise train: 'run/journal.jsonl': No space left on device; free some space")


def test_all_checkpoints_damaged_is_refused_every_time(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for shard in (folder / "checkpoints").glob("step-*/*.distcp"):
        shard.write_bytes(shard.read_bytes()[:10])
    for _ in range(3):
        with pytest.raises(UserError, match="no good checkpoint") as error:
            resume(folder, {"train": {"steps": 44}})
        assert "\n" not in str(error.value)
    assert len([r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]) == 40


def test_a_second_process_is_refused_and_touches_nothing(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    live = folder / "checkpoints" / "step-00000044.partial-1"
    live.mkdir()
    first = Journal(folder / "journal.jsonl")
    with pytest.raises(UserError, match="another process"):
        resume(folder, {"train": {"steps": 44}})
    assert live.exists(), "the save that is under way in the other process"
    first.close()


def test_fewer_steps_than_are_done_is_refused(straight: Path) -> None:
    before = (straight / "recipe.toml").read_text()
    with pytest.raises(UserError, match="has done 40 steps"):
        resume(straight, {"train": {"steps": 30}})
    assert (straight / "recipe.toml").read_text() == before


def test_an_empty_folder_may_become_a_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train(load("nano", tiny), tmp_path / "run").reason == "finished"


def test_best_is_what_was_measured(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint carries a validation loss only if it was evaluated at that very step."""
    values = {**tiny, "train": {**tiny["train"], "eval_every": 20, "keep_last": 10}}
    train(load("nano", values), tmp_path / "run")
    metrics = {}
    for manifest in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
        found = json.loads(manifest.read_text())
        found = found.get("body", found)
        metrics[found["step"]] = found["metric"] is not None
    assert metrics == {0: False, 10: False, 20: True, 30: False, 40: True}


def test_replaced_bytes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    text = "The quick brown fox jumps over the lazy dog, and nobody minds at all. "
    for number in range(40):
        (tmp_path / "notes" / f"{number}.md").write_text(f"{number}: " + text * 40)
    (tmp_path / "notes" / "torn.md").write_bytes("naïve ".encode() * 30 + b"\xff" * 60 + text.encode() * 40)
    (tmp_path / "notes" / "latin.md").write_bytes(b"caf\xe9 na\xefve " * 30 + text.encode() * 10)
    words = ["train", "--data", "notes", "--out", "run", "--data.vocab_size", "300", "--train.seq_len", "16"]
    words += ["--train.steps", "3", "--optim.schedule.warmup_steps", "1", "--train.batch_size", "2"]
    words += ["--model.n_layers", "1", "--model.d_model", "32", "--model.n_heads", "2", "--train.compile", "off"]
    assert main(words) == 0
    assert "60 bytes were not valid UTF-8" in capsys.readouterr().err
    record = next(r for r in read(tmp_path / "run" / "journal.jsonl") if r["type"] == "run")
    assert record["data"]["replaced_bytes"] == 60
    assert sum(record["data"]["converted"].values()) == 1, "Latin-1 is read as what it is"


def test_a_data_folder_of_another_text_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """``data.dir`` names a place, not a text: what lies there from another source is prepared anew."""
    for name, word in (("one", "alpha"), ("two", "omega")):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.md").write_text(f"{number}: " + f"{word} beta gamma delta epsilon. " * 40)
    sources = []
    for name in ("one", "two"):
        values = {
            "data": {"source": str(tmp_path / name), "dir": str(tmp_path / "tokens"), "vocab_size": 280},
            "model": {"n_layers": 1, "d_model": 32, "n_heads": 2},
            "optim": {"schedule": {"warmup_steps": 1}},
            "train": {"steps": 2, "batch_size": 2, "seq_len": 16, "compile": "off", "eval_every": 0},
        }
        train(load("nano", values), tmp_path / f"run-{name}")
        record = next(r for r in read(tmp_path / f"run-{name}" / "journal.jsonl") if r["type"] == "run")
        sources.append(record["data"]["source"])
    assert sources[0] != sources[1]
