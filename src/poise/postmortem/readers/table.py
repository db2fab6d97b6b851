"""Tables as text: CSV, TSV, semicolons or blanks, with a header or without one.

The header is looked for, because some files begin with other lines; it is the first line of names whose loss or step
has a number below it. Two or more columns of numbers without a header are taken as step, loss and the rest, where
the first counts upwards. A header met again further down (a run that was restarted) holds from there on.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from poise.core.errors import UserError
from poise.postmortem.readers.names import LOSS, STEP, rank
from poise.postmortem.readers.source import Item, Row, Source, is_absent, number

FORMAT = "table"
LOOKS_FOR = "CSV, TSV or columns parted by blanks, with a header like step,loss"

LOOK_AT = 200
"""Lines in which the header is looked for."""

BELOW = 20
"""Lines below a header that have to look like its rows."""

LONGEST_NAME = 300
MOST_CELLS = 100_000
"""Cells looked at below lines that could be headers, before the search is given up."""

_RANK = re.compile(r"(?:\[(?:rank|default)?\s?\d{1,6}\]:?|(?:rank\s?)?\d{1,6}:)[ \t]{1,8}(?=\S)", re.IGNORECASE)
"""What launchers put before the lines of each of their processes."""

_NAME = re.compile(r"[\w#%][\w %/.:#\-]{0,80}(?:\([\w %/]{1,20}\))?")

DELIMITERS = (",", "\t", ";", "|", "")
"""Tried in this order; the empty one stands for blanks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table is written. ``header`` is the line of the names; ``None`` when there is none.

    ``ranked``: the lines begin with the number of the process that printed them.
    """

    delimiter: str
    names: tuple[str, ...]
    header: str | None
    score: float
    ranked: bool = False


def sniff(source: Source) -> float:
    """Return how likely this is a table with a loss."""
    layout = find_layout(source.head_lines)
    return 0.0 if layout is None else layout.score


def read(source: Source) -> Iterator[Item]:
    """Yield one row a line of the table."""
    layout = find_layout(source.head_lines)
    if layout is None:
        return
    names, began = list(layout.names), layout.header is None
    if began:
        source.notes.add(f"no header: the columns are taken as {', '.join(names)}")
    good = bad = 0
    for line in source.lines():
        if layout.ranked:
            line = _RANK.sub("", line, count=1) if _RANK.match(line) else line
        cells = split(line, layout.delimiter)
        if not began:
            began = line == layout.header
            if not began:
                source.notes.add("line before the header left out", source.where)
        elif len(cells) != len(names):
            if _is_header(cells):
                names = _unique(cells)
                source.notes.add("another header: its columns hold from there on", source.where)
            else:
                bad += 1
                source.bad_line(f"line without {len(names)} cells left out")
        else:
            row = _row(names, cells, layout.delimiter, source)
            if row:
                good += 1
                yield row
            elif _is_header(cells):
                names = _unique(cells)
                source.notes.add("header met again", source.where)
            elif not all(map(is_absent, cells)):
                bad += 1
                source.bad_line("line without a number left out")
    if bad > good:
        raise UserError(
            f"'{source.path}' begins like a table, but only {good} of {good + bad} lines are rows of "
            f"{len(names)} cells; write it as CSV with a header"
        )


def split(line: str, delimiter: str) -> list[str]:
    """Return the cells of a line. Quotes are minded within the line only: an unclosed one spoils no other line."""
    if not delimiter:
        return line.split()
    if '"' not in line:
        return [cell.strip() for cell in line.split(delimiter)]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    except (csv.Error, StopIteration):
        return line.split(delimiter)


def find_layout(lines: Sequence[str]) -> Layout | None:
    """Return how these lines are written as a table; ``None`` when they are none that holds numbers by name."""
    best: Layout | None = None
    ranked = [match.end() for line in lines[:LOOK_AT] if (match := _RANK.match(line))]
    if len(ranked) > 2 and 5 * len(ranked) >= 4 * len(lines[:LOOK_AT]):
        below = find_layout([_RANK.sub("", line, count=1) for line in lines[:LOOK_AT]])
        return below and replace(below, ranked=True)
    for delimiter in DELIMITERS:
        layout = _with_header(lines, delimiter) or _without_header(lines, delimiter)
        if layout is not None and (best is None or layout.score > best.score):
            best = layout
    return best


def _with_header(lines: Sequence[str], delimiter: str) -> Layout | None:
    weak: Layout | None = None
    looked = 0
    for at, line in enumerate(lines[:LOOK_AT]):
        if looked > MOST_CELLS:
            break
        bare = line.lstrip("# ") if line.startswith("#") else line
        cells = split(bare, delimiter)
        if len(cells) < 1 + (not delimiter) or any(number(cell) is not None for cell in cells):
            continue
        below = [split(row, delimiter) for row in lines[at + 1 : at + 1 + BELOW]]
        rows = [row for row in below if len(row) == len(cells)]
        if not below or 2 * len(rows) < len(below):
            continue
        looked += len(cells) * len(rows)
        steps = _numeric(cells, rows, delimiter, STEP)
        losses = _numeric(cells, rows, delimiter, LOSS)
        if [cells[i].lower() for i in losses] == ["value"] and not steps:
            losses = []  # a list of settings
        if steps or losses:
            return Layout(delimiter, tuple(_unique(cells)), line, 0.7 if losses else 0.4)
        if weak is None and len(cells) > 1 and 10 * len(rows) >= 9 * len(below) and _is_table(cells, rows, delimiter):
            weak = Layout(delimiter, tuple(_unique(cells)), line, 0.3)
    return weak


def _is_table(cells: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Return whether this is a table of whatever: plain names above columns that are mostly numbers."""
    if not all(_NAME.fullmatch(cell) for cell in cells):
        return False
    numeric = 0
    for i in range(len(cells)):
        given = [row[i] for row in rows if not is_absent(row[i])]
        numeric += bool(given) and sum(_cell(cell, delimiter) is not None for cell in given) >= 0.9 * len(given)
    return 2 * numeric >= len(cells)


def _numeric(cells: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str, meaning: str) -> list[int]:
    """Return the columns whose name has this meaning and which are numbers, or empty, in the rows below."""
    out = []
    for i, cell in enumerate(cells):
        if len(cell) <= LONGEST_NAME and rank(meaning, cell) is not None:
            given = [row[i] for row in rows if not is_absent(row[i])]
            numbers = sum(_cell(value, delimiter) is not None for value in given)
            if numbers and 2 * numbers >= len(given):
                out.append(i)
    return out


def _without_header(lines: Sequence[str], delimiter: str) -> Layout | None:
    """Accept columns of numbers whose first one counts upwards."""
    rows = [split(line, delimiter) for line in lines[:LOOK_AT] if not line.startswith("#")]
    if not rows or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return None
    values = [[_cell(cell, delimiter) for cell in row] for row in rows]
    steps = [row[0] for row in values if row[0] is not None and row[0] == row[0] // 1]
    if len(steps) < len(rows) or any(row[1] is None for row in values):
        return None
    if sum(b > a for a, b in pairwise(steps)) < 0.8 * (len(steps) - 1):
        return None
    further = (f"column_{i}" for i in range(3, len(rows[0]) + 1))
    return Layout(delimiter, (STEP, LOSS, *further), None, 0.5)


def _row(names: Sequence[str], cells: Sequence[str], delimiter: str, source: Source) -> Row:
    with contextlib.suppress(ValueError):  # the short way: most rows are numbers throughout
        if not any("_" in cell for cell in cells):
            return dict(zip(names, map(float, cells), strict=True))
    row: Row = {}
    for name, cell in zip(names, cells, strict=True):
        value = _cell(cell, delimiter)
        if value is not None:
            row[name] = value
        elif not is_absent(cell) and rank(LOSS, name) is not None and not _is_header(cells):
            source.notes.add(f"a cell of '{name}' that is no number left out", source.where)
    return row


def _cell(cell: str, delimiter: str) -> float | None:
    value = number(cell)
    if value is None and delimiter == ";" and "," in cell:  # decimal comma
        return number(cell.replace(",", "."))
    return value


def _is_header(cells: Sequence[str]) -> bool:
    """Return whether a line in the middle holds names, the loss among them, and no number."""
    return any(len(cell) <= LONGEST_NAME and rank(LOSS, cell) is not None for cell in cells) and all(
        number(cell) is None for cell in cells
    )


def _unique(cells: Sequence[str]) -> list[str]:
    """Return the header's names; a nameless column is called by its number, a repeated name gets one too."""
    names: dict[str, None] = {}
    for i, cell in enumerate(cells, 1):
        name = cell or f"column_{i}"
        while name in names:
            name = f"{name}_{i}"
        names[name] = None
    return list(names)
