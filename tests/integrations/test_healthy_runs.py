"""Healthy runs that are not language models: noise, small batches, plain SGD, restarts. The guard does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler

from poise.core.types import Decision, Signals
from poise.integrations.plain import SnapshotHost

STEPS = 300


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9)


def nesterov(params: Any) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=1e-3)


def restarts(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingWarmRestarts(optimizer, T_0=120)


def regression(generator: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 8, generator=generator)
    return x, torch.sin(x.sum(-1, keepdim=True)) + 0.5 * torch.randn(batch, 1, generator=generator)


def line(generator: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 8, generator=generator)
    return x, x.sum(-1, keepdim=True) + 0.3 * torch.randn(batch, 1, generator=generator)


@pytest.mark.parametrize(
    ("make", "schedule", "data", "batch"),
    [
        (adamw, None, regression, 32),
        (adamw, None, regression, 1),
        (sgd, None, regression, 32),
        (sgd, None, line, 16),
        (nesterov, restarts, line, 16),
        (adamw, restarts, regression, 8),
    ],
)
def test_the_guard_leaves_it_alone(
    make: Callable[[Any], Optimizer],
    schedule: Callable[[Optimizer], LRScheduler] | None,
    data: Callable[[torch.Generator, int], tuple[torch.Tensor, torch.Tensor]],
    batch: int,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    guard = SnapshotHost(model, optimizer, every=100).guard()
    acted: list[str] = []

    def note(signals: Signals, decision: Decision) -> None:
        if decision.action not in ("proceed", "watch"):
            acted.append(f"step {signals.step}: {decision.action}: {decision.reason}")

    guard._observer = note
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = data(generator, batch)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if guard.allows(loss):
            optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    assert acted == []
