"""QKV-norm: normalise queries, keys and values; the norm before attention goes.

Citation: Rybakov et al. 2024, "Methods of improving LLM training stability", arXiv 2410.16682.
Formula: q, k, v <- norm(W_q x), norm(W_k x), norm(W_v x), with no norm of x before them; x + attention. The MLP keeps
    its norm: x + MLP(norm(x)).
    The attention branch then depends neither on the size of x nor on that of W_q, W_k, W_v.
Differs from the paper in: our interpretation: the norms are per head (K values, gains shared by the heads); the paper
    does not say whether per head or over the width. The norm is the model's own (RMSNorm by default; the paper uses
    LayerNorm).
Cost: 3 K parameters a block in place of D; three small norms in place of one large one.
Acts: in every block: on q and k before RoPE, on v, and on what attention reads (the residual stream as it is: in bf16
    its matrix product sees the stream's full size).
Off: leave `qkv_norm` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.registry import Card
from poise.model.layers import Same
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="qkv_norm",
    kind="model",
    title="Normalises queries, keys and values in place of the attention's input",
    citation="Rybakov et al. 2024, arXiv 2410.16682",
    formula="q, k, v = norm(W_q x), norm(W_k x), norm(W_v x); x = x + attention(q, k, v); x = x + MLP(norm(x))",
    acts="in every block, every step: on q, k (before RoPE) and v; the norm before attention is taken away",
    cost="3 K parameters a block in place of D; three small norms in place of one large one",
    off="leave `qkv_norm` out of the methods",
    differs="our interpretation: per head, gains shared by the heads (the paper does not say); the model's own norm",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class ValueNorm(nn.Module):
    """(values, the first block's) -> (values normalised over the head width, the first block's); one gain a block."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.v = make("norm", place, place.spec.head_dim)

    def forward(self, v_BGTK: Tensor, first_BGTK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.v(v_BGTK), first_BGTK


def mlp_norm_only(place: Place) -> nn.Module:
    """The model's norm before the MLP, nothing before attention."""
    module: nn.Module = Same(place) if place.branch == "attn" else make("norm", place, place.spec.d_model)
    return module


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "values": {"qkv_norm": ValueNorm},
    "branch_in": {"qkv_norm": mlp_norm_only},
}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with norms on queries, keys and values, and none before attention."""
    spec = spec.claim("qk", Part("qk_norm"), "qkv_norm").claim("values", Part("qkv_norm"), "qkv_norm")
    return spec.claim("branch_in", Part("qkv_norm"), "qkv_norm")
