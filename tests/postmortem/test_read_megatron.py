"""Megatron's standard output: every dress of its lines, and many lines at once as one after the other."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.postmortem.log import Log, read_log
from poise.postmortem.readers import bulk, layout, megatron
from poise.postmortem.readers.source import RESTARTED, Block, Item, Source

SHARED = Path(__file__).resolve().parents[3] / "shared" / "logs"
REAL = SHARED / "megatron_stdout__bigscience_gpt2_n16.out"


def line(step: int, loss: str | None = "2.500000E+00", *, total: int = 500, skipped: int = 0, nan: int = 0) -> str:
    lm_loss = "" if loss is None else f" lm loss: {loss} |"
    return (
        f" iteration {step:8d}/{total:8d} | consumed samples: {16 * step:12d} |"
        f" elapsed time per iteration (ms): 812.4 | learning rate: {1e-4 * step / total:.3E} |"
        f" global batch size: {16:5d} |{lm_loss} loss scale: 4096.0 | grad norm: {0.5 + step / 7:.3f} |"
        f" number of skipped iterations: {skipped:3d} | number of nan iterations: {nan:3d} |"
    )


DUMP = """------------------------ arguments ------------------------
  clip_grad ....................................... 1.0
  global_batch_size ............................... 16
  rampup_batch_size ............................... None
  seq_length ...................................... 1024
  tokenizer_type .................................. GPT2BPETokenizer
-------------------- end of arguments ---------------------
"""


def items(path: Path) -> list[Item]:
    return list(megatron.read(Source(path)))


def flat(given: list[Item]) -> list[object]:
    """Return blocks taken apart into rows; values as text, so that NaN equals NaN."""
    out: list[object] = []
    for item in given:
        if isinstance(item, Block):
            length = len(next(iter(item.columns.values())))
            rows = [{name: float(values[i]) for name, values in item.columns.items()} for i in range(length)]
            out += [{name: repr(value) for name, value in row.items()} for row in rows]
        else:
            out.append({name: repr(float(value)) for name, value in item.items()} if isinstance(item, dict) else item)
    return out


def slowly(path: Path) -> list[Item]:
    """Read line by line."""
    source = Source(path)
    reader = megatron.Reader(source)
    out = [item for text in source.lines() for item in reader.line(text, source.at_end)]
    return out + reader.end()


def read(tmp_path: Path, text: str | bytes, name: str = "train.out") -> Log:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    log = read_log(path)
    assert log.format == "megatron"
    return log


def losses(log: Log) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series["loss"]), strict=True))


# -- what a line means ---------------------------------------------------------------------------------


def test_a_line_of_an_iteration(tmp_path: Path) -> None:
    log = read(tmp_path, "\n".join([line(1), line(2, "1.250000E+00"), "done"]) + "\n")
    assert losses(log) == {1: 2.5, 2: 1.25}
    assert log.series["grad_norm"][1].tolist() == [0.643, 0.786]
    assert log.series["lr"][1].tolist() == [2e-7, 4e-7]
    assert log.series["global batch size"][1].tolist() == [16.0, 16.0]


@pytest.mark.parametrize(
    "text",
    [
        "[default7]: iteration 3/ 10 | lm loss: 2.5E+00 | grad norm: 1.5 |",
        "3: [2024-10-16 04:23:00] iteration        3/      10 | lm loss: 2.5E+00 | grad norm: 1.5 |",
        " samples/sec: 51.2 | iteration        3/      10 | grad norm: 1.5 | lm_loss: 2.500000E+00 |",
        " iteration=       3/      10 | consumed_tokens=    393216 | lm_loss=2.5 | grad_norm=1.5 | speed=3 TFLOP/s",
        "Training epoch 0, iteration 3/9 | lr: 1.5e-06 | reduced_train_loss: 2.5 | grad_norm: 1.5",
        "\x1b[32m iteration 3/ 10 | lm \x1b[0mloss: 2.5E+00 | grad norm: 1.5 |\x1b[0m",
        " iteration 3/ 10 | lm loss: 2.5E+00 | grad norm: 1.5 |time (ms) | optimizer: 5.0 | lm loss: 7",
    ],
)
def test_dresses_of_a_line(tmp_path: Path, text: str) -> None:
    log = read(tmp_path, f"Step Time : 1.2s GPU utilization: 3.0MODEL_TFLOP/s/GPU\n{text}\nlast line\n")
    assert losses(log) == {3: 2.5}
    assert log.series["grad_norm"][1].tolist() == [1.5]


def test_a_loss_that_was_not_printed(tmp_path: Path) -> None:
    text = [line(1), line(2, None, skipped=1), line(3, None, skipped=1, nan=1), line(4, None), line(5, "nan"), ""]
    log = read(tmp_path, "\n".join(text))
    assert list(losses(log)) == [1, 3, 4, 5]  # 2 was skipped for its gradient and says nothing of its loss
    assert [math.isnan(loss) for loss in losses(log).values()] == [False, True, True, True]
    assert log.series["grad_norm"][0].tolist() == [1, 2, 3, 4, 5]


def test_validation(tmp_path: Path) -> None:
    rule = "-" * 60
    text = f"""{line(9)}
{rule}
 validation loss at iteration 9 | lm loss value: 2.250000E+00 | lm loss PPL: 9.487736E+00 |
{rule}
{line(10)}
 validation loss at iteration 10 on validation set | lm loss value: 2.125 | lm loss PPL: 8.3 |
 validation loss at iteration 10 on test set | lm loss value: 7.0 | lm loss PPL: 8.3 |
 validation results at iteration 11 | lm_loss value: 2.0E+00 | lm_loss_ppl value: 7.4 |
 validation loss at the end of training for val data | lm loss value: 1.75 | lm loss PPL: 5.8 |
 validation loss at iteration 12 [german] | lm loss value: 3.5 |
end
"""
    log = read(tmp_path, text)
    steps, values = log.series["val_loss"]
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == {9: 2.25, 10: 1.75, 11: 2.0}
    assert log.series["validation german lm loss"][1].tolist() == [3.5]


def test_arguments_and_restarts(tmp_path: Path) -> None:
    first = "\n".join(line(step) for step in range(1, 31))
    second = "\n".join(line(step, "1.5E+00") for step in range(21, 41))
    text = f"{DUMP}training ...\n{first}\n{DUMP}training ...\n{second}\n"
    log = read(tmp_path, text)
    assert log.settings["clip_grad"] == "1.0" and log.settings["tokenizer_type"] == "GPT2BPETokenizer"
    assert log.settings["tokens_per_step"] == str(16 * 1024)
    assert losses(log) == {step: 2.5 if step < 21 else 1.5 for step in range(1, 41)}
    found = items(tmp_path / "train.out")
    assert found.count(RESTARTED) == 1
    assert flat(found).index(RESTARTED) == 30
    (tmp_path / "b.out").write_text(f"{first}\n successfully loaded checkpoint from x at iteration 20\n{second}\n")
    assert flat(items(tmp_path / "b.out")).index(RESTARTED) == 30


def test_one_of_several_ranks_counts(tmp_path: Path) -> None:
    both = [f"[default{rank}]:{line(step)}" for step in range(1, 30) for rank in (3, 7)]
    found = flat(items_of(tmp_path, "\n".join(both) + "\n"))
    assert [row["iteration"] for row in found] == [f"{step}.0" for step in range(1, 30)]  # type: ignore[index]
    mixed = [line(step, total=total) for step in range(1, 30) for total in (100, 900)]
    assert len(flat(items_of(tmp_path, "\n".join(mixed) + "\n"))) == 29
    relay = [f"{1 + (step > 50)}: {line(step)}" for step in range(1, 101)]
    assert len(flat(items_of(tmp_path, "\n".join(relay) + "\n"))) == 100
    assert len(flat(items_of(tmp_path, "\n".join(relay[:60]) + "\n"))) == 60


def items_of(tmp_path: Path, text: str) -> list[Item]:
    (tmp_path / "train.out").write_text(text)
    return items(tmp_path / "train.out")


def test_a_last_line_cut_off_loses_its_last_cell_only(tmp_path: Path) -> None:
    whole = line(2, "1.250000E+00")
    for cut in range(0, len(whole), 3):
        found = flat(items_of(tmp_path, line(1) + "\n" + whole[:cut]))
        for row in found[1:]:
            assert isinstance(row, dict) and row.get("lm loss", "1.25") == "1.25"


def test_code_and_other_formats_are_left_alone(tmp_path: Path) -> None:
    others = [
        "log_string = ' iteration {:8d}/{:8d} |'.format(iteration, args.train_iters)\n",
        'assert parse(" iteration 5/ 10 | lm loss: 2.5 |") == 5\n',
        "step,loss\n1,2.5\n2,2.4\n",
        "iteration: 5 / 100 | lm_loss: 2.5\n",
        "[Rank 0] step=10, skipped=0, lr=[0.001], mom=[(0.9, 0.95)]\n",
    ]
    for number, text in enumerate(others):
        path = tmp_path / f"{number}.txt"
        path.write_text(text * 10)
        assert megatron.sniff(Source(path)) == 0.0


# -- many lines at once --------------------------------------------------------------------------------


def random_log(rng: random.Random, lines: int) -> str:
    """A log of everything that a Megatron log may hold, and of damage."""
    out: list[str] = []
    step = rng.choice([0, 95, 9_999_990])
    total = rng.choice([500, 10_000_000])
    while len(out) < lines:
        step += 1
        value = 10 ** rng.uniform(-8, 8)
        loss = rng.choice([f"{value:.6E}"] * 20 + [None, None, "nan", "inf", "-inf", "1_0", "1 2", "", "2.", "-1.5"])
        text = line(step, loss, total=total, skipped=rng.random() < 0.1, nan=rng.random() < 0.05)
        chance = rng.random()
        if chance < 0.04:
            text = f"[default{rng.choice([3, 7])}]:{text}"
        elif chance < 0.08:
            text = text.replace(
                "| grad", rng.choice(["|grad", "| x: 3 | grad", "| \x1b[1mgrad", "| \x00grad", "| é | grad"])
            )
        elif chance < 0.1:
            text = text[: rng.randrange(len(text))]
        elif chance < 0.12:
            text += rng.choice(["  ", "time (ms) | a: 1 |", line(step + 1), "\r", " 5", " tflops: 3.5 |"])
        elif chance < 0.14:
            text = text.replace(
                "loss scale: 4096.0 ", rng.choice(["tflops: 4.5TFLOPS ", "tflops: nanTFLOPS ", "e: 1.5E "])
            )
        elif chance < 0.15:
            step = max(0, step - rng.randrange(30))
        out.append(text)
        if rng.random() < 0.1:
            out.append(
                rng.choice(
                    [
                        DUMP,
                        "training ...",
                        "time (ms) | optimizer: 5.0",
                        "",
                        f" validation loss at iteration {step} | lm loss value: 2.5 |",
                    ]
                )
            )
    return "\n".join(out) + rng.choice(["", "\n", "\n\n", "\r\n"])


@given(st.integers(0, 10**9), st.sampled_from([200, 5000, 1 << 20]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_at_once_is_as_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, block: int, zipped: bool
) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("log") / "train.out"
    text = random_log(rng, 120).encode()
    path.write_bytes(gzip.compress(text) if zipped else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.postmortem.readers.pages.BLOCK", block)
        found = items(path)
    assert flat(found) == flat(slowly(path))


def test_most_lines_are_read_at_once(tmp_path: Path) -> None:
    """The test above would be idle if all was read one by one."""
    found = items_of(tmp_path, "\n".join(line(step) for step in range(1, 501)) + "\n")
    assert [type(item) for item in found] == [Block, dict]  # the last line may be cut off


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.sampled_from([".6E", ".1f", ".3f", ".0f", ".16g", "5d", ".2E"]),
)
@settings(max_examples=100, deadline=None)
def test_numbers_are_those_of_float(numbers: list[float], form: str) -> None:
    texts = [format(int(x) if form[-1] == "d" else x, form) for x in numbers]
    texts = [text for text in texts if len(text) < layout.WIDTH] or ["0"]
    window = np.frombuffer("".join(text.rjust(layout.WIDTH) for text in texts).encode(), np.uint8)
    values, good = layout.parse(window.reshape(len(texts), layout.WIDTH).copy())
    assert values.tolist() == [float(text) for text in texts]
    assert good is None or good.all()


@pytest.mark.parametrize("text", ["", "1 2", "1_0", ".", "-", "1.2.3", "1E", "E+05", "12a", "+-1", "1,5"])
def test_what_is_no_number_is_found_out(text: str) -> None:
    for others in (["1.5"], ["10"], [text]):
        window = np.frombuffer("".join(x.rjust(layout.WIDTH) for x in [text, *others]).encode(), np.uint8)
        _, good = layout.parse(window.reshape(-1, layout.WIDTH).copy())
        assert good is not None and not good[0]


def test_layouts_stay_few(tmp_path: Path) -> None:
    text = "\n".join(line(step).replace("grad norm", f"grad norm {'x' * (step % 70)}") for step in range(1000))
    path = tmp_path / "train.out"
    path.write_text(text + "\n")
    source = Source(path)
    scan = bulk.Scan(megatron.Reader(source))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.postmortem.readers.pages.BLOCK", 8_000)
        found = [item for page, last in megatron.pages(source) for item in scan.page(page, last)]
    assert len(flat(found)) == 1000
    assert len(scan._layouts) == bulk.MAX_LAYOUTS


def test_a_damaged_archive_gives_what_came_before(tmp_path: Path) -> None:
    data = gzip.compress("\n".join(line(step) for step in range(1, 5000)).encode())
    path = tmp_path / "train.out.gz"
    path.write_bytes(data[: len(data) // 2])
    assert flat(items(path)) == flat(slowly(path))
    assert len(flat(items(path))) > 100


@pytest.mark.skipif(not REAL.is_file(), reason="the real logs are not on this machine")
def test_the_real_log() -> None:
    log = read_log(REAL)
    steps, values = log.series["loss"]
    assert steps.tolist() == list(range(1, 63))
    assert (round(values[0], 2), round(values[-1], 2)) == (12.44, 20.44)
    assert steps[values.argmax()] == 4 and round(values.max(), 2) == 48.14
    assert log.settings["adam_beta2"] == "0.999" and log.settings["global_batch_size"] == "1024"
    assert log.settings["tokens_per_step"] == str(1024 * 1024)
    assert flat(items(REAL)) == flat(slowly(REAL))
