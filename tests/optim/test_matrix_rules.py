"""Muon, NorMuon, Adafactor, CAME and Sophia-G against transcriptions of their formulas and against torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.optim.chain import Chain
from poise.optim.rules import adafactor, came, muon, normuon, sophia_g
from poise.optim.rules.adafactor import AdafactorRule
from poise.optim.rules.came import CameRule
from poise.optim.rules.muon import COEFFICIENTS, MuonRule
from poise.optim.rules.normuon import NorMuonRule
from poise.optim.rules.sophia_g import HESSIAN, SophiaGRule, observe_hessian, sampled_label_loss
from poise.optim.shape.clip_global_norm import ClipGlobalNorm
from poise.optim.transform import LinkBase

LR = 0.02
STEPS = 12
MATRICES = [(5, 3), (3, 7), (4, 4)]
SHAPES = [(5, 3), (3, 7), (6,), (2, 3, 4)]
RULES: dict[str, Callable[[], LinkBase]] = {
    "muon": lambda: MuonRule(weight_decay=0.1),
    "normuon": lambda: NorMuonRule(weight_decay=0.1),
    "adafactor": lambda: AdafactorRule(weight_decay=0.1),
    "came": lambda: CameRule(weight_decay=0.1),
    "sophia_g": lambda: SophiaGRule(weight_decay=0.1),
}


def shapes_of(name: str) -> list[tuple[int, ...]]:
    return MATRICES if "muon" in name else SHAPES


def draw(shapes: list[tuple[int, ...]], seed: int, scale: float = 1.0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) * scale for shape in shapes]


def grads_at(shapes: list[tuple[int, ...]], step: int) -> list[np.ndarray]:
    """A stream with two spikes, one of them large."""
    return draw(shapes, 100 + step, {4: 30.0, 8: 1000.0}.get(step, 0.3))


def train(
    links: tuple[LinkBase, ...],
    shapes: list[tuple[int, ...]],
    steps: range,
    dtype: torch.dtype = torch.float64,
    chain: Chain | None = None,
) -> Chain:
    if chain is None:
        params = [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in draw(shapes, 0)]
        chain = Chain(params, *links, lr=LR, path="plain")
    for step in steps:
        for p, grad in zip(chain.param_groups[0]["params"], grads_at(shapes, step), strict=True):
            p.grad = torch.tensor(grad, dtype=p.dtype)
        chain.step()
    return chain


def weights(chain: torch.optim.Optimizer) -> list[np.ndarray]:
    return [p.detach().double().numpy() for group in chain.param_groups for p in group["params"]]


def largest_gap(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(one, other, strict=True))


# Transcriptions of the papers in float64. Each takes weights and a list of gradients of one tensor.


def np_orthogonal(x: np.ndarray, steps: int = 5) -> np.ndarray:
    a, b, c = COEFFICIENTS
    x = x / max(np.linalg.norm(x), 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + b * s @ x + c * s @ s @ x
    return x


def np_muon(p: np.ndarray, grads: list[np.ndarray], rule: MuonRule) -> np.ndarray:
    momentum = np.zeros_like(p)
    rows, columns = p.shape
    scale = (
        math.sqrt(max(1, rows / columns)) if rule.adjust_lr_fn == "original" else 0.2 * math.sqrt(max(rows, columns))
    )
    for g in grads:
        momentum = rule.momentum * momentum + (1 - rule.momentum) * g
        ahead = rule.momentum * momentum + (1 - rule.momentum) * g if rule.nesterov else momentum
        p = p - LR * rule.weight_decay * p - LR * scale * np_orthogonal(ahead)
    return p


def np_normuon(p: np.ndarray, grads: list[np.ndarray], rule: NorMuonRule) -> np.ndarray:
    momentum, v = np.zeros_like(p), np.zeros(p.shape[0])
    for g in grads:
        momentum = rule.momentum * momentum + (1 - rule.momentum) * g
        o = np_orthogonal(momentum)
        v = rule.beta2 * v + (1 - rule.beta2) * (o**2).mean(axis=1)
        n = o / (np.sqrt(v)[:, None] + rule.eps)
        rate = 0.2 * LR * math.sqrt(p.size) / np.linalg.norm(n)
        p = p - LR * rule.weight_decay * p - rate * n
    return p


def np_normuon_code(p: np.ndarray, grads: list[np.ndarray], rule: NorMuonRule) -> np.ndarray:
    """The authors' code: Nesterov, the norm of the orthogonal matrix kept, Muon's scale."""
    momentum, v = np.zeros_like(p), np.zeros((p.shape[0], 1))
    for g in grads:
        momentum = rule.momentum * momentum + (1 - rule.momentum) * g
        o = np_orthogonal(rule.momentum * momentum + (1 - rule.momentum) * g)
        v = rule.beta2 * v + (1 - rule.beta2) * (o**2).mean(axis=1, keepdims=True)
        n = o / (np.sqrt(v) + rule.eps)
        n = n * np.linalg.norm(o) / np.linalg.norm(n) * math.sqrt(max(1, p.shape[0] / p.shape[1]))
        p = p - LR * rule.weight_decay * p - LR * n
    return p


def np_adafactor(p: np.ndarray, grads: list[np.ndarray], rule: AdafactorRule) -> np.ndarray:
    eps1 = np.finfo(np.float64).eps if rule.eps1 is None else rule.eps1
    row = column = v = 0.0
    for t, g in enumerate(grads, start=1):
        b2 = 1 - t**rule.beta2_decay
        rate = min(LR, 1 / math.sqrt(t)) if rule.relative_step else LR
        if rule.scale_parameter:
            rate *= max(rule.eps2, math.sqrt((p**2).mean()))
        if g.ndim > 1:
            row = b2 * row + (1 - b2) * (g**2).mean(axis=-1, keepdims=True)
            column = b2 * column + (1 - b2) * (g**2).mean(axis=-2, keepdims=True)
            second = row * column / np.maximum(row.mean(axis=-2, keepdims=True), eps1)
        else:
            second = v = b2 * v + (1 - b2) * g**2
        n = g / np.maximum(np.sqrt(second), eps1)
        n = n / max(1.0, math.sqrt((n**2).mean()) / rule.d)
        p = p - LR * rule.weight_decay * p - rate * n
    return p


def np_came(p: np.ndarray, grads: list[np.ndarray], rule: CameRule) -> np.ndarray:
    def root(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return np.sqrt(row * column / row.mean(axis=-2, keepdims=True))

    row = column = v = q = s = 0.0
    m = np.zeros_like(p)
    for g in grads:
        squares = g**2 + rule.eps1
        if g.ndim > 1:
            row = rule.beta2 * row + (1 - rule.beta2) * squares.mean(axis=-1, keepdims=True)
            column = rule.beta2 * column + (1 - rule.beta2) * squares.mean(axis=-2, keepdims=True)
            n = g / root(row, column)
        else:
            v = rule.beta2 * v + (1 - rule.beta2) * squares
            n = g / np.sqrt(v)
        n = n / max(1.0, math.sqrt((n**2).mean()) / rule.d)
        m = rule.beta1 * m + (1 - rule.beta1) * n
        u = m
        if g.ndim > 1:
            residual = (n - m) ** 2 + rule.eps2
            q = rule.beta3 * q + (1 - rule.beta3) * residual.mean(axis=-1, keepdims=True)
            s = rule.beta3 * s + (1 - rule.beta3) * residual.mean(axis=-2, keepdims=True)
            u = m / root(q, s)
        p = p - LR * rule.weight_decay * p - LR * u
    return p


@pytest.mark.parametrize(
    ("rule", "paper", "shapes"),
    [
        (MuonRule(ns_dtype="float32"), np_muon, MATRICES),
        (
            MuonRule(nesterov=False, adjust_lr_fn="match_rms_adamw", weight_decay=0.0, ns_dtype="float32"),
            np_muon,
            MATRICES,
        ),
        (NorMuonRule(ns_dtype="float32"), np_normuon, MATRICES),
        (NorMuonRule(nesterov=True, adjust_lr_fn="original", ns_dtype="float32"), np_normuon_code, MATRICES),
        (AdafactorRule(), np_adafactor, SHAPES),
        (AdafactorRule(-0.6, 1e-4, 0.5, 2.0, False, False, 0.3), np_adafactor, SHAPES),
        (CameRule(), np_came, SHAPES),
        (CameRule(0.8, 0.95, 0.99, 1e-20, 1e-10, 0.5, 0.2), np_came, SHAPES),
    ],
)
def test_parity_with_the_paper(rule: Any, paper: Callable[..., np.ndarray], shapes: list[tuple[int, ...]]) -> None:
    got = weights(train((rule,), shapes, range(STEPS)))
    grads = [grads_at(shapes, step) for step in range(STEPS)]
    wanted = [paper(p, [g[number] for g in grads], rule) for number, p in enumerate(draw(shapes, 0))]
    assert largest_gap(got, wanted) <= 1e-12


@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}])
def test_muon_equals_torch(settings: dict[str, Any]) -> None:
    ours = train((MuonRule(**settings),), MATRICES, range(STEPS), torch.float32)
    params = [nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in draw(MATRICES, 0)]
    theirs = torch.optim.Muon(params, lr=LR, **settings)
    for step in range(STEPS):
        for p, grad in zip(params, grads_at(MATRICES, step), strict=True):
            p.grad = torch.tensor(grad, dtype=torch.float32)
        theirs.step()
    assert largest_gap(weights(ours), weights(theirs)) <= 1e-6
    for p, q in zip(ours.param_groups[0]["params"], params, strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


def test_orthogonalisation_equals_torch_bit_for_bit() -> None:
    """With unit rate, no decay and zero weights, what torch puts into the weights is the matrix itself."""
    for number, shape in enumerate([*MATRICES, (1, 9), (16, 2)]):
        grad = torch.tensor(draw([shape], number)[0], dtype=torch.float32)
        p = nn.Parameter(torch.zeros(shape))
        p.grad = grad.clone()
        torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        mine = muon.orthogonalized(grad, 5, COEFFICIENTS, 1e-7, "bfloat16").float()
        assert torch.equal(p.detach(), mine * -math.sqrt(max(1.0, shape[0] / shape[1])))


def test_adafactor_equals_torch() -> None:
    ours = train((AdafactorRule(weight_decay=0.1),), SHAPES, range(STEPS), torch.float32)
    params = [nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in draw(SHAPES, 0)]
    theirs = torch.optim.Adafactor(params, lr=LR, weight_decay=0.1)
    for step in range(STEPS):
        for p, grad in zip(params, grads_at(SHAPES, step), strict=True):
            p.grad = torch.tensor(grad, dtype=torch.float32)
        theirs.step()
    assert largest_gap(weights(ours), weights(theirs)) <= 1e-6
    for p, q in zip(ours.param_groups[0]["params"], params, strict=True):
        assert set(ours.state[p]) == set(theirs.state[q])


def test_adafactor_takes_large_and_zero_rates() -> None:
    for lr in (0.0, 5.0):
        p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        q = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        ours, theirs = Chain([p], AdafactorRule(), lr=lr), torch.optim.Adafactor([q], lr=lr)
        for step in range(3):
            p.grad = torch.tensor(draw([(2, 2)], step)[0])
            q.grad = p.grad.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=0)


def test_sophia_parity() -> None:
    rule = SophiaGRule(rho=0.4, weight_decay=0.1)
    chain = train((rule,), SHAPES, range(0))
    wanted = draw(SHAPES, 0)
    m = [np.zeros_like(p) for p in wanted]
    h = [np.zeros_like(p) for p in wanted]
    for step in range(STEPS):
        chain = train((rule,), SHAPES, range(step, step + 1), chain=chain)
        for n, g in enumerate(grads_at(SHAPES, step)):
            m[n] = rule.beta1 * m[n] + (1 - rule.beta1) * g
            ratio = np.clip(m[n] / np.maximum(rule.rho * h[n], rule.eps), -1, 1)
            wanted[n] = wanted[n] - LR * (rule.weight_decay * wanted[n] + ratio)
        if step % 3 == 0:
            sampled = draw(SHAPES, 500 + step, 0.2)
            for p, g in zip(chain.param_groups[0]["params"], sampled, strict=True):
                p.grad = torch.tensor(g)
            observe_hessian(chain, batch_size=64)
            assert all(p.grad is None for p in chain.param_groups[0]["params"])
            h = [rule.beta2 * old + (1 - rule.beta2) * 64 * g * g for old, g in zip(h, sampled, strict=True)]
    assert largest_gap(weights(chain), wanted) <= 1e-12


def test_sophia_goes_slower_where_curvature_is_high() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    chain = Chain([p], SophiaGRule(weight_decay=0.0), lr=1.0)
    p.grad = torch.ones(2, dtype=torch.float64)
    chain.step()
    assert p.tolist() == [-1.0, -1.0]  # no curvature yet: the sign
    p.grad = torch.tensor([1e-3, 30.0], dtype=torch.float64)
    observe_hessian(chain, batch_size=100)
    before = p.detach().clone()
    p.grad = torch.ones(2, dtype=torch.float64)
    chain.step()
    moved = (before - p.detach()).tolist()
    assert moved[0] == 1.0
    assert 0.0 < moved[1] < 0.05


def test_nonfinite_curvature_is_not_taken_up() -> None:
    chain = train((SophiaGRule(),), SHAPES, range(2))
    for value in (math.nan, math.inf):
        for p in chain.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        chain.param_groups[0]["params"][1].grad[0, 0] = value
        observe_hessian(chain, batch_size=8)
        assert all(bool((chain.state[p][HESSIAN] == 0).all()) for p in chain.param_groups[0]["params"])


def test_observe_hessian_says_what_is_missing() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="batch_size is 0"):
        observe_hessian(Chain([p], SophiaGRule(), lr=0.1), 0)
    with pytest.raises(UserError, match="no sophia_g"):
        observe_hessian(Chain([p], ClipGlobalNorm(1.0), lr=0.1), 8)
    with pytest.raises(UserError, match="no parameter has a gradient"):
        observe_hessian(Chain([p], SophiaGRule(), lr=0.1), 8)
    p.grad = torch.ones(2)
    with pytest.raises(UserError, match="take a first step"):
        observe_hessian(Chain([p], SophiaGRule(), lr=0.1), 8)


def test_sampled_labels_estimate_the_curvature() -> None:
    """Of a softmax regression on one input of ones, the diagonal Gauss-Newton matrix is prob (1 - prob)."""
    logits = torch.tensor([1.0, 0.0, -1.0])
    prob = logits.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    estimate = torch.zeros(3)
    rounds, batch = 400, 16
    for _ in range(rounds):
        weight = logits.clone().requires_grad_()
        loss = sampled_label_loss(weight.expand(4, 4, 3), generator)
        (grad,) = torch.autograd.grad(loss, weight)
        estimate += batch * grad * grad / rounds
    torch.testing.assert_close(estimate, prob * (1 - prob), rtol=0.2, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_a_spike_moves_weights_no_further_than_the_rate(name: str) -> None:
    """Acts: after a gradient of 1000 sigma, gradient descent is far away and every one of these rules is not."""
    shapes = shapes_of(name)
    rule = RULES[name]()
    for step, bound in ((8, 3.0), (20, 3.0)):
        fresh = train((rule,), shapes, range(7, 8))
        before = [w.copy() for w in weights(fresh)]
        after = weights(train((rule,), shapes, range(step, step + 1), chain=fresh))
        for old, new in zip(before, after, strict=True):
            assert 0.0 < np.sqrt(((old - new) ** 2).mean()) < bound * LR * 11
    plain = weights(train((), shapes, range(7, 9)))
    assert max(float(np.abs(w).max()) for w in plain) > 20.0


def test_normuon_evens_out_the_rows() -> None:
    def spread(rule: LinkBase) -> float:
        p = nn.Parameter(torch.zeros(8, 4, dtype=torch.float64))
        chain = Chain([p], rule, lr=0.1)
        chain.param_groups[0]["weight_decay"] = 0.0
        for step in range(6):
            grad = torch.tensor(draw([(8, 4)], step)[0])
            grad[0] *= 50.0
            p.grad = grad
            old = p.detach().clone()
            chain.step()
        sizes = (p.detach() - old).norm(dim=1)
        return float(sizes.max() / sizes.min())

    of_muon = spread(MuonRule(ns_dtype="float32"))
    assert of_muon > 2.0
    assert spread(NorMuonRule(ns_dtype="float32")) < 0.8 * of_muon
    assert spread(NorMuonRule(ns_dtype="float32", beta2=0.0)) < 1 + 1e-6  # without memory all rows are equal


def test_came_trusts_what_agrees() -> None:
    """With the same size of gradient everywhere, rows that keep their sign go further than rows that flip it."""
    p = nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
    chain = Chain([p], CameRule(beta3=0.9), lr=0.01)
    for step in range(30):
        sign = 1.0 if step % 2 else -1.0
        p.grad = torch.tensor([[1.0] * 4, [sign] * 4], dtype=torch.float64)
        chain.step()
    q, s = chain.state[p]["came_res_row"], chain.state[p]["exp_avg"].abs()
    assert q[0].item() < 0.2 * q[1].item()
    far = p.detach().abs()
    assert float(far[0].min()) > 5 * float(far[1].max())
    assert float(s[0].min()) > float(s[1].max())


def test_settings_that_switch_off_are_as_if_absent() -> None:
    """An update that is never clipped is the unclipped one; decay of zero is no decay."""
    gentle = [np.ones(shape) for shape in SHAPES]

    def run(rule: LinkBase) -> list[np.ndarray]:
        params = [nn.Parameter(torch.tensor(w)) for w in draw(SHAPES, 0)]
        chain = Chain(params, rule, lr=LR)
        for _ in range(3):
            for p, g in zip(params, gentle, strict=True):
                p.grad = torch.tensor(g)
            chain.step()
        return weights(chain)

    for make in (AdafactorRule, CameRule):
        loose, infinite = run(make(d=100.0)), run(make(d=math.inf))
        assert all(np.array_equal(a, b) for a, b in zip(loose, infinite, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_resumes_bit_for_bit(name: str) -> None:
    rule, shapes = RULES[name](), shapes_of(name)
    whole = train((rule,), shapes, range(14), torch.float32)
    half = train((rule,), shapes, range(7), torch.float32)
    saved = copy.deepcopy(half.state_dict())
    rest = train((rule,), shapes, range(0), torch.float32)
    for p, q in zip(rest.param_groups[0]["params"], half.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    rest.load_state_dict(saved)
    rest = train((rule,), shapes, range(7, 14), chain=rest)
    assert all(np.array_equal(a, b) for a, b in zip(weights(rest), weights(whole), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_do_not_freeze(name: str) -> None:
    """A tensor without gradient stays finite, and learns as soon as there is one."""
    shapes = shapes_of(name)
    params = [nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in draw(shapes, 0)]
    chain = Chain(params, RULES[name](), lr=LR, path="plain")
    chain.param_groups[0]["weight_decay"] = 0.0
    for _ in range(5):
        for p in params:
            p.grad = torch.zeros_like(p)
        chain.step()
    still = [np.float32(w) for w in draw(shapes, 0)]
    assert all(np.array_equal(a, b) for a, b in zip(weights(chain), still, strict=True))
    for p in params:  # then only the first row or element learns
        p.grad = torch.zeros_like(p)
        p.grad[0] = 1.0
    chain.step()
    for p, old in zip(params, still, strict=True):
        moved = (p.detach() - torch.tensor(old)).abs()
        assert bool(torch.isfinite(moved).all())
        assert float(moved[0].min()) > 1e-3 * LR * (0.01 if name == "adafactor" else 1.0)


@pytest.mark.parametrize("name", RULES)
def test_sixteen_bit_weights_have_wide_moments(name: str) -> None:
    chain = train((RULES[name](),), shapes_of(name), range(3), torch.bfloat16)
    for state in chain.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())
    assert all(np.isfinite(w).all() for w in weights(chain))


@pytest.mark.parametrize("rule", [MuonRule(), NorMuonRule()])
def test_vectors_are_refused(rule: LinkBase) -> None:
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.ones(5)
    with pytest.raises(UserError, match=r"shape \(5,\).*AdamW"):
        Chain([p], rule, lr=0.1).step()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (MuonRule, {"momentum": 1.0}),
        (MuonRule, {"ns_steps": 0}),
        (MuonRule, {"ns_coefficients": (1.0, math.nan, 2.0)}),
        (MuonRule, {"eps": 0.0}),
        (MuonRule, {"adjust_lr_fn": "none"}),
        (MuonRule, {"ns_dtype": "int8"}),
        (MuonRule, {"weight_decay": -1.0}),
        (NorMuonRule, {"beta2": 1.0}),
        (NorMuonRule, {"momentum": -0.1}),
        (AdafactorRule, {"beta2_decay": 0.5}),
        (AdafactorRule, {"eps1": 0.0}),
        (AdafactorRule, {"eps2": math.inf}),
        (AdafactorRule, {"d": 0.5}),
        (CameRule, {"beta3": 1.5}),
        (CameRule, {"eps1": 0.0}),
        (CameRule, {"d": 0.0}),
        (CameRule, {"weight_decay": math.nan}),
        (SophiaGRule, {"beta1": -0.1}),
        (SophiaGRule, {"rho": 0.0}),
        (SophiaGRule, {"eps": math.inf}),
        (SophiaGRule, {"weight_decay": -0.5}),
    ],
)
def test_bad_settings_are_named(make: Any, settings: dict[str, Any]) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(UserError) as error:
        make(**settings)
    message = str(error.value)
    assert f".{key}" in message and str(value) in message and "; use " in message and "\n" not in message


def test_cards() -> None:
    for module in (adafactor, came, muon, normuon, sophia_g):
        assert isinstance(module.CARD, Card)
        assert module.CARD.kind == "optimizer"
        rule = next(v for k, v in vars(module).items() if k.endswith("Rule") and v.__module__ == module.__name__)
        assert rule.name == module.CARD.name == module.__name__.rpartition(".")[2]


COLLECTIVES = {"muon": 1, "normuon": 1, "adafactor": 3, "came": 5, "sophia_g": 0}
"""At most so many a tensor and step, besides the one for the norm of the gradient."""

SHARDED = [(7, 4), (4, 9), (5,), (3, 2, 4)]


def sharded_grads(step: int) -> list[Tensor]:
    return [torch.tensor(g, dtype=torch.float32) for g in grads_at(SHARDED, step)]


def run_whole(rule: LinkBase, numbers: list[int]) -> list[Tensor]:
    params = [nn.Parameter(torch.tensor(draw(SHARDED, 0)[n], dtype=torch.float32)) for n in numbers]
    chain = Chain(params, rule, lr=LR, path="plain")
    for step in range(5):
        for p, n in zip(params, numbers, strict=True):
            p.grad = sharded_grads(step)[n]
        chain.step()
        if isinstance(rule, SophiaGRule) and step == 2:
            for p, n in zip(params, numbers, strict=True):
                p.grad = sharded_grads(50)[n]
            observe_hessian(chain, 8)
    return [p.detach() for p in params]


def run_sharded(rule: LinkBase, numbers: list[int], dim: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    kind = [[Shard(min(dim, len(SHARDED[n]) - 1))] for n in numbers]
    first = [torch.tensor(draw(SHARDED, 0)[n], dtype=torch.float32) for n in numbers]
    params = [nn.Parameter(distribute_tensor(w, mesh, k)) for w, k in zip(first, kind, strict=True)]
    chain = Chain(params, rule, lr=LR, path="plain")

    def give(step: int) -> None:
        for p, n, k in zip(params, numbers, kind, strict=True):
            p.grad = distribute_tensor(sharded_grads(step)[n], mesh, k)

    for step in range(5):
        give(step)
        with CommDebugMode() as traffic:
            chain.step()
        assert traffic.get_total_counts() <= 1 + COLLECTIVES[rule.name] * len(params)
        if isinstance(rule, SophiaGRule) and step == 2:
            give(50)
            observe_hessian(chain, 8)
    state = chain.state[params[0]]
    assert isinstance(next(value for value in state.values() if value.ndim == 2), DTensor)
    if isinstance(rule, AdafactorRule):  # what has no sharded dimension left is whole, the rest is sharded as p is
        row, column = state["row_var"], state["col_var"]
        assert row.placements == ((Shard(0),) if dim == 0 else (Replicate(),))
        assert column.placements == ((Replicate(),) if dim == 0 else (Shard(1),))
        assert not any(kind.is_partial() for kind in adafactor.mean_of_rows(row).placements)
    return [p.detach().full_tensor() for p in params]


def one_rank(rank: int) -> None:
    for name, make in RULES.items():
        numbers = [0, 1] if "muon" in name else [0, 1, 2, 3]
        wanted = run_whole(make(), numbers)
        for dim in (0, 1):
            for got, whole in zip(run_sharded(make(), numbers, dim), wanted, strict=True):
                gap = float((got - whole).abs().max() / whole.abs().max())
                assert gap <= 1e-6, f"{name}, Shard({dim}): {gap}"


@pytest.mark.dist
def test_sharded_equals_whole(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)
