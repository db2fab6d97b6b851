"""Ramps, mixtures, packing, masks, drops: off is absent; a resume, a rollback and a replay show the very batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import Hooked, Seen, decide_by, stop_at, watch

from poise.cli.main import main
from poise.core.journal import read, timeline
from poise.core.types import IGNORE, Batch, DropData
from poise.data.feed.loader import Loader, View
from poise.data.feed.skips import samples_of
from poise.data.store import open_tokens
from poise.train.drop import Drop
from poise.train.position import Position, upcoming
from poise.train.recipe import load
from poise.train.run import resume, train
from poise.train.state import Run

Values = Callable[..., dict[str, Any]]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]


def history(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "sample", "rows", "spans", "source_losses", "row_losses")
    return [tuple(str(r.get(k)) for k in keys) for r in steps_of(folder)]


def last_state(folder: Path) -> tuple[Any, Any]:
    """Position, guard and senses of the last checkpoint."""
    last = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    manifest = json.loads((last / "manifest.json").read_text())
    manifest = manifest.get("body", manifest)
    return manifest["step"], manifest["meta"]


def same_batch(a: Batch, b: Batch) -> bool:
    both_none = a.documents is None and b.documents is None
    return (
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        and tuple(a.samples) == tuple(b.samples)
        and (both_none or torch.equal(a.documents, b.documents))  # type: ignore[arg-type]
    )


# -- off is absent ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    return plain_losses(tiny, tmp_path_factory.mktemp("without") / "run")


def plain_losses(tiny: dict[str, Any], folder: Path, **over: Any) -> list[tuple[Any, ...]]:
    short = {"steps": 8, "eval_every": 0, "save_every": 0, "micro_batch": 2}
    values = {
        **tiny,
        "data": tiny["data"] | over.get("data", {}),
        "train": tiny["train"] | short | over.get("train", {}),
    }
    train(load("nano", values), folder)
    return [(r["loss"], r["grad_norm"], r["lr"], r["tokens"], r["sample"]) for r in steps_of(folder)]


@pytest.mark.parametrize(
    "over",
    [
        {"train": {"row_losses": True}},
        {"train": {"both_ramps": True, "batch_lr": "linear"}},
        {"train": {"length_start": 32, "length_tokens": 100_000}},
        {"train": {"batch_start": 4, "batch_tokens": 100_000}},
        {"data": {"mix": [], "temperature": 0.0, "pack": "concat"}},
    ],
    ids=lambda over: "+".join(k for part in over.values() for k in part),
)
def test_off_equals_absent(over: dict[str, Any], without: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    assert plain_losses(tiny, tmp_path / "run", **over) == without


def test_masking_where_nothing_repeats_changes_no_bit(tmp_path: Path) -> None:
    """The weights of micro-batches are exactly 1 where all targets count."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        words = " ".join(f"{chr(97 + (number * 7 + i * i) % 26)}{i * number % 97}" for i in range(80))
        (tmp_path / "text" / f"{number}.md").write_text(words)
    found = []
    for mask in (True, False):
        values = {
            "data": {
                "source": str(tmp_path / "text"),
                "dir": str(tmp_path / "tokens"),
                "vocab_size": 300,
                "mask_repeats": mask,
            },
            "model": {"n_layers": 1, "d_model": 16, "n_heads": 2},
            "optim": {"schedule": {"warmup_steps": 2}},
            "train": {"steps": 6, "batch_size": 6, "micro_batch": 2, "seq_len": 16, "compile": "off", "threads": 1},
        }
        train(load("nano", values), tmp_path / f"run-{mask}")
        found.append([(r["loss"], r["grad_norm"]) for r in steps_of(tmp_path / f"run-{mask}")])
    loader = Loader(open_tokens(tmp_path / "tokens"), 16, 0)
    assert loader.feed.mask_repeats and not (loader.batch(0, 36).targets == IGNORE).any(), "nothing is masked here"
    assert found[0] == found[1]


# -- 20 steps, save, resume, 20 more ----------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "length ramp": {"train": {"length_start": 8, "length_tokens": 3000}},
    "batch ramp": {"train": {"batch_start": 1, "batch_tokens": 1500}},
    "mix with epoch caps": {"data": {"mix": ["web=0.5", "books=0.5@0.2"]}},
    "best fit and document mask": {"data": {"pack": "best_fit", "document_mask": True}, "train": {"micro_batch": 2}},
    "skips and dropped documents": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_20_plus_20_equals_40(way: str, small: Values, tmp_path: Path) -> None:
    def drops(run: Run) -> None:
        if way.startswith("skips"):
            decide_by(
                run,
                lambda run, signals: (
                    DropData(first=90, last=93, documents=(2, 5))
                    if signals.step == 15
                    else DropData(first=run.position.next_sample + 2, last=run.position.next_sample + 2)
                    if signals.step == 17
                    else None
                ),
            )

    recipe = load("nano", small(**WAYS[way]))
    train(recipe, tmp_path / "whole", before=drops)
    train(recipe, tmp_path / "run", before=drops, observers=[stop_at(20)])
    assert resume(tmp_path / "run").reason == "finished"  # type: ignore[union-attr]
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert last_state(tmp_path / "run") == last_state(tmp_path / "whole")
    shown = steps_of(tmp_path / "whole")
    said = {  # that the way was taken at all
        "length ramp": recipe.train.length_ramp is not None,
        "batch ramp": [r.get("rows", 4) for r in shown][::39] == [1, 4],
        "mix with epoch caps": {tuple(r.get("source_losses", ())) for r in shown} >= {("web", "books"), ("web",)},
        "best fit and document mask": recipe.data.document_mask,
        "skips and dropped documents": any("spans" in r for r in shown[20:]),
    }
    assert said[way]


def test_the_length_grows_at_the_same_tokens_a_step(stormy: Seen) -> None:
    tried = stormy.batches()
    lengths = [tried[step][0].inputs.shape[1] for step in range(1, 41)]
    assert lengths == sorted(lengths) and {8, 16, 32} == set(lengths)
    sizes = {step: sum(batch.inputs.numel() for batch in some) for step, some in tried.items()}
    records = stormy.steps()
    assert all(sizes[step] == 32 * len(samples_of(records[step], 4)) for step in sizes)
    assert [len(samples_of(records[step], 4)) for step in (1, 40)] == [2, 4]
    assert records[3]["lr"] / records[4]["lr"] == pytest.approx(3 / 4), "warm-up goes on"
    assert records[1]["lr"] == pytest.approx(5e-3 / 6 * 0.5**0.5, rel=0.3)


# -- drops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(70, 77), (10, 20), (46, 53)], ids=["future", "past", "across"])
def test_dropped_samples_are_never_shown_again_and_all_others_are(
    window: tuple[int, int], small: Values, tmp_path: Path
) -> None:
    """The run goes back to step 10 and shows its data again, but for the window."""
    runs: list[Run] = []

    def before(run: Run) -> None:
        runs.append(run)
        decide_by(run, lambda run, signals: DropData(first=window[0], last=window[1]) if signals.step == 12 else None)

    def go_back(step: int) -> None:
        if step == 14 and runs[0].position.next_sample >= 56 and "rollback" not in kinds():
            runs[0].host.rollback(10, False)

    def kinds() -> list[str]:
        return [r["type"] for r in read(tmp_path / "run" / "journal.jsonl")]

    values = small(train={"steps": 24})
    train(load("nano", values), tmp_path / "run", before=before, observers=[Hooked(go_back)])
    records = read(tmp_path / "run" / "journal.jsonl")
    (drop,) = [i for i, r in enumerate(records) if r["type"] == "drop"][:1]
    assert records[drop]["samples"] == list(window)
    back = kinds().index("rollback")
    after = [s for r in records[back:] if r["type"] == "step" for s in samples_of(r, 4)]
    expected = [s for s in range(40, 200) if not window[0] <= s <= window[1]]
    assert after == expected[: len(after)] and len(after) == 14 * 4
    between = [s for r in records[drop:back] if r["type"] == "step" for s in samples_of(r, 4)]
    assert between == [s for s in range(48, 99) if not window[0] <= s <= window[1]][: len(between)]


def test_dropped_documents_do_not_count_and_nothing_else_changes(stormy: Seen) -> None:
    loader, checked = stormy.run.loader, 0
    for step, some in stormy.batches().items():
        gone = set(range(9)) if 15 < step <= 20 else {*range(9), *range(30, 36)} if step > 20 else set()
        for batch in some:
            length = batch.inputs.shape[1]
            plain = loader.gather(list(dict.fromkeys(batch.samples)), View(length % 32))
            assert torch.equal(batch.inputs, plain.inputs), "they are still read"
            mine = torch.zeros(plain.targets.numel(), dtype=torch.bool)
            for row, sample in enumerate(dict.fromkeys(batch.samples)):
                for one in loader.documents(sample):
                    if one["document"] in gone:
                        first, last = one["span"]  # targets are one position before their inputs
                        mine[row * 32 + max(first - 1, 0) : row * 32 + last - 1] = True
                        checked += 1
            expected = plain.targets.view(-1).where(~mine, torch.tensor(IGNORE)).view_as(plain.targets)
            assert torch.equal(batch.targets, expected), step
    assert checked > 3, "some of them came"


def test_a_rollback_keeps_skips_and_dropped_documents(stormy: Seen) -> None:
    position = stormy.run.position
    assert dict(map(reversed, position.dropped)) == {d: 15 if d < 9 else 20 for d in (*range(9), *range(30, 36))}
    assert len(position.skips) == 1
    (first, last), shown = position.skips[0], set()
    for record in stormy.records():
        if record["type"] == "step":
            shown |= set(samples_of(record, 4))
    assert last - first == 2 and not shown & set(range(first, last + 1))
    assert shown >= {first - 1, last + 1}


def test_a_person_drops_data_and_later_resumes_keep_to_it(
    small: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(load("nano", small(train={"steps": 24})), run, observers=[stop_at(12)])

    def die(step: int) -> None:
        if step == 15:
            raise KeyboardInterrupt  # before anything was saved

    with pytest.raises(KeyboardInterrupt):
        resume(run, observers=[Hooked(die)], drop=Drop(((60, 61),), (4,)))
    assert read(run / "journal.jsonl")[-1]["type"] == "step"
    assert main(["resume", str(run), "--drop-samples", "70", "80-83", "--drop-documents", "5"]) == 0
    capsys.readouterr()
    shown = [s for r in steps_of(run) if r["step"] > 12 for s in samples_of(r, 4)]
    assert shown == [s for s in range(48, 103) if s not in (60, 61, 70, 80, 81, 82, 83)]
    _, meta = last_state(run)
    assert sorted(d for _, d in meta["position"]["dropped"]) == [4, 5]
    drops = [r for r in read(run / "journal.jsonl") if r["type"] == "drop"]
    assert len(drops) == 6, "two before the crash, and after it those and the new ones"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--drop-samples", "9-3"], "'9-3' is no range of samples"),
        (["--drop-samples", "x"], "'x' is no range of samples"),
        (["--drop-documents", "123456"], "no document 123456; the training text has documents 0 to"),
    ],
)
def test_wrong_drops_are_one_line_and_leave_nothing(
    words: list[str], said: str, small: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(load("nano", small(train={"steps": 7})), run, observers=[stop_at(1)])
    before = (run / "journal.jsonl").read_text()
    assert main(["resume", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (run / "journal.jsonl").read_text() == before


# -- the very batch, again --------------------------------------------------------------------------------------


def test_a_replay_shows_the_very_batches(stormy: Seen) -> None:
    """Also where a batch was taken again, samples and documents were dropped, and the run went back."""
    first = stormy.batches()
    again: list[tuple[int, list[Batch]]] = []
    inner, run = stormy.run.backward, stormy.run
    seen = watch(run)
    try:
        got = run.host.replay(0, 40, "same")  # type: ignore[attr-defined]
    finally:
        run.backward = inner  # type: ignore[method-assign]
    again = seen.tries
    assert [step for step, _ in again] == list(range(1, 41))
    for step, some in again:
        assert len(some) == len(first[step]), step
        assert all(same_batch(a, b) for a, b in zip(some, first[step], strict=True)), step
    steps = stormy.steps()
    assert list(got.losses) == [steps[n]["loss"] for n in range(1, 41)]
    assert got.digest == run.host.replay(40, 0, "same").digest  # type: ignore[attr-defined]


def test_other_data_come_in_the_sizes_of_the_steps_and_transplanted_ones_as_they_were(stormy: Seen) -> None:
    first, run, inner = stormy.batches(), stormy.run, stormy.run.backward
    for arguments, step in (((0, 6, "other"), None), ((20, 2, "same"), 3)):
        seen = watch(run)
        try:
            run.host.replay(*arguments, **({} if step is None else {"samples_from": step}))  # type: ignore[attr-defined]
        finally:
            run.backward = inner  # type: ignore[method-assign]
        for number, (_, some) in enumerate(seen.tries):
            of = first[number + (step or 1)]
            assert [b.inputs.shape for b in some] == [b.inputs.shape for b in of]
            assert all(same_batch(a, b) for a, b in zip(some, of, strict=True)) == (step is not None)


def test_what_a_step_shows_is_a_function_of_its_position(stormy: Seen) -> None:
    """Of a checkpoint: nothing but it and the recipe says what comes."""
    folder = stormy.run.store.folder
    meta = json.loads((folder / "step-00000020" / "manifest.json").read_text())
    saved = Position.of(meta.get("body", meta)["meta"]["position"])
    records = [r for r in stormy.records() if r["type"] == "step"]
    last = [r for r in records if r["step"] == 21][-1]
    assert list(upcoming(stormy.run.recipe, saved)) == list(samples_of(last, 4))


def test_the_good_batch_is_the_one_that_was_shown(stormy: Seen) -> None:
    run, good = stormy.run, stormy.run.position.good
    assert good is not None
    assert same_batch(run.first_batch(good), stormy.batches()[good.step][0])
    early = dict(stormy.tries)[4]
    samples = sorted({s for batch in early for s in batch.samples})
    seen = stormy.steps()[4]["tokens"] - 32 * len(samples)
    old = replace_good(good, 4, samples, seen)
    assert same_batch(run.first_batch(old), early[0]), "half the batch, shorter sequences, nothing dropped yet"


def replace_good(good: Any, step: int, samples: Sequence[int], seen: int) -> Any:
    return good._replace(step=step, spans=[(samples[0], samples[-1])], seen=seen)
