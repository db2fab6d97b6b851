"""CSV as Lightning, W&B and TensorBoard export it, and with the ranks of a launcher before each line."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.postmortem import Log, read_log
from poise.postmortem.readers import table
from poise.postmortem.readers.source import Source


def read(tmp_path: Path, text: str, **columns: str) -> Log:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    return read_log(path, **columns)


def points(log: Log, name: str) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def test_lightning_rows_are_sparse(tmp_path: Path) -> None:
    text = "epoch,lr-AdamW,step,train_loss,val_loss\n"
    for i in range(30):
        text += f",0.00{i % 9 + 1},{i},,\n0,,{i},{9 - i / 10:.1f},\n"
        if i % 10 == 9:
            text += f"0,,{i},,{5 - i / 10:.1f}\n"
    log = read(tmp_path, text)
    assert log.format == "table"
    assert points(log, "loss") == {i: round(9 - i / 10, 1) for i in range(30)}
    assert points(log, "val_loss") == {9: 4.1, 19: 3.1, 29: 2.1}
    assert points(log, "lr")[3] == 0.004 and len(points(log, "lr")) == 30


def test_lightning_validation_first_and_nan(tmp_path: Path) -> None:
    text = "epoch,step,train_loss_epoch,train_loss_step,val_loss\n" + "0,0,,,8.0\n" * 25
    text += "0,1,,5.0,\n0,2,,nan,\n0,2,5.5,,\n0,2,,,inf\n"
    log = read(tmp_path, text)
    assert points(log, "val_loss") == {0: 8.0, 2: float("inf")}
    assert [str(x) for x in points(log, "train_loss_step" if "train_loss_step" in log.series else "loss").values()] == [
        "5.0",
        "nan",
    ]


def test_wandb_export_of_two_runs(tmp_path: Path) -> None:
    names = [f"{run} - train/loss{end}" for run in ("run-1", "run-2") for end in ("", "__MIN", "__MAX")]
    text = ",".join(f'"{name}"' for name in ["Step", *names]) + "\n"
    text += "".join(f'"{i}","{9 - i}","{9 - i}","{9 - i}","{7 - i}","{7 - i}",""\n' for i in range(6))
    log = read(tmp_path, text)
    assert points(log, "loss") == {i: 9 - i for i in range(6)}
    assert any("run-1" in note and "run-2" in note and "--loss-column" in note for note in log.notes)
    other = read(tmp_path, text, loss_column="run-2 - train/loss")
    assert points(other, "loss") == {i: 7 - i for i in range(6)}


def test_tensorboard_export(tmp_path: Path) -> None:
    log = read(tmp_path, "Wall time,Step,Value\n" + "".join(f"17000000{i}.5,{10 * i},{5 - i}\n" for i in range(5)))
    assert points(log, "loss") == {10 * i: 5 - i for i in range(5)}


@pytest.mark.parametrize("rank", ["[rank{}]: ", "[rank{}] ", "[default{}]:\t", "{}: ", "rank {}: "])
def test_ranks_before_each_line(tmp_path: Path, rank: str) -> None:
    text = rank.format(0) + "step,loss,grad_norm\n"
    text += "".join(f"{rank.format(r)}{i},{5 - i / 2},1.5\n" for i in range(6) for r in range(2))
    log = read(tmp_path, text)
    assert points(log, "loss") == {i: 5 - i / 2 for i in range(6)}
    assert set(points(log, "grad_norm").values()) == {1.5}


def test_a_row_number_before_a_colon_is_the_step_when_nothing_else_is(tmp_path: Path) -> None:
    """``3: 2.5`` are two columns, not a rank and a number."""
    path = tmp_path / "losses.txt"
    path.write_text("step: loss\n" + "".join(f"{i}: {5 - i}\n" for i in range(5)))
    found = table.find_layout(Source(path).head_lines)
    assert found is None or not found.ranked


@pytest.mark.parametrize(
    "text",
    [
        "def poly(y, coef):\n    a, b = 1, 2\n" * 20,
        "from x import a, b\nfrom y import c, d\n" * 20,
        "libraries, whose documentation has been helpful\nfor many of the algorithms in it\n* Wikipedia;\n" * 9,
        "| what | how |\n|---|---|\n| a | 1 |\n| b | some |\n",
        ">>> for line in lines:\n...     print(line)\n0 1\n0 2\n1 2\n" + "words and words\n" * 40,
    ],
)
def test_code_and_prose_are_no_tables(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.txt").write_text(text)
    assert table.sniff(Source(tmp_path / "x.txt")) == 0.0
