"""How a table of text is written: what parts its cells, and which line has the names."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from poise.postmortem.readers.names import LOSS, STEP, rank
from poise.postmortem.readers.source import is_absent, number

LOOK_AT = 200
LOOK_FURTHER = 50_000
HEADER = re.compile(r"loss|step|iter|ppl|perplexity|bpb", re.IGNORECASE)
"""What a header further down than ``LOOK_AT`` lines must hold."""

"""Lines in which the header is looked for."""

BELOW = 20
"""Lines below a header that have to look like its rows."""

LONGEST_NAME = 300
MOST_CELLS = 100_000
"""Cells looked at below lines that could be headers, before the search is given up."""

RANK_PREFIX = re.compile(r"(?:\[(?:rank|default)?\s?\d{1,6}\]:?|(?:rank\s?)?\d{1,6}:)[ \t]{1,8}(?=\S)", re.IGNORECASE)
"""What launchers put before the lines of each of their processes."""

_NAME = re.compile(r"[\w#%][\w %/.:#\-]{0,80}(?:\([\w %/]{1,20}\))?")

DELIMITERS = (",", "\t", ";", "|", "")
"""Tried in this order; the empty one stands for blanks."""


DECIMAL_COMMAS = (";", "\t")
"""With these a comma in a cell is taken for the decimal one."""

CLOCK = "timestamp"
FEWEST_BARE = 10
"""Rising rows that make a table without a header."""

_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3}){1,6}(?:\.\d*)?")


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
    ranked = [match.end() for line in lines[:LOOK_AT] if (match := RANK_PREFIX.match(line))]
    if len(ranked) > 2 and 5 * len(ranked) >= 4 * len(lines[:LOOK_AT]):
        below = find_layout([RANK_PREFIX.sub("", line, count=1) for line in lines[:LOOK_AT]])
        return below and replace(below, ranked=True)
    first = range(min(len(lines), LOOK_AT))
    for delimiter in DELIMITERS:
        layout = _with_header(lines, delimiter, first) or _without_header(lines, delimiter)
        if layout is not None and (best is None or layout.score > best.score):
            best = layout
    if best is None and len(lines) > LOOK_AT:
        further = [at for at in range(LOOK_AT, min(len(lines), LOOK_FURTHER)) if HEADER.search(lines[at])]
        found = (_with_header(lines, delimiter, further) for delimiter in DELIMITERS)
        best = next((layout for layout in found if layout is not None), None)
    return best


def _with_header(lines: Sequence[str], delimiter: str, where: Sequence[int]) -> Layout | None:
    weak: Layout | None = None
    looked = 0
    for at in where:
        if looked > MOST_CELLS:
            break
        line = lines[at]
        bare = line.lstrip("# ") if line.startswith("#") else line
        cells = split(bare, delimiter)
        if len(cells) < 1 + (not delimiter) or any(number(cell) is not None for cell in cells):
            continue
        below = [_trimmed(split(row, delimiter), len(cells)) for row in lines[at + 1 : at + 1 + BELOW]]
        rows = [row for row in below if len(row) == len(cells)]
        wider = [len(row) for row in below if len(row) > len(cells)]  # a column that was added later
        alike = max(map(wider.count, wider), default=0) if below and len(below[0]) == len(cells) else 0
        if not below or 2 * (len(rows) + alike) < len(below):
            continue
        looked += len(cells) * len(rows)
        steps = _numeric(cells, rows, delimiter, STEP)
        losses = _numeric(cells, rows, delimiter, LOSS)
        if steps or losses:
            return Layout(delimiter, tuple(unique(cells)), line, 0.7 if losses else 0.4)
        if weak is None and len(cells) > 1 and 10 * len(rows) >= 9 * len(below) and _is_table(cells, rows, delimiter):
            weak = Layout(delimiter, tuple(unique(cells)), line, 0.3)
    return weak


def _trimmed(row: list[str], width: int) -> list[str]:
    """Return a row without empty cells beyond the width: a delimiter at the end of the line."""
    return row[:width] if len(row) > width and not any(row[width:]) else row


def _is_table(cells: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Return whether this is a table of whatever: plain names above columns that are mostly numbers."""
    if not all(_NAME.fullmatch(cell) for cell in cells):
        return False
    numeric = 0
    for i in range(len(cells)):
        given = [row[i] for row in rows if not is_absent(row[i])]
        numeric += bool(given) and sum(cell_number(cell, delimiter) is not None for cell in given) >= 0.9 * len(given)
    return 2 * numeric >= len(cells)


def _numeric(cells: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str, meaning: str) -> list[int]:
    """Return the columns whose name has this meaning and which are numbers, or empty, in the rows below."""
    out = []
    for i, cell in enumerate(cells):
        if len(cell) <= LONGEST_NAME and rank(meaning, cell) is not None:
            given = [row[i] for row in rows if not is_absent(row[i])]
            numbers = sum(cell_number(value, delimiter, meaning == STEP) is not None for value in given)
            if numbers and 2 * numbers >= len(given):
                out.append(i)
    return out


def _without_header(lines: Sequence[str], delimiter: str) -> Layout | None:
    """Accept columns of numbers whose first one counts upwards, and whose second one could be a loss."""
    rows = [split(line, delimiter) for line in lines[:LOOK_AT] if not line.startswith("#")]
    if not rows or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return None
    values = [[cell_number(cell, delimiter, i == 0) for i, cell in enumerate(row)] for row in rows]
    if any(row[0] is None or row[1] is None for row in values):
        return None
    columns = [[x for x in column if x is not None] for column in zip(*values, strict=True)]
    first, second = columns[:2]
    if len(columns) == 3 and len(columns[2]) == len(rows) and _is_mlflow(first, columns[2]):
        return Layout(delimiter, (CLOCK, LOSS, STEP), None, 0.6)
    if not all(step == step // 1 for step in first) or not _could_be_loss(second):
        return None
    rising = [b > a for a, b in pairwise(first)]
    if longest_run(rising) < FEWEST_BARE - 1 or sum(rising) < 0.8 * len(rising):
        return None
    further = (f"column_{i}" for i in range(3, len(rows[0]) + 1))
    return Layout(delimiter, (STEP, LOSS, *further), None, 0.5)


def _is_mlflow(first: Sequence[float], third: Sequence[float]) -> bool:
    """Return whether these are a time in milliseconds, a value and a step, as MLflow keeps them."""
    return (
        len(first) >= 2
        and all(1e12 <= time < 1e13 and time == time // 1 for time in first)
        and all(b >= a for a, b in pairwise(first))
        and all(step == step // 1 for step in third)
        and third[-1] > third[0]
    )


def _could_be_loss(values: Sequence[float]) -> bool:
    """Return whether numbers without a name could be a loss: fractions, or not finite, and not rising all the way."""
    finite = [x for x in values if math.isfinite(x)]
    fractions = sum(x != x // 1 for x in finite)
    return 2 * fractions >= len(finite) and not (len(finite) > 1 and all(b > a for a, b in pairwise(finite)))


def longest_run(flags: Sequence[bool]) -> int:
    """Return how many in a row are true.

    >>> longest_run([True, False, True, True])
    2
    """
    best = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        best = max(best, run)
    return best


def cell_number(cell: str, delimiter: str, counts: bool = False) -> float | None:
    """Return the number in a cell, which may have a decimal comma, or commas between thousands.

    Args:
        delimiter: of the table: where it is no comma, a comma alone is the decimal one.
        counts: whether the column counts steps or tokens, where ``1,000`` is a thousand.

    >>> cell_number("2,5", ";"), cell_number("1,000", ","), cell_number("1,000", ";"), cell_number("1,000", ";", True)
    (2.5, 1000.0, 1.0, 1000.0)
    """
    value = number(cell)
    if value is not None or "," not in cell:
        return value
    decimal = delimiter != "," and cell.count(",") == 1 and "." not in cell
    if _THOUSANDS.fullmatch(cell) and not (decimal and delimiter in DECIMAL_COMMAS and not counts):
        return number(cell.replace(",", ""))
    return number(cell.replace(",", ".")) if decimal else None


def is_header(cells: Sequence[str]) -> bool:
    """Return whether a line in the middle holds names, the loss among them, and no number."""
    return any(len(cell) <= LONGEST_NAME and rank(LOSS, cell) is not None for cell in cells) and all(
        number(cell) is None for cell in cells
    )


def unique(cells: Sequence[str]) -> list[str]:
    """Return the header's names; a nameless column is called by its number, a repeated name gets one too."""
    names: dict[str, None] = {}
    for i, cell in enumerate(cells, 1):
        name = cell or f"column_{i}"
        while name in names:
            name = f"{name}_{i}"
        names[name] = None
    return list(names)
