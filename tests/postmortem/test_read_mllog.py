"""MLPerf's ``:::MLLOG`` lines: losses by samples, evaluations, restarts, and what is among them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.core.errors import UserError
from poise.postmortem import Log, read_log
from poise.postmortem.readers import mllog
from poise.postmortem.readers.source import Source
from poise.postmortem.units import tokens_per_step

REAL = Path(__file__).resolve().parents[3] / "shared" / "logs" / "mllog__nvidia_theia8_llama31_8b_run0.txt"


def line(key: str, value: Any = None, prefix: str = "", **metadata: Any) -> str:
    record = {"namespace": "", "time_ms": 1, "event_type": "POINT_IN_TIME", "key": key, "value": value}
    return f"{prefix}:::MLLOG {json.dumps(record | {'metadata': {'file': 'a.py', 'lineno': 3} | metadata})}\n"


def opening(batch: int = 16, benchmark: str = "llama31_8b", prefix: str = "") -> str:
    said = {
        "submission_benchmark": benchmark,
        "submission_org": "somebody",
        "global_batch_size": batch,
        "max_sequence_length": 8192,
        "opt_base_learning_rate": 4e-4,
        "opt_adamw_beta_1": 0.9,
        "opt_learning_rate_warmup_steps": 16,
    }
    lines = [line("cache_clear", True, prefix)] * 3 + [line(key, value, prefix) for key, value in said.items()]
    return "".join(lines) + line("run_start", prefix=prefix)


def stats(samples: int, loss: float, prefix: str = "", **metadata: Any) -> str:
    value = {"reduced_train_loss": loss, "train_step_time": 0.5}
    return line("tracked_stats", value, prefix, **(metadata or {"samples_count": samples}))


def read(tmp_path: Path, text: str) -> Log:
    path = tmp_path / "result_0.txt"
    path.write_text(text)
    return read_log(path)


def values(log: Log, name: str = "loss") -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def said(log: Log, text: str) -> bool:
    return any(text in note for note in log.notes)


@pytest.mark.parametrize("prefix", ["", "0: ", "[rank0]: ", "\x1b[36m(Worker pid=7)\x1b[0m "])
def test_losses_evaluations_and_settings(tmp_path: Path, prefix: str) -> None:
    text = (
        "starting\n" + opening(prefix=prefix) + stats(512, 8.0, prefix) + "Epoch 0 loss 3\n" + stats(1024, 7.5, prefix)
    )
    text += line("tracked_stats", {"validation_step_time": 0.2}, prefix, step=0, samples_count=16)
    text += line("eval_accuracy", 7.25, prefix, samples_count=1024) + line("run_stop", prefix=prefix, status="success")
    log = read(tmp_path, text)
    assert log.format == "mllog"
    assert values(log) == {32: 8.0, 64: 7.5}
    assert values(log, "val_loss") == {64: 7.25}
    assert values(log, "samples") == {32: 512, 64: 1024}
    assert log.step_unit == "steps" and said(log, "divided by the batch size 16")
    wanted = {"global_batch_size": "16", "opt_adamw_beta_1": "0.9", "opt_learning_rate_warmup_steps": "16"}
    assert wanted.items() <= log.settings.items()
    assert not {"cache_clear", "submission_org", "run_start"} & log.settings.keys()
    assert log.settings["tokens_per_step"] == "131072" and tokens_per_step(log.series, log.settings) == 131072


def test_train_loss_with_a_learning_rate(tmp_path: Path) -> None:
    rows = [line("train_loss", 11.0 - i, samples_count=64 * i, lr=1e-4 * i) for i in range(3)]
    log = read(tmp_path, opening(32) + "".join(rows) + line("eval_loss", 9.5, samples_count=128))
    assert values(log) == {0: 11.0, 2: 10.0, 4: 9.0}
    assert values(log, "lr")[4] == 2e-4 and values(log, "val_loss") == {4: 9.5}


def test_nan_is_a_value_and_damage_is_not(tmp_path: Path) -> None:
    text = opening() + stats(16, math.nan) + stats(32, math.inf) + stats(48, 3.0)[:-40] + "\n" + stats(64, 2.0)
    log = read(tmp_path, text + stats(80, 1.0)[:60])
    assert list(values(log)) == [1, 2, 4]
    assert np.isnan(values(log)[1]) and values(log)[2] == math.inf
    assert said(log, "cannot be read") and said(log, "cut off")


def test_older_logs_call_the_samples_step(tmp_path: Path) -> None:
    log = read(tmp_path, opening(8) + "".join(stats(0, 3.0 - i, step=8 * 10 * i) for i in (1, 2)))
    assert list(values(log)) == [10, 20] and said(log, "taken as a count of samples")


def test_a_step_that_is_seen_to_count_steps(tmp_path: Path) -> None:
    text = opening(8) + line("block_stop", samples_count=8000, step=1000) + stats(0, 3.0, step=1008)
    assert list(values(read(tmp_path, text))) == [1008]


def test_evaluations_of_older_logs_count_tokens(tmp_path: Path) -> None:
    text = opening(8, "gpt3") + stats(80, 3.0) + stats(160, 2.5) + line("eval_accuracy", 2.75, epoch_num=8 * 8192 * 20)
    assert values(read(tmp_path, text), "val_loss") == {20: 2.75}


def test_samples_that_no_batch_divides_order_the_rows(tmp_path: Path) -> None:
    log = read(tmp_path, opening(8) + "".join(stats(430 * i + i * i, 3.0 - i / 10) for i in range(1, 6)))
    assert list(values(log)) == [430 * i + i * i for i in range(1, 6)] and log.step_unit == "samples"


def test_accuracy_of_other_benchmarks_is_no_loss(tmp_path: Path) -> None:
    log = read(tmp_path, opening(8, "bert") + stats(80, 3.0) + line("eval_accuracy", 0.72, samples_count=80))
    assert "val_loss" not in log.series and values(log, "eval_accuracy") == {10: 0.72}


def test_a_second_start_is_a_restart(tmp_path: Path) -> None:
    starts = line("init_start") * 8 + line("run_start") * 8  # every rank says so
    path = tmp_path / "x.txt"
    path.write_text(opening() + starts + stats(512, 8.0) + stats(1024, 7.0) + starts + stats(1024, 7.5))
    kinds = [type(item).__name__ for item in mllog.read(Source(path))]
    assert kinds == ["dict", "dict", "Restarted", "dict"]


def test_not_a_log(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("print(':::MLLOG {}'.format(x))\nif ':::MLLOG' in line: json.loads(line.split(':::MLLOG {')[1])\n")
    assert mllog.sniff(Source(path)) == 0.0
    with pytest.raises(UserError, match="no loss in"):
        read(tmp_path, opening())


@pytest.mark.skipif(not REAL.is_file(), reason="the real logs are not on this machine")
def test_real_log() -> None:
    log = read_log(REAL)
    steps, losses = log.series["loss"]
    assert (log.format, len(steps), steps[0], steps[-1]) == ("mllog", 360, 32, 11520)
    assert set(np.diff(steps).tolist()) == {32}
    assert (round(losses[0], 4), round(losses[-1], 4), len(log.series["val_loss"][0])) == (8.1666, 3.2600, 15)
    assert log.series["val_loss"][0][-1] == 11520 and log.restarts == ()
