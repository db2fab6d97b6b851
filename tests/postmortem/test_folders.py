"""Folders as trainers leave them: the log in them is found, and nobody chooses among several runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.core.errors import UserError
from poise.postmortem.folders import members


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def found(root: Path, folder: str = ".") -> list[str]:
    return [path.relative_to(root).as_posix() for path in members(root / folder)]


E0, E1, E2 = (f"events.out.tfevents.{170000000 + i}.host.7.{i}" for i in (0, 1, 2))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["journal.jsonl", "report.html", "x.csv"], ["journal.jsonl"]),
        (["run-abc.wandb", "files/output.log", "logs/debug.log"], ["run-abc.wandb"]),
        (["wandb/run-2026_1-abc/run-abc.wandb", "train.py"], ["wandb/run-2026_1-abc/run-abc.wandb"]),
        ([E1, E0, "hparams.yaml"], [E0, E1]),
        ([f"{E0}.v2", "events.out.tfevents.1.profile-empty"], [f"{E0}.v2"]),
        ([f"only/{E0}", f"only/{E1}", "notes/readme.md"], [f"only/{E0}", f"only/{E1}"]),
        ([E0, f"loss_train/{E1}", f"loss_val/{E1}"], [f"loss_train/{E1}"]),
        ([f"loss_train/{E1}", f"loss_val/{E1}", f"acc_train/{E1}"], [f"loss_train/{E1}"]),
        ([E0, f"layer_1/{E1}", f"layer_2/{E1}"], [E0]),
        (["my_model/version_0/metrics.csv", "train.py"], ["my_model/version_0/metrics.csv"]),
        ([f"train/{E0}", f"validation/{E1}"], [f"train/{E0}"]),
        (["trainer_state.json", f"runs/Nov21_host/{E0}", "config.json"], ["trainer_state.json"]),
        (["trainer_log.jsonl", "trainer_state.json"], ["trainer_state.json"]),
        (["trainer_log.jsonl", "checkpoint-5/trainer_state.json"], ["trainer_log.jsonl"]),
        ([f"runs/Nov21_host/{E0}", "config.json"], [f"runs/Nov21_host/{E0}"]),
        (["metrics.csv", "hparams.yaml", E0], ["metrics.csv"]),
        (["lightning_logs/version_0/metrics.csv"], ["lightning_logs/version_0/metrics.csv"]),
        (["main.log", "model.bin", "notes.md"], ["main.log"]),
        (["loss.csv.gz", "model.bin"], ["loss.csv.gz"]),
    ],
)
def test_found(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    make(tmp_path, *names)
    assert found(tmp_path) == expected


def test_event_files_go_by_time_and_then_by_number(tmp_path: Path) -> None:
    names = [f"events.out.tfevents.{t}.h.1.{n}" for t, n in ((9, 0), (100, 2), (100, 9), (100, 10), (1000, 0))]
    make(tmp_path, *reversed(names))
    assert found(tmp_path) == names


def test_the_newest_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-900/trainer_state.json", "checkpoint-1000/trainer_state.json", "checkpoint-9/x")
    assert found(tmp_path) == ["checkpoint-1000/trainer_state.json"]
    assert found(tmp_path, "checkpoint-900") == ["checkpoint-900/trainer_state.json"]


@pytest.mark.parametrize(
    ("step", "expected"), [(900, "checkpoint-1000/trainer_state.json"), (1000, "trainer_state.json")]
)
def test_the_state_that_goes_furthest(tmp_path: Path, step: int, expected: str) -> None:
    make(tmp_path, "checkpoint-1000/trainer_state.json")
    (tmp_path / "trainer_state.json").write_text(f'{{\n "epoch": 1.0,\n "global_step": {step},\n "log_history": []}}')
    assert found(tmp_path) == [expected]


def test_all_parts_of_the_latest_wandb_run(tmp_path: Path) -> None:
    old = "wandb/offline-run-20260101_000000-old/run-old.wandb"
    parts = [
        f"wandb/{kind}run-2026010{day}_000000-new/run-new.wandb" for day, kind in ((2, "offline-"), (3, ""), (4, ""))
    ]
    make(tmp_path, old, *reversed(parts), "wandb/debug.log")
    (tmp_path / "wandb" / "latest-run").symlink_to("run-20260104_000000-new")
    assert found(tmp_path) == found(tmp_path, "wandb") == parts
    assert found(tmp_path, "wandb/latest-run") == ["wandb/latest-run/run-new.wandb"]


def test_a_lost_latest_run_is_no_harm(tmp_path: Path) -> None:
    make(tmp_path, "offline-run-20260101_000000-a/run-a.wandb")
    (tmp_path / "latest-run").symlink_to("gone")
    assert found(tmp_path) == ["offline-run-20260101_000000-a/run-a.wandb"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], ["has no log in it", "trainer_state.json"]),
        (["model.bin", "deep/er/journal.jsonl"], ["has no log in it"]),
        (
            ["offline-run-1-a/run-a.wandb", "offline-run-2-b/run-b.wandb"],
            ["2 W&B runs", "'run-a.wandb'", "'run-b.wandb'"],
        ),
        ([f"a/{E0}", f"b/{E0}"], ["2 runs", "'a'", "'b'"]),
        ([f"lightning_logs/version_{i}/metrics.csv" for i in range(6)], ["6 runs", "'version_0'", "2 more"]),
        ([f"train/{E0}", f"training/{E0}"], ["2 runs"]),
        (
            [f"my_model/version_{i}/metrics.csv" for i in range(2)],
            ["2 runs", "'my_model/version_0'", "'my_model/version_1'"],
        ),
        (["a.log", "b.log"], ["2 logs", "'a.log'", "'b.log'"]),
    ],
)
def test_nothing_or_several(tmp_path: Path, names: list[str], told: list[str]) -> None:
    make(tmp_path, *names)
    with pytest.raises(UserError) as error:
        members(tmp_path)
    message = str(error.value)
    assert "\n" not in message and "name" in message.lower()
    for part in told:
        assert part in message


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        members(tmp_path / "gone")


def test_event_files_with_events_go_before_added_scalars(tmp_path: Path) -> None:
    make(tmp_path, E0, f"loss_train/{E1}", f"loss_val/{E1}")
    (tmp_path / E0).write_bytes(bytes(1000))
    assert found(tmp_path) == [E0]
