"""What the guard can ask of our trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from poise.core.errors import UserError
from poise.core.host import Replayed
from poise.data.feed.skips import merged
from poise.train import mend, rewind

if TYPE_CHECKING:
    from poise.train.position import Position
    from poise.train.state import Run


def rewarmed(position: Position, step: int) -> float:
    """Return the factor on the learning rate of ``step`` while it climbs back after a cut; 1 when there was none.

    It is ``rewarm_factor`` at the first step after ``rewarm_start`` and rises by the same amount each step, to 1
    after ``rewarm_steps`` more. Pure, so that a resumed run climbs as the run would have.
    """
    if position.rewarm_steps == 0:
        return 1.0
    done = min(max(step - position.rewarm_start - 1, 0) / position.rewarm_steps, 1.0)
    return position.rewarm_factor + (1.0 - position.rewarm_factor) * done


def no_document(document: int, count: int) -> str:
    """Return what to say where a text of ``count`` documents has no document of a number."""
    return f"no document {document}; the training text has documents 0 to {count - 1}"


class TrainHost:
    """``poise.core.host.Host``, ``Mender``, ``Curator`` and ``Rewinder`` for a ``Run``. All ranks call together."""

    def __init__(self, run: Run) -> None:
        self._run = run

    # -- Host --------------------------------------------------------------------------------------------------

    def rollback(self, at_most: int, drop_data: bool) -> int:
        """Restore the newest verified checkpoint at or before ``at_most``; the data position moves on.

        The samples shown since that checkpoint are not shown again when ``drop_data`` is true: that is
        simply keeping ``next_sample`` where it is. What was done to the learning rate and to the precision stays,
        and a climb of the learning rate goes on from where it was.
        """
        run = self._run
        before = run.position
        loaded = run.restore(at_most, after_rollback=True)
        run.store.discard_after(loaded.step)
        dropped_first = run.position.next_sample
        if drop_data:
            run.position.next_sample = before.next_sample
        self._keep_mends(before)
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

    def _keep_mends(self, before: Position) -> None:
        """Take over into the restored position what the guard changed for good."""
        position = self._run.position
        position.lr_scale = before.lr_scale
        left = max(before.rewarm_start + before.rewarm_steps - before.step, 0)
        position.rewarm_factor = rewarmed(before, before.step + 1)
        position.rewarm_start, position.rewarm_steps = position.step, left
        position.fp32_places = before.fp32_places
        position.skips = before.skips
        position.dropped = [(min(step, position.step), document) for step, document in before.dropped]
        mend.set_precision(self._run.model, position.fp32_places)

    def drop_data(self, first: int, last: int) -> None:
        """Leave samples ``first`` to ``last`` out from now on, exactly them, also when a rollback shows data again."""
        position = self._run.position
        skips = merged([*position.skips, (first, last)])
        if skips != position.skips:
            position.skips = skips
            self._note_drop(samples=(first, last))

    # -- Curator -----------------------------------------------------------------------------------------------

    def drop_documents(self, documents: Sequence[int]) -> None:
        """Leave the tokens of documents (rows of ``docs.arrow``) out of the loss from the next step on.

        Raises:
            UserError: there is no such document.
        """
        run, count = self._run, self._run.loader.document_count
        for document in documents:
            if not 0 <= document < count:
                raise UserError(no_document(document, count))
        known = {document for _, document in run.position.dropped}
        new = sorted(set(documents) - known)
        if new:
            run.position.dropped = [*run.position.dropped, *((run.position.step, d) for d in new)]
            self._note_drop(documents=new)

    def _note_drop(self, **what: Any) -> None:
        if self._run.journal is not None:
            self._run.journal.write("drop", step=self._run.position.step, **what)
        for name, values in what.items():
            shown = " to ".join(map(str, values)) if name == "samples" else ", ".join(map(str, values))
            self._run.tell("on_note", f"left out from here on: {name} {shown}")

    def scale_lr(self, factor: float, rewarm: int = 0) -> None:
        """Multiply the learning rate by ``factor``: of all later steps, or with ``rewarm`` climbing back over so many.

        A cut in the middle of a climb starts a new climb from the product of both.

        Raises:
            UserError: a factor that is negative or not finite, or a negative ``rewarm``.
        """
        if not (math.isfinite(factor) and factor >= 0.0) or rewarm < 0:
            raise UserError(f"scale_lr got factor {factor} and rewarm {rewarm}; use finite numbers of 0 or more")
        position = self._run.position
        if rewarm == 0:
            position.lr_scale *= factor
            return
        position.rewarm_factor = factor * rewarmed(position, position.step + 1)
        position.rewarm_start, position.rewarm_steps = position.step, rewarm

    def reset_moments(self, places: Sequence[str] = ()) -> None:
        """Forget the optimizer's moments of ``places`` (all where empty); they build up again from the next gradient.

        Raises:
            UserError: the model has no such place.
        """
        mend.reset_moments(self._run.optimizer, self._run.model, places)

    def halt(self, reason: str) -> None:
        """Let the loop end after this step, with ``reason`` for the user."""
        self._run.halted = reason

    # -- Mender ------------------------------------------------------------------------------------------------

    @property
    def cannot(self) -> frozenset[str]:
        """Names of the decisions that this run cannot carry out."""
        alone_in_bf16 = self._run.model.compute_dtype == torch.bfloat16 and self._run.world.size == 1
        return frozenset() if alone_in_bf16 else frozenset({"raise_precision"})

    def qk_clip(self, places: Sequence[str], threshold: float) -> None:
        """Scale queries and keys of ``places`` so that the largest attention logit last read becomes ``threshold``.

        Raises:
            UserError: no reading of a place, or a block that cannot be clipped; nothing was changed.
        """
        readings = self._run.last_layers
        gammas = mend.qk_clip(self._run.model, places, threshold, readings)
        for place, gamma in gammas.items():  # so that asking twice before the next reading clips once
            readings[f"{mend.READING}@{place}"] *= gamma

    def raise_precision(self, places: Sequence[str]) -> None:
        """Compute ``places`` in fp32 from now on, also after a rollback or a resume.

        Raises:
            UserError: the run computes in fp32 already, the model is sharded, or there is no such place.
        """
        mend.raise_precision(self._run.model, places)
        self._run.position.fp32_places = list(mend.fp32_places(self._run.model))

    # -- Rewinder ----------------------------------------------------------------------------------------------

    def replay(
        self, at_most: int, steps: int, data: Literal["same", "other"], *, samples_from: int | None = None
    ) -> Replayed:
        """Train ``steps`` steps from a checkpoint at or before ``at_most``; then restore the present, bit for bit.

        See ``poise.train.rewind.replay``.
        """
        return rewind.replay(self._run, at_most, steps, data, samples_from=samples_from)

    def transplant(self, at_most: int, step: int, steps: int) -> Replayed:
        """Show the samples of ``step`` and the steps after it to a checkpoint at or before ``at_most``, at once."""
        return self.replay(at_most, steps, "same", samples_from=step)
