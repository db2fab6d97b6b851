"""Value residual: every block attends to a mixture of its own values and the first block's.

Citation: Zhou et al. 2024, "Value Residual Learning" (ResFormer), arXiv 2410.17897; reference code
    Zcchill/Value-Residual-Learning.
Formula: v_l ← (1 − s) v_l + s v_1 for blocks l > 1, s = 0.5. With learnable = true each block has its own two
    weights, which start at (s, 1 − s).
Differs from the paper in: nothing known for the fixed form; the learnable form (two free numbers a block) is our
    interpretation of the paper's variants.
Cost: the first block's values stay alive through the model; one multiply-add of (B, G, T, K) a block.
Acts: in every block but the first, on values before they are gated or mixed. Under pipeline parallelism the first
    block's values have to travel with the hidden state.
Off: leave `value_residual` out of the methods, or share = 0.
Numerics: the mixture is computed in the compute dtype.

Shapes: B batch, T positions, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="value_residual",
    kind="model",
    title="Every block attends to a mixture of its own values and the first block's (ResFormer)",
    citation="Zhou et al. 2024, Value Residual Learning, arXiv 2410.17897",
    formula="v_l <- 0.5 v_l + 0.5 v_1 for l > 1",
    acts="in every block but the first, every step, on values",
    cost="the first block's values stay alive; one multiply-add of the values a block",
    off="leave `value_residual` out of the methods, or share = 0",
    differs="the learnable form is our interpretation",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class ValueResidual(nn.Module):
    """(values, the first block's) -> (mixture, the first block's)."""

    def __init__(self, place: Place, share: float) -> None:
        super().__init__()
        self.first = place.layer == 1
        self.share = share

    def forward(self, v_BGTK: Tensor, first_BGTK: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.first:
            return v_BGTK, v_BGTK
        assert first_BGTK is not None
        return (1 - self.share) * v_BGTK + self.share * first_BGTK, first_BGTK


class LearnedValueResidual(nn.Module):
    """The same with two trained weights a block: of the first block's values, and of its own."""

    def __init__(self, place: Place, share: float) -> None:
        super().__init__()
        self.first = place.layer == 1
        if self.first:
            return
        self.from_first = nn.Parameter(torch.empty(1))
        self.own = nn.Parameter(torch.empty(1))
        self.param_roles = {"from_first": "gain", "own": "gain"}
        self.param_fill = {"from_first": share, "own": 1 - share}

    def forward(self, v_BGTK: Tensor, first_BGTK: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.first:
            return v_BGTK, v_BGTK
        assert first_BGTK is not None
        own_1, from_first_1 = self.own.to(v_BGTK.dtype), self.from_first.to(v_BGTK.dtype)
        return own_1 * v_BGTK + from_first_1 * first_BGTK, first_BGTK


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "values": {"value_residual": ValueResidual, "learned_value_residual": LearnedValueResidual}
}


def apply(spec: Spec, *, share: float = 0.5, learnable: bool = False) -> Spec:
    """Return ``spec`` with value residuals.

    Args:
        spec: the model.
        share: of the first block's values.
        learnable: whether each block learns its two weights.

    Raises:
        UserError: a share outside [0, 1], or a model of one block.
        Conflict: another method has the values.
    """
    if not 0 <= share <= 1:
        raise UserError(f"value_residual share is {share}; give a number from 0 to 1, e.g. 0.5")
    if spec.n_layers < 2:
        raise UserError(f"value_residual needs 2 blocks or more, but n_layers is {spec.n_layers}; leave the method out")
    name = "learned_value_residual" if learnable else "value_residual"
    return spec.claim("values", Part.of(name, {"share": share}), "value_residual")
