"""Logs as people have them: read right, or refused in one line that says what was looked for."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core import journal
from poise.core.errors import UserError
from poise.postmortem import Log, branches, read_log
from poise.postmortem.readers import jsonl as json_lines
from poise.postmortem.readers import names

SHARED = Path(__file__).resolve().parents[3] / "shared"


def read(tmp_path: Path, text: str | bytes, name: str = "run.csv", **columns: str) -> Log:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path, **columns)


def losses(log: Log) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series["loss"]), strict=True))


def said(log: Log, text: str) -> bool:
    return any(text in note for note in log.notes)


# -- tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "step,loss,grad_norm,lr\n1,2.5,1.0,1e-3\n2,2.25,0.5,2e-3\n",
        "step\tloss\tgrad_norm\tlr\n1\t2.5\t1.0\t1e-3\n2\t2.25\t0.5\t2e-3\n",
        "step;loss;grad_norm;lr\n1;2,5;1,0;0,001\n2;2,25;0,5;0,002\n",
        "Iteration | LM loss | grad-norm | learning rate\n1 | 2.5 | 1.0 | 1e-3\n2 | 2.25 | 0.5 | 2e-3\n",
        "# step loss grad_norm lr\n1 2.5 1.0 1e-3\n2 2.25 0.5 2e-3\n",
        '"Step","run, 7 - train/loss","run, 7 - train/grad_norm","lr (max)"\n"1","2.5","1","1e-3"\n2,2.25,.5,2e-3',
    ],
)
def test_tables_in_every_dress(tmp_path: Path, text: str) -> None:
    log = read(tmp_path, text)
    assert log.format == "table"
    assert losses(log) == {1: 2.5, 2: 2.25}
    assert log.series["grad_norm"][1].tolist() == [1.0, 0.5]
    assert log.series["lr"][1].tolist() == [1e-3, 2e-3]
    assert log.series["loss"][0].dtype == np.int64 and log.series["loss"][1].dtype == np.float64


def test_no_header(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(f"{s} {8.05 - s / 8}\n" for s in range(1, 13)), "losses.txt")
    assert losses(log) == {s: 8.05 - s / 8 for s in range(1, 13)}
    assert said(log, "no header")


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{s},{70 + s % 7},{s % 3}\n" for s in range(60)),  # whole numbers: some count
        "".join(f"{s} {s * 1.5}\n" for s in range(60)),  # rises all the way
        "".join(f"{s} {9 - s / 8}\n" for s in range(9)),  # too few
        "".join(f"{s % 5} {9 - s / 8}\n" for s in range(60)),  # nothing that counts
    ],
)
def test_numbers_without_a_name_that_are_no_loss(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="looked for"):
        read(tmp_path, text, "numbers.txt")


def test_nan_and_inf_are_values_and_absent_is_not(tmp_path: Path) -> None:
    log = read(
        tmp_path, "step,loss,grad_norm\n1,nan,1\n2,NaN,\n3,inf,null\n4,-inf,N/A\n5,-nan(ind),2\n6,,3\n7,oops,4\n"
    )
    steps, values = log.series["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(values[[0, 1, 4]]).all() and values[2] == math.inf and values[3] == -math.inf
    assert log.series["grad_norm"][0].tolist() == [1, 5, 6, 7]
    assert said(log, "no number left out (at line 8)")


def test_dirt_is_tolerated_and_noted(tmp_path: Path) -> None:
    text = "\ufeffstep,loss\r\n\r\n1,\x1b[31m2.5\x1b[0m\r\n2,2.25\r\n\r\n\x00\x003,2.0\r\n4"
    log = read(tmp_path, text)
    assert losses(log) == {1: 2.5, 2: 2.25, 3: 2.0}
    for remark in ("byte-order mark", "carriage returns", "blank line left out (2 times", "colour codes", "cut off"):
        assert said(log, remark), (remark, log.notes)


def test_clean_log_has_no_notes(tmp_path: Path) -> None:
    assert read(tmp_path, "step,loss\n1,2\n2,3\n").notes == ()


def test_utf16_as_a_windows_shell_writes_it(tmp_path: Path) -> None:
    assert losses(read(tmp_path, "step,loss\r\n1,2.5\r\n2,2\r\n".encode("utf-16"))) == {1: 2.5, 2: 2.0}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ""])
def test_compressed(tmp_path: Path, suffix: str) -> None:
    """Known by its first bytes, not by its name."""
    press = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": gzip.compress}[suffix]
    log = read(tmp_path, press(b"step,loss\n1,2.5\n2,2\n"), "run.v2.csv" + suffix)
    assert losses(log) == {1: 2.5, 2: 2.0}
    assert log.name == "run.v2"


def test_cut_off_gzip_gives_what_is_there(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random(40_000)
    whole = gzip.compress(("step,loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(rows))).encode())
    log = read(tmp_path, whole[: len(whole) // 2])
    assert 10_000 < len(log.series["loss"][0]) < 30_000
    assert said(log, "damaged or cut off")


def test_header_is_found_below_a_preamble_and_may_change(tmp_path: Path) -> None:
    text = "run of Tuesday\nhost a1\nstep,loss\n1,5\n2,4\nstep,loss\n3,3\nstep,loss,lr\n4,2,0.1\n"
    log = read(tmp_path, text)
    assert losses(log) == {1: 5, 2: 4, 3: 3, 4: 2}
    assert log.series["lr"][0].tolist() == [4]
    assert said(log, "before the header left out (2 times") and said(log, "header met again")


def test_an_open_quote_spoils_one_line_only(tmp_path: Path) -> None:
    assert losses(read(tmp_path, 'step,loss,note\n1,5,"a\n2,4,b\n3,3,"c, d"\n')) == {1: 5, 2: 4, 3: 3}


def test_rows_without_steps_are_counted(tmp_path: Path) -> None:
    log = read(tmp_path, "loss,lr\n5,1\n4,1\n3,1\n")
    assert losses(log) == {1: 5, 2: 4, 3: 3}
    assert said(log, "counted from 1")


def test_columns_by_option(tmp_path: Path) -> None:
    text = "t,objective,loss\n10,5,1\n20,4,1\n"
    log = read(tmp_path, text, step_column="t", loss_column="objective")
    assert losses(log) == {10: 5, 20: 4}
    assert log.series["loss (other)"][1].tolist() == [1, 1]
    with pytest.raises(UserError, match=r"--loss-column is 'objektive'.*did you mean 'objective'"):
        read(tmp_path, text, step_column="t", loss_column="objektive")
    with pytest.raises(UserError, match="--step-column is 'x'"):
        read(tmp_path, text, step_column="x")


# -- JSON lines ----------------------------------------------------------------------------------------


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("step", "loss"),
    [
        ("step", "loss"),
        ("iter", "train/loss"),
        ("iteration", "lm loss"),
        ("global_step", "train_loss"),
        ("_step", "train/loss"),
        ("trainer/global_step", "train/CE loss"),
        ("num_updates", "train_nll_loss"),
    ],
)
def test_json_lines_by_any_name(tmp_path: Path, step: str, loss: str) -> None:
    records = [{step: s, loss: 3.0 - s, "learning_rate": 1e-3, "run": "a", "done": False} for s in (1, 2)]
    log = read(tmp_path, jsonl(*records), "log.jsonl")
    assert log.format == "jsonl"
    assert losses(log) == {1: 2.0, 2: 1.0}
    assert set(log.series) == {"loss", "lr"}


def test_the_trackers_own_counter_gives_way(tmp_path: Path) -> None:
    records = [{"_step": 2 * s, "train/global_step": s, "train/loss": 5.0, "_runtime": 1.0} for s in (1, 2, 3)]
    log = read(tmp_path, jsonl(*records))
    assert list(losses(log)) == [1, 2, 3]


def test_hugging_face_log(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        jsonl(
            {"loss": 5.0, "grad_norm": 1.0, "learning_rate": 1e-4, "epoch": 0.1, "step": 10},
            {"loss": 4.0, "grad_norm": "nan", "learning_rate": 1e-4, "epoch": 0.2, "step": 20},
            {"eval_loss": 4.5, "epoch": 0.2, "step": 20},
            {"train_runtime": 9.0, "train_loss": 4.5, "epoch": 0.2, "step": 20},
        ),
    )
    assert losses(log) == {10: 5.0, 20: 4.0}
    assert log.series["val_loss"][0].tolist() == [20] and log.series["val_loss"][1].tolist() == [4.5]
    assert log.series["epoch"][1].tolist() == [0.1, 0.2]
    assert np.isnan(log.series["grad_norm"][1][1])
    assert said(log, "closing summary")


def test_json_numbers_as_python_writes_them(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity, "train": {"ppl": 7}}\n{"step": 3, "loss": "-inf"}\n'
    log = read(tmp_path, text + '{"step": 4, "lo')
    assert np.isnan(losses(log)[1]) and losses(log)[2] == math.inf and losses(log)[3] == -math.inf
    assert log.series["train/ppl"][1].tolist() == [7]
    assert said(log, "the last line is cut off and left out (at line 4)")


@pytest.mark.parametrize("nan", ["nan", "NAN", "-nan", "NaN", "nan(ind)"])
def test_json_lines_of_programs_that_do_not_know_json(tmp_path: Path, nan: str) -> None:
    text = ""
    for s in range(1, 7):
        text += f'{{"note": "nan, \\"inf", "step": {s}, "loss": {nan if s > 3 else 2.5}, "grad_norm": inf}}\n'
    log = read(tmp_path, text + f'{{"step": 7, "loss": {nan}, "x": nano}}\n')
    steps, values = log.series["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6] and np.isnan(values).tolist() == [False] * 3 + [True] * 3
    assert set(log.series["grad_norm"][1].tolist()) == {math.inf}
    assert said(log, "cut off")


def test_nan_within_words_is_left_alone() -> None:
    assert json_lines.loads('{"nan": 1, "a\\"nan": -INF, "b": [+inf], "c": "x nan y"}') == {
        "nan": 1,
        'a"nan': -math.inf,
        "b": [math.inf],
        "c": "x nan y",
    }
    for text in ('{"a": nano}', '{"a": x.nan}', '"' * 99_999, '{"a": "' + '\\"' * 99_999, "nan" * 99_999):
        assert json_lines.loads(text) is None


def test_a_loss_that_is_null_to_the_end_was_nan(tmp_path: Path) -> None:
    def log_of(*values: float | None, **more: float) -> Log:
        return read(tmp_path, jsonl(*({"step": s, "loss": x, "lr": 0.1} | more for s, x in enumerate(values, 1))))

    log = log_of(3.0, None, 2.5, *[None] * 5)
    assert list(losses(log)) == [1, 3, 4, 5, 6, 7, 8] and np.isnan(log.series["loss"][1][2:]).all()
    assert said(log, "'loss' is null in the last 5 rows") and len(log.series["lr"][0]) == 8
    assert list(losses(log_of(3.0, 2.5, *[None] * 4))) == [1, 2]
    assert list(losses(log_of(3.0, *[None] * 9, 2.5))) == [1, 11]
    assert list(losses(log_of(3.0, 2.5, *[None] * 9, eval_loss=2.0))) == [1, 2]


def test_sparse_columns_keep_their_own_steps(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 1.0} | ({"val/loss": 2.0} if s % 5 == 0 else {}) for s in range(1, 21)]
    log = read(tmp_path, jsonl(*records))
    assert log.series["val_loss"][0].tolist() == [5, 10, 15, 20]


def test_summary_column_is_not_the_loss(tmp_path: Path) -> None:
    """A well-named column with few values loses against one that is there on every row."""
    records = [{"step": s, "train_lm_loss": float(s)} | ({"loss": -1.0} if s == 9 else {}) for s in range(1, 10)]
    log = read(tmp_path, jsonl(*records))
    assert losses(log)[9] == 9.0
    assert said(log, "--loss-column chooses")


# -- what counts ---------------------------------------------------------------------------------------


def test_the_later_branch_counts(tmp_path: Path) -> None:
    first = [{"step": s, "loss": 1.0, "grad_norm": 1.0} for s in range(1, 11)]
    old_eval = [{"step": 9, "eval_loss": 7.0}]
    again = [{"step": s, "loss": 2.0} for s in range(6, 9)]
    log = read(tmp_path, jsonl(*first, *old_eval, *again))
    assert losses(log) == dict.fromkeys(range(1, 6), 1.0) | dict.fromkeys(range(6, 9), 2.0)
    assert log.series["grad_norm"][0].tolist() == [1, 2, 3, 4, 5, 6]  # 7 to 10 belong to a branch that is gone
    assert "val_loss" not in log.series
    assert said(log, "seam: the steps go back from 10 to 6")


def test_split_rows_of_one_step_are_no_rewind(tmp_path: Path) -> None:
    records = [{"step": s, name: 1.0} for s in range(1, 6) for name in ("grad_norm", "loss", "lr")]
    log = read(tmp_path, jsonl(*records))
    assert all(log.series[name][0].tolist() == [1, 2, 3, 4, 5] for name in ("grad_norm", "loss", "lr"))
    assert log.notes == ()


def test_repeated_steps_and_falling_steps(tmp_path: Path) -> None:
    log = read(tmp_path, "step,loss\n1,9\n1,8\n2,7\n")
    assert losses(log) == {1: 8, 2: 7}
    assert said(log, "more than one loss")
    log = read(tmp_path, "step,loss\n3,7\n2,8\n1,9\n")
    assert losses(log) == {1: 9, 2: 8, 3: 7}
    assert said(log, "read from the end")


@pytest.mark.parametrize(
    "rows",
    [
        [*range(1, 101), 3, *range(101, 121)],
        [*range(1, 121), 20],  # "Best: step 20 loss 5.1"
        [*range(1, 121), 20, 30],
        [*range(1, 121), 60, 40, 20],
        [*range(1, 50), 3, 4, *range(50, 121)],
        [s for t in range(10, 121, 10) for s in (*range(t - 9, t + 1), max(t - 9, 1))],  # "best so far: step 11"
        [*range(1, 100), 98, *range(100, 121)],
    ],
)
def test_stray_rows_do_not_wipe_out_the_log(tmp_path: Path, rows: list[int]) -> None:
    text, seen = "step,loss\n", set[int]()
    for s in rows:
        text += f"{s},{-1 if s in seen else s}\n"
        seen.add(s)
    log = read(tmp_path, text)
    assert losses(log) == {s: s for s in range(1, 121)}
    assert said(log, "stray") and not said(log, "seam") and log.restarts == ()


def test_three_rising_rows_are_a_rewind_and_two_are_not(tmp_path: Path) -> None:
    def after(*again: int) -> dict[int, float]:
        text = "".join(f"{s},1\n" for s in range(10, 210, 10)) + "".join(f"{s},2\n" for s in again)
        return losses(read(tmp_path, "step,loss\n" + text))

    assert list(after(100, 110)) == list(range(10, 210, 10)) and set(after(100, 110).values()) == {1}
    assert after(100, 110, 120) == {s: 1.0 if s < 100 else 2.0 for s in range(10, 130, 10)}
    assert after(195, 200, 210)[195] == 2.0 and after(195, 200, 210)[190] == 1.0
    assert after(100, 110, 120, 50)[120] == 2.0


def test_a_stray_row_does_not_touch_the_other_columns(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 5.0 - s / 10, "lr": 0.1} for s in range(1, 31)]
    log = read(tmp_path, jsonl(*rows, {"step": 8, "loss": 1.0}, {"step": 30, "eval_loss": 2.5}))
    assert len(losses(log)) == 30 and len(log.series["lr"][0]) == 30 and log.series["val_loss"][0].tolist() == [30]


@pytest.mark.parametrize("first", [0, 1, 10])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_steps_that_start_anew_in_each_epoch_are_counted_on(tmp_path: Path, first: int, form: str) -> None:
    every = 10 if first == 10 else 1
    points = [(epoch, first + every * i) for epoch in range(3) for i in range(20)]
    text = "epoch,batch,loss\n" + "".join(f"{e},{s},{9 - e - i / 80}\n" for i, (e, s) in enumerate(points))
    if form == "jsonl":
        text = jsonl(*({"epoch": e, "batch": s, "loss": 9.0 - i / 80} for i, (e, s) in enumerate(points)))
    log = read(tmp_path, text)
    assert list(losses(log)) == [first + every * i for i in range(60)]
    assert said(log, "counted on (3 epochs)") and not said(log, "seam") and log.restarts == ()


def test_a_run_that_went_back_an_epoch_is_not_counted_on(tmp_path: Path) -> None:
    points = [(0, s) for s in range(1, 11)] + [(1, s) for s in range(1, 7)] + [(0, s) for s in range(5, 11)]
    points += [(1, s) for s in range(1, 11)]
    log = read(tmp_path, "epoch,step,loss\n" + "".join(f"{e},{s},{i}\n" for i, (e, s) in enumerate(points)))
    assert list(losses(log)) == list(range(1, 21)) and losses(log)[5] == 16 and losses(log)[20] == len(points) - 1
    assert log.restarts == (5,)


def test_a_small_step_back_begins_no_epoch() -> None:
    steps = np.array([10, 20, 30, 25, 40])
    assert branches.count_on(steps, np.array([1.0, 1.0, 1.0, 1.1, 1.2])) == 0 and steps.tolist() == [10, 20, 30, 25, 40]


def test_fractions_of_an_epoch_go_back_with_a_rewind(tmp_path: Path) -> None:
    rows = [*range(10, 310, 10), *range(210, 410, 10)]
    log = read(tmp_path, "step,loss,epoch\n" + "".join(f"{s},{9 - s / 100},{s / 100}\n" for s in rows))
    assert list(losses(log)) == list(range(10, 410, 10)) and said(log, "seam")


@pytest.mark.parametrize("column", ["batch", "step"])
def test_a_step_that_never_changes_is_none(tmp_path: Path, column: str) -> None:
    log = read(tmp_path, f"{column},loss\n" + "".join(f"32,{9 - s}\n" for s in range(4)))
    assert losses(log) == {s + 1: 9 - s for s in range(4)} and said(log, f"'{column}' is the same in all rows")
    log = read(tmp_path, f"{column},itr,loss\n" + "".join(f"32,{10 * s},{9 - s}\n" for s in range(4)))
    assert list(losses(log)) == [0, 10, 20, 30] and log.step_unit == "steps"


# -- journals ------------------------------------------------------------------------------------------


def write_journal(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(journal.to_json({"time": 1.0, **record}) + "\n" for record in records))


def step_record(step: int, loss: float) -> dict[str, Any]:
    return {
        "type": "step",
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 64 * step,
        "action": "x",
    }


def test_run_folder_with_rollback_and_layers(tmp_path: Path) -> None:
    folder = tmp_path / "nano"
    folder.mkdir()
    layer = {"attn_logit_max@block.0": 9.0}
    write_journal(
        folder / "journal.jsonl",
        [
            {"type": "run", "format": 1, "recipe": {}, "command": "", "environment": {}},
            *(step_record(s, 1.0) for s in range(1, 8)),
            {"type": "layers", "step": 3, "readings": layer},
            {"type": "layers", "step": 7, "readings": layer},
            {"type": "eval", "step": 4, "loss": 5.0},
            {"type": "rollback", "step": 7, "to": 4},
            step_record(5, math.nan),
        ],
    )
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"type": "step", "st')
    log = read_log(folder)
    assert (log.format, log.name) == ("poise", "nano")
    steps, values = log.series["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5] and np.isnan(values[4])
    assert log.series["attn_logit_max@block.0"][0].tolist() == [3]
    assert log.series["val_loss"][0].tolist() == [4]
    assert log.series["tokens"][1][1] == 128
    assert said(log, "went back 1 times") and said(log, "cut off")
    assert losses(read_log(folder / "journal.jsonl")).keys() == losses(log).keys()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["steps", "eval", "rollback", "resume"]), st.integers(1, 9)), max_size=12))
def test_journal_counts_as_the_timeline_does(tmp_path_factory: pytest.TempPathFactory, moves: list[Any]) -> None:
    records, step, loss = [step_record(1, 0.0)], 1, 0.0
    for move, n in moves:
        match move:
            case "steps":
                for _ in range(n):
                    step, loss = step + 1, loss + 1
                    records.append(step_record(step, loss))
            case "eval":
                records.append({"type": "eval", "step": step, "loss": loss})
            case "rollback":
                step = max(step - n, 1)
                records.append({"type": "rollback", "step": step + n, "to": step})
            case "resume":  # the next record is a step, as in a run
                step, loss = max(step - n, 1) + 1, loss + 1
                records.append(step_record(step, loss))
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    write_journal(path, records)
    kept = journal.timeline(journal.read(path))
    log = read_log(path)
    assert losses(log) == {r["step"]: r["loss"] for r in kept if r["type"] == "step"}
    evals = {r["step"]: r["loss"] for r in kept if r["type"] == "eval"}
    ours = log.series.get("val_loss", (np.array([]), np.array([])))
    assert dict(zip(*(x.tolist() for x in ours), strict=True)) == evals


# -- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "meaning"),
    [
        ("train/learning_rate", "lr"),
        ("optim/total_grad_norm", "grad_norm"),
        ("l2_norm/grad/global", "grad_norm"),
        ("validation_cross_entropy", "val_loss"),
        ("loss_metrics/global_avg_loss", "loss"),
        ("num_input_tokens_seen", "tokens"),
        ("aux_loss", None),
        ("loss_scale", None),
        ("tokens_per_s", None),
        ("step_time", None),
        ("weight_norm", None),
    ],
)
def test_what_a_column_means(raw: str, meaning: str | None) -> None:
    fitting = {m for m in [*names.ALIASES, names.VAL_LOSS] if names.rank(m, raw) is not None}
    assert fitting == ({meaning} if meaning else set())


# -- refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n\n\n", "looked for"),
        ("Dear all,\nthe run is fine, mostly.\n", "looked for"),
        (bytes(range(256)) * 4, "looked for"),
        ("name,value\nlr,0.1\nseed,1\nmodel,x\n", "looked for"),
        ("a,b\n1,2\n3,4\n", "no loss in .*--loss-column"),
        ("step,lr\n1,2\n2,4\n", "no loss in .*--loss-column"),
        ("step,loss\n1,2\n" + "something else\n" * 30 + "2,3\n", "looked for"),
        ('{"step": 1}\n{"step": 2}\n', "no loss in"),
        ("step,loss\n1,2\n2,3\n" * 10 + "noise\n" * 100, "only 20 of 120 lines"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path, text, "notes.txt")
    assert "\n" not in str(caught.value) and "notes.txt" in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "losses.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match=r"no log .*did you mean 'losses.csv'"):
        read_log(tmp_path / "losse.csv")
    assert read_log(tmp_path).path.name == "losses.csv"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        read_log(tmp_path / "empty")
    with pytest.raises(UserError, match="is empty"):
        read_log("/dev/null")
    for name in ("", "  "):
        with pytest.raises(UserError, match="name of the log is empty"):
            read_log(name)
    (tmp_path / "latest.csv").symlink_to("gone.csv")
    with pytest.raises(UserError, match=r"latest.csv' is a link to 'gone.csv', which does not exist"):
        read_log(tmp_path / "latest.csv")
    with pytest.raises(UserError, match="cannot read"):
        read_log(tmp_path / ("x" * 5000))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.csv"
    path.write_text("step,loss\n1,2\n")

    def refuse(file: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read '.*secret.csv': permission denied"):
        read_log(path)


def test_other_series_do_without_a_loss(tmp_path: Path) -> None:
    log = read(tmp_path, "step,val_loss\n10,3\n20,2\n")
    assert set(log.series) == {"val_loss"}


def test_thousands_of_columns(tmp_path: Path) -> None:
    wide = [f"rms@layers.{i}.attention.output" for i in range(4000)]
    log = read(tmp_path, ",".join(["step", "loss", *wide]) + "\n" + ("1" + ",2" * 4001 + "\n") + ("2" + ",3" * 4001))
    assert len(log.series) == 4001 and log.series[wide[-1]][1].tolist() == [2, 3]


def test_columns_share_their_steps_and_are_not_copied(tmp_path: Path) -> None:
    text = "".join(f"{s},2.5,1.0,{s if s % 3 else ''},{s if s % 3 else ''}\n" for s in range(1, 40))
    log = read(tmp_path, "step,loss,grad_norm,a,b\n" + text)
    assert np.shares_memory(log.series["loss"][0], log.series["grad_norm"][0])
    assert log.series["a"][0] is log.series["b"][0] and len(log.series["a"][0]) == 26
    assert log.series["a"][0].tolist() == log.series["a"][1].tolist()


def test_columns_of_no_known_meaning_go_when_there_are_too_many_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poise.postmortem.columns.MAX_VALUES", 400)
    text = "step,loss,odd,thing,val_loss\n"
    text += "".join(f"{s},2.5,7,8,{3 if s % 10 == 0 else ''}\n" for s in range(1, 301))
    log = read(tmp_path, text)
    assert set(log.series) == {"loss", "val_loss"} and len(losses(log)) == 300
    assert said(log, "more than 400 values; 2 columns of no known meaning left out")
    assert set(read(tmp_path, text, loss_column="thing").series) == {"loss", "loss (other)", "val_loss"}


def test_a_long_log_is_not_held_in_memory(tmp_path: Path) -> None:
    """Python's own allocations stay within a few numbers a value: no line, no record is kept."""
    import tracemalloc

    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for s in range(1, 8_001):
            file.write(f'{{"step": {s}, "loss": 2.5, "grad_norm": 1.0, "note": "{"x" * 1500}"}}\n')
    tracemalloc.start()
    log = read_log(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(log.series["loss"][0]) == 8_000
    assert peak < path.stat().st_size / 2, f"{peak} bytes for a file of {path.stat().st_size}"


@pytest.mark.skipif(not (SHARED / "logs").is_dir(), reason="the real logs are not on this machine")
def test_real_logs() -> None:
    log = read_log(SHARED / "logs" / "torchtitan_losses__llama3_cuda.txt")
    steps, values = log.series["loss"]
    assert len(steps) == 100 and round(values[0], 4) == 8.0491 and round(values[-1], 4) == 2.7465
    for path in sorted((SHARED / "traces").glob("*.csv")):
        log = read_log(path)
        rows = path.read_text().splitlines()
        assert log.format == "table" and len(log.series["loss"][0]) == len(rows) - 1, path.name
        assert set(log.notes) <= {"lines end with carriage returns (Windows, or a progress bar)"}, path.name


def test_restarts_are_the_steps_after_a_seam(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = [*range(1, 11), *range(6, 15)]
    path.write_text("step,loss\n" + "".join(f"{s},{2.0 + s / 100}\n" for s in rows))
    assert read_log(path).restarts == (6,)
    path.write_text("step,loss\n" + "".join(f"{s},2.0\n" for s in range(20, 0, -1)))
    assert read_log(path).restarts == ()


@pytest.mark.parametrize(
    "content",
    [
        b'{"type": "step", "time": 1, "step": 1, "loss": 2, "grad_norm": 1, "lr": 1, "tokens": 1}\n'
        b'{"": 1, "time": 2}\n',
        b'{"": 1}\n{"step": 1, "loss": 2.0}\n',
        b'\x18\x00\x00\x00\x00\x00\x00\x00\xa3\x7fK"',  # an event file's first length, and no more
    ],
)
def test_inputs_that_once_broke_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        read_log(path)


def test_rows_in_another_order_are_sorted(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(np.arange(1, 301))
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{s},{2.0 + s / 1000}\n" for s in order))
    log = read_log(path)
    assert log.series["loss"][0].tolist() == list(range(1, 301)) and log.restarts == ()
    assert said(log, "not in the order of their steps")


def test_a_table_below_a_long_preamble(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = "".join(f"{s},{2.0 + s / 1000}\n" for s in range(1, 61))
    path.write_text("# comment, unit, building\n" * 3000 + "step,loss\n" + rows)
    assert len(read_log(path).series["loss"][0]) == 60
