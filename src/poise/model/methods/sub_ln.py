"""Sub-LN: one more norm inside each branch, before its output matrix.

Citation: Wang et al. 2022, "Foundation Transformers" (Magneto), arXiv 2210.06423; the authors' torchscale.
Formula: attention: W_o norm(mix of norm(x)), over D; MLP: W_out norm(activation(W_in norm(x))), over F; each added
    to x. Start: Xavier normal, std = gain · sqrt(2 / (fan_in + fan_out)); gain = sqrt(ln(2 N)) for the value,
    attention output and MLP matrices, 1 for queries and keys.
Differs from the paper in: SwiGLU, our interpretation: the paper's MLP has two matrices; here the one inside the
    activation (gate) and the output have the gain, the linear one (up) has gain 1, as torchscale's rule by names gives
    for a gated MLP (whose norm it leaves out; here it is in both). Fans, embedding, head, methods' matrices and the cut
    at three deviations are as in `deep_norm`. The norm is the model's own (the authors use LayerNorm).
Cost: D + F parameters a block on top of Pre-LN's; two more norms a block, one of them over the MLP width F.
Acts: in every block, on the input of both output matrices, and at the start.
Off: leave `sub_ln` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width, F MLP width, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from poise.core.registry import Card
from poise.model.methods.deep_norm import XavierInit
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="sub_ln",
    kind="model",
    title="One more norm inside each branch, before its output matrix (sub-LN), and starting values to match",
    citation="Wang et al. 2022, Foundation Transformers, arXiv 2210.06423",
    formula="attention: W_o norm(mix); MLP: W_out norm(hidden); Xavier gain sqrt(ln(2 N)) for v, attention output, MLP",
    acts="in every block, every step, on the input of both output matrices; and on the starting values of all matrices",
    cost="D + F parameters and two norms a block more than the default, one of them over the MLP width",
    off="leave `sub_ln` out of the methods",
    differs="SwiGLU, our interpretation: gate and output have the gain, up has gain 1; embedding and head start at "
    "1 / sqrt(D)",
)

EXCLUDES: Final[Mapping[str, str]] = {}


def gain(n_layers: int) -> float:
    """The gain of the starting values in a decoder of N blocks.

    >>> [round(gain(n), 3) for n in (1, 12, 24)]
    [0.833, 1.783, 1.968]
    """
    return math.sqrt(math.log(2 * n_layers))


def attn_mid(place: Place) -> nn.Module:
    """The model's norm over the width."""
    module: nn.Module = make("norm", place, place.spec.d_model)
    return module


def mlp_mid(place: Place) -> nn.Module:
    """The model's norm over the MLP width."""
    module: nn.Module = make("norm", place, place.spec.d_ff)
    return module


def init(place: Place) -> XavierInit:
    """Xavier with the gain sqrt(ln(2 N))."""
    return XavierInit(place, gain(place.spec.n_layers))


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "attn_mid": {"sub_ln": attn_mid},
    "mlp_mid": {"sub_ln": mlp_mid},
    "init": {"sub_ln": init},
}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with a norm before each branch's output matrix, and the start that goes with it."""
    part = Part("sub_ln")
    spec = spec.claim("attn_mid", part, "sub_ln").claim("mlp_mid", part, "sub_ln")
    return spec.claim("init", part, "sub_ln").claim("residual_init", Part("plain"), "sub_ln")
