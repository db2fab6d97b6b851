"""Embed Detach: shrink the gradient of the embedding; also known as GLM's embedding gradient shrink (EGS).

Citation: Zeng et al. 2022, "GLM-130B: An Open Bilingual Pre-trained Model", arXiv 2210.02414; under this name a
    comparison of Takase et al. 2023, "Spike No More", arXiv 2312.16903.
Formula: x_0 = γ E[ids] + (1 − γ) stopgrad(E[ids]), γ = 0.1: the forward pass is that of E[ids], the gradient γ times.
Differs from the paper in: nothing known. With a tied head the part of the gradient that comes through the head is
    not shrunk, because it does not pass through the lookup.
Cost: one multiplication of (B, T, D) in the backward pass.
Acts: in the backward pass, between the first block and the embedding.
Off: leave `embed_detach` out of the methods, or gamma = 1.
Numerics: forward a view of the rows; the gradient is multiplied in the embedding's own dtype, fp32.

With Adam and an untied head it nearly cancels: a constant factor on all gradients of a parameter is divided out by the
second moment, and only eps and the clip by global norm see it.

Kept as a negative control: Takase et al. find that it does not remove spikes, because the gradients inside the blocks
stay what they were.
Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="embed_detach",
    kind="model",
    title="Shrinks the gradient of the embedding to a tenth (embedding gradient shrink); a negative control",
    citation="Zeng et al. 2022, GLM-130B, arXiv 2210.02414; Takase et al. 2023, arXiv 2312.16903",
    formula="x_0 = gamma E[ids] + (1 - gamma) stopgrad(E[ids])",
    acts="in the backward pass, between the first block and the embedding; Adam divides a constant factor out again, "
    "so with an untied head only its eps and the clip by global norm see it",
    cost="one multiplication of (B, T, D) in the backward pass",
    off="leave `embed_detach` out of the methods, or gamma = 1",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class EmbedDetach(nn.Module):
    """rows -> the same rows; their gradient times γ."""

    def __init__(self, place: Place, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, rows_BTD: Tensor) -> Tensor:
        out: Tensor = _ShrinkGradient.apply(rows_BTD, self.gamma)  # type: ignore[no-untyped-call]
        return out


class _ShrinkGradient(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows_BTD: Tensor, gamma: float) -> Tensor:
        ctx.gamma = gamma  # type: ignore[attr-defined]
        return rows_BTD.view_as(rows_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, drows_BTD: Tensor) -> tuple[Tensor, None]:
        return drows_BTD * ctx.gamma, None  # type: ignore[attr-defined]


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"embed_grad": {"embed_detach": EmbedDetach}}


def apply(spec: Spec, *, gamma: float = 0.1) -> Spec:
    """Return ``spec`` with the embedding's gradient times ``gamma``.

    Raises:
        UserError: a gamma outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise UserError(f"embed_detach gamma is {gamma}; give a number from 0 to 1, e.g. 0.1")
    return spec.claim("embed_grad", Part.of("embed_detach", {"gamma": gamma}), "embed_detach")
