"""What a detector is, and helpers that several share. No torch: a detector sees floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from poise.core.types import Alarm, Signals

State = dict[str, Any]
"""A detector's memory as JSON-able values."""


@runtime_checkable
class Detector(Protocol):
    """Takes the signals of one step, causally, and returns an alarm or nothing.

    A detector never learns from what it flagged, is never poisoned by NaN, and gives the same answers
    after ``load_state_dict(state_dict())`` as it would have given without.
    """

    @property
    def name(self) -> str:
        """The name that alarms and saved states carry; unique within a guard."""
        ...

    def update(self, signals: Signals) -> Alarm | None:
        """Judge one step. Steps come in order; after a rollback they go back."""
        ...

    def state_dict(self) -> State:
        """Return everything the detector remembers, JSON-able and exact."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        ...


@runtime_checkable
class Expectant(Protocol):
    """A detector that has to be told when somebody sets weights or moments on purpose."""

    def expect_change(self, places: Sequence[str] = ()) -> None:
        """Take the next reading of ``places`` (of all where empty) as it is."""
        ...
