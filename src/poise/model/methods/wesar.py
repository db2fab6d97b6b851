"""WeSaR: every matrix starts with the same small deviation, and a trainable scalar gives it the scale it needs.

Citation: Nishida, Nishida and Saito 2024, "Initialization of Large Language Models via Reparameterization to Mitigate
    Loss Spikes", arXiv 2410.05052.
Formula: W̄ = α W, W ~ N(0, σ²) with one σ² = 4e-5 for all matrices, α a scalar of each, α = σ_target / σ at the start.
    σ_target: queries, keys, values, MLP in, head sqrt(1 / D); attn_out sqrt(1 / (2 N D)); mlp_out sqrt(2 / (2 N F)),
    which for F = 4 D is the paper's sqrt(2 / (8 N D)). Adam's step on W does not depend on α, so that ‖ΔW‖ / ‖W‖ is
    the same for all matrices: without, residual outputs turn sqrt(2 N) times further.
Differs from the paper in: values were read in summaries of the paper. SwiGLU (the paper has GELU): gate and up rows are
    two matrices with an α each, F need not be 4 D (our interpretation). The embedding has α = 1 and no gate unless
    `embed_gate`, which starts at 1 / σ: sources disagree about it (our interpretation). A tied head shares the
    embedding but has its own gate.
Cost: a scalar a matrix; one pass over each W forward and two backward.
Acts: in every block, on all matrices, every step; on the input of the head; on the embedding only with `embed_gate`.
Off: leave `wesar` out of the methods.

The effective learning rate of W̄ is α times that of W. α is not decayed. With a small α the gradients of W come near
Adam's eps, which then makes steps smaller: keep eps at 1e-8 or less.
Numerics: α W in at least fp32, then rounded to the dtype of x: merging α into W changes nothing. The head's α
multiplies its input.
Shapes: O output features, D width, F MLP width, N number of blocks, S projections that share a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.init import shares
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="wesar",
    kind="model",
    title="One small starting deviation for all matrices, their scale by a trainable scalar: uniform update ratios",
    citation="Nishida et al. 2024, WeSaR, arXiv 2410.05052",
    formula="W_bar = alpha W, W ~ N(0, 4e-5), alpha = sigma_target / sigma at the start",
    acts="in every block, every step, on all matrices; on the input of the head; on the embedding if asked",
    cost="a scalar a matrix; one pass over each W forward and two backward",
    off="leave `wesar` out of the methods",
    differs="values from summaries; two gates for SwiGLU and the gate of the embedding are our interpretation",
)

CHANGES_LR: Final = "a step of the learning rate moves the effective matrix by alpha times that"

EXCLUDES: Final[Mapping[str, str]] = {
    "embed_std": "WeSaR starts all matrices, the embedding too, with one deviation, and computes its gates for that",
}


def target_std(role: str, d_in: int, n_layers: int) -> float:
    """Return σ_target of a matrix with this role.

    >>> round(target_std("q", 768, 12) / 4e-5**0.5, 1), round(target_std("attn_out", 768, 12) / 4e-5**0.5, 2)
    (5.7, 1.16)
    """
    if role == "attn_out":
        return math.sqrt(1 / (2 * n_layers * d_in))
    if role == "mlp_out":  # He: the nonlinearity before it halves the second moment
        return math.sqrt(2 / (2 * n_layers * d_in))
    return math.sqrt(1 / d_in)


class EqualInit:
    """The same deviation for every matrix, residual outputs included."""

    residual = 1.0

    def __init__(self, place: Place, variance: float) -> None:
        self._std = math.sqrt(variance)

    def std(self, role: str) -> float:
        return self._std


class GatedLinear(nn.Module):
    """``y = x (α W)ᵀ``, a scalar α for each projection among the rows of W."""

    def __init__(self, place: Place, d_in: int, d_out: int, role: str, variance: float) -> None:
        super().__init__()
        found = shares(place.spec, role)
        starts = {target_std(share, d_in, place.spec.n_layers) for share, _ in found}
        assert len(starts) == 1, "projections that share a matrix have one target"
        self.rows = [d_out if rows < 0 else rows for _, rows in found]
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.gate = nn.Parameter(torch.empty(len(found)))
        self.param_roles = {"weight": role, "gate": "gain"}
        self.param_fill = {"gate": starts.pop() / math.sqrt(variance)}

    def forward(self, x_D: Tensor) -> Tensor:
        return F.linear(x_D, self._gated(self.weight, self.gate).to(x_D.dtype))

    def effective_weight(self) -> Tensor:
        """Return α W (O, D), differentiable, at least fp32."""
        return self._gated(_whole(self.weight), _whole(self.gate))

    def _gated(self, weight_OD: Tensor, gate_S: Tensor) -> Tensor:
        wide = torch.promote_types(weight_OD.dtype, torch.float32)
        gates_S = gate_S.to(wide)
        gate_O = torch.cat([gates_S[i : i + 1].expand(rows) for i, rows in enumerate(self.rows)])
        return weight_OD.to(wide) * gate_O[:, None]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, role={self.param_roles['weight']}"


class ScalarGate(nn.Module):
    """x -> α x."""

    def __init__(self, place: Place, start: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(1))
        self.param_roles = {"gate": "gain"}
        self.param_fill = {"gate": start}

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.gate.to(x_BTD.dtype)


def head_gate(place: Place, variance: float) -> nn.Module:
    """α of the head, on its input."""
    return ScalarGate(place, target_std("head", place.spec.d_model, place.spec.n_layers) / math.sqrt(variance))


def embed_gate_part(place: Place, variance: float) -> nn.Module:
    """α of the embedding; the residual stream starts with a deviation of one."""
    return ScalarGate(place, 1 / math.sqrt(variance))


def _whole(x: Tensor) -> Tensor:
    """The whole of a sharded tensor; another one as it is. Inside a forward pass nothing is sharded."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "linear": {"wesar": GatedLinear},
    "init": {"wesar": EqualInit},
    "head_in": {"wesar": head_gate},
    "embed_out": {"wesar": embed_gate_part},
}


def apply(spec: Spec, *, variance: float = 4e-5, embed_gate: bool = False) -> Spec:
    """Return ``spec`` with gated matrices that all start alike.

    Args:
        spec: the model without it.
        variance: σ², not σ.
        embed_gate: whether the embedding has a gate too.

    Raises:
        UserError: a variance that is not above 0, or too large.
    """
    if not 0 < variance <= 1e15:
        raise UserError(f"wesar variance is {variance}; give a number above 0, up to 1e15, e.g. 4e-5")
    part = Part.of("wesar", {"variance": variance})
    for slot in ("linear", "init", "head_in", *(("embed_out",) if embed_gate else ())):
        spec = spec.claim(slot, part, "wesar")
    return spec.claim("residual_init", Part("plain"), "wesar")
