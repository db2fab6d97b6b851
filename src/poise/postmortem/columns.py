"""All numbers of a log by column, and what they are called in the result.

Memory: 8 bytes a value and 8 a row, for a column that has a value in every row from its first on; 4 more a value for
one with gaps. In the result columns with the same rows share their steps, and columns without gaps are not copied.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.postmortem import branches, units
from poise.postmortem.column import Column, counting
from poise.postmortem.readers.names import (
    ALIASES,
    BITS,
    EPOCH,
    FURTHER,
    GRAD_NORM,
    LOSS,
    LR,
    PERPLEXITY,
    ROW,
    STEP,
    TOKENS,
    VAL_LOSS,
    choose,
    is_held_out,
    rank,
    without_held_out,
    words,
)
from poise.postmortem.readers.source import NULL, Block, Item, Notes, Restarted, Rewound, Row

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Series = Mapping[str, tuple[Ints, Floats]]

PROBE_ROWS = 200
"""Rows looked at to find the column of the step."""

FEWEST_PROBED = 3
"""Rows with a loss from which a step that never changes is known not to be one."""

MAX_COLUMNS = 20_000
MAX_VALUES = 150_000_000
"""Values held; beyond, only columns with a known meaning."""

MAX_STEP = 2.0**53
MAX_SEAMS = 5
"""Rewinds that get a note of their own."""

FEWEST_NULLS = 5
"""Rows from which a loss that is ``null`` to the end of the file was NaN."""


class Columns:
    """All numbers of a log by column, each with the row it came from."""

    def __init__(self, notes: Notes, where: str, loss_column: str | None = None) -> None:
        self._notes = notes
        self._where = where
        self._loss_column = loss_column
        self._steps = array("q")  # one a row
        self._columns: dict[str, Column] = {}
        self._nulls: dict[str, Column] = {}  # rows in which a column was null
        self._held, self._full = 0, False
        self._marks: list[tuple[float, int]] = []  # between which rows, and to which step, the log says it went back
        self.step_column = ""
        self._restarted: list[int] = []  # rows before which the program began again
        self.restarts: tuple[int, ...] = ()
        self.names: dict[str, str] = {}  # the log's own name -> the one in the result

    def fill(self, rows: Iterator[Item], step_column: str | None) -> None:
        """Take in all rows."""
        first = _beginning(rows)
        self.step_column = self._choose_step(first, step_column)
        name = self.step_column
        for row in chain(first, rows):
            if isinstance(row, Rewound):
                self._marks.append((len(self._steps) - 0.5, row.to))
                continue
            if isinstance(row, Restarted):
                self._restarted.append(len(self._steps))
                continue
            if isinstance(row, Block):
                self._block(row.columns, name)
                continue
            step = row.get(name) if name else len(self._steps) + 1.0
            if step is None or not abs(step) < MAX_STEP or step != step // 1:
                self._notes.add(f"row without a whole number as '{name}' left out")
                continue
            self._row(row, int(step), name)

    def _row(self, row: Row, step: int, name: str) -> None:
        number = len(self._steps)
        self._steps.append(step)
        columns = self._columns
        for raw, value in row.items():
            if raw != name:
                column = columns.get(raw) or self._new(raw, number)
                if column is not None:
                    column.add(number, value)
        self._count(len(row))

    def _block(self, columns: Mapping[str, Floats], name: str) -> None:
        """Take in many rows at once."""
        length = len(next(iter(columns.values()), ()))
        start = len(self._steps)
        steps = columns[name] if name in columns else np.full(length, np.nan)
        if not name:
            steps = start + 1.0 + np.arange(length)
        good = (np.abs(steps) < MAX_STEP) & (steps == np.floor(steps))
        for _ in range(length - int(good.sum())):
            self._notes.add(f"row without a whole number as '{name}' left out")
        self._steps.frombytes(steps[good].astype(np.int64).tobytes())
        for raw, values in columns.items():
            if raw != name and (column := self._columns.get(raw) or self._new(raw, start)) is not None:
                column.extend(start, values if good.all() else values[good])
        self._count(len(columns) * length)

    def _new(self, raw: str, row: int) -> Column | None:
        """Make a column where there is room for it."""
        known = raw in self._columns
        if known:
            return self._columns[raw]
        if raw.startswith(NULL):
            return self._nulls.setdefault(raw.removeprefix(NULL), Column(row))
        if len(self._columns) >= MAX_COLUMNS:
            self._notes.add(f"columns beyond the first {MAX_COLUMNS} left out")
            return None
        if self._full and not self._has_meaning(raw):
            return None
        self._columns[raw] = Column(row)
        return self._columns[raw]

    def _count(self, values: int) -> None:
        self._held += values
        if self._held <= MAX_VALUES or self._full:
            return
        self._full = True
        unknown = [raw for raw in self._columns if not self._has_meaning(raw)]
        for raw in unknown:
            del self._columns[raw]
        self._notes.add(
            f"the log has more than {MAX_VALUES} values; {len(unknown)} columns of no known meaning left out"
        )

    def _has_meaning(self, raw: str) -> bool:
        meanings = (*ALIASES, *FURTHER, VAL_LOSS, EPOCH, PERPLEXITY, BITS)
        return raw == self._loss_column or any(rank(meaning, raw) is not None for meaning in meanings)

    def series(self) -> Series:
        """Return what counts, by the names of ``Log.series``; what was held is given up."""
        names = self.names = self._name_columns()
        steps = np.frombuffer(self._steps, dtype=np.int64) if self._steps else np.empty(0, dtype=np.int64)
        self._count_on(steps)
        loss = next((raw for raw, name in names.items() if name == LOSS), "")
        self._add_nulls(loss, steps)
        gone = np.empty(0, dtype=np.int64)
        rewinds = np.empty(0), gone
        if loss in self._columns and not self._marks and branches.out_of_order(self._columns[loss].at(steps)):
            self._notes.add("the rows are not in the order of their steps; sorted")
        elif self._marks or self._restarted or (loss in self._columns and _falls(self._columns[loss].at(steps))):
            loss_rows = self._columns[loss].numbers() if loss in self._columns else gone
            seams = np.searchsorted(loss_rows, [*self._restarted, *(math.ceil(at) for at, _ in self._marks)])
            stray = branches.stray(steps[loss_rows], seams.tolist())
            gone, loss_rows = loss_rows[stray], loss_rows[~stray]
            rewinds = self._rewinds(steps, loss_rows)
            self.restarts = self._restarts(steps, loss_rows)
        if len(gone):
            shown = ", ".join(str(step) for step in steps[gone][:3])
            self._notes.add(f"{len(gone)} stray rows left out, whose steps fit nowhere (first: {shown})")
        return self._results(steps, gone, rewinds)

    def _results(self, steps: Ints, gone: Ints, rewinds: tuple[Floats, Ints]) -> Series:
        out: dict[str, tuple[Ints, Floats]] = {}
        shared: dict[tuple[int, int, int], tuple[Ints | None, Ints, int]] = {}
        for raw, name in self.names.items():
            column = self._columns.pop(raw)
            values: Floats = np.frombuffer(column.values, dtype=np.float64)
            key = column.key()
            if key not in shared:
                shared[key] = counting(column, steps, gone, rewinds)
            kept, at, repeated = shared[key]
            if name == LOSS and repeated:
                self._notes.add(f"more than one loss at {repeated} of the steps; the last of each counts")
            if len(at):
                out[name] = at, values if kept is None else values[kept]
        return self._logarithms(out)

    def _count_on(self, steps: Ints) -> None:
        """Count the steps on where they start anew in each epoch."""
        if self._marks or not self.step_column or self.step_column == ROW or len(steps) < 2:
            return
        if not (np.diff(steps) < 0).any():
            return
        raw, _ = choose(EPOCH, {raw: len(column) for raw, column in self._columns.items()})
        if raw is None:
            return
        epochs = np.full(len(steps), np.nan)
        epochs[self._columns[raw].numbers()] = np.frombuffer(self._columns[raw].values, dtype=np.float64)
        times = branches.count_on(steps, epochs)
        if times:
            self._notes.add(f"the steps start anew in each epoch; they are counted on ({times + 1} epochs)")

    def _add_nulls(self, raw: str, steps: Ints) -> None:
        """Take ``null`` for NaN where a loss is nothing else to the end of the file."""
        null, column = self._nulls.get(raw), self._columns.get(raw)
        if null is None or column is None:
            return
        rows, last = null.numbers(), int(column.numbers()[-1])
        rows = rows[rows > last]
        if len(rows) < FEWEST_NULLS or not (np.diff(steps[rows]) > 0).all() or steps[rows[0]] <= steps[last]:
            return
        self._notes.add(f"'{raw}' is null in the last {len(rows)} rows; taken as NaN, which some programs write so")
        for row in rows.tolist():
            column.add(row, math.nan)

    def _choose_step(self, rows: list[Item], wanted: str | None) -> str:
        counts: dict[str, int] = {}
        for row in rows:
            if isinstance(row, Block):
                for name, values in row.columns.items():
                    counts[name] = counts.get(name, 0) + len(values)
            elif isinstance(row, dict):
                for name in row:
                    counts[name] = counts.get(name, 0) + 1
        if wanted is not None:
            return self._wanted(wanted, counts, "--step-column")
        still = _unchanging(rows)
        for name in sorted(name for name in still if rank(STEP, name) is not None):
            self._notes.add(f"'{name}' is the same in all rows, and no step")
        chosen, others = choose(STEP, {name: count for name, count in counts.items() if name not in still})
        if chosen is None:
            chosen = units.ordering(_beginnings(rows))
            if chosen is not None:
                self._notes.add(f"no column of steps: '{chosen}' orders the rows; --step-column names one")
                return chosen
            if rows:
                self._notes.add("no column of steps: the rows are counted from 1; --step-column names one")
            return ""
        self._say_guess(STEP, chosen, others, "--step-column")
        return chosen

    def _name_columns(self) -> dict[str, str]:
        """Return what each column is called in the result."""
        counts = {raw: len(column) for raw, column in self._columns.items()}
        names: dict[str, str] = {}
        for meaning in (LOSS, GRAD_NORM, LR, TOKENS, VAL_LOSS, *FURTHER):
            option = "--loss-column" if meaning == LOSS else ""
            free = {raw: count for raw, count in counts.items() if raw not in names}
            if meaning == LOSS and self._loss_column is not None:
                names[self._wanted(self._loss_column, counts, option)] = LOSS
                continue
            chosen, others = choose(meaning, free)
            if chosen is not None:
                names[chosen] = meaning
                self._say_guess(meaning, chosen, others, option)
        self._name_instead(counts, names)
        taken = set(names.values())
        if not taken & {LOSS, VAL_LOSS, GRAD_NORM}:
            columns = ", ".join(f"'{raw}'" for raw in list(counts)[:8]) or "none with numbers"
            raise UserError(f"no loss in '{self._where}' (columns: {columns}); name it with --loss-column NAME")
        for raw in counts:
            if raw not in names:
                names[raw] = raw if raw not in taken else f"{raw} (other)"
        return names

    def _name_instead(self, counts: Mapping[str, int], names: dict[str, str]) -> None:
        """Where there is no loss at all: a perplexity or a loss in bits is taken for it."""
        if {LOSS, VAL_LOSS} & set(names.values()):
            return
        free = {raw: count for raw, count in counts.items() if raw not in names}
        for meaning in (BITS, PERPLEXITY):
            chosen, _ = choose(meaning, free)
            inner = {without_held_out(raw): raw for raw in free if is_held_out(raw)}
            held_out, _ = choose(meaning, {raw: free[inner[raw]] for raw in inner})
            if chosen is None and held_out is None:
                continue
            for raw, name in ((chosen, LOSS), (inner[held_out] if held_out else None, VAL_LOSS)):
                if raw is not None:
                    names[raw] = name
                    self._notes.add(f"column '{raw}' is taken as {name}")
            return

    def _logarithms(self, out: dict[str, tuple[Ints, Floats]]) -> Series:
        for raw, name in self.names.items():
            inner = without_held_out(raw) if name == VAL_LOSS else raw
            if name in out and name in (LOSS, VAL_LOSS) and rank(PERPLEXITY, inner) is not None:
                self._notes.add(f"'{raw}' is a perplexity; its natural logarithm is the {name}")
                steps, values = out[name]
                with np.errstate(all="ignore"):
                    out[name] = steps, np.log(values)
        return out

    def _wanted(self, wanted: str, counts: Mapping[str, int], option: str) -> str:
        alike = [raw for raw in counts if raw == wanted] or [raw for raw in counts if words(raw) == words(wanted)]
        if not alike:
            columns = ", ".join(f"'{raw}'" for raw in list(counts)[:8]) or "none with numbers"
            raise UserError(
                f"{option} is '{wanted}', but '{self._where}' has the columns {columns}{nearest(wanted, counts)}"
            )
        return alike[0]

    def _say_guess(self, meaning: str, chosen: str, others: Iterable[str], option: str) -> None:
        if chosen not in (meaning, ROW):
            self._notes.add(f"column '{chosen}' is taken as {meaning}")
        rest = [f"'{raw}'" for raw in others][:3]
        if rest and option:
            self._notes.add(f"'{chosen}' is taken as {meaning} and not {' or '.join(rest)}; {option} chooses")

    def _rewinds(self, steps: Ints, loss_rows: Ints) -> tuple[Floats, Ints]:
        """Return (positions, bound): what stands before a position counts only below or at its bound."""
        to = steps[loss_rows]
        if len(to) > 2 and not self._marks and (np.diff(to) < 0).all():
            self._notes.add("the steps fall from row to row; read from the end")
            to = to[:0]
        falls = np.flatnonzero(np.diff(to) < 0) + 1
        at, bound = loss_rows[falls].astype(np.float64), to[falls]
        self._note_seams(to)
        if self._marks:
            marks = np.array([at for at, _ in self._marks])
            self._notes.add(f"the log went back {len(marks)} times; the later branch counts")
            at = np.concatenate([at, marks])
            bound = np.concatenate([bound, np.array([to for _, to in self._marks], dtype=np.int64)])
            order = np.argsort(at, kind="stable")
            at, bound = at[order], bound[order]
        return at, np.minimum.accumulate(bound[::-1])[::-1]

    def _restarts(self, steps: Ints, loss_rows: Ints) -> tuple[int, ...]:
        """Return the first step after each place where the program began again or went back."""
        went_back = loss_rows[1:][np.diff(steps[loss_rows]) < 0].tolist()
        marked = [math.ceil(at) for at, _ in self._marks]
        if len(loss_rows) > 2 and len(went_back) == len(loss_rows) - 1:
            went_back = []  # read from the end
        rows = sorted({row for row in [*self._restarted, *went_back, *marked] if 0 < row < len(steps)})
        return tuple(dict.fromkeys(int(steps[row]) for row in rows))

    def _note_seams(self, to: Ints) -> None:
        seams = np.flatnonzero(np.diff(to) < 0)
        if self._marks:
            return
        for i in seams[:MAX_SEAMS]:
            self._notes.add(f"seam: the steps go back from {to[i]} to {to[i + 1]}; the later branch counts")
        if len(seams) > MAX_SEAMS:
            self._notes.add(f"and {len(seams) - MAX_SEAMS} more seams")


def _falls(steps: Ints) -> bool:
    return bool((steps[1:] < steps[:-1]).any())


def _beginning(rows: Iterator[Item]) -> list[Item]:
    """Take the items that hold the first ``PROBE_ROWS`` rows."""
    first: list[Item] = []
    count = 0
    while count < PROBE_ROWS and (item := next(rows, None)) is not None:
        first.append(item)
        count += len(next(iter(item.columns.values()), ())) if isinstance(item, Block) else 1
    return first


def _beginnings(rows: list[Item]) -> dict[str, list[float]]:
    """Return the first values of each column."""
    out: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row, Block):
            for name, values in row.columns.items():
                out.setdefault(name, []).extend(values[:PROBE_ROWS].tolist())
        elif isinstance(row, dict):
            for name, value in row.items():
                out.setdefault(name, []).append(value)
    return out


def _unchanging(rows: list[Item]) -> set[str]:
    """Return the columns that are the same number in all rows with a loss, of which there are enough."""
    seen: dict[str, tuple[int, float, float]] = {}
    for row in rows:
        if isinstance(row, Block):
            for name, values in row.columns.items():
                if len(values):
                    _widen(seen, name, len(values), float(values.min()), float(values.max()))
        elif isinstance(row, dict) and any(rank(LOSS, name) is not None for name in row):
            for name, value in row.items():
                _widen(seen, name, 1, value, value)
    return {name for name, (count, low, high) in seen.items() if count >= FEWEST_PROBED and low == high}


def _widen(seen: dict[str, tuple[int, float, float]], name: str, count: int, low: float, high: float) -> None:
    before = seen.get(name, (0, low, high))
    seen[name] = before[0] + count, min(before[1], low), max(before[2], high)
