"""What the terminal says of a run."""

from __future__ import annotations

from typing import Any

import pytest

from poise.cli.terminal import Terminal
from poise.core import config
from poise.core.types import Proceed, Signals
from poise.train.observers import StepReport
from poise.train.recipe import load


def record(over: dict[str, Any]) -> dict[str, Any]:
    schedule = {"optim": {"schedule": {"warmup_steps": 5}}}
    recipe = load("nano", {**schedule, "train": {"steps": 40, "batch_size": 8, "seq_len": 32, **over}})
    return {
        "recipe": config.to_dict(recipe),
        "tokens_per_step": recipe.tokens_per_step,
        "total_steps": 40,
        "total_tokens": recipe.total_tokens,
    }


@pytest.mark.parametrize(
    ("over", "said"),
    [({}, "40 steps of 256 tokens"), ({"batch_start": 2, "batch_tokens": 2000}, "40 steps of 64 to 256 tokens")],
)
def test_the_size_of_a_step_is_said_as_it_is(
    over: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Terminal().on_start(record(over))
    assert said in capsys.readouterr().err


def test_the_time_left_knows_that_the_batch_grows() -> None:
    terminal, about = Terminal(), record({"batch_start": 2, "batch_tokens": 2000})
    terminal.on_start(about)
    signals = Signals(step=1, loss=5.0, grad_norm=1.0, lr=1e-3, tokens=64)
    terminal.on_step(StepReport(signals, Proceed(), 0.1, 640.0, 5.0, 40, "watching"))
    assert terminal._meter is not None
    assert (terminal._meter.total_tokens, terminal._meter.done_tokens) == (about["total_tokens"], 64)
