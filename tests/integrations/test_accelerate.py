"""The guard in loops written with Accelerate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")

from poise.core.errors import UserError  # noqa: E402
from poise.guard.config import GuardConfig  # noqa: E402
from poise.integrations.accelerate import AccelerateGuard, guard  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # what the library warns about is not ours


class Loop:
    """The loop of Accelerate's documentation. ``bad`` are updates (0-based) whose gradient is spoilt."""

    def __init__(self, use: bool = True, accumulate: int = 2, clip: float = 0.5, **config: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        prepared = self.accelerator.prepare(model, optimizer, schedule)
        self.model, self.optimizer, self.schedule = prepared
        self.guard: AccelerateGuard | None = None
        if use:
            self.guard = guard(self.accelerator, self.model, self.optimizer, GuardConfig(**config))
        self.clip = clip
        self.losses: list[float] = []

    def run(self, first: int, last: int, bad: tuple[int, ...] = ()) -> list[bool]:
        """Do micro-batches ``first`` .. ``last - 1``; return for each whether the weights stayed."""
        stayed = []
        for index in range(first, last):
            before = [p.detach().clone() for p in self.model.parameters()]
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                self.accelerator.backward(loss)
                self.losses.append(loss.item())
                if index in bad:
                    self.model[2].weight.grad[0, 3] = math.inf
                if self.accelerator.sync_gradients and self.clip:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            stayed.append(all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True)))
        return stayed

    def weights(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_bad_gradient_changes_nothing(clip: float) -> None:
    loop = Loop(clip=clip)
    stayed = loop.run(0, 40, bad=(14,))  # the first half of update 7
    assert stayed == [index % 2 == 0 or index == 15 for index in range(40)]
    assert loop.guard is not None
    assert loop.guard.skipped == 1
    assert loop.guard.guard.step == 20  # asked once an update, not once a micro-batch
    assert all(torch.isfinite(p).all() for p in loop.weights())


def test_the_guard_sees_the_mean_loss_and_the_raw_norm() -> None:
    loop = Loop(clip=1e-4)
    seen: list[tuple[float, float]] = []
    assert loop.guard is not None
    loop.guard.guard._observer = lambda signals, decision: seen.append((signals.loss, signals.grad_norm))
    loop.run(0, 8)
    pairs = [(a + b) / 2 for a, b in zip(loop.losses[::2], loop.losses[1::2], strict=True)]
    assert [loss for loss, _ in seen] == pytest.approx(pairs, rel=1e-5)
    assert min(norm for _, norm in seen) > 1e-3


@pytest.mark.parametrize("mode", ["act", "observe"])
def test_off_equals_absent(mode: str) -> None:
    absent, present = Loop(use=False), Loop(mode=mode)
    absent.run(0, 40)
    present.run(0, 40)
    assert same(absent.weights(), present.weights())


def test_save_state_and_load_state(tmp_path: Path) -> None:
    straight = Loop()
    straight.run(0, 20, bad=(6,))
    straight.accelerator.save_state(str(tmp_path))
    straight.run(20, 40)
    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(20, 40)
    assert same(straight.weights(), resumed.weights())
    assert straight.guard is not None and resumed.guard is not None
    assert repr(straight.guard.state_dict()) == repr(resumed.guard.state_dict())  # NaN is in it


def test_removed_it_is_gone() -> None:
    loop = Loop(accumulate=1)
    assert loop.guard is not None
    loop.guard.remove()
    loop.run(0, 3, bad=(1,))
    assert not all(torch.isfinite(p).all() for p in loop.weights())
    assert loop.guard.guard.step == 0


def test_an_optimizer_that_is_not_prepared_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    with pytest.raises(UserError, match="not prepared"):
        guard(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
