"""Any program's lines with a step and a loss; prose, code and dumps of arguments give nothing."""

from __future__ import annotations

import gc
import gzip
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.postmortem import Log, read_log
from poise.postmortem.readers import stdout
from poise.postmortem.readers.source import Source

N = 30
LOSSES = [round(9 - i / 10, 4) for i in range(N)]
Form = tuple[Callable[[int, float], str], list[int], set[str]]


def every(step: int = 1, first: int = 0) -> list[int]:
    return [first + step * i for i in range(N)]


def fairseq(i: int, x: float) -> str:
    stamp = "2020-01-01 10:00:00 | INFO | "
    out = f"{stamp}train_inner | epoch 00{1 + i // 15}:  {i % 15 + 1} / 15 loss={x}, ppl=9, "
    out += f"num_updates={100 * i}, lr=0.001, gnorm=1.2\n"
    if i % 15 == 14:  # an evaluation, and a summary of the epoch
        out += f"{stamp}valid | epoch 001 | valid on 'valid' subset | loss 2.5 | ppl 4 | num_updates {100 * i}\n"
        out += f"{stamp}train | epoch 001 | loss 99.0 | ppl 4 | num_updates {100 * i} | lr 0.001\n"
    return out


def composer(i: int, x: float) -> str:
    out = f"0: [epoch=1][batch={i + 1}/30]:\n0:      Train time/batch: {i}\n"
    out += "0:      Train trainer/device_train_microbatch_size: 8\n"
    out += f"0:      Train loss/train/total: {x}\n0:      Train l2_norm/grad/global: 1.5\n"
    if i % 10 == 9:
        out += "0: [eval batch=1/9]:\n0: [eval batch=9/9]:\n0:      Eval metrics/eval/LanguageCrossEntropy: 2.5\n"
    return out


def levanter(i: int, x: float) -> str:
    stamp = "2025-01-01T10:00:00 - 0 - tqdm_loggable - INFO - Progress on:"
    rest = "rate:1.2it/s remaining:00:10 elapsed:00:01 postfix:"
    return f"{stamp}train {10.0 * i}it/300it {rest}loss={x}\n{stamp}eval {1.0 * i}it/30it {rest}loss=1.0\n"


FORMS: dict[str, Form] = {
    "comma": (lambda i, x: f"Step {10 * i}, loss={x}\n", every(10), set()),
    "bars": (
        lambda i, x: f"epoch {1 + i // 10} | step {i % 10 + 1}/10 | train_loss {x} | lr 1e-3 | gnorm 1.5\n",
        every(first=1),
        {"lr", "grad_norm"},
    ),
    "levels": (
        lambda i, x: (
            f"2025-01-01 00:00:00 INFO [train.py:123] step {i} | loss: {x} | grad norm: 1.5 | "
            f"tokens: 1.5M | eval_loss: 2.5\n"
        ),
        every(),
        {"grad_norm", "tokens", "val_loss"},
    ),
    "tqdm": (
        lambda i, x: f"train:  {i}%|█▌   | {10 * i}/300 [00:01<00:30, 1.5it/s, loss={x}]\r",
        every(10),
        set(),
    ),
    "levanter": (levanter, every(10), set()),
    "lightning": (
        lambda i, x: (
            f"Epoch {i // 10}: {i}%|███▌ | {i % 10 + 1}/10 [00:45<05:32, 2.65it/s, v_num=0, train_loss={x}]\r"
            + ("Validation: 100%|█| 8/8 [00:01, 3it/s, loss=1.0]\r" if i % 10 == 9 else "")
        ),
        every(first=1),
        set(),
    ),
    "maxtext": (
        lambda i, x: f"completed step: {i}, seconds: 0.5, TFLOP/s/device: 100.1, total_weights: 65536, loss: {x}\n",
        every(),
        {"TFLOP/s/device"},
    ),
    "fairseq": (fairseq, every(100), {"lr", "grad_norm", "val_loss"}),
    "metaseq": (
        lambda i, x: (
            f'2021-03-08 12:31:36 | INFO | train_inner | {{"epoch": 1, "update": {i / 30:.3f}, "loss": "{x}", '
            f'"num_updates": "{i + 1}", "lr": "2e-05", "gnorm": "20.751", "loss_scale": "4"}}\n'
        ),
        every(first=1),
        {"lr", "grad_norm", "loss_scale"},
    ),
    "composer": (composer, every(first=1), {"grad_norm", "val_loss"}),
    "litgpt": (
        lambda i, x: (
            f"Epoch 1 | iter {2 * i + 1} step {i} | loss train: {x + 1}, val: n/a | iter time: 82.31 ms\n"
            f"Epoch 1 | iter {2 * i + 2} step {i} | loss train: {x}, val: {2.5 if i == 9 else 'n/a'} | "
            f"iter time: 2 ms (step)\n"
        ),
        every(),
        {"val_loss"},
    ),
    "meters": (
        lambda i, x: f"Epoch: [{i // 10}][ {i % 10}/10]\tTime 0.411 ( 0.512)\tLoss {x} ({x + 1:.4f})\tAcc@1 0.0\n",
        every(),
        set(),
    ),
    "keras": (lambda i, x: f"{i + 1}/30 [==>....] - ETA: 1s - loss: {x} - accuracy: 0.5\r", every(first=1), set()),
    "json": (
        lambda i, x: f'INFO:root:{{"step": {i}, "train/loss": {x}, "train/grad_norm": 1.5}}\n',
        every(),
        {"grad_norm"},
    ),
    "ranks": (lambda i, x: "".join(f"[rank{r}]: step: {i} loss: {x}\n" for r in range(4)), every(), set()),
    "tensors": (lambda i, x: f"step={i} loss=tensor({x}, device='cuda:0', grad_fn=<X>)\n", every(), set()),
    "thousands": (lambda i, x: f"step {1000 * i:,}/30,000: loss {x}; lr 1e-3\n", every(1000), {"lr"}),
}


def read(tmp_path: Path, text: str) -> Log:
    path = tmp_path / "run.log"
    path.write_text(text)
    return read_log(path)


def points(log: Log, name: str) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path: Path, name: str) -> None:
    line, steps, columns = FORMS[name]
    log = read(tmp_path, "Loading data ...\n" + "".join(line(i, x) for i, x in enumerate(LOSSES)))
    assert log.format == "stdout"
    assert points(log, "loss") == dict(zip(steps, LOSSES, strict=True))
    assert columns <= set(log.series)
    assert "tokens" not in columns or set(points(log, "tokens").values()) == {1.5e6}
    assert set(points(log, "val_loss").values()) == {2.5} if "val_loss" in columns else "val_loss" not in log.series
    assert "grad_norm" not in columns or set(points(log, "grad_norm").values()) <= {1.5, 1.2, 20.751}


def test_lines_without_a_step_are_counted(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(f"loss: {x}, gnorm: 1.5, lr: {1e-3 * (30 - i)}\n" for i, x in enumerate(LOSSES)))
    assert points(log, "loss") == dict(zip(range(1, N + 1), LOSSES, strict=True))


def test_nan_and_inf_are_values(tmp_path: Path) -> None:
    values = ["5.5", "nan", "-inf", "inf", "NaN", "4.5", "-nan(ind)"]
    log = read(tmp_path, "".join(f"step {i} loss {x} lr 1e-3\n" for i, x in enumerate(values)))
    got = list(points(log, "loss").values())
    assert [math.isnan(x) for x in got[:6]] == [False, True, False, False, True, False]
    assert got[2:4] == [-math.inf, math.inf]


def test_evaluation_lines_are_no_training_loss(tmp_path: Path) -> None:
    text = "".join(f"iteration {i}: loss {x}\n" for i, x in enumerate(LOSSES))
    text += "Evaluation at iteration 29: loss 2.5\n"
    log = read(tmp_path, text)
    assert points(log, "loss")[29] == LOSSES[29]
    assert points(log, "val_loss") == {29: 2.5}


def test_the_later_branch_counts(tmp_path: Path) -> None:
    text = "".join(f"step {i} loss 5.0\n" for i in range(10)) + "".join(f"step {i} loss 4.0\n" for i in range(6, 9))
    assert points(read(tmp_path, text), "loss") == {**dict.fromkeys(range(6), 5.0), 6: 4.0, 7: 4.0, 8: 4.0}


def test_a_rewind_within_an_epoch_is_no_new_epoch(tmp_path: Path) -> None:
    rows = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4), (1, 2), (1, 3), (1, 4), (2, 1)]
    log = read(tmp_path, "".join(f"epoch {e} step {s}/4 loss {i}.0\n" for i, (e, s) in enumerate(rows)))
    assert points(log, "loss") == {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 8, 7: 9, 8: 10, 9: 11}


ARGUMENTS = "".join(f"{name}: {i}\n" for i, name in enumerate(("step", "loss_scale", "lr", "warmup_steps", "seed"))) * 4
PROSE = "In step 3 the loss is 2.5 and falls.\nWe lower the lr to 1e-4 at step 100.\nThen, at step 200, loss 2.25.\n"
CODE = (
    "import os\nimport sys\ndef main():\n    step = 0; loss = 0.0\n"
    + "".join(f"    check(step={i}, loss={i}.5)\n" for i in range(9))
    + "def again():\n    assert step == 3 and loss < 2.5\n"
)
README = "# Training\n\nYou see this:\n\n```\n" + "".join(f"step {i} | loss 3.{i}\n" for i in range(5)) + "```\n"


@pytest.mark.parametrize(
    "text", [ARGUMENTS, PROSE + "And so on.\n" * 80, CODE * 2, README + "More words.\n" * 60, "\n"]
)
def test_what_is_no_log(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text)
    assert stdout.sniff(Source(path)) == 0.0


def test_this_very_repository_is_no_log() -> None:
    root = Path(__file__).resolve().parents[2]
    files = sorted([*root.glob("src/poise/postmortem/**/*.py"), *root.glob("docs/*.md"), Path(__file__)])
    assert [str(path) for path in files if stdout.sniff(Source(path))] == []


def test_the_score_is_below_all_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text("".join(f"step {i} loss 5.0\n" for i in range(10)))
    assert 0 < stdout.sniff(Source(path)) <= 0.25


@pytest.mark.parametrize(
    "bit",
    [
        "a ",
        "1",
        "a=",
        "step 1",
        "1/",
        "loss nan ",
        "a_b/c.d-e ",
        "| 1/2",
        "1,",
        "(",
        "1it/",
        "[[[",
        "=======",
        "x y z w ",
    ],
)
def test_long_lines_take_no_time(tmp_path: Path, bit: str) -> None:
    """A line of 300 kB, and one just short enough to be looked into, twenty times."""
    path = tmp_path / "run.log"
    rows = "".join(f"step {i} loss 5.0\n" for i in range(10))
    path.write_text(rows + bit * (300_000 // len(bit)) + "\n" + (bit * (3990 // len(bit)) + "\n") * 20 + rows)
    began = time.process_time()
    assert len(points(read_log(path), "loss")) == 10
    assert time.process_time() - began < 5.0  # a quadratic pattern takes minutes


@settings(max_examples=60, deadline=None)
@example("loss: 1e999 step 5/0 epoch inf lr: 1.5E")
@example("| 99999999999999999999/2 [ , loss=1] 1.2.3it/4it")
@given(st.text(alphabet="step los:=/|[]().,-+einfaNK0123456789%\"' ²٣", max_size=120))
def test_no_line_breaks_it(text: str) -> None:
    found = stdout.take_apart(text, stdout.Meanings())
    assert all(isinstance(value, float) for value in found.row.values())


@pytest.mark.parametrize("name", FORMS)
def test_cut_anywhere(tmp_path: Path, name: str) -> None:
    """Only the last row may be spoiled by a cut, and nothing is raised but a refusal."""
    line, steps, _ = FORMS[name]
    whole = "".join(line(i, x) for i, x in enumerate(LOSSES)).encode()
    for cut in range(len(whole) // 2, len(whole), max(1, len(whole) // 25)):
        path = tmp_path / "run.log"
        path.write_bytes(whole[:cut])
        try:
            got = points(read_log(path), "loss")
        except UserError:
            pytest.fail("half a log is a log")
        right = dict(zip(steps, LOSSES, strict=True))
        assert sum(right.get(step) != value for step, value in got.items()) <= 1


NOISE = "".join(
    f"node{i % 8}:123:45 [{i % 8}] NCCL INFO Channel {i % 32:02d}/0 : {i}[2] -> 7[3] via P2P/CUMEM\n"
    for i in range(15_000)
)
"""More than a reader's first look at a file."""

ROWS = "".join(f"step {i} loss {x}\n" for i, x in enumerate(LOSSES))
TRUE = dict(enumerate(LOSSES))


@pytest.mark.parametrize("early", [0, 3])
def test_much_noise_before_the_first_steps_or_after_them(tmp_path: Path, early: int) -> None:
    assert len(NOISE) > 1 << 20
    lines = ROWS.splitlines(keepends=True)
    log = read(tmp_path, "".join(lines[:early]) + NOISE + "".join(lines[early:]))
    assert points(log, "loss") == TRUE


def test_many_short_lines_of_noise(tmp_path: Path) -> None:
    assert points(read(tmp_path, "compiling 1\n" * 21_000 + ROWS), "loss") == TRUE


def test_a_first_record_beyond_the_first_look(tmp_path: Path) -> None:
    config = json.dumps({"config": {f"name_{i:040d}": i for i in range(25_000)}})
    rows = "".join(json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(LOSSES))
    log = read(tmp_path, config + "\n" + rows)
    assert log.format == "jsonl" and points(log, "loss") == TRUE


def test_noise_after_noise_in_utf16(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_bytes((NOISE + ROWS).encode("utf-16"))
    assert points(read_log(tmp_path / "run.log"), "loss") == TRUE


def test_few_losses_among_noise_when_they_are_alike(tmp_path: Path) -> None:
    noise = "".join(f"some library says {i}\n" for i in range(60))
    text = "".join(noise + line for line in ROWS.splitlines(keepends=True)[:5])
    assert points(read(tmp_path, text), "loss") == dict(list(TRUE.items())[:5])
    quoted = "".join(noise + f'"step {i} loss {9 - i}"\n' for i in range(5))
    (tmp_path / "run.log").write_text(quoted)
    assert stdout.sniff(Source(tmp_path / "run.log")) == 0.0


def test_two_lines_are_too_few_and_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 lines with a loss are too few"):
        read(tmp_path, "hello\nstep 1 loss 2.5\nstep 2 loss 2.4\n")
    with pytest.raises(UserError, match="1 line with a loss is too few"):
        read(tmp_path, "step 1 loss 2.5\n")


def test_a_pipe_is_read_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    pipe = tmp_path / "stdin"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(gzip.compress(ROWS.encode())))
    writer.start()
    log = read_log(pipe)
    writer.join()
    assert (log.name, points(log, "loss")) == ("stdin", TRUE)
    del log
    gc.collect()
    assert list(spool.iterdir()) == []


def test_the_null_device_is_empty() -> None:
    with pytest.raises(UserError, match="is empty"):
        read_log("/dev/null")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x28\xb5\x2f\xfd1234", "zstd -d"),
        (b"PK\x03\x04step 1 loss 2.5\n", "zip archive"),
        (b"PAR1 step", "Parquet"),
        (b"x" * 257 + b"ustar" + b"\nstep 1 loss 2.5\n" * 30, "tar archive"),
        (gzip.compress(b"x" * 257 + b"ustar" + b"\nstep 1 loss 2.5\n" * 30), "tar archive"),
    ],
)
def test_archives_are_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "run.log").write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_log(tmp_path / "run.log")


def test_a_short_compressed_log_that_is_cut_off(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"step {i} loss {9 - i / 777:.6f}\n" for i in range(400)).encode())
    (tmp_path / "run.log.gz").write_bytes(packed[: 3 * len(packed) // 4])
    assert len(points(read_log(tmp_path / "run.log.gz"), "loss")) > 100


MARKED = {
    "mark behind": "step {} loss 1.5 (validation)\n",
    "line above": "Running evaluation...\nstep {} loss 1.5\n",
    "held out": "heldout step {} loss 1.5\n",
    "maxtext": "eval metrics after step: {}, loss=1.5, total_weights=7\n",
    "mlx": "Iter {}: Val loss 1.5, Val took 2.5s\n",
}


@pytest.mark.parametrize("name", MARKED)
def test_marks_of_validation(tmp_path: Path, name: str) -> None:
    step = "Iter {}: Train loss {}\n" if name == "mlx" else "step {} loss {}\n"
    text = "".join(step.format(i, x) + (MARKED[name].format(i) if i % 10 == 9 else "") for i, x in enumerate(LOSSES))
    log = read(tmp_path, text)
    assert points(log, "loss") == TRUE
    assert points(log, "val_loss") == {9: 1.5, 19: 1.5, 29: 1.5}


EPOCHS: dict[str, tuple[Callable[[int, float], str], int]] = {
    "most copied": (lambda i, x: f"Epoch [{i // 6 + 1}/5], Step [{100 * (i % 6 + 1)}/600], Loss: {x}\n", 100),
    "line above": (
        lambda i, x: ("" if i % 6 else f"Epoch {i // 6 + 1}/5\n") + f"  batch {i % 6 + 1}/6 - loss: {x}\n",
        1,
    ),
    "padded": (
        lambda i, x: f"Epoch: [{i // 6}][{i % 6 + 1:>5d}/{6:>5d}]\tTime  0.241 (  0.300)\tLoss {x:.4e} ({9.0:.4e})\n",
        1,
    ),
    "tutorial": (lambda i, x: f"[{i // 6 + 1}, {2000 * (i % 6 + 1):5d}] loss: {x}\n", 2000),
    "epochs alone": (lambda i, x: f"epoch {i + 1}, loss {x}, train acc 0.5, test acc 0.4\n", 1),
    "keras": (lambda i, x: f"Epoch {i + 1}/30\n100/100 - 5s - 50ms/step - loss: {x} - accuracy: 0.5\n", 1),
    "dotted": (lambda i, x: f"=== Iteration {i + 1} ===\n  train loss ....... {x}\n  learning rate .... 0.001\n", 1),
    "above": (lambda i, x: f"Loss: {x}\nLR: 0.001\nStep: {i + 1} done\n", 1),
    "tensor": (lambda i, x: f"Step {i + 1}: loss tensor({x}, device='cuda:0', grad_fn=<X>) lr [0.001]\n", 1),
    "lost colours": (lambda i, x: f"[1;32mstep[0m [36m{i + 1}[0m [35mloss[0m=[33m{x}[0m\n", 1),
    "comma": (lambda i, x: f"step {i + 1} loss {x:.3f} lr 0,001\n".replace(".", ","), 1),
}


@pytest.mark.parametrize("name", EPOCHS)
def test_epochs_and_odd_forms(tmp_path: Path, name: str) -> None:
    line, every = EPOCHS[name]
    log = read(tmp_path, "".join(line(i, x) for i, x in enumerate(LOSSES)))
    assert points(log, "loss") == {every * (i + 1): x for i, x in enumerate(LOSSES)}
    assert log.step_unit == ("rows" if name in ("epochs alone", "keras") else "steps")


def test_a_handful_of_epochs(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(f"Epoch {i}/5: train_loss={9 - i}.5, val_loss={9 - i}.75\n" for i in range(1, 6)))
    assert points(log, "loss") == {i: 9.5 - i for i in range(1, 6)}
    assert points(log, "val_loss") == {i: 9.75 - i for i in range(1, 6)}


def interleaved(line: Callable[[int, int, float], str]) -> str:
    """Return what three ranks print, each of which may be a step ahead of another."""
    out = []
    for i in range(0, N, 2):
        pair = range(i, min(i + 2, N))
        out += [line(2, j, LOSSES[j] + 2) for j in pair] + [line(0, i, LOSSES[i])]
        out += [line(1, i, LOSSES[i] + 1)] + [line(r, j, LOSSES[j] + r) for j in list(pair)[1:] for r in (0, 1)]
    return "".join(out)


@pytest.mark.parametrize("before", ["[rank{}]: ", "{}: ", "[rank {}] ", "[default{}]:", "[1,{}]<stdout>: ", "rank={} "])
def test_one_of_several_ranks_counts(tmp_path: Path, before: str) -> None:
    log = read(tmp_path, interleaved(lambda r, i, x: before.format(r) + f"step {i} loss {x}\n"))
    assert points(log, "loss") == TRUE
    assert log.restarts == ()
    assert any("rank 0" in note for note in log.notes)


def test_ranks_without_a_name(tmp_path: Path) -> None:
    log = read(tmp_path, interleaved(lambda r, i, x: f"step {i} loss {x - r:.4f}\n"))
    assert points(log, "loss") == TRUE
    assert log.restarts == ()


def test_numbers_in_front_of_lines_are_no_ranks_when_they_are_steps(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(f"{i}: step {i} loss {x}\n" for i, x in enumerate(LOSSES)))
    assert points(log, "loss") == TRUE


def test_the_last_number_of_a_file_without_a_last_line_end(tmp_path: Path) -> None:
    rows = "".join(f"step {i} loss {x:.4f} lr 3e-4\n" for i, x in enumerate(LOSSES))
    for cut in range(1, 24):
        log = read(tmp_path, rows[:-cut])
        assert points(log, "loss").items() <= TRUE.items()
        assert set(points(log, "lr").values()) == {3e-4}
    assert any("no end" in note for note in read(tmp_path, rows[:-2]).notes)


def test_lines_of_deepspeed_beside_ones_own(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        "".join(
            f"[INFO] [logging.py:96:log_dist] [Rank 0] step={i}, skipped=0, lr=[{1e-4 * (i + 1)}], mom=[(0.9, 0.95)]\n"
            f"Epoch 0, step {i}, loss: {x}\n"
            for i, x in enumerate(LOSSES)
        ),
    )
    assert points(log, "loss") == TRUE
    assert points(log, "lr") == pytest.approx({i: 1e-4 * (i + 1) for i in range(N)})


def test_a_dump_of_arguments_is_no_step(tmp_path: Path) -> None:
    dump = "Namespace(lr=0.5, loss_scale=None, max_steps=100, step=0, loss='cross_entropy')\n"
    log = read(tmp_path, dump + "".join(f"step {i} loss {x} lr 3e-4\n" for i, x in enumerate(LOSSES)))
    assert set(points(log, "lr").values()) == {3e-4}


def test_lines_written_alike_are_read_as_if_taken_apart(tmp_path: Path) -> None:
    """Enough lines for patterns to be made of them; some differ in their blanks, words, signs or digits."""
    forms = (
        "12:00:{s:02d},123 step {i} | loss {x:.4f} | lr {y:.2e} | gnorm {z}\n",
        "12:00:{s:02d},123 step {i}/999 | loss {x:8.3f} | lr -{y} | gnorm {z:.0f}\n",
        "step {i:>6} A100 | loss {x:e} lr {y:.6f} gnorm nan\n",
        "step {i} [eval.py:{s}] loss {x:.1f}\n",
    )
    rows = [(i, 9 - i / 100, 1e-3 / (1 + i), i % 7 / 2) for i in range(400)]
    lines = [forms[i // 50 % 3].format(i=i, s=i % 60, x=x, y=y, z=z) for i, x, y, z in rows]
    log = read(tmp_path, "".join(lines))
    meaning = stdout.Meanings()
    apart = [stdout.take_apart(line.strip(), meaning).row for line in lines]
    for name, raw in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "gnorm")):
        assert list(points(log, name)) == list(range(400))
        assert list(points(log, name).values()) == pytest.approx([row[raw] for row in apart], nan_ok=True, rel=0, abs=0)


def test_ranks_are_only_those_that_tell_of_the_same_steps(tmp_path: Path) -> None:
    text = "".join(f"{i // 10}: step {i} loss {x}\n" for i, x in enumerate(LOSSES))
    assert points(read(tmp_path, text), "loss") == TRUE


def test_steps_that_start_anew_without_an_epoch(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(f"batch {i % 6 + 1}/6 - loss: {x}\n" for i, x in enumerate(LOSSES)))
    assert points(log, "loss") == {i + 1: x for i, x in enumerate(LOSSES)}


def test_losses_above_their_step_in_a_log_that_is_not_at_its_end(tmp_path: Path) -> None:
    text = "".join(f"Loss: {x}\nStep {i} done\n" for i, x in enumerate(LOSSES)) + "Loss: 1.0\n"
    assert points(read(tmp_path, text), "loss") == TRUE
