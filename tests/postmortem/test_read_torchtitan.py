"""torchtitan's output: steps of any rank, validation, settings, restarts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from poise.postmortem import Log, read_log
from poise.postmortem.readers import torchtitan
from poise.postmortem.readers.source import RESTARTED, Source

LOSSES = Path(__file__).resolve().parents[3] / "shared" / "logs" / "torchtitan_losses__llama3_cuda.txt"

STAMP = "[titan] 2025-01-01 00:00:00,000 - root - INFO - "


def line(step: int, loss: object, rank: str = "", **more: object) -> str:
    rest = "".join(f"\x1b[36m{name}: {value}  " for name, value in more.items())
    return (
        f"{rank}{STAMP}\x1b[31mstep: {step:2}  \x1b[32mloss: {loss:>8}  {rest}"
        f"\x1b[36mmemory: 10.00GiB(12.34%)  \x1b[34mtps: 1,234  \x1b[36mtflops: 1,012.30  \x1b[35mmfu: N/A\x1b[0m\n"
    )


def read(tmp_path: Path, text: str) -> Log:
    path = tmp_path / "run.log"
    path.write_text(text)
    return read_log(path)


def restarts(path: Path) -> list[float]:
    """Return the steps of the rows before which the reader says that the program began again."""
    items = list(torchtitan.read(Source(path)))
    return [after["step"] for item, after in pairwise(items) if item is RESTARTED and isinstance(after, dict)]


def points(log: Log, name: str) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def test_steps_validation_and_settings(tmp_path: Path) -> None:
    text = f"[rank0]:{STAMP}Starting job: Llama 3 debug training\n"
    text += f"[rank0]:{STAMP}Running with args: {{\n"
    for row in ('  "training": {', '    "seq_len": 2048,', '    "compile": false', "  },", '  "profiling": {},'):
        text += f"[rank0]:{row}\n"
    for row in ('  "optimizer": {', '    "name": "AdamW",', '    "lr": 0.0008', "  }", "}"):
        text += f"[rank0]:{row}\n"
    text += (
        f"[rank0]:{STAMP}Trainer is initialized with local batch size 8, global batch size 64, "
        "gradient accumulation steps 1, sequence length 2048, total steps 40 (warmup 2)\n"
        f"[rank0]:{STAMP}Training starts at step 1\n"
    )
    for step in (1, 10, 20, 30, 40):
        text += line(step, 9 - step / 10, "[rank0]:", grad_norm=1.25, global_max_loss=9.5)
        if step == 20:
            text += f"[rank0]:{STAMP}validate step: 20  loss:  7.1250  memory:  5.00GiB(6.00%)  tps: 12,345\n"
    log = read(tmp_path, text)
    assert log.format == "torchtitan"
    assert points(log, "loss") == {1: 8.9, 10: 8.0, 20: 7.0, 30: 6.0, 40: 5.0}
    assert set(points(log, "grad_norm").values()) == {1.25}
    assert points(log, "val_loss") == {20: 7.125}
    assert points(log, "tps")[40] == 1234 and points(log, "tflops")[40] == 1012.3 and points(log, "memory")[1] == 10
    assert log.settings["training.seq_len"] == "2048" and log.settings["optimizer.name"] == "AdamW"
    assert log.settings["global_batch_size"] == "64" and log.settings["tokens_per_step"] == str(64 * 2048)
    assert log.settings["warmup_steps"] == "2"
    assert restarts(log.path) == []


def test_ranks_interleave_and_nan_stays(tmp_path: Path) -> None:
    text = "".join(line(s, "nan" if s == 3 else 5.5, f"[rank{r}]:") for s in range(1, 6) for r in range(3))
    log = read(tmp_path, text)
    assert list(points(log, "loss")) == [1, 2, 3, 4, 5]
    assert [s for s, x in points(log, "loss").items() if x != x] == [3]


def test_restart(tmp_path: Path) -> None:
    begin = "".join(f"[rank{r}]:{STAMP}Training starts at step 1\n" for r in range(2))
    again = "".join(f"[rank{r}]:{STAMP}Training starts at step 4.\n" for r in range(2))
    log = read(tmp_path, begin + "".join(line(s, 5.0) for s in range(1, 7)) + again + line(4, 4.5) + line(5, 4.4))
    assert points(log, "loss") == {1: 5.0, 2: 5.0, 3: 5.0, 4: 4.5, 5: 4.4}
    assert restarts(log.path) == [4]


def test_a_log_that_begins_with_a_resumed_run(tmp_path: Path) -> None:
    log = read(tmp_path, f"{STAMP}Training starts at step 101\n" + "".join(line(s, 3.0) for s in range(101, 111)))
    assert restarts(log.path) == [101]


def test_older_lines_and_plain_ones(tmp_path: Path) -> None:
    stamp = "2024-10-03 15:02:11,234 - root - INFO - "
    text = "".join(
        f"{stamp}step: {s:2}  loss: {9 - s / 10:7.4f}  memory: 1.00GiB(3%)  wps: 1,7{s:02}\n" for s in range(1, 8)
    )
    assert points(read(tmp_path, text), "loss") == {s: round(9 - s / 10, 4) for s in range(1, 8)}


def test_an_example_in_a_readme_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    prose = "Some words about training, and how the loss is shown at each step: as below.\n"
    path.write_text(prose * 60 + "```\n" + line(1, 9.0) + line(10, 8.0) + "```\n" + prose * 80)
    assert torchtitan.sniff(Source(path)) == 0.0
    path.write_text("logger.info(f'step: {step:2}  loss: {loss:7.4f}  tps: {tps:,}')\n" * 5)
    assert torchtitan.sniff(Source(path)) == 0.0
    assert torchtitan.sniff(Source(Path(__file__))) == 0.0


@pytest.mark.skipif(not LOSSES.exists(), reason="no real logs here")
def test_real_loss_file_is_a_table() -> None:
    log = read_log(LOSSES)
    losses = list(points(log, "loss").values())
    assert (log.format, len(losses), losses[0], losses[-1]) == (
        "table",
        100,
        pytest.approx(8.0491, abs=5e-5),
        pytest.approx(2.7465, abs=5e-5),
    )


def test_one_of_several_ranks_counts(tmp_path: Path) -> None:
    text = "".join(line(s, 9.0 - s / 10 + r, f"[rank{r}]:") for s in range(1, 20) for r in (2, 0, 1))
    assert "[rank2]:" in text
    log = read(tmp_path, text)
    assert points(log, "loss") == pytest.approx({s: 9.0 - s / 10 for s in range(1, 20)}, abs=1e-3)
    assert any("rank 0" in note for note in log.notes)


def test_steps_below_a_megabyte_of_noise(tmp_path: Path) -> None:
    noise = "".join(f"host{i % 8}:1:2 [{i % 8}] NCCL INFO Channel {i}/0 via P2P\n" for i in range(30_000))
    log = read(tmp_path, noise + "".join(line(s, 5.0) for s in range(1, 7)))
    assert (log.format, len(points(log, "loss"))) == ("torchtitan", 6)
