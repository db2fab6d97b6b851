"""Why a loss is no number, from the log alone: rules of ``cause.py``.

set-up       no loss of the log is finite
start-up     the first ones are not, and the later ones are
periodic     every k-th is not, and those between are
too-high LR  the loss had left its trend, or had risen, before
precision    it was a number at one step and none at the next
"""

from __future__ import annotations

from typing import Final

import numpy as np

from poise.core.types import Cause as CauseKind
from poise.core.types import Certainty
from poise.dashboard.text import plural
from poise.postmortem.event import Event
from poise.postmortem.known import Known
from poise.postmortem.steps import between, nth, number, of_loss
from poise.postmortem.trend import Ints

NEAR: Final = 50
"""Steps within which one trouble leads to the next."""

Hint = tuple[str, CauseKind, Certainty, tuple[str, ...]]


def set_up(known: Known, event: Event) -> Hint | None:
    """A log that begins without a finite loss: at fault from the start, where none ever comes."""
    log = known.log
    if known.first is None or event.start > known.first or not of_loss(event):
        return None
    _, values = log.series.get(event.signal, known.curve)
    if np.isfinite(values).any():
        return _start_up(known, event)
    evidence = [f"no {_said(event)} of the log is finite: the first (step {event.start}) is {number(event.value)}"]
    if "grad_norm" in log.series:
        _, norms = between(log.series["grad_norm"], event.start, event.end)
        bad = int((~np.isfinite(norms)).sum())
        evidence.append(f"{bad} of {plural(len(norms), 'gradient norm')} there are not finite either")
    if event.start > 10 * known.unit and event.start > known.interval:
        evidence.append(f"the log begins at step {event.start}, so that what went before is not known")
        return "set-up", "unknown", "possible", tuple(evidence)
    evidence.append("training has done nothing yet: weights, data, number format or the program are at fault")
    return "set-up", "software", "likely", tuple(evidence)


def _start_up(known: Known, event: Event) -> Hint | None:
    steps, values = known.log.series.get(event.signal, known.curve)
    count = int(np.argmax(np.isfinite(values)))
    if count == 0 or not np.isfinite(values[steps > event.end]).any() or known.period(bad_steps(known, event)):
        return None
    verb, pronoun = ("is", "it is") if count == 1 else ("are", "they are")
    text = (
        f"the first {plural(count, 'value')} of the {_said(event)} {verb} not finite, and from step "
        f"{int(steps[count])} on {pronoun}"
    )
    reason = "a log that begins before there is a loss does that, and so does fp16 until its loss scale is found"
    return "start-up", "software", "possible", (text, reason)


def bad_steps(known: Known, event: Event) -> Ints:
    """Return the steps of an event without a finite value."""
    steps, values = between(known.log.series.get(event.signal, known.curve), event.start, event.end)
    return steps[~np.isfinite(values)]


def periodic(known: Known, event: Event) -> Hint | None:
    """Values that are missing at every k-th step, and only there."""
    bad = bad_steps(known, event)
    period = known.period(bad)
    if not period:
        period, bad = known.periods.get(event.signal, 0), known.bad.get(event.signal, bad)
        if not period or np.abs(np.diff(bad[np.abs(bad - event.start) <= period]) - period).min(initial=period):
            return None
    times = f"{len(bad)} times from step {int(bad[0])} to {int(bad[-1])}"
    text = f"the {_said(event)} is not finite at every {nth(period)} step ({times}), and finite between"
    reason = "what is done only there is at fault: a batch, an evaluation, or what is logged"
    return "periodic", "software", "possible", (text, reason)


def after_rise(known: Known, event: Event) -> Hint | None:
    """A loss that rose until it was no number."""
    reach = max(NEAR * known.unit, 3 * known.interval)
    before = [e for e in known.finite if e.start < event.start <= e.end + reach]
    if before:
        last = before[-1]
        text = f"the loss had left its trend at step {last.start} already (up to {number(last.value)})"
        return "too-high LR", "schedule", "possible", (text,)
    _, values = between(known.curve, event.start - 20 * reach, event.start - 1)
    values = values[np.isfinite(values)]
    if len(values) < 10:
        return None
    usual, last3 = float(np.median(values[:-3])), values[-3:]
    spread = 1.4826 * float(np.median(np.abs(values[:-3] - usual)))
    if float(np.min(last3)) < usual + max(4 * spread, 0.05 * abs(usual)):
        return None
    text = f"the loss rose from {number(usual)} to {number(float(last3[-1]))} before it was no number"
    return "too-high LR", "schedule", "possible", (text,)


def bare_nan(known: Known, event: Event) -> Hint | None:
    steps, values = known.log.series.get(event.signal, known.curve)
    end = int(np.searchsorted(steps, event.start))
    for begin in (max(end - 1000, 0), 0):  # far back only where there is nothing near
        before = values[begin:end][np.isfinite(values[begin:end])]
        if len(before):
            break
    else:
        return None
    last = number(float(before[-1]))
    text = f"the {_said(event)} was {last} at the last step before and is {number(event.value)} at once"
    doubt = "an overflow does that; so do a broken batch and a faulty device"
    return "precision", "precision", "possible", (text, doubt)


def _said(event: Event) -> str:
    return {"grad_norm": "gradient norm", "val_loss": "validation loss"}.get(event.signal, event.signal)
