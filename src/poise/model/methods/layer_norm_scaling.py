"""LayerNorm Scaling: Pre-LN whose norms shrink with depth, so that the variance of the stream does not run away.

Citation: Sun et al. 2025, "The Curse of Depth in Large Language Models", arXiv 2502.05795 (NeurIPS 2025).
Formula: x <- x + f(norm(x) / sqrt(l)), f attention, then the MLP; l = 1 .. N the number of the block; the factor
    comes after the gain and is the same for both norms of a block. The final norm is not scaled.
    Residual outputs start like all other matrices, without 1 / sqrt(2 N): the paper finds that with it the method is
    worth less.
Differs from the paper in: nothing known.
Cost: one more multiplication of (B, T, D) a branch; no parameters.
Acts: in every block after the first (1 / sqrt(1) = 1), on the input of attention and MLP; and on the starting values
    of the residual outputs. Not in any weight: the block's number must be known when a checkpoint is exported, and a
    model that grows in depth must not renumber its blocks.
Off: leave `layer_norm_scaling` out of the methods.

Numerics: the factor is a Python number; in bf16 the product is computed in fp32 and rounded once more.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.registry import Card
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="layer_norm_scaling",
    kind="model",
    title="Pre-LN with each norm's output divided by the square root of its depth (LayerNorm Scaling)",
    citation="Sun et al. 2025, The Curse of Depth, arXiv 2502.05795",
    formula="x = x + f(norm(x) / sqrt(l)), l the 1-based number of the block",
    acts="in every block after the first, every step, on the input of attention and MLP; starts residual outputs "
    "without 1 / sqrt(2 N)",
    cost="one more multiplication of (B, T, D) a branch; no parameters",
    off="leave `layer_norm_scaling` out of the methods",
)

_PLAIN = (
    "LayerNorm Scaling needs plain starting values: with residual outputs scaled by 1 / sqrt(2 N) its paper "
    "(arXiv 2502.05795, Table 4) finds perplexity 25.80 / 20.79 instead of 25.76 / 20.35 at 130M / 250M"
)
EXCLUDES: Final[Mapping[str, str]] = {
    "scaled_init": _PLAIN,
    "small_init": _PLAIN,
    "wesar": f"WeSaR's gates start residual outputs 1 / sqrt(2 N) smaller, and {_PLAIN}",
    "zero_init": "LayerNorm Scaling needs plain starting values, and a stream to which nothing is added has no "
    "variance that could run away",
    "depth_mup": "depth-muP divides branches by sqrt(depth) already and starts residual outputs for that, and "
    "LayerNorm Scaling needs plain starting values",
    "sub_ln": "the norm before attention's output matrix divides out the factor that reached it through the values",
    "qk_fc_norm": "the norms of queries, keys and the branch's output divide the factor out of attention exactly",
}


class ScaledNorm(nn.Module):
    """x -> norm(x) / sqrt(l)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.norm = make("norm", place, place.spec.d_model)
        self.factor = place.layer**-0.5

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.norm(x_BTD) * self.factor
        return out_BTD

    def extra_repr(self) -> str:
        return f"factor={self.factor:.4g}"


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"branch_in": {"layer_norm_scaling": ScaledNorm}}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with scaled norms before each branch, and residual outputs that start unscaled."""
    spec = spec.claim("branch_in", Part("layer_norm_scaling"), "layer_norm_scaling")
    return spec.claim("residual_init", Part("plain"), "layer_norm_scaling")
