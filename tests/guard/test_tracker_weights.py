"""Micro-batches that weigh differently: the loss is the weighed mean, the spread is one of losses as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.guard.signals.tracker import Tracker


def read(losses: list[float], weights: list[float | None] | None) -> tuple[float, float | None]:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    tracker = Tracker(model, torch.optim.SGD(model.parameters(), lr=0.1))
    given = None if weights is None else [None if w is None else torch.tensor(w) for w in weights]
    signals = tracker.read([torch.tensor(value) for value in losses], 1, 0.1, weights=given)
    return signals.loss, signals.extra.get("loss_spread")


@pytest.mark.parametrize(
    ("losses", "weights", "loss", "spread"),
    [
        ([2.0, 5.0], None, 3.5, 1.5),
        ([2.0, 5.0], [None, None], 3.5, 1.5),
        ([2.0, 5.0], [1.5, 0.5], 2.75, 2.25),
        ([2.0, 5.0, 3.0], [1.0, None, 1.0], 10 / 3, 5 / 3),
        ([4.0, 0.0], [2.0, 0.0], 4.0, 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0, None),
    ],
)
def test_the_spread_is_one_of_losses(
    losses: list[float], weights: list[float | None] | None, loss: float, spread: float | None
) -> None:
    found, spread_found = read(losses, weights)
    assert found == pytest.approx(loss)
    assert spread_found == spread if spread is None else spread_found == pytest.approx(spread)
