"""Console output of OLMo-core and OLMo."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from poise.postmortem import Log, read_log
from poise.postmortem.readers import olmo
from poise.postmortem.readers.source import RESTARTED, Source

STAMP = "2025-01-01 00:00:00.000\thost:0\tolmo_core.train.callbacks.console_logger:68\tINFO\t"


def read(tmp_path: Path, text: str) -> Log:
    path = tmp_path / "run.log"
    path.write_text(text)
    return read_log(path)


def restarts(path: Path) -> list[float]:
    """Return the steps of the rows before which the reader says that the program began again."""
    items = list(olmo.read(Source(path)))
    return [after["step"] for item, after in pairwise(items) if item is RESTARTED and isinstance(after, dict)]


def points(log: Log, name: str) -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def core(step: int, loss: object, before: str = STAMP, pad: str = "    ", eta: str = ",eta=3h4m") -> str:
    return (
        f"{before}[step={step}/1000,epoch=1{eta}]\n{pad}optim/LR (group 0)=3.000E-04\n"
        f"{pad}optim/total grad norm=0.4120\n"
        f"{pad}train/CE loss={loss}\n{pad}train/PPL=8,123\n{pad}throughput/total tokens=4.194B\n"
        f"{pad}train/block 03/load imbalance=1.05\n"
    )


def evaluation(name: str, step: int, loss: float) -> str:
    return (
        f"{STAMP}Running {name} evals...\n{STAMP}[eval={name},step={step}/9]\n"
        f"{STAMP}Finished {name} evals in 3.1 seconds. Metrics:\n"
        f"    c4-validation/CE loss={loss}\n    c4-validation/PPL=27.0\n    books-validation/CE loss=9.9\n"
    )


def test_olmo_core(tmp_path: Path) -> None:
    text = f"{STAMP}TrainerConfig(global_batch_size=524288, sequence_length=2048)\n{STAMP}Training for 1,000 steps\n"
    for step in range(10, 110, 10):
        text += core(step, f"{9 - step / 100:.3f}")
        text += f"{STAMP}[step={step + 5}/1000,epoch=1]\n"  # progress without metrics
        if step == 50:
            text += evaluation("lm", 7, 8.75)
    log = read(tmp_path, text)
    assert log.format == "olmo"
    assert points(log, "loss") == {s: round(9 - s / 100, 3) for s in range(10, 110, 10)}
    assert set(points(log, "grad_norm").values()) == {0.412} and set(points(log, "lr").values()) == {3e-4}
    assert points(log, "tokens")[10] == 4.194e9 and points(log, "train/PPL")[10] == 8123
    assert points(log, "val_loss") == {55: 8.75}
    assert points(log, "eval/books-validation/CE loss") == {55: 9.9}
    assert log.settings == {"global_batch_size": "524288", "sequence_length": "2048", "max_steps": "1000"}
    assert any("'c4-validation/CE loss' is taken as val_loss" in note for note in log.notes)
    assert restarts(log.path) == []


def test_olmo_before(tmp_path: Path) -> None:
    text = "".join(
        f"[2024-04-17 09:42:26] INFO     [olmo.train:816, rank=0] [step={s}/739328]\n"
        f"    train/CrossEntropyLoss={11 - s}\n"
        f"    train/Perplexity=76,631\n    throughput/total_tokens=4,194,304\n    System/Peak GPU Memory (MB)=42,133\n"
        for s in range(1, 6)
    )
    text += (
        "[2024-04-17 09:43:26] INFO     [olmo.train:816, rank=0] [eval_step=3/16]\n    eval/c4/CrossEntropyLoss=6.5\n"
    )
    log = read(tmp_path, text)
    assert points(log, "loss") == {s: 11 - s for s in range(1, 6)}
    assert points(log, "tokens")[1] == 4194304
    assert points(log, "val_loss") == {5: 6.5}
    assert points(log, "System/Peak GPU Memory (MB)")[2] == 42133


def test_stamps_before_every_line_as_a_cluster_adds_them(tmp_path: Path) -> None:
    stamp = "2025-01-01T00:00:00.123456789Z "
    text = "".join(
        stamp + line + "\n" for s in range(1, 8) for line in core(s, 9 - s, f"{STAMP}[rank 0] ", "    ").splitlines()
    )
    log = read(tmp_path, text)
    assert log.format == "olmo"
    assert points(log, "loss") == {s: 9 - s for s in range(1, 8)}


def test_nan_and_inf(tmp_path: Path) -> None:
    log = read(tmp_path, "".join(core(s, x) for s, x in enumerate(("3.5", "nan", "inf", "-inf", "2.5"))))
    assert [str(x) for x in points(log, "loss").values()] == ["3.5", "nan", "inf", "-inf", "2.5"]


def test_restart(tmp_path: Path) -> None:
    text = f"{STAMP}Training for 1,000 steps\n" + "".join(core(s, 5.0) for s in range(1, 9))
    again = f"{STAMP}Checkpoint successfully loaded\n{STAMP}Training for 1,000 steps\n"
    log = read(tmp_path, text + again + core(6, 4.5) + core(7, 4.4))
    assert points(log, "loss") == {**dict.fromkeys(range(1, 6), 5.0), 6: 4.5, 7: 4.4}
    assert restarts(log.path) == [6]
    assert restarts(read(tmp_path, text + text).path) == [1]
    loaded = f"{STAMP}Checkpoint successfully loaded\n" + core(501, 4.5) + core(502, 4.4)
    assert restarts(read(tmp_path, loaded).path) == [501]


def test_the_program_that_prints_it_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "parse.py"
    path.write_text(
        'import re\nimport sys\nSTEP = re.compile(r"\\[step=(\\d+)/(\\d+),epoch=")\n'
        'log.info(f"[step={step}/{max_steps},epoch={epoch}]\\n    train/CE loss={loss}")\n'
        'TEXT = """\n' + core(1, 3.0) * 3 + '"""\ndef parse(text):\n    return 1\nassert parse(TEXT)\nimport json\n'
    )
    assert olmo.sniff(Source(path)) == 0.0


def test_a_step_of_commas_alone_is_no_step(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rows = "".join(f"[step={s}/99,epoch=1]\n    train/CE loss={9 - s / 9:.3f}\n" for s in range(1, 30))
    path.write_text(rows + "[step=,/99,epoch=1]\n    train/CE loss=2.0\n" + rows.replace("[step=", "[step=3"))
    assert len(read_log(path).series["loss"][0]) >= 29
