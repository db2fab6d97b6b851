"""torchtitan's override hook with the released package, and the guarded container on a CPU.

Its trainer is not run: version 0.3.0 needs a GPU.
"""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("torchtitan")
for needed in ("tyro", "torchdata", "spmd_types"):
    pytest.importorskip(needed)

with warnings.catch_warnings():  # what its dependencies warn about when imported
    warnings.simplefilter("ignore")
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, default_adamw
    from torchtitan.config import Configurable, OverrideConfig, apply_overrides
    from torchtitan.config.override import parse_cli_imports

from dataclasses import dataclass, field  # noqa: E402

from poise.core.errors import UserError  # noqa: E402
from poise.integrations.torchtitan import GuardedOptimizersContainer  # noqa: E402

TARGET = "poise.integrations.torchtitan.guarded_optimizers"


class Root(Configurable):
    """Stands for the trainer: a tree of configurations with an optimizer in it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        optimizer: OptimizersContainer.Config = field(default_factory=lambda: default_adamw(lr=1e-2))
        lr_scheduler: LRSchedulersContainer.Config = field(default_factory=LRSchedulersContainer.Config)


def overridden(*tokens: str) -> Root.Config:
    root = Root.Config()
    root.optimizer.implementation = "for-loop"
    apply_overrides(OverrideConfig(imports=parse_cli_imports(list(tokens))), root)
    return root


def test_without_the_flag_nothing_changes() -> None:
    assert type(overridden().optimizer) is OptimizersContainer.Config


def test_the_flag_replaces_the_optimizers_and_keeps_their_settings() -> None:
    config = overridden(TARGET).optimizer
    assert type(config) is GuardedOptimizersContainer.Config
    assert config.implementation == "for-loop"
    assert config.param_groups[0].optimizer_kwargs["lr"] == 1e-2
    assert type(overridden(TARGET).lr_scheduler) is LRSchedulersContainer.Config


def test_settings_of_the_guard() -> None:
    config = overridden(TARGET + '={"skip_patience": 3, "mode": "halt"}').optimizer
    assert isinstance(config, GuardedOptimizersContainer.Config)
    assert config.guard == {"skip_patience": 3, "mode": "halt"}
    assert config.to_dict()["guard"] == config.guard
    with pytest.raises(UserError, match="no setting 'skip_patienc', did you mean 'skip_patience'"):
        overridden(TARGET + '={"skip_patienc": 3}')
    with pytest.raises(UserError, match="skip_patience is -1"):
        overridden(TARGET + '={"skip_patience": -1}')


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_container_skips(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4), nn.Linear(4, 1)]  # two parts of a pipeline: two optimizers
    config = overridden(TARGET)
    optimizers = config.optimizer.build(model_parts=parts)
    schedulers = config.lr_scheduler.build(optimizers=optimizers, training_steps=20)
    assert isinstance(optimizers, GuardedOptimizersContainer) and len(optimizers) == 2
    stayed = []
    with caplog.at_level(logging.ERROR):
        for step in range(10):
            before = [p.detach().clone() for part in parts for p in part.parameters()]
            parts[1](parts[0](torch.ones(2, 4) * step + 1)).square().mean().backward()
            if step == 6:
                parts[0].weight.grad[1, 2] = bad  # type: ignore[index]
            nn.utils.clip_grad_norm_([p for part in parts for p in part.parameters()], 1.0)  # as the trainer does
            optimizers.step()
            schedulers.step()
            optimizers.zero_grad()
            after = [p for part in parts for p in part.parameters()]
            stayed.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert stayed == [step == 6 for step in range(10)]
    assert optimizers.skipped == 1
    state = optimizers.state_dict()
    optimizers.load_state_dict(state)  # torchtitan's own checkpoint format, untouched
