"""Scaled Embed: multiply the embedding output by sqrt(D), so that the residual stream starts near size one.

Citation: Takase et al. 2023, "Spike No More: Stabilizing the Pre-training of Large Language Models",
    arXiv 2312.16903 (Scaled Embed); the factor is that of Vaswani et al. 2017, arXiv 1706.03762.
Formula: x_0 = sqrt(D) · E[ids].
Differs from the paper in: nothing known; the paper combines it with the initialisation `small`
    (std sqrt(2 / (5 D)), which makes std(x_0) = 0.632), here the initialisation is a slot of its own.
Cost: one multiplication of (B, T, D).
Acts: once, between the embedding and the first block. Never on the head, tied or not.
Off: leave `embed_scale` out of the methods, or factor = 1.
Numerics: the product is in the embedding's own dtype, fp32, before the stream is rounded to the compute dtype.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="embed_scale",
    kind="model",
    title="Multiplies the embedding output by sqrt(D) (Scaled Embed), so that early gradients do not spike",
    citation="Takase et al. 2023, Spike No More, arXiv 2312.16903",
    formula="x_0 = sqrt(D) E[ids]",
    acts="once, between the embedding and the first block, every step; never on the head",
    cost="one multiplication of the embedding output",
    off="leave `embed_scale` out of the methods, or factor = 1",
    differs="the paper's small initialisation is a slot of its own here (init part `small`)",
)

EXCLUDES: Final[Mapping[str, str]] = {}

CHANGES_LR: Final = "Adam's step moves the residual stream at its start by sqrt(D) times the learning rate"


class EmbedScale(nn.Module):
    """x -> factor · x; the factor is sqrt(D) unless given."""

    def __init__(self, place: Place, factor: float | None = None) -> None:
        super().__init__()
        self.factor = math.sqrt(place.spec.d_model) if factor is None else factor

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.factor


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"embed_out": {"embed_scale": EmbedScale}}


def apply(spec: Spec, *, factor: float | None = None) -> Spec:
    """Return ``spec`` with the embedding output multiplied by ``factor``, sqrt(D) unless given.

    Raises:
        UserError: a factor that is not above 0.
    """
    if factor is not None and not factor > 0:
        raise UserError(f"embed_scale factor is {factor}; give a number above 0, or leave it out for sqrt(D)")
    return spec.claim("embed_out", Part.of("embed_scale", {"factor": factor}), "embed_scale")
