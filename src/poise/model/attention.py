"""Rotary positions and the attention core, with one rule for which kernel computes it.

Shapes: B batch, T positions, H query heads, G key/value heads, R = H / G queries a key head, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from poise.model.place import Place

MATMUL_UP_TO = {torch.bfloat16: 512, torch.float32: 0}
"""Longest sequence for which plain matrix products are used on a CPU, by dtype.

Measured by ``benchmarks/attention_switch.py`` (result in ``benchmarks/results/attention_switch.txt``): in
bf16 matrix products are faster up to 768, but at 768 by little and with T² memory; in fp32 the two are even
at 64 and the fused kernel wins from 128 on.
"""


def use_matmul(seq_len: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether attention is computed with plain matrix products instead of the fused kernel.

    >>> use_matmul(256, torch.bfloat16, "cpu"), use_matmul(256, torch.bfloat16, "cuda")
    (True, False)
    """
    return device_type == "cpu" and seq_len <= MATMUL_UP_TO.get(dtype, 0)


def root_scale(place: Place) -> float:
    """The default ``attn_scale`` slot: 1 / √K (Vaswani et al. 2017, arXiv 1706.03762)."""
    return float(place.spec.head_dim**-0.5)


def matmul_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax attention that holds the (B, H, T, T) scores; no copy of keys and values per head."""
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    # The query heads that share a key head are stacked along the rows of one product.
    q_BGrK = (q_BHTK * (K**-0.5 if scale is None else scale)).reshape(B, G, H // G * T, K)
    future_TT = torch.full((T, T), float("-inf"), dtype=q_BHTK.dtype, device=q_BHTK.device).triu(1)
    scores_BHTT = (q_BGrK @ k_BGTK.mT).view(B, H, T, T).add_(future_TT)
    # The CPU kernel of softmax computes in fp32 and rounds once, at the end.
    probs_BHTT = F.softmax(scores_BHTT, -1)
    return (probs_BHTT.view(B, G, H // G * T, T) @ v_BGTK).view(B, H, T, K)


def fused_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax attention in torch's fused kernel; memory grows with T, not with T²."""
    shared = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, scale=scale, enable_gqa=shared)


class SoftmaxScores(nn.Module):
    """The default ``scores`` slot: causal ``softmax(scale · q kᵀ) v`` (Vaswani et al. 2017, 1706.03762)."""

    def __init__(self, place: Place, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        if use_matmul(q_BHTK.shape[2], q_BHTK.dtype, q_BHTK.device.type):
            return matmul_attention(q_BHTK, k_BGTK, v_BGTK, self.scale)
        return fused_attention(q_BHTK, k_BGTK, v_BGTK, self.scale)


class Rope(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), first half paired with second half.

    The pair (x_i, x_{i + K/2}) at position t is turned by the angle ``t · theta^(−2i/K)``, so that a product
    of a query and a key depends on their distance only. Angles and rotation are in fp32.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.theta, self.seq_len, self.head_dim = spec.rope_theta, spec.seq_len, spec.head_dim
        # A function of the spec, so it is not saved; filled after a meta-device build by ``fill_buffers``.
        shape = (self.seq_len, self.head_dim // 2)
        self.cos_TK: Tensor
        self.sin_TK: Tensor
        self.register_buffer("cos_TK", torch.empty(shape), persistent=False)
        self.register_buffer("sin_TK", torch.empty(shape), persistent=False)

    def fill_buffers(self) -> None:
        """Compute the tables on the buffers' device; float64 angles keep long positions exact."""
        half = self.head_dim // 2
        speed_K = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle_TK = torch.arange(self.seq_len, dtype=torch.float64)[:, None] * speed_K
        self.cos_TK.copy_(angle_TK.cos())
        self.sin_TK.copy_(angle_TK.sin())

    def forward(self, x_BHTK: Tensor) -> Tensor:
        T = x_BHTK.shape[2]
        cos_TK, sin_TK = self.cos_TK[:T], self.sin_TK[:T]
        if torch.compiler.is_compiling():
            return _rotate(x_BHTK, cos_TK, sin_TK)
        out: Tensor = _Rotate.apply(x_BHTK, cos_TK, sin_TK)  # type: ignore[no-untyped-call]
        return out


class _Rotate(torch.autograd.Function):
    """The rotation with its own backward, which is the rotation back: nothing of x need be kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TK, sin_TK)
        return _rotate(x_BHTK, cos_TK, sin_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_BHTK: Tensor) -> tuple[Tensor, None, None]:
        cos_TK, sin_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        return _rotate(dy_BHTK, cos_TK, -sin_TK), None, None


def _rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    a_BHTK, b_BHTK = x_BHTK.to(cos_TK.dtype).chunk(2, -1)
    turned = (a_BHTK * cos_TK - b_BHTK * sin_TK, b_BHTK * cos_TK + a_BHTK * sin_TK)
    return torch.cat(turned, -1).to(x_BHTK.dtype)
