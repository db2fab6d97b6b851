"""Ten steps of the nano recipe, pinned: a change of numerics is seen, and has to be meant."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from poise.core.journal import read, timeline
from poise.train.recipe import load
from poise.train.run import train

PINNED = (
    (6.2185, 8.172),
    (6.1691, 7.443),
    (5.9492, 6.129),
    (5.742, 2.589),
    (5.7181, 17.106),
    (5.5026, 2.053),
    (5.3391, 3.529),
    (5.25, 10.453),
    (5.263, 16.14),
    (5.2029, 4.874),
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


def test_ten_steps_of_nano(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(), encoding="utf-8")
    values = {
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
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in PINNED], abs=5e-3), str(got)
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in PINNED], rel=5e-2), str(got)
