"""u-muP: matrices of unit variance with the scale in the operation, and muP's rules for width and depth.

Citation: Blake et al. 2024, "u-μP: The Unit-Scaled Maximal Update Parametrization", arXiv 2407.17465; reference code
    graphcore-research/unit-scaling.
Formula: every matrix starts with std 1, and for Adam:
    linear:    y = x Wᵀ / sqrt(fan_in);       learning rate / sqrt(fan_in), inside the blocks / sqrt(N) too
    embedding: x_0 = E[ids];                  learning rate / sqrt(D)
    head:      logits = (head · h) / D;       learning rate as it is
    attention logits = q·k / K
    residual:  x ← (x + τ f(x)) / sqrt(1 + τ²), τ_i² = α_i² / (L/2 + Σ_{j<i} α_j²) for branch i of L = 2 N,
               α_mlp = residual_mult · sqrt(2 / (1 + ρ²)), α_attn = ρ · α_mlp, ρ = attn_ratio
Differs from the paper in: our interpretation, as far as the decoder's slots carry it: forward scales, no separate
    backward scales. Missing: the constants that bring the outputs of attention and of the MLP's activation back to
    unit variance, the multipliers of attention, activation and loss, and norms without gains (the paper reports that
    transfer breaks with trainable gains). The final norm has the role of the block norms, so it gets the factor of
    depth too. A tied head has the embedding's learning rate, with which the change of its logits shrinks with the
    width (`poise study coord-check` shows it): use an untied head.
Cost: one multiplication per matrix product and two per residual connection.
Acts: in every matrix product, residual connection and attention, before the head, at the start, and in the learning
    rates (`Decoder.lr_multipliers`). Weight decay times learning rate does not depend on the factors (the paper's
    independent weight decay, but for the schedule).
Off: leave `u_mup` out of the methods.
Numerics: multipliers are Python numbers; weights of deviation 1 are cast to the compute dtype before the product.

Shapes: D width, O output features. The product is computed in the dtype of x and scaled there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.layers import Linear
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="u_mup",
    kind="model",
    title="Unit-scaled muP: matrices start with variance 1, operations carry the scale, rates follow width and depth",
    citation="Blake et al. 2024, u-muP, arXiv 2407.17465",
    formula="y = x W^T / sqrt(fan_in), W std 1, lr / sqrt(fan_in N); x <- (x + tau f(x)) / sqrt(1 + tau^2); q k / K",
    acts="in every matrix product, residual connection and attention, before the head, at the start, in learning rates",
    cost="one multiplication per matrix product and two per residual connection",
    off="leave `u_mup` out of the methods",
    differs="our interpretation: forward scales, no separate backward scales; no output scales of attention and "
    "activation, no operation multipliers, norms keep their gains",
)

_UNIT = "u-muP starts every matrix with variance 1 and keeps the scale of branches in the residual connection"
EXCLUDES: Final[Mapping[str, str]] = {
    "scaled_init": _UNIT,
    "embed_std": "u-muP starts the embedding with deviation 1 and sets its learning rate for that",
    "embed_scale": "u-muP's embedding has unit variance already",
}

CHANGES_LR: Final = (
    "matrices start with deviation 1 and get 1 / sqrt(fan_in) of the learning rate; its best value is near 1, not 1e-3"
)

VECTORS: Final = ("norm", "gain", "bias")
"""Roles that are no matrices."""


class UnitLinear(Linear):
    """``y = x Wᵀ / sqrt(fan_in)``."""

    def __init__(self, place: Place, d_in: int, d_out: int, role: str) -> None:
        super().__init__(place, d_in, d_out, role)
        self.factor = d_in**-0.5

    def forward(self, x_D: Tensor) -> Tensor:
        return F.linear(x_D, self.weight.to(x_D.dtype)) * self.factor

    def effective_weight(self) -> Tensor:
        return self.weight * self.factor


class UnitInit:
    """1 for every matrix."""

    residual = 1.0

    def __init__(self, place: Place) -> None:
        pass

    def std(self, role: str) -> float:
        return 1.0


def tau(spec: Spec, branch: int, residual_mult: float, attn_ratio: float) -> float:
    """Return the weight of branch 0, 1, ... 2 N - 1 relative to the stream before it; attention comes first.

    >>> from poise.model.presets import PRESETS
    >>> [round(tau(PRESETS["7m"], branch, 1.0, 1.0) ** -2, 3) for branch in (0, 1, 2)]  # N = 6: N + the number before
    [6.0, 7.0, 8.0]
    """
    mlp = residual_mult * math.sqrt(2 / (1 + attn_ratio**2))
    attn = attn_ratio * mlp
    before = (branch + 1) // 2 * attn**2 + branch // 2 * mlp**2
    return (attn if branch % 2 == 0 else mlp) / math.sqrt(spec.n_layers + before)


class UnitAdd(nn.Module):
    """(stream, branch) -> (stream + τ branch) / sqrt(1 + τ²)."""

    def __init__(self, place: Place, residual_mult: float, attn_ratio: float) -> None:
        super().__init__()
        weight = tau(place.spec, 2 * (place.layer - 1) + (place.branch == "mlp"), residual_mult, attn_ratio)
        self.stream = 1 / math.sqrt(1 + weight**2)
        self.branch = weight * self.stream

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        return x_BTD * self.stream + branch_BTD * self.branch


def attn_scale(place: Place) -> float:
    """1 / K."""
    return 1 / place.spec.head_dim


class DividedHidden(nn.Module):
    """h -> h / D."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.factor = 1 / place.spec.d_model

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.factor


class UnitRates:
    """Adam's learning rates: 1 / sqrt(fan_in), inside the blocks divided by sqrt(N) too; the head's is 1."""

    fixed_decay = True

    def __init__(self, place: Place) -> None:
        spec = place.spec
        self._depth = spec.n_layers**-0.5
        self._width, self._inner = spec.d_model**-0.5, spec.d_ff**-0.5

    def of(self, role: str) -> float:
        if role == "head":
            return 1.0
        if role == "embedding":
            return self._width
        if role in VECTORS:
            return self._depth
        return self._depth * (self._inner if role == "mlp_out" else self._width)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "linear": {"u_mup": UnitLinear},
    "init": {"u_mup": UnitInit},
    "residual": {"u_mup": UnitAdd},
    "attn_scale": {"u_mup": attn_scale},
    "head_in": {"u_mup": DividedHidden},
    "lr_scales": {"u_mup": UnitRates},
}


def apply(spec: Spec, *, residual_mult: float = 1.0, attn_ratio: float = 1.0) -> Spec:
    """Return ``spec`` in u-muP.

    Args:
        spec: the model.
        residual_mult: size of all branches together relative to the embedding (α_res).
        attn_ratio: size of attention branches relative to MLP branches (ρ).

    Raises:
        UserError: a ratio that is not above 0.
        Conflict: another method has one of the slots.
    """
    for name, value in (("residual_mult", residual_mult), ("attn_ratio", attn_ratio)):
        if not 0 < value < math.inf:
            raise UserError(f"u_mup {name} is {value}; give a finite number above 0, e.g. 1")
    branches = Part.of("u_mup", {"residual_mult": residual_mult, "attn_ratio": attn_ratio})
    for slot in PARTS:
        spec = spec.claim(slot, branches if slot == "residual" else Part("u_mup"), "u_mup")
    return spec
