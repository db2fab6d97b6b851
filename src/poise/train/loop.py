"""The loop: steps, evaluations and saves, until the budget is used up or somebody stops it."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from poise.core.types import Decision
from poise.hardware.checkpoint import NonFiniteState, SaveFailed
from poise.train.evaluate import validation_loss
from poise.train.state import Run
from poise.train.step import train_step

PATIENCE = 4
"""Intervals of saving after which a checkpoint is written in the middle of a trouble as well."""

EndReason = Literal["finished", "stopped", "halted"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished`` its budget, was ``stopped`` on request, or ``halted``.

    ``used_up``: not the guard halted it: its mixture has no more samples.
    """

    reason: EndReason
    step: int
    message: str = ""
    used_up: bool = False


class StopRequest:
    """Remembers that SIGTERM or SIGINT asked for a clean end; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen while the block runs; the handlers that were there before come back afterwards."""
        try:
            before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever owns it decides about signals
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(run: Run, stop: StopRequest | None = None) -> Outcome:
    """Run to the end of the budget. Evaluation and saving are lines of this loop.

    Returns how it ended; what happened is in the journal. A run that says it finished or stopped has its last
    state in a committed checkpoint.

    Raises:
        SaveFailed: the first checkpoint or the last one cannot be written.
    """
    config = run.recipe.train
    with (stop or StopRequest()).listening() as asked:
        if run.position.step == 0:
            save(run, must=True)  # so that the guard can go back even from the first steps
        save_due, saved_at = False, run.position.step
        while run.position.step < config.steps:
            if used_up := run.used_up():
                unsaved = save(run, must=True)
                return replace(end(run, "halted", unsaved or used_up), used_up=not unsaved)
            signals, decision = train_step(run)
            run.store.note_progress(signals.step)
            run.tell("on_step", run.report(signals, decision))
            note(run, decision)
            if run.halted is not None:
                return end(run, "halted", run.halted)
            step, last = run.position.step, run.position.step == config.steps
            if config.eval_every and (last or step % config.eval_every == 0):
                evaluate(run)
            stopping = run.stop_agreed(asked.signal is not None)
            # After a rollback or a drop at once, so that a crash does not show the dropped data again.
            save_due |= decision.action in ("rollback", "drop_data")
            save_due |= bool(config.save_every) and step % config.save_every == 0
            # Not in the middle of trouble: a checkpoint is what a rollback trusts. But not for ever.
            overdue = step - saved_at >= PATIENCE * config.save_every
            if last or stopping or (save_due and (overdue or decision.action in ("proceed", "rollback"))):
                if (unsaved := save(run, must=last or stopping)) and (last or stopping):
                    return end(run, "halted", unsaved)
                save_due, saved_at = False, step
            if stopping and not last:
                return end(run, "stopped", f"{asked.signal or 'another rank'} asked for it")
    return end(run, "finished")


def evaluate(run: Run) -> float | None:
    """Measure and journal the validation loss; ``None`` where there is no held-out text."""
    if run.validation is None:
        return None
    config = run.recipe.train
    value = validation_loss(run.model, run.validation, config.eval_batches, config.batch_size, run.world.device)
    run.position.val_loss, run.position.val_step = value, run.position.step
    if run.journal is not None:
        run.journal.write("eval", step=run.position.step, loss=value)
    run.tell("on_note", f"step {run.position.step}: validation loss {value:.4f}")
    return value


def save(run: Run, *, must: bool = False) -> str:
    """Commit a checkpoint; return what went wrong, or an empty text.

    A failure is journalled and shown, and training goes on with the older checkpoints.

    Raises:
        SaveFailed: the disk refused a checkpoint that the run ``must`` have.
    """
    step = run.position.step
    record: dict[str, Any]
    failed = ""
    try:
        saved = run.save()
        record = {"path": saved.path.name, "seconds": round(saved.seconds, 3), "bytes": saved.bytes}
    except (SaveFailed, NonFiniteState) as error:
        if must and isinstance(error, SaveFailed):
            raise
        failed = str(error)
        record = {"path": "", "failed": failed}
        run.tell("on_note", f"step {step}: no checkpoint: {failed}")
    if run.journal is not None:
        run.journal.write("save", step=step, **record)
        run.journal.sync()
    run.tell("on_save", record)
    return failed


def note(run: Run, decision: Decision) -> None:
    """Show what the guard did, where it did something."""
    if decision.action != "proceed":
        run.tell("on_note", f"guard: {decision.action.replace('_', ' ')}: {decision.reason}")


def end(run: Run, reason: EndReason, message: str = "") -> Outcome:
    """Write the last record and tell the observers."""
    step = run.position.step
    record = {"step": step, "reason": reason, "message": message}
    if run.journal is not None:
        run.journal.write("end", **record)
        run.journal.sync()
    run.store.end_attempt()
    run.tell("on_end", record)
    return Outcome(reason, step, message)
