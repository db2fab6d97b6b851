"""What a link of an optimizer chain is.

A link works on one tensor at a time and is pure: ``update`` writes to none of its inputs except that it may
put new tensors into ``state``. So a chain can throw a step away on the device, without asking the host, and
can compile a link per tensor. What has to be known about the whole gradient is declared in ``needs`` and
computed once for the chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

Stage = Literal["gradient", "direction", "update", "weights"]
"""Where a link stands: shape the gradient, choose the direction, shape the update, act on weights."""

STAGES: tuple[Stage, ...] = ("gradient", "direction", "update", "weights")

FACTS = frozenset({"global_norm"})
"""What a link may ask for: ``global_norm`` is the L2 norm of the whole gradient as the chain got it."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a link is told about a step.

    Attributes:
        step: number of updates of this tensor including this one, from 1; 0-dim fp32, on the tensor's device.
        lr: learning rate of the tensor's group.
        weight_decay: decoupled decay of the tensor's group.
        facts: the whole-gradient facts that some link of the chain needs; 0-dim tensors.
    """

    step: Tensor
    lr: float | Tensor
    weight_decay: float
    facts: Mapping[str, Tensor]


@runtime_checkable
class Link(Protocol):
    """One step of the way from gradient to weights.

    Attributes:
        name: the name in recipes and messages.
        stage: where it may stand.
        needs: names out of ``FACTS``.
    """

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def init(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state for ``p``; keys are unique in a chain. ``p`` may be on the meta device."""
        ...

    def update(self, u: Tensor, state: dict[str, Any], p: Tensor, info: Info) -> Tensor:
        """Return the new ``u``.

        Args:
            u: the gradient or what earlier links made of it; for stage ``weights`` the weights as they
                would be after the step. At least fp32.
            state: this tensor's state; entries may be replaced, never written to in place.
            p: the weights before the step, in the precision of ``u``.
            info: step number, rates and facts.
        """
        ...
