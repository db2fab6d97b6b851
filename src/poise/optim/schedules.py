"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume.

All of them are multipliers of the base rate, warm up linearly over ``warmup_steps`` and then

    constant  stay at 1
    cosine    fall along half a cosine to ``final_fraction`` (Loshchilov and Hutter 2017, arXiv 1608.03983)
    linear    fall along a line to ``final_fraction``; 0 is linear to zero (Bergsma et al. 2025, arXiv
    2502.15938) wsd       stay at 1, then fall along a line to ``final_fraction`` over the last
    ``decay_fraction`` of all steps
              (warm-up, stable, decay; Hu et al. 2024, MiniCPM, arXiv 2404.06395)

``final_fraction`` is reached at the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from poise.core.errors import UserError

Kind = Literal["cosine", "wsd", "linear", "constant"]


@dataclass(frozen=True)
class ScheduleConfig:
    """The shape of the learning rate over a run.

    Attributes:
        kind: ``cosine``, ``wsd``, ``linear`` or ``constant``.
        warmup_steps: steps of linear warm-up; the base rate is reached at this step.
        decay_fraction: share of all steps that ``wsd`` decays over; the others ignore it.
        final_fraction: multiplier at the last step; ``constant`` ignores it.
    """

    kind: Kind = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        kinds = ("cosine", "wsd", "linear", "constant")
        if self.kind not in kinds:
            raise UserError(f"optim.schedule.kind is {self.kind!r}; use one of {', '.join(kinds)}")
        if self.warmup_steps < 0:
            raise UserError(f"optim.schedule.warmup_steps is {self.warmup_steps}; use 0 or more")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise UserError(f"optim.schedule.decay_fraction is {self.decay_fraction}; use a share above 0, up to 1")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise UserError(f"optim.schedule.final_fraction is {self.final_fraction}; use a share from 0 to 1")


def lr_at(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Return the multiplier of the base rate at ``step``, the first step being 1.

    Steps past the end keep the last value; step 0 (nothing done yet) gives what step 1 gives.

    >>> config = ScheduleConfig("linear", warmup_steps=2, final_fraction=0.0)
    >>> [round(lr_at(step, 10, config), 3) for step in (1, 2, 6, 10)]
    [0.5, 1.0, 0.5, 0.0]

    Raises:
        UserError: the warm-up (and, for ``wsd``, the decay) does not fit into ``total_steps``.
    """
    decay_steps = _decay_steps(total_steps, config)
    step = min(max(step, 1), total_steps)
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    done = max(0.0, (step - (total_steps - decay_steps)) / decay_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    return config.final_fraction + (1 - config.final_fraction) * left


def _decay_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Return how many steps at the end decay, at least one; check that all of it fits."""
    if total_steps < 1:
        raise UserError(f"a schedule needs at least one step, not {total_steps}; raise the number of steps")
    after_warmup = total_steps - config.warmup_steps
    if after_warmup < 1:
        raise UserError(
            f"optim.schedule.warmup_steps is {config.warmup_steps}, but the run has {total_steps} steps; "
            f"use fewer than {total_steps}"
        )
    if config.kind != "wsd":
        return after_warmup
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    if decay_steps > after_warmup:
        raise UserError(
            f"optim.schedule: {config.warmup_steps} steps of warm-up and {decay_steps} of decay do not fit "
            f"into {total_steps} steps; lower warmup_steps or decay_fraction"
        )
    return decay_steps
