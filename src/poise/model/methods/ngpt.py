"""nGPT: hidden states and matrices on the unit sphere; every branch turns the hidden state a little towards itself.

Citation: Loshchilov et al. 2024, "nGPT: Normalized Transformer with Representation Learning on the Hypersphere",
    arXiv 2410.01131; reference code NVIDIA/ngpt.
Formula: with unit(x) = x / |x|, and every scale s stored as s · init / start so that its steps fit its size:
    h ← unit(unit(h) + |α| ⊙ (unit(f(h)) − unit(h))),  α per dimension, 0.05 at the start
    q ← s_qk ⊙ unit(q), k ← s_qk ⊙ unit(k) per head,   attention logits = sqrt(K) · q·k
    inner MLP activations × s_uv · sqrt(D);             output logits × s_z per token;   no norms
    after every step: unit rows of W_q, W_k, W_v, the inner MLP matrix, embedding and head (along D), and unit
    columns of W_O and the outer MLP matrix (along D)
Differs from the paper in: queries and keys are normalised and scaled before the rotation, not after it: the rotation
    keeps their length, and a gain per channel after it would break relative positions (the same as long as s_qk is
    equal within a rotated pair). With grouped queries s_qk is shared by the query heads of a group. The paper does not
    tie the head.
Cost: no norms; eight vector normalisations a block in their place (three a residual connection, of queries, of keys),
    and one pass over all matrices after a step.
Acts: in every block and in the head. The matrices are put on the sphere by the optimizer's hook
    `poise.optim.weights.unit_rows`, for which `UNIT` says along which dimension each role goes.
Off: leave `ngpt` out of the methods.

Use it with weight decay 0 and no warm-up, as the paper does. Of `embed_norm` only the gain keeps an effect: the length
of the embedding has none here.
Numerics: lengths are computed in at least fp32.
Shapes: B batch, T positions, D width, H query heads, G key/value heads, K head width, I inner MLP activations,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.slots import make_part
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="ngpt",
    kind="model",
    title="Hidden states and matrices live on the unit sphere; each branch turns the hidden state towards its output",
    citation="Loshchilov et al. 2024, nGPT, arXiv 2410.01131",
    formula="h <- unit(unit(h) + |alpha| (unit(f(h)) - unit(h))); q, k <- s_qk unit(.); scale sqrt(K); logits s_z",
    acts="in every block and in the head; the hook `unit_rows` puts the matrices on the sphere after each step",
    cost="eight vector normalisations a block in place of norms, and one pass over all matrices after a step",
    off="leave `ngpt` out of the methods",
    differs="queries and keys are normalised before the rotation; grouped queries share s_qk with their keys",
)

_LENGTH = "nGPT normalises the embedding and what follows it, so its size has no effect"
EXCLUDES: Final[Mapping[str, str]] = {
    "dyt": "nGPT has no norms, so there is nothing for a dynamic tanh to take the place of",
    "embed_scale": _LENGTH,
    "embed_std": _LENGTH,
    "scaled_init": "nGPT normalises every branch and keeps its output matrices on the sphere, so their size at the "
    "start has no effect",
    "zero_init": "a branch that starts at zero has no direction, and nGPT normalises it",
    "logit_tap": "nGPT normalises queries and keys, so the size of their matrices has no say in the logits",
    "layer_norm_scaling": "nGPT has no norms, and every branch is normalised, so a factor before it has no effect",
}

CHANGES_LR: Final = (
    "matrices stay on the unit sphere, so the learning rate is an angle of turning; the paper's best values are larger"
)

UNIT: Final[Mapping[str, int]] = {"qkv": 1, "mlp_in": 1, "attn_out": 0, "mlp_out": 0, "embedding": 1, "head": 1}
"""Role -> the dimension along which its matrices have unit length, for ``poise.optim.weights.unit_rows``."""


def unit(x: Tensor) -> Tensor:
    """Return ``x / |x|`` over the last dimension, computed in at least fp32, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # A tiny bound keeps a zero vector zero; everything else is far above it.
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True).clamp_min(1e-24))).to(x.dtype)


class Scale(nn.Module):
    """A trained scale stored small: ``value = weight · init / start``, so that Adam's steps are relative to ``start``.

    Args:
        init: value at the start.
        start: what the parameter starts as.
        shape: of the parameter.
    """

    def __init__(self, init: float, start: float, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.ratio = init / start
        self.param_roles = {"weight": "gain"}
        self.param_fill = {"weight": start}

    def forward(self) -> Tensor:
        return self.weight * self.ratio


class Turn(nn.Module):
    """(h, branch) -> unit(unit(h) + |α| (unit(branch) − unit(h)))."""

    def __init__(self, place: Place, alpha: float) -> None:
        super().__init__()
        D = place.spec.d_model
        self.alpha = Scale(alpha, D**-0.5, D)

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        here_BTD = unit(x_BTD)
        share_D = self.alpha().abs().to(x_BTD.dtype)
        return unit(here_BTD + share_D * (unit(branch_BTD) - here_BTD))


class UnitQK(nn.Module):
    """(q, k) -> s_qk ⊙ unit(q), s_qk ⊙ unit(k)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.shared = spec.n_heads // spec.n_kv_heads
        self.scale = Scale(1.0, spec.d_model**-0.5, spec.n_kv_heads, spec.head_dim)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        s_G1K = self.scale().to(q_BHTK.dtype)[:, None]
        s_H1K = s_G1K.repeat_interleave(self.shared, 0)
        return unit(q_BHTK) * s_H1K, unit(k_BGTK) * s_G1K


def attn_scale(place: Place) -> float:
    """sqrt(K): the product of unit vectors of width K has deviation 1 / sqrt(K)."""
    return math.sqrt(place.spec.head_dim)


class ScaledActivation(nn.Module):
    """The MLP's own activation of ``s_uv · sqrt(D) · inner``."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.scale = Scale(math.sqrt(place.spec.d_model), 1.0, place.spec.d_inner)
        self.activation = make_part("activation", Part("default"), place)

    def forward(self, inner_BTI: Tensor) -> Tensor:
        out: Tensor = self.activation(inner_BTI * self.scale().to(inner_BTI.dtype))
        return out


class ScaledHead(nn.Module):
    """Each row of the output matrix times s_z of its token, which is each logit times it."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.scale = Scale(1.0, place.spec.d_model**-0.5, place.spec.vocab_size)

    def forward(self, weight_VD: Tensor) -> Tensor:
        return weight_VD * self.scale()[:, None]


class SphereInit:
    """1 / sqrt(D): vectors along D have about unit length even before they are normalised."""

    residual = 1.0

    def __init__(self, place: Place) -> None:
        self._std = place.spec.d_model**-0.5

    def std(self, role: str) -> float:
        return self._std


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "residual": {"ngpt": Turn},
    "qk": {"ngpt": UnitQK},
    "attn_scale": {"ngpt": attn_scale},
    "activation": {"ngpt": ScaledActivation},
    "head": {"ngpt": ScaledHead},
    "init": {"ngpt": SphereInit},
}


def apply(spec: Spec, *, alpha: float = 0.05) -> Spec:
    """Return ``spec`` as a normalised transformer.

    Args:
        spec: the model.
        alpha: how far each branch turns the hidden state at the start.

    Raises:
        UserError: an alpha outside (0, 1].
        Conflict: another method has one of the slots.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"ngpt alpha is {alpha}; give a number above 0, up to 1, e.g. 0.05")
    for slot in PARTS:
        spec = spec.claim(slot, Part.of("ngpt", {"alpha": alpha} if slot == "residual" else {}), "ngpt")
    for slot in ("branch_in", "branch_out", "final_norm"):
        spec = spec.claim(slot, Part("none"), "ngpt")
    # The matrices themselves are kept on the sphere, so no other method may put something in between.
    return spec.claim("linear", Part("linear"), "ngpt")
