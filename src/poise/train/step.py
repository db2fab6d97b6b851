"""One step of training. Nothing here names a method, an optimizer or a detector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poise.core.types import Clip, Decision, Proceed, Signals, Skip
from poise.guard.responses.dispatch import carry_out

if TYPE_CHECKING:
    from poise.train.state import Run


EMPTY = "none of the step's targets counts: all of it is masked or dropped"


def train_step(run: Run) -> tuple[Signals, Decision]:
    """Do the next step: gradients, one reading, one decision, and what was decided."""
    for batch in run.next_batches():
        run.backward(batch)  # accumulates over micro-batches
    signals = run.read_signals()  # reduced over ranks; the step's one host sync
    decision = run.guard.decide(signals) if not run.empty(signals) else Skip(reason=EMPTY)
    run.record(signals, decision)  # before acting: what was decided survives a crash while acting
    run.senses.settle(signals, decision)
    match decision:
        case Proceed():
            run.optimizer.step()
        case Clip(max_norm=max_norm):
            run.optimizer.step(max_norm=max_norm)
        case Skip(again=again):  # not called: weights and moments stay as they are; the data are used up
            run.position.step -= again  # only the batch is to blame: this step again, with the next one
        case other:
            run.investigate_first(signals, other)
            carry_out(other, run.host)
            run.senses.changed(other)
    run.optimizer.zero_grad(set_to_none=True)
    return signals, decision
