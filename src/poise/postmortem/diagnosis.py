"""Everything that is said about a log, in one value: ``diagnose(read_log(path))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from poise.dashboard.text import plural
from poise.postmortem import events as finder
from poise.postmortem import scores, units
from poise.postmortem.advice import advise
from poise.postmortem.cause import name_cause
from poise.postmortem.compare import Comparison, compare, explain_with
from poise.postmortem.cost import Total, cost, total_cost
from poise.postmortem.event import Event
from poise.postmortem.known import Known
from poise.postmortem.log import Log
from poise.postmortem.precursors import precursors
from poise.postmortem.steps import LOSSES, benign, curve, number, of_loss, rise_text
from poise.postmortem.trend import Floats, Ints

Health = Literal["healthy", "events", "damaged", "diverged", "unknown"]
"""``healthy``: nothing that needs a reaction; ``events``: something, and the loss is on its trend again; ``damaged``: a
level that stayed up; ``diverged``: the log ends with a loss that is lost; ``unknown``: nothing can be said, because
there are too few losses, or most of them are zero or negative."""

FEWEST: Final = 8
"""Finite losses that a verdict needs."""

TOLD: Final = 0.05
"""Share of losses that are zero or negative from which on it is told; beyond ``MOST`` nothing is judged."""

MOST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a log shows.

    Attributes:
        log: the log.
        events: in order of their start.
        health: see ``Health``.
        headline: all of it in one sentence.
        lost_steps, lost_tokens: of all events together, each step counted once; tokens ``None`` where not known.
        ettr: 1 - lost steps / all steps.
        spike_scores: series -> definition -> per cent of its values (``scores.py``).
        format: of the reader.
        points: logged points of the loss.
        notes: remarks on the reading.
    """

    log: Log
    events: tuple[Event, ...]
    health: Health
    headline: str
    lost_steps: int
    lost_tokens: int | None
    ettr: float
    spike_scores: Mapping[str, Mapping[str, float]]
    format: str
    points: int
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return all of it for ``core.journal.to_json``."""
        steps, _ = curve(self.log)
        return {
            "name": self.log.name,
            "path": str(self.log.path),
            "format": self.format,
            "points": self.points,
            "first_step": int(steps[0]) if len(steps) else None,
            "last_step": int(steps[-1]) if len(steps) else None,
            "step_unit": self.log.step_unit,
            "loss_unit": self.log.loss_unit,
            "health": self.health,
            "headline": self.headline,
            "lost_steps": self.lost_steps,
            "lost_tokens": self.lost_tokens,
            "ettr": self.ettr,
            "spike_scores": {name: dict(score) for name, score in self.spike_scores.items()},
            "events": [event.record() for event in self.events],
            "restarts": list(self.log.restarts),
            "notes": list(self.notes),
            "settings": len(self.log.settings),
        }


def diagnose(log: Log, *, tokens_per_step: int | None = None) -> Diagnosis:
    """Find and explain the events of a log.

    Args:
        log: what ``read_log`` returned.
        tokens_per_step: where the log does not say it, or says it wrong.
    """
    found = finder.find(log)
    known = Known(log, found)
    if tokens_per_step is None and not known.counts_tokens:
        tokens_per_step = units.tokens_per_step(log.series, log.settings)
    events = explain(log, found, tokens_per_step, known)
    total = total_cost(events, log, tokens_per_step, known)
    health = health_of(log, events)
    return Diagnosis(
        log=log,
        events=events,
        health=health,
        headline=headline(log, events, health, total),
        lost_steps=total.steps,
        lost_tokens=total.tokens,
        ettr=total.ettr,
        spike_scores=scores.spike_scores(log),
        format=log.format,
        points=len(curve(log)[0]),
        notes=(*_remarks(log), *log.notes),
    )


def beside(one: Diagnosis, other: Diagnosis) -> tuple[Diagnosis, Comparison]:
    """Return the first diagnosis with what the second run says of its events, and the comparison itself."""
    comparison = compare(one.log, other.log, one.events, other.events)
    events, known = [], Known(one.log, one.events)
    for event in one.events:
        told = explain_with(event, comparison)
        if told.cause.name != event.cause.name:
            told = dataclasses.replace(told, advice=advise(one.log, told, one.events, known))
        events.append(told)
    return dataclasses.replace(one, events=tuple(events)), comparison


def explain(
    log: Log, found: Sequence[Event], tokens_per_step: int | None = None, known: Known | None = None
) -> tuple[Event, ...]:
    """Return the events with precursors, causes, costs and advice, in order of their start."""
    known = Known(log, found) if known is None else known
    out = []
    for event in known.found:
        before = precursors(log, event, known)
        event = dataclasses.replace(event, precursors=before)
        event = dataclasses.replace(event, cause=name_cause(log, event, known.found, before, known))
        out.append(dataclasses.replace(event, cost=cost(log, event, tokens_per_step, known)))
    known = known.explained(out)  # what is advised for one may rest on another's cause
    return tuple(dataclasses.replace(event, advice=advise(log, event, out, known)) for event in out)


def health_of(log: Log, events: Sequence[Event]) -> Health:
    """Return how the run is, by its events."""
    serious = [event for event in events if _serious(event)]
    of_losses = [event for event in serious if of_loss(event)]
    _, values = _judged(log)
    lost = {"nonfinite", "slow_divergence", "chaotic", "plateau"}
    sparse = {"periodic", "start-up"}
    if any(e.kind in lost and e.recovery == "never" and e.cause.name not in sparse for e in of_losses):
        return "diverged"
    if len(values) and not np.isfinite(values[-1]) and not any(e.cause.name in sparse for e in of_losses):
        return "diverged"
    too_few = not serious and np.isfinite(values).sum() < FEWEST
    if not len(values) or too_few or _unjudged(values) > MOST * len(values):
        return "unknown"
    if not serious:
        return "healthy"
    stayed = [e for e in of_losses if e.kind != "nonfinite" and e.cause.name != "epoch boundary"]
    if any(event.recovery in ("never", "partly") for event in stayed):
        return "damaged"
    return "events"


def headline(log: Log, events: Sequence[Event], health: Health, total: Total) -> str:
    """Return all of it in one plain sentence."""
    steps, _ = curve(log)
    points = plural(len(steps), "point")
    span = f"{points}, {log.step_unit} {steps[0]} to {steps[-1]}" if len(steps) else "no points"
    serious = [event for event in events if _serious(event)]
    notes = [event for event in events if not _serious(event)]
    small = f" (noted: {_count(notes)})" if notes else ""
    if health == "healthy":
        return f"Healthy: nothing that needs a reaction in {span}{small}."
    if health == "unknown":
        return f"{_why_unknown(log)}{f' ({_count(serious)})' if serious else small}."
    lost = f"{plural(total.steps, log.step_unit.removesuffix('s'))} ({total.share:.1%}) lost"
    counts = _count(serious)
    if health == "events":
        if not all(of_loss(e) for e in serious) or not total.steps:
            return f"{_capital(counts)} in {span}."
        return f"{_capital(counts)} in {span}{_back(log, serious)}; {lost}."
    stayed = [e for e in serious if of_loss(e) and e.recovery in ("never", "partly", "open")]
    stayed = stayed or [e for e in serious if of_loss(e)]
    if health == "diverged":
        if not stayed:  # its last value is no number, and nothing is said of it
            return f"Diverged: the last loss is not finite, in {span}."
        worst = max(stayed, key=lambda e: (e.recovery == "never", e.kind in _LOST, e.start))
        how = _LOST.get(worst.kind, "has left its trend")
        return f"Diverged: the loss {how} from step {worst.start} on; {lost}."
    worst = max(
        (e for e in stayed if e.kind != "nonfinite" and e.cause.name != "epoch boundary"),
        key=lambda e: (e.recovery == "never", e.start),
    )
    what = _names(worst)[0]
    size = rise_text(worst.lasting) if np.isfinite(worst.lasting) else f"from {number(worst.baseline)}"
    if worst.kind == "collapse" or worst.lasting < 0:
        return f"Damaged: the loss fell at step {worst.start} and stayed down ({size}; {counts}; {lost})."
    return f"Damaged: after the {what} at step {worst.start} the loss stayed up ({size}; {counts}; {lost})."


def _judged(log: Log) -> tuple[Ints, Floats]:
    """Return the series that decides about health: the loss, or the validation loss; empty where there is neither."""
    name = next((name for name in LOSSES if name in log.series), None)
    return (np.empty(0, np.int64), np.empty(0)) if name is None else log.series[name]


def _unjudged(values: Floats) -> int:
    return int((values <= 0).sum() - (values == -np.inf).sum())


def _remarks(log: Log) -> Iterator[str]:
    """What has to be known to read the diagnosis."""
    _, values = _judged(log)
    bad = _unjudged(values)
    if bad > TOLD * len(values):
        yield f"{bad} of {len(values)} losses are zero or negative and are not judged"


def _why_unknown(log: Log) -> str:
    _, values = _judged(log)
    bad, finite = _unjudged(values), int(np.isfinite(values).sum())
    if not any(name in log.series for name in LOSSES):
        return "Cannot be judged: the log has no loss"
    if bad > MOST * len(values):
        return f"Cannot be judged: {bad} of {len(values)} losses are zero or negative"
    points = "point" if len(values) == finite else "finite point"
    return f"Too short to judge ({plural(finite, points)})"


def _back(log: Log, serious: Sequence[Event]) -> str:
    """Return whether all came back; nothing is said of a fall, and of values that are missing now and then."""
    left = [e for e in serious if e.recovery != "returned"]
    if not left:
        return ", all back on trend"
    if not all(e.recovery == "open" for e in left):
        return ""
    untold = left[0].advice.action == "nothing" and left[0].advice.text
    if len(left) == 1 and left[0] is serious[-1] and not untold:
        return ", the last one still open"
    return f", {len(left):,} not known to be back"


_LOST = {
    "nonfinite": "is not finite",
    "slow_divergence": "climbs and does not come back",
    "chaotic": "is erratic and does not come back",
    "plateau": "does not fall any more",
}
_NAMES: Final[dict[str, tuple[str, str]]] = {
    "fast_spike": ("loss spike", "loss spikes"),
    "slow_divergence": ("slow divergence", "slow divergences"),
    "level_shift": ("level shift", "level shifts"),
    "nonfinite": ("stretch without a finite loss", "stretches without a finite loss"),
    "chaotic": ("chaotic stretch", "chaotic stretches"),
    "level_drop": ("step downwards of the loss", "steps downwards of the loss"),
    "collapse": ("collapse of the loss", "collapses of the loss"),
    "plateau": ("stretch without learning", "stretches without learning"),
    "logit_growth": ("growth of attention logits", "growths of attention logits"),
    "data_outlier": ("odd batch", "odd batches"),
    "early_transient": ("transient at the start", "transients at the start"),
    "grad_spike": ("gradient-norm outlier", "gradient-norm outliers"),
}


def _serious(event: Event) -> bool:
    return event.severity != "note" and not benign(event)


def _names(event: Event) -> tuple[str, str]:
    """Return what an event is called, one and several."""
    if event.kind == "nonfinite" and event.signal == "grad_norm":
        return "stretch without a finite gradient norm", "stretches without a finite gradient norm"
    plain = event.kind.replace("_", " ")
    return _NAMES.get(event.kind, (plain, f"{plain}s"))


def _count(events: Sequence[Event]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for event in events:
        counts[_names(event)] = counts.get(_names(event), 0) + 1
    return ", ".join(f"{n:,} {names[n > 1]}" for names, n in counts.items())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
