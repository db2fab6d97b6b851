"""Each row of the table of ``guard/investigate.py``: on a rewinder made of numbers, and on real runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from poise.core.errors import UserError
from poise.core.host import Replayed, Rewinder
from poise.core.journal import read, timeline
from poise.core.types import Batch, Verdict
from poise.guard.investigate import Transplanter, investigate

EVENT, LEVEL = 50, 4.0
SPIKE = {EVENT: 8.0, EVENT + 1: 6.0}


def loss_at(step: int) -> float:
    return 3.0 + 10.0 / (step + 10)


@dataclass
class Fake:
    """A rewinder whose runs are written down: what each replay shows on top of a smooth descent."""

    same: list[dict[int, float]] = field(default_factory=lambda: [SPIKE, SPIKE])
    other: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    digests: tuple[str, str] = ("a" * 32, "a" * 32)
    checkpoints: tuple[int, ...] = (0, 25)
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def _checkpoint(self, at_most: int) -> int:
        good = [step for step in self.checkpoints if step <= at_most]
        if not good:
            raise UserError(f"no checkpoint of step {at_most} or before")
        return max(good)

    def replay(self, at_most: int, steps: int, data: Literal["same", "other"]) -> Replayed:
        start = self._checkpoint(at_most)
        self.calls.append((data, start, steps))
        nth = sum(call[0] == "same" and call[2] > 0 for call in self.calls) - 1
        bumps = self.other if data == "other" else self.same[max(nth, 0)] if steps else {}
        numbers = range(start + 1, start + steps + 1)
        losses = tuple(bumps.get(n, loss_at(n)) for n in numbers)
        norms = tuple(self.norms.get(n, 1.0) if data == "same" else 1.0 for n in numbers)
        return Replayed(start, losses, norms, self.digests[max(nth, 0)])


@dataclass
class FakeTransplanter(Fake):
    moved: float = 0.0

    def transplant(self, at_most: int, step: int, steps: int) -> Replayed:
        start = self._checkpoint(at_most)
        self.calls.append(("transplant", start, step, steps))
        losses = [loss_at(start + 1 + i) + 0.05 for i in range(steps)]
        losses[EVENT - step] = max(self.moved, losses[EVENT - step])
        return Replayed(start, tuple(losses), (1.0,) * steps, "b" * 32)


RECORD = [(n, SPIKE.get(n, loss_at(n))) for n in range(1, EVENT + 6)]


def ask(host: Rewinder, **more: Any) -> Verdict:
    return investigate(EVENT, host, observed=RECORD, level=LEVEL, samples=(196, 199), **more)


def test_the_protocols_tell_the_hosts_apart() -> None:
    assert isinstance(Fake(), Rewinder) and not isinstance(Fake(), Transplanter)
    assert isinstance(FakeTransplanter(), Transplanter)


def test_only_the_same_data_spikes_so_it_is_the_data() -> None:
    host = Fake()
    verdict = ask(host)
    assert (verdict.cause, verdict.certainty, verdict.samples) == ("data", "measured", (196, 199))
    assert host.calls == [("same", 25, 0), ("same", 25, 30), ("same", 25, 30), ("other", 25, 30)]
    text = "; ".join(verdict.evidence)
    for figure in ("bit-equal", "exactly", "loss 8 at step 50", "no loss above 4"):
        assert figure in text
    assert "another state was not tried" in text


def test_a_transplant_tells_the_data_alone_from_the_data_in_that_state() -> None:
    alone = ask(FakeTransplanter(moved=7.0))
    assert (alone.cause, alone.certainty) == ("data", "measured") and "whatever the weights" in alone.evidence[-1]
    host = FakeTransplanter()
    palm = ask(host)
    assert (palm.cause, palm.certainty) == ("data", "likely") and "in that state" in palm.evidence[-1]
    assert host.calls[-1] == ("transplant", 25, EVENT - 3, 9)


def test_the_bar_of_a_transplant_is_raised_by_what_is_normal_for_younger_weights() -> None:
    # From step 0 the loss is 3.91 at first: above the level of 3.3 without being a spike.
    verdict = investigate(EVENT, FakeTransplanter(checkpoints=(0,)), observed=RECORD, level=3.3)
    assert "in that state" in verdict.evidence[-1]


def test_both_spike_so_it_is_the_state() -> None:
    verdict = ask(Fake(other={EVENT - 2: 9.0}))
    assert (verdict.cause, verdict.certainty, verdict.samples) == ("optimizer", "likely", None)


def test_other_data_that_spike_long_before_the_event_are_another_matter() -> None:
    assert ask(Fake(other={EVENT - 20: 9.0})).cause == "data"


@pytest.mark.parametrize("fake", [Fake(digests=("a" * 32, "c" * 32)), Fake(same=[SPIKE, {40: 3.2}])])
def test_two_replays_that_differ_are_hardware(fake: Fake) -> None:
    verdict = ask(fake)
    assert (verdict.cause, verdict.certainty) == ("hardware", "measured")
    assert len(verdict.evidence) == 1 and "differ" in verdict.evidence[0]
    assert all(call[0] == "same" for call in fake.calls), "nothing else is tried on a machine that cannot count"


def test_rounding_blames_nobody_where_replays_are_not_bit_equal_by_design() -> None:
    slightly = {**SPIKE, 40: loss_at(40) + 1e-5}
    fake = Fake(same=[SPIKE, slightly], digests=("a" * 32, "c" * 32))
    assert ask(fake, deterministic=False).cause == "data"
    assert ask(replace(fake, calls=[])).cause == "hardware"
    coarse = Fake(same=[SPIKE, {**SPIKE, 40: 5.0}])
    assert ask(coarse, deterministic=False).cause == "hardware"


def test_what_does_not_come_back_was_outside_data_and_state() -> None:
    verdict = ask(Fake(same=[{}, {}]))
    assert (verdict.cause, verdict.certainty) == ("hardware", "likely")
    assert "agrees with the record until step 49 and not at step 50: 8 recorded" in verdict.evidence[1]
    chance = ask(Fake(same=[{}, {}]), deterministic=False)
    assert (chance.cause, chance.certainty) == ("unknown", "possible")


def test_a_gradient_that_was_not_finite_and_is_now_was_hardware() -> None:
    record = [(n, loss_at(n)) for n in range(1, EVENT + 1)]
    norms = [(n, math.nan if n == EVENT else 1.0) for n in range(1, EVENT + 1)]
    fake = Fake(same=[{}, {}])
    verdict = investigate(EVENT, fake, observed=record, grad_norms=norms, level=LEVEL)
    assert (verdict.cause, verdict.certainty) == ("hardware", "likely")
    again = Fake(same=[{}, {}], norms={EVENT: math.nan})
    verdict = investigate(EVENT, again, observed=record, grad_norms=norms, level=LEVEL)
    assert verdict.cause == "data" and "gradient norm is not finite at step 50" in "".join(verdict.evidence)


def test_a_loss_that_is_not_finite_is_a_spike() -> None:
    nan = {EVENT: math.nan}
    record = [(n, nan.get(n, loss_at(n))) for n in range(1, EVENT + 1)]
    assert investigate(EVENT, Fake(same=[nan, nan]), observed=record, level=LEVEL).certainty == "measured"


def test_only_other_data_spike() -> None:
    verdict = ask(Fake(same=[{}, {}], other=SPIKE))
    assert (verdict.cause, verdict.certainty) == ("optimizer", "possible")


def test_a_record_without_a_spike_is_nothing_to_explain() -> None:
    record = [(n, loss_at(n)) for n in range(1, EVENT + 1)]
    verdict = investigate(EVENT, Fake(same=[{}, {}]), observed=record, level=LEVEL)
    assert (verdict.cause, verdict.certainty) == ("unknown", "possible")


def test_without_an_early_checkpoint_it_is_unknown_and_no_error() -> None:
    verdict = ask(Fake(checkpoints=(45,)))
    assert (verdict.cause, verdict.certainty) == ("unknown", "possible")
    assert "no checkpoint of step 30 or before" in verdict.evidence[0]


def test_a_replay_that_leaves_the_record_first_is_worth_less() -> None:
    record = [(n, loss + (0.5 if n == 30 else 0.0)) for n, loss in RECORD]
    verdict = investigate(EVENT, Fake(), observed=record, level=LEVEL)
    assert (verdict.cause, verdict.certainty) == ("data", "likely")


@pytest.mark.parametrize("wrong", [{"back": 0}, {"ahead": -1}, {"tolerance": -1.0}, {"tolerance": math.nan}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="investigate got"):
        ask(Fake(), **wrong)


# -- real runs -------------------------------------------------------------------------------------------------


def trained(tiny: dict[str, Any], folder: Path, garbage_at: int = 0, corrupt_at: int = 0) -> tuple[Any, Any]:
    """Train 40 steps without a guard; return the run, which has a checkpoint every 8 steps, and its step records."""
    from poise.train.observers import Observer, StepReport
    from poise.train.recipe import load
    from poise.train.run import train
    from poise.train.state import Run

    runs: list[Run] = []
    over = {"steps": 40, "save_every": 8, "keep_last": 9, "eval_every": 0}
    values = {**tiny, "train": {**tiny["train"], **over}, "guard": {"enabled": False}}

    class Corrupt(Observer):
        def on_step(self, report: StepReport) -> None:
            if report.signals.step == corrupt_at:
                with torch.no_grad():
                    runs[0].model.embedding.weight.mul_(20.0)

    def before(run: Run) -> None:
        runs.append(run)
        real, size = run.loader.batch, run.recipe.train.batch_size

        def batch(first: int, count: int, view: Any) -> Batch:
            clean = real(first, count, view)
            if first != (garbage_at - 1) * size:
                return clean
            generator = torch.Generator().manual_seed(1)
            tokens = torch.randint(512, (count, clean.inputs.shape[1] + 1), generator=generator)
            return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), clean.samples)

        run.loader.batch = batch  # type: ignore[method-assign]

    train(load("nano", values), folder, observers=[Corrupt()], before=before)
    steps = [r for r in timeline(read(folder / "journal.jsonl")) if r["type"] == "step"]
    return runs[0], steps


def test_a_garbage_batch_is_found_by_experiment(tiny: dict[str, Any], tmp_path: Path) -> None:
    run, steps = trained(tiny, tmp_path / "run", garbage_at=36)
    observed = [(r["step"], r["loss"]) for r in steps]
    level = max(loss for step, loss in observed if 25 <= step < 36) + 0.3
    assert dict(observed)[36] > level, "the fault shows"
    verdict = investigate(36, run.host, observed=observed, level=level, back=10, ahead=2, samples=(140, 143))
    assert (verdict.cause, verdict.certainty, verdict.samples) == ("data", "measured", (140, 143)), verdict
    text = "; ".join(verdict.evidence)
    assert "steps 25 to 38 exactly" in text and "data alone" in text


def test_a_corrupted_weight_does_not_come_back(tiny: dict[str, Any], tmp_path: Path) -> None:
    run, steps = trained(tiny, tmp_path / "run", corrupt_at=24)
    observed = [(r["step"], r["loss"]) for r in steps]
    level = max(loss for step, loss in observed if 18 <= step < 25) + 0.3
    assert dict(observed)[25] > level, "the fault shows"
    verdict = investigate(25, run.host, observed=observed, level=level, back=10, ahead=2)
    assert (verdict.cause, verdict.certainty) == ("hardware", "likely"), verdict
    assert "agrees with the record until step 24 and not at step 25" in verdict.evidence[1]
