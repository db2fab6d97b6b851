"""CSV as Lightning, W&B and TensorBoard export it, and with the ranks of a launcher before each line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poise.core.errors import UserError
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


# -- what words say of the numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("head", ["step,tag,value", "tag,step,value", "step,metric_name,value"])
def test_long_tables_have_a_column_for_each_tag(tmp_path: Path, head: str) -> None:
    text = head + "\n"
    for s in range(1, 21):
        for tag, value in (("train/loss", 9 - s / 4), ("train/lr", 0.1), ("eval/loss", 8.0)):
            cells = {"step": s, "tag": tag, "metric_name": tag, "value": value}
            text += ",".join(str(cells[name]) for name in head.split(",")) + "\n"
    log = read(tmp_path, text)
    assert points(log, "loss") == {s: 9 - s / 4 for s in range(1, 21)}
    assert set(points(log, "lr").values()) == {0.1} and set(points(log, "val_loss").values()) == {8.0}


def test_a_long_table_of_two_runs_gives_the_first(tmp_path: Path) -> None:
    text = "run,metric,step,value\n" + "".join(f"{run},loss,{s},{run}.5\n" for run in (7, 8) for s in range(9))
    text = text.replace("\n7,", "\na,").replace("\n8,", "\nb,")
    log = read(tmp_path, text)
    assert points(log, "loss") == dict.fromkeys(range(9), 7.5)
    assert any("other runs than 'a'" in note for note in log.notes)


@pytest.mark.parametrize("head", ["step,value,policy_loss", "timestamp,host,value", "timestamp,metric,value"])
def test_a_value_is_no_loss(tmp_path: Path, head: str) -> None:
    row = {"step": "{}", "value": "7{}.5", "policy_loss": "0.1", "timestamp": "17{}", "host": "a", "metric": "temp"}
    text = (
        head
        + "\n"
        + "".join(",".join(row[name] for name in head.split(",")).replace("{}", f"{i:02}") + "\n" for i in range(30))
    )
    with pytest.raises(UserError, match="no loss in"):
        read(tmp_path, text)


def test_tensorboard_says_what_it_exports_by_the_name_of_the_file(tmp_path: Path) -> None:
    text = "Wall time,Step,Value\n" + "".join(f"17000000{i}.5,{10 * i},{5 - i}\n" for i in range(5))
    path = tmp_path / "run-x-tag-train_grad_norm.csv"
    path.write_text(text)
    assert set(read_log(path).series) == {"grad_norm", "Wall time"}


@pytest.mark.parametrize("column", ["split", "phase", "mode", "Stage", "event"])
@pytest.mark.parametrize("held_out", ["val", "validation", "eval_step", "test"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_training_and_validation_under_one_name(tmp_path: Path, column: str, held_out: str, form: str) -> None:
    rows: list[tuple[str, int, float]] = []
    for s in range(1, 31):
        rows += [("train", s, 9 - s / 8)] + [(held_out, s, 8.5)] * (s % 10 == 0)
    text = f"{column},step,loss,lr\n" + "".join(f"{split},{s},{x},0.1\n" for split, s, x in rows)
    if form == "jsonl":
        text = "".join(json.dumps({column: split, "step": s, "loss": x, "lr": 0.1}) + "\n" for split, s, x in rows)
    log = read(tmp_path, text)
    assert points(log, "loss") == {s: 9 - s / 8 for s in range(1, 31)}
    assert points(log, "val_loss") == {10: 8.5, 20: 8.5, 30: 8.5} and len(points(log, "lr")) == 30


def test_a_stage_that_is_always_dev_says_nothing(tmp_path: Path) -> None:
    log = read(tmp_path, "stage,step,loss\n" + "".join(f"dev,{s},{9 - s}\n" for s in range(5)))
    assert points(log, "loss") == {s: 9 - s for s in range(5)}


@pytest.mark.parametrize("column", ["rank", "local_rank", "process_index"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_of_several_ranks(tmp_path: Path, column: str, form: str) -> None:
    rows = [(s + lag, r, s + lag + r / 10) for s in range(0, 60, 2) for r, lag in ((2, 1), (1, 0), (1, 1), (2, 0))]
    text = f"{column},step,loss\n" + "".join(f"{r},{s},{x}\n" for s, r, x in rows)
    if form == "jsonl":
        text = "".join(json.dumps({column: r, "step": s, "loss": x}) + "\n" for s, r, x in rows)
    log = read(tmp_path, text)
    assert points(log, "loss") == {s: s + 0.1 for s in range(60)}
    assert log.restarts == () and any(f"than '{column}' 1 left out" in note for note in log.notes)


def test_a_rank_that_is_measured_is_no_process(tmp_path: Path) -> None:
    log = read(tmp_path, "step,loss,rank\n" + "".join(f"{s},{9 - s},{s % 3}\n" for s in range(9)))
    assert len(points(log, "loss")) == len(points(log, "rank")) == 9


# -- cells -------------------------------------------------------------------------------------------


def test_the_last_cell_of_an_unfinished_line_may_be_cut_off(tmp_path: Path) -> None:
    rows = "".join(f"{s},{5 - s / 8:.3f}\n" for s in range(1, 9))
    log = read(tmp_path, "step,loss\n" + rows + "9,3.8")
    assert list(points(log, "loss")) == list(range(1, 9)) and any("may be cut off" in note for note in log.notes)
    assert len(points(read(tmp_path, "step,loss\n" + rows + "9,3.8\n"), "loss")) == 9
    assert len(points(read(tmp_path, "step,loss\n" + rows + "9,3.875"), "loss")) == 9
    swapped = "loss,step\n" + "".join(f"{6 - s / 8:.3f},{100 * s}\n" for s in range(1, 31)) + "2.125,31"
    assert list(points(read(tmp_path, swapped), "loss"))[-1] == 3000


@pytest.mark.parametrize("folders", ["mlruns/0/abc/metrics", "."])
def test_mlflow_metric(tmp_path: Path, folders: str) -> None:
    path = tmp_path / folders / "train_loss"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{1700000000000 + 900 * s} {9 - s / 8} {10 * s}\n" for s in range(30)))
    assert points(read_log(path), "loss") == {10 * s: 9 - s / 8 for s in range(30)}
    if folders != ".":
        (path.parent / "gpu_power").write_bytes(path.read_bytes())
        with pytest.raises(UserError, match="no loss in"):
            read_log(path.parent / "gpu_power")


def test_thousands_in_quotes(tmp_path: Path) -> None:
    log = read(
        tmp_path, "step,loss,tokens\n" + "".join(f'"{s:,}","2.5","{s * 4096:,}"\n' for s in range(500, 9500, 500))
    )
    assert list(points(log, "loss")) == list(range(500, 9500, 500)) and points(log, "tokens")[9000] == 9000 * 4096


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_decimal_commas(tmp_path: Path, delimiter: str) -> None:
    rows = [(f"{s:,}", f"{5 - s / 8000:.3f}".replace(".", ","), "0,0001") for s in range(500, 5500, 500)]
    text = "\n".join(delimiter.join(row) for row in [("step", "loss", "lr"), *rows]) + "\n"
    log = read(tmp_path, text)
    assert points(log, "loss") == {s: float(f"{5 - s / 8000:.3f}") for s in range(500, 5500, 500)}
    assert set(points(log, "lr").values()) == {0.0001}


def test_a_table_that_gains_a_column(tmp_path: Path) -> None:
    text = "step,loss\n" + "".join(f"{s},2.5\n" for s in range(9)) + "".join(f"{s},2.25,0.1\n" for s in range(9, 20))
    log = read(tmp_path, text)
    assert points(log, "loss") == {s: 2.5 if s < 9 else 2.25 for s in range(20)}
    assert any("more cells than the header's 2 names" in note for note in log.notes)


def test_two_lines_in_one_are_left_out(tmp_path: Path) -> None:
    text = "step,loss\n" + "".join(f"{s},2.5\n" for s in range(9)) + "9,2.510,2.5\n11,2.512,2.5\n13,2.5\n"
    log = read(tmp_path, text)
    assert list(points(log, "loss")) == [*range(9), 13] and any("without 2 cells" in note for note in log.notes)
    assert len(points(read(tmp_path, "step,loss\n" + "".join(f"{s},2.5,\n" for s in range(9))), "loss")) == 9
