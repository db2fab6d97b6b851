"""Hosts for plain loops: learning rates that schedulers cannot undo, moments, snapshots."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from poise.core.errors import UserError
from poise.core.host import Host
from poise.guard.guard import TrainingHalted
from poise.integrations.plain import OptimizerHost, SnapshotHost


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)
        self.lm_head = nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.lm_head(self.norm(x))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> torch.Tensor:
    tokens = torch.randint(8, (16,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def run_of(seed: int = 0, **kwargs: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, **kwargs)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [t.detach().clone() for t in [*model.parameters(), *model.buffers(), *moments]]


def test_hosts_are_hosts() -> None:
    model, optimizer = run_of()
    assert isinstance(OptimizerHost(optimizer), Host)
    assert isinstance(SnapshotHost(model, optimizer), Host)
    assert OptimizerHost(optimizer).cannot == {"rollback"}
    assert not SnapshotHost(model, optimizer).cannot


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_scale_survives_a_scheduler_that_writes_every_step(as_tensor: bool) -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=torch.tensor(1.0) if as_tensor else 1.0)
    host = OptimizerHost(optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # computes the next lr from group["lr"]
    moved = []
    for step in range(6):
        if step == 1:
            host.scale_lr(0.1)
        if step == 3:
            host.scale_lr(0.2, rewarm=2)
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        moved.append(before - p.item())
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.5 ** (step + 1))
    scale = [1.0, 0.1, 0.1, 0.1 * 0.2, 0.1 * 0.6, 0.1 * 1.0]
    assert moved == pytest.approx([s * 0.5**i for i, s in enumerate(scale)], rel=1e-3)
    assert host.lr_scale == pytest.approx(0.1)


def test_lr_is_put_back_after_a_step_that_raised() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    host = OptimizerHost(optimizer)
    host.scale_lr(0.5)

    def broken() -> float:
        raise ValueError("no batch")

    p.grad = torch.ones(1)
    with pytest.raises(ValueError, match="no batch"):
        optimizer.step(broken)
    optimizer.step()
    assert (p.item(), optimizer.param_groups[0]["lr"]) == (-0.5, 1.0)


def test_host_state_round_trip_and_remove() -> None:
    _, optimizer = run_of()
    host = OptimizerHost(optimizer)
    host.scale_lr(0.5)
    host.scale_lr(0.1, rewarm=10)
    optimizer.step()
    again = OptimizerHost(run_of()[1])
    again.load_state_dict(host.state_dict())
    assert again.lr_scale == host.lr_scale == pytest.approx(0.5 * (0.1 + 0.9 / 10))
    host.remove()
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert host.lr_scale == again.lr_scale  # its hooks are gone: the ramp stands still


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_reset_moments_makes_the_optimizer_new(kind: type[torch.optim.Optimizer]) -> None:
    """After a reset the next step is the first step of a fresh optimizer, NaN in the moments or not."""
    model, _ = run_of()
    kwargs: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, **kwargs)  # type: ignore[call-arg]
    host = OptimizerHost(optimizer, model)
    for seed in range(3):
        one_step(model, optimizer, seed)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim:
                value.fill_(math.nan)
    host.reset_moments()
    twin, _ = run_of()
    twin.load_state_dict(model.state_dict())
    fresh = kind(twin.parameters(), lr=1e-2, **kwargs)  # type: ignore[call-arg]
    one_step(model, optimizer, 9)
    one_step(twin, fresh, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_reset_moments_of_one_place() -> None:
    model, optimizer = run_of()
    host = OptimizerHost(optimizer, model)
    one_step(model, optimizer, 1)
    host.reset_moments(["block.1", "head"])
    for name, p in model.named_parameters():
        zeroed = not optimizer.state[p]["exp_avg_sq"].any() and float(optimizer.state[p]["step"]) == 0
        assert zeroed == name.startswith(("layers.1", "lm_head")), name
    with pytest.raises(UserError, match=r"no place 'block.7', did you mean 'block\.\d'"):
        host.reset_moments(["block.7"])
    with pytest.raises(UserError, match="without the model"):
        OptimizerHost(optimizer).reset_moments(["head"])


def test_snapshots_restore_bit_for_bit_and_keep_their_bounds() -> None:
    model, optimizer = run_of(amsgrad=True)
    host = SnapshotHost(model, optimizer, every=2, keep=2)
    kept = {}
    for step in range(1, 8):
        one_step(model, optimizer, step)
        kept[step] = everything(model, optimizer)
    assert host.steps == [4, 6]
    bytes_of_one = sum(t.numel() * t.element_size() for t in kept[7])
    assert host.memory == 2 * bytes_of_one
    storages = [t.data_ptr() for t in [*model.parameters(), *model.buffers()]]
    assert host.rollback(5, drop_data=True) == 4
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), kept[4], strict=True))
    assert storages == [t.data_ptr() for t in [*model.parameters(), *model.buffers()]]  # in place
    assert host.steps == [4]
    one_step(model, optimizer, 5)
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), kept[5], strict=True))
    with pytest.raises(UserError, match="no snapshot at or before step 3; kept are steps"):
        host.rollback(3, drop_data=True)


def test_a_snapshot_before_any_moments_restores_their_absence() -> None:
    model, optimizer = run_of()
    host = SnapshotHost(model, optimizer, every=100)
    assert host.take()
    one_step(model, optimizer, 1)
    host.rollback(0, drop_data=True)
    assert not optimizer.state


def test_a_bad_state_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = run_of()
    host = SnapshotHost(model, optimizer, every=1)
    one_step(model, optimizer, 1)
    with torch.no_grad():
        model.norm.running_mean[0] = math.inf
    with caplog.at_level(logging.WARNING, "poise"):
        assert not host.take()
    assert "no snapshot is kept" in caplog.text
    assert host.steps == [1]


def test_a_guard_goes_back_to_a_snapshot_and_training_goes_on() -> None:
    """Weights spoilt between two steps: every loss is NaN, so the guard has to go back."""
    model, optimizer = run_of()
    host = SnapshotHost(model, optimizer, every=5)
    guard = host.guard()
    losses = []
    for step in range(1, 60):
        tokens = torch.randint(8, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        if guard.allows(loss):
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 33:
            with torch.no_grad():
                model.layers[0].weight[0, 0] = math.nan
    assert sum(map(math.isnan, losses)) >= 1
    assert all(math.isfinite(loss) for loss in losses[-10:])
    assert all(torch.isfinite(t).all() for t in everything(model, optimizer))
    assert host.steps[-1] <= guard.step < 59


def test_snapshots_are_numbered_like_the_guards_steps() -> None:
    """A skipped step counts for the guard and not for the optimizer."""
    model, optimizer = run_of()
    host = SnapshotHost(model, optimizer, every=3, keep=9)
    guard = host.guard()
    for step in range(1, 10):
        loss = model(torch.arange(8)).square().mean()
        loss.backward()
        if step == 2:
            model.lm_head.bias.grad[0] = math.nan
        if guard.allows(loss):
            optimizer.step()
        optimizer.zero_grad()
    assert host.steps == [4, 7]


def test_save_and_load_of_ones_own() -> None:
    model, optimizer = run_of()
    calls: list[tuple[str, int]] = []

    def load(at_most: int) -> int:
        calls.append(("load", at_most))
        return 4

    host = OptimizerHost(optimizer, model, load=load, save=lambda step: calls.append(("save", step)), every=2)
    for step in range(4):
        one_step(model, optimizer, step)
    assert host.rollback(7, drop_data=True) == 4
    assert calls == [("save", 2), ("save", 4), ("load", 7)]


def test_what_a_plain_loop_cannot_do_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer = run_of()
    host = OptimizerHost(optimizer)
    with pytest.raises(UserError, match="no checkpoints"):
        host.rollback(3, drop_data=True)
    with pytest.raises(TrainingHalted, match="enough"):
        host.halt("enough")
    with caplog.at_level(logging.WARNING, "poise"):
        host.drop_data(5, 9)
    assert host.dropped == [(5, 9)]
    assert "samples 5 to 9" in caplog.text


def test_bad_settings_are_one_line() -> None:
    model, optimizer = run_of()
    with pytest.raises(UserError, match="every is 0"):
        SnapshotHost(model, optimizer, every=0)
    with pytest.raises(UserError, match="keep is 0"):
        SnapshotHost(model, optimizer, keep=0)
    with pytest.raises(UserError, match="save is given without load"):
        OptimizerHost(optimizer, save=print)
    with pytest.raises(UserError, match="does not know the model"):
        OptimizerHost(optimizer).guard()
