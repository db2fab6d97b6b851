"""SwiGLU clamp: bound both halves of SwiGLU's product, so that no activation can run away.

Citation: DeepSeek-AI 2026, "DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence" (technical
    report; its text was not read, the rule is from secondary sources and inference code for its weights).
Formula: hidden = silu(min(gate, L)) · clip(up, −L, L), L = 10.
Differs from the paper in: our interpretation: applied in dense MLPs (the report's are mixtures of experts); the
    gradient of what is clamped is 0.
Cost: two comparisons an element of the MLP's hidden activations.
Acts: in every MLP, on activations beyond the limit; a fresh model is far below it.
Off: leave `swiglu_clamp` out of the methods, or a very large limit.
Numerics: bounds are exact in bf16; gate and product are in the compute dtype.

Shapes: B batch, T positions, F MLP width, I = 2 F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="swiglu_clamp",
    kind="model",
    title="Bounds both halves of SwiGLU's product, so that no MLP activation can run away",
    citation="DeepSeek-AI 2026, DeepSeek-V4 technical report",
    formula="hidden = silu(min(gate, L)) clip(up, -L, L), L = 10",
    acts="in every MLP, on activations beyond the limit",
    cost="two comparisons an element of the hidden activations",
    off="leave `swiglu_clamp` out of the methods, or a very large limit",
    differs="our interpretation from secondary sources: in dense MLPs, zero gradient beyond the limit",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class ClampedSiluProduct(nn.Module):
    """(B, T, 2 F) -> silu of the first half, bounded above, times the second, bounded on both sides."""

    def __init__(self, place: Place, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, inner_BTI: Tensor) -> Tensor:
        gate_BTF, up_BTF = inner_BTI.chunk(2, -1)
        return F.silu(gate_BTF.clamp(max=self.limit)) * up_BTF.clamp(-self.limit, self.limit)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"activation": {"swiglu_clamp": ClampedSiluProduct}}


def apply(spec: Spec, *, limit: float = 10.0) -> Spec:
    """Return ``spec`` with clamped SwiGLU.

    Raises:
        UserError: a limit that is not above 0, or an MLP without a gate.
    """
    if not 0 < limit < math.inf:
        raise UserError(f"swiglu_clamp limit is {limit}; give a finite number above 0, e.g. 10")
    if spec.mlp != "swiglu":
        raise UserError(f"swiglu_clamp needs mlp = swiglu, but mlp is '{spec.mlp}'; change it or leave the method out")
    return spec.claim("activation", Part.of("swiglu_clamp", {"limit": limit}), "swiglu_clamp")
