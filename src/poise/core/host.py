"""What a guard can ask of whoever owns the training loop."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Host(Protocol):
    """The owner of weights, optimizer, data position and checkpoints.

    Responses speak to this protocol and never touch an optimizer or a checkpoint themselves, so the
    same guard works in our trainer and in anybody's loop. All ranks call a method together.
    """

    def rollback(self, at_most: int, drop_data: bool) -> int:
        """Restore the newest verified checkpoint with step <= ``at_most``; return that step.

        Raises:
            UserError: there is no such checkpoint.
        """
        ...

    def drop_data(self, first: int, last: int) -> None:
        """Never show samples ``first`` .. ``last`` (inclusive) again."""
        ...

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rate by ``factor`` from the next step on."""
        ...

    def reset_moments(self) -> None:
        """Zero the optimizer's moments; weights stay."""
        ...

    def halt(self, reason: str) -> None:
        """End the run after the current step, saying why."""
        ...
