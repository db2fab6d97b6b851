"""Output embedding centering: subtract the mean row from the output matrix, so that logits cannot drift together.

Citation: Stollenwerk, Lokrantz and Hertzberg 2026, "Output Embedding Centering for Stable LLM Pretraining",
    arXiv 2601.02031 (μ-centering); reference code flxst/output-embedding-centering.
Formula: W' = W − 1 μᵀ, μ = mean row of W; logits = W' h, whose mean over the vocabulary is 0. Cross-entropy and
    all its gradients are, in exact arithmetic, those without it; log Z, the size of the logits, and with them
    rounding, z-loss and caps, are not.
Differs from the paper in: our interpretation: the mean is subtracted in the forward pass instead of from the
    stored weights in training, so the gradient is centred too and the embedding of a tied head keeps its mean in the
    lookup. Only the abstract, the README and the model file were read. The paper's other form, μ-loss (λ |μ|² added to
    the loss), is not here.
Cost: one pass over the (V, D) matrix forward and backward.
Acts: in the head, every step.
Off: leave `output_centering` out of the methods.

Numerics: the mean is computed in at least fp32.
Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="output_centering",
    kind="model",
    title="Subtracts the mean row from the output matrix, so that output logits cannot drift together",
    citation="Stollenwerk et al. 2026, Output Embedding Centering, arXiv 2601.02031",
    formula="W' = W - 1 mean_row(W)^T; logits = W' h, mean 0 over the vocabulary",
    acts="in the head, every step",
    cost="one pass over the output matrix forward and backward",
    off="leave `output_centering` out of the methods",
    differs="our interpretation: centred in the forward pass, not in the stored weights; no mu-loss",
)

EXCLUDES: Final[Mapping[str, str]] = {}

ACTS_LATER: Final = (
    "cross-entropy does not see a shift of all logits together; it keeps log Z and the logits from drifting, which "
    "rounding, z-loss and caps do see"
)


class OutputCentering(nn.Module):
    """(V, D) -> the same with mean row 0."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, weight_VD: Tensor) -> Tensor:
        wide_VD = weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))
        return wide_VD - wide_VD.mean(0)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"head": {"output_centering": OutputCentering}}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with a centred output matrix."""
    return spec.claim("head", Part("output_centering"), "output_centering")
