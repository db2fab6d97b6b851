"""Observers watch a run and cannot steer it: four read-only hook points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poise.core.types import Decision, Signals


@dataclass(frozen=True, slots=True)
class StepReport:
    """What an observer is told about a step.

    Attributes:
        signals, decision: as the guard saw and decided them.
        seconds: wall time of the step.
        tokens_per_s: tokens of this step over its wall time.
        smooth: exponentially smoothed loss, flagged steps left out.
        total_steps: the run's budget.
        guard_state: a few words on what the guard is doing.
    """

    signals: Signals
    decision: Decision
    seconds: float
    tokens_per_s: float
    smooth: float
    total_steps: int
    guard_state: str


class Observer:
    """Override what you need; an exception in an observer is logged and does not end the run."""

    def on_start(self, run_record: Mapping[str, Any]) -> None:
        """Called once, with the journal's ``run`` record."""

    def on_step(self, report: StepReport) -> None:
        """Called after each step has been decided and carried out."""

    def on_save(self, record: Mapping[str, Any]) -> None:
        """Called after a checkpoint was committed (or could not be), with its journal record."""

    def on_note(self, text: str) -> None:
        """Called with one line a person should see (an alarm acted upon, a validation loss)."""

    def on_end(self, record: Mapping[str, Any]) -> None:
        """Called once, with the journal's ``end`` record."""
