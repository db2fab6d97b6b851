"""What a guard can ask of whoever owns the training loop.

``Host`` is what every host offers. ``Mender``, ``Curator`` and ``Rewinder`` are what some offer besides; a guard asks
``isinstance(host, Mender)`` and does without where it is not. All ranks call a method together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable


@runtime_checkable
class Host(Protocol):
    """The owner of weights, optimizer, data position and checkpoints.

    Responses speak to this protocol and never touch an optimizer or a checkpoint themselves, so the
    same guard works in our trainer and in anybody's loop.
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

    def scale_lr(self, factor: float, rewarm: int = 0) -> None:
        """Multiply the learning rate by ``factor`` from the next step on; with ``rewarm``, climb back over so many."""
        ...

    def reset_moments(self, places: Sequence[str] = ()) -> None:
        """Zero the optimizer's moments (of ``places``, of all where empty); weights stay."""
        ...

    def halt(self, reason: str) -> None:
        """End the run after the current step, saying why."""
        ...


@runtime_checkable
class Mender(Protocol):
    """A host that can mend weights in place."""

    def qk_clip(self, places: Sequence[str], threshold: float) -> None:
        """Scale W_q and W_k of ``places`` so that the largest attention logit last seen becomes ``threshold``."""
        ...

    def raise_precision(self, places: Sequence[str]) -> None:
        """Compute ``places`` in fp32 from now on."""
        ...


@runtime_checkable
class Curator(Protocol):
    """A host that knows which documents its samples show."""

    def drop_documents(self, documents: Sequence[int]) -> None:
        """Leave these documents, by their numbers in the training text, out of the loss from the next step on."""
        ...


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay gave: one value a step; ``loss`` and ``grad_norm`` as floats, NaN where not finite."""

    from_step: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    digest: str
    """Hash of the weights afterwards: two replays of the same steps on sound hardware have the same."""


@runtime_checkable
class Rewinder(Protocol):
    """A host that can go back, train again on the side, and come back as if nothing had happened."""

    def replay(self, at_most: int, steps: int, data: Literal["same", "other"]) -> Replayed:
        """Train ``steps`` steps from a checkpoint at or before ``at_most``; then restore the present, bit for bit.

        Args:
            at_most: newest step of the checkpoint.
            steps: how many steps to train from there.
            data: ``same`` shows the samples that the run was shown then; ``other`` shows samples it has not seen.

        Raises:
            UserError: there is no such checkpoint.
        """
        ...


Evidence = Mapping[str, float]
"""Readings taken on alarm, named like those of ``Signals.extra``."""
