"""A cell trains as ``poise train`` does, goes on where it was, and writes a record that can be trusted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core import config as configs
from poise.core.errors import UserError
from poise.core.journal import read, timeline
from poise.data.store import Tokens, open_tokens
from poise.model.build import build
from poise.model.methods import logit_tap
from poise.studies import attention_logits
from poise.studies.cell import Cell, Stopped, read_record, run_cell
from poise.train import recipe as recipes
from poise.train.run import train

TIMES = {"seconds", "seconds_per_step"}


@pytest.fixture(scope="module")
def tokens(tokens_dir: Path) -> Tokens:
    return open_tokens(tokens_dir)


def cell_of(tiny: dict[str, Any], tokens: Tokens, **over: Any) -> Cell:
    values = configs.merge(configs.merge(tiny, {"guard": {"enabled": False}}), over)
    recipe = recipes.load("nano", values)
    return Cell("an arm", recipe.optim.lr, recipe.seed, recipe, tokens.fingerprint)


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMES}


@pytest.fixture(scope="module")
def whole(tiny: dict[str, Any], tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a cell that was never disturbed."""
    return run_cell(cell_of(tiny, tokens), tokens, tmp_path_factory.mktemp("whole"))


RAMPS = {"length_start": 8, "length_tokens": 2000, "batch_start": 2, "batch_tokens": 2000, "both_ramps": True}
PACKED = {"pack": "best_fit", "document_mask": True}


@pytest.mark.parametrize(
    "over",
    [{}, {"train": {"micro_batch": 2}}, {"train": {"micro_batch": 2} | RAMPS, "data": PACKED}],
    ids=["whole batches", "micro-batches", "ramps, packed"],
)
def test_a_cell_has_the_losses_of_poise_train(
    over: dict[str, Any], tiny: dict[str, Any], tokens: Tokens, tmp_path: Path
) -> None:
    cell = cell_of(tiny, tokens, **over)
    record = run_cell(cell, tokens, tmp_path)
    assert train(cell.recipe, tmp_path / "run").reason == "finished"
    records = read(tmp_path / "run" / "journal.jsonl")
    steps = [r for r in timeline(records) if r["type"] == "step"]
    assert record["loss"] == [r["loss"] for r in steps]
    assert record["grad_norm"] == [r["grad_norm"] for r in steps]
    assert record["val"] == [[r["step"], r["loss"]] for r in records if r["type"] == "eval"]
    assert (record["ended"], record["steps_done"]) == ("finished", 40)
    assert record["final_loss"] == record["val"][-1][1] == record["best_val"] < record["init_loss"]


def test_a_stopped_cell_goes_on_bit_for_bit(
    whole: dict[str, Any], tiny: dict[str, Any], tokens: Tokens, tmp_path: Path
) -> None:
    cell = cell_of(tiny, tokens)
    for end in (17, 31):
        steps: list[int] = []
        with pytest.raises(Stopped):
            run_cell(cell, tokens, tmp_path, stop=lambda: steps[-1] == end, progress=steps.append)  # noqa: B023
        assert steps[-1] == end
    assert steps[0] == 18
    assert [p.name for p in tmp_path.iterdir()] == [f"{cell.key}.partial"]
    record = run_cell(cell, tokens, tmp_path)
    assert untimed(record) == untimed(whole)
    assert [p.name for p in tmp_path.iterdir()] == [f"{cell.key}.json"]


def test_a_killed_cell_goes_on_from_the_last_saved_state(
    whole: dict[str, Any], tiny: dict[str, Any], tokens: Tokens, tmp_path: Path
) -> None:
    cell, seen = cell_of(tiny, tokens), list[int]()

    def die(step: int) -> None:
        if step == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tokens, tmp_path, every_seconds=0.0, progress=die)
    record = run_cell(cell, tokens, tmp_path, progress=seen.append)
    assert seen[0] == 25  # 24 steps were saved
    assert untimed(record) == untimed(whole)


@pytest.mark.parametrize("damage", ["empty", "cut off", "of another cell"])
def test_a_bad_partial_state_is_not_used(
    damage: str, whole: dict[str, Any], tiny: dict[str, Any], tokens: Tokens, tmp_path: Path
) -> None:
    cell, other = cell_of(tiny, tokens), cell_of(tiny, tokens, optim={"lr": 1e-3})
    source = other if damage == "of another cell" else cell
    with pytest.raises(Stopped):
        run_cell(source, tokens, tmp_path, stop=lambda: True)
    content = (tmp_path / f"{source.key}.partial").read_bytes()
    kept = {"empty": b"", "cut off": content[: len(content) // 2]}.get(damage, content)
    (tmp_path / f"{cell.key}.partial").write_bytes(kept)
    assert untimed(run_cell(cell, tokens, tmp_path)) == untimed(whole)


def test_a_loss_that_is_no_number_ends_the_cell(tiny: dict[str, Any], tokens: Tokens, tmp_path: Path) -> None:
    # Without norms at the logits a rate of 1e30 overflows in the second forward pass.
    cell = cell_of(tiny, tokens, optim={"lr": 1e30, "schedule": {"warmup_steps": 0}})
    record = run_cell(cell, tokens, tmp_path)
    assert record["ended"] == "nonfinite"
    assert math.isnan(record["final_loss"])
    assert len(record["loss"]) == record["steps_done"] + 1 < 40
    assert not (math.isfinite(record["loss"][-1]) and math.isfinite(record["grad_norm"][-1]))
    text = (tmp_path / f"{cell.key}.json").read_text()
    assert json.loads(text)["final_loss"] == "nan"
    back = read_record(tmp_path / f"{cell.key}.json", cell.key)
    assert back is not None
    assert math.isnan(back["final_loss"])
    assert repr(back["loss"]) == repr(record["loss"])
    assert back["max_logit"][-1][0] == record["steps_done"]


def test_what_a_record_holds(whole: dict[str, Any]) -> None:
    assert [step for step, _ in whole["max_logit"]] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert all(a >= b for (_, a), (_, b) in zip(whole["max_logit"], whole["max_logit_block0"], strict=True))
    assert whole["params"] > whole["params_non_embedding"] > 0
    assert 0 < whole["seconds_per_step"] < whole["seconds"]
    assert {"torch", "python", "cpu"} <= whole["environment"].keys()


def test_the_key_is_of_what_matters(tiny: dict[str, Any], tokens: Tokens) -> None:
    cell = cell_of(tiny, tokens)
    same = [
        dataclasses.replace(cell, arm="another label"),
        cell_of(tiny, tokens, name="other"),
        cell_of(tiny, tokens, train={"threads": 2, "save_every": 7}),
        cell_of(tiny, tokens, data={"source": "stdlib", "dir": "somewhere"}),
        cell_of(tiny, tokens, guard={"every": 3}),
    ]
    assert {one.key for one in same} == {cell.key}
    other = [
        cell_of(tiny, tokens, optim={"lr": 1e-3}),
        cell_of(tiny, tokens, seed=1),
        cell_of(tiny, tokens, model={"methods": ["qk_norm"]}),
        cell_of(tiny, tokens, train={"steps": 41}),
        cell_of(tiny, tokens, train={"dtype": "bf16"}),
        cell_of(tiny, tokens, optim={"schedule": {"final_fraction": 0.0}}),
        dataclasses.replace(cell, text="another text"),
    ]
    assert len({one.key for one in [cell, *other]}) == len(other) + 1


def test_other_text_is_refused(tiny: dict[str, Any], tokens: Tokens, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has changed"):
        run_cell(dataclasses.replace(cell_of(tiny, tokens), text="another"), tokens, tmp_path)


def test_a_damaged_record_is_none(whole: dict[str, Any], tmp_path: Path) -> None:
    path, key = tmp_path / "record.json", whole["key"]
    path.write_text(json.dumps(whole))
    assert read_record(path, key) == whole
    assert read_record(path, "0" * 20) is None
    assert read_record(tmp_path / "missing.json", key) is None
    assert read_record(tmp_path, key) is None
    for content in ("", "[]", "{}", json.dumps(whole)[:-9], json.dumps(whole | {"format": 0}), "\x00\xff"):
        path.write_text(content, encoding="latin-1")
        assert read_record(path, key) is None
    wrong = {"final_loss": "x", "lr": None, "seed": 0.5, "params": True, "loss": [1.0, "x"], "grad_norm": 3.0, "arm": 1,
             "val": [[1]], "max_logit": [[0, None]], "recipe": [], "seconds": {}, "ended": ["finished"]}  # fmt: skip
    for name, value in wrong.items():
        path.write_text(json.dumps(whole | {name: value}))
        assert read_record(path, key) is None, name
    path.write_text(json.dumps(whole | {"max_logit": None, "final_loss": "nan"}))
    assert read_record(path, key) is not None
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "loss"}))
    assert read_record(path, key) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 2), st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
def test_the_largest_product_is_over_visible_pairs(T: int, G: int, R: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_BHTK = torch.randn(2, G * R, T, 4, generator=generator)
    k_BGTK = torch.randn(2, G, T, 4, generator=generator)
    k_BGTK[:, :, -1] *= 100  # only the last query sees it
    products = np.einsum("bhtk,bhsk->bhts", q_BHTK.double().numpy(), k_BGTK.repeat_interleave(R, 1).double().numpy())
    expected = products[:, :, np.tril(np.ones((T, T), bool))].max()
    one_row = 4 * 2 * G * R * T  # bytes of fp32 products of one query row of all heads
    found = float(logit_tap.largest(q_BHTK, k_BGTK, 1.0, budget=rows * one_row).amax())
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_largest_logit_is_scaled_and_nobody_listens_afterwards(tiny: dict[str, Any], tokens: Tokens) -> None:
    model = build(recipes.load("nano", tiny).spec(512), seed=0)
    inputs_BT = torch.arange(64).view(2, 32)
    heard: dict[str, torch.Tensor] = {}
    taps = model.taps()
    handles = [
        taps[f"block.1.{part}"].register_forward_hook(lambda m, a, out, part=part: heard.update({part: out.detach()}))
        for part in ("q", "k")
    ]
    found = attention_logits.largest_logits(model, inputs_BT)
    for handle in handles:
        handle.remove()
    assert model.training
    assert len(found) == 2
    scores_BHTT = (heard["q"] @ heard["k"].mT).tril() + torch.full((32, 32), -math.inf).triu(1)
    assert found[1] == pytest.approx(float(scores_BHTT.amax()) * 16**-0.5)
    assert not any(tap._forward_hooks for tap in taps.values())
    documents_BT = torch.arange(32).div(5, rounding_mode="floor").expand(2, 32)
    inside = attention_logits.largest_logits(model, inputs_BT, documents_BT)[1]
    alone = [attention_logits.largest_logits(model, inputs_BT[:, i : i + 5])[1] for i in range(0, 32, 5)]
    assert inside == pytest.approx(max(alone), rel=1e-5) and inside < found[1], "a logit across documents is none"
    attn: Any = model.trunk.blocks[1]
    attn.attn.scale = 0.5
    assert attention_logits.largest_logits(model, inputs_BT)[1] == pytest.approx(2 * found[1])
