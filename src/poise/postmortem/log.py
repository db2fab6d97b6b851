"""Anybody's training log as series of numbers: ``read_log(path).series["loss"]`` is (steps, values).

The format is recognised by content (``readers``). What the columns mean, which rows were done again after a rewind, and
where steps repeat is decided here, once for all formats:

    * a column is called ``loss``, ``grad_norm``, ``lr``, ``tokens`` or ``val_loss`` where ``readers/names.py`` knows
      its name, and keeps its own name otherwise;
    * NaN and infinity are values; a value that is absent leaves a gap in its own series only;
    * where the steps of the loss go back, the later branch counts, and a note marks the seam.

A row whose step is no whole number is left out. Where no column counts steps but one counts samples or tokens, that one
orders the rows, and ``step_unit`` says so.

Memory: 12 bytes a value while reading, whatever the length of the file, and 16 in the result.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.postmortem import units
from poise.postmortem.folders import members
from poise.postmortem.readers import READERS
from poise.postmortem.readers.names import FURTHER, GRAD_NORM, LOSS, LR, ROW, STEP, TOKENS, VAL_LOSS, choose, words
from poise.postmortem.readers.source import Block, Item, Notes, Restarted, Rewound, Source

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Series = Mapping[str, tuple[Ints, Floats]]

PROBE_ROWS = 200
"""Rows looked at to find the column of the step."""

MAX_COLUMNS = 20_000
MAX_STEP = 2.0**53
GENERAL = 3
"""Readers at the end of the table that take any program's log; the others are known by name."""

CERTAIN = 0.85
MAX_SEAMS = 5
"""Rewinds that get a note of their own."""


@dataclass(frozen=True, slots=True)
class Log:
    """A training log.

    Attributes:
        path: the file that was read.
        name: its name without extension; a run folder's name.
        format: of the reader, e.g. ``jsonl``.
        series: name -> (steps, values): int64 rising strictly, and float64 of the same length.
        notes: one-line remarks: what was guessed, left out, or done twice.
        restarts: steps that were the first after the run had been stopped, or had gone back.
        settings: what the log says of the run's settings, by the log's own names.
        loss_unit: ``nats`` or ``bits`` where it can be told, else empty.
        step_unit: what ``steps`` counts: ``steps``, ``samples``, ``tokens`` or ``rows``.
    """

    path: Path
    name: str
    format: str
    series: Series
    notes: tuple[str, ...] = ()
    restarts: tuple[int, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    loss_unit: str = ""
    step_unit: str = "steps"


def read_log(path: str | Path, *, step_column: str | None = None, loss_column: str | None = None) -> Log:
    """Read a log of any format of ``readers``, recognised by its content; also as .gz, .bz2 or .xz.

    Args:
        path: the file, or a folder with one (``folders.members``): a run of poise, event files, a trainer's output.
        step_column, loss_column: the log's own names, where they cannot be guessed.

    Raises:
        UserError: no such file, an empty one, one of no known format, or one without a loss.
    """
    files = _find(Path(path))
    file = files[0]
    source = Source(file, files)
    if not source.head:
        raise UserError(f"'{file}' is empty; name a log with at least one step in it")
    reader = _reader(source)
    columns = _Columns(source.notes, str(file))
    columns.fill(reader.read(source), step_column)
    series = columns.series(loss_column)
    return Log(
        file,
        trace_name(Path(path)),
        reader.FORMAT,
        series,
        source.notes.texts(),
        restarts=columns.restarts,
        settings=dict(source.settings),
        loss_unit=units.loss_unit(columns.names, series, source.settings),
        step_unit=units.step_unit(columns.step_column),
    )


def trace_name(path: Path) -> str:
    """Return what a log is called in tables: a folder's name, the file's without extension, a journal's folder's.

    >>> trace_name(Path("logs/run_lr1e-3.5.csv.gz")), trace_name(Path("runs/nano/journal.jsonl"))
    ('run_lr1e-3.5', 'nano')
    """
    if path.is_dir():
        return path.resolve().name or str(path)
    if path.name == "journal.jsonl" and path.resolve().parent.name:
        return path.resolve().parent.name
    name = re.sub(r"\.(gz|bz2|xz)$", "", path.name)
    return re.sub(r"(?<=.)\.[A-Za-z][A-Za-z0-9]*$", "", name)


def _find(path: Path) -> list[Path]:
    """Return the files that the log consists of, in order: one, but for a folder of event files."""
    if path.is_dir():
        return members(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
        raise UserError(f"no log '{path}'" + (f", did you mean '{close[0]}'?" if close else ""))
    if not path.is_file():
        raise UserError(f"'{path}' is a pipe or a device, and a log is read twice; write it to a file first")
    return [path]


def _reader(source: Source) -> Any:
    """Return the module that recognises the file."""
    modules, scores = [importlib.import_module(name) for name in READERS], []
    for module in modules:
        if len(scores) == len(modules) - GENERAL and max(scores) >= CERTAIN:
            break  # the general ones look longest, and are never so sure
        scores.append(module.sniff(source))
    if max(scores) <= 0.0:
        known = ", ".join(module.FORMAT for module in modules[:-GENERAL])
        general = "; ".join(module.LOOKS_FOR for module in modules[-GENERAL:])
        raise UserError(
            f"'{source.path}' is no log that can be read; looked for the formats {known}; for {general}. "
            "Write it as CSV with a header, or name its columns with --step-column and --loss-column"
        )
    return modules[scores.index(max(scores))]


def _beginning(rows: Iterator[Item]) -> list[Item]:
    """Take the items that hold the first ``PROBE_ROWS`` rows."""
    first: list[Item] = []
    count = 0
    while count < PROBE_ROWS and (item := next(rows, None)) is not None:
        first.append(item)
        count += len(next(iter(item.columns.values()), ())) if isinstance(item, Block) else 1
    return first


class _Columns:
    """All numbers of a log by column, each with the row it came from."""

    def __init__(self, notes: Notes, where: str) -> None:
        self._notes = notes
        self._where = where
        self._steps = array("q")  # one a row
        self._values: dict[str, tuple[array[int], array[float]]] = {}  # rows and values of each column
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
            number = len(self._steps)
            self._steps.append(int(step))
            for column, value in row.items():
                if column != name:
                    self._column(column, number, value)

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
        rows = np.arange(start, len(self._steps), dtype=np.uint32)
        for column, values in columns.items():
            if column != name:
                self._column(column, 0, 0.0, (rows, values if good.all() else values[good]))

    def series(self, loss_column: str | None) -> Series:
        """Return what counts, by the names of ``Log.series``."""
        names = self.names = self._name_columns(loss_column)
        steps = np.frombuffer(self._steps, dtype=np.int64) if self._steps else np.empty(0, dtype=np.int64)
        loss_rows = self._rows(next((raw for raw, name in names.items() if name == LOSS), ""))
        stray = _stray(steps[loss_rows])
        seams = [*self._restarted, *(math.ceil(at) for at, _ in self._marks)]
        stray[[i for i in np.searchsorted(loss_rows, seams) if i < len(stray)]] = False  # went back, and says so
        gone = set(loss_rows[stray].tolist())
        if gone:
            shown = ", ".join(str(step) for step in steps[loss_rows[stray]][:3])
            self._notes.add(f"{len(gone)} stray rows left out, whose steps fit nowhere (first: {shown})")
        rewinds = self._rewinds(steps, loss_rows[~stray])
        self.restarts = self._restarts(steps, loss_rows[~stray])
        out: dict[str, tuple[Ints, Floats]] = {}
        for raw, name in names.items():
            rows, values = self._rows(raw), np.array(self._values.pop(raw)[1], dtype=np.float64)
            if gone:
                keep = ~np.isin(rows, list(gone))
                rows, values = rows[keep], values[keep]
            kept_steps, kept, repeated = _counted(rows, steps[rows], values, rewinds)
            if name == LOSS and repeated:
                self._notes.add(f"{repeated} steps have more than one loss; the last of each counts")
            if len(kept):
                out[name] = kept_steps, kept
        return out

    def _column(self, column: str, row: int, value: float, many: tuple[Any, Floats] | None = None) -> None:
        if column not in self._values:
            if len(self._values) >= MAX_COLUMNS:
                self._notes.add(f"columns beyond the first {MAX_COLUMNS} left out")
                return
            self._values[column] = array("I"), array("d")
        rows, values = self._values[column]
        if many is not None:
            rows.frombytes(many[0].tobytes())
            values.frombytes(many[1].astype(np.float64).tobytes())
            return
        rows.append(row)
        values.append(value)

    def _rows(self, raw: str) -> Ints:
        rows = self._values[raw][0] if raw in self._values else array("I")
        return np.array(rows, dtype=np.int64)

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
        chosen, others = choose(STEP, counts)
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

    def _name_columns(self, loss_column: str | None) -> dict[str, str]:
        """Return what each column is called in the result."""
        counts = {raw: len(values) for raw, (_, values) in self._values.items()}
        names: dict[str, str] = {}
        for meaning in (LOSS, GRAD_NORM, LR, TOKENS, VAL_LOSS, *FURTHER):
            option = "--loss-column" if meaning == LOSS else ""
            free = {raw: count for raw, count in counts.items() if raw not in names}
            if meaning == LOSS and loss_column is not None:
                names[self._wanted(loss_column, counts, option)] = LOSS
                continue
            chosen, others = choose(meaning, free)
            if chosen is not None:
                names[chosen] = meaning
                self._say_guess(meaning, chosen, others, option)
        taken = set(names.values())
        if not taken & {LOSS, VAL_LOSS, GRAD_NORM}:
            columns = ", ".join(f"'{raw}'" for raw in list(counts)[:8]) or "none with numbers"
            raise UserError(f"no loss in '{self._where}' (columns: {columns}); name it with --loss-column NAME")
        for raw in counts:
            if raw not in names:
                names[raw] = raw if raw not in taken else f"{raw} (other)"
        return names

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
        rest = [f"'{raw}'" for raw in others if raw != "value"][:3]
        if rest and option:
            self._notes.add(f"'{chosen}' is taken as {meaning} and not {' or '.join(rest)}; {option} chooses")

    def _rewinds(self, steps: Ints, loss_rows: Ints) -> tuple[Floats, Ints]:
        """Return (positions, bound): what stands before a position counts only below or at its bound."""
        at, to = loss_rows.astype(np.float64), steps[loss_rows]
        if len(to) > 2 and not self._marks and (np.diff(to) < 0).all():
            self._notes.add("the steps fall from row to row; read from the end")
            at, to = at[:0], to[:0]
        self._note_seams(to)
        if self._marks:
            marks = np.array([at for at, _ in self._marks])
            self._notes.add(f"the log went back {len(marks)} times; the later branch counts")
            at = np.concatenate([at, marks])
            to = np.concatenate([to, np.array([to for _, to in self._marks], dtype=np.int64)])
            order = np.argsort(at, kind="stable")
            at, to = at[order], to[order]
        return at, np.minimum.accumulate(to[::-1])[::-1]

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


def _stray(steps: Ints) -> NDArray[np.bool_]:
    """Return which rows step back alone: the next one is far ahead again, beyond all that came before."""
    stray = np.zeros(len(steps), dtype=bool)
    rising = np.diff(steps)
    back = np.flatnonzero(rising < 0) + 1
    if not len(back) or not (rising > 0).any():
        return stray
    usual = np.median(rising[rising > 0])
    highest = np.maximum.accumulate(steps)
    inner = back[back < len(steps) - 1]
    following = steps[inner + 1]
    stray[inner] = (following > highest[inner]) & (following - steps[inner] > 3 * usual)
    return stray


def _counted(rows: Ints, steps: Ints, values: Floats, rewinds: tuple[Floats, Ints]) -> tuple[Ints, Floats, int]:
    """Return (steps, values) without what was rewound, one value a step; and how many steps had several."""
    at, bound = rewinds
    after = np.searchsorted(at, rows, side="right")
    inside = after < len(at)
    keep = np.ones(len(rows), dtype=bool)
    keep[inside] = steps[inside] <= bound[after[inside]]
    steps, values = steps[keep], values[keep]
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True) if len(steps) else np.empty(0, dtype=bool)
    return steps[last], values[last], int((~last).sum())
