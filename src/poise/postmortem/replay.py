"""What would the guard have done? The guard of a running job, shown a recorded log step by step.

It is the very same guard (``poise.guard.guard.build``) and sees the steps in order, so an alarm at a step knows nothing
of what comes later. It runs in ``observe`` mode: the log goes on as it did, whatever the guard would have liked, and
the guard is not made to believe otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.core.errors import UserError
from poise.core.types import Alarm, Decision, Proceed, Severity, Signals, Watch
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard, build
from poise.postmortem.log import Log
from poise.postmortem.readers.names import GRAD_NORM, LOSS, LR, TOKENS

UNKNOWN_NORM = 0.0
"""Stands for a gradient norm that was not logged: finite, and not judged by any detector."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One alarm, and what the guard would have done at its step.

    Attributes:
        trace: name of the log.
        step: the step at which it was raised, before that step's update.
        kind, severity, signal, value, expected, detector, place, message: of the alarm; see ``poise.Alarm``.
        about: the step it speaks of; earlier than ``step`` where a detector had to wait to be sure.
        action: what the guard would have done, e.g. ``skip``; ``proceed`` is nothing.
        reason: why that, in the guard's words.
        cause: of the guard's verdict at this step; empty when it gave none.
    """

    trace: str
    step: int
    kind: str
    severity: Severity
    action: str
    signal: str
    value: float
    expected: float
    detector: str
    place: str
    message: str
    reason: str
    about: int
    cause: str = ""

    def record(self) -> dict[str, Any]:
        """Return the fields by name, in their order."""
        return dataclasses.asdict(self)


def replay(log: Log, config: GuardConfig | None = None) -> Iterator[Finding]:
    """Show ``log`` to the guard that ``config`` describes; yield its findings as they come up.

    A step at which something would have been done without an alarm of its own (the policy's patience has ended) gives
    one finding too: that of the last alarm before it, with the policy as its detector.

    Args:
        log: from ``read_log``; the steps with a loss are shown.
        config: defaults are those of a run. ``mode`` is always ``observe`` here.

    Raises:
        UserError: the log has no loss.
    """
    guard = _observer(config or GuardConfig())
    last: Alarm | None = None
    for signals in signals_of(log):
        with _quietly():
            decision = _would(guard.decide(signals))
        for alarm in decision.alarms:
            if alarm.severity != "note":
                last = alarm
            yield _finding(log.name, signals.step, alarm, decision)
        if not decision.alarms and last is not None and not isinstance(decision, Proceed):
            value = signals.loss if last.signal == LOSS else last.value
            late = dataclasses.replace(last, detector="policy", value=value, message=decision.reason)
            yield _finding(log.name, signals.step, late, decision)


def signals_of(log: Log) -> Iterator[Signals]:
    """Yield the signals of each logged step, as a guard would have been given them.

    A gradient norm that was not logged is 0, which no detector judges. Learning rate and tokens keep their last value
    until the next; before the first they are 0. All other columns are in ``extra`` at the steps that have them.

    Raises:
        UserError: the log has no loss.
    """
    if LOSS not in log.series:
        raise UserError(f"'{log.path}' has no loss to replay; name its column with --loss-column NAME")
    steps, losses = log.series[LOSS]
    lr = _held(log, LR, steps)
    tokens = _held(log, TOKENS, steps)
    norm = np.full(len(steps), UNKNOWN_NORM)
    extras: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for name, (at, values) in log.series.items():
        shared, where, which = np.intersect1d(steps, at, assume_unique=True, return_indices=True)
        if name == GRAD_NORM:
            norm[where] = values[which]
        elif name not in (LOSS, LR, TOKENS) and len(shared):
            extras.append((name, where, values[which]))
    nexts = [0] * len(extras)
    for i in range(len(steps)):
        extra: dict[str, float] = {}
        for k, (name, where, values) in enumerate(extras):
            if nexts[k] < len(where) and where[nexts[k]] == i:
                extra[name] = float(values[nexts[k]])
                nexts[k] += 1
        yield Signals(int(steps[i]), float(losses[i]), float(norm[i]), float(lr[i]), int(tokens[i]), extra)


def _observer(config: GuardConfig) -> Guard:
    """Return the guard, told that what it decides is not carried out."""
    return build(dataclasses.replace(config, mode="observe"))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the guard from warning of a step that is long past; its findings say the same."""
    logger = logging.getLogger("poise")

    def reject(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(reject)
    try:
        yield
    finally:
        logger.removeFilter(reject)


def _would(decision: Decision) -> Decision:
    """Return what an observing guard says it would have done; a decision that waits is its own."""
    would = decision.would if isinstance(decision, Watch) else None
    return decision if would is None else dataclasses.replace(would, verdict=decision.verdict)


def _held(log: Log, name: str, steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a slowly changing series at ``steps``: its last finite value so far, 0 before the first."""
    if name not in log.series:
        return np.zeros(len(steps))
    at, values = log.series[name]
    at, values = at[np.isfinite(values)], values[np.isfinite(values)]
    before = np.searchsorted(at, steps, side="right")
    return np.concatenate([[0.0], values])[before]


def _finding(trace: str, step: int, alarm: Alarm, decision: Decision) -> Finding:
    return Finding(
        trace=trace,
        step=step,
        kind=alarm.kind,
        severity=alarm.severity,
        action=decision.action,
        signal=alarm.signal,
        value=alarm.value,
        expected=alarm.expected,
        detector=alarm.detector,
        place=alarm.place,
        message=alarm.message,
        reason=decision.reason,
        about=alarm.step,
        cause=decision.verdict.cause if decision.verdict is not None else "",
    )
