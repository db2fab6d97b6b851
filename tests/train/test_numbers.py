"""Ten steps of the nano recipe, pinned: a change of numerics is seen, and has to be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.core.journal import read, timeline
from poise.train.recipe import load
from poise.train.run import train

PINNED: tuple[float, ...] = ()
"""Losses of steps 1 to 10: nano's model and optimizer in fp32 on the test folder's text."""


def test_ten_steps_of_nano(tokens_dir: Path, tmp_path: Path) -> None:
    values = {
        "data": {"source": str(tokens_dir), "vocab_size": 512, "val_fraction": 0.1},
        "optim": {"schedule": {"warmup_steps": 5}},
        "train": {"steps": 10, "eval_every": 0, "compile": "off", "dtype": "fp32", "threads": 1,
                  "batch_size": 2, "seq_len": 64},
    }  # fmt: skip
    train(load("nano", values), tmp_path / "run")
    losses = [r["loss"] for r in timeline(read(tmp_path / "run" / "journal.jsonl"))]
    assert losses == pytest.approx(PINNED, abs=2e-3)
