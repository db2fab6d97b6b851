"""Attention with a cap, a sink or documents: torch's flex_attention on a GPU, else the blocks of ``blockwise``.

A cap is flex's ``score_mod``, which sees the scaled fp32 logit before the mask. A sink needs no other kernel: with
lse = logsumexp(z) of a row, exp(z) / (exp(s) + sum exp(z)) = softmax(z) sigmoid(lse - s), so plain attention's output
is multiplied by that factor, and flex differentiates through the lse it returns.

Only a compiled flex_attention is fused; eager, it holds all scores. So it is compiled by itself where the model is not.

Shapes: B batch, T positions, H query heads, G key/value heads, K head width, M blocks of positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from poise.model.blockwise import Maps, blockwise_attention

FLEX_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
LEAST_HEAD_DIM: Final = 16
"""Narrowest head that flex's kernels take."""

MASK_BLOCK: Final = 128
"""Positions in a block of flex's mask: blocks wholly in the future are left out, wholly in the past not masked."""


def why_not_flex(maps: Maps, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return why flex_attention cannot compute this, in words that follow "because", or nothing where it can.

    >>> why_not_flex(Maps(0.125, cap=50.0), "cuda", torch.bfloat16, 64)
    ''
    >>> why_not_flex(Maps(0.125, cap=50.0), "cpu", torch.bfloat16, 64)
    'flex_attention has no backward on a CPU'
    """
    if device_type != "cuda":
        return "flex_attention has no backward on a CPU" if device_type == "cpu" else "flex_attention needs CUDA"
    if maps.clips:
        return "no fused kernel can change probabilities"
    if dtype not in FLEX_DTYPES:
        return f"flex_attention takes no {str(dtype).removeprefix('torch.')}"
    if head_dim < LEAST_HEAD_DIM:
        return f"flex_attention needs heads of width {LEAST_HEAD_DIM} or more"
    return ""


def changed_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    maps: Maps,
    sink_H: Tensor | None = None,
    first_BT: Tensor | None = None,
) -> Tensor:
    """Causal attention with changed logits or probabilities, or within documents, by the best path there is; arguments
    as in ``blockwise_attention``."""
    if why_not_flex(maps, q_BHTK.device.type, q_BHTK.dtype, q_BHTK.shape[-1]):
        return blockwise_attention(q_BHTK, k_BGTK, v_BGTK, maps, sink_H, first_BT=first_BT)
    core = flex_core if torch.compiler.is_compiling() else _compiled_core()
    return core(q_BHTK, k_BGTK, v_BGTK, maps.scale, maps.cap, sink_H, first_BT)


def flex_core(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    scale: float,
    cap: float,
    sink_H: Tensor | None,
    first_BT: Tensor | None = None,
) -> Tensor:
    """The flex path, to be compiled. A ``cap`` of 0 is none."""
    seq_len, shared = q_BHTK.shape[2], q_BHTK.shape[1] != k_BGTK.shape[1]

    def capped(score: Tensor, b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    score_mod = capped if cap else None
    mask = causal_mask(seq_len, q_BHTK.device) if first_BT is None else documents_mask(first_BT)
    if sink_H is None:
        out: Tensor = flex_attention(
            q_BHTK, k_BGTK, v_BGTK, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=shared
        )
        return out
    plain_BHTK, aux = flex_attention(
        q_BHTK,
        k_BGTK,
        v_BGTK,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=shared,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None, "asked for it"
    gate_BHT = torch.sigmoid(aux.lse - sink_H.to(aux.lse.dtype)[:, None])
    return (plain_BHTK * gate_BHT[..., None]).to(q_BHTK.dtype)


def causal_mask(seq_len: int, device: torch.device) -> BlockMask:
    """Return flex's table of the causal mask without ever making a (T, T) tensor, so it can be made in every call."""
    count = -(-seq_len // MASK_BLOCK)
    index_M = torch.arange(count, dtype=torch.int32, device=device)
    # Row i: its own block is cut by the diagonal, those before it are seen whole; a torn last row is cut everywhere.
    # Only the first so many entries of a row's list count.
    torn_M = index_M >= seq_len // MASK_BLOCK
    order_MM = index_M.expand(count, count)
    return BlockMask.from_kv_blocks(
        torch.where(torn_M, count, 1).int()[None, None],
        ((order_MM + index_M[:, None]) % count)[None, None].contiguous(),
        torch.where(torn_M, 0, index_M)[None, None],
        order_MM[None, None].contiguous(),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=_sees,
        seq_lengths=(seq_len, seq_len),
    )


def documents_mask(first_BT: Tensor) -> BlockMask:
    """Return flex's table of the mask within documents, from the first position that each query may see.

    That position never falls along a row, so a block's first query tells which blocks are seen at all and its last
    query which are seen whole; neither a (T, T) tensor nor a number on the host is needed.
    """
    seq_len = first_BT.shape[1]
    count = -(-seq_len // MASK_BLOCK)
    index_M = torch.arange(count, dtype=torch.int32, device=first_BT.device)
    own_MM, past_MM = index_M == index_M[:, None], index_M < index_M[:, None]
    least_BM1 = first_BT[:, ::MASK_BLOCK, None]
    ends_M = (index_M.long() * MASK_BLOCK + MASK_BLOCK - 1).clamp(max=seq_len - 1)
    most_BM1 = first_BT[:, ends_M, None]
    seen_BMM = own_MM | past_MM & (index_M * MASK_BLOCK + MASK_BLOCK - 1 >= least_BM1)
    torn_M1 = index_M[:, None] >= seq_len // MASK_BLOCK
    whole_BMM = past_MM & (index_M * MASK_BLOCK >= most_BM1) & ~torn_M1
    cut_BMM = seen_BMM & ~whole_BMM

    def sees(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return (q_at >= k_at) & (k_at >= first_BT[b, q_at])

    return BlockMask.from_kv_blocks(
        *_listed(cut_BMM),
        *_listed(whole_BMM),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=sees,
        seq_lengths=(seq_len, seq_len),
    )


def _listed(wanted_BMM: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row are wanted, and the blocks in an order in which those come first."""
    order_BMM = wanted_BMM.int().argsort(dim=-1, descending=True, stable=True)
    return wanted_BMM.sum(-1, dtype=torch.int32)[:, None], order_BMM.int()[:, None].contiguous()


def _sees(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    return q_at >= k_at


@functools.cache
def _compiled_core() -> Callable[..., Tensor]:
    core: Callable[..., Tensor] = torch.compile(flex_core, fullgraph=True, dynamic=False)
    return core
