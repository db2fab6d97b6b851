"""Embed LN: normalise the embedding output, so that the first blocks see a stream of ordinary size.

Citation: Takase et al. 2023, "Spike No More: Stabilizing the Pre-training of Large Language Models",
    arXiv 2312.16903 (Embed LN); earlier Dettmers et al. 2021, arXiv 2110.02861, and BLOOM, arXiv 2211.05100.
Formula: x_0 = norm(E[ids]) · g. With small embeddings the gradient of the first blocks is multiplied by
    1 / std(x_0) at each norm; a stream of std 1 beside small sub-layers keeps it bounded.
Differs from the paper in: the norm is the model's own (RMSNorm by default; the paper uses LayerNorm).
Cost: D parameters; one norm of (B, T, D) forward and backward.
Acts: once, between the embedding and the first block. A tied head is not normalised.
Off: leave `embed_norm` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from poise.core.registry import Card
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="embed_norm",
    kind="model",
    title="Normalises the embedding output (Embed LN), so that early gradients do not spike",
    citation="Takase et al. 2023, Spike No More, arXiv 2312.16903",
    formula="x_0 = norm(E[ids]) g",
    acts="once, between the embedding and the first block, every step",
    cost="D parameters; one norm forward and backward",
    off="leave `embed_norm` out of the methods",
    differs="uses the model's own norm (RMSNorm by default) where the paper uses LayerNorm",
)

EXCLUDES: Final[Mapping[str, str]] = {}


def embed_norm(place: Place) -> nn.Module:
    """The model's norm over the width."""
    module: nn.Module = make("norm", place, place.spec.d_model)
    return module


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"embed_out": {"embed_norm": embed_norm}}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with a norm in the ``embed_out`` slot."""
    return spec.claim("embed_out", Part("embed_norm"), "embed_norm")
