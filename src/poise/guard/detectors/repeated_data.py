"""Repeated data: the loader shows what it has shown a moment ago.

Formula: with f_t the fingerprint of step t's input and d = t - (the last step with the same fingerprint):

    critical   d = 1; or d <= 64 and the step before was repeated too, from the same distance. Every such step.
    warning    the same, but the repetition covers everything the run has seen: a data set of d steps, or a loader
               that never advanced. Once.
    note       any other repetition within ``window`` steps: an epoch that begins again in the same order, or one
               chance repetition. Once for a row of repetitions.

Where lone repetitions are common (3 in memory: sampling with replacement from few documents), two more in a row are
asked for. Source: own; repeated data after a faulty resume fake a low loss and then a step up (stas00, The Art of
Debugging). Differs: nothing published.
Acts: every step with a fingerprint. Cost: one dictionary look-up. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State

CARD: Final = Card(
    name="repeated_data",
    kind="detector",
    title="Alarm when the loader repeats batches that it has just shown",
    citation="own; no paper",
    formula="same fingerprint as the step before, or as d <= 64 steps before for two steps running",
    acts="every step with a fingerprint",
    cost="one dictionary look-up",
    off="guard.enabled = false",
)

LONE_ARE_COMMON: Final = 3
EXTRA: Final = 2


class RepeatedData:
    """Raises ``repeated_data``: critical for a loop, warning for a tiny data set, note for an epoch."""

    name = "repeated_data"

    def __init__(self, *, window: int = 1024, near: int = 64) -> None:
        """Remember the fingerprints of ``window`` steps; a loop is one of at most ``near`` steps."""
        assert 1 <= near <= window
        self._window = window
        self._near = near
        self._seen: dict[int, int] = {}
        """Fingerprint -> the last step that had it, in the order of the steps."""
        self._row: list[int] = []
        """Step, distance and length of the row of repetitions that is under way."""
        self._lone: list[int] = []
        self._told_all = False
        self._forgot = False
        self._newest = 0
        self._retries = 0
        """Steps that were taken again with the next batch: they count as steps here, as data go on."""

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if this step's data were shown before."""
        mark = signals.extra.get("fingerprint", math.nan)
        step = self._time(signals.step)
        self._forget_from(step)
        if not math.isfinite(mark):
            return None
        self._newest = step
        key = int(mark)
        before = self._seen.pop(key, None)
        alarm = None if before is None else self._judge(step, before, mark)
        if before is None:
            self._end_row(step)
        self._seen[key] = step
        self._forget_old(step)
        return alarm

    def state_dict(self) -> State:
        """Return fingerprints and rows, exact."""
        return {
            "seen": [[key, step] for key, step in self._seen.items()],
            "row": list(self._row),
            "lone": list(self._lone),
            "told_all": self._told_all,
            "forgot": self._forgot,
            "newest": self._newest,
            "retries": self._retries,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen = {int(key): int(step) for key, step in state["seen"]}
        self._row = [int(value) for value in state["row"]]
        self._lone = [int(step) for step in state["lone"]]
        self._told_all = bool(state["told_all"])
        self._forgot = bool(state["forgot"])
        self._newest = int(state["newest"])
        self._retries = int(state["retries"])

    def _judge(self, step: int, before: int, mark: float) -> Alarm | None:
        distance = step - before
        if self._row and self._row[1] == distance:
            self._row = [step, distance, self._row[2] + 1]
        else:
            self._end_row(step)
            self._row = [step, distance, 1]
        length = self._row[2]
        need = (1 if distance == 1 else 2) + (EXTRA if len(self._lone) >= LONE_ARE_COMMON else 0)
        everything = len(self._seen) + 1 <= distance and not self._forgot
        severity: Literal["note", "warning", "critical"]
        if distance > self._near or length < need:
            if length > 1:
                return None
            severity, story = "note", f"the same input as at step {before}"
        elif everything:
            if self._told_all:
                return None
            self._told_all = True
            severity, story = "warning", f"the run has seen {distance} different inputs and goes round in them"
        else:
            severity, story = "critical", f"the loader repeats itself: the same input as {distance} steps before"
        return Alarm(
            kind="repeated_data",
            severity=severity,
            step=step - self._retries,
            signal="fingerprint",
            value=mark,
            expected=math.nan,
            detector=self.name,
            message=f"{story}, {length} in a row" if severity != "warning" else story,
        )

    def _end_row(self, step: int) -> None:
        if self._row and self._row[2] == 1:
            self._lone.append(self._row[0])
        self._row = []
        self._lone = [at for at in self._lone if at > step - self._window]

    def _forget_old(self, step: int) -> None:
        while self._seen:
            key, at = next(iter(self._seen.items()))
            if at > step - self._window:
                return
            del self._seen[key]
            self._forgot = True

    def _time(self, step: int) -> int:
        """Return the step's number among all that were shown data; it goes back only where the data may have."""
        if step + self._retries == self._newest:
            self._retries += 1
        return step + self._retries

    def _forget_from(self, step: int) -> None:
        """Drop what was seen at ``step`` or later; an earlier showing of the same input is lost with it."""
        if step > self._newest:
            return
        self._newest = step - 1
        self._seen = {key: at for key, at in self._seen.items() if at < step}
        self._lone = [at for at in self._lone if at < step]
        if self._row and self._row[0] >= step:
            self._row = []
