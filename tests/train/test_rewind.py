"""A replay shows what was shown, does what was done, and leaves no trace; the guard's hands on the learning rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.core.errors import UserError
from poise.core.host import Host, Mender, Rewinder
from poise.core.journal import read, timeline
from poise.core.types import Batch, Clip, Decision, DropData, LowerLr, ResetMoments, Signals, Skip
from poise.data.feed.loader import PLAIN, View
from poise.hardware.state import flatten, pack
from poise.train import rewind
from poise.train.host import rewarmed
from poise.train.observers import Observer, StepReport
from poise.train.recipe import load
from poise.train.run import train
from poise.train.state import Position, Run

Hook = Callable[[Run, int], None]


class At(Observer):
    """Calls a function after a step."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.hook: Hook = lambda run, step: None

    def on_step(self, report: StepReport) -> None:
        assert self.run is not None
        self.hook(self.run, report.signals.step)


def trained(
    tiny: dict[str, Any],
    folder: Path,
    after: Hook | None = None,
    decide: Callable[[Run, Signals], Decision | None] | None = None,
) -> Run:
    """Train 40 steps; ``after`` is called after each, ``decide`` may decide in the guard's place. Return the run."""
    observer, runs = At(), list[Run]()

    def before(run: Run) -> None:
        runs.append(run)
        observer.run = run
        observer.hook = after or observer.hook
        real = run.guard.decide
        if decide is not None:
            run.guard.decide = lambda *args, **named: decide(run, args[0]) or real(*args, **named)  # type: ignore[method-assign]

    values = {**tiny, "train": {**tiny["train"], "keep_last": 9}}
    assert train(load("nano", values), folder, observers=[observer], before=before).reason == "finished"
    return runs[0]


def odd_decisions(run: Run, signals: Signals) -> Decision | None:
    """A guard that does everything once, so that a replay has something to get wrong."""
    match signals.step:
        case 22:
            return Skip()
        case 24:
            return Clip(max_norm=0.05)
        case 26:
            return LowerLr(factor=0.5, rewarm=4)
        case 27:
            return ResetMoments(places=("block.1", "head"))
        case 29:
            return DropData(first=0, last=run.position.next_sample + 11)
    return None


@pytest.fixture(scope="module")
def plain(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tiny, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def odd(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """40 steps with a decision of each kind between the checkpoints of steps 20 and 30."""
    return trained(tiny, tmp_path_factory.mktemp("odd") / "run", decide=odd_decisions)


def recorded(run: Run) -> dict[int, dict[str, Any]]:
    assert run.journal is not None
    return {r["step"]: r for r in timeline(read(run.journal.path)) if r["type"] == "step"}


def everything(run: Run) -> tuple[dict[str, torch.Tensor], Any, dict[str, Any], str]:
    """All of a run's state: tensors, what describes them, position, what guard and senses remember."""
    tensors, node = flatten(pack(run.model, run.optimizer))
    return (
        {k: t.clone() for k, t in tensors.items()},
        node,
        asdict(run.position),
        json.dumps([run.guard.state_dict(), run.senses.state_dict()]),
    )


def assert_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys()
    different = [name for name in a[0] if not torch.equal(a[0][name], b[0][name])]
    assert not different


def test_the_host_offers_all_three_protocols(plain: Run) -> None:
    for protocol in (Host, Mender, Rewinder):
        assert isinstance(plain.host, protocol)


# -- a replay does what was done --------------------------------------------------------------------------------


def test_a_replay_gives_the_recorded_losses_and_the_saved_weights(plain: Run) -> None:
    again = plain.host.replay(25, 10, "same")
    steps = recorded(plain)
    assert again.from_step == 20
    assert list(again.losses) == [steps[n]["loss"] for n in range(21, 31)]
    assert list(again.grad_norms) == pytest.approx([steps[n]["grad_norm"] for n in range(21, 31)], rel=1e-6)
    assert again.digest == plain.host.replay(30, 0, "same").digest, "the weights of the checkpoint of step 30"
    assert again.digest != plain.host.replay(29, 0, "same").digest


def test_skips_clips_cuts_resets_and_drops_are_done_again(odd: Run) -> None:
    steps = recorded(odd)
    assert [steps[n]["action"] for n in (22, 24, 26, 27, 29)] == [
        "skip", "clip", "lower_lr", "reset_moments", "drop_data"
    ]  # fmt: skip
    again = odd.host.replay(20, 20, "same")
    assert list(again.losses) == [steps[n]["loss"] for n in range(21, 41)]
    assert again.digest == odd.host.replay(40, 0, "same").digest


def test_after_a_rollback_the_samples_really_shown_are_shown(tiny: dict[str, Any], tmp_path: Path) -> None:
    def after(run: Run, step: int) -> None:
        if step == 26 and run.position.next_sample == 26 * 4:  # the first time
            run.host.rollback(20, True)

    run = trained(tiny, tmp_path / "run", after)
    steps = recorded(run)
    assert steps[21]["sample"] == 26 * 4, "step 21 was done again with new data"
    assert shown_by(run, 19, 11, "same") == [*range(40, 80, 4), 104], "from before the rollback, across it"
    again = run.host.replay(19, 20, "same")
    assert list(again.losses) == [steps[n]["loss"] for n in range(11, 31)]
    assert again.digest == run.host.replay(30, 0, "same").digest


def shown_by(run: Run, *arguments: Any, **named: Any) -> list[int]:
    """First samples of the batches that a replay asks for."""
    real, asked = run.loader.batch, list[int]()

    def batch(first: int, count: int, view: View = PLAIN) -> Batch:
        assert run.journal is None, "whoever writes to the journal finds none"
        asked.append(first)
        return real(first, count, view)

    run.loader.batch = batch  # type: ignore[method-assign]
    try:
        run.host.replay(*arguments, **named)  # type: ignore[attr-defined]
    finally:
        del run.loader.batch
    return asked


def test_without_a_journal_samples_follow_by_counting(plain: Run) -> None:
    journal, plain.journal = plain.journal, None
    try:
        assert shown_by(plain, 30, 13, "same") == list(range(120, 172, 4)), "also beyond the present"
    finally:
        plain.journal = journal


def test_other_data_were_never_shown_and_are_not_what_comes_next(odd: Run) -> None:
    free = odd.position.next_sample
    assert shown_by(odd, 30, 3, "other") == [free + 12, free + 16, free + 20]
    assert odd.position.next_sample == free
    other, same = odd.host.replay(20, 10, "other"), odd.host.replay(20, 10, "same")
    assert all(a != b for a, b in zip(other.losses, same.losses, strict=True))


def test_the_data_of_one_step_can_be_shown_to_weights_of_another(plain: Run) -> None:
    assert shown_by(plain, 10, 3, "same", samples_from=35) == [34 * 4, 35 * 4, 36 * 4]
    moved = plain.host.transplant(10, 35, 1)
    with torch.no_grad():
        seen = recorded(plain)[35]["loss"]
    assert moved.from_step == 10 and moved.losses[0] > seen + 0.1, "younger weights, the same data"


def test_a_loss_that_is_not_finite_is_nan_and_the_update_is_refused(plain: Run) -> None:
    real = plain.backward

    def backward(batch: Batch) -> None:
        real(batch)
        if batch.samples[0] == 34 * 4:
            next(iter(plain.model.parameters())).grad.fill_(float("inf"))  # type: ignore[union-attr]

    plain.backward = backward  # type: ignore[method-assign]
    try:
        again = plain.host.replay(30, 6, "same")
    finally:
        del plain.backward
    assert [n != n for n in again.grad_norms] == [False] * 4 + [True, False]
    assert not any(loss != loss for loss in again.losses)


# -- and leaves no trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_training_goes_on_as_if_there_had_been_no_replay(
    plain: Run, tiny: dict[str, Any], tmp_path: Path, keep: rewind.Keep
) -> None:
    def after(run: Run, step: int) -> None:
        if step == 25:
            rewind.replay(run, 20, 3, "same", keep=keep)
            rewind.replay(run, 5, 4, "other", keep=keep)

    run = trained(tiny, tmp_path / "run", after)
    assert_same(everything(run), everything(plain))
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "sample", "action")
    assert [[r[k] for k in keys] for r in recorded(run).values()] == [
        [r[k] for k in keys] for r in recorded(plain).values()
    ]
    assert run.journal is not None and plain.journal is not None
    assert [r["type"] for r in read(run.journal.path)] == [r["type"] for r in read(plain.journal.path)]


def test_a_replay_while_a_step_is_decided_keeps_its_gradients(plain: Run, tiny: dict[str, Any], tmp_path: Path) -> None:
    seen: list[float] = []

    def decide(run: Run, signals: Signals) -> None:
        if signals.step == 33:
            seen.extend(run.host.replay(30, 4, "same").losses)  # type: ignore[attr-defined]

    run = trained(tiny, tmp_path / "run", decide=decide)
    assert_same(everything(run), everything(plain))
    steps = recorded(plain)
    assert seen == [steps[n]["loss"] for n in (31, 32, 33, 34)], "the step under way and the one to come included"


def test_the_step_under_way_shows_its_own_samples_also_after_a_jump(tiny: dict[str, Any], tmp_path: Path) -> None:
    seen: list[float] = []

    def decide(run: Run, signals: Signals) -> Decision | None:
        if signals.step == 33:
            seen.extend(run.host.replay(25, 13, "same").losses)  # type: ignore[attr-defined]
        return DropData(first=0, last=run.position.next_sample + 11) if signals.step == 26 else None

    steps = recorded(trained(tiny, tmp_path / "run", decide=decide))
    assert seen == [steps[n]["loss"] for n in range(21, 34)]


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_present_comes_back_whatever_happens(plain: Run, keep: rewind.Keep, fresh: bool) -> None:
    """Also where the optimizer has no moments at present, and where the replay fails half-way."""
    held = dict(plain.optimizer.state)
    try:
        if fresh:
            plain.optimizer.state.clear()
        before, random = everything(plain), torch.get_rng_state()
        rewind.replay(plain, 0, 2, "same", keep=keep)
        assert_same(everything(plain), before)
        asked = iter(range(3))

        def fails(batch: Batch) -> None:
            torch.rand(3)
            next(asked)
            type(plain).backward(plain, batch)

        plain.backward = fails  # type: ignore[method-assign]
        try:
            with pytest.raises(RuntimeError):  # a StopIteration inside a generator's consumer
                _as_runtime_error(lambda: rewind.replay(plain, 30, 9, "same", keep=keep))
        finally:
            del plain.backward
        assert_same(everything(plain), before)
        assert torch.equal(torch.get_rng_state(), random)
        assert plain.journal is not None and all(p.grad is None for p in plain.model.parameters())
    finally:
        plain.optimizer.state.update(held)


def _as_runtime_error(work: Callable[[], object]) -> None:
    try:
        work()
    except StopIteration as error:
        raise RuntimeError from error


def test_no_checkpoint_is_one_clear_line(plain: Run) -> None:
    before = everything(plain)
    with pytest.raises(UserError, match="no checkpoint of step -1 or before"):
        plain.host.replay(-1, 3, "same")
    assert_same(everything(plain), before)


# -- the learning rate ------------------------------------------------------------------------------------------


def test_a_cut_climbs_back_and_a_lasting_one_does_not(odd: Run, plain: Run) -> None:
    cut, base = recorded(odd), recorded(plain)
    shares = [cut[n]["lr"] / base[n]["lr"] for n in range(26, 34)]
    assert shares == pytest.approx([1, 0.5, 0.625, 0.75, 0.875, 1, 1, 1])


def test_rewarming_is_a_pure_function_and_cuts_multiply() -> None:
    assert rewarmed(Position(), 7) == 1.0
    position = Position(step=10, rewarm_factor=0.2, rewarm_start=10, rewarm_steps=8)
    assert [rewarmed(position, n) for n in (5, 11, 15, 19, 100)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])


def test_a_rollback_keeps_cuts_and_goes_on_climbing(tiny: dict[str, Any], tmp_path: Path, plain: Run) -> None:
    def after(run: Run, step: int) -> None:
        if step == 24 and run.position.next_sample == 24 * 4:
            run.host.scale_lr(0.5)
            run.host.scale_lr(0.2, 8)
        if step == 28 and run.position.next_sample == 28 * 4:
            assert rewarmed(run.position, 29) == pytest.approx(0.6)
            run.host.rollback(20, True)

    base, steps = recorded(plain), recorded(trained(tiny, tmp_path / "run", after))
    shares = [steps[n]["lr"] / base[n]["lr"] for n in range(20, 28)]
    assert shares == pytest.approx([1, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("wrong", [(-0.5, 0), (float("nan"), 0), (0.5, -1)])
def test_a_factor_that_cannot_be_is_refused(plain: Run, wrong: tuple[float, int]) -> None:
    with pytest.raises(UserError, match="scale_lr got"):
        plain.host.scale_lr(*wrong)
