"""Losses of rows and sources, weights of targets, evaluation, the end of a mixture, two ranks, wrong values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ranks import Ranks
from tests.train.conftest import ALL_AT_ONCE, Hooked, Seen, decide_by

from poise.core.errors import UserError
from poise.core.journal import read, timeline
from poise.core.types import IGNORE, Batch, DropData
from poise.data.feed.loader import Feed, Loader, View
from poise.data.feed.skips import listed, samples_of
from poise.data.store import open_tokens
from poise.train.budget import budget, render
from poise.train.evaluate import validation_loss
from poise.train.position import Position, batches, micro_batches
from poise.train.recipe import load
from poise.train.run import train
from poise.train.state import Run

Values = Callable[..., dict[str, Any]]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]


def last_state(folder: Path) -> tuple[Any, Any]:
    """Position, guard and senses of the last checkpoint."""
    last = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    manifest = json.loads((last / "manifest.json").read_text())
    manifest = manifest.get("body", manifest)
    return manifest["step"], manifest["meta"]


# -- losses -----------------------------------------------------------------------------------------------------


def test_losses_of_rows_and_sources_are_those_of_the_targets_that_count(small: Values, tmp_path: Path) -> None:
    direct: dict[int, dict[int, list[float]]] = {}

    def before(run: Run) -> None:
        inner = run.backward

        def backward(batch: Batch) -> None:
            with torch.no_grad():
                logits_BTV = run.model.logits(batch.inputs, documents_BT=batch.documents)
                token_BT = torch.nn.functional.cross_entropy(
                    logits_BTV.transpose(1, 2), batch.targets, reduction="none", ignore_index=IGNORE
                )
            of = direct.setdefault(run.position.step, {})
            for row, sample in enumerate(batch.samples):
                of.setdefault(sample, []).extend(token_BT[row][batch.targets[row] != IGNORE].tolist())
            inner(batch)

        run.backward = backward  # type: ignore[method-assign]
        decide_by(
            run,
            lambda run, signals: (
                DropData(first=1, last=0, documents=tuple(range(0, 60, 2))) if signals.step == 2 else None
            ),
        )

    train(
        load("nano", small(**ALL_AT_ONCE | {"train": ALL_AT_ONCE["train"] | {"steps": 12, "micro_batch": 1}})),
        tmp_path / "run",
        before=before,
    )
    loader = Loader(
        open_tokens(Path(small()["data"]["source"])), 32, 0, feed=Feed(mix=("web=0.7", "books=0.3@30"), pack="best_fit")
    )
    uneven = 0
    for record in steps_of(tmp_path / "run"):
        of = direct[record["step"]]
        means = [np.mean(of[s]) if of[s] else np.nan for s in samples_of(record, 4)]
        assert record["row_losses"] == pytest.approx(means, abs=2e-4, nan_ok=True)
        every = [value for values in of.values() for value in values]
        uneven += len({len(values) for values in of.values()}) > 1
        assert record["loss"] == pytest.approx(np.mean(every or [0.0]), rel=1e-5), "a mean over targets"
        sources = loader.source_of(list(samples_of(record, 4)))
        for number, name in enumerate(loader.sources):
            some = np.array(means)[sources == number]
            expected = np.nanmean(some) if np.isfinite(some).any() else None
            assert record["source_losses"].get(name) == (expected and pytest.approx(expected, abs=2e-4))
    assert uneven > 3, "or a mean over micro-batches would do"


def test_every_target_that_counts_weighs_the_same(odd_tokens: Path) -> None:
    """Micro-batches of different sizes: the gradient is that of the whole step at once."""
    loader = Loader(open_tokens(odd_tokens), 32, 0, feed=Feed(pack="best_fit"))
    recipe = load("nano", {"train": {"batch_size": 4, "micro_batch": 1, "seq_len": 32}})
    view = View(0, tuple(range(20)))
    parts = micro_batches(recipe, range(8, 12), 0, 1)
    found = list(batches(loader, parts, view, torch.device("cpu")))
    counts = [int((batch.targets != IGNORE).sum()) for batch, _ in found]
    assert len(set(counts)) > 1
    weights = [float(weight) for _, weight in found]  # type: ignore[arg-type]
    assert weights == pytest.approx([count / np.mean(counts) for count in counts])
    nothing = View(0, tuple(range(loader.document_count)))
    assert [float(w) for _, w in batches(loader, parts, nothing, torch.device("cpu"))] == [0.0] * 4  # type: ignore[arg-type]


def test_evaluation_keeps_attention_inside_documents(small: Values, odd_tokens: Path, stormy: Seen) -> None:
    model = stormy.run.model
    plain = Loader(open_tokens(odd_tokens), 32, 0, "val")
    masked = Loader(open_tokens(odd_tokens), 32, 0, "val", Feed(document_mask=True))
    device = torch.device("cpu")
    losses = [validation_loss(model, loader, 3, 4, device) for loader in (plain, masked)]
    direct = []
    for index in range(3):
        batch = masked.batch(4 * index, 4)
        direct.append(float(model(batch.inputs, batch.targets, documents_BT=batch.documents).ce))
    assert losses[1] == pytest.approx(np.mean(direct), rel=1e-6)
    assert losses[0] != losses[1]
    assert stormy.run.validation is not None and stormy.run.validation.feed.document_mask


# -- the end of a mixture, two ranks, figures ---------------------------------------------------------------------


def test_a_mixture_that_is_used_up_halts_in_one_line_with_its_state_saved(small: Values, tmp_path: Path) -> None:
    tokens = open_tokens(Path(small()["data"]["source"]))
    count = Loader(tokens, 32, 0, feed=Feed(mix=("web=0", "books=1@0.1"))).mix
    assert count is not None and count.total is not None
    steps = count.total // 4
    values = small(data={"mix": ["web=0", "books=1@0.1"]}, train={"steps": steps, "save_every": 0})
    runs: list[Run] = []
    drop = Hooked(lambda step: runs[0].host.drop_data(40, 47) if step == 3 else None)
    outcome = train(load("nano", values), tmp_path / "run", observers=[drop], before=runs.append)
    assert (outcome.reason, outcome.step) == ("halted", steps - 2)
    assert "the mixture ends after" in outcome.message and "\n" not in outcome.message
    assert last_state(tmp_path / "run")[0] == steps - 2
    other = runs[0].host.replay(0, 5, "other")  # type: ignore[attr-defined]
    assert len(other.losses) == 5 and not any(np.isnan(other.losses)), "there is other data, if old"
    with pytest.raises(UserError, match="the mixture ends after"):
        train(
            load("nano", small(data={"mix": ["web=0", "books=1@0.1"]}, train={"steps": steps + 1})), tmp_path / "more"
        )


def one_of_two(rank: int, values: dict[str, Any], folder: str) -> None:
    world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ.update(world)
    try:
        assert train(load("nano", values), folder).reason == "finished"
    finally:
        for name in world:
            del os.environ[name]


@pytest.mark.dist
def test_two_ranks_show_and_journal_the_same(small: Values, two_ranks: Ranks, tmp_path: Path) -> None:
    over = {
        "data": ALL_AT_ONCE["data"],
        "train": ALL_AT_ONCE["train"] | {"steps": 10, "micro_batch": 1, "save_every": 5},
    }
    values = small(**over)
    two_ranks.run(one_of_two, values, str(tmp_path / "two"))
    train(load("nano", values), tmp_path / "one")
    for two, one in zip(steps_of(tmp_path / "two"), steps_of(tmp_path / "one"), strict=True):
        assert list(samples_of(two, 4)) == list(samples_of(one, 4))
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["row_losses"] == pytest.approx(one["row_losses"], abs=2e-3, nan_ok=True)
        assert two["source_losses"] == pytest.approx(one["source_losses"], abs=2e-3)


def test_a_growing_batch_is_in_the_budget() -> None:
    recipe = load(
        "nano", {"train": {"steps": 50, "batch_size": 4, "batch_start": 2, "batch_tokens": 4096, "seq_len": 64}}
    )
    figures = budget(recipe)
    shown = sum(recipe.train.batch_ramp.size(step) for step in range(1, 51))  # type: ignore[union-attr]
    assert figures["tokens"] == 64 * shown < 64 * 200
    assert "50 steps x 2 to 4 sequences x 64" in render(recipe, figures)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"data": {"pack": "bestfit"}}, "pack"),
        ({"data": {"mix": ["web"]}}, "'web' is no share of a mixture"),
        ({"data": {"mix": ["web=1"], "temperature": 2.0}}, "temperature is 2.0"),
        ({"train": {"length_start": 12, "length_tokens": 100}}, "cannot double its way"),
        ({"train": {"length_start": 8}}, "give both as positive numbers"),
        ({"train": {"batch_start": 3, "batch_tokens": 100}}, "must be a multiple"),
        ({"train": {"batch_start": 2, "batch_tokens": 99, "length_start": 8, "length_tokens": 9}}, "advised against"),
        ({"train": {"batch_start": 2, "batch_tokens": 99, "batch_lr": "cubic"}}, "batch_lr"),
    ],
)
def test_values_that_cannot_be_are_one_line(over: dict[str, Any], said: str, small: Values) -> None:
    with pytest.raises(UserError, match=said.replace("'", ".")) as error:
        load("nano", small(**over))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"data": {"mix": ["wbe=1"]}}, "no source 'wbe', did you mean 'web'"),
        ({"train": {"batch_size": 6, "batch_start": 2, "batch_tokens": 99, "micro_batch": 3}}, "a step of 4 sequences"),
    ],
)
def test_what_does_not_fit_the_text_is_said_before_a_folder_is_made(
    over: dict[str, Any], said: str, small: Values, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        train(load("nano", small(**over)), tmp_path / "run")
    assert said in str(error.value).replace("; did", ", did") and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_spans_are_listed_as_they_were() -> None:
    assert listed([(3, 5)]) == range(3, 6)
    assert replace(Position(), skips=[(1, 2)]).documents == ()
