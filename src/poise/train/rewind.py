"""Train a stretch again on the side, and come back as if nothing had happened: ``core.host.Rewinder`` for a ``Run``.

A replay loads an earlier checkpoint, trains some steps from it, and puts the present back bit for bit: weights,
moments, learning rates, position, gradients and random streams. Guard, journal and checkpoints are not touched.
The steps that the journal knows are done again as they were done then: the samples that were shown (after a
rollback, samples and steps no longer go side by side), the learning rate that was used, and what the guard did to
the step. What the guard does not decide by itself needs no record, because a batch is a pure function of its sample
number.

Memory: the present lies aside in the machine's main memory, one copy of weights and moments (12 bytes a parameter
with AdamW, over all ranks together), or in an unnamed file in the run's folder when less than that is free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.core.errors import UserError
from poise.core.host import Replayed
from poise.core.journal import Record, timeline
from poise.core.types import Batch
from poise.data.feed.loader import View
from poise.data.feed.skips import after, samples_of
from poise.hardware.distributed import broadcast, gather, mean_over_ranks
from poise.hardware.state import flatten, optimizer_targets, pack, unflatten, unpack
from poise.model.losses import LossOutput
from poise.train import mend
from poise.train.position import Position, upcoming, view_of, weighed

if TYPE_CHECKING:
    from poise.train.state import Run

Keep = Literal["auto", "memory", "disk"]

_NEEDED = ("max_norm", "places", "threshold", "logit_max")
"""Fields of a decision by which it is carried out again: all ranks are told of them."""

_MENDS = ("reset_moments", "qk_clip", "raise_precision")
"""Decisions that change the model or the optimizer: a replay with other data makes them as well."""


def replay(
    run: Run,
    at_most: int,
    steps: int,
    data: Literal["same", "other"],
    *,
    samples_from: int | None = None,
    keep: Keep = "auto",
) -> Replayed:
    """Train ``steps`` steps from the newest good checkpoint at or before ``at_most``; then restore the present.

    All ranks call it together, between two steps or while one is being decided. Steps after the present one, and
    those whose decision is still open, are trained with a plain update. The schedule goes on as it would have.

    Args:
        run: it is as before afterwards, also when something is raised.
        at_most: newest step of the checkpoint.
        steps: how many steps; 0 only finds out where one would start.
        data: ``same`` shows what the run was shown, with what the guard did then (skips, clips, mends);
            ``other`` shows samples after all that were ever shown (they do not count as shown), skips nothing, and
            keeps learning rates and mends. On a small text these are sequences of a later epoch; where a mixture
            ends before, they are those shown longest ago or far ahead.
        samples_from: with ``same``, show the samples of this step and those after it at once, whatever came
            between, with plain updates: the same data, to weights that are not those they met.
        keep: where the present lies meanwhile; ``auto`` chooses by free memory.

    Raises:
        UserError: there is no such checkpoint.
    """
    assert steps >= 0
    if run.store.latest(at_most) is None:
        raise UserError(f"no checkpoint of step {at_most} or before to replay from; save more often or keep more")
    records = run.records()
    with _aside(run, keep):
        loaded = run.store.restore(run.model, run.optimizer, at_most=at_most, expect=run.fingerprint)
        present = run.position
        run.position = Position.of(loaded.meta["position"])
        run.position.dropped = present.dropped  # each with the step from which it counts
        mend.set_precision(run.model, run.position.fp32_places)
        plan = broadcast(_plan(run, present, records, steps, data, samples_from))
        readings = [_step(run, shown) for shown in plan]
        digest = _digest(run)
    losses, norms = zip(*readings, strict=True) if readings else ((), ())
    return Replayed(loaded.step, tuple(losses), tuple(norms), digest)


# -- what is shown ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """One step of a replay: its samples and how they are shown, its learning rate where known, and what the guard did
    to it."""

    samples: Sequence[int]
    view: View
    lr: float | None = None
    action: str = "proceed"
    fields: Mapping[str, Any] = field(default_factory=dict)


def _plan(
    run: Run, present: Position, records: list[Record], steps: int, data: str, samples_from: int | None
) -> list[Shown]:
    """Return what each step shows; ``run.position`` is that of the checkpoint, ``present`` that of the run.

    Only rank 0 has the journal's ``records``, so its plan is the one that counts.
    """
    known = {r["step"]: r for r in timeline(records) if r["type"] == "step" and r["step"] <= present.step}
    start = run.position
    lr = {step: float(record["lr"]) for step, record in known.items()}
    acts = _acts(records)
    numbers = range(start.step + 1, start.step + steps + 1)
    if data == "other":
        mends = {step: act for step, act in acts.items() if act["action"] in _MENDS}
        usual = _met(run, present, known, numbers)
        return [
            _shown(samples, met.view, lr.get(n), mends.get(n))
            for n, met, samples in zip(numbers, usual, _others(run, present, records, usual), strict=True)
        ]
    first = start.step + 1 if samples_from is None else samples_from
    met = _met(run, present, known, range(first, first + steps))
    return [
        _shown(one.samples, one.view, lr.get(n), acts.get(n) if n in known and samples_from is None else None)
        for n, one in zip(numbers, met, strict=True)
    ]


class _Met(NamedTuple):
    """What a step shows: its samples, and how."""

    samples: Sequence[int]
    view: View


def _met(run: Run, present: Position, known: Mapping[int, Record], numbers: Sequence[int]) -> list[_Met]:
    """Return what each of some steps shows: as journalled, as it is being shown, or as it would be."""
    recipe, found = run.recipe, list[_Met]()
    for step in numbers:
        if step in known:
            samples = samples_of(known[step], recipe.train.batch_size)
            seen = int(known[step]["tokens"]) - len(samples) * recipe.train.seq_len
        elif step == present.step:
            samples, seen = run.shown, present.tokens - run.step_tokens
        else:
            samples, seen = _ahead(run, present if step > present.step else run.position, step)
        found.append(_Met(samples, view_of(recipe, present, step, seen)))
    return found


def _ahead(run: Run, position: Position, step: int) -> tuple[Sequence[int], int]:
    """Return the samples that ``step`` will show if all goes well from ``position`` on, and the tokens seen before."""
    shown: Sequence[int] = range(0)
    at = dataclasses.replace(position)
    for _ in range(position.step, step):
        at.tokens += len(shown) * run.recipe.train.seq_len
        shown = upcoming(run.recipe, at)
        at.next_sample = shown[-1] + 1
    return shown, at.tokens


def _others(run: Run, present: Position, records: list[Record], usual: Sequence[_Met]) -> Iterator[Sequence[int]]:
    """Yield other samples for steps, as many for each: never shown, where there are such."""
    size, need = run.recipe.train.batch_size, sum(len(met.samples) for met in usual)
    shown = [samples_of(r, size)[-1] + 1 for r in records if r["type"] == "step"]
    # Also after what "same" would show in the future, as long as steps are no larger than a full one.
    at = max([present.next_sample, *shown]) + len(usual) * size
    end = None if run.loader.mix is None else run.loader.mix.total
    if end is not None and at + need > end:
        at = (usual[0].samples[0] + end // 2) % end if usual else 0
        at = max(0, min(at, end - need))
    for met in usual:
        other = after(at, len(met.samples), present.skips if end is None else [])
        at = other[-1] + 1
        yield other


def _shown(samples: Sequence[int], view: View, lr: float | None, act: Record | None) -> Shown:
    if act is None:
        return Shown(samples, view, lr)
    return Shown(samples, view, lr, act["action"], {name: act[name] for name in _NEEDED if name in act})


def _acts(records: list[Record]) -> dict[int, Record]:
    """Return the decision that counts for each step that did not simply proceed.

    A ``qk_clip`` gets the attention readings that it went by, under ``logit_max``.
    """
    acts: dict[int, Record] = {}
    readings: dict[str, float] = {}
    for record in records:
        if record["type"] in ("step", "layers"):
            source = record if record["type"] == "step" else record["readings"]
            readings.update({k: v for k, v in source.items() if k.startswith(f"{mend.READING}@")})
        if record["type"] == "step":
            acts.pop(record["step"], None)
        elif record["type"] == "decision":
            acts[record["step"]] = record
            if record["action"] == "qk_clip":
                acts[record["step"]] = {**record, "logit_max": dict(readings)}
                for place in record["places"]:
                    name = f"{mend.READING}@{place}"
                    readings[name] = min(readings.get(name, math.nan), record["threshold"])
    return acts


def _step(run: Run, shown: Shown) -> tuple[float, float]:
    """Do one step as ``shown`` says; return its loss and gradient norm, NaN where not finite."""
    for batch in run.next_batches(shown.samples, shown.view):
        run.backward(batch)
    if shown.lr is not None:
        for group in run.optimizer.param_groups:
            group["lr"] = shown.lr * group.get("lr_scale", 1.0)
    assert isinstance(run.senses, _Ear)
    loss = mean_over_ranks(torch.stack(run.senses.losses).double().mean())  # in fp64, as the run's senses do
    run.senses.losses.clear()
    values = torch.stack([loss, run.optimizer.measure().to(loss)]).tolist()
    match shown.action:
        case "proceed" | "watch":
            run.optimizer.step()
        case "clip":
            run.optimizer.step(max_norm=shown.fields["max_norm"])
        case action if action in _MENDS:
            _mend(run, action, shown.fields)
        case _:
            pass  # the update was not taken
    run.optimizer.zero_grad(set_to_none=True)
    loss_value, norm_value = (value if math.isfinite(value) else math.nan for value in values)
    return loss_value, norm_value


def _mend(run: Run, action: str, fields: Mapping[str, Any]) -> None:
    with contextlib.suppress(UserError):  # what could not be done then was not done then
        if action == "reset_moments":
            mend.reset_moments(run.optimizer, run.model, fields["places"])
        elif action == "qk_clip":
            mend.qk_clip(run.model, fields["places"], fields["threshold"], fields["logit_max"])
        else:
            mend.raise_precision(run.model, fields["places"])


def _digest(run: Run) -> str:
    """Return a hash of all weights and buffers, equal on all ranks."""
    own = hashlib.blake2b(digest_size=16)
    for name, tensor in run.model.state_dict().items():
        own.update(name.encode())
        own.update(_bytes(_local(tensor)))
    return hashlib.blake2b("".join(gather(own.hexdigest())).encode(), digest_size=16).hexdigest()


# -- the present ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _aside(run: Run, keep: Keep) -> Iterator[None]:
    """Put the whole present of ``run`` aside for the block, and back at its end, bit for bit."""
    attributes = dict(vars(run))
    gradients = [(p, p.grad) for p in run.model.parameters()]
    places = mend.fp32_places(run.model)
    streams = _Streams(run.world.device)
    with _Tensors(run, keep) as tensors:
        try:
            run.journal, run.senses = None, _Ear()  # type: ignore[assignment]
            for p, _ in gradients:
                p.grad = None
            yield
        finally:
            tensors.restore()
            mend.set_precision(run.model, places)
            streams.restore()
            vars(run).update(attributes)
            for p, gradient in gradients:
                p.grad = gradient


class _Ear:
    """Stands for the run's senses, which would remember what they saw."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def saw(self, batch: Batch, out: LossOutput, weight: Tensor | None) -> None:
        self.losses.append(weighed(out.ce.detach().double(), weight))  # in fp64, as the run's senses do


class _Tensors:
    """This rank's part of weights, buffers and optimizer state, set aside in memory or in a file.

    One tensor at a time is copied, so that a file needs no memory to speak of.
    """

    def __init__(self, run: Run, keep: Keep) -> None:
        self._run = run
        flat, self._node = flatten(pack(run.model, run.optimizer))
        self._facts = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in flat.items()}
        size = sum(_local(tensor).nbytes for tensor in flat.values())
        self.on_disk = keep == "disk" or (keep == "auto" and not _fits_memory(size, run.world.size))
        self._copies: dict[str, Tensor] = {}
        self._file: IO[bytes] | None = None
        if self.on_disk:
            self._file = tempfile.TemporaryFile(dir=run.store.folder.parent)  # noqa: SIM115 - closed in __exit__
            for tensor in flat.values():
                self._file.write(_bytes(_local(tensor)))
        else:
            self._copies = {name: _local(tensor).to("cpu", copy=True) for name, tensor in flat.items()}

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._copies.clear()
        if self._file is not None:
            self._file.close()

    def restore(self) -> None:
        """Write everything back; moments that the replay made are gone, those it lost are made again."""
        run = self._run
        targets, _ = flatten({"model": run.model.state_dict()})
        targets |= optimizer_targets(run.optimizer, self._facts, "optimizer")
        if self._file is not None:
            self._file.seek(0)
        with torch.no_grad():
            for name in self._facts:
                local = _local(targets[name])
                local.copy_(self._copies[name] if self._file is None else _read_like(self._file, local))
        unpack(run.model, run.optimizer, unflatten(self._node, targets))


class _Streams:
    """The states of all process-wide random generators."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._torch = torch.get_rng_state()
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _fits_memory(size: int, ranks: int) -> bool:
    """Whether all ranks of this machine can copy ``size`` bytes each and leave half of what is free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - not a file of ours
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # not Linux: nothing says that it does not fit
        return True
    return size * int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) <= free / 2


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _bytes(local: Tensor) -> memoryview:
    return local.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data


def _read_like(file: IO[bytes], local: Tensor) -> Tensor:
    raw = bytearray(file.read(local.nbytes))
    assert len(raw) == local.nbytes
    flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(local.dtype).reshape(local.shape)
