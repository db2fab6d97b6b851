"""What nanoGPT and its kin print: points are read, the source code before them is not."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from poise.postmortem import Log, read_log
from poise.postmortem.readers import nanogpt
from poise.postmortem.readers.source import RESTARTED, Source

TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gpt2_124m_modded_nanogpt_muon.csv"

CODE = '''import os
import sys
with open(sys.argv[0]) as f:
    code = f.read()  # the program puts itself into its log
class Net(nn.Module):
    """Prints lines such as
step:0/40 val_loss:1.2345 train_time:1ms step_avg:nanms
    """
    def forward(self, x):
        return x  # step:10/40 val_loss:3.0000
for step in range(40):
    print0(f"step:{step}/{n} val_loss:{val_loss:.4f} train_time:{t:.0f}ms")
    print0(f"step:{step+1}/{n} train_loss:{loss.item():.4f} train_time:{t:.0f}ms")
# s:5 tel:9.0000 is how the old ones looked
iter 3: loss 1.0000, time 1.00ms, mfu 1.00%
'''
BELOW = """Running python 3.12.7
Running pytorch 2.6.0 compiled for CUDA 12.4
+-----------------------------------------+
| NVIDIA-SMI 550.90    Driver Version: 550.90    CUDA Version: 12.4 |
|   0  Some GPU   On  | 00000000:19:00.0 Off |   0 |
| N/A   38C    P0   120W / 700W |   3456MiB / 81559MiB |      0%   Default |
"""
BAR = "=" * 100 + "\n"


def read(tmp_path: Path, text: str) -> Log:
    path = tmp_path / "run.log"
    path.write_text(text)
    return read_log(path)


def restarts(path: Path) -> list[float]:
    """Return the steps of the rows before which the reader says that the program began again."""
    items = list(nanogpt.read(Source(path)))
    return [after["step"] for item, after in pairwise(items) if item is RESTARTED and isinstance(after, dict)]


def points(log: Log, name: str) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def test_nanogpt(tmp_path: Path) -> None:
    text = (
        "Overriding config with config/train.py:\n# a comment\nbatch_size = 12 # times 5\nlearning_rate = 6e-4\n\n"
        "Overriding: max_iters = 40\nOverriding: out_dir = 'out'\ntokens per iteration will be: 491,520\n"
        "number of parameters: 123.59M\n"
        "step 0: train loss 10.9900, val loss 10.9800\n"
        "iter 0: loss 10.9876, time 9000.00ms, mfu -100.00%\n"
        "iter 10: loss nan, time 123.45ms, mfu 10.50%\n"
        "iter 20: loss 8.5000, time 123.45ms, mfu 10.00%\n"
        "step 30: train loss 7.5000, val loss 7.6000\nsaving checkpoint to out\n"
        "iter 30: loss 7.0000, time 150.00ms, mfu 10.00%\n"
    )
    log = read(tmp_path, text)
    assert log.format == "nanogpt"
    losses = points(log, "loss")
    assert list(losses) == [0, 10, 20, 30] and losses[0] == 10.9876 and losses[30] == 7.0
    assert math.isnan(losses[10])
    assert points(log, "val_loss") == {0: 10.98, 30: 7.6}
    assert points(log, "train_loss_estimate") == {0: 10.99, 30: 7.5}
    assert points(log, "mfu")[30] == 10.0
    assert log.settings == {
        "batch_size": "12",
        "learning_rate": "6e-4",
        "max_iters": "40",
        "out_dir": "out",
        "tokens_per_step": "491520",
    }
    assert restarts(log.path) == []


def test_nanogpt_resumed(tmp_path: Path) -> None:
    first = "tokens per iteration will be: 1,000\n" + "".join(f"iter {i}: loss 5.0, time 1.0ms\n" for i in range(6))
    again = "Resuming training from out\niter 4: loss 4.5, time 1.0ms\niter 5: loss 4.4, time 1.0ms\n"
    log = read(tmp_path, first + "tokens per iteration will be: 1,000\n" + again)
    assert points(log, "loss") == {0: 5.0, 1: 5.0, 2: 5.0, 3: 5.0, 4: 4.5, 5: 4.4}
    assert restarts(log.path) == [4]
    assert restarts(read(tmp_path, first).path) == []


def test_code_inside_a_modded_log_gives_no_points(tmp_path: Path) -> None:
    rows = "step:0/40 val_loss:10.8258 train_time:278ms step_avg:nanms\n"
    for step in range(1, 41):
        rows += f"step:{step}/40 train_loss:{10 - step / 10:.4f} train_time:{step}ms step_avg:1.00ms\n"
        if step % 20 == 0:
            rows += f"step:{step}/40 val_loss:{9 - step / 10:.4f} train_time:{step}ms step_avg:1.00ms\n"
    log = read(tmp_path, CODE + BAR + BELOW + BAR + rows + "peak memory consumption: 31587 MiB\n")
    assert log.format == "nanogpt"
    assert points(log, "loss") == {step: round(10 - step / 10, 4) for step in range(1, 41)}
    assert points(log, "val_loss") == {0: 10.8258, 20: 7.0, 40: 5.0}
    assert log.settings["num_iterations"] == "40"


def test_validation_losses_alone_are_a_log(tmp_path: Path) -> None:
    rows = "".join(f"step:{s}/1500 val_loss:{11 - s / 500:.5f} train_time:{s / 10:.3f}s\n" for s in range(0, 1501, 125))
    log = read(tmp_path, CODE + BAR + BELOW + BAR + rows)
    assert list(points(log, "val_loss")) == list(range(0, 1501, 125))
    assert "loss" not in log.series


def test_few_losses_among_many_timings(tmp_path: Path) -> None:
    rows = "".join(
        f"step:{s}/800 val_loss:{9 - s / 400:.4f} train_time:{s}ms\n"
        if s % 400 == 0
        else f"step:{s}/800 train_time:{s}ms step_avg:95.00ms\n"
        for s in range(801)
    )
    assert points(read(tmp_path, CODE + BAR + rows), "val_loss") == {0: 9.0, 400: 8.0, 800: 7.0}


def test_code_alone_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(CODE)
    assert nanogpt.sniff(Source(tmp_path / "train.py")) == 0.0
    (tmp_path / "test.py").write_text(CODE + "s = '''\n" + "step:1/9 val_loss:3.0 t:1ms\n" * 12 + "'''\nassert s\n" * 3)
    assert nanogpt.sniff(Source(tmp_path / "test.py")) == 0.0


def test_nanochat(tmp_path: Path) -> None:
    text = (
        "Total batch size 524,288 => gradient accumulation steps: 1\nStep 00000 | Validation bpb: 3.2282\n"
        + "".join(
            f"step {i:05d}/00200 ({i / 2:.2f}%) | loss: {9 - i / 100:.6f} | grad norm: 1.{i:02d} | lrm: 1.00 | "
            f"dt: 500.00ms | tok/sec: 1,048,576 | mfu: 12.34 | total time: 0.00m\n"
            for i in range(30)
        )
    )
    log = read(tmp_path, text)
    assert points(log, "loss") == {i: round(9 - i / 100, 6) for i in range(30)}
    assert points(log, "grad_norm")[29] == 1.29
    assert points(log, "val_bpb") == {0: 3.2282} and points(log, "tok/sec")[3] == 1048576
    assert log.settings == {"tokens_per_step": "524288", "num_iterations": "200"}
    assert any("running mean" in note for note in log.notes)


def test_build_nanogpt_puts_the_validation_before_its_step(tmp_path: Path) -> None:
    text = "total desired batch size: 524288\n=> calculated gradient accumulation steps: 32\n"
    for i in range(20):
        if i % 10 == 0:
            text += f"validation loss: {9.5 - i / 10:.4f}\nHellaSwag accuracy: 2948/10042=0.2936\n"
        text += (
            f"step {i:5d} | loss: {9 - i / 10:.6f} | lr {1e-4:.4e} | norm: 1.2500 | dt: 338.00ms | tok/sec: 1551.25\n"
        )
    log = read(tmp_path, text)
    assert points(log, "loss") == {i: round(9 - i / 10, 6) for i in range(20)}
    assert points(log, "val_loss") == {0: 9.5, 10: 8.5} and points(log, "hellaswag") == {0: 0.2936, 10: 0.2936}
    assert set(points(log, "lr").values()) == {1e-4} and set(points(log, "grad_norm").values()) == {1.25}


def test_log_file_of_build_nanogpt(tmp_path: Path) -> None:
    log = read(tmp_path, "0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\n1 train 10.5\n2 train 10.25\n2 val 10.2\n")
    assert points(log, "loss") == {0: 10.955029, 1: 10.5, 2: 10.25}
    assert points(log, "val_loss") == {0: 10.9511, 2: 10.2} and points(log, "hellaswag") == {0: 0.2463}


def test_ranks_and_stamps_before_a_line(tmp_path: Path) -> None:
    text = "".join(f"[rank{r}]: iter {i}: loss {5 - i / 10}, time 1.00ms\n" for i in range(5) for r in range(2))
    assert points(read(tmp_path, text), "loss") == {i: 5 - i / 10 for i in range(5)}
    stamped = "".join(f"[2025-01-01 10:00:0{i}] iter {i}: loss {5 - i / 10}, time 1.00ms\n" for i in range(5))
    assert points(read(tmp_path, stamped), "loss") == {i: 5 - i / 10 for i in range(5)}


@pytest.mark.skipif(not TRACE.exists(), reason="no traces here")
def test_a_real_run_in_its_own_format(tmp_path: Path) -> None:
    """The trace was taken from such a log; put back into that format it is the same."""
    rows = [line.split(",")[:2] for line in TRACE.read_text().splitlines()[1:]]
    text = (
        CODE + BAR + BELOW + "".join(f"step:{s}/5100 train_loss:{x} train_time:1ms step_avg:1.00ms\n" for s, x in rows)
    )
    assert points(read(tmp_path, text), "loss") == {int(s): float(x) for s, x in rows}


def test_one_of_several_ranks_counts(tmp_path: Path) -> None:
    text = "".join(
        f"{r}: iter {s}: loss {9 - s / 10 + r:.4f}, time 1.00ms, mfu 1.00%\n" for s in range(20) for r in (1, 0, 2)
    )
    log = read(tmp_path, text)
    assert log.format == "nanogpt"
    assert points(log, "loss") == pytest.approx({s: 9 - s / 10 for s in range(20)}, abs=1e-3)
    assert log.restarts == ()


def test_a_last_line_that_is_cut_off(tmp_path: Path) -> None:
    text = "".join(f"iter {s}: loss {9 - s / 10:.4f}, time 1.00ms, mfu 1.00%\n" for s in range(20))
    log = read(tmp_path, text[: -len("00, time 1.00ms, mfu 1.00%\n")])
    assert max(points(log, "loss")) == 18
