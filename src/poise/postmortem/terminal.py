"""A diagnosis on a terminal, in one screen: the curve with its events marked, a table of them, why, and what to do.

Text of the log itself goes through ``Pen``: no markup and no escape sequence in it takes effect, and what the
terminal's encoding lacks is written in ASCII.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from poise.dashboard.text import MISSING, number, plural
from poise.postmortem.chart import ROWS, ascii_rows, braille_rows, columns_of, peaks_of, roof
from poise.postmortem.compare import Comparison
from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.event import Event
from poise.postmortem.steps import curve
from poise.postmortem.wording import (
    RANK,
    cause_text,
    cost_text,
    evidence,
    last_loss,
    note_texts,
    peak_text,
    plain,
    recovery_text,
    scores_text,
    short_source,
    span_text,
    starts_text,
    todos,
    worst_first,
)

MOST_EVENTS: Final = 8
EXPLAINED: Final = 2
"""Events whose evidence is shown."""

EVIDENCE: Final = 3
MOST_ADVICE: Final = 3
MOST_NOTES: Final = 3
NARROW: Final = 76
"""Columns below which an event is a few lines instead of a row of the table."""

WIDE: Final = 110
"""Columns from which on the table also has the step of the peak, the tokens lost, and what to do."""

STYLE: Final = {"critical": "bold red", "warning": "yellow", "note": "dim"}
HEALTH: Final = {
    "healthy": "bold green",
    "events": "bold yellow",
    "damaged": "bold red",
    "diverged": "bold red",
    "unknown": "bold",
}
_MARKS: Final = {"critical": "▲", "warning": "▵", "note": "·"}
_ASCII: Final = str.maketrans(
    {"▲": "#", "▵": "^", "·": ".", "─": "-", "│": "|", "┤": "|", "└": "+", "–": "-", "…": ".", "×": "x", "±": "~"}
)


_WHOLE: Final = ("steps", "peak", "points", "last loss", "spike score")
"""Columns whose cells are not broken over lines."""


class Pen:
    """Makes texts that a console can show: plain, and in its encoding.

    Attributes:
        ascii: whether the console cannot show the signs of the chart.
    """

    def __init__(self, console: Console) -> None:
        self._encoding = console.encoding
        self.ascii = not _can("⣿▲▵─│┤└·", self._encoding)

    def __call__(self, text: str, style: str = "") -> Text:
        """Return a text for rich, without markup."""
        text = plain(text)
        if self.ascii:
            text = text.translate(_ASCII).encode(self._encoding, "replace").decode(self._encoding)
        return Text(text, style=style)

    def line(self, *parts: tuple[str, str]) -> Text:
        """Return a text of several (text, style)."""
        return Text.assemble(*(self(text, style) for text, style in parts))


def _can(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def show(diagnosis: Diagnosis, console: Console, *, everything: bool = False, extra: Sequence[str] = ()) -> None:
    """Print a diagnosis.

    Args:
        diagnosis: of one log.
        console: where to; its width is used.
        everything: notes and all events, too.
        extra: further lines for the end.
    """
    _print(console, Group(*_parts(diagnosis, Pen(console), console.width, everything, extra)))


def _parts(d: Diagnosis, pen: Pen, width: int, everything: bool, extra: Sequence[str]) -> Iterator[RenderableType]:
    steps, _ = curve(d.log)
    unit = f", loss in {d.log.loss_unit}" if d.log.loss_unit else ""
    span = f", {d.log.step_unit} {steps[0]} to {steps[-1]}" if len(steps) else ""
    yield pen.line((d.log.name, "bold"), (f": {d.format}, {plural(d.points, 'point')}{span}{unit}", ""))
    yield pen(d.headline, HEALTH[d.health])
    if len(steps) > 1:
        yield from _chart(d, pen, width)
    shown = [e for e in d.events if everything or e.severity != "note"]
    if shown:
        yield Text()
        yield from _listed(shown, d, pen, width, everything)
    yield from _why(shown, pen, everything)
    yield from _todo(shown, pen, everything)
    if not everything:
        yield from _harmless(d, pen)
    if scores := scores_text(d):
        yield pen(f"Spike score: {scores}", "dim")
    notes = note_texts(d.notes)
    kept = notes if everything else notes[:MOST_NOTES]
    for note in kept:
        yield _Hanging(pen(f"note: {note}", "dim"), 0, 6)
    if len(kept) < len(notes):
        yield pen(f"and {plural(len(notes) - len(kept), 'more note')} on the reading; --all shows them", "dim")
    for line in extra:
        yield pen(line)


# -- the curve -----------------------------------------------------------------------------------------


def _chart(d: Diagnosis, pen: Pen, width: int) -> Iterator[Text]:
    """Yield the curve, a line of marks, and the steps below."""
    steps, values = curve(d.log)
    good = np.isfinite(values) & (values > 0)
    if good.sum() < 2:
        return
    low, high = float(values[good].min()), float(values[good].max())
    top = roof(steps[good], values[good], peaks_of(d))
    labels = [(">" if top < high else "") + number(top, 3), number(low, 3)]
    left = max(map(len, labels)) + 1
    columns = max(10, width - left - 3)
    span = (int(steps[0]), int(steps[-1]))
    draw = ascii_rows if pen.ascii else braille_rows
    for row, line in enumerate(draw(steps[good], np.log(np.minimum(values[good], top)), columns, span)):
        label = labels[0] if row == 0 else labels[1] if row == ROWS - 1 else ""
        yield pen.line((f"{label:>{left}} ", "dim"), ("┤" if label else "│", "dim"), (line, "cyan"))
    yield _marks(d, pen, span, columns, left)
    first, middle, last = (f"{int(s):,}" for s in (span[0], (span[0] + span[1]) // 2, span[1]))
    half = max(columns // 2 - len(middle) // 2, len(first) + 1)
    axis = first.ljust(half) + middle if half + len(middle) + 1 + len(last) <= columns else first
    yield pen(" " * (left + 2) + axis + last.rjust(max(1 + len(last), columns - len(axis))), "dim")


def _marks(d: Diagnosis, pen: Pen, span: tuple[int, int], columns: int, left: int) -> Text:
    """Return the line below the curve with the events; the worst one of a column is shown."""
    cells: dict[int, str] = {}
    for event in d.events:
        first, last = columns_of(np.array([event.start, event.end]), span, columns).tolist()
        for column in range(max(first, 0), min(last, columns - 1) + 1):
            if column not in cells or RANK[event.severity] > RANK[cells[column]]:
                cells[column] = event.severity
    line = pen.line((" " * (left + 1), ""), ("└", "dim"))
    for column in range(columns):
        severity = cells.get(column)
        line.append(pen(_MARKS[severity] if severity else "─", STYLE[severity] if severity else "dim"))
    return line


# -- the events ----------------------------------------------------------------------------------------


def _listed(shown: Sequence[Event], d: Diagnosis, pen: Pen, width: int, everything: bool) -> Iterator[RenderableType]:
    kept = list(shown)
    if not everything and len(shown) > MOST_EVENTS:
        kept = sorted(worst_first(shown)[:MOST_EVENTS], key=lambda e: e.start)
    if width < NARROW:
        yield from _lines(kept, pen)
    else:
        yield _table(kept, d.log.step_unit, pen, width)
    if len(kept) < len(shown):
        yield pen(f"and {plural(len(shown) - len(kept), 'smaller one')}; --all shows them", "dim")


def _table(kept: Sequence[Event], unit: str, pen: Pen, width: int) -> Table:
    """Return a row an event; what to do is told below, so that a terminal of 80 columns need not have it here."""
    wide = width >= WIDE
    names = (unit, "what", "peak", "came back", "likely cause", "cost", "do")
    table = _empty_table(names if wide else names[:-1], pen)
    table.columns[2].no_wrap = wide or max(len(peak_text(e)) for e in kept) <= 16  # a column's name can be long
    for e in kept:
        at = f" at {e.peak}" if wide and e.start != e.end else ""
        cost = cost_text(e) if wide else cost_text(e).partition(", ")[0]
        cells = (peak_text(e) + at, recovery_text(e), cause_text(e), cost, *([_action(e)] if wide else []))
        table.add_row(pen(span_text(e)), pen(e.kind.replace("_", " "), STYLE[e.severity]), *map(pen, cells))
    return table


def _lines(kept: Sequence[Event], pen: Pen) -> Iterator[RenderableType]:
    """Yield the same for a narrow terminal."""
    for e in kept:
        yield pen.line((span_text(e), "bold"), (" ", ""), (e.kind.replace("_", " "), STYLE[e.severity]))
        back = {"yes": "came back", "no": "did not come back", "log ends": "the log ends before it came back"}
        text = recovery_text(e)
        says = [f"peak {peak_text(e)}", back.get(text, f"came back: {text}"), f"cause: {cause_text(e)}"]
        says += [f"cost: {cost_text(e)}"] * bool(e.cost.steps) + [f"do: {_action(e)}"] * bool(_action(e))
        yield _Hanging(pen("; ".join(says)), 2, 2)


def _action(e: Event) -> str:
    return e.advice.action.replace("_", " ")


def _why(shown: Sequence[Event], pen: Pen, everything: bool) -> Iterator[RenderableType]:
    """Yield the evidence of the worst events; what was said of one is not said again."""
    serious = worst_first(e for e in shown if e.severity != "note")
    known: set[str] = set()
    for event in serious if everything else serious[:EXPLAINED]:
        texts = [text for text in evidence(event) if text not in known]
        known.update(texts)
        if not texts:
            continue
        if len(known) == len(texts):
            yield Text()
        yield pen(f"Why, for the one at {event.start}:", "bold")
        kept = texts if everything else texts[:EVIDENCE]
        for text in kept:
            yield _Hanging(pen(text), 2, 2)
        if len(kept) < len(texts):
            yield pen(f"  and {plural(len(texts) - len(kept), 'more sign')}; --all shows them", "dim")


def _todo(shown: Sequence[Event], pen: Pen, everything: bool) -> Iterator[RenderableType]:
    """Yield each piece of advice once, with whose practice it is."""
    found = todos(shown)
    if not found:
        return
    yield pen("What to do:", "bold")
    for todo in found if everything else found[:MOST_ADVICE]:
        source = todo.advice.source if everything else short_source(todo.advice.source)
        text = pen.line(
            (f"{todo.advice.action.replace('_', ' ')}", "bold"),
            (f" (at {starts_text(todo.events)}): {todo.advice.text}", ""),
            (f" [{source}]" if source else "", "dim"),
        )
        yield _Hanging(text, 2, 4)
    if not everything and len(found) > MOST_ADVICE:
        yield pen(f"  and {len(found) - MOST_ADVICE} more; --all shows them", "dim")


def _harmless(d: Diagnosis, pen: Pen) -> Iterator[Text]:
    notes: dict[str, int] = {}
    for e in d.events:
        if e.severity == "note":
            notes[e.kind] = notes.get(e.kind, 0) + 1
    if notes:
        listed = ", ".join(plural(n, kind.replace("_", " ")) for kind, n in notes.items())
        yield pen(f"Harmless, nothing to do: {listed} (--all lists them)", "dim")


# -- several logs --------------------------------------------------------------------------------------


def compared(diagnoses: Sequence[Diagnosis], console: Console) -> None:
    """Print one line a log."""
    pen = Pen(console)
    table = _empty_table(("log", "points", "last loss", "health", "events", "lost", "spike score"), pen)
    for d in diagnoses:
        serious = sum(e.severity != "note" for e in d.events)
        score = d.spike_scores.get("loss", {}).get("olmo2")
        table.add_row(
            pen(d.log.name),
            pen(f"{d.points:,}"),
            pen(number(last_loss(d), 3)),
            pen(d.health, HEALTH[d.health]),
            pen(f"{serious} (+{plural(len(d.events) - serious, 'note')})"),
            pen(f"{d.lost_steps:,} ({100 * (1 - d.ettr):.2g} %)"),
            pen(MISSING if score is None else f"{score:.2f} %"),
        )
    _print(console, table)


def verdict(comparison: Comparison, console: Console) -> None:
    """Print what two logs show together."""
    pen = Pen(console)
    _print(console, pen(f"{comparison.a} and {comparison.b}: {comparison.verdict}", "bold"))
    for line in comparison.evidence:
        _print(console, _Hanging(pen(line), 2, 2))


def _print(console: Console, what: RenderableType) -> None:
    """Print; a reader that has gone is the caller's to deal with, rich would end the program with an error."""
    try:
        console.print(what)
    except SystemExit:
        raise BrokenPipeError from None


# -- layout --------------------------------------------------------------------------------------------


def _empty_table(names: Sequence[str], pen: Pen) -> Table:
    table: Table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(pen(name), overflow="fold", no_wrap=name in _WHOLE)
    return table


class _Hanging:
    """A text whose lines but the first are further in."""

    def __init__(self, text: Text, first: int, rest: int) -> None:
        self._text, self._first, self._rest = text, first, rest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self._text.wrap(console, max(10, options.max_width - self._rest))
        for i, line in enumerate(lines):
            yield Text(" " * (self._rest if i else self._first)) + line
