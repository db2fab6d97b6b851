"""Moments and weights in bf16: what is kept is on the grid, unbiased, the same on all ranks, and still learns."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from poise.core.errors import UserError
from poise.optim.chain import Chain
from poise.optim.rounding import random_bits
from poise.optim.rules.adamw import AdamWRule
from poise.optim.rules.lion import LionRule
from poise.optim.rules.spam import SpamRule
from poise.optim.shape.clip_global_norm import ClipGlobalNorm
from poise.optim.transform import Link
from poise.optim.weights.kahan import Kahan
from poise.optim.weights.stochastic_rounding import StochasticRounding
from poise.optim.wrap.low_precision import LowPrecisionStates, Rounding

RULE = AdamWRule(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
LR = 3e-3
SHAPES = [(6, 4), (5,), (3, 2, 2)]


def gradients(step: int, spike: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    scale = 1000.0 if spike and step % 7 == 3 else 1.0
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(t.to(dtype)) for t in gradients(1000, spike=False)]


def run(optimizer: Chain, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()


def snapshot(optimizer: Chain) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach().clone() for p in params] + [
        optimizer.state[p][key].clone() for p in params for key in sorted(optimizer.state[p])
    ]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def to_bf16(x: NDArray[np.float64], bits: NDArray[np.uint32] | None) -> NDArray[np.float64]:
    """Round to bf16 in NumPy: by random bits, or to nearest (ties to even) where there are none."""
    word = x.astype(np.float32).view(np.uint32)
    add = 0x7FFF + ((word >> 16) & 1) if bits is None else bits
    return ((word + add) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_parity_with_a_transcription(rounding: Rounding) -> None:
    """Adam in fp64 NumPy whose moments are rounded to bf16 after each step, on gradients with spikes."""
    params = parameters(torch.float64)
    optimizer = Chain(params, LowPrecisionStates(RULE, rounding, seed=5), lr=LR, path="plain")
    expected = [p.detach().numpy().copy() for p in params]
    moments = [[np.zeros(p.shape), np.zeros(p.shape)] for p in params]
    for step in range(1, 31):
        run(optimizer, range(step, step + 1))
        for number, grad in enumerate(gradients(step)):
            g, (m, v) = grad.double().numpy(), moments[number]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
            w = expected[number]
            expected[number] = w - LR * (m_hat / (np.sqrt(v_hat) + 1e-8) + 0.1 * w)
            index = torch.arange(g.size).view(g.shape)
            for place, (name, value) in enumerate((("exp_avg", m), ("exp_avg_sq", v))):
                bits = random_bits(index, seed=5, step=torch.tensor(float(step)), key=number + 1, role=name)
                word = bits.numpy().astype(np.uint32) if rounding == "stochastic" else None
                moments[number][place] = to_bf16(value, word)
    for p, w, (m, v) in zip(params, expected, moments, strict=True):
        assert optimizer.state[p]["exp_avg_sq"].dtype == optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
        assert np.array_equal(optimizer.state[p]["exp_avg"].double().numpy(), m)
        assert np.array_equal(optimizer.state[p]["exp_avg_sq"].double().numpy(), v)
        assert np.abs(p.detach().numpy() / w - 1).max() < 1e-12


@pytest.mark.parametrize("inner", [RULE, LionRule(), SpamRule(reset_every=10, warmup=3, grace=2)])
def test_the_first_step_is_that_of_the_inner_link(inner: Link) -> None:
    """Only what is kept is rounded: a step from moments that are exact is bit-equal to one without the wrapper."""
    bare, wrapped = parameters(), parameters()
    for params, link in ((bare, inner), (wrapped, LowPrecisionStates(inner))):
        optimizer = Chain(params, link, lr=LR, path="plain")
        run(optimizer, range(1, 2))
    assert equal([*bare], [*wrapped])
    run(optimizer, range(2, 15))
    assert all(torch.isfinite(p).all() for p in wrapped)
    assert optimizer.param_groups[0]["weight_decay"] == getattr(inner, "weight_decay", 0.0)


def after_a_spike(link: Link, steps: int = 300) -> Tensor:
    """Return the second moment after one gradient of 1000 and then ``steps`` of zero, over what it was."""
    p = nn.Parameter(torch.ones(64, 8))
    optimizer = Chain([p], link, lr=0.0, path="plain")
    p.grad = torch.full_like(p, 1000.0)
    optimizer.step()
    start = optimizer.state[p]["exp_avg_sq"].double()
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    return optimizer.state[p]["exp_avg_sq"].double() / start


def test_a_spike_is_forgotten_only_with_stochastic_rounding() -> None:
    exact = 0.999**300
    assert after_a_spike(RULE) == pytest.approx(exact, rel=1e-4)
    assert (after_a_spike(LowPrecisionStates(RULE, "nearest")) == 1.0).all()
    ratio = after_a_spike(LowPrecisionStates(RULE, "stochastic"))
    assert float(ratio.mean()) == pytest.approx(exact, rel=0.01)
    assert 0.01 < float(ratio.std() / ratio.mean()) < 0.12


CHAINS: dict[str, tuple[Link, ...]] = {
    "states": (ClipGlobalNorm(5.0), LowPrecisionStates(RULE)),
    "states nearest": (LowPrecisionStates(RULE, "nearest"),),
    "weights": (RULE, StochasticRounding()),
    "kahan": (RULE, Kahan()),
    "kahan exact": (RULE, Kahan(exact=True)),
    "all": (LowPrecisionStates(LionRule()), StochasticRounding(seed=3)),
}


@pytest.mark.parametrize("links", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(links: tuple[Link, ...], dtype: torch.dtype) -> None:
    straight = Chain(parameters(dtype), *links, lr=LR)
    run(straight, range(1, 41))
    first = Chain(parameters(dtype), *links, lr=LR)
    run(first, range(1, 21))
    params = [nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
    second = Chain(params, *links, lr=LR)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, range(21, 41))
    assert equal(snapshot(straight), snapshot(second))


@pytest.mark.parametrize("links", CHAINS.values(), ids=CHAINS.keys())
def test_a_row_without_gradient_at_first_learns_later(links: tuple[Link, ...]) -> None:
    p = nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16))
    optimizer = Chain([p], *links, lr=0.01)
    for step in range(1, 31):
        p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).abs().bfloat16()
        p.grad[1] = 0.0 if step <= 15 else p.grad[1]
        optimizer.step()
    assert (p[1] < 0.97).all()


@pytest.mark.parametrize("links", CHAINS.values(), ids=CHAINS.keys())
def test_a_nonfinite_gradient_changes_nothing(links: tuple[Link, ...]) -> None:
    optimizer = Chain(parameters(torch.bfloat16), *links, lr=LR)
    run(optimizer, range(1, 4))
    before = snapshot(optimizer)
    params = optimizer.param_groups[0]["params"]
    params[1].grad[0] = math.nan
    optimizer.step()
    assert bool(optimizer.skipped) and equal(before, snapshot(optimizer))


def accumulated(link: Link | None, steps: int = 400, rate: float = 2.5e-3) -> Tensor:
    """Return 1 + steps x rate, taken step by step in bf16: below half an ulp (0.0039) all along."""
    p = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    optimizer = Chain([p], *([] if link is None else [link]), lr=rate, path="plain")
    for _ in range(steps):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert p.dtype == torch.bfloat16
    return p.detach().double()


def test_small_steps_add_up() -> None:
    assert (accumulated(None) == 1.0).all()
    noisy = accumulated(StochasticRounding())
    assert float(noisy.mean()) == pytest.approx(2.0, abs=5e-3)
    assert float(noisy.std()) > 0.01
    exact = accumulated(Kahan())
    assert ((exact - 2.0).abs() <= 2**-7).all()  # one bf16 spacing: what is stored is rounded
    assert not torch.equal(accumulated(StochasticRounding(), 20), accumulated(StochasticRounding(seed=1), 20))


@pytest.mark.parametrize(("link", "bits"), [(Kahan(), 11), (Kahan(exact=True), 18)])
def test_kahan_equals_adding_up_in_fp32(link: Kahan, bits: int) -> None:
    """Weights and compensation together follow the fp32 sum; the stored weights are its nearest bf16 numbers."""
    p = nn.Parameter(torch.randn(2048, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = Chain([p], link, lr=1e-4, path="plain")
    wide = p.detach().clone().float()
    start = wide.clone()
    for step in range(1, 401):
        p.grad = torch.randn(2048, generator=torch.Generator().manual_seed(step)).bfloat16() + 1.0
        wide = wide - 1e-4 * p.grad.float()
        optimizer.step()
    together = whole_weight(p, optimizer.state[p])
    assert (wide - start).abs().mean() > 0.03
    assert ((together - wide).abs() <= 2**-bits * wide.abs().clamp(min=0.1)).all()
    assert ((together - wide).mean() / (wide - start).mean()).abs() < 1e-3  # nothing is lost on the whole
    ulp = torch.ldexp(torch.full_like(together, 2.0**-8), torch.frexp(together).exponent)
    assert ((p.detach().float() - together).abs() <= ulp).all()


def whole_weight(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "kahan_error_low" in state:
        error = state["kahan_error"].int() * 256 + state["kahan_error_low"]
        return (p.detach().float().view(torch.int32) + error).view(torch.float32)
    return p.detach().float() + state["kahan_error"].float()


def test_the_smallest_steps_are_lost_by_bf16_but_not_by_the_exact_compensation() -> None:
    """Steps of 2^-18 of the weight, 1,024 of them, make 2^-8."""
    lost, kept = (float(accumulated(link, 1024, 2.0**-18).mean()) - 1.0 for link in (Kahan(), Kahan(exact=True)))
    assert kept == 2.0**-7  # 1 + 2^-8 lies in the middle; halves go up
    assert lost == 0.0


def test_the_exact_compensation_survives_replaced_weights() -> None:
    p = nn.Parameter(torch.tensor([1.0, -1.0, 3.0], dtype=torch.bfloat16))
    optimizer = Chain([p], Kahan(exact=True), lr=1e-3, path="plain")
    for weights in (p.detach().clone(), torch.zeros(3), torch.tensor([-0.0, 0.0, -2.0])):
        p.data.copy_(weights)
        for sign in (1.0, -1.0):
            p.grad = torch.tensor([1.0, -1.0, 0.5], dtype=torch.bfloat16) * sign
            optimizer.step()
            assert torch.isfinite(p).all() and (p.float() - weights.float()).abs().max() <= 2**-6
    optimizer.state[p]["kahan_error"].fill_(-5)  # below a zero there is nothing: the bits would be those of a NaN
    p.data.zero_()
    optimizer.step()
    assert torch.allclose(p.float(), -1e-3 * p.grad.float(), rtol=0.01)


def test_weights_on_the_grid_are_either_neighbour() -> None:
    p = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = Chain([p], StochasticRounding(), lr=1.0, path="plain")
    p.grad = torch.full_like(p, -0.001953125)  # a quarter of the spacing above 1
    optimizer.step()
    up = p.detach() == 1.0078125
    assert (up | (p.detach() == 1.0)).all()
    assert float(up.double().mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("link", [StochasticRounding(), Kahan()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_weights_pass(link: Link, dtype: torch.dtype) -> None:
    """Off equals absent: weights that are not bf16 are not touched, and no state but a count is kept for them."""
    plain, linked = parameters(dtype), parameters(dtype)
    run(Chain(plain, RULE, lr=LR, path="plain"), range(1, 10))
    optimizer = Chain(linked, RULE, link, lr=LR)
    run(optimizer, range(1, 10))
    assert equal([*plain], [*linked])
    assert set(optimizer.state[linked[0]]) - {"updates"} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: LowPrecisionStates(RULE, "up"), "'up'"),
        (lambda: LowPrecisionStates(RULE, seed=-3), "-3"),
        (lambda: LowPrecisionStates(ClipGlobalNorm(2.5)), "a ClipGlobalNorm; give it a direction"),
        (lambda: StochasticRounding(seed=1.5), "1.5"),
    ],
)
def test_bad_settings_are_refused(make: object, value: str) -> None:
    with pytest.raises(UserError, match=value):
        make()  # type: ignore[operator]


def one_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    # (5,) is cut unevenly, (3, 2, 2) along its second dimension; the last run has the same tensors on both ranks
    ways = [[[Shard(0)], [Shard(0)], [Shard(1)]], [[Replicate()]] * 3]
    for links in ((LowPrecisionStates(RULE), StochasticRounding()), (RULE, Kahan(exact=True))):
        whole = Chain(parameters(torch.bfloat16), *links, lr=LR)
        run(whole, range(1, 5))
        expected = snapshot(whole)
        for placements in ways:
            params = [
                nn.Parameter(distribute_tensor(p.detach(), mesh, how))
                for p, how in zip(parameters(torch.bfloat16), placements, strict=True)
            ]
            optimizer = Chain(params, *links, lr=LR)
            for step in range(1, 5):
                for p, grad, how in zip(params, gradients(step), placements, strict=True):
                    p.grad = distribute_tensor(grad.bfloat16(), mesh, how)
                optimizer.step()
            got = [t.full_tensor() if isinstance(t, DTensor) else t for t in snapshot(optimizer)]
            assert equal(expected, got), links
            for p in params:
                assert isinstance(optimizer.state[p]["exp_avg"], DTensor)
                assert optimizer.state[p]["exp_avg"].placements == p.placements


@pytest.mark.dist
def test_sharded_equals_whole_in_every_bit(two_ranks: Ranks) -> None:
    """Random bits belong to elements: two ranks, cut this way or that or not at all, give what one gives."""
    two_ranks.run(one_rank)
