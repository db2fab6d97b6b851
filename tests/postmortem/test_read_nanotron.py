"""nanotron's standard output: suffixes for thousands, ranks in brackets, restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.postmortem.log import Log, read_log
from poise.postmortem.readers import nanotron
from poise.postmortem.readers.cells import human
from poise.postmortem.readers.source import RESTARTED, Source

START = (
    "[Start training] datetime: 2024-07-01 20:45:00 | mbs: 8 | grad_accum: 4 | global_batch_size: 1024 |"
    " sequence_length: 4096 | train_steps: 5000 | start_iteration_step: 0 | consumed_train_samples: 0"
)


def line(step: int, loss: str = "3.4") -> str:
    return (
        f"\x1b[2;3m07/01 20:45:12 [INFO|DP=0|PP=1|TP=0|node-3]\x1b[0m: iteration: {step} / 5000 |"
        " consumed_tokens: 4.19M |"
        f" elapsed_time_per_iteration_ms: 24.8K | tokens_per_sec: 169K | global_batch_size: 1.02K | lm_loss: {loss} |"
        " lr: 0.0003 | model_tflops_per_gpu: 24 | grad_norm: 0.5"
    )


def read(tmp_path: Path, *lines: str) -> Log:
    path = tmp_path / "run.log"
    path.write_text("\n".join([*lines, "the end", ""]))
    log = read_log(path)
    assert log.format == "nanotron"
    return log


def test_a_line(tmp_path: Path) -> None:
    log = read(
        tmp_path, START, line(1), line(2, "nan"), f"[default5]:{line(3, '2.75')}", line(4).replace("0.5", "1.25K")
    )
    steps, values = log.series["loss"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert values[[0, 2, 3]].tolist() == [3.4, 2.75, 3.4] and values[1] != values[1]
    assert log.series["grad_norm"][1].tolist() == [0.5, 0.5, 0.5, 1250.0]
    assert log.series["lr"][1][0] == 3e-4
    assert log.series["tokens"][1][0] == 4.19e6
    assert log.series["elapsed_time_per_iteration_ms"][1][0] == 24_800.0
    assert log.settings["global_batch_size"] == "1024" and log.settings["train_steps"] == "5000"
    assert log.settings["tokens_per_step"] == str(1024 * 4096)


def test_validation_and_restart(tmp_path: Path) -> None:
    read(tmp_path, START, line(1), line(2), "Validation loss: 2.5", START, line(2, "9.0"), line(3))
    found = list(nanotron.read(Source(tmp_path / "run.log")))
    assert found.index(RESTARTED) == 3 and found.count(RESTARTED) == 1
    assert found[2] == {"iteration": 2.0, "val_loss": 2.5}


def test_a_last_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    whole = line(2, "3.45678")
    for cut in range(len(whole)):
        path.write_text(line(1) + "\n" + whole[:cut])
        rows = [row for row in nanotron.read(Source(path)) if isinstance(row, dict)]
        assert all(row.get("lm_loss", 3.45678) == 3.45678 for row in rows[1:])


@pytest.mark.parametrize(
    ("text", "value"), [("1.05M", 1_050_000.0), ("12.3K", 12_300.0), ("1.2B", 1.2e9), ("3T", 3e12), ("0.123", 0.123)]
)
def test_suffixes(text: str, value: float) -> None:
    assert human(text) == value


def test_code_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "test.py"
    path.write_text('line = "iteration: 5 / 100 | lm_loss: 2.5"\n' * 5)
    assert nanotron.sniff(Source(path)) == 0.0
