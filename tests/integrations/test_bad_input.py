"""Loops and models that are not as in the manual: each works, or fails with one clear line."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from poise.core.errors import UserError
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard, TrainingHalted
from poise.integrations.optimizer import guarded
from poise.integrations.plain import SnapshotHost


class Odd(nn.Module):
    """A tied head, a frozen layer, a parameter that is never used, and (if asked) sparse embedding gradients."""

    def __init__(self, sparse: bool = False, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4, sparse=sparse)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.unused = nn.Linear(3, 3)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.layers[0].requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = self.lm_head(x)
        return nn.functional.cross_entropy(logits[:-1], tokens[1:])


def tokens(step: int) -> torch.Tensor:
    return torch.randint(8, (32,), generator=torch.Generator().manual_seed(step))


def weights(*owners: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for owner in owners for p in owner.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_unused_frozen_and_tied_parameters() -> None:
    model = Odd()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    guard = Guard.for_run(model, optimizer)
    for step in range(12):
        loss = model(tokens(step))
        loss.backward()
        if step == 6:
            model.layers[1].bias.grad[0] = math.nan
        before = weights(model)
        if guard.allows(loss):
            optimizer.step()
        assert same(before, weights(model)) == (step == 6)
        optimizer.zero_grad()


def test_a_host_with_unused_frozen_and_tied_parameters() -> None:
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    host = SnapshotHost(model, optimizer, every=1)
    model(tokens(0)).backward()
    optimizer.step()
    kept = weights(model)
    model(tokens(1)).backward()
    optimizer.step()
    assert host.rollback(1, drop_data=True) == 1
    assert same(kept, weights(model))
    assert model.lm_head.weight is model.embed.weight
    host.reset_moments(["embed"])
    assert not optimizer.state[model.embed.weight]["exp_avg"].any()


def test_zero_gradients_are_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = Guard.for_run(model, optimizer)
    with caplog.at_level(logging.WARNING, "poise"):
        for step in range(60):
            loss = (model(torch.ones(2, 4)) * (0.0 if 20 <= step < 30 else 1.0)).square().mean() + 1.0
            loss.backward()
            assert guard.allows(loss), step
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("bad", [None, math.nan])
def test_sparse_embeddings(bad: float | None) -> None:
    model = Odd(sparse=True, tied=False)
    sparse = torch.optim.SparseAdam([model.embed.weight], lr=1e-2)
    guard = Guard.for_run(model, sparse)
    for step in range(12):
        loss = model(tokens(step))
        loss.backward()
        assert model.embed.weight.grad is not None and model.embed.weight.grad.is_sparse
        if step == 6 and bad is not None:
            model.embed.weight.grad._values()[0, 0] = bad
        before = weights(model)
        if guard.allows(loss):
            sparse.step()
        assert same(before, weights(model)) == (step == 6 and bad is not None)
        model.zero_grad()


def test_a_guarded_sparse_optimizer() -> None:
    model = Odd(sparse=True, tied=False)
    sparse = guarded(torch.optim.SparseAdam([model.embed.weight], lr=1e-2))
    for step in range(6):
        loss = model(tokens(step))
        loss.backward()
        if step == 3:
            model.embed.weight.grad._values()[0, 0] = math.inf  # type: ignore[union-attr]
        before = weights(model)
        sparse.step(loss=loss)
        assert same(before, weights(model)) == (step == 3)
        model.zero_grad()


@pytest.mark.parametrize("wrap", [lambda x: SimpleNamespace(loss=x, logits=None), lambda x: {"loss": x, "aux": 1}])
def test_complex_loss_objects(wrap: Any) -> None:
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = Guard.for_run(model, optimizer)
    loss = model(tokens(0))
    loss.backward()
    assert guard.allows(wrap(loss))
    assert not guard.allows(wrap(loss * math.nan))


@pytest.mark.parametrize("loss", ["2.0", object(), {"nothing": 1}])
def test_something_that_is_no_loss_is_one_line(loss: Any) -> None:
    model = nn.Linear(2, 1)
    guard = Guard.for_run(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UserError) as error:
        guard.allows(loss)
    assert "loss" in str(error.value) and "\n" not in str(error.value)


def test_a_loss_per_sequence_is_averaged() -> None:
    model = nn.Linear(2, 1)
    guard = Guard.for_run(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.ones(3, 2)).square().squeeze(1)
    loss.mean().backward()
    assert guard.allows(loss)
    assert not guard.allows(torch.tensor([1.0, math.nan]))


def test_a_loss_that_is_nan_from_the_first_step_halts_with_the_mend() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard.for_run(model, optimizer)
    before = weights(model)
    with pytest.raises(TrainingHalted, match=r"halted at step \d+.*Mend: ") as halted:
        for _ in range(60):
            loss = model(torch.full((1, 2), math.nan)).sum()
            loss.backward()
            if guard.allows(loss):
                optimizer.step()
            optimizer.zero_grad()
    assert "\n" not in str(halted.value)
    assert same(before, weights(model))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "poise"]


def test_asked_twice_for_one_step_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard.for_run(model, optimizer)
    with caplog.at_level(logging.WARNING, "poise"):
        for _ in range(5):
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            if guard.allows(loss) and guard.allows(loss):
                optimizer.step()
            optimizer.zero_grad()
    said = [line for line in warned(caplog) if "twice" in line]
    assert len(said) == 1, warned(caplog)


def test_forgotten_for_a_step_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # it counts its steps
    guard = Guard.for_run(model, optimizer)
    with caplog.at_level(logging.WARNING, "poise"):
        for step in range(9):
            loss = model(torch.ones(1, 2)).sum() + 5
            loss.backward()
            if step in (4, 6) or guard.allows(loss):
                optimizer.step()
            optimizer.zero_grad()
    said = [line for line in warned(caplog) if "without" in line]
    assert len(said) == 1, warned(caplog)


def test_zero_grad_before_the_guard_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard.for_run(model, optimizer)
    with caplog.at_level(logging.WARNING, "poise"):
        for _ in range(3):
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            optimizer.zero_grad()
            if guard.allows(loss):
                optimizer.step()
    assert any("zero_grad" in line for line in warned(caplog)), warned(caplog)


def test_gradient_accumulation_asks_once_a_step() -> None:
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = Guard.for_run(model, optimizer)
    for step in range(10):
        mean = torch.zeros(())
        for part in range(4):
            loss = model(tokens(10 * step + part)) / 4
            loss.backward()
            mean += loss.detach()
            if step == 5 and part == 1:
                model.layers[1].weight.grad[0, 0] = math.inf
        before = weights(model)
        if guard.allows(mean):
            optimizer.step()
        assert same(before, weights(model)) == (step == 5)
        optimizer.zero_grad()
    assert guard.step == 10


def test_grad_scaler_the_guard_sees_unscaled_values() -> None:
    """fp16's scaler on a CPU: an overflow at a too large scale is the scaler's business, not a fault."""
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    guard = Guard.for_run(model, optimizer, scaler=scaler)
    seen: list[float] = []
    guard._observer = lambda signals, decision: seen.append(signals.grad_norm)
    norms: list[float] = []
    for step in range(12):
        loss = model(tokens(step)) * (16.0 if step == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)))
        if guard.allows(loss):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**127  # the overflow was handled
    assert seen[1:] == pytest.approx(norms[1:], rel=1e-3)
    assert all(torch.isfinite(p).all() for p in weights(model))


def test_bare_settings_are_checked() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(UserError, match="skip_patience is -1"):
        guarded(torch.optim.SGD(model.parameters(), lr=0.1), model, GuardConfig(skip_patience=-1))
