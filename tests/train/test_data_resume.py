"""What a resume keeps to and refuses, what is said of the data, steps in which nothing counts, and two ranks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.ranks import Ranks
from tests.train.conftest import Hooked, Seen, decide_by, stop_at

from poise.cli.main import main
from poise.cli.train import next_commands
from poise.core.errors import UserError
from poise.core.journal import read, timeline
from poise.core.types import DropData, Signals
from poise.data.feed import pack
from poise.data.feed.loader import Feed, Loader
from poise.data.feed.skips import samples_of
from poise.data.store import open_tokens
from poise.hardware import distributed
from poise.hardware.distributed import World
from poise.train import history, rewind, state
from poise.train import run as runs
from poise.train.drop import Drop
from poise.train.observers import Observer
from poise.train.position import Position, last_step, upcoming
from poise.train.recipe import load
from poise.train.run import resume, train
from poise.train.state import Run
from poise.train.step import EMPTY

Values = Callable[..., dict[str, Any]]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]


def shown(folder: Path, after: int) -> list[int]:
    return [s for r in steps_of(folder) if r["step"] > after for s in samples_of(r, 4)]


def as_rank(rank: int, work: Callable[[], Any]) -> Any:
    world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ.update(world)
    try:
        return work()
    finally:
        for name in world:
            del os.environ[name]


class Notes(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_note(self, text: str) -> None:
        self.said.append(text)


# -- drops ------------------------------------------------------------------------------------------------------


def test_what_was_asked_for_and_what_the_guard_took_out_is_found_but_not_what_a_rollback_passed_over() -> None:
    records: list[dict[str, Any]] = [
        {"type": "restart", "drop_samples": [[3, 4]], "drop_documents": [7]},
        {"type": "drop", "samples": [3, 4]},
        {"type": "drop", "samples": [8, 9]},
        {"type": "drop", "documents": [7, 5]},
        {"type": "rollback", "dropped_first": 20, "dropped_last": 30},
        {"type": "restart"},
    ]
    assert Drop.asked_before(records) == Drop(((3, 4), (8, 9)), (7, 5))


def test_what_the_guard_took_out_survives_an_older_checkpoint(small: Values, tmp_path: Path) -> None:
    def before(run: Run) -> None:
        decide_by(
            run,
            lambda run, signals: DropData(first=60, last=62, documents=(2,)) if signals.step == 15 else None,
        )
        cut_at(run, 16)

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power"):
        train(load("nano", small(train={"steps": 20})), run, before=before)
    assert [r["step"] for r in read(run / "journal.jsonl") if r["type"] == "save"][-1] == 10
    assert resume(run).reason == "finished"  # type: ignore[union-attr]
    assert shown(run, 10) == [s for s in range(40, 83) if s not in (60, 61, 62)]
    manifest = json.loads((run / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert [d for _, d in manifest.get("body", manifest)["meta"]["position"]["dropped"]] == [2]


def cut_at(run: Run, step: int) -> None:
    """The power goes off between a step and its checkpoint."""
    save = run.save

    def off() -> Any:
        if run.position.step == step:
            raise RuntimeError("the power is off")
        return save()

    run.save = off  # type: ignore[method-assign]


# -- the place of the data --------------------------------------------------------------------------------------


def test_only_the_place_of_the_data_may_change(small: Values, odd_tokens: Path, tmp_path: Path) -> None:
    moved, run = tmp_path / "moved", tmp_path / "run"
    train(load("nano", small(train={"steps": 6})), run, observers=[stop_at(3)])
    shutil.copytree(odd_tokens, moved)
    with pytest.raises(UserError, match="cannot change 'data'"):
        resume(run, {"data": {"dir": str(moved), "pack": "best_fit"}})
    assert resume(run, {"data": {"dir": str(moved)}}).reason == "finished"  # type: ignore[union-attr]
    assert f'dir = "{moved}"' in (run / "recipe.toml").read_text()
    assert shown(run, 3) == list(range(12, 24))


def test_other_data_in_that_place_is_refused(small: Values, tokens_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load("nano", small(train={"steps": 6})), run, observers=[stop_at(3)])
    with pytest.raises(UserError):
        resume(run, {"data": {"dir": str(tokens_dir)}})
    assert [r["step"] for r in steps_of(run)] == [1, 2, 3]


@pytest.mark.parametrize("command", ["train", "resume"])
def test_data_in_which_a_byte_has_changed_is_refused(
    command: str, small: Values, odd_tokens: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(odd_tokens, data)
    recipe = load("nano", small(data={"source": str(data)}, train={"steps": 6}))
    if command == "resume":
        train(recipe, run, observers=[stop_at(2)])
    content = bytearray((data / "train.bin").read_bytes())
    content[40] ^= 1
    (data / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.bin") as error:
        resume(run) if command == "resume" else train(recipe, run)
    assert "\n" not in str(error.value) and run.exists() == (command == "resume")
    assert command == "train" or [r["step"] for r in steps_of(run)] == [1, 2]


def test_ranks_do_not_wait_for_a_long_preparation(
    tiny: dict[str, Any], text_folder: Path, tokens_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST_WHILE_RANKS_WAIT", 1000)
    two, one = (World(0, size, torch.device("cpu"), 0) for size in (2, 1))
    data = {"source": str(text_folder), "dir": str(tmp_path / "t"), "vocab_size": 512, "val_fraction": 0.1}
    recipe = load("nano", tiny | {"data": data})
    with pytest.raises(UserError, match="do it first with poise data prepare") as error:
        runs.prepared(recipe, None, two)
    assert "\n" not in str(error.value) and not (tmp_path / "t").exists()
    assert runs.prepared(recipe, None, one)[0].dir == tmp_path / "t", "alone nobody waits"
    done = load("nano", tiny | {"data": data | {"source": str(tokens_dir), "dir": ""}})
    assert runs.prepared(done, None, two)[0].dir == tokens_dir, "there is nothing to prepare"


def test_packing_is_computed_once(small: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = pack.best_fit

    def counted(lengths: Any, seq_len: int) -> pack.Packing:
        calls.append(seq_len)
        return inner(lengths, seq_len)

    monkeypatch.setattr(pack, "best_fit", counted)
    train(load("nano", small(data={"pack": "best_fit"}, train={"steps": 6})), tmp_path / "run")
    assert calls == [32]


# -- what is said of a mixture ----------------------------------------------------------------------------------


def test_the_mixture_is_reported_and_its_warnings_are_notes(
    small: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("nano", small(data={"mix": ["web=0.5", "books=0.5"]}, train={"steps": 6}))
    mix = Loader(open_tokens(Path(recipe.data.source)), 32, 0, feed=recipe.data.feed).mix
    assert mix is not None
    train(recipe, tmp_path / "run", observers=[few := Notes()])
    (record,) = [r for r in read(tmp_path / "run" / "journal.jsonl") if r["type"] == "run"]
    assert record["data"]["mix"] == mix.report(24, 32)
    warnings = [one["warning"] for one in mix.report(8000, 32) if one["warning"]]
    monkeypatch.setattr(type(recipe), "total_samples", 8000)
    train(recipe, tmp_path / "many", observers=[many := Notes()])
    told = [[line for line in notes.said if "is seen" in line] for notes in (few, many)]
    assert warnings and told == [[], warnings]


# -- a mixture that ends ----------------------------------------------------------------------------------------


def ending(small: Values, steps_left_over: int = 0) -> tuple[dict[str, Any], int]:
    """A run that uses its mixture up to the last step but so many."""
    tokens = open_tokens(Path(small()["data"]["source"]))
    mix = ["web=0", "books=1@0.1"]
    total = Loader(tokens, 32, 0, feed=Feed(mix=tuple(mix))).mix.total  # type: ignore[union-attr]
    assert total is not None
    steps = total // 4 - steps_left_over
    return small(data={"mix": mix}, train={"steps": steps, "save_every": 0}), steps


def test_a_drop_that_the_mixture_cannot_bear_is_refused_before_the_first_step(
    small: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, steps = ending(small)
    run = tmp_path / "run"
    train(load("nano", values), run, observers=[stop_at(3)])
    before = (run / "journal.jsonl").read_text()
    assert main(["resume", str(run), "--drop-samples", "20-27"]) == 2
    error = capsys.readouterr().err
    assert f"enough for step {steps - 2} and not for {steps}: use --train.steps {steps - 2}" in error
    assert error.splitlines()[-1].startswith("poise resume: ") and (run / "journal.jsonl").read_text() == before
    assert main(["resume", str(run), "--drop-samples", "20-27", "--train.steps", str(steps - 2)]) == 0
    assert not set(shown(run, 3)) & set(range(20, 28)) and len(shown(run, 0)) == 4 * (steps - 2)


def test_after_a_halt_for_lack_of_data_the_next_commands_help(
    small: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, steps = ending(small)
    seen: list[Run] = []
    drop = Hooked(lambda step: seen[0].host.drop_data(20, 27) if step == 3 else None)
    outcome = train(load("nano", values), tmp_path / "run", observers=[drop], before=seen.append)
    assert (outcome.reason, outcome.used_up, outcome.step) == ("halted", True, steps - 2)
    finish, anew, _ = next_commands(outcome, tmp_path / "run")
    assert "books=1.0@0.2" in anew and "optim.lr" not in finish
    notes = Notes()
    assert resume(tmp_path / "run", observers=[notes]).used_up  # type: ignore[union-attr]
    assert any(f"enough for step {steps - 2}" in line for line in notes.said), "said, not refused: nobody asked anew"
    assert resume(tmp_path / "run", {"train": {"steps": steps - 2}}).reason == "finished"  # type: ignore[union-attr]
    words = shlex.split(anew.partition("  #")[0])[1:]
    assert main([*words, "--out", str(tmp_path / "anew"), "--train.steps", str(steps + 2)]) == 0
    assert len(steps_of(tmp_path / "anew")) == steps + 2
    capsys.readouterr()


@pytest.mark.parametrize("ramp", [{}, {"batch_start": 1, "batch_tokens": 900}])
@pytest.mark.parametrize("skips", [[], [(10, 20), (11, 20), (90, 99)], [(0, 30), (118, 140)]])
def test_the_last_step_is_the_one_that_counting_finds(
    ramp: dict[str, int], skips: list[tuple[int, int]], small: Values
) -> None:
    recipe = load("nano", small(train={"steps": 999, **ramp}))
    at = Position(step=2, next_sample=9, tokens=9 * 32, skips=skips)
    found = last_step(recipe, at, 120)
    while (samples := upcoming(recipe, at))[-1] < 120:
        at.step, at.next_sample, at.tokens = at.step + 1, samples[-1] + 1, at.tokens + 32 * len(samples)
    assert found == at.step > 2


def test_a_finished_run_says_that_a_drop_was_not_recorded(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert main(["resume", str(run), "--drop-samples", "70", "80-83", "--drop-documents", "5"]) == 0
    out = capsys.readouterr().out
    assert "was not recorded" in out
    assert f"poise resume {run} --drop-samples 70 80-83 --drop-documents 5 --train.steps 80" in out
    assert main(["resume", str(run), "--drop-documents", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drop_recorded"] is False
    assert main(["resume", str(run)]) == 0
    assert "recorded" not in capsys.readouterr().out


# -- a step in which nothing counts, spreads --------------------------------------------------------------------


def test_a_step_in_which_nothing_counts_is_skipped(small: Values, tmp_path: Path) -> None:
    weights: dict[int, torch.Tensor] = {}
    seen: list[Run] = []

    def before(run: Run) -> None:
        seen.append(run)
        every = tuple(range(run.loader.document_count))
        decide_by(run, lambda run, s: DropData(first=1, last=0, documents=every) if s.step == 4 else None)

    def look(step: int) -> None:
        weights[step] = seen[0].model.embedding.weight.detach().clone()

    values = small(train={"steps": 6, "save_every": 0}, guard={"enabled": True})
    train(load("nano", values), tmp_path / "run", before=before, observers=[Hooked(look)])
    said = [
        (r["step"], r["action"], r["reason"])
        for r in read(tmp_path / "run" / "journal.jsonl")
        if r["type"] == "decision"
    ]
    assert said[1:] == [(5, "skip", EMPTY), (6, "skip", EMPTY)]
    assert not torch.equal(weights[3], weights[2]) and torch.equal(weights[6], weights[4])


def test_the_spread_of_losses_is_one_of_losses_and_not_of_weighed_ones(small: Values, tmp_path: Path) -> None:
    over = {"data": {"pack": "best_fit"}, "train": {"steps": 20, "micro_batch": 1, "row_losses": True}}
    train(load("nano", small(**over, guard={"enabled": True})), tmp_path / "run")
    differ = 0
    for record in steps_of(tmp_path / "run"):
        largest = max(record["row_losses"])
        assert record["loss_spread"] == pytest.approx(largest - record["loss"], abs=2e-4)
        differ += abs(sum(record["row_losses"]) / 4 - record["loss"]) > 1e-4
    assert differ, "or the rows weighed the same"


class Counting:
    """``mean_over_ranks``, counted."""

    def __init__(self, inner: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(tensor)


def a_rank_of_two(rank: int) -> tuple[bool, bool, dict[str, float], int]:
    """What two ranks say of a step: rank 0 showed a row of source a; rank 1 one of a and one of b, cut in two each."""
    own = [[0], [1, 2]][rank]
    rows = [
        [(torch.tensor([8.0, 0.0]), torch.tensor([2, 0]))],
        [(torch.tensor([3.0, 3.0]), torch.tensor([1, 5])), (torch.tensor([6.0, 1.0]), torch.tensor([2, 1]))],
    ][rank]
    loader = SimpleNamespace(sources=("a", "b", "c"), source_of=lambda some: torch.tensor([0, 0, 1])[some].numpy())
    step = SimpleNamespace(
        _rows=rows, _parts=[[s] for s in own], loader=loader, world=SimpleNamespace(device=torch.device("cpu"))
    )
    uneven = SimpleNamespace(_rows=[(torch.zeros(2), torch.tensor([0, rank]))], world=step.world)
    nothing = SimpleNamespace(_rows=[(torch.zeros(2), torch.tensor([0, 0]))], world=step.world)
    signals = Signals(step=1, loss=0.0, grad_norm=0.0, lr=0.0, tokens=0)
    with pytest.MonkeyPatch.context() as patch:
        counting = Counting(distributed.mean_over_ranks)
        patch.setattr(state, "mean_over_ranks", counting)
        found = Run.source_losses(step)  # type: ignore[arg-type]
    return Run.empty(uneven, signals), Run.empty(nothing, signals), found, counting.calls  # type: ignore[arg-type]


@pytest.mark.dist
def test_ranks_agree_on_empty_steps_and_losses_of_sources(two_ranks: Ranks) -> None:
    losses = {"a": round(14 / 8, 4), "b": round(7 / 3, 4)}
    assert two_ranks.run(a_rank_of_two) == [(False, True, losses, 1)] * 2


def resume_on_one_of_two(rank: int, folder: str) -> str:
    def seen_late(*args: Any) -> Any:
        raise AssertionError("only rank 0 looks at the files")

    def work() -> str:
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(runs, "records_of", seen_late)
                patch.setattr(runs, "is_prepared", lambda path: False)
                patch.setattr(runs, "prepared", seen_late)
            outcome = resume(folder, drop=Drop(((26, 27),), ()))
        assert outcome is not None
        return outcome.reason

    return str(as_rank(rank, work))


@pytest.mark.dist
def test_rank_0_alone_reads_the_journal_and_looks_for_the_data(small: Values, two_ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load("nano", small(train={"steps": 8})), run, observers=[stop_at(5)])
    assert two_ranks.run(resume_on_one_of_two, str(run)) == ["finished"] * 2
    assert shown(run, 5) == [s for s in range(20, 34) if s not in (26, 27)]


# -- the journal is read once -----------------------------------------------------------------------------------


def test_an_investigation_reads_the_journal_once_and_without_losses_of_rows(
    stormy: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reads, plans = stormy.run, [], []
    inner, broadcast = history.records_of, distributed.broadcast

    def counted(path: Path) -> Any:
        reads.append(path)
        return inner(path)

    def sent(value: Any) -> Any:
        plans.append(value)
        return broadcast(value)

    monkeypatch.setattr(state, "records_of", counted)
    monkeypatch.setattr(rewind, "broadcast", sent)
    monkeypatch.setattr(run.journal, "write", lambda *args, **named: None)
    path = run.journal.path  # type: ignore[union-attr]
    assert any("row_losses" in r for r in read(path)) and not any("row_losses" in r for r in inner(path))
    verdict = run.investigate(25, 1.0)
    assert verdict.evidence and len(plans) >= 3 and reads == [path]
    assert run._history is None, "what is written later is seen"
    assert {name for plan in plans for one in plan for name in one.fields} <= set(rewind._NEEDED)
    run.host.replay(20, 1, "same")  # type: ignore[attr-defined]
    assert len(reads) == 2
