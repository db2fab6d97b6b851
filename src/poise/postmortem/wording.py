"""A diagnosis in words, the same on the terminal and on the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from poise.dashboard.text import count, number
from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.event import Advice, Event
from poise.postmortem.steps import curve, rise_text

RANK: Final = {"note": 0, "warning": 1, "critical": 2}

KINDS: Final[dict[str, str]] = {
    "fast_spike": "the loss leaves its trend upwards within a few steps and comes down again",
    "slow_divergence": "the loss climbs above the best level it has had, and stays above it for long",
    "level_shift": "a step upwards of the loss, large or small, that stays",
    "nonfinite": "the loss or the gradient norm is NaN or infinite",
    "chaotic": "the loss is far above its best level for long, and erratic",
    "collapse": "the loss falls far faster than training can make it fall",
    "plateau": "the loss hardly falls, from the beginning of the log to its end",
    "level_drop": "a step downwards of the loss, as at the end of an epoch or where the data change",
    "logit_growth": "attention logits leave the range in which a softmax works, and go on growing",
    "data_outlier": "one odd batch: the loss stands out for one point and leaves nothing behind",
    "early_transient": "the first steps are above the loss of knowing nothing, and settle",
    "grad_spike": "the gradient norm stands out and the loss does not follow",
}
"""What is called what."""

_TAKEN: Final = re.compile(r"column '(.{0,200})' is taken as (\w{1,40})")


@dataclass(frozen=True, slots=True)
class Todo:
    """One piece of advice, and the events that it is for.

    Attributes:
        advice: that of the worst of them.
        events: in order of their start.
    """

    advice: Advice
    events: tuple[Event, ...]


def todos(events: Iterable[Event]) -> list[Todo]:
    """Return each piece of advice once; of the events that need a reaction, the worst first."""
    groups: dict[tuple[str, str], list[Event]] = {}
    for event in worst_first(e for e in events if e.severity != "note" and e.advice.text):
        groups.setdefault((event.advice.action, event.advice.source), []).append(event)
    return [Todo(_said_of(group).advice, tuple(sorted(group, key=lambda e: e.start))) for group in groups.values()]


def _said_of(group: list[Event]) -> Event:
    """Return the event whose advice holds for all: the worst; of those that came back, the one that took longest."""
    if all(event.recovery == "returned" for event in group):
        return max(group, key=lambda event: event.end - event.peak)
    return group[0]


def worst_first(events: Iterable[Event]) -> list[Event]:
    """Return the events by severity, then by what stayed, then by height."""
    return sorted(
        events, key=lambda e: (RANK[e.severity], e.recovery == "never", e.recovery == "partly", height(e)), reverse=True
    )


def height(event: Event) -> float:
    """Return how far an event went, relative; infinity where it has no number."""
    return abs(event.rise) if math.isfinite(event.rise) else math.inf


def evidence(event: Event) -> list[str]:
    """Return what speaks for the cause and what came before, each sentence once."""
    texts = list(dict.fromkeys([*event.cause.evidence, *(p.text for p in event.precursors)]))
    return [text for text in texts if not any(text != other and text in other for other in texts)]


def starts_text(events: Sequence[Event], most: int = 4) -> str:
    """Return where events began, e.g. ``877, 2097, ...``."""
    return ", ".join(str(e.start) for e in events[:most]) + (", ..." if len(events) > most else "")


def span_text(event: Event) -> str:
    """Return the steps of an event, e.g. ``877-934``."""
    return f"{event.start}" if event.start == event.end else f"{event.start}-{event.end}"


def peak_text(event: Event) -> str:
    """Return the reading at the peak and how far above the trend that is, e.g. ``3.90 (+31 %)``."""
    name = event.signal.replace("_", " ")
    name = "" if name == "loss" else f"{name if len(name) <= 24 else name[:21] + '...'} "
    if not math.isfinite(event.value):
        return f"{name}{number(event.value)}"
    return f"{name}{number(event.value)}" + (f" ({rise_text(event.rise)})" if math.isfinite(event.rise) else "")


def recovery_text(event: Event) -> str:
    """Return whether it came back, with what stayed."""
    text = {"returned": "yes", "partly": "partly", "never": "no", "open": "log ends"}[event.recovery]
    if event.recovery == "open" and event.advice.action == "nothing" and event.advice.text:
        return "cannot be told"
    if event.recovery in ("partly", "never") and math.isfinite(event.lasting):
        text += f", {rise_text(event.lasting)}"
    return text


def cost_text(event: Event) -> str:
    """Return the cost in steps, and in tokens where known."""
    if event.severity == "note" or not event.cost.steps:
        return "-"
    tokens = f", {count(event.cost.tokens)} tokens" if event.cost.tokens else ""
    return f"{event.cost.steps:,}{tokens}"


def cause_text(event: Event) -> str:
    """Return the cause and how sure it is."""
    return event.cause.name if event.cause.name == "unknown" else f"{event.cause.name} ({event.cause.certainty})"


def short_source(source: str) -> str:
    """Return the names of sources without what they say.

    >>> short_source("Marin 32B report: QK-norm stopped them; PaLM (arXiv 2204.02311, section 5.1): back 100 steps")
    'Marin 32B report; PaLM (arXiv 2204.02311, section 5.1)'
    """
    return "; ".join(dict.fromkeys(part.split(": ")[0].strip() for part in source.split("; ") if part.strip()))


def note_texts(notes: Sequence[str]) -> list[str]:
    """Return the remarks on the reading, those on plain names of columns together in one."""
    names = [found.groups() for note in notes if (found := _TAKEN.fullmatch(note))]
    rest = [note for note in notes if not _TAKEN.fullmatch(note)]
    if not names:
        return rest
    columns = ", ".join(f"'{raw}' is {name}" for raw, name in names)
    return [*rest, f"columns: {columns}"]


def scores_text(diagnosis: Diagnosis) -> str:
    """Return the spike scores in one line; empty where the log is too short for any."""
    return "; ".join(
        f"{name.replace('_', ' ')} "
        + ", ".join(f"{value:.2f} % ({kind.replace('_', '-')})" for kind, value in kinds.items())
        for name, kinds in diagnosis.spike_scores.items()
    )


def last_loss(diagnosis: Diagnosis) -> float | None:
    """Return the median of the last nine values; ``None`` where there are none."""
    _, values = curve(diagnosis.log)
    tail = sorted(values[-9:].tolist(), key=lambda v: (math.isnan(v), v))
    return tail[len(tail) // 2] if tail else None


def plain(text: str, longest: int = 2000) -> str:
    """Return text of a log as printable characters in one line: nothing in it may steer a terminal.

    >>> plain("a\\x1b[31mb\\nc")
    'a?[31mb c'
    """
    kept = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in kept)
