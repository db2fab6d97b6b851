"""Everything that is said about a log, in one value: ``diagnose(read_log(path))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from poise.postmortem import events as finder
from poise.postmortem import scores, units
from poise.postmortem.advice import advise
from poise.postmortem.cause import name_cause
from poise.postmortem.compare import Comparison, compare, explain_with
from poise.postmortem.cost import Total, cost, counts_tokens, total_cost
from poise.postmortem.event import Event
from poise.postmortem.log import Log
from poise.postmortem.precursors import precursors
from poise.postmortem.rates import read_rates
from poise.postmortem.steps import BENIGN_KINDS, curve, number

Health = Literal["healthy", "events", "damaged", "diverged"]
"""``healthy``: nothing that needs a reaction; ``events``: something, and the loss is on its trend again; ``damaged``: a
level that stayed up; ``diverged``: the log ends with a loss that is lost."""


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
    if tokens_per_step is None and not counts_tokens(log):
        tokens_per_step = units.tokens_per_step(log.series, log.settings)
    events = explain(log, finder.find(log), tokens_per_step)
    total = total_cost(events, log, tokens_per_step)
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
        notes=tuple(log.notes),
    )


def beside(one: Diagnosis, other: Diagnosis) -> tuple[Diagnosis, Comparison]:
    """Return the first diagnosis with what the second run says of its events, and the comparison itself."""
    comparison = compare(one.log, other.log, one.events, other.events)
    events = []
    for event in one.events:
        told = explain_with(event, comparison)
        if told.cause.name != event.cause.name:
            told = dataclasses.replace(told, advice=advise(one.log, told, one.events))
        events.append(told)
    return dataclasses.replace(one, events=tuple(events)), comparison


def explain(log: Log, found: Sequence[Event], tokens_per_step: int | None = None) -> tuple[Event, ...]:
    """Return the events with precursors, causes, costs and advice, in order of their start."""
    found = sorted(found, key=lambda event: (event.start, event.end))
    out, rates = [], read_rates(log)
    for event in found:
        before = precursors(log, event, rates)
        event = dataclasses.replace(event, precursors=before, cost=cost(log, event, tokens_per_step))
        event = dataclasses.replace(event, cause=name_cause(log, event, found, before, rates))
        out.append(dataclasses.replace(event, advice=advise(log, event, found)))
    return tuple(out)


def health_of(log: Log, events: Sequence[Event]) -> Health:
    """Return how the run is, by its events."""
    serious = [event for event in events if _serious(event)]
    if not serious:
        return "healthy"
    _, values = curve(log)
    lost = {"nonfinite", "slow_divergence", "chaotic", "plateau"}
    if any(event.kind in lost and event.recovery == "never" for event in serious):
        return "diverged"
    if len(values) and not np.isfinite(values[-1]):
        return "diverged"
    if any(event.recovery in ("never", "partly") for event in serious):
        return "damaged"
    return "events"


def headline(log: Log, events: Sequence[Event], health: Health, total: Total) -> str:
    """Return all of it in one plain sentence."""
    steps, _ = curve(log)
    span = f"{len(steps)} points, {log.step_unit} {steps[0]} to {steps[-1]}" if len(steps) else "no points"
    serious = [event for event in events if _serious(event)]
    notes = [event for event in events if not _serious(event)]
    if health == "healthy":
        small = f" (noted: {_count(notes)})" if notes else ""
        return f"Healthy: nothing that needs a reaction in {span}{small}."
    lost = f"{total.steps} {log.step_unit} ({total.share:.1%}) lost"
    counts = _count(serious)
    if health == "events":
        back = "all back on trend" if all(e.recovery == "returned" for e in serious) else "the last one still open"
        if any(e.signal != "loss" for e in serious) or not total.steps:
            return f"{_capital(counts)} in {span}."
        return f"{_capital(counts)} in {span}, {back}; {lost}."
    worst = max(
        (e for e in serious if e.recovery in ("never", "partly", "open")),
        key=lambda e: (e.recovery == "never", e.kind in _LOST, e.start),
    )
    if health == "diverged":
        how = _LOST.get(worst.kind, "has left its trend")
        return f"Diverged: the loss {how} from step {worst.start} on; {lost}."
    what = _NAMES[worst.kind][0]
    stayed = f"{worst.lasting:+.1%}" if np.isfinite(worst.lasting) else f"from {number(worst.baseline)}"
    return f"Damaged: after the {what} at step {worst.start} the loss stayed up ({stayed}; {counts}; {lost})."


_LOST = {
    "nonfinite": "is not finite",
    "slow_divergence": "climbs and does not come back",
    "chaotic": "is erratic and does not come back",
    "plateau": "does not fall any more",
}
_NAMES = {
    "fast_spike": ("loss spike", "loss spikes"),
    "slow_divergence": ("slow divergence", "slow divergences"),
    "level_shift": ("level shift", "level shifts"),
    "nonfinite": ("stretch without a finite loss", "stretches without a finite loss"),
    "chaotic": ("chaotic stretch", "chaotic stretches"),
    "collapse": ("collapse of the loss", "collapses of the loss"),
    "plateau": ("stretch without learning", "stretches without learning"),
    "logit_growth": ("growth of attention logits", "growths of attention logits"),
    "data_outlier": ("odd batch", "odd batches"),
    "early_transient": ("transient at the start", "transients at the start"),
    "grad_spike": ("gradient-norm outlier", "gradient-norm outliers"),
}


def _serious(event: Event) -> bool:
    return event.severity != "note" and event.kind not in BENIGN_KINDS


def _count(events: Sequence[Event]) -> str:
    counts: dict[str, int] = {}
    for event in events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    return ", ".join(f"{n} {_NAMES[kind][n > 1]}" for kind, n in counts.items())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
