"""Post-LN: normalise the residual stream after every addition, as the first Transformer did.

Citation: Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762; Xiong et al. 2020, arXiv 2002.04745.
Formula: x <- norm(x + f(x)), f attention, then the MLP.
Differs from the paper in: the norm is the model's own (the papers use LayerNorm); the final norm stays unless
    final_norm = false, so that the number of parameters is that of Pre-LN (the papers have none: the last block ends in
    a norm already).
Cost: 2 D parameters a block; two norms: what Pre-LN costs.
Acts: in every block, on the stream after attention and after the MLP. Known to need a warm-up and to fail in deep
    models; here to be measured against.
Off: leave `post_ln` out of the methods.

Numerics: the sum is in the compute dtype, the norm's statistics in fp32.

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
    name="post_ln",
    kind="model",
    title="Normalises the residual stream after every addition (Post-LN), as the first Transformer did",
    citation="Vaswani et al. 2017, arXiv 1706.03762; Xiong et al. 2020, arXiv 2002.04745",
    formula="x = norm(x + f(x))",
    acts="in every block, every step, on the stream after attention and after the MLP",
    cost="2 D parameters a block; two norms, as many as the default model has",
    off="leave `post_ln` out of the methods",
    differs="uses the model's own norm; keeps the final norm, which the papers do not have, unless final_norm = false",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class PostNorm(nn.Module):
    """(stream, branch output) -> norm(alpha · stream + branch output), all (B, T, D)."""

    def __init__(self, place: Place, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.norm = make("norm", place, place.spec.d_model)

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        # Not torch.add(..., alpha=...): on a CPU that rounds alpha itself to bf16, an error in one direction.
        weighted_BTD = x_BTD if self.alpha == 1 else x_BTD * self.alpha
        out_BTD: Tensor = self.norm(weighted_BTD + branch_BTD)
        return out_BTD

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.4g}"


def post_norm(place: Place) -> nn.Module:
    """The residual connection of Post-LN."""
    return PostNorm(place)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"residual": {"post_ln": post_norm}}


def apply(spec: Spec, *, final_norm: bool = True) -> Spec:
    """Return ``spec`` with the norm behind each addition, and without the ``final_norm`` where that is false."""
    spec = spec.claim("branch_in", Part("none"), "post_ln")
    spec = spec.claim("residual", Part("post_ln"), "post_ln")
    return spec if final_norm else spec.claim("final_norm", Part("none"), "post_ln")
