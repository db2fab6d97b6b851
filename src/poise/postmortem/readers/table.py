"""Tables as text: CSV, TSV, semicolons or blanks, with a header or without one.

The header is looked for, because some files begin with other lines; it is the first line of names whose loss or step
has a number below it (``table_layout``). Two or more columns of numbers without a header are taken as step, loss and
the rest, where the first counts upwards and the second is no count. A header met again further down (a run that was
restarted) holds from there on; rows that have more cells from somewhere on keep the cells with a name. MLflow's files
of one metric (time, value, step) and TensorBoard's export of one scalar are known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from poise.core.errors import UserError
from poise.postmortem.readers import records
from poise.postmortem.readers.json_file import tag_of
from poise.postmortem.readers.names import LOSS, SAMPLES, STEP, TOKENS, rank
from poise.postmortem.readers.records import Record, Texts
from poise.postmortem.readers.source import Item, Row, Source, is_absent
from poise.postmortem.readers.table_layout import (
    CLOCK,
    RANK_PREFIX,
    Layout,
    cell_number,
    find_layout,
    is_header,
    split,
    unique,
)

FORMAT = "table"
LOOKS_FOR = "CSV, TSV or columns parted by blanks, with a header like step,loss"

SCALAR = ("wall time", "step", "value")
"""The header of TensorBoard's export of one scalar."""

WIDENED = 3
"""Rows with as many cells too many that make a column without a name."""


def sniff(source: Source) -> float:
    """Return how likely this is a table with a loss."""
    layout = find_layout(source.head_lines)
    return 0.0 if layout is None else layout.score


def read(source: Source) -> Iterator[Item]:
    """Yield one row a line of the table."""
    layout = find_layout(source.head_lines)
    if layout is None:
        return iter(())
    table = _Table(source, layout)
    if records.is_needed(layout.names):
        return records.rows(source, table.records())
    return (row for row, _ in table.records())


class _Table:
    """The lines of one table, in order."""

    def __init__(self, source: Source, layout: Layout) -> None:
        self._source = source
        self._layout = layout
        self._good = self._bad = 0
        self._above = 0  # characters of the last cell in the row above
        self._wide: list[Record] = []  # rows with more cells than names, as long as they are few
        self._width = self._accepted = 0  # how many cells more these have, and those that are used
        self._name(layout.names)

    def records(self) -> Iterator[Record]:
        """Yield each row's numbers, and its words where they matter."""
        source, layout = self._source, self._layout
        began = layout.header is None
        if began:
            source.notes.add(f"no header: the columns are taken as {', '.join(self._names)}")
        for line in source.lines():
            if layout.ranked:
                line = RANK_PREFIX.sub("", line, count=1) if RANK_PREFIX.match(line) else line
            if not began:
                began = line == layout.header
                if not began:
                    source.notes.add("line before the header left out", source.where)
                continue
            cells = split(line, layout.delimiter)
            if len(cells) <= len(self._names):
                self._forget_wide()
            if len(cells) == len(self._names):
                yield from self._whole(cells)
            elif is_header(cells):
                self._name(unique(cells))
                source.notes.add("another header: its columns hold from there on", source.where)
            elif len(cells) > len(self._names):
                yield from self._too_wide(cells)
            else:
                self._left_out(f"line without {len(self._names)} cells left out")
        self._forget_wide()
        if self._bad > self._good:
            raise UserError(
                f"'{source.path}' begins like a table, but only {self._good} of {self._good + self._bad} lines are "
                f"rows of {len(self._names)} cells; write it as CSV with a header"
            )

    def _name(self, names: Sequence[str]) -> None:
        if tuple(name.lower() for name in names) == SCALAR:
            names = (*names[:2], tag_of(self._source))
        elif self._layout.header is None and names[0] == CLOCK:
            names = (CLOCK, _metric(self._source), STEP)
        self._names = tuple(names)
        self._counts = frozenset(
            name for name in names if any(rank(meaning, name) is not None for meaning in (STEP, TOKENS, SAMPLES))
        )
        self._words = [i for i, name in enumerate(names) if records.matters(name)]

    def _whole(self, cells: list[str]) -> Iterator[Record]:
        """Yield a row with a cell for every name."""
        source = self._source
        if source.unfinished and len(cells[-1]) < self._above:
            source.notes.add(
                f"the last line has no end; its last cell, of '{self._names[-1]}', may be cut off, and is left out"
            )
            cells[-1] = ""
        self._above = len(cells[-1])
        row = self._row(cells)
        if row:
            self._good += 1
            yield row, self._texts(cells)
        elif is_header(cells):
            self._name(unique(cells))
            source.notes.add("header met again", source.where)
        elif not all(map(is_absent, cells)):
            self._left_out("line without a number left out")

    def _too_wide(self, cells: list[str]) -> Iterator[Record]:
        """Yield rows with more cells than names, once there are several alike or when what is more is empty."""
        extra = len(cells) - len(self._names)
        cells, more = cells[: len(self._names)], cells[len(self._names) :]
        row = self._row(cells)
        if not row or not self._is_row(row):
            self._left_out(f"line without {len(self._names)} cells left out")
            return
        if all(map(is_absent, more)):
            self._good += 1
            yield row, self._texts(cells)
            return
        if extra != self._accepted:
            if extra != self._width:
                self._forget_wide()
            self._width = extra
            self._wide.append((row, self._texts(cells)))
            if len(self._wide) < WIDENED:
                return
            self._accepted = extra
            held, self._wide = self._wide, []
            self._good += len(held)
            yield from held
        else:
            self._good += 1
            yield row, self._texts(cells)
        self._source.notes.add(
            f"rows with more cells than the header's {len(self._names)} names; the first ones are used"
        )

    def _forget_wide(self) -> None:
        """Leave out the few rows with too many cells: their like did not follow."""
        for _ in self._wide:
            self._source.notes.add(f"line without {len(self._names)} cells left out")
        self._bad += len(self._wide)
        self._wide = []

    def _is_row(self, row: Row) -> bool:
        """Return whether a row has its step and its loss, as far as the table has them."""
        needed = [name for name in self._names if rank(STEP, name) is not None or rank(LOSS, name) is not None]
        return any(name in row for name in needed)

    def _left_out(self, what: str) -> None:
        self._bad += 1
        self._source.bad_line(what)

    def _row(self, cells: Sequence[str]) -> Row:
        with contextlib.suppress(ValueError):  # the short way: most rows are numbers throughout
            if not any("_" in cell for cell in cells):
                return dict(zip(self._names, map(float, cells), strict=True))
        row: Row = {}
        for name, cell in zip(self._names, cells, strict=True):
            value = cell_number(cell, self._layout.delimiter, name in self._counts)
            if value is not None:
                row[name] = value
            elif not is_absent(cell) and rank(LOSS, name) is not None and not is_header(cells):
                self._source.notes.add(f"a cell of '{name}' that is no number left out", self._source.where)
        return row

    def _texts(self, cells: Sequence[str]) -> Texts:
        if not self._words:
            return {}
        return {self._names[i]: cells[i] for i in self._words if not is_absent(cells[i])}


def _metric(source: Source) -> str:
    """Return what MLflow's file holds, which it says by its name: ``metrics/train/loss``; else the loss."""
    parts = source.path.parts
    if "metrics" not in parts[:-1]:
        return LOSS
    last = len(parts) - 2 - parts[-2::-1].index("metrics")
    return "/".join(parts[last + 1 :])
