"""Rotary positions and the attention core, with one rule for which kernel computes it.

Shapes: B batch, T positions, H query heads, G key/value heads, R = H / G queries a key head, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from poise.model.blockwise import Maps
from poise.model.documents import Documents, first_positions
from poise.model.flex import changed_attention
from poise.model.place import Place

MATMUL_UP_TO = {torch.bfloat16: 512, torch.float32: 0}
"""Longest sequence for which plain matrix products are used on a CPU, by dtype.

Measured by ``benchmarks/attention_switch.py`` (result in ``benchmarks/results/attention_switch.txt``): in
bf16 matrix products are faster up to 768, but at 768 by little and with T² memory; in fp32 the two are even
at 64 and the fused kernel wins from 128 on.
"""


PIECE_PAIRS = 4096
"""Pairs of positions for which one more document is worth a call of its own: with more documents than
T² / ``PIECE_PAIRS`` in a row, on a CPU a mask over the whole row is faster than a call for each.

From forward and backward on one core, 6 heads of width 64: a call costs about 0.3 ms, a masked pair of positions 66 ns
in fp32, so that the two meet near 4500.
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


def matmul_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float | None = None, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Causal softmax attention that holds the (B, H, T, T) scores; no copy of keys and values per head.

    ``mask_B1TT`` is added to the scores in place of the causal mask.
    """
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    # The query heads that share a key head are stacked along the rows of one product.
    q_BGrK = (q_BHTK * (K**-0.5 if scale is None else scale)).reshape(B, G, H // G * T, K)
    if mask_B1TT is None:
        mask_B1TT = torch.full((T, T), float("-inf"), dtype=q_BHTK.dtype, device=q_BHTK.device).triu(1)
    scores_BHTT = (q_BGrK @ k_BGTK.mT).view(B, H, T, T).add_(mask_B1TT)
    # The CPU kernel of softmax computes in fp32 and rounds once, at the end.
    probs_BHTT = F.softmax(scores_BHTT, -1)
    return (probs_BHTT.view(B, G, H // G * T, T) @ v_BGTK).view(B, H, T, K)


def fused_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float | None = None, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Causal softmax attention in torch's fused kernel; memory grows with T, not with T².

    ``mask_B1TT`` is added to the scores in place of the causal mask; with it the kernel computes the whole square.
    """
    shared, causal = q_BHTK.shape[1] != k_BGTK.shape[1], mask_B1TT is None
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGTK, v_BGTK, attn_mask=mask_B1TT, is_causal=causal, scale=scale, enable_gqa=shared
    )


def one_document(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, by the kernel that is best for this length, dtype and device."""
    if use_matmul(q_BHTK.shape[2], q_BHTK.dtype, q_BHTK.device.type):
        return matmul_attention(q_BHTK, k_BGTK, v_BGTK, scale)
    return fused_attention(q_BHTK, k_BGTK, v_BGTK, scale)


def several_documents(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float, documents: Documents) -> Tensor:
    """The same within each document of a row; ``paths.attention_path`` says in words by which kernel."""
    B, _, T, _ = q_BHTK.shape
    if q_BHTK.device.type != "cpu":
        return changed_attention(q_BHTK, k_BGTK, v_BGTK, Maps(scale), first_BT=documents.first)
    if use_matmul(T, q_BHTK.dtype, "cpu"):
        return matmul_attention(q_BHTK, k_BGTK, v_BGTK, scale, documents.mask(q_BHTK.dtype))
    if torch.compiler.is_compiling():  # a graph has one shape, and documents have many
        return fused_attention(q_BHTK, k_BGTK, v_BGTK, scale, documents.mask(q_BHTK.dtype))
    lengths = documents.lengths()
    count = sum(len(row) for row in lengths)
    if count == B:
        return one_document(q_BHTK, k_BGTK, v_BGTK, scale)
    if count * PIECE_PAIRS > B * T * T:
        return fused_attention(q_BHTK, k_BGTK, v_BGTK, scale, documents.mask(q_BHTK.dtype))
    return _piece_by_piece(q_BHTK, k_BGTK, v_BGTK, scale, lengths)


def _piece_by_piece(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float, lengths: list[list[int]]) -> Tensor:
    """Each document by itself: nothing is computed between documents, and no mask is made."""
    rows = []
    for q_HTK, k_GTK, v_GTK, row in zip(q_BHTK.unbind(), k_BGTK.unbind(), v_BGTK.unbind(), lengths, strict=True):
        # Split, not sliced: the gradient of a slice is as large as what it was cut from.
        pieces = zip(*(torch.split(x, row, 1) for x in (q_HTK, k_GTK, v_GTK)), strict=True)
        rows.append(torch.cat([one_document(q[None], k[None], v[None], scale)[0] for q, k, v in pieces], 1))
    return torch.stack(rows)


class SoftmaxScores(nn.Module):
    """The default ``scores`` slot: causal ``softmax(scale · q kᵀ) v`` (Vaswani et al. 2017, 1706.03762)."""

    def __init__(self, place: Place, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is None:
            return one_document(q_BHTK, k_BGTK, v_BGTK, self.scale)
        return several_documents(q_BHTK, k_BGTK, v_BGTK, self.scale, documents)


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

    def documents(self, documents_BT: Tensor) -> Documents:
        """Return the documents of a batch of rows, each counted from its first token."""
        first_BT = first_positions(documents_BT)
        position_BT = torch.arange(first_BT.shape[1], device=first_BT.device) - first_BT
        return Documents(first_BT, (self.cos_TK[position_BT][:, None], self.sin_TK[position_BT][:, None]))

    def forward(self, x_BHTK: Tensor, documents: Documents | None = None) -> Tensor:
        T = x_BHTK.shape[2]
        cos_TK, sin_TK = (self.cos_TK[:T], self.sin_TK[:T]) if documents is None else documents.angles
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
