"""Ten steps of the nano recipe, pinned: a change of numerics is seen, and has to be meant."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from poise.core.journal import read, timeline
from poise.train.recipe import load
from poise.train.run import train

PINNED = (
    (6.4146, 11.192),
    (6.4121, 10.621),
    (6.2857, 9.751),
    (5.8973, 9.172),
    (5.7082, 9.795),
    (5.5955, 4.762),
    (5.4201, 4.209),
    (5.3425, 2.876),
    (5.1722, 2.469),
    (5.4886, 18.475),
)
"""(loss, gradient norm) of steps 1 to 10: nano's model and optimizer, fp32, on the text below."""


def text() -> str:
    """Return sentences of a made-up grammar, the same on every machine and Python version."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(600)]
    weights = [1 / (rank + 2) for rank in range(len(words))]
    lines = [" ".join(rng.choices(words, weights, k=rng.randint(5, 15))).capitalize() + "." for _ in range(4000)]
    return "\n".join(lines)


def test_ten_steps_of_the_nano_shape(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(), encoding="utf-8")
    values = {
        "model": {"tied": True, "methods": ["qk_norm", "z_loss"]},  # the plain parts: methods have numbers of their own
        "data": {"source": str(tmp_path / "text.txt"), "dir": str(tmp_path / "tokens"), "vocab_size": 512},
        "optim": {"schedule": {"warmup_steps": 9}},
        "train": {
            "steps": 10,
            "eval_every": 0,
            "compile": "off",
            "dtype": "fp32",
            "threads": 1,
            "batch_size": 2,
            "seq_len": 64,
        },
    }
    train(load("nano", values), tmp_path / "run")
    steps = timeline(read(tmp_path / "run" / "journal.jsonl"))
    got = [(round(r["loss"], 4), round(r["grad_norm"], 3)) for r in steps]
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in PINNED], abs=2e-3), str(got)
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in PINNED], rel=2e-2), str(got)
