"""``guarded(optimizer)``: an optimizer to everybody who holds it, and no step that the guard refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from poise.core.errors import UserError
from poise.guard.config import GuardConfig
from poise.integrations.optimizer import STATE_KEY, GuardedOptimizer, guarded


def make(seed: int = 0, **kwargs: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, **kwargs)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def backward(model: nn.Module, seed: int, bad: float | None = None) -> torch.Tensor:
    loss = loss_of(model, seed)
    loss.backward()
    if bad is not None:
        model[2].weight.grad[0, 3] = bad  # type: ignore[index, union-attr]
    return loss


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for state in optimizer.state.values() for v in state.values()]
    return [t.detach().clone() for t in [*model.parameters(), *moments]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("how", ["nothing", "keyword", "position", "observe"])
def test_a_bad_gradient_changes_nothing(bad: float, clip: bool, how: str) -> None:
    model, inner = make()
    optimizer = guarded(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for step in range(12):
        before = values(model, optimizer)
        loss = backward(model, step, bad if step == 6 else None)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        match how:
            case "nothing":
                optimizer.step()
            case "keyword":
                optimizer.step(loss=loss)
            case "position":
                optimizer.step(loss)
            case _:
                optimizer.observe(loss)
                optimizer.step()
        assert same(before, values(model, optimizer)) == (step == 6)
        optimizer.zero_grad()
    assert optimizer.skipped == 1


def test_a_nan_loss_is_refused_although_the_gradient_is_finite() -> None:
    model, inner = make()
    optimizer = guarded(inner)
    backward(model, 0)
    before = values(model, optimizer)
    optimizer.step(loss=math.nan)
    assert same(before, values(model, optimizer))


@pytest.mark.parametrize("config", [GuardConfig(), GuardConfig(mode="observe"), GuardConfig(enabled=False)])
def test_off_equals_absent(config: GuardConfig) -> None:
    """A healthy run is bit-equal with the guard and without; observing lets even NaN through."""
    results = []
    for use in (True, False):
        model, optimizer = make()
        if use:
            optimizer = guarded(optimizer, model, config)
        for step in range(30):
            loss = backward(model, step)
            optimizer.step(loss=loss) if use else optimizer.step()
            optimizer.zero_grad()
        results.append(values(model, optimizer))
    assert same(*results)


def test_observe_mode_never_skips() -> None:
    model, inner = make()
    optimizer = guarded(inner, model, GuardConfig(mode="observe"))
    backward(model, 0, math.nan)
    optimizer.step()
    assert not torch.isfinite(values(model, optimizer)[2]).all()
    assert optimizer.skipped == 0


def test_schedulers_hooks_groups_and_attributes_are_the_inner_ones() -> None:
    model, inner = make()
    optimizer = guarded(inner, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    backward(model, 1, math.nan)
    optimizer.step()  # not taken: hooks tell of steps that happen
    scheduler.step()
    assert calls == ["before", "after"]
    assert inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 3)
    assert optimizer.state is inner.state and optimizer.defaults is inner.defaults
    extra = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(inner.param_groups) == 2
    extra.grad = torch.tensor([math.nan])
    optimizer.zero_grad()
    assert extra.grad is None
    assert "guarded(AdamW" in repr(optimizer)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = optimizer.nonsense


def test_parameters_added_later_are_watched() -> None:
    model, inner = make()
    optimizer = guarded(inner)
    extra = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra]})
    backward(model, 0)
    extra.grad = torch.tensor([1.0, math.nan])
    optimizer.step()
    assert optimizer.skipped == 1


def test_closures() -> None:
    model, inner = make()
    optimizer = guarded(inner, model)
    twin, plain = make()
    for step in range(4):

        def closure(net: nn.Module, seed: int, optimizer: torch.optim.Optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(net, seed)

        mine = optimizer.step(lambda step=step: closure(model, step, optimizer))
        theirs = plain.step(lambda step=step: closure(twin, step, plain))
        assert torch.equal(mine, theirs)
    assert same(values(model, optimizer), values(twin, plain))
    before = values(model, optimizer)
    optimizer.zero_grad()
    assert isinstance(optimizer.step(lambda: backward(model, 9, math.inf)), torch.Tensor)
    assert same(before, values(model, optimizer))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    """The scaler unscales before the guard looks, skips overflows itself, and the result is the plain loop's."""
    results = []
    for use in (True, False):
        model, optimizer = make(fused=fused)
        if use:
            optimizer = guarded(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
        for step in range(12):
            loss = loss_of(model, step) * (1e30 if step == 0 else 1.0)  # 2**40 * 1e30 overflows fp32
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**39
        results.append(values(model, optimizer))
        if use:
            assert optimizer.skipped == 0
            assert optimizer.guard.step == 11
    assert same(*results)


def test_state_round_trip_through_a_file(tmp_path: Path) -> None:
    """20 steps, save, load, 20 steps: weights, moments and the guard's memory as in 40 straight steps."""
    model, inner = make()
    optimizer = guarded(inner, model)
    optimizer.host.scale_lr(0.5, rewarm=30)
    for step in range(40):
        if step == 20:
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "c.pt")
        optimizer.step(loss=backward(model, step))
        optimizer.zero_grad()
    again, fresh = make(1)
    resumed = guarded(fresh, again)
    weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(20, 40):
        resumed.step(loss=backward(again, step))
        resumed.zero_grad()
    assert same(values(model, optimizer), values(again, resumed))
    assert optimizer.state_dict()[STATE_KEY] == resumed.state_dict()[STATE_KEY]


def test_installing_and_uninstalling_keep_checkpoints() -> None:
    model, inner = make()
    optimizer = guarded(inner, model)
    optimizer.step(loss=backward(model, 0))
    _, plain = make(1)
    plain.load_state_dict(optimizer.state_dict())  # uninstalled: the guard's key is ignored
    again = guarded(make(1)[1])
    again.load_state_dict(plain.state_dict())  # installed later: the guard starts afresh
    assert again.guard.step == 0
    assert again.state_dict()["param_groups"] == inner.state_dict()["param_groups"]


def test_one_clear_line() -> None:
    model, inner = make()
    optimizer = guarded(inner)
    with pytest.raises(UserError, match="guarded already"):
        guarded(optimizer)
    with pytest.raises(UserError, match=r"takes a torch\.optim\.Optimizer, not Linear"):
        guarded(model[0])  # type: ignore[arg-type, index]
    with pytest.raises(UserError, match="LBFGS takes several"):
        guarded(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UserError, match="state_dict"):
        copy.deepcopy(optimizer)
    assert isinstance(optimizer, GuardedOptimizer)
