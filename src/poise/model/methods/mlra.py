"""Low-rank attention projections (MLRA): queries, keys and values each come from two low-rank matrices.

Citation: Chung et al. 2024, "Stable Language Model Pre-training by Reducing Embedding Variability",
    arXiv 2409.07787 (Multi-head Low-Rank Attention). Not the method of that name of 2026 (arXiv 2603.02188), which is
    about the memory of inference.
Formula: W_q = U_q L_q, W_k = U_k L_k, W_v = U_v L_v, before the heads are split; L (r, D) is first, U (rows, r) next.
Differs from the paper in: our interpretation. Of the paper only the aim was seen (low-rank projections limit the
    variance of output embeddings), not the factor form, the rank or what is shared. Ours: no sharing, nothing between
    the two factors; the rank is half the smaller side of each projection unless given; both factors start with the
    same deviation, chosen so that the product has that of the plain matrix (1.3 % less, since both are cut off).
Cost: with rank r, r (D + rows) parameters and multiplications in place of D · rows: at half the smaller side of square
    projections as many as without; six small matrix products in place of one.
Acts: in every block, on the projections to queries, keys and values; other matrices are plain.
Off: leave `mlra` out of the methods.
Numerics: both products are in the compute dtype, what is between them rounded to it.

Shapes: D width, r rank, O rows of all three projections.
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
from poise.model.layers import Linear
from poise.model.place import Place
from poise.model.spec import Part, Spec
from poise.model.starts import Stds

CARD: Final = Card(
    name="mlra",
    kind="model",
    title="Makes queries, keys and values by two low-rank matrices each (our interpretation), to limit their variance",
    citation="Chung et al. 2024, arXiv 2409.07787 (not arXiv 2603.02188)",
    formula="W_q = U_q L_q, W_k = U_k L_k, W_v = U_v L_v",
    acts="in every block, every step, on the projections to queries, keys and values",
    cost="r (D + rows) parameters a projection in place of D rows; six small matrix products in place of one",
    off="leave `mlra` out of the methods",
    differs="our interpretation: the paper's factor form, rank and sharing were not seen",
)

EXCLUDES: Final[Mapping[str, str]] = {}

CHANGES_LR: Final = (
    "queries, keys and values come from products of two trained factors, and a step of one factor moves the product by "
    "as much as the other is large"
)


class LowRankQKV(nn.Module):
    """``y = x Wᵀ``; the rows of W are those of U_q L_q, then of U_k L_k, then of U_v L_v."""

    def __init__(self, place: Place, d_in: int, rank: int | None) -> None:
        super().__init__()
        stds = Stds(place.spec)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.param_roles: dict[str, str] = {}
        self.param_std: dict[str, float] = {}
        self.shares = [share for share, _ in shares(place.spec, "qkv")]
        for share, rows in shares(place.spec, "qkv"):
            r = min(d_in, rows) // 2 if rank is None else rank
            self.down[share] = nn.Parameter(torch.empty(r, d_in))
            self.up[share] = nn.Parameter(torch.empty(rows, r))
            for factor in ("down", "up"):
                self.param_roles[f"{factor}.{share}"] = share
                # A sum of r products of two independent values has the deviation sqrt(r) · std².
                self.param_std[f"{factor}.{share}"] = math.sqrt(stds[share] / math.sqrt(r))

    def forward(self, x_D: Tensor) -> Tensor:
        parts = []
        for share in self.shares:
            low_r = F.linear(x_D, self.down[share].to(x_D.dtype))
            parts.append(F.linear(low_r, self.up[share].to(x_D.dtype)))
        return torch.cat(parts, -1)

    def effective_weight(self) -> Tensor:
        """Return the (O, D) matrix W, differentiable, at least fp32."""
        return torch.cat([_wide(self.up[share]) @ _wide(self.down[share]) for share in self.shares])

    def extra_repr(self) -> str:
        return ", ".join(f"{share}: {tuple(self.up[share].shape)}" for share in self.shares)


def low_rank_qkv(place: Place, d_in: int, d_out: int, role: str, rank: int | None = None) -> nn.Module:
    """Low-rank factors for the role ``qkv``, the plain product for every other."""
    return LowRankQKV(place, d_in, rank) if role == "qkv" else Linear(place, d_in, d_out, role)


def _wide(x: Tensor) -> Tensor:
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole.to(torch.promote_types(x.dtype, torch.float32))


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"linear": {"mlra": low_rank_qkv}}


def apply(spec: Spec, *, rank: int | None = None) -> Spec:
    """Return ``spec`` with low-rank projections of rank ``rank``, by default half the smaller side of each.

    Raises:
        UserError: a rank below 1 or above the smallest side of a projection.
    """
    smallest = min(spec.d_model, spec.n_kv_heads * spec.head_dim)
    if rank is not None and not 1 <= rank <= smallest:
        raise UserError(f"mlra rank is {rank}; give a whole number from 1 to {smallest}, the rows of the keys")
    return spec.claim("linear", Part.of("mlra", {"rank": rank}), "mlra")
