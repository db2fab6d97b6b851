"""Hugging Face: trainer_state.json, whole or cut off, and what the Trainer prints between progress bars."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.postmortem import Log, read_log
from poise.postmortem.readers import hf, hf_stdout
from poise.postmortem.readers.source import Source

REAL = Path(__file__).resolve().parents[3] / "shared" / "logs" / "hf_trainer_state__luojiu7b.json"


def read(tmp_path: Path, text: str | bytes, name: str = "log.txt") -> Log:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


def losses(log: Log, name: str = "loss") -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


def said(log: Log, text: str) -> bool:
    return any(text in note for note in log.notes)


# -- the state file ------------------------------------------------------------------------------------


def history(n: int = 6) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"epoch": i / 10, "grad_norm": 1.0 + i, "learning_rate": 1e-4, "loss": 3.0 - i / 10, "step": 10 * i}
        for i in range(1, n + 1)
    ]
    records.insert(2, {"epoch": 0.2, "eval_loss": 2.75, "eval_runtime": 3.0, "step": 20})
    return [*records, {"epoch": 0.6, "step": 10 * n, "train_loss": 2.6, "train_runtime": 9.0}]


def state(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "best_metric": None,
        "epoch": 0.6,
        "is_world_process_zero": True,
        "log_history": records,
        "logging_steps": 10,
        "max_steps": 60,
        "num_train_epochs": 1,
        "stateful_callbacks": {"TrainerControl": {"args": {"should_log": [False, {"log_history": 1}]}}},
        "train_batch_size": 4,
        "trial_name": None,
    }


@pytest.mark.parametrize("indent", [2, None])
def test_state_compact_and_indented(tmp_path: Path, indent: int | None) -> None:
    log = read(tmp_path, json.dumps(state(history()), indent=indent), "trainer_state.json")
    assert log.format == "hf"
    assert losses(log) == {10 * i: 3.0 - i / 10 for i in range(1, 7)}
    assert losses(log, "grad_norm")[60] == 7.0 and losses(log, "lr")[10] == 1e-4
    assert losses(log, "val_loss") == {20: 2.75}
    assert "train_loss" not in log.series and said(log, "closing summary")
    wanted = {"max_steps": "60", "num_train_epochs": "1", "train_batch_size": "4", "logging_steps": "10"}
    assert wanted.items() <= log.settings.items() and "trial_name" not in log.settings
    assert log.step_unit == "steps"


def test_state_with_numbers_that_are_none(tmp_path: Path) -> None:
    text = json.dumps(state(history())).replace('"loss": 2.9', '"loss": NaN').replace('"loss": 2.8', '"loss": "nan"')
    log = read(tmp_path, text.replace('"loss": 2.7', '"loss": Infinity'))
    values = log.series["loss"][1]
    assert np.isnan(values[:2]).all() and values[2] == math.inf and len(values) == 6


def test_a_list_of_records_alone(tmp_path: Path) -> None:
    assert losses(read(tmp_path, json.dumps(history(), indent=1))) == losses(
        read(tmp_path, json.dumps(state(history())))
    )


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0.2, 1.0), indent=st.sampled_from([None, 2]))
def test_cut_off_anywhere_gives_the_whole_records(
    tmp_path_factory: pytest.TempPathFactory, cut: float, indent: int | None
) -> None:
    text = json.dumps(state(history(20)), indent=indent)
    kept = text[: int(cut * len(text))]
    log = read(tmp_path_factory.mktemp("hf"), kept)
    whole = sum(
        f'"loss": {3.0 - i / 10}' in kept
        and kept.find("}", kept.find(f'"step": {10 * i}', kept.find(f"{3.0 - i / 10},"))) > 0
        for i in range(1, 21)
    )
    assert len(losses(log)) == whole
    assert len(kept) == len(text) or said(log, "cut off")


def test_one_damaged_record_costs_no_other(tmp_path: Path) -> None:
    text = json.dumps(state(history()), indent=2).replace('"loss": 2.8', '"loss": 2.8.1')
    log = read(tmp_path, text)
    assert sorted(losses(log)) == [10, 30, 40, 50, 60]
    assert said(log, "damaged record") and log.settings["max_steps"] == "60"


def test_state_without_records_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record with a number") as raised:
        read(tmp_path, json.dumps(state([])))
    assert "\n" not in str(raised.value)


def test_compressed_and_cut_off(tmp_path: Path) -> None:
    records = [{"loss": float(x), "step": i} for i, x in enumerate(np.random.default_rng(0).random(5000))]
    whole = gzip.compress(json.dumps(state(records)).encode())
    log = read(tmp_path, whole[: len(whole) // 2], "state.json.gz")
    assert 1000 < len(losses(log)) < 4000 and said(log, "damaged or cut off")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    record = json.dumps({"loss": 2.0, "note": "x" * 2000, "step": 1})
    path.write_text('{"log_history": [' + ",".join([record] * 10_000) + "]}")  # 20 MB in one line
    source = Source(path)
    tracemalloc.start()
    rows = sum(1 for _ in hf.read(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 10_000 and peak < 12_000_000


@pytest.mark.skipif(not REAL.is_file(), reason="the real logs are not on this machine")
def test_real_state() -> None:
    log = read_log(REAL)
    steps, values = log.series["loss"]
    assert (log.format, len(steps), steps[0], steps[-1]) == ("hf", 1742, 5, 8710)
    assert (values[0], values[-1], values.min(), steps[values.argmin()]) == (1.7484, 1.3703, 1.2345, 3820)


# -- what the Trainer prints ---------------------------------------------------------------------------


def bar(step: int, total: int = 200) -> str:
    return f"\r {100 * step // total:3d}%|{'█' * (step // 20)}▌  | {step}/{total} [01:00<19:00,  1.67it/s]"


def printed(
    steps: range, total: int = 200, quoted: bool = True, bars: bool = True, per_epoch: float = 100, digits: str = ".4g"
) -> str:
    out = bar(0, total) if bars else ""
    for step in steps:
        q = "'" if quoted else ""
        values = {"loss": 4 - step / 100, "grad_norm": 1.5, "learning_rate": 1e-4}
        pairs = [f"'{name}': {q}{value:.4g}{q}" for name, value in values.items()]
        text = "{" + ", ".join([*pairs, f"'epoch': {q}{step / per_epoch:{digits}}{q}"]) + "}"
        out += (
            f"{bar(step - 1, total)}{bar(step, total)}\r{' ' * 60}\r{text}\n{bar(step, total)}" if bars else text + "\n"
        )
    return out


BANNER = (
    "[INFO|trainer.py:2134] 2024-05-01 >> ***** Running training *****\n"
    "[INFO|trainer.py:2135] 2024-05-01 >>   Num examples = 12,800\n"
    "[INFO|trainer.py:2136] 2024-05-01 >>   Num Epochs = 2\n"
    "[INFO|trainer.py:2140] 2024-05-01 >>   Total train batch size (w. parallel, distributed & accumulation) = 128\n"
    "[INFO|trainer.py:2142] 2024-05-01 >>   Total optimization steps = 200\n"
)


@pytest.mark.parametrize("quoted", [True, False])
def test_dicts_among_progress_bars(tmp_path: Path, quoted: bool) -> None:
    text = "Map:  50%|█████     | 5/10 [00:00<00:00, 9.1 examples/s]\n" + printed(range(10, 201, 10), quoted=quoted)
    log = read(tmp_path, text + "\n{'train_runtime': 9.0, 'train_loss': 3.0, 'epoch': 2.0}\n")
    assert log.format == "hf"
    assert losses(log) == {step: pytest.approx(4 - step / 100) for step in range(10, 201, 10)}
    assert losses(log, "grad_norm")[200] == 1.5 and losses(log, "epoch")[100] == 1.0
    assert said(log, "progress bars") and said(log, "closing summary")


def test_a_bar_that_lags_is_put_right_by_the_one_after(tmp_path: Path) -> None:
    """A fast loop redraws its bar seldom; printing redraws it."""
    text = bar(0)
    for step in range(10, 201, 10):
        text += f"{bar(step - 1 - step % 7)}\r   \r{{'loss': '{step}', 'epoch': '{step / 100}'}}\n"
        text += bar(0, 7) + bar(3, 7) + bar(step) if step == 100 else bar(step)
    assert losses(read(tmp_path, text)) == {step: float(step) for step in range(10, 201, 10)}


def test_a_plain_print_redraws_no_bar(tmp_path: Path) -> None:
    """The bar after it is a step further, as evenly as the one before."""
    dicts = [f"\r{{'loss': {n}.0, 'epoch': 0.1}}\n{bar(n + 1)}" for n in range(10, 101, 10)]
    named = "\nSaving shards:  50%|█████     | 1/2 [00:00<00:00, 9.1it/s]"
    text = bar(10) + named + "".join(f"{text}{bar(n)}" for n, text in zip(range(20, 111, 10), dicts, strict=True))
    assert losses(read(tmp_path, text)) == {n: float(n) for n in range(10, 101, 10)}


def test_evaluations_have_bars_of_their_own(tmp_path: Path) -> None:
    text = printed(range(10, 101, 10)) + "\n"
    text += "".join(bar(i, 7) for i in range(8)) + "\r   \r{'eval_loss': '2.5', 'eval_runtime': '3', 'epoch': '1'}\n"
    log = read(tmp_path, text + bar(100) + printed(range(110, 201, 10), bars=True)[len(bar(0)) :])
    assert losses(log, "val_loss") == {100: 2.5}
    assert list(losses(log)) == list(range(10, 201, 10))


def test_a_buffered_output_comes_in_lumps(tmp_path: Path) -> None:
    """The bars say nothing then; the epochs do, once it is known how many steps one has."""
    dicts = printed(range(10, 201, 10), bars=False)
    text = (
        "".join(bar(i) for i in range(0, 200, 7)) + "\n" + dicts + "{'train_runtime': 9.0, 'epoch': 2.0}\n" + bar(200)
    )
    log = read(tmp_path, text)
    assert list(losses(log)) == list(range(10, 201, 10)) and said(log, "epochs times 100 steps")


def test_rounded_epochs_give_even_steps(tmp_path: Path) -> None:
    """With 697 steps an epoch, two decimals are 7 steps; that the dicts come evenly makes up for it."""
    banner = BANNER.replace("= 200", "= 1,394")
    log = read(tmp_path, banner + printed(range(10, 1391, 10), bars=False, per_epoch=697, digits=".2f"))
    assert list(losses(log)) == list(range(10, 1391, 10)) and said(log, "one dict every 10")


def test_dicts_alone_are_counted(tmp_path: Path) -> None:
    log = read(tmp_path, printed(range(10, 101, 10), bars=False) + "{'eval_loss': 2.5, 'epoch': 1.0}\n")
    assert list(losses(log)) == list(range(1, 11)) and losses(log, "val_loss") == {10: 2.5}
    assert log.step_unit == "rows" and said(log, "counted from 1")


def test_banner_and_restart(tmp_path: Path) -> None:
    text = BANNER + printed(range(10, 101, 10)) + "\nKilled\n" + BANNER + printed(range(60, 201, 10))
    path = tmp_path / "log.txt"
    path.write_text(text)
    items = list(hf.read(source := Source(path)))
    assert [type(item).__name__ for item in items].count("Restarted") == 1
    assert type(items[10]).__name__ == "Restarted"
    assert source.settings["total_train_batch_size"] == "128" and source.settings["max_steps"] == "200"
    log = read_log(path)
    assert list(losses(log)) == list(range(10, 201, 10)) and said(log, "seam: the steps go back from 100 to 60")


def test_steps_that_the_dict_says_itself(tmp_path: Path) -> None:
    text = "".join(
        f"[rank0]:{{'loss': {4 - i}, 'token_acc': 0.5, 'epoch': 0.01, 'global_step/max_steps': '{5 * i}/200'}}\n"
        f"{bar(5 * i + 2)}\n"
        for i in range(1, 4)
    )
    assert losses(read(tmp_path, text)) == {5: 3.0, 10: 2.0, 15: 1.0}


def test_printed_numbers_that_are_none_and_wrapped(tmp_path: Path) -> None:
    dicts = ["'loss': nan", "'loss': 'inf'", "'loss': np.float64(2.5)", "'loss': tensor(2.25)"]
    log = read(tmp_path, "".join(f"{{{pair}, 'learning_rate': 1e-4, 'epoch': 0.1}}\n" for pair in dicts))
    values = log.series["loss"][1]
    assert np.isnan(values[0]) and values[1:].tolist() == [math.inf, 2.5, 2.25]


@pytest.mark.parametrize(
    "text",
    [
        "history = [{'loss': 2.5, 'epoch': 1},\n  {'loss': 2.25, 'epoch': 2}]\n",
        "self.log({'loss': 2.5, 'epoch': 1})\nself.log({'loss': 2.5, 'epoch': 2})\n",
        "# {'loss': 2.5, 'epoch': 1}\n# {'loss': 2.25, 'epoch': 2}\n",
        "print({'loss': loss, 'epoch': epoch})\n" * 3,
        "{'loss': 'mse', 'epoch': 3}\n",
        '{"log_history": 3}\n',
    ],
)
def test_source_code_is_no_log(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(text)
    assert hf.sniff(Source(path)) == 0.0


def test_llama_factory_log_is_json_lines(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"current_steps": 10 * i, "total_steps": 100, "loss": 3 - i / 10, "lr": 1e-4, "epoch": 0.1, "percentage": 10.0}
        | {"elapsed_time": "0:00:10", "remaining_time": "0:01:00", "throughput": "12.5", "total_tokens": 4096 * i}
        for i in range(1, 6)
    ]
    records.append({"current_steps": 50, "total_steps": 100, "eval_loss": 2.5, "epoch": 0.5, "percentage": 50.0})
    log = read(tmp_path, "".join(json.dumps(record) + "\n" for record in records), "trainer_log.jsonl")
    assert log.format == "jsonl"
    assert losses(log) == {10 * i: 3 - i / 10 for i in range(1, 6)}
    assert losses(log, "val_loss") == {50: 2.5} and losses(log, "tokens")[50] == 20480 and "lr" in log.series


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}'losepch:, 0123456789.%|/[]\r\n", max_size=300))
def test_any_text_can_be_asked(text: str) -> None:
    events = [event for line in text.splitlines() for event in hf_stdout.events_of(line)]
    assert all(event.count >= 0 for event in events if isinstance(event, hf_stdout.Bar))


@pytest.mark.parametrize("front", ["Step {}: ", "[{}/600] ", "INFO step={} metrics=", "global_step {} - "])
def test_a_step_in_front_of_the_dict(tmp_path: Path, front: str) -> None:
    path = tmp_path / "run.log"
    path.write_text(
        "".join(front.format(10 * i) + str({"loss": 9 - i / 10, "learning_rate": 1e-3}) + "\n" for i in range(1, 30))
    )
    steps, losses = read_log(path).series["loss"]
    assert steps.tolist() == [10 * i for i in range(1, 30)]
    assert losses.tolist() == [9 - i / 10 for i in range(1, 30)]


def test_what_is_the_same_in_front_of_every_dict_is_no_step(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text("".join(f"[1/8] {{'loss': {9 - i / 10}, 'learning_rate': 0.001}}\n" for i in range(1, 30)))
    assert read_log(path).series["loss"][0].tolist() == list(range(1, 30))


def test_dicts_of_several_ranks(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text(
        "".join(
            f"[rank{r}]: {{'loss': {9 - i / 10 + r}, 'learning_rate': 0.001, 'epoch': {i / 100}}}\n"
            for i in range(1, 30)
            for r in (1, 0)
        )
    )
    log = read_log(path)
    assert log.series["loss"][1].tolist() == [9 - i / 10 for i in range(1, 30)]
    assert any("rank 0" in note for note in log.notes)


def test_the_evaluation_at_the_end_is_one_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    rows = [f"{{'loss': {9 - i / 10}, 'learning_rate': 0.001, 'epoch': {i / 10}}}" for i in range(1, 13)]
    path.write_text("\n".join([*rows, "{'eval_loss': 2.5, 'epoch': 1.2}", "{'eval_loss': 2.25, 'epoch': 1.25}"]) + "\n")
    assert read_log(path).series["val_loss"][1].tolist() == [2.5, 2.25]
