"""What the guard can ask of our trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise.train.state import Run


class TrainHost:
    """``poise.core.host.Host`` for a ``Run``. Every request is journalled."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def rollback(self, at_most: int, drop_data: bool) -> int:
        """Restore the newest verified checkpoint at or before ``at_most``; the data position moves on.

        The samples shown since that checkpoint are not shown again when ``drop_data`` is true: that is
        simply keeping ``next_sample`` where it is.
        """
        run = self._run
        before = run.position
        loaded = run.restore(at_most, after_rollback=True)
        run.store.discard_after(loaded.step)
        dropped_first = run.position.next_sample
        if drop_data:
            run.position.next_sample = before.next_sample
        run.position.lr_scale = before.lr_scale
        if run.journal is not None:
            run.journal.write(
                "rollback",
                step=before.step,
                to=loaded.step,
                dropped_first=dropped_first if drop_data else None,
                dropped_last=before.next_sample - 1 if drop_data else None,
                damaged_checkpoints=loaded.rejected,
            )
        return loaded.step

    def drop_data(self, first: int, last: int) -> None:
        """Move the data position past ``last``; samples before it have been shown already."""
        self._run.position.next_sample = max(self._run.position.next_sample, last + 1)

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rate of all later steps by ``factor``."""
        self._run.position.lr_scale *= factor

    def reset_moments(self) -> None:
        """Forget the optimizer's moments; they build up again from the next gradient."""
        self._run.optimizer.state.clear()

    def halt(self, reason: str) -> None:
        """Let the loop end after this step, with ``reason`` for the user."""
        self._run.halted = reason
