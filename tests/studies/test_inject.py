"""Every fault strikes as it says, at its batch and never else; without a fault an injector is as if it were absent."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.core.errors import UserError
from poise.core.host import Replayed
from poise.core.journal import read
from poise.core.types import IGNORE, Batch, Proceed, Rollback
from poise.data.feed.loader import View
from poise.studies.faults import CASES, KINDS, Fault, flip_bit, parameters_at
from poise.studies.inject import Injector
from poise.train.recipe import load
from poise.train.run import train
from poise.train.state import Run

AT, STEPS = 6, 10
FAULTS = {
    "nan_gradient": Fault("nan_gradient", AT, place="block.1"),
    "inf_gradient": Fault("inf_gradient", AT, place="block.0.fc2"),
    "garbage_batch": Fault("garbage_batch", AT),
    "repeated_token_batch": Fault("repeated_token_batch", AT),
    "loud_batch": Fault("loud_batch", AT, factor=10.0),
    "label_shift": Fault("label_shift", AT, length=2),
    "repeated_data": Fault("repeated_data", AT, length=2),
    "high_lr": Fault("high_lr", AT, length=2, factor=30.0),
    "lr_jump": Fault("lr_jump", AT, factor=30.0),
    "qk_growth": Fault("qk_growth", AT, length=2, factor=1.15, place="block.1"),
    "scaled_layer": Fault("scaled_layer", AT, factor=4.0, place="block.1"),
    "bit_flip": Fault("bit_flip", AT, place="block.1"),
    "shrunk_v": Fault("shrunk_v", AT, factor=1e-6, place="block.1"),
    "stale_v": Fault("stale_v", AT, length=3, factor=0.5, place="block.1"),
}
IN_BATCHES = ("garbage_batch", "repeated_token_batch", "label_shift", "repeated_data")
IN_WEIGHTS = ("qk_growth", "scaled_layer", "bit_flip")


Struck = Callable[..., tuple[list["Shot"], list[dict[str, Any]]]]


@dataclass
class Shot:
    """A step as its forward pass met it, and the gradient it left."""

    step: int
    batch: Batch
    lr: float
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def shoot(run: Run, shots: list[Shot]) -> None:
    """Take a shot of every training step."""
    inner = run.backward

    def backward(batch: Batch) -> None:
        named = dict(run.model.named_parameters())
        moments = {n: run.optimizer.state[p]["exp_avg_sq"].clone() for n, p in named.items() if run.optimizer.state[p]}
        weights = {n: p.detach().clone() for n, p in named.items()}
        shots.append(Shot(run.position.step, batch, run.optimizer.lr, weights, moments))
        inner(batch)
        shots[-1].gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}

    run.backward = backward  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["garbage_batch", "repeated_token_batch", "label_shift", "repeated_data"])
def test_batches_keep_their_cut_and_their_documents(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    """With ramps the n-th batch is the n-th step's, whatever its size; attention stays inside documents."""
    ramps = {"length_start": 8, "length_tokens": 500, "batch_start": 1, "batch_tokens": 300, "both_ramps": True}
    over = {**values, "data": values["data"] | {"document_mask": True}, "train": values["train"] | ramps}
    runs: list[Run] = []
    shots: list[Shot] = []
    plain: list[Shot] = []

    def attach(run: Run) -> None:
        runs.append(run)
        Injector([FAULTS[kind]]).attach(run)
        shoot(run, shots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.train.run.write_report", lambda folder: None)
        train(load("nano", over), tmp_path / "run", before=attach)
        train(load("nano", over), tmp_path / "plain", before=lambda run: shoot(run, plain))
    for bad, good in zip(shots, plain, strict=True):
        assert bad.batch.samples == good.batch.samples and bad.batch.inputs.shape == good.batch.inputs.shape
        same = torch.equal(bad.batch.inputs, good.batch.inputs) and torch.equal(bad.batch.targets, good.batch.targets)
        assert same == (not AT <= bad.step < AT + FAULTS[kind].length), bad.step
        if kind != "repeated_data":
            assert torch.equal(bad.batch.documents, good.batch.documents)  # type: ignore[arg-type]
    assert len({shot.batch.inputs.shape for shot in shots}) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs[0], "_rows", [])
        gathered = runs[0].loader.gather([0, 3], View(8))
        assert gathered.samples == (0,) * 4 + (3,) * 4 and gathered.documents is not None


def decide_by(run: Run, decide: Callable[[int], Any]) -> None:
    """Put ``decide(step)`` in the guard's place; where it returns nothing the step is taken."""
    run.guard.decide = lambda signals, *_, **__: decide(signals.step) or Proceed()  # type: ignore[method-assign]


def straight(run: Run) -> None:
    """Take every step."""


def go_back_once(run: Run) -> None:
    """Step 9 is rolled back to step 5; what is trained from there is new data."""
    asked: list[int] = []

    def decide(step: int) -> Any:
        if step == 9 and not asked:
            asked.append(step)
            return Rollback(at_most=5)
        return None

    decide_by(run, decide)


@pytest.fixture(scope="module")
def values(tiny: dict[str, Any]) -> dict[str, Any]:
    """Ten steps at a constant learning rate, on the way without warm-up, with a checkpoint at step 5."""
    return {
        **tiny,
        "optim": {"lr": 5e-3, "schedule": {"kind": "constant", "warmup_steps": 0}},
        "guard": {"enabled": False},
        "train": {**tiny["train"], "steps": STEPS, "save_every": 5, "eval_every": 0},
    }


@pytest.fixture(scope="module")
def struck(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    """Run with faults; return the shots and the announcements. A run with the same faults and way is run once."""
    known: dict[Any, tuple[list[Shot], list[dict[str, Any]]]] = {}

    def go(*faults: Fault, before: Callable[[Run], None] = go_back_once) -> tuple[list[Shot], list[dict[str, Any]]]:
        key = (faults, before)
        if key not in known:
            shots: list[Shot] = []

            def attach(run: Run) -> None:
                before(run)
                if faults:  # "absent" is without an injector
                    Injector(faults).attach(run)
                shoot(run, shots)

            folder = tmp_path_factory.mktemp("struck") / "run"
            train(load("nano", values), folder, before=attach)
            known[key] = shots, read(folder / "journal.jsonl")
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.train.run.write_report", lambda folder: None)  # nobody reads the pages of these runs
        yield go


@pytest.fixture(scope="module")
def clean(struck: Struck) -> list[Shot]:
    """The same run without any injector, its rollback included."""
    return struck()[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a: Shot, b: Shot) -> bool:
    batches = torch.equal(a.batch.inputs, b.batch.inputs) and torch.equal(a.batch.targets, b.batch.targets)
    state = same(a.weights, b.weights) and same(a.moments, b.moments) and same(a.gradients, b.gradients)
    return batches and state and (a.step, a.lr, a.batch.samples) == (b.step, b.lr, b.batch.samples)


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_every_kind_is_tested_and_in_the_campaign() -> None:
    assert set(FAULTS) == set(KINDS) == set(CASES)


def test_off_equals_absent(clean: list[Shot], struck: Struck) -> None:
    shots, _ = struck(*(dataclasses.replace(fault, at=1000) for fault in FAULTS.values()))
    assert len(shots) == len(clean) == 14 and all(map(equal, shots, clean))


@pytest.mark.parametrize("kind", list(FAULTS))
def test_nothing_before_the_onset_and_something_then(kind: str, clean: list[Shot], struck: Struck) -> None:
    shots, records = struck(FAULTS[kind])
    onset = AT - 1
    assert all(map(equal, shots[:onset], clean[:onset]))
    assert not equal(shots[onset], clean[onset])
    said = [r for r in records if r["type"] == "event" and "injected" in r]
    assert [(r["step"], r["injected"], r["place"]) for r in said] == [(AT, kind, FAULTS[kind].place)]
    assert (
        said[0]["causes"]
        and said[0]["recoverable"]
        and said[0]["message"].startswith("injected: ")
        and "{" not in said[0]["message"]
    )


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "lr_jump"])
def test_never_again_after_a_rollback_to_new_data(kind: str, clean: list[Shot], struck: Struck) -> None:
    """The stretch after the rollback is bit-equal to that of a run without an injector."""
    again, twin = struck(FAULTS[kind])[0][9:], clean[9:]
    assert [shot.step for shot in again] == [6, 7, 8, 9, 10]
    assert [shot.batch.samples[0] // 4 + 1 for shot in again] == [10, 11, 12, 13, 14]
    assert all(map(equal, again, twin))


@pytest.mark.parametrize(("kind", "value"), [("nan_gradient", torch.nan), ("inf_gradient", torch.inf)])
def test_one_gradient_element(kind: str, value: float, clean: list[Shot], struck: Struck) -> None:
    shots, _ = struck(FAULTS[kind])
    name = {"nan_gradient": "trunk.blocks.1.mlp.inner.weight", "inf_gradient": "trunk.blocks.0.mlp.out.weight"}[kind]
    got, sound = shots[AT - 1].gradients, clean[AT - 1].gradients
    assert changed(got, sound) == {name}
    assert int((got[name] != sound[name]).sum()) == 1
    assert torch.equal(got[name].view(-1)[:1], torch.tensor([value])) or got[name].view(-1)[0].isnan()
    assert all(torch.isfinite(g).all() for shot in shots[AT:] for g in shot.gradients.values())


@pytest.mark.parametrize("kind", IN_BATCHES)
def test_only_the_batch_is_touched(kind: str, clean: list[Shot], struck: Struck) -> None:
    (shots, _), length = struck(FAULTS[kind]), FAULTS[kind].length
    assert same(shots[AT - 1].weights, clean[AT - 1].weights) and same(shots[AT - 1].moments, clean[AT - 1].moments)
    for shot, sound in zip(shots[:9], clean[:9], strict=True):
        strikes = AT <= shot.step < AT + length
        inputs, targets = shot.batch.inputs, shot.batch.targets
        assert shot.batch.samples == sound.batch.samples
        if not strikes:
            assert torch.equal(inputs, sound.batch.inputs) and torch.equal(targets, sound.batch.targets)
        elif kind == "label_shift":
            assert torch.equal(inputs, sound.batch.inputs)
            assert torch.equal(targets[:, :-1], sound.batch.targets[:, 1:]) and bool((targets[:, -1] == IGNORE).all())
        elif kind == "repeated_data":
            last = clean[AT - 2].batch
            assert torch.equal(inputs, last.inputs) and torch.equal(targets, last.targets)
        elif kind == "repeated_token_batch":
            assert len(torch.cat([inputs, targets]).unique()) == 1
        else:
            assert len(inputs.unique()) > 64 and not torch.equal(inputs, sound.batch.inputs)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_loud_batch(clean: list[Shot], struck: Struck) -> None:
    shots, records = struck(FAULTS["loud_batch"])
    got, sound = shots[AT - 1], clean[AT - 1]
    assert torch.equal(got.batch.inputs, sound.batch.inputs) and same(got.weights, sound.weights)
    for name, gradient in sound.gradients.items():
        torch.testing.assert_close(got.gradients[name], 10 * gradient, rtol=1e-4, atol=1e-5)
    loss = {r["step"]: r["loss"] for r in records[: len(records) // 2] if r["type"] == "step"}
    assert loss[AT] > 9 * loss[AT - 1] and loss[AT + 1] < 2 * loss[AT - 1]


def test_loudness_is_of_the_training_step_only(values: dict[str, Any], tmp_path: Path) -> None:
    """Somebody who looks at the loud batch again sees the model as it is."""
    seen: list[float] = []

    def attach(run: Run) -> None:
        Injector([FAULTS["loud_batch"]]).attach(run)
        inner = run.backward

        def backward(batch: Batch) -> None:
            inner(batch)
            with torch.no_grad():
                seen.append(float(run.model(batch.inputs, batch.targets).ce))

        run.backward = backward  # type: ignore[method-assign]

    train(load("nano", values), tmp_path / "run", before=attach)
    assert max(seen) < 2 * min(seen)


@pytest.mark.parametrize(("kind", "ratios"), [("high_lr", [1, 30, 30, 1]), ("lr_jump", [1, 30, 30, 30])])
def test_learning_rate(kind: str, ratios: list[float], clean: list[Shot], struck: Struck) -> None:
    shots, _ = struck(FAULTS[kind])
    assert [shot.lr / clean[0].lr for shot in shots[AT - 2 : 9]] == pytest.approx([*ratios, ratios[-1]])
    assert same(shots[AT - 1].weights, clean[AT - 1].weights)


def test_the_host_can_undo_a_jump(struck: Struck, clean: list[Shot]) -> None:
    def undo(run: Run) -> None:
        decide_by(run, lambda step: run.host.scale_lr(1 / 30) if step == AT + 1 else None)

    shots, _ = struck(FAULTS["lr_jump"], before=undo)
    assert shots[AT].lr == pytest.approx(30 * clean[0].lr) and shots[AT + 1].lr == pytest.approx(clean[0].lr)


@pytest.mark.parametrize("kind", IN_WEIGHTS)
def test_only_weights_of_the_place_are_touched(kind: str, clean: list[Shot], struck: Struck) -> None:
    shots, _ = struck(FAULTS[kind])
    got, sound = shots[AT - 1].weights, clean[AT - 1].weights
    assert torch.equal(shots[AT - 1].batch.inputs, clean[AT - 1].batch.inputs)
    touched = changed(got, sound)
    assert touched and all(name.startswith("trunk.blocks.1.") for name in touched)
    if kind == "scaled_layer":
        assert len(touched) == 4 and all(torch.equal(got[name], 4 * sound[name]) for name in touched)
    elif kind == "qk_growth":
        assert touched == {"trunk.blocks.1.attn.qkv.weight"}
        name = touched.pop()
        assert torch.equal(got[name][:64], 1.15 * sound[name][:64]) and torch.equal(got[name][64:], sound[name][64:])
    else:
        name = touched.pop()
        (index,) = (got[name] != sound[name]).flatten().nonzero().flatten().tolist()
        bits = [struct.unpack("<I", struct.pack("<f", float(w[name].flatten()[index])))[0] for w in (got, sound)]
        assert bits[0] ^ bits[1] == 1 << 30 and not touched and abs(float(got[name].flatten()[index])) > 1e30


def test_queries_and_keys_grow_at_every_step_of_the_fault(struck: Struck) -> None:
    """Between two forward passes lies one update (at most 5e-3 and a little decay) and one growth, while it lasts."""
    shots, _ = struck(dataclasses.replace(FAULTS["qk_growth"], factor=8.0, length=3))
    shots = shots[:9]
    norms = [float(shot.weights["trunk.blocks.1.attn.qkv.weight"][:64].norm()) for shot in shots]
    ratios = [b / a for a, b in pairwise(norms)]
    assert ratios[AT - 2 : AT + 1] == pytest.approx([8, 8, 8], rel=0.15)
    assert [*ratios[: AT - 2], *ratios[AT + 1 :]] == pytest.approx([1] * 5, rel=0.15)


def test_looking_at_a_batch_again_changes_nothing_twice(struck: Struck, clean: list[Shot]) -> None:
    """A guard reads the last good batch and the present one again; what has struck does not strike for that."""

    def curious(run: Run) -> None:
        def decide(step: int) -> None:
            for number in range(max(step - 1, 1), step + 1):
                run.loader.batch((number - 1) * 4, 4)

        decide_by(run, decide)

    faults = [FAULTS["qk_growth"], FAULTS["scaled_layer"], FAULTS["stale_v"]]
    shots, _ = struck(*faults, before=curious)
    name = "trunk.blocks.1.attn.qkv.weight"
    assert torch.equal(shots[AT - 1].weights[name][64:], 4 * clean[AT - 1].weights[name][64:])
    growth = float(shots[AT].weights[name][:64].norm() / shots[AT - 1].weights[name][:64].norm())
    assert growth == pytest.approx(1.15, rel=0.05)
    assert torch.equal(shots[AT].moments[name], shots[AT - 1].moments[name])


def test_shrunk_moments(clean: list[Shot], struck: Struck) -> None:
    shots, _ = struck(FAULTS["shrunk_v"])
    got, sound = shots[AT - 1], clean[AT - 1]
    touched = changed(got.moments, sound.moments)
    assert touched == {name for name in got.moments if name.startswith("trunk.blocks.1.")}
    assert all(torch.equal(got.moments[name], 1e-6 * sound.moments[name]) for name in touched)
    assert same(got.weights, sound.weights) and same(got.gradients, sound.gradients)
    name = "trunk.blocks.1.mlp.out.weight"
    moved, usual = (float((s[AT].weights[name] - s[AT - 1].weights[name]).norm()) for s in (shots, clean))
    assert moved > 1.5 * usual


def test_stale_moments_stand_still_for_their_time(clean: list[Shot], struck: Struck) -> None:
    shots, _ = struck(FAULTS["stale_v"], before=straight)
    inside = [name for name in clean[0].weights if name.startswith("trunk.blocks.1.")]
    for name in inside:
        held = 0.5 * clean[AT - 1].moments[name]
        stands = [torch.equal(shot.moments[name], held) for shot in shots[AT - 1 :]]
        assert stands == [True, True, True, True, False], "three updates leave it as it is, the next does not"
    assert same(
        {n: v for n, v in shots[AT].moments.items() if n not in inside},
        {n: v for n, v in clean[AT].moments.items() if n not in inside},
    ), "one update later the other places' moments are those of the clean run"


def test_a_reset_mends_stale_moments(struck: Struck) -> None:
    def reset(run: Run) -> None:
        decide_by(run, lambda step: run.host.reset_moments() if step == AT + 1 else None)

    shots, _ = struck(dataclasses.replace(FAULTS["stale_v"], length=100), before=reset)
    name = "trunk.blocks.1.mlp.out.weight"
    assert torch.equal(shots[AT].moments[name], shots[AT - 1].moments[name])
    later = [shot.moments[name] for shot in shots[AT + 1 :]]
    assert not any(torch.equal(a, b) for a, b in pairwise(later))


def test_second_moments_must_be_there(struck: Struck) -> None:
    with pytest.raises(UserError, match="after the first update"):
        struck(Fault("shrunk_v", 1, factor=0.1, place="block.0"))


class Laboratory:
    """A host that trains three steps on the side: batches 6 to 8, from step 5 on."""

    def __init__(self, run: Run, shots: list[Shot]) -> None:
        self._run, self._shots = run, shots
        self.rollback, self.drop_data = run.host.rollback, run.host.drop_data
        self.scale_lr, self.reset_moments, self.halt = run.host.scale_lr, run.host.reset_moments, run.host.halt

    def replay(self, at_most: int, steps: int, data: str, **_: Any) -> Replayed:
        run, shots = self._run, self._shots
        before, weights = dataclasses.replace(run.position), [p.detach().clone() for p in run.model.parameters()]
        run.position.step, run.position.next_sample = AT - 1, (AT - 1) * 4 if data == "same" else 4000
        lrs = []
        inner, mark = run.backward, len(shots)
        for _ in range(steps):
            for batch in run.next_batches():
                inner(batch)
                lrs.append(run.optimizer.lr)
            run.optimizer.zero_grad()
        self.replayed, self.lrs = shots[mark:], lrs
        del shots[mark:]
        run.position = before
        with torch.no_grad():
            for p, w in zip(run.model.parameters(), weights, strict=True):
                p.copy_(w)
        getattr(run, "_readings", []).clear()
        return Replayed(AT - 1, (), (), "")


@pytest.mark.parametrize("data", ["same", "other"])
def test_in_a_replay_faults_are_what_they_are(
    data: str, values: dict[str, Any], clean: list[Shot], tmp_path: Path
) -> None:
    """Data faults come with their batches, those of schedule and architecture with their steps, passing ones never."""
    shots: list[Shot] = []
    labs: list[Laboratory] = []
    faults = [FAULTS[k] for k in ("garbage_batch", "lr_jump", "qk_growth", "nan_gradient", "scaled_layer")]

    def attach(run: Run) -> None:
        labs.append(Laboratory(run, shots))
        run.host = labs[0]  # type: ignore[assignment]
        Injector(faults).attach(run)
        shoot(run, shots)
        senses = getattr(run, "senses", None)

        def decide(step: int) -> None:
            if step == AT + 2:
                run.optimizer.zero_grad()
                run.host.replay(AT - 1, 3, data)  # type: ignore[attr-defined]
                for name in ("_losses", "_log_z", "_prints"):
                    getattr(senses, name, []).clear()

        decide_by(run, decide)

    halves = {**values, "train": {**values["train"], "micro_batch": 2}}
    train(load("nano", halves), tmp_path / "run", before=attach)
    assert len(labs[0].replayed) == 6
    second, replayed = labs[0].replayed[1], labs[0].replayed[::2]
    assert same(second.weights, replayed[0].weights), "a fault of the steps strikes a step once, not a micro-batch"
    garbage = [not torch.equal(s.batch.inputs, c.batch.inputs[:2]) for s, c in zip(replayed, clean[5:8], strict=True)]
    assert garbage == ([True, False, False] if data == "same" else [True, True, True])
    if data == "other":
        assert all(torch.isfinite(g).all() for s in replayed for g in s.gradients.values())
    assert [lr / clean[0].lr for lr in labs[0].lrs] == pytest.approx([30] * 6)
    name = "trunk.blocks.1.attn.qkv.weight"
    growth = [float(s.weights[name][:64].norm() / replayed[0].weights[name][:64].norm()) for s in replayed]
    assert growth == pytest.approx([1, 1.15, 1.15], rel=1e-3), "steps 6 and 7 grow, as they did; nothing else does"
    values_ = [float(s.weights[name][64:].norm()) for s in replayed]
    assert values_ == pytest.approx([values_[0]] * 3), "the layer is not scaled again"
    assert all(torch.isfinite(g).all() for s in replayed for g in s.gradients.values())
    events = [r for r in read(tmp_path / "run" / "journal.jsonl") if "injected" in r]
    assert sorted(r["injected"] for r in events) == sorted(f.kind for f in faults), "a replay announces nothing"


def test_places(values: dict[str, Any], tmp_path: Path) -> None:
    found: dict[str, list[str]] = {}

    def look(run: Run) -> None:
        for place in ("", "embed", "final", "block.0", "block.1.qkv", "block.1.proj", "block.1.fc1", "block.1.fc2"):
            found[place] = list(parameters_at(run.model, place))
        with pytest.raises(UserError, match=r"no place 'block\.2'"):
            Injector([Fault("bit_flip", 3, place="block.2")]).attach(run)
        before = [p.detach().clone() for p in run.model.parameters()]
        once, twice = flip_bit(run.model, "block.0", 7), flip_bit(run.model, "block.0", 7)
        assert once[0] == twice[0] and once[1:] == twice[:0:-1], "flipping back gives the weight back"
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))

    short = {**values, "train": {**values["train"], "steps": 1}}
    train(load("nano", short), tmp_path / "run", before=look)
    assert found["embed"] == ["embedding.weight"] and found["final"] == ["trunk.norm.weight"]
    assert found["block.1.fc2"] == ["trunk.blocks.1.mlp.out.weight"]
    ends = 3  # embedding, final norm, head
    assert len(found[""]) == ends + 2 * len(found["block.0"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fault("nan_gradient", at=0), "at least 1"),
        (lambda: Fault("bit_flop", 3), "did you mean 'bit_flip'"),  # type: ignore[arg-type]
        (lambda: Fault("bit_flip", 3), "needs a place"),
        (lambda: Fault("lr_jump", 3), "factor 1 changes nothing"),
        (lambda: Fault("high_lr", 3, factor=float("nan")), "finite number above 0"),
    ],
)
def test_a_fault_that_cannot_be(make: Callable[[], Fault], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
