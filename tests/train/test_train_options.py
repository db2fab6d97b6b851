"""Options of the trainer that must not change the run: recomputed blocks, norms of every linear layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from poise.core.journal import read
from poise.postmortem.log import read_log
from poise.train.recipe import load
from poise.train.run import train


def run(tiny: dict[str, Any], folder: Path, **options: Any) -> list[dict[str, Any]]:
    over = copy.deepcopy(tiny)
    over["train"] |= {"steps": 6, "eval_every": 0, "save_every": 0, "micro_batch": 2, **options}
    assert train(load("nano", over), folder).reason == "finished"
    return read(folder / "journal.jsonl")


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [r["loss"] for r in records if r["type"] == "step"]


@pytest.fixture(scope="module")
def plain(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tiny, tmp_path_factory.mktemp("plain") / "run")


def test_recomputed_blocks_train_the_same(tiny: dict[str, Any], plain: Any, tmp_path: Path) -> None:
    assert losses(run(tiny, tmp_path / "run", recompute=True)) == losses(plain)


def test_norms_of_linear_layers_are_journalled_and_change_nothing(
    tiny: dict[str, Any], plain: Any, tmp_path: Path
) -> None:
    records = run(tiny, tmp_path / "run", linear_norms_every=3)
    assert losses(records) == losses(plain)
    assert [r["step"] for r in records if r["type"] == "linears"] == [3, 6]
    assert not [r for r in plain if r["type"] == "linears"]
    readings = next(r["readings"] for r in records if r["type"] == "linears")
    layers = [f"block.{n}.{m}" for n in (0, 1) for m in ("attn.qkv", "attn.out", "mlp.inner", "mlp.out")]
    kinds = [f"linear_{what}_{how}" for what in ("out", "in", "in_grad", "weight") for how in ("norm", "rms")]
    wanted = {f"{kind}@{layer}" for kind in kinds for layer in layers}
    assert wanted <= set(readings) and all(readings[name] > 0 for name in wanted)
    assert "linear_out_norm@block.0.attn.qkv" in read_log(tmp_path / "run").series


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="linear_norms_every is -1"):
        load("nano", {"train": {"linear_norms_every": -1}})
