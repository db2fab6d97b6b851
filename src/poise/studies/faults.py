"""Faults: what can go wrong in a run, what it truly is, and how it is done to a batch, to weights or to moments.

Everything here is a plain function of its arguments; ``inject`` says when. A fault has one of three natures:

    data       belongs to the batch's number: whoever shows the batch again shows the fault again
    mechanism  belongs to the training itself (a wrong schedule, a growing head): it is there whenever
               those steps are trained
    passing    struck once (a machine, a cosmic ray, a slip): training the same steps again does not bring
               it back

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from poise.core.errors import UserError, nearest
from poise.core.rng import derive
from poise.core.types import IGNORE, Batch, Cause
from poise.model.decoder import Decoder

FaultKind = Literal[
    "nan_gradient",
    "inf_gradient",
    "garbage_batch",
    "repeated_token_batch",
    "loud_batch",
    "label_shift",
    "repeated_data",
    "high_lr",
    "lr_jump",
    "qk_growth",
    "scaled_layer",
    "bit_flip",
    "shrunk_v",
    "stale_v",
]
Nature = Literal["data", "mechanism", "passing"]
Variant = Literal["base", "no_qk_norm"]
"""Recipes of the campaign: logits can grow only where queries and keys are not normalised."""

FLIPPED_BIT: Final = 30
"""The highest of the eight exponent bits of an fp32 number; set in no weight below 2, so flipping it makes one huge."""


@dataclass(frozen=True)
class Kind:
    """What is true of every fault of a kind.

    Attributes:
        text: what is done, for a person.
        nature: see the module.
        causes: the verdicts that name it rightly, the best first. More than one where the readings of a run
            cannot tell them apart: a NaN in a gradient is a machine's or a number format's.
        needs: fields of ``Fault`` that must be given besides ``at``.
    """

    text: str
    nature: Nature
    causes: tuple[Cause, ...]
    needs: tuple[str, ...] = ()


KINDS: Final[Mapping[FaultKind, Kind]] = {
    "nan_gradient": Kind("one NaN in one gradient element", "passing", ("hardware", "precision")),
    "inf_gradient": Kind("one inf in one gradient element", "passing", ("hardware", "precision")),
    "garbage_batch": Kind("a batch of uniformly random tokens", "data", ("data",)),
    "repeated_token_batch": Kind("a batch of one token repeated", "data", ("data",)),
    "loud_batch": Kind("a batch whose loss counts {factor:g} times", "data", ("data", "software"), needs=("factor",)),
    "label_shift": Kind("targets shifted by one position for {length} batches", "data", ("software", "data")),
    "repeated_data": Kind("the loader shows one batch again {length} times", "data", ("software", "data")),
    "high_lr": Kind(
        "learning rate multiplied by {factor:g} for {length} steps", "mechanism", ("schedule", "optimizer")
    ),
    "lr_jump": Kind(
        "learning rate multiplied by {factor:g} from here on", "mechanism", ("schedule", "optimizer"), needs=("factor",)
    ),
    "qk_growth": Kind(
        "query and key weights of {place} multiplied by {factor:g} before each of {length} steps",
        "mechanism",
        ("architecture",),
        needs=("factor", "place"),
    ),
    "scaled_layer": Kind(
        "all matrices of {place} multiplied by {factor:g} once",
        "passing",
        ("hardware", "software"),
        needs=("factor", "place"),
    ),
    "bit_flip": Kind(
        "the highest exponent bit of one weight of {place} flipped", "passing", ("hardware",), needs=("place",)
    ),
    "shrunk_v": Kind(
        "second moments of {place} multiplied by {factor:g} once", "passing", ("optimizer",), needs=("factor", "place")
    ),
    "stale_v": Kind(
        "second moments of {place} multiplied by {factor:g}, then frozen for {length} steps",
        "passing",
        ("optimizer",),
        needs=("place",),
    ),
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: what.
        at: the first batch that it strikes, 1-based.
        length: for how many batches; ``lr_jump`` stays for ever.
        factor: how strong, where something is multiplied.
        place: where in the model: ``embed``, ``block.1``, ``block.1.fc1``, ``final``, ``head``. A gradient
            fault without a place strikes the largest parameter.

    Raises:
        UserError: a fault that cannot be.
    """

    kind: FaultKind
    at: int
    length: int = 1
    factor: float = 1.0
    place: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"there is no fault '{self.kind}'{nearest(self.kind, KINDS)}; use {', '.join(KINDS)}")
        if self.at < 1 or self.length < 1:
            raise UserError(f"a fault's at and length must be at least 1, not {self.at} and {self.length}")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise UserError(f"a fault's factor is {self.factor}; use a finite number above 0")
        if "factor" in self.what.needs and self.factor == 1.0:
            raise UserError(f"fault {self.kind} with factor 1 changes nothing; give another factor, e.g. 10")
        if "place" in self.what.needs and not self.place:
            raise UserError(f"fault {self.kind} needs a place, e.g. block.1")

    @property
    def what(self) -> Kind:
        return KINDS[self.kind]

    @property
    def text(self) -> str:
        return self.what.text.format(factor=self.factor, length=self.length, place=self.place)

    @property
    def recoverable(self) -> bool:
        """Whether a guard that acts rightly can end where the clean run ends: there was a sound state before it."""
        return self.at > 1

    def strikes(self, batch: int) -> bool:
        """Whether it strikes the batch with this 1-based number."""
        return self.at <= batch and (self.kind == "lr_jump" or batch < self.at + self.length)


# -- the campaign's faults ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kind of fault as the campaign injects it.

    Attributes:
        kind, length, factor, place: as in ``Fault``.
        variant: which recipe it strikes.
        from_start: at the first batch instead of somewhat before the middle.
        within: steps after the onset in which it must be detected.
    """

    kind: FaultKind
    length: int = 1
    factor: float = 1.0
    place: str = ""
    variant: Variant = "base"
    from_start: bool = False
    within: int = 15

    def fault(self, steps: int, seed: int) -> Fault:
        """Return the fault of one run; its onset moves with the seed against checkpoints and regular readings."""
        at = 1 if self.from_start else round(0.45 * steps) + 7 * (seed % 8)
        length = 100 * steps if self.from_start else self.length  # batches outnumber steps where data are dropped
        return Fault(self.kind, at, length, self.factor, self.place)


CASES: Final[Mapping[str, Case]] = {
    case.kind: case
    for case in (
        Case("nan_gradient", place="block.1"),
        Case("inf_gradient", place="block.2"),
        Case("garbage_batch"),
        Case("repeated_token_batch"),
        Case("loud_batch", factor=10.0),
        Case("lr_jump", factor=30.0),
        # The rate is 30 times too high only at the end of the warm-up, so it is given that long to show.
        Case("high_lr", factor=30.0, from_start=True, within=45),
        Case("scaled_layer", factor=4.0, place="block.1"),
        Case("bit_flip", place="block.2"),
        Case("qk_growth", length=20, factor=1.15, place="block.1", variant="no_qk_norm"),
        Case("shrunk_v", factor=1e-6, place="block.1"),
        Case("stale_v", length=30, factor=1e-3, place="block.2"),
        Case("label_shift", length=30),
        Case("repeated_data", length=20),
    )
}


# -- batches -------------------------------------------------------------------------------------------


def garbage(clean: Batch, vocab_size: int) -> Batch:
    """Return a batch of uniformly random tokens, always the same for the same samples."""
    generator = torch.Generator().manual_seed(derive(clean.samples[0], "garbage"))
    B, T = clean.inputs.shape
    return _batch(torch.randint(vocab_size, (B, T + 1), generator=generator), clean)


def one_token(clean: Batch, vocab_size: int) -> Batch:
    """Return a batch in which one token, chosen by the sample number, stands everywhere."""
    B, T = clean.inputs.shape
    token = derive(clean.samples[0], "repeated token") % vocab_size
    return _batch(torch.full((B, T + 1), token, dtype=torch.int64), clean)


def shifted(clean: Batch) -> Batch:
    """Return the batch with every target one position too late; the last position does not count."""
    late_BT = clean.targets.roll(-1, dims=1)
    late_BT[:, -1] = IGNORE
    return dataclasses.replace(clean, targets=late_BT)


def _batch(tokens_BT1: Tensor, clean: Batch) -> Batch:
    inputs_BT, targets_BT = tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous()
    return dataclasses.replace(clean, inputs=inputs_BT, targets=targets_BT)


# -- places in a model ---------------------------------------------------------------------------------


def parameters_at(model: Decoder, place: str) -> dict[str, Tensor]:
    """Return the parameters of a place by name, of the whole model where ``place`` is empty.

    Raises:
        UserError: the model has no such place.
    """
    named = dict(model.named_parameters())
    starts = _starts(model)
    if place not in starts:
        raise UserError(
            f"the model has no place '{place}'{nearest(place, starts)}; use {', '.join(filter(None, starts))}"
        )
    return {name: p for name, p in named.items() if name.startswith(starts[place])}


def _starts(model: Decoder) -> dict[str, str]:
    """Place -> how the names of its parameters start."""
    starts = {"": "", "embed": "embedding.", "final": "trunk.norm."}
    if model.head is not None:
        starts["head"] = "head."
    for number in range(model.spec.n_layers):
        block = f"trunk.blocks.{number}."
        starts[f"block.{number}"] = block
        for name, module in (("qkv", "attn.qkv."), ("proj", "attn.out."), ("fc1", "mlp.inner."), ("fc2", "mlp.out.")):
            starts[f"block.{number}.{name}"] = block + module
    return starts


def largest_at(model: Decoder, place: str) -> Tensor:
    """Return the parameter with the most elements at a place."""
    return max(parameters_at(model, place).values(), key=torch.numel)


# -- weights -------------------------------------------------------------------------------------------


@torch.no_grad()
def scale_matrices(model: Decoder, place: str, factor: float) -> None:
    """Multiply every matrix of a place; gains stay, so that no norm's own scale is touched."""
    for parameter in parameters_at(model, place).values():
        if parameter.ndim >= 2:
            parameter.mul_(factor)


@torch.no_grad()
def scale_query_key(model: Decoder, place: str, factor: float) -> None:
    """Multiply W_Q and W_K of a block, so that its attention logits grow by the square."""
    spec = model.spec
    rows = (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    largest_at(model, f"{place}.qkv")[:rows].mul_(factor)


@torch.no_grad()
def flip_bit(model: Decoder, place: str, seed: int) -> tuple[int, float, float]:
    """Flip ``FLIPPED_BIT`` of one fp32 weight of a place's largest matrix.

    Returns:
        (index of the element in the flattened matrix, value before, value after).

    Raises:
        UserError: the weights are not fp32.
    """
    weight = largest_at(model, place).detach()
    if weight.dtype != torch.float32:
        raise UserError(f"a bit is flipped in fp32 weights, and those of '{place}' are {weight.dtype}")
    flat = weight.view(-1)
    index = derive(seed, "bit flip", place) % flat.numel()
    before = float(flat[index])
    flat[index : index + 1].view(torch.int32).bitwise_xor_(1 << FLIPPED_BIT)
    return index, before, float(flat[index])


# -- moments -------------------------------------------------------------------------------------------


def second_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return Adam's second moments of ``parameters``.

    Raises:
        UserError: there are none yet.
    """
    found = [optimizer.state.get(p, {}).get("exp_avg_sq") for p in parameters]
    moments = [v for v in found if v is not None]
    if len(moments) < len(found):
        raise UserError("the optimizer has no second moments there yet; let the fault strike after the first update")
    return moments
