"""The guard for torchtitan 0.3: one flag.

    torchrun ... -m torchtitan.train ... --override.imports poise.integrations.torchtitan.guarded_optimizers
    ... 'poise.integrations.torchtitan.guarded_optimizers={"skip_patience": 3}'      # with settings

The flag replaces the optimizer container's configuration through torchtitan's ``@override`` hook. The container is
the place where a step can be left out. What it does not see: the loss (torchtitan keeps it on the device and reads
it only when it logs), and the norm before clipping. So the guard judges the clipped gradient norm, in which NaN and
infinity still show. Its state is not part of torchtitan's checkpoints; after a resume its windows fill again.
torchtitan itself ends a run whose loss is not finite at a step that it logs; set ``--metrics.log_freq`` accordingly.

Tested: the override on the released 0.3.0 (matching, settings, conflicts) and the container on a CPU. Not tested:
a run of torchtitan's trainer, because 0.3.0 cannot train on a CPU (its trainer imports triton).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import derive, override

from poise.core.errors import UserError, nearest
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard
from poise.integrations.gate import StepGate


class GuardedOptimizersContainer(OptimizersContainer):
    """torchtitan's container, asking a guard before it steps its optimizers.

    Args:
        config: torchtitan's own fields, and ``guard``.
        model_parts: the parts that the optimizers train.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        guard: dict[str, Any] = field(default_factory=dict)
        """Settings of the guard, by the names of ``GuardConfig``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        model = model_parts[0] if len(model_parts) == 1 else nn.ModuleList(model_parts)
        self.guard = Guard.for_run(model, _Together(self.optimizers), _settings(config.guard))
        self._gate = StepGate(self.guard)

    @property
    def skipped(self) -> int:
        """Steps that the guard did not allow."""
        return self._gate.skipped

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step all optimizers if the guard allows it."""
        assert closure is None, "OptimizersContainer does not support closures"
        if self._gate.take():
            super().step()


class _Together(Optimizer):
    """Several optimizers as one to read: the container's own groups have neither learning rate nor state."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers  # not Optimizer.__init__: nothing here is its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of all optimizers, to be read only."""
        return {p: state for optimizer in self._optimizers for p, state in optimizer.state.items()}


@override(target=OptimizersContainer.Config, description="poise: a guard before every optimizer step", exact=True)
def guarded_optimizers(cfg: OptimizersContainer.Config, **guard: Any) -> GuardedOptimizersContainer.Config:
    """Return ``cfg`` as the configuration of a guarded container.

    Args:
        cfg: torchtitan's.
        guard: settings by the names of ``GuardConfig``.

    Raises:
        UserError: a setting is unknown or out of range.
    """
    _settings(guard)
    return derive(cfg, GuardedOptimizersContainer.Config, guard=guard)


def _settings(guard: dict[str, Any]) -> GuardConfig:
    known = [f.name for f in dataclasses.fields(GuardConfig)]
    for name in guard:
        if name not in known:
            raise UserError(f"guard has no setting '{name}'{nearest(name, known)}")
    return GuardConfig(**guard)
