"""A diagnosis on a terminal, in one screen: the curve with its events marked, a table of them, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from poise.dashboard.text import count, number, plural
from poise.postmortem.compare import Comparison
from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.event import Event
from poise.postmortem.steps import curve
from poise.postmortem.trend import Floats, Ints

ROWS: Final = 8
MOST_EVENTS: Final = 12
MOST_NOTES: Final = 6
STYLE: Final = {"critical": "bold red", "warning": "yellow", "note": "dim"}
HEALTH: Final = {"healthy": "bold green", "events": "bold yellow", "damaged": "bold red", "diverged": "bold red"}
MARKS: Final = {"critical": "▲", "warning": "▵", "note": "·"}
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Braille dots of a cell, from the top row to the bottom one, left and right."""


def show(diagnosis: Diagnosis, console: Console, *, everything: bool = False, extra: Sequence[str] = ()) -> None:
    """Print a diagnosis.

    Args:
        diagnosis: of one log.
        console: where to; its width is used.
        everything: notes and all events, too.
        extra: further lines for the end.
    """
    console.print(Group(*_parts(diagnosis, console.width, everything, extra)))


def _parts(d: Diagnosis, width: int, everything: bool, extra: Sequence[str]) -> Iterator[RenderableType]:
    steps, _ = curve(d.log)
    unit = f", loss in {d.log.loss_unit}" if d.log.loss_unit else ""
    span = f", {d.log.step_unit} {steps[0]} to {steps[-1]}" if len(steps) else ""
    yield Text.assemble((d.log.name, "bold"), f": {d.format}, {plural(d.points, 'point')}{span}{unit}")
    yield Text(d.headline, style=HEALTH[d.health])
    if len(steps) > 1:
        yield from _chart(d, width)
    shown = [e for e in d.events if everything or e.severity != "note"]
    if shown:
        yield Text()
        yield from _table(shown, d, everything)
    yield from _advice(shown)
    yield from _small(d, everything)
    notes = d.notes if everything else d.notes[:MOST_NOTES]
    for note in notes:
        yield Text(f"note: {note}", style="dim")
    if len(notes) < len(d.notes):
        yield Text(f"and {len(d.notes) - len(notes)} more notes on the reading; --all shows them", style="dim")
    for line in extra:
        yield Text(line)


# -- the curve -----------------------------------------------------------------------------------------


def _chart(d: Diagnosis, width: int) -> Iterator[Text]:
    """Yield the curve as braille dots, a line of marks, and the steps below."""
    steps, values = curve(d.log)
    good = np.isfinite(values) & (values > 0)
    if good.sum() < 2:
        return
    low, high = float(values[good].min()), float(values[good].max())
    labels = [number(high, 3), number(low, 3)]
    left = max(map(len, labels)) + 1
    columns = max(20, width - left - 2)
    for row, line in enumerate(_dots(steps[good], np.log(values[good]), columns)):
        label = labels[0] if row == 0 else labels[1] if row == ROWS - 1 else ""
        yield Text.assemble((f"{label:>{left}} ", "dim"), ("┤" if label else "│", "dim"), (line, "cyan"))
    yield _marks(d.events, steps, columns, left)
    first, middle, last = (f"{int(s):,}" for s in (steps[0], (steps[0] + steps[-1]) // 2, steps[-1]))
    axis = first.ljust(columns // 2 - len(middle) // 2) + middle
    yield Text(" " * (left + 2) + axis + last.rjust(max(1, columns - len(axis))), style="dim")


def _dots(steps: Ints, x: Floats, columns: int) -> list[str]:
    """Return the rows of a chart: each half column spans its lowest to its highest value."""
    wide, tall = 2 * columns, 4 * ROWS
    span = max(int(steps[-1] - steps[0]), 1)
    at = np.minimum(((steps - steps[0]) * wide // (span + 1)).astype(np.int64), wide - 1)
    low, high = float(x.min()), float(x.max())
    scale = (tall - 1) / (high - low) if high > low else 0.0
    level = np.rint((high - x) * scale).astype(np.int64)  # 0 is the top
    top, bottom = np.full(wide, tall), np.full(wide, -1)
    np.minimum.at(top, at, level)
    np.maximum.at(bottom, at, level)
    filled = np.flatnonzero(bottom >= 0)
    cells = np.zeros((ROWS, columns), dtype=np.int64)
    before = None
    for i in filled:
        a, b = int(top[i]), int(bottom[i])
        if before is not None and before[0] == i - 1:  # neighbours are joined
            a, b = min(a, before[2] + 1), max(b, before[1] - 1)
        for dot in range(a, b + 1):
            cells[dot // 4, i // 2] |= _DOTS[dot % 4][i % 2]
        before = (int(i), int(top[i]), int(bottom[i]))
    return ["".join(chr(0x2800 + c) if c else " " for c in row) for row in cells]


def _marks(events: Sequence[Event], steps: Ints, columns: int, left: int) -> Text:
    """Return the line below the curve with the events' peaks; the worst one of a column is shown."""
    worst = {"note": 0, "warning": 1, "critical": 2}
    span = max(int(steps[-1] - steps[0]), 1)
    cells: dict[int, str] = {}
    for event in events:
        first = int((event.start - steps[0]) * columns // (span + 1))
        last = int((event.end - steps[0]) * columns // (span + 1))
        for column in range(max(first, 0), min(last, columns - 1) + 1):
            if column not in cells or worst[event.severity] > worst[cells[column]]:
                cells[column] = event.severity
    line = Text(" " * (left + 1))
    line.append("└", style="dim")
    for column in range(columns):
        severity = cells.get(column)
        line.append(MARKS[severity] if severity else "─", style=STYLE[severity] if severity else "dim")
    return line


# -- the events ----------------------------------------------------------------------------------------


def _table(shown: Sequence[Event], d: Diagnosis, everything: bool) -> Iterator[RenderableType]:
    order = {"critical": 0, "warning": 1, "note": 2}
    kept = list(shown)
    if not everything and len(shown) > MOST_EVENTS:
        kept = sorted(shown, key=lambda e: (order[e.severity], -abs(_size(e))))[:MOST_EVENTS]
        kept.sort(key=lambda e: e.start)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (d.log.step_unit, "what", "peak", "came back", "likely cause", "cost", "do"):
        table.add_column(name, overflow="fold")
    for e in kept:
        table.add_row(
            f"{e.start}" if e.start == e.end else f"{e.start}-{e.end}",
            Text(e.kind.replace("_", " "), style=STYLE[e.severity]),
            peak_text(e),
            recovery_text(e),
            e.cause.name if e.cause.name == "unknown" else f"{e.cause.name} ({e.cause.certainty})",
            cost_text(e),
            e.advice.action.replace("_", " "),
        )
    yield table
    if len(kept) < len(shown):
        yield Text(f"and {len(shown) - len(kept)} smaller ones; --all shows them", style="dim")


def _advice(shown: Sequence[Event]) -> Iterator[Text]:
    """Yield the evidence of the worst event, and each piece of advice once."""
    serious = [e for e in shown if e.severity != "note"]
    if not serious:
        return
    worst = max(serious, key=lambda e: (e.severity == "critical", e.recovery == "never", abs(_size(e))))
    yield Text()
    if worst.cause.evidence or worst.precursors:
        yield Text(f"Why, for the one at {worst.start}:", style="bold")
        for line in dict.fromkeys([*worst.cause.evidence, *(p.text for p in worst.precursors)]):
            yield Text(f"  {line}")
    said: dict[str, list[Event]] = {}
    for e in serious:
        if e.advice.text:
            said.setdefault(e.advice.action, []).append(e)
    if said:
        yield Text("What to do:", style="bold")
    for action, events in said.items():
        about = ", ".join(str(e.start) for e in events[:4]) + (", ..." if len(events) > 4 else "")
        source = f" [{events[-1].advice.source}]" if events[-1].advice.source else ""
        yield Text.assemble((f"  {action.replace('_', ' ')}", "bold"), f" (at {about}): {events[-1].advice.text}{source}")


def _small(d: Diagnosis, everything: bool) -> Iterator[Text]:
    """Yield one line on the notes, and one on the scores."""
    notes: dict[str, int] = {}
    for e in d.events:
        if e.severity == "note":
            notes[e.kind] = notes.get(e.kind, 0) + 1
    if notes and not everything:
        listed = ", ".join(plural(n, kind.replace("_", " ")) for kind, n in notes.items())
        yield Text(f"Harmless, nothing to do: {listed} (--all lists them)", style="dim")
    scores = [
        f"{name.replace('_', ' ')} {value:.2f} % ({kind.replace('_', '-')})"
        for name, kinds in d.spike_scores.items()
        for kind, value in kinds.items()
    ]
    if scores:
        yield Text(f"Spike score: {', '.join(scores)}", style="dim")


def peak_text(e: Event) -> str:
    """Return how far an event went, e.g. ``3.9 (+31 %) at 2120``."""
    if not math.isfinite(e.value):
        return f"{e.value} at {e.peak}"
    rise = f" ({100 * e.rise:+.3g} %)" if math.isfinite(e.rise) else ""
    name = "" if e.signal == "loss" else f"{e.signal.replace('_', ' ')} "
    return f"{name}{number(e.value)}{rise} at {e.peak}"


def recovery_text(e: Event) -> str:
    """Return whether it came back, with what stayed."""
    text = {"returned": "yes", "partly": "partly", "never": "no", "open": "log ends"}[e.recovery]
    if e.recovery in ("partly", "never") and math.isfinite(e.lasting):
        text += f", {100 * e.lasting:+.2g} %"
    return text


def cost_text(e: Event) -> str:
    """Return the cost in steps, and in tokens where known."""
    if e.severity == "note" or not e.cost.steps:
        return "-"
    tokens = f", {count(e.cost.tokens)} tokens" if e.cost.tokens else ""
    return f"{e.cost.steps:,}{tokens}"


def _size(e: Event) -> float:
    return e.rise if math.isfinite(e.rise) else math.inf


# -- several logs --------------------------------------------------------------------------------------


def compared(diagnoses: Sequence[Diagnosis], console: Console) -> None:
    """Print one line a log."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("log", "format", "points", "last loss", "health", "events", "lost", "spike score"):
        table.add_column(name, overflow="fold")
    for d in diagnoses:
        _, values = curve(d.log)
        serious = sum(e.severity != "note" for e in d.events)
        score = d.spike_scores.get("loss", {}).get("olmo2")
        table.add_row(
            d.log.name,
            d.format,
            f"{d.points:,}",
            number(float(np.median(values[-9:])) if len(values) else None, 3),
            Text(d.health, style=HEALTH[d.health]),
            f"{serious} (+{len(d.events) - serious} notes)",
            f"{d.lost_steps:,} ({100 * (1 - d.ettr):.2g} %)",
            "–" if score is None else f"{score:.2f} %",
        )
    console.print(table)


def verdict(comparison: Comparison, console: Console) -> None:
    """Print what two logs show together."""
    console.print(Text(f"{comparison.a} and {comparison.b}: {comparison.verdict}", style="bold"))
    for line in comparison.evidence:
        console.print(Text(f"  {line}"))
