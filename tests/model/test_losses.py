"""The chunked head and cross-entropy against plain torch.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from poise.core.types import IGNORE
from poise.model.losses import chunk_rows, chunked_cross_entropy


class Square(nn.Module):
    def forward(self, log_z):
        return 0.01 * log_z.square()


class Cap(nn.Module):
    def forward(self, logits):
        return 3.0 * torch.tanh(logits / 3.0)


def inputs(n=37, d=8, v=23, dtype=torch.float32, ignored=(3, 20), scale=1.0):
    generator = torch.Generator().manual_seed(0)
    h_ND = (scale * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    w_VD = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    y_N = torch.randint(0, v, (n,), generator=generator)
    y_N[list(ignored)] = IGNORE
    return h_ND, w_VD, y_N


def plain(h_ND, w_VD, y_N, term=None, transform=None):
    """What the chunked loss must equal, from torch's own functions."""
    logits_NV = h_ND @ w_VD.t()
    if transform is not None:
        logits_NV = transform(logits_NV)
    loss = F.cross_entropy(logits_NV, y_N, ignore_index=IGNORE)
    if term is not None:
        loss = loss + term(torch.logsumexp(logits_NV, -1))[y_N != IGNORE].mean()
    return loss


@pytest.mark.parametrize("term", [None, Square()], ids=["ce", "with term"])
@pytest.mark.parametrize("transform", [None, Cap()], ids=["plain", "capped"])
@pytest.mark.parametrize("rows", [1, 5, 36, 37, 64])
def test_loss_and_gradients_equal_plain_torch(term, transform, rows):
    h_ND, w_VD, y_N = inputs()
    expected = plain(h_ND, w_VD, y_N, term, transform)
    wanted = torch.autograd.grad(expected, (h_ND, w_VD))
    loss, *_ = chunked_cross_entropy(
        h_ND,
        w_VD,
        y_N,
        terms=() if term is None else (term,),
        transform=transform,
        chunk_bytes=rows * 4 * len(w_VD),
    )
    got = torch.autograd.grad(2 * loss, (h_ND, w_VD))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [None, Cap()], ids=["plain", "capped"])
def test_gradcheck_in_float64(transform):
    h_ND, w_VD, y_N = inputs(7, 3, 5, torch.float64, ignored=(2,))

    def loss(h, w):
        return chunked_cross_entropy(h, w, y_N, terms=(Square(),), transform=transform, chunk_bytes=60)[0]

    assert torch.autograd.gradcheck(loss, (h_ND, w_VD))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.integers(1, 9), st.sets(st.integers(0, 8)))
def test_means_are_over_counted_rows_whatever_the_chunks(n, v, rows, ignored):
    h_ND, w_VD, y_N = inputs(n, 3, v, torch.float64, [i for i in ignored if i < n])
    loss, ce, log_z, _, token_N = chunked_cross_entropy(h_ND, w_VD, y_N, chunk_bytes=4 * v * rows)
    counted = y_N != IGNORE
    logits_NV = (h_ND @ w_VD.t()).detach()
    each_N = F.cross_entropy(logits_NV, y_N, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(token_N, each_N)
    if counted.any():
        torch.testing.assert_close(ce, each_N[counted].mean())
        torch.testing.assert_close(log_z, torch.logsumexp(logits_NV, -1)[counted].mean())
    else:
        loss.backward()
        assert loss == ce == log_z == 0 and not h_ND.grad.any()


def test_a_term_is_reported_apart_from_the_cross_entropy():
    h_ND, w_VD, y_N = inputs()
    loss, ce, _, (term,), _ = chunked_cross_entropy(h_ND, w_VD, y_N, terms=(Square(),))
    assert term > 0
    torch.testing.assert_close(loss.detach(), ce + term)
    torch.testing.assert_close(ce, plain(h_ND, w_VD, y_N).detach())
    assert not ce.requires_grad and not term.requires_grad


def test_bf16_is_close_to_fp32_and_sums_the_head_gradient_in_fp32():
    h_ND, w_VD, y_N = inputs(256, 32, 64)
    wanted = torch.autograd.grad(plain(h_ND, w_VD, y_N), (h_ND, w_VD))
    h16_ND = h_ND.detach().bfloat16().requires_grad_()
    loss, *_ = chunked_cross_entropy(h16_ND, w_VD, y_N, chunk_bytes=32 * 64 * 4)
    dh_ND, dw_VD = torch.autograd.grad(loss, (h16_ND, w_VD))
    assert dw_VD.dtype == torch.float32 and dh_ND.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain(h_ND, w_VD, y_N), rtol=5e-3, atol=0)
    for got, want in zip((dh_ND.float(), dw_VD), wanted, strict=True):
        assert (got - want).norm() < 0.01 * want.norm()


def test_a_token_the_model_is_sure_of_keeps_a_relative_accuracy():
    """With p = 1 - 4.5e-5 the gradient p - 1 would vanish if p were rounded to bf16 first."""
    h_ND = torch.tensor([[1.0, 0.0]]).bfloat16().requires_grad_()
    w_VD = torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    loss, *_ = chunked_cross_entropy(h_ND, w_VD, torch.tensor([0]))
    loss.backward()
    wanted = 10 * (torch.sigmoid(torch.tensor(10.0, dtype=torch.float64)) - 1)
    torch.testing.assert_close(h_ND.grad[0, 0].double(), wanted, rtol=5e-3, atol=0)


def test_huge_logits_stay_exact_and_finite():
    h_ND, w_VD, y_N = inputs(scale=1e4)
    loss, *_ = chunked_cross_entropy(h_ND, w_VD, y_N)
    wanted = plain(h_ND.double(), w_VD.double(), y_N).float()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


def test_a_nan_is_not_hidden():
    h_ND, w_VD, y_N = inputs()
    with torch.no_grad():
        h_ND[5, 0] = float("nan")
    loss, *_ = chunked_cross_entropy(h_ND, w_VD, y_N)
    loss.backward()
    assert loss.isnan() and h_ND.grad[5].isnan().all() and h_ND.grad[6].isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers the number of rows of the largest (rows, V) tensor and counts matrix products."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.rows, self.products = vocab, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.vocab:
            self.rows = max(self.rows, out.shape[0])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_more_logit_rows_than_the_budget(dtype):
    h_ND, w_VD, y_N = inputs(200, 8, 1000, dtype)
    with Largest(1000) as seen:
        loss, *_ = chunked_cross_entropy(h_ND, w_VD, y_N, chunk_bytes=64 * 4000)
        loss.backward()
    assert 0 < seen.rows <= 64
    assert seen.products == 3 * 4


def test_without_gradients_only_the_logits_are_computed():
    h_ND, w_VD, y_N = inputs(200, 8, 1000)
    with torch.no_grad(), Largest(1000) as seen:
        loss, *_ = chunked_cross_entropy(h_ND, w_VD, y_N, chunk_bytes=64 * 4000)
    assert seen.products == 4
    assert torch.equal(loss, chunked_cross_entropy(h_ND, w_VD, y_N, chunk_bytes=64 * 4000)[0])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen):
    h_ND, w_VD, y_N = inputs()
    want = torch.autograd.grad(plain(h_ND, w_VD, y_N), (h_ND, w_VD))
    sides = [h_ND, w_VD]
    sides[frozen] = sides[frozen].detach()
    loss, *_ = chunked_cross_entropy(*sides, y_N)
    loss.backward()
    assert sides[frozen].grad is None
    torch.testing.assert_close(sides[1 - frozen].grad, want[1 - frozen], rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 1 << 30))
def test_chunk_rows_keep_the_budget(vocab, budget):
    rows = chunk_rows(vocab, budget)
    assert rows == 1 or 4 * rows * vocab <= budget
