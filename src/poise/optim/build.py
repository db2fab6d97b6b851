"""From settings to an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from poise.core.errors import UserError, nearest
from poise.optim.chain import Chain
from poise.optim.groups import groups
from poise.optim.rules.adamw import AdamW
from poise.optim.schedules import ScheduleConfig
from poise.optim.shape.clip_global_norm import ClipGlobalNorm
from poise.optim.transform import Link

RULES = ("adamw",)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of a run: ``lr`` is what the schedule multiplies, ``clip_norm = 0`` does not clip."""

    name: str = "adamw"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"optim.name is {self.name!r}{nearest(self.name, RULES)}; use one of {', '.join(RULES)}")
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            raise UserError(f"optim.lr is {self.lr}; use a finite number above 0, e.g. 3e-3")
        if not (math.isfinite(self.clip_norm) and self.clip_norm >= 0.0):
            raise UserError(f"optim.clip_norm is {self.clip_norm}; use a finite number above 0, or 0 not to clip")
        _ = self.rule  # its own checks

    @property
    def rule(self) -> AdamW:
        """The direction link."""
        return AdamW(self.beta1, self.beta2, self.eps, self.weight_decay)


def build(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, Tensor]],
    roles: Mapping[str, str] | None = None,
) -> Chain:
    """Return the optimizer that ``config`` describes, with decay only where it belongs.

    Args:
        config: settings.
        named_parameters: e.g. ``model.named_parameters()``, after sharding.
        roles: name to role; see ``poise.optim.groups``.
    """
    links: list[Link] = [ClipGlobalNorm(config.clip_norm)] if config.clip_norm else []
    return Chain(groups(named_parameters, roles, config.weight_decay), *links, config.rule, lr=config.lr)
