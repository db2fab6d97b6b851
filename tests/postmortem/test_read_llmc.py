"""llm.c: its standard output in several versions, and its main.log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from poise.postmortem import Log, read_log
from poise.postmortem.readers import llmc
from poise.postmortem.readers.source import Source
from poise.postmortem.units import tokens_per_step

LOGS = Path(__file__).resolve().parents[3] / "shared" / "logs"

TABLE = """Multi-GPU support is disabled. Using a single GPU.
+-----------------------+----------------------+
| Parameter             | Value                |
+-----------------------+----------------------+
| micro batch size B    | 4                    |
| sequence length T     | 64                   |
| total batch size      | 4096                 |
| LR scheduler          | cosine               |
| vocab_size V          | 50257                |
+-----------------------+----------------------+
"""


def step(n: int, loss: str, norm: str = "1.5000", z: str = "+nanz") -> str:
    rest = "lr 6.00e-07 | 21.4 ms | 3.1% bf16 MFU | 95 tok/s\n"
    return f"step {n:4d}/750 | loss {loss:>7} ({z})| norm {norm:>6} ({z})| {rest}"


def read(tmp_path: Path, text: str, name: str = "out.log") -> Log:
    path = tmp_path / name
    path.write_text(text)
    return read_log(path)


def values(log: Log, name: str = "loss") -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def said(log: Log, text: str) -> bool:
    return any(text in note for note in log.notes)


def test_output(tmp_path: Path) -> None:
    text = TABLE + "val loss 11.009\n" + step(1, "11.01", "15.25") + step(2, "10.5", z="-1.39z") + "val loss 10.25\n"
    text += "evaluating HellaSwag: 0/4\revaluating HellaSwag: 4/4\rHellaSwag: 250/1000 = 0.2500\n" + step(3, "9.75")
    log = read(tmp_path, text)
    assert log.format == "llmc"
    assert values(log) == {1: 11.01, 2: 10.5, 3: 9.75}
    assert values(log, "grad_norm") == {1: 15.25, 2: 1.5, 3: 1.5} and values(log, "lr")[3] == 6e-7
    assert values(log, "val_loss") == {0: 11.009, 2: 10.25} and values(log, "hellaswag") == {2: 0.25}
    assert log.settings["sequence length T"] == "64" and log.settings["LR scheduler"] == "cosine"
    assert tokens_per_step(log.series, log.settings) == 4096
    assert log.loss_unit == "nats"


def test_resumed_run_evaluates_before_its_first_step(tmp_path: Path) -> None:
    log = read(tmp_path, TABLE + "val loss 5.5\n" + step(501, "5.25") + step(502, "5.0"))
    assert values(log, "val_loss") == {500: 5.5}


def test_second_table_is_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text(
        TABLE + step(1, "11.0") + step(2, "10.0") + TABLE + "val loss 10.5\n" + step(2, "10.25") + step(3, "9.5")
    )
    items = list(llmc.read(Source(path)))
    assert [type(item).__name__ for item in items] == ["dict", "dict", "Restarted", "dict", "dict", "dict"]
    assert items[3] == {"val_loss": 10.5, "step": 1.0}
    assert values(read_log(path)) == {1: 11.0, 2: 10.25, 3: 9.5}


def test_nan_is_a_value(tmp_path: Path) -> None:
    log = read(tmp_path, step(1, "nan", "nan") + step(2, "-nan", "inf") + step(3, "inf") + "val loss nan\n")
    losses = log.series["loss"][1]
    assert np.isnan(losses[:2]).all() and losses[2] == math.inf and log.series["grad_norm"][1][1] == math.inf
    assert np.isnan(log.series["val_loss"][1]).all()


@pytest.mark.parametrize(
    "line",
    [
        "step {n}: train loss {x:f} (took 5431.2 ms)",
        "step    {n}/74: train loss {x:f} (acc {x:f}) (80.6 ms, 50.8k tok/s)",
        "step    {n}/10 | train loss {x:.6f} | norm 1.5000 | lr 1.00e-04 | (33.5 ms | 1912 tok/s)",
        "something else\nstep    {n}/10 | train loss {x:.6f} | norm 1.5000 | lr 1.00e-04 | (33.5 ms | 9 tok/s)",
        "0: step    {n}/10 | loss {x:.6f} (+0.10z)| norm 1.5000 (+0.10z)| lr 1.00e-04 | 33.5 ms",
        "s:{n} trl:{x:.4f}",
    ],
)
def test_other_versions(tmp_path: Path, line: str) -> None:
    log = read(tmp_path, "".join(line.format(n=n, x=5 - n / 4) + "\n" for n in (1, 2, 3)))
    assert log.format == "llmc" and values(log) == {1: 4.75, 2: 4.5, 3: 4.25}


def test_main_log(tmp_path: Path) -> None:
    text = "s:0 tel:11.0088\n" + "".join(f"s:{n} trl:{11 - n:.4f} lr:0.000600 norm:15.25\n" for n in (1, 2, 3))
    log = read(tmp_path, text + "s:3 tel:8.5000\ns:3 eval:0.2489\n", "main.log")
    assert values(log) == {1: 10.0, 2: 9.0, 3: 8.0}
    assert values(log, "val_loss") == {0: 11.0088, 3: 8.5} and values(log, "hellaswag") == {3: 0.2489}
    assert values(log, "grad_norm")[3] == 15.25 and values(log, "lr")[1] == 6e-4
    assert log.notes == ()


@pytest.mark.parametrize("cut", [" norm:1", " norm:15.", ""])
def test_a_number_that_is_cut_off_is_no_number(tmp_path: Path, cut: str) -> None:
    whole = "".join(f"s:{n} trl:{11 - n:.4f} lr:0.000600 norm:15.25\n" for n in (1, 2, 3))
    log = read(tmp_path, whole + "s:4 trl:7." + cut)
    assert list(values(log)) == [1, 2, 3] and said(log, "cut off")


def test_last_line_cut_off_behind_the_loss(tmp_path: Path) -> None:
    assert (
        values(read(tmp_path, step(1, "11.0") + step(2, "10.0")[:70] + "slurmstepd: error: *** JOB 1 ***"))[2] == 10.0
    )


def test_source_code_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "train.cu"
    path.write_text(
        'printf0("step %4d/%d | loss %7.6f (%+.2fz)| norm %6.4f\\n", step + 1, n);\nprintf("val loss %f\\n", x);\n'
        'fprintf(logfile, "s:%d trl:%.4f lr:%.6f norm:%.2f\\n", step, loss, lr, norm);\n'
    )
    assert llmc.sniff(Source(path)) == 0.0
    path.write_text("".join(f"step {n}: loss {5 - n}\nstep {n} | train loss {5 - n}\n" for n in range(4)))
    assert llmc.sniff(Source(path)) == 0.0  # anybody's


@pytest.mark.skipif(not LOGS.is_dir(), reason="the real logs are not on this machine")
def test_real_logs() -> None:
    log = read_log(LOGS / "llmc_stdout__gpt2_124m_750steps.log")
    steps, losses = log.series["loss"]
    assert (log.format, steps.tolist()) == ("llmc", list(range(1, 751)))
    assert (losses[0], losses[-1]) == (11.010252, 4.763922)
    norms = log.series["grad_norm"][1]
    assert (norms.max(), norms.argmax()) == (15.2986, 1) and log.series["val_loss"][0].tolist() == [0, 250, 500, 750]
    assert log.loss_unit == "nats" and log.settings["tokens_per_step"] == "524288"
    log = read_log(LOGS / "llmc_stdout__gpt2_124m_all_nan.log")
    assert len(log.series["loss"][0]) == 100 and np.isnan(log.series["loss"][1]).all()
    assert np.isfinite(log.series["lr"][1]).all()
