"""Attention whose logits or probabilities are changed, a block of the scores at a time, forward and backward.

Torch's fused kernel on a CPU computes plain softmax attention and nothing else. Here the scores exist for a few
heads and query rows at once, within a budget of bytes, and are computed again in the backward pass, so that memory
grows with T and not with T². A block of rows holds every key which those rows may see, so that a softmax is whole and
may be changed; keys in the future of all rows of a block are left out. In a row of the batch with several documents a
query sees the keys from the first position of its own; on a CPU a block's keys before all of those are left out too.

    z = scale q kᵀ,   z' = c tanh(z / c),   p = softmax(z') with a sink's exp(s) added to the normaliser,
    w = clip((zeta - gamma) p + gamma, 0, 1),   out = w v

Gradients, with delta = sum_j p_j dp_j of a row and dp = (zeta - gamma) [0 < w < 1] dout vᵀ: dz' = p (dp - delta),
ds = -(1 - sum_j p_j) delta, dz = (1 - (z' / c)²) dz'. First order only.

Numerics: logits, softmax and their gradients are in fp32 (float64 for float64 inputs), the products q kᵀ included, so
that large logits are not rounded to bf16; products with values and of gradients take their factors in the dtype of
the inputs. Gradients of keys, values and sinks are summed in fp32.

Shapes: B batch, T positions, H query heads, G key/value heads, R = H / G queries a key head, K head width, N = B G;
inside a block n of the N, r query rows, s keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK_BYTES: Final = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Default budget for one block of scores, by device type; on a CPU about a second-level cache."""

BLOCK_ROWS: Final = 64
"""Most query rows of a block: of the block on the diagonal, half is computed for nothing."""


@dataclass(frozen=True, slots=True)
class Maps:
    """What happens between ``q kᵀ`` and the product with the values.

    Attributes:
        scale: factor of ``q kᵀ``.
        cap: c of ``c tanh(z / c)``; 0 for none.
        zeta, gamma: the interval to which probabilities are stretched before they are clipped to [0, 1].
    """

    scale: float
    cap: float = 0.0
    zeta: float = 1.0
    gamma: float = 0.0

    @property
    def stretch(self) -> float:
        return self.zeta - self.gamma

    @property
    def clips(self) -> bool:
        return (self.zeta, self.gamma) != (1.0, 0.0)


def blockwise_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    maps: Maps,
    sink_H: Tensor | None = None,
    block_bytes: int | None = None,
    first_BT: Tensor | None = None,
) -> Tensor:
    """Causal attention with changed logits or probabilities; returns (B, H, T, K) in the dtype of the queries.

    Args:
        q_BHTK: queries.
        k_BGTK: keys, each for H / G neighbouring query heads.
        v_BGTK: values.
        maps: what is changed.
        sink_H: a logit of each query head that takes part in the softmax and has no value.
        block_bytes: budget for a block of scores, by default ``BLOCK_BYTES`` of the device; a few blocks exist at
            the same time. A single query row of all heads that share a key is the least that a block can be.
        first_BT: the first position that each query may see, int64, never falling along a row; by default 0.
    """
    budget = block_bytes or BLOCK_BYTES.get(q_BHTK.device.type, BLOCK_BYTES["cuda"])
    if torch.compiler.is_compiling():  # one opaque operator: traced, the loops would keep all scores for the backward
        numbers = (maps.scale, maps.cap, maps.zeta, maps.gamma)
        out: Tensor = _operator(q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, *numbers, budget)
    else:
        out = _Blockwise.apply(q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, maps, budget)  # type: ignore[no-untyped-call]
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        sink_H: Tensor | None,
        first_BT: Tensor | None,
        maps: Maps,
        budget: int,
    ) -> Tensor:
        out_BHTK = _forward(q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, maps, budget)
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, out_BHTK)  # type: ignore[arg-type]
        ctx.maps, ctx.budget = maps, budget  # type: ignore[attr-defined]
        return out_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, out_BHTK = ctx.saved_tensors  # type: ignore[attr-defined]
        maps, budget = ctx.maps, ctx.budget  # type: ignore[attr-defined]
        grads = _backward(dout_BHTK, out_BHTK, q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, maps, budget)
        return (*grads, None, None, None)


@dataclass(frozen=True, slots=True)
class _Block:
    """The weights of one block, and what their gradient needs; all (n, R, r, s) but ``rest``.

    Attributes:
        p: probabilities; where there is a sink, they sum to less than 1.
        w: weights of the values; the same tensor unless clipped.
        t: ``tanh(z / c)`` where logits are capped.
        rest: (n, R, r, 1), what the sink takes of each row, where there is one.
    """

    p: Tensor
    w: Tensor
    t: Tensor | None
    rest: Tensor | None


def _block(q_nRrK: Tensor, k_nsK: Tensor, sink_nR11: Tensor | None, foreign_n1rs: Tensor | None, maps: Maps) -> _Block:
    """Compute a block; the last r of its s keys are at the positions of its r rows. Inputs are at least fp32.

    ``foreign_n1rs`` is true at keys of earlier documents; n may be 1 in it.
    """
    n, R, r, _ = q_nRrK.shape
    s = k_nsK.shape[1]
    z_nRrs = (q_nRrK.flatten(1, 2) @ k_nsK.mT).view(n, R, r, s)
    t_nRrs = None
    if maps.cap:
        t_nRrs = z_nRrs.mul_(maps.scale / maps.cap).tanh_()
        z_nRrs = t_nRrs * maps.cap
    else:
        z_nRrs.mul_(maps.scale)
    future_rr = torch.ones(r, r, dtype=torch.bool, device=z_nRrs.device).triu_(1)
    z_nRrs[..., s - r :].masked_fill_(future_rr, float("-inf"))  # after the cap, which would make it finite
    if foreign_n1rs is not None:
        z_nRrs.masked_fill_(foreign_n1rs, float("-inf"))
    rest_nRr1 = None
    if sink_nR11 is None:
        p_nRrs = torch.softmax(z_nRrs, -1)
    else:
        top_nRr1 = z_nRrs.amax(-1, keepdim=True)
        p_nRrs = torch.softmax(z_nRrs, -1)
        # The largest probability is exp(top - lse): no second pass of exponentials.
        above_nRr1 = top_nRr1 - p_nRrs.amax(-1, keepdim=True).log_() - sink_nR11
        p_nRrs.mul_(above_nRr1.sigmoid())
        rest_nRr1 = above_nRr1.neg_().sigmoid_()
    w_nRrs = (p_nRrs * maps.stretch).add_(maps.gamma).clamp_(0, 1) if maps.clips else p_nRrs
    return _Block(p_nRrs, w_nRrs, t_nRrs, rest_nRr1)


def _forward(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    sink_H: Tensor | None,
    first_BT: Tensor | None,
    maps: Maps,
    budget: int,
) -> Tensor:
    work = _Work(q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, budget)
    out_NRTK = torch.empty_like(work.q_NRTK)
    for some, rows, keys in work.blocks():
        w_nRrs = _block(*work.block(some, rows, keys), maps).w
        out_nAK = w_nRrs.flatten(1, 2).to(work.dtype) @ work.v_NTK[some, keys]
        out_NRTK[some, :, rows] = out_nAK.view_as(out_NRTK[some, :, rows])
    return out_NRTK.view(q_BHTK.shape)


def _backward(
    dout_BHTK: Tensor,
    out_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    sink_H: Tensor | None,
    first_BT: Tensor | None,
    maps: Maps,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    work = _Work(q_BHTK, k_BGTK, v_BGTK, sink_H, first_BT, budget)
    dout_NRTK = dout_BHTK.reshape(work.q_NRTK.shape)
    delta_NRT1 = (work.wide(dout_BHTK) * out_BHTK).sum(-1, keepdim=True).view(*work.q_NRTK.shape[:-1], 1)
    dq_NRTK = torch.empty_like(work.q_NRTK)
    dk_NTK, dv_NTK = torch.zeros_like(work.wide_k_NTK), torch.zeros_like(work.wide_k_NTK)
    dsink_NR = delta_NRT1.new_zeros(delta_NRT1.shape[:2])
    for some, rows, keys in work.blocks():
        block = _block(*work.block(some, rows, keys), maps)
        q_nAK, k_nsK = work.q_NRTK[some, :, rows].flatten(1, 2), work.k_NTK[some, keys]
        v_nsK, dout_nAK = work.v_NTK[some, keys], dout_NRTK[some, :, rows].flatten(1, 2)
        dv_NTK[some, keys] += block.w.flatten(1, 2).to(work.dtype).mT @ dout_nAK
        dp_nRrs = work.wide(dout_nAK @ v_nsK.mT).view_as(block.p)
        delta_nRr1 = delta_NRT1[some, :, rows]
        if maps.clips:
            dp_nRrs.mul_((block.w > 0).logical_and_(block.w < 1)).mul_(maps.stretch)
            delta_nRr1 = (block.p * dp_nRrs).sum(-1, keepdim=True)
        if block.rest is not None:
            dsink_NR[some] -= (block.rest * delta_nRr1).sum((2, 3))
        dz_nRrs = dp_nRrs.sub_(delta_nRr1).mul_(block.p)
        if block.t is not None:
            dz_nRrs.mul_(block.t.square_().neg_().add_(1))
        dz_nAs = dz_nRrs.mul_(maps.scale).flatten(1, 2).to(work.dtype)
        dq_NRTK[some, :, rows] = (dz_nAs @ k_nsK).view_as(dq_NRTK[some, :, rows])
        dk_NTK[some, keys] += dz_nAs.mT @ q_nAK
    dk_BGTK, dv_BGTK = (grad.view(k_BGTK.shape).to(work.dtype) for grad in (dk_NTK, dv_NTK))
    dsink_H = None if sink_H is None else dsink_NR.view(q_BHTK.shape[:2]).sum(0).to(sink_H.dtype)
    return dq_NRTK.view(q_BHTK.shape), dk_BGTK, dv_BGTK, dsink_H


class _Work:
    """The inputs with the query heads beside the key head that they share, and how they are cut into blocks."""

    def __init__(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        sink_H: Tensor | None,
        first_BT: Tensor | None,
        budget: int,
    ) -> None:
        B, H, T, K = q_BHTK.shape
        G = k_BGTK.shape[1]
        self.dtype, self.exact = q_BHTK.dtype, torch.promote_types(q_BHTK.dtype, torch.float32)
        self.q_NRTK = q_BHTK.reshape(B * G, H // G, T, K).contiguous()
        self.k_NTK, self.v_NTK = (x.reshape(B * G, T, K).contiguous() for x in (k_BGTK, v_BGTK))
        self.wide_k_NTK = self.wide(self.k_NTK)
        self.sink_NR11 = None
        if sink_H is not None:
            self.sink_NR11 = self.wide(sink_H).expand(B, H).reshape(B * G, H // G, 1, 1)
        self.budget, self.first_BT, self.kv_heads = budget, first_BT, G
        self.begins: list[list[int]] | None = None
        # On a GPU reading them would wait for it, in every block of the model.
        if first_BT is not None and first_BT.device.type == "cpu":
            if first_BT[:, -1].any():
                self.begins = first_BT.tolist()
            else:  # a document a row
                self.first_BT = None

    def wide(self, x: Tensor) -> Tensor:
        return x.to(self.exact)

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """Yield (which of the N, which query rows, which keys): the keys are all that one of these rows may see."""
        N, R, T, _ = self.q_NRTK.shape
        row_bytes = R * self.exact.itemsize
        most = max(1, min(T, BLOCK_ROWS, self.budget // (row_bytes * T)))
        # Where their documents are known, the rows of the batch have keys of their own.
        size = N if self.begins is None else self.kv_heads
        for start in range(0, T, most):
            rows = slice(start, min(start + most, T))
            for n in range(0, N, size):
                keys = slice(self._begin(n, start), rows.stop)
                one = row_bytes * (rows.stop - start) * (keys.stop - keys.start)
                together = max(1, self.budget // one)
                for first in range(n, n + size, together):
                    yield slice(first, min(first + together, n + size)), rows, keys

    def block(self, some: slice, rows: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what ``_block`` takes."""
        sink_nR11 = None if self.sink_NR11 is None else self.sink_NR11[some]
        return (
            self.wide(self.q_NRTK[some, :, rows]),
            self.wide_k_NTK[some, keys],
            sink_nR11,
            self._foreign(some, rows, keys),
        )

    def _begin(self, n: int, row: int) -> int:
        """Return the first key that query ``row`` of the ``n``-th of the N may see, as far as it is known."""
        return 0 if self.begins is None else self.begins[n // self.kv_heads][row]

    def _foreign(self, some: slice, rows: slice, keys: slice) -> Tensor | None:
        """Return which of the keys are of earlier documents than a query, (n, 1, r, s), n perhaps 1; ``None`` where it
        is known that none is."""
        if self.first_BT is None:
            return None
        if self.begins is not None and self._begin(some.start, rows.stop - 1) == keys.start:
            return None
        key_s = torch.arange(keys.start, keys.stop, device=self.first_BT.device)
        of_n = torch.arange(some.start, some.stop, device=self.first_BT.device) // self.kv_heads
        if self.begins is not None:
            of_n = of_n[:1]
        return (key_s < self.first_BT[of_n, rows, None])[:, None]


# Operators for compiled graphs. Declaring one is a matter of import: a graph names it.


@torch.library.custom_op(
    "poise::blockwise_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? first, float scale, float cap, float zeta, "
    "float gamma, int budget) -> Tensor",
)
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    first: Tensor | None,
    scale: float,
    cap: float,
    zeta: float,
    gamma: float,
    budget: int,
) -> Tensor:
    return _forward(q, k, v, sink, first, Maps(scale, cap, zeta, gamma), budget)


@torch.library.custom_op(
    "poise::blockwise_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor out, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? first, float scale, "
    "float cap, float zeta, float gamma, int budget) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _operator_backward(
    dout: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    first: Tensor | None,
    scale: float,
    cap: float,
    zeta: float,
    gamma: float,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dsink = _backward(dout, out, q, k, v, sink, first, Maps(scale, cap, zeta, gamma), budget)
    return dq, dk, dv, q.new_empty(0) if dsink is None else dsink  # an operator cannot return nothing


@_operator.register_fake
def _(q: Tensor, *_rest: object) -> Tensor:
    return q.new_empty(q.shape)


@_operator_backward.register_fake
def _(
    dout: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *_rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        (q if sink is None else sink).new_empty(0 if sink is None else sink.shape),
    )


def _keep(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    q, k, v, sink, first, *numbers = inputs
    ctx.save_for_backward(q, k, v, sink, first, output)  # type: ignore[arg-type]
    ctx.numbers = numbers  # type: ignore[attr-defined]


def _pull(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, sink, first, out = ctx.saved_tensors  # type: ignore[attr-defined]
    dq, dk, dv, dsink = _operator_backward(dout, out, q, k, v, sink, first, *ctx.numbers)  # type: ignore[attr-defined]
    return dq, dk, dv, None if sink is None else dsink, None, None, None, None, None, None


_operator.register_autograd(_pull, setup_context=_keep)
