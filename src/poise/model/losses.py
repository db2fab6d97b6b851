"""Output head and cross-entropy together, a few rows at a time.

The (rows, V) logits of a whole batch are the largest tensor of a small model's step. Here they exist one
chunk at a time: the forward pass computes a chunk's logits, its loss and at once its share of the
gradients of the hidden states and of the head, and the chunk is forgotten. The backward pass only scales.

Shapes: N rows (all positions of a micro-batch), C rows of one chunk, R rows of one block of a chunk, D width,
V vocabulary, 1 a kept dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from poise.core.types import IGNORE
from poise.model.layers import Same

CHUNK_BYTES: Final = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Default budget for one chunk's fp32 logits; a chunk is what one matrix product works on."""

BLOCK_BYTES: Final = 4 << 20
"""Budget for the fp32 logits that the softmax works on at once on a CPU: about a second-level cache."""


class LossOutput(NamedTuple):
    """What a forward pass of the model with targets returns. A tuple, so that FSDP2 finds the tensors in it.

    Attributes:
        loss: scalar to call ``backward`` on: cross-entropy plus all loss terms.
        ce: mean cross-entropy over counted targets, nats, detached.
        log_z: mean log of the softmax's normaliser over counted targets, detached.
        parts: the loss terms by name, mean over counted targets, detached.
        token_loss: cross-entropy of each position, (B, T) fp32, 0 where ignored, detached; only if asked for.
    """

    loss: Tensor
    ce: Tensor
    log_z: Tensor
    parts: dict[str, Tensor]
    token_loss: Tensor | None = None


def chunk_rows(vocab_size: int, chunk_bytes: int) -> int:
    """Return how many rows of fp32 logits fit into ``chunk_bytes``; at least 1, a multiple of 32 if above.

    >>> chunk_rows(8192, 16 << 20), chunk_rows(200_000, 1 << 20)
    (512, 1)
    """
    rows = chunk_bytes // (4 * vocab_size)
    return max(1, rows - rows % 32 if rows > 32 else rows)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    terms: Sequence[nn.Module] = (),
    transform: nn.Module | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """Cross-entropy of ``softmax(transform(hidden Wᵀ))`` against the targets, in nats.

    Args:
        hidden_ND: final hidden states, in the compute dtype.
        weight_VD: the head; cast to the dtype of ``hidden_ND``; its gradient is summed in fp32.
        targets_N: int64 ids; ``IGNORE`` where a row does not count.
        terms: modules without parameters ``log_z_C -> value_C``; the mean of each over counted rows is
            added to the loss.
        transform: parameter-free elementwise module on the logits (in fp32), or ``None``.
        chunk_bytes: budget for one chunk's fp32 logits; by default ``CHUNK_BYTES`` of the device.

    Returns:
        loss (differentiable), mean cross-entropy, mean log Z, mean of each term, cross-entropy of each row.
        All are 0 when no row counts.
    """
    if isinstance(transform, Same):
        transform = None
    budget = chunk_bytes or CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cuda"])
    rows = chunk_rows(weight_VD.shape[0], budget)
    loss, ce, log_z, *term_means, token_N = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, tuple(terms), transform, rows, torch.is_grad_enabled()
    )
    return loss, ce, log_z, tuple(term_means), token_N


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        terms: tuple[nn.Module, ...],
        transform: nn.Module | None,
        rows: int,
        want_grad: bool,
    ) -> tuple[Tensor, ...]:
        need: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
        work = _Work(hidden_ND, weight_VD, rows, want_grad and need[0], want_grad and need[1])
        valid_N = targets_N != IGNORE
        safe_N = targets_N.where(valid_N, 0)
        token_N = hidden_ND.new_empty(targets_N.shape, dtype=work.exact)
        sums = hidden_ND.new_zeros(1 + len(terms), dtype=work.exact)
        count = valid_N.sum().clamp(min=1).to(work.exact)
        for start in range(0, len(targets_N), rows):
            chunk = slice(start, min(start + rows, len(targets_N)))
            raw_CV = work.logits(chunk)
            for at in work.blocks(chunk):
                valid_R1, target_R1 = valid_N[at, None], safe_N[at, None]
                logits_RV, pull = _transformed(work.exact_logits(raw_CV, chunk, at), transform)
                target_logit_R1 = logits_RV.gather(1, target_R1)
                probs_RV, top_R1, log_sum_R1 = _softmax(logits_RV)
                log_z_R1 = top_R1 + log_sum_R1
                ce_R1 = (top_R1 - target_logit_R1 + log_sum_R1) * valid_R1  # no large numbers cancel
                values, slope_R1 = _terms(terms, log_z_R1)
                token_N[at] = ce_R1[:, 0]
                sums += torch.stack([(value * valid_R1).sum() for value in (log_z_R1, *values)])
                if work.wants_grad:
                    # d loss / d logits = softmax (1 + slope) - onehot. At the target the two are joined with
                    # expm1: where the model is sure of it, 1 - p is what is left of two nearly equal numbers.
                    share_R1 = valid_R1 / count
                    at_target_R1 = share_R1 * (slope_R1 * torch.exp(-ce_R1) + torch.expm1(-ce_R1))
                    dlogits_RV = probs_RV.mul_(share_R1 * (1 + slope_R1)).scatter_(1, target_R1, at_target_R1)
                    raw_CV[at.start - start : at.stop - start] = pull(dlogits_RV)
            if work.wants_grad:
                work.add_gradients(chunk, raw_CV)
        ce, means = token_N.sum() / count, sums / count
        ctx.save_for_backward(work.dhidden_ND, work.dweight_VD)  # type: ignore[arg-type]
        ctx.weight_dtype = weight_VD.dtype  # type: ignore[attr-defined]
        loss = ce + means[1:].sum()
        log = (ce, *means.unbind(), token_N)
        ctx.mark_non_differentiable(*log)
        return loss, *log

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        if dloss.device.type != "cpu" or dloss != 1:  # a large product less in the usual case
            dhidden_ND = None if dhidden_ND is None else dhidden_ND * dloss
            dweight_VD = None if dweight_VD is None else dweight_VD * dloss
        if dweight_VD is not None:
            dweight_VD = dweight_VD.to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return dhidden_ND, dweight_VD, None, None, None, None, None


class _Work:
    """Buffers that all chunks share, and the two gradients they add up."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, rows: int, grad_hidden: bool, grad_weight: bool) -> None:
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD.to(hidden_ND.dtype)
        self.exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        self.wants_grad = grad_hidden or grad_weight
        rows, vocab = min(rows, len(hidden_ND)), len(weight_VD)
        self.raw_CV = hidden_ND.new_empty(rows, vocab)
        self.narrow = hidden_ND.dtype != self.exact
        self.block_rows = min(rows, chunk_rows(vocab, BLOCK_BYTES)) if hidden_ND.device.type == "cpu" else rows
        self.wide_RV = hidden_ND.new_empty(self.block_rows, vocab, dtype=self.exact) if self.narrow else None
        self.dhidden_ND = torch.empty_like(hidden_ND) if grad_hidden else None
        self.dweight_VD = torch.empty_like(weight_VD, dtype=self.exact) if grad_weight else None
        self.share_VD = torch.empty_like(self.weight_VD) if grad_weight and self.narrow else None

    def logits(self, chunk: slice) -> Tensor:
        """Return a chunk's logits in the compute dtype; the next chunk overwrites them."""
        hidden_CD = self.hidden_ND[chunk]
        return torch.mm(hidden_CD, self.weight_VD.t(), out=self.raw_CV[: len(hidden_CD)])

    def blocks(self, chunk: slice) -> Iterator[slice]:
        """Yield the rows of a chunk a few at a time: what is done to each logit stays in the CPU's cache."""
        for start in range(chunk.start, chunk.stop, self.block_rows):
            yield slice(start, min(start + self.block_rows, chunk.stop))

    def exact_logits(self, raw_CV: Tensor, chunk: slice, at: slice) -> Tensor:
        """Return a block of the chunk's logits in at least fp32; the next block overwrites them."""
        raw_RV = raw_CV[at.start - chunk.start : at.stop - chunk.start]
        return raw_RV if self.wide_RV is None else self.wide_RV[: len(raw_RV)].copy_(raw_RV)

    def add_gradients(self, chunk: slice, dlogits_CV: Tensor) -> None:
        """Turn a chunk's logit gradient into its part of both gradients."""
        hidden_CD = self.hidden_ND[chunk]
        if self.dhidden_ND is not None:
            torch.mm(dlogits_CV, self.weight_VD, out=self.dhidden_ND[chunk])
        if self.dweight_VD is None:
            return
        first, dlogits_VC = chunk.start == 0, dlogits_CV.t()
        if self.share_VD is not None:
            torch.mm(dlogits_VC, hidden_CD, out=self.share_VD)
            _ = self.dweight_VD.copy_(self.share_VD) if first else self.dweight_VD.add_(self.share_VD)
        elif first:
            torch.mm(dlogits_VC, hidden_CD, out=self.dweight_VD)
        else:
            self.dweight_VD.addmm_(dlogits_VC, hidden_CD)


def _softmax(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, m = max(logits) and log(sum(exp(logits - m))); the logits' memory may be reused.

    The largest probability is 1 / sum(exp(logits - m)), so the sum needs no second pass of exponentials, and
    nothing underflows: that probability is at least 1 / V.
    """
    top_R1 = logits_RV.amax(-1, keepdim=True)
    in_place = logits_RV if logits_RV.device.type == "cpu" else None
    probs_RV = torch.softmax(logits_RV, -1, out=in_place)
    return probs_RV, top_R1, -probs_RV.amax(-1, keepdim=True).log()


def _transformed(wide_RV: Tensor, transform: nn.Module | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the transformed logits and the function that takes their gradient back through the transform."""
    if transform is None:
        return wide_RV, lambda gradient: gradient
    with torch.enable_grad():
        leaf_RV = wide_RV.detach().requires_grad_()
        out_RV = transform(leaf_RV)
    return out_RV.detach().clone(), lambda gradient: torch.autograd.grad(out_RV, leaf_RV, gradient)[0]


def _terms(terms: Sequence[nn.Module], log_z_R1: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return each term's values and the slope of their sum with respect to log Z."""
    if not terms:
        return [], torch.zeros_like(log_z_R1)
    with torch.enable_grad():
        leaf_R1 = log_z_R1.detach().requires_grad_()
        values = [term(leaf_R1) for term in terms]
        (slope_R1,) = torch.autograd.grad(torch.stack(values).sum(), leaf_R1)
    return [value.detach() for value in values], slope_R1
