"""DeepSpeed's standard output: both engines' lines, overflows without a step, the loss scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from poise.postmortem.log import read_log
from poise.postmortem.readers import deepspeed
from poise.postmortem.readers.source import Row, Source

STAMP = "[2023-08-02 00:41:17,935] [INFO] [logging.py:96:log_dist] "


def pipeline(step: int, loss: str) -> str:
    return f"steps: {step} loss: {loss} lm loss: {loss} iter time (s): 1.200 samples/sec: 34.5"


def engine(step: int, skipped: int) -> str:
    return f"{STAMP}[Rank 0] step={step}, skipped={skipped}, lr=[0.00025, 0.5], mom=[(0.9, 0.95)]"


def overflow(before: int) -> str:
    return f"[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: {before}, reducing to {before // 2}"


def rows(tmp_path: Path, *lines: str) -> list[Row]:
    path = tmp_path / "run.log"
    path.write_text("\n".join([*lines, ""]))
    return [row for row in deepspeed.read(Source(path)) if isinstance(row, dict)]


def test_both_engines(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    text = [
        x
        for step in range(10, 40, 10)
        for x in (engine(step, 0), "[Rank 0] time (ms) | fwd: 5.0", pipeline(step, "2.5"))
    ]
    text[-1] = pipeline(30, "nan")
    path.write_text("\n".join([*text, ""]))
    log = read_log(path)
    assert log.format == "deepspeed"
    steps, values = log.series["loss"]
    assert steps.tolist() == [10, 20, 30]
    assert values[:2].tolist() == [2.5, 2.5] and math.isnan(values[2])
    assert log.series["lr"][1].tolist() == [0.00025] * 3
    assert log.series["iter time"][1].tolist() == [1.2] * 3 and log.series["samples/sec"][1][0] == 34.5


def test_overflows_belong_to_the_next_step(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        pipeline(1, "2.5"),
        overflow(65536),
        pipeline(2, "2.5"),
        overflow(32768),
        overflow(16384),
        engine(5, 3),
    )
    assert [row["skipped"] for row in found] == [0.0, 1.0, 2.0]
    assert [row.get("loss_scale") for row in found] == [None, 32768.0, 8192.0]


def test_the_sum_of_skipped_steps_is_told_apart(tmp_path: Path) -> None:
    found = rows(tmp_path, engine(10, 7), engine(20, 7), engine(30, 9), pipeline(30, "2.5"))
    assert [row.get("skipped") for row in found] == [0.0, 0.0, 2.0, None]  # the first sum may be of an earlier run


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("[Rank 0] Overflow detected. Skipping step. Attempted loss scale: 16384.0, reducing to 8192.0", 8192.0),
        ("[deepspeed] OVERFLOW! Rank 0 Skipping step. Reducing loss scale to 32768.0", 32768.0),
        ("[x.py:353:_update_scale] Increasing dynamic loss scale from 16384.0 to 32768.0", 32768.0),
    ],
)
def test_other_words_for_the_loss_scale(tmp_path: Path, text: str, scale: float) -> None:
    (row,) = rows(tmp_path, text, pipeline(3, "2.5"))
    assert row["loss_scale"] == scale
    assert row["skipped"] == float("kipping" in text)


def test_without_losses_others_go_first(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text("\n".join(engine(step, 0) for step in range(10, 100, 10)) + "\n")
    assert deepspeed.sniff(Source(path)) < 0.25
    path.write_text(f'expected = "{pipeline(3, "2.5")}"\n' * 9)
    assert deepspeed.sniff(Source(path)) == 0.0
