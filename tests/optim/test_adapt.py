"""Optimizers of other people between links: torch's own always, others where they are installed."""

from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from poise.core.errors import UserError
from poise.optim.adapt import Adapted, adamw_4bit, adamw_8bit, shampoo, soap
from poise.optim.chain import Chain
from poise.optim.rules.lion import LionRule
from poise.optim.shape.clip_global_norm import ClipGlobalNorm
from poise.optim.transform import Info, LinkBase, Stage

LR = 0.01
SHAPES = [(6, 4), (5,), (3, 2)]
TORCH_RULES: dict[str, Callable[[Any], Optimizer]] = {
    "nadam": lambda groups: torch.optim.NAdam(groups),
    "radam": lambda groups: torch.optim.RAdam(groups),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
    "adamw-tensor-lr": lambda groups: torch.optim.AdamW(
        [{**group, "lr": torch.tensor(group["lr"])} for group in groups], foreach=False
    ),
}


@dataclass(frozen=True)
class Damp(LinkBase):
    """Gradient link with memory: divides by one plus a running mean of the magnitude."""

    name: ClassVar[str] = "damp"
    stage: ClassVar[Stage] = "gradient"

    def init(self, p: Tensor) -> dict[str, Tensor]:
        return {"damp_mean": torch.zeros_like(p)}

    def update(self, u: Tensor, state: dict[str, Any], p: Tensor, info: Info) -> Tensor:
        state["damp_mean"] = state["damp_mean"] * 0.9 + u.abs() * 0.1
        return u / (1 + state["damp_mean"])


@dataclass(frozen=True)
class Slow(LinkBase):
    """Update link with memory: a share of the update, smoothed."""

    share: float = 0.5
    name: ClassVar[str] = "slow"
    stage: ClassVar[Stage] = "update"

    def init(self, p: Tensor) -> dict[str, Tensor]:
        return {"slow_mean": torch.zeros_like(p)}

    def update(self, u: Tensor, state: dict[str, Any], p: Tensor, info: Info) -> Tensor:
        state["slow_mean"] = state["slow_mean"] * 0.5 + u * 0.5
        return state["slow_mean"] * self.share


@dataclass(frozen=True)
class Times(LinkBase):
    """Update link without memory."""

    factor: float = 1.0
    name: ClassVar[str] = "times"
    stage: ClassVar[Stage] = "update"

    def update(self, u: Tensor, state: dict[str, Any], p: Tensor, info: Info) -> Tensor:
        return u * self.factor


@dataclass(frozen=True)
class Cap(LinkBase):
    """Weights link."""

    bound: float = 0.5
    name: ClassVar[str] = "cap"
    stage: ClassVar[Stage] = "weights"

    def update(self, u: Tensor, state: dict[str, Any], p: Tensor, info: Info) -> Tensor:
        return u.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class NeedsNorm(Times):
    """Update link that asks for what is not known there."""

    needs: ClassVar[frozenset[str]] = frozenset({"global_norm"})


class WideSgd(Optimizer):
    """Keeps fp32 momentum for any weights, and insists on a learning rate that is a tensor, as torchao does."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):
                raise RuntimeError("lr was changed to a non-Tensor object")
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, wide=torch.zeros_like(p, dtype=torch.float32), parts=[torch.zeros(3)])
                state["step"] += 1
                state["wide"].mul_(0.9).add_(p.grad)
                state["parts"][0] += 1 / 3
                p.copy_(p - group["lr"] * state["wide"])


class Breaks(torch.optim.SGD):
    """Makes infinite weights out of a finite gradient."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            self.param_groups[0]["params"][0][0, 0] = math.inf


def fresh(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * (20.0 if step == 3 else 1.0)


def run(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> list[Tensor]:
    for step in steps:
        give(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rule", TORCH_RULES.values(), ids=TORCH_RULES)
def test_without_links_it_is_the_rule(rule: Callable[[Any], Optimizer]) -> None:
    params, twins = fresh(), fresh()
    adapted = Adapted(params, rule, lr=LR)
    bare = rule([{"params": twins, "lr": LR}])
    assert same(run(adapted, params, range(6)), run(bare, twins, range(6)))
    assert isinstance(adapted, Optimizer)
    assert adapted.state is adapted.rule.state
    assert adapted.param_groups is adapted.rule.param_groups


def test_gradient_links_act_in_front() -> None:
    params, twins = fresh(), fresh()
    adapted = Adapted(params, TORCH_RULES["sgd"], ClipGlobalNorm(0.5), lr=LR)
    bare = torch.optim.SGD(twins, lr=LR, momentum=0.9)
    for step in range(5):
        give(params, step)
        give(twins, step)
        whole = torch.cat([p.grad.flatten() for p in twins]).norm()
        assert torch.allclose(adapted.measure(), whole)
        torch.nn.utils.clip_grad_norm_(twins, 0.5)
        adapted.step()
        bare.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_update_and_weights_links_act_behind() -> None:
    params, twins = fresh(), fresh()
    adapted = Adapted(params, TORCH_RULES["nadam"], Times(0.25), Cap(0.5), lr=LR)
    bare = torch.optim.NAdam(twins, lr=LR)
    give(params, 0)
    give(twins, 0)
    before = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    adapted.step()
    bare.step()
    for p, q, old, grad in zip(params, twins, before, grads, strict=True):
        wanted = (old - 0.25 * (old - q.detach())).clamp(-0.5, 0.5)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-7)
        assert p.grad is grad


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 10.0), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_an_update_link_that_does_nothing_costs_a_rounding(seed: int, lr: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(8, generator=generator).to(dtype)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    p.grad = torch.randn(8, generator=generator).to(dtype)
    q.grad = p.grad.clone()
    Adapted([p], lambda groups: torch.optim.SGD(groups), Times(1.0), lr=lr).step()
    torch.optim.SGD([q], lr=lr).step()
    ulp = torch.finfo(dtype).eps * torch.maximum(start.abs(), q.detach().abs())
    assert bool(((p - q).detach().abs() <= 2 * ulp).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_changes_nothing(value: float) -> None:
    params = fresh()
    adapted = Adapted(params, TORCH_RULES["radam"], Damp(), Slow(), lr=LR)
    run(adapted, params, range(4))
    assert adapted.skipped is not None and not bool(adapted.skipped)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(adapted.state_dict())
    give(params, 9)
    params[1].grad[2] = value
    adapted.step()
    assert bool(adapted.skipped)
    assert same(before, [p.detach() for p in params])
    assert_equal_states(adapted.state_dict(), state)


def assert_equal_states(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert set(one) == set(other)
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal_states(a, b)
    else:
        assert one == other


def test_a_nonfinite_update_is_not_taken_where_links_stand_behind() -> None:
    params = fresh()
    before = [p.detach().clone() for p in params]
    adapted = Adapted(params, lambda groups: Breaks(groups), Times(1.0), lr=LR)
    run(adapted, params, range(1))
    assert bool(adapted.skipped)
    assert same(before, [p.detach() for p in params])


@pytest.mark.parametrize("rule", TORCH_RULES.values(), ids=TORCH_RULES)
def test_resumes_bit_for_bit(rule: Callable[[Any], Optimizer]) -> None:
    links = (ClipGlobalNorm(3.0), Damp(), Slow(), Cap(2.0))
    params = fresh()
    whole = run(Adapted(params, rule, *links, lr=LR), params, range(40))
    params = fresh()
    first = Adapted(params, rule, *links, lr=LR)
    run(first, params, range(20))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    run(first, params, range(20, 23))  # what was saved is not what runs on
    file.seek(0)
    again = fresh()
    second = Adapted(again, rule, *links, lr=99.0)
    twins = fresh()
    reached = run(Adapted(twins, rule, *links, lr=LR), twins, range(20))
    for p, value in zip(again, reached, strict=True):
        p.data.copy_(value)
    second.load_state_dict(torch.load(file))
    assert second.lr == pytest.approx(LR)
    assert same(run(second, again, range(20, 40)), whole)


def test_loaded_state_is_a_copy_in_its_own_precision() -> None:
    """Torch would cast the fp32 moments of bf16 weights to bf16, and share the rest with what was saved."""
    params = fresh(dtype=torch.bfloat16)
    adapted = Adapted(params, lambda groups: WideSgd(groups), lr=LR)
    run(adapted, params, range(3))
    saved = adapted.state_dict()
    twins = fresh(dtype=torch.bfloat16)
    other = Adapted(twins, lambda groups: WideSgd(groups), lr=LR)
    other.load_state_dict(saved)
    for p, q in zip(params, twins, strict=True):
        mine, theirs = adapted.state[p], other.state[q]
        assert theirs["wide"].dtype == torch.float32
        assert torch.equal(mine["wide"], theirs["wide"]) and mine["wide"] is not theirs["wide"]
        assert theirs["wide"].data_ptr() != mine["wide"].data_ptr()
        assert theirs["parts"][0].dtype == torch.float32 and torch.equal(theirs["parts"][0], mine["parts"][0])
        assert theirs["step"] == 3


def test_rates_that_are_tensors_are_filled() -> None:
    params = fresh()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr_scale": 0.5}]
    adapted = Adapted(groups, lambda groups: WideSgd(groups), lr=LR)
    tensors = [group["lr"] for group in adapted.param_groups]
    adapted.set_lr(0.5)
    assert [float(t) for t in tensors] == [0.5, 0.25]
    assert all(group["lr"] is t for group, t in zip(adapted.param_groups, tensors, strict=True))
    assert adapted.lr == 0.5
    adapted.param_groups[0]["lr"] = 0.125  # as schedules of other people do
    run(adapted, params, range(1))
    assert adapted.param_groups[0]["lr"] is tensors[0] and float(tensors[0]) == 0.125
    with pytest.raises(UserError, match=r"rate is -1\.0"):
        adapted.set_lr(-1.0)


def test_set_lr_and_schedulers_reach_the_rule_and_the_links_behind() -> None:
    params, twins = fresh(), fresh()
    adapted = Adapted(params, TORCH_RULES["sgd"], Times(1.0), lr=LR)
    bare = torch.optim.SGD(twins, lr=LR, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.StepLR(one, step_size=2, gamma=0.1) for one in (adapted, bare)]
    for step in range(6):
        run(adapted, params, range(step, step + 1))
        run(bare, twins, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert adapted.lr == pytest.approx(LR * 1e-3)


def test_a_rate_of_zero_moves_nothing_but_links_still_act() -> None:
    params = fresh()
    adapted = Adapted(params, TORCH_RULES["nadam"], Times(1.0), Cap(0.25), lr=0.0)
    before = [p.detach().clone() for p in params]
    run(adapted, params, range(2))
    assert same([old.clamp(-0.25, 0.25) for old in before], [p.detach() for p in params])


def test_closure_bound_and_missing_gradients() -> None:
    params = fresh()
    adapted = Adapted(params, lambda groups: torch.optim.SGD(groups), lr=1.0)
    assert adapted.step() is None and adapted.skipped is None  # no gradient anywhere

    def closure() -> float:
        loss = (params[0] ** 2).sum()
        loss.backward()
        return float(loss.detach())

    before = [p.detach().clone() for p in params]
    assert adapted.step(closure, max_norm=0.5) == pytest.approx(float((before[0] ** 2).sum()))
    assert float((before[0] - params[0].detach()).norm()) == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(before[1], params[1].detach())
    adapted.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_wide_bound_is_no_bound() -> None:
    params, twins = fresh(), fresh()
    one, other = Adapted(params, TORCH_RULES["sgd"], lr=LR), Adapted(twins, TORCH_RULES["sgd"], lr=LR)
    give(params, 0)
    give(twins, 0)
    one.step(max_norm=1e9)
    other.step()
    assert same([p.detach() for p in params], [p.detach() for p in twins])


def test_moments_can_be_forgotten() -> None:
    params = fresh()
    adapted = Adapted(params, TORCH_RULES["nadam"], Slow(), lr=LR)
    run(adapted, params, range(3))
    adapted.reset_moments(params[:1])
    assert params[0] not in adapted.state and params[1] in adapted.state
    adapted.reset_moments()
    assert len(adapted.state) == 0
    run(adapted, params, range(1))
    assert all(adapted.state[p]["step"] == 1 for p in params)


def test_names_and_groups_are_kept() -> None:
    model = nn.Linear(3, 2)
    groups = [
        {"params": [("weight", model.weight)], "weight_decay": 0.1},
        {"params": [("bias", model.bias)], "lr": 0.5},
    ]
    adapted = Adapted(groups, lambda groups: torch.optim.AdamW(groups), Damp(), Slow(), lr=LR)
    assert [group["lr"] for group in adapted.param_groups] == [LR, 0.5]
    assert adapted.param_groups[0]["weight_decay"] == 0.1
    assert adapted.state_dict()["links"]["gradient"]["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert [link.name for link in adapted.links] == ["damp", "slow"]
    assert "AdamW" in repr(adapted) and "damp, slow" in repr(adapted)


def test_a_state_of_the_bare_rule_is_taken() -> None:
    params, twins = fresh(), fresh()
    bare = torch.optim.NAdam(params, lr=LR)
    run(bare, params, range(3))
    adapted = Adapted(twins, TORCH_RULES["nadam"], Damp(), lr=0.5)
    adapted.load_state_dict(bare.state_dict())
    assert adapted.lr == LR
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(bare.state[p]["exp_avg"], adapted.state[q]["exp_avg"])


def test_wrong_states_are_refused_before_anything_changes() -> None:
    params = fresh()
    with_links = Adapted(params, TORCH_RULES["sgd"], Damp(), lr=LR)
    run(with_links, params, range(1))
    bare = Adapted(fresh(), TORCH_RULES["sgd"], lr=LR)
    with pytest.raises(UserError, match=r"has gradient links \['damp'\], here there are none"):
        bare.load_state_dict(with_links.state_dict())
    with pytest.raises(UserError, match="groups of"):
        Adapted(fresh()[:2], TORCH_RULES["sgd"], Damp(), lr=LR).load_state_dict(with_links.state_dict())
    with pytest.raises(UserError, match="needs 'state' and 'param_groups'"):
        bare.load_state_dict({"nonsense": 1})


@pytest.mark.parametrize(
    ("links", "match"),
    [
        ((LionRule(),), "'lion' is a direction, and so is the rule"),
        ((NeedsNorm(),), "'times' needs the norm of the gradient"),
        ((Times(), Damp()), "stands after 'times'"),
    ],
)
def test_links_that_do_not_fit(links: tuple[LinkBase, ...], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Adapted(fresh(), TORCH_RULES["sgd"], *links, lr=LR)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (lambda groups: "sgd", "made a str, not a torch.optim.Optimizer"),
        (lambda groups: torch.optim.LBFGS(groups), "LBFGS evaluates the gradient several times"),
        (lambda groups: torch.optim.SGD(groups[0]["params"][:1], lr=0.1), "has 1 parameters"),
    ],
)
def test_rules_that_do_not_fit(rule: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Adapted(fresh(), rule, lr=LR)


def test_other_mistakes() -> None:
    with pytest.raises(UserError, match="rate is nan"):
        Adapted(fresh(), TORCH_RULES["sgd"], lr=math.nan)
    with pytest.raises(UserError, match="no parameters"):
        Adapted([], TORCH_RULES["sgd"], lr=LR)
    adapted = Adapted(fresh(), TORCH_RULES["sgd"], lr=LR)
    with pytest.raises(UserError, match="groups cannot be added"):
        adapted.add_param_group({"params": fresh()})
    with pytest.raises(UserError, match="save its state_dict"):
        pickle.dumps(adapted)


@pytest.mark.parametrize(
    ("make", "module", "package"),
    [
        (soap, "pytorch_optimizer", "pytorch-optimizer"),
        (shampoo, "pytorch_optimizer", "pytorch-optimizer"),
        (adamw_8bit, "torchao.optim", "torchao"),
        (adamw_4bit, "torchao.optim", "torchao"),
    ],
)
def test_a_missing_package_is_named(make: Any, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make(fresh(), 1e-3)


def test_importing_drags_nothing_along() -> None:
    code = "import sys, poise.optim.adapt; print([m for m in ('torchao', 'pytorch_optimizer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Other people's packages, where they are installed.


@pytest.fixture
def low_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchao without compiling, which takes a minute; its import warns about extensions for other Pythons."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def borrowed(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("pytorch_optimizer")
    return getattr(module, name)


@pytest.mark.usefixtures("low_bit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [adamw_8bit, adamw_4bit])
def test_low_bit_moments_survive(make: Any, dtype: torch.dtype) -> None:
    shapes = [(64, 64), (5,)]

    def build(params: list[nn.Parameter]) -> Adapted:
        return make(params, 1e-2, ClipGlobalNorm(5.0), Slow(), weight_decay=0.1)

    params = fresh(shapes, dtype)
    whole = run(build(params), params, range(12))
    params = fresh(shapes, dtype)
    first = build(params)
    run(first, params, range(6))
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "weights": [p.detach() for p in params]}, file)
    codes = first.state[params[0]]["exp_avg"].codes.clone()
    file.seek(0)
    saved = torch.load(file)
    twins = fresh(shapes, dtype)
    for p, value in zip(twins, saved["weights"], strict=True):
        p.data.copy_(value)
    second = build(twins)
    second.load_state_dict(saved["optimizer"])
    moment = second.state[twins[0]]["exp_avg"]
    assert type(moment).__name__ in ("OptimState8bit", "OptimState4bit") and moment.dtype == dtype
    assert torch.equal(moment.codes, codes)
    assert same(run(second, twins, range(6, 12)), whole)
    kept = saved["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(kept.codes, codes) and not torch.equal(moment.codes, codes)  # the saved one did not move along
    second.set_lr(0.5)
    assert isinstance(second.param_groups[0]["lr"], Tensor) and second.lr == 0.5


@pytest.mark.usefixtures("low_bit")
def test_low_bit_skips_a_nonfinite_gradient() -> None:
    params = fresh([(64, 64)])
    adapted = adamw_8bit(params, 1e-2)
    run(adapted, params, range(2))
    before, codes = params[0].detach().clone(), adapted.state[params[0]]["exp_avg_sq"].codes.clone()
    give(params, 2)
    params[0].grad[0, 0] = math.nan
    adapted.step()
    assert torch.equal(before, params[0].detach())
    assert torch.equal(codes, adapted.state[params[0]]["exp_avg_sq"].codes)


@pytest.mark.parametrize("make", [soap, shampoo])
def test_preconditioned_rules_run_and_resume(make: Any) -> None:
    borrowed("SOAP")
    shapes = [(6, 4), (5,)]
    extra = {"precondition_frequency": 3} if make is soap else {}

    def build(params: list[nn.Parameter]) -> Adapted:
        return make(params, 3e-3, ClipGlobalNorm(5.0), Slow(), **extra)

    params = fresh(shapes)
    start = [p.detach().clone() for p in params]
    whole = run(build(params), params, range(12))
    assert not same(start, whole)
    params = fresh(shapes)
    first = build(params)
    run(first, params, range(6))
    twins = fresh(shapes)
    for p, q in zip(twins, params, strict=True):
        p.data.copy_(q.data)
    second = build(twins)
    second.load_state_dict(first.state_dict())
    run(first, params, range(6, 9))  # the loaded state is not the one that runs on
    assert same(run(second, twins, range(6, 12)), whole)


def test_schedule_free_switches_through_the_rule() -> None:
    make = borrowed("ScheduleFreeAdamW")
    params = fresh()
    adapted = Adapted(params, lambda groups: make(groups), ClipGlobalNorm(1.0), lr=LR)
    run(adapted, params, range(4))
    trained = [p.detach().clone() for p in params]
    adapted.rule.eval()
    assert not same(trained, [p.detach() for p in params])
    adapted.rule.train()
    for p, old in zip(params, trained, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=1e-5, atol=1e-6)


def test_a_class_that_is_not_there() -> None:
    module = importlib.import_module("poise.optim.borrowed")
    with pytest.raises(UserError, match="has no NoSuchOptimizer"):
        module.from_package("torch.optim", "torch", "NoSuchOptimizer")


# Sharded weights.


def one_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    links = (ClipGlobalNorm(0.5), Damp(), Slow(), Cap(0.8))
    whole = fresh()
    wanted = run(Adapted(whole, lambda groups: torch.optim.AdamW(groups), *links, lr=LR), whole, range(4))
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in fresh()]
    adapted = Adapted(params, lambda groups: torch.optim.AdamW(groups), *links, lr=LR)
    for step in range(5):
        give(whole, step)
        for p, q in zip(params, whole, strict=True):
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        if step == 4 and rank == 1:
            params[0].grad.to_local()[0, 0] = math.nan  # in one rank's part only: no rank may move
        adapted.step()
    assert bool(adapted.skipped)
    for p, value in zip(params, wanted, strict=True):
        assert isinstance(p, DTensor)
        assert torch.allclose(p.full_tensor(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_sharded_equals_whole(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)


def test_a_chain_and_an_adapted_rule_agree() -> None:
    """AdamW of torch between two links is the chain of the same links around AdamW of our own."""
    from poise.optim.rules.adamw import AdamWRule

    params, twins = fresh(dtype=torch.float64), fresh(dtype=torch.float64)
    rule = lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)  # noqa: E731
    adapted = Adapted(params, rule, Damp(), Slow(), Cap(1.5), lr=LR)
    chain = Chain(twins, Damp(), AdamWRule(0.9, 0.95, 1e-8, weight_decay=0.1), Slow(), Cap(1.5), lr=LR, path="plain")
    for p, q in zip(run(adapted, params, range(8)), run(chain, twins, range(8)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
