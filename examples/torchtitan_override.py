"""The guard in torchtitan's configuration. Needs ``pip install torchtitan``; its trainer itself needs a GPU.

    python examples/torchtitan_override.py

Shows what the flag ``--override.imports poise.integrations.torchtitan.guarded_optimizers`` does to a configuration,
and the guarded container on a small model.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, default_adamw
from torchtitan.config import Configurable, OverrideConfig, apply_overrides


class Root(Configurable):
    """Stands for torchtitan's trainer."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        optimizer: OptimizersContainer.Config = field(default_factory=lambda: default_adamw(lr=3e-3))


def main() -> None:
    """Apply the override, build the container, take steps; one of them has a NaN gradient."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    config = Root.Config()
    config.optimizer.implementation = "for-loop"
    flag = OverrideConfig(imports=["poise.integrations.torchtitan.guarded_optimizers"])
    print("\n".join(apply_overrides(flag, config)))
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizers = config.optimizer.build(model_parts=[model])
    for step in range(100):
        x = torch.randn(32, 8)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        if step == 40:
            model[0].weight.grad[0, 0] = math.nan
        optimizers.step()
        optimizers.zero_grad()
    print(f"loss {loss.item():.3f}, skipped {optimizers.skipped}")


if __name__ == "__main__":
    main()
