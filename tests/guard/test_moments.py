"""The optimizer's state place by place, and what is measured on alarm in a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.core.types import Signals
from poise.guard.drop_in import BEND_EVERY, Loop
from poise.guard.signals.weights import moment_readings


class Net(nn.Module):
    """A body and a head whose forward returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(torch.tanh(self.body(x))).square().mean()}


def trained(optimizer: type[torch.optim.Optimizer], **settings: float) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    chosen = optimizer(net.parameters(), lr=1e-2, **settings)  # type: ignore[call-arg]
    for _ in range(3):
        net(torch.randn(8, 4))["loss"].backward()
        chosen.step()
        chosen.zero_grad()
    return net, chosen


def test_moments_of_adam_by_place() -> None:
    net, adam = trained(torch.optim.AdamW)
    readings = moment_readings(net, adam)
    held = torch.cat([adam.state[p]["exp_avg_sq"].flatten() for p in net.head.parameters()])
    assert float(readings["second_moment_rms@head"]) == pytest.approx(float(held.square().mean().sqrt()))
    assert float(readings["second_moment_max@head"]) == pytest.approx(float(held.max()))
    assert "moment_rms@body" in readings or "moment_rms@body.weight" in readings


def test_momentum_of_sgd_and_no_state_at_all() -> None:
    assert any(name.startswith("moment_rms@") for name in moment_readings(*trained(torch.optim.SGD, momentum=0.9)))
    assert moment_readings(*trained(torch.optim.SGD)) == {}
    net = Net()
    assert moment_readings(net, torch.optim.AdamW(net.parameters())) == {}


def test_an_alarm_brings_curvature_and_moments_and_leaves_no_trace() -> None:
    net, adam = trained(torch.optim.AdamW)
    loop = Loop(net, adam, None, None, every=10)
    net(torch.randn(8, 4))["loss"].backward()
    before = [p.detach().clone() for p in net.parameters()]
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    loop.read(1.0, 0)
    signals = Signals(1, 9.0, 1.0, 1e-2, 0)
    found = loop.examine(signals)
    assert found["curvature_limit"] == pytest.approx(2 / 1e-2 * 19)
    assert {"curvature", "moment_rms@head", "weight_rms@head"} <= set(found)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True) if p.grad is not None)
    assert "curvature" not in loop.examine(signals), "once in a trouble"
    loop.step += BEND_EVERY
    assert "curvature" in loop.examine(signals)
