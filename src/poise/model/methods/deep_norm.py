"""DeepNorm: Post-LN with a weighted stream and smaller starting values, for very deep models.

Citation: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", arXiv 2203.00555; the authors' torchscale.
Formula: x <- norm(alpha · x + f(x)), f attention, then the MLP; decoder-only: alpha = (2 N)^(1/4).
    Start: Xavier normal, std = gain · sqrt(2 / (fan_in + fan_out)); gain = beta = (8 N)^(-1/4) for the value,
    attention output and MLP matrices, 1 for queries and keys.
Differs from the paper in: (1) SwiGLU, our interpretation: the paper's MLP has two matrices; here the one inside the
    activation (gate) and the output have the gain beta, the linear one (up) has gain 1, so that the product still has
    beta twice. torchscale's gated MLP scales the same two. (2) Fans are those of each projection by itself, with
    grouped-query attention G K outputs for keys and values. (3) The embedding and an untied head start at 1 / sqrt(D)
    as in torchscale, which also multiplies the embedding output by sqrt(D): add `embed_scale`. Other matrices, of
    methods, start at 1 / sqrt(D). (4) Values are cut off at three deviations. (5) The final norm stays unless
    final_norm = false; torchscale has none. (6) The norm is the model's own.
Cost: Pre-LN's 2 D parameters and two norms a block, and one more multiplication of (B, T, D) a branch.
Acts: in every block, and at the start. Not in any weight: alpha is a number of the spec, to be known when a checkpoint
    is exported.
Off: leave `deep_norm` out of the methods.

Numerics: in bf16 alpha is exact to fp32, alpha · x and the sum are rounded to bf16 once each; the norm's statistics
    are in fp32.

Shapes: B batch, T positions, D width, F MLP width, G key/value heads, K head width, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from poise.core.registry import Card
from poise.model.methods.post_ln import PostNorm
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="deep_norm",
    kind="model",
    title="Post-LN with the stream weighted by (2 N)^(1/4) and smaller starting values (DeepNorm)",
    citation="Wang et al. 2022, DeepNet, arXiv 2203.00555",
    formula="x = norm(alpha x + f(x)), alpha = (2 N)^(1/4); Xavier gain (8 N)^(-1/4) for v, attention output, MLP",
    acts="in every block, every step; and on the starting values of all matrices",
    cost="one more multiplication of (B, T, D) a branch; as many norms and parameters as the default model",
    off="leave `deep_norm` out of the methods",
    differs="SwiGLU, our interpretation: gate and output have the gain, up has gain 1; embedding and head start at "
    "1 / sqrt(D); keeps the final norm, which torchscale does not have, unless final_norm = false",
)

EXCLUDES: Final[Mapping[str, str]] = {}

GAINED: Final = ("v", "attn_out", "mlp_in", "mlp_gate", "mlp_out")
"""Roles that have the gain; ``mlp_in`` is an ungated MLP's first matrix, and of a gated one ``mlp_up`` has gain 1."""


def alpha(n_layers: int) -> float:
    """The weight of the stream in a decoder of N blocks.

    >>> [round(alpha(n), 3) for n in (12, 24, 32)]
    [2.213, 2.632, 2.828]
    """
    return float((2 * n_layers) ** 0.25)


def beta(n_layers: int) -> float:
    """The gain of the starting values in a decoder of N blocks.

    >>> [round(beta(n), 3) for n in (12, 24, 32)]
    [0.319, 0.269, 0.25]
    """
    return float((8 * n_layers) ** -0.25)


class XavierInit:
    """Xavier normal (Glorot and Bengio 2010) with a gain for the matrices in ``GAINED``; see the header."""

    residual = 1.0

    def __init__(self, place: Place, gain: float) -> None:
        spec = place.spec
        D, F, kv = spec.d_model, spec.d_ff, spec.n_kv_heads * spec.head_dim
        self._fans = {"q": 2 * D, "k": D + kv, "v": D + kv, "attn_out": 2 * D, "mlp_out": F + D}
        self._fans |= dict.fromkeys(("mlp_in", "mlp_gate", "mlp_up"), D + F)
        self._gain, self._other = gain, 1 / math.sqrt(D)

    def std(self, role: str) -> float:
        if role not in self._fans:
            return self._other
        return (self._gain if role in GAINED else 1.0) * math.sqrt(2 / self._fans[role])


def residual(place: Place) -> nn.Module:
    """norm(alpha · stream + branch)."""
    return PostNorm(place, alpha(place.spec.n_layers))


def init(place: Place) -> XavierInit:
    """Xavier with the gain beta."""
    return XavierInit(place, beta(place.spec.n_layers))


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "residual": {"deep_norm": residual},
    "init": {"deep_norm": init},
}


def apply(spec: Spec, *, final_norm: bool = True) -> Spec:
    """Return ``spec`` with DeepNorm's residual connection and start, and without ``final_norm`` where that is false."""
    spec = spec.claim("branch_in", Part("none"), "deep_norm").claim("residual", Part("deep_norm"), "deep_norm")
    spec = spec.claim("init", Part("deep_norm"), "deep_norm").claim("residual_init", Part("plain"), "deep_norm")
    return spec if final_norm else spec.claim("final_norm", Part("none"), "deep_norm")
