"""From a slot's ``Part`` to its module: the decoder asks here and knows no method by name.

House kinds are in the literal table below; a method's own kinds are in the ``PARTS`` table of its file.
Shapes: see ``layers`` and ``attention``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from torch import nn

from poise.core.errors import UserError, nearest
from poise.model import layers, methods
from poise.model.attention import SoftmaxScores, root_scale
from poise.model.init import (
    DefaultInit,
    SmallInit,
    as_init_says,
    plain_residual,
    scaled_residual,
    zero_residual,
)
from poise.model.place import Place
from poise.model.spec import Part

Builder = Callable[..., Any]
"""``builder(place, ...)``; norms take also ``dim``, linears ``d_in, d_out, role``, scores ``scale``; then the part's
fields. A module, or for ``attn_scale`` a float, for ``init`` an ``Init``, for ``residual_init`` and ``embed_std`` a
float or ``None``, for ``lr_scales`` an ``LrScale``."""


class LrScale(Protocol):
    """What a part of the slot ``lr_scales`` builds.

    Attributes:
        fixed_decay: whether a parameter's learning rate times its weight decay is to stay what it was.
    """

    fixed_decay: bool

    def of(self, role: str) -> float:
        """Return the share of the learning rate that parameters with this role have."""
        ...


def _branch_norm(place: Place) -> nn.Module:
    module: nn.Module = make("norm", place, place.spec.d_model)
    return module


def _activation(place: Place) -> nn.Module:
    return {"swiglu": layers.SiluProduct, "gelu": layers.Gelu}[place.spec.mlp](place)


HOUSE: Final[Mapping[str, Mapping[str, Builder]]] = {
    "norm": {"rmsnorm": layers.RMSNorm, "layernorm": layers.LayerNorm},
    "final_norm": {"norm": _branch_norm, "none": layers.Same},
    "branch_in": {"norm": _branch_norm, "none": layers.Same},
    "branch_out": {"none": layers.Same, "norm": _branch_norm},
    "residual": {"add": layers.Add},
    "qk": {"none": layers.SamePair},
    "values": {"none": layers.SamePair},
    "qkv_gate": {"none": layers.SameThree},
    "attn_scale": {"sqrt": root_scale},
    "qk_tap": {"none": layers.Untapped},
    "qk_penalty": {"none": layers.NoPenalty},
    "scores": {"softmax": SoftmaxScores},
    "attn_gate": {"none": layers.Ungated},
    "attn_mid": {"none": layers.Same},
    "attn_out_gate": {"none": layers.Ungated},
    "activation": {"default": _activation},
    "mlp_mid": {"none": layers.Same},
    "linear": {"linear": layers.Linear},
    "embed_grad": {"none": layers.Same},
    "embed_out": {"none": layers.Same},
    "head_in": {"none": layers.Same},
    "head": {"none": layers.Same},
    "logits": {"none": layers.Same},
    "loss_terms": {},
    "init": {"default": DefaultInit, "small": SmallInit},
    "residual_init": {"init": as_init_says, "scaled": scaled_residual, "plain": plain_residual, "zero": zero_residual},
    "embed_std": {"init": as_init_says},
    "lr_scales": {},
}


def kinds(slot: str) -> dict[str, Builder]:
    """Return every known part name of a slot with its builder."""
    known = dict(HOUSE[slot])
    for name in methods.METHODS:
        for part, builder in methods.load(name).PARTS.get(slot, {}).items():
            assert part not in known, f"two builders for part '{part}' of slot '{slot}'"
            known[part] = builder
    return known


def builder(slot: str, part: Part) -> Builder:
    """Return the builder of ``part``.

    Raises:
        UserError: no such kind for this slot.
    """
    if part.name in HOUSE[slot]:
        return HOUSE[slot][part.name]
    if part.name in methods.METHODS:  # a method's part usually has its name: nothing else need be loaded
        own = methods.load(part.name).PARTS.get(slot, {})
        if part.name in own:
            return own[part.name]
    known = kinds(slot)
    if part.name not in known:
        raise UserError(
            f"slot '{slot}' has no part '{part.name}'{nearest(part.name, known)}; it knows {', '.join(known)}"
        )
    return known[part.name]


def make(slot: str, place: Place, *sizes: float | str) -> Any:
    """Build the module that the spec puts in ``slot`` at ``place``."""
    return make_part(slot, getattr(place.spec, slot), place, *sizes)


def make_part(slot: str, part: Part, place: Place, *sizes: float | str) -> Any:
    """Build the module of one part of ``slot``.

    Raises:
        UserError: a field the part does not have.
    """
    build = builder(slot, part)
    fields = dict(part.fields)
    try:
        inspect.signature(build).bind(place, *sizes, **fields)
    except TypeError as error:
        raise UserError(f"part '{part.name}' of slot '{slot}' has fields {fields}: {error}") from None
    return build(place, *sizes, **fields)
