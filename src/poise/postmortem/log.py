"""Anybody's training log as series of numbers: ``read_log(path).series["loss"]`` is (steps, values).

The format is recognised by content (``readers``). What the columns mean, which rows were done again after a rewind, and
where steps repeat is decided once for all formats (``columns``, ``branches``):

    * a column is called ``loss``, ``grad_norm``, ``lr``, ``tokens`` or ``val_loss`` where ``readers/names.py`` knows
      its name, and keeps its own name otherwise;
    * NaN and infinity are values; a value that is absent leaves a gap in its own series only, but a loss that is
      ``null`` in all of the last rows was NaN;
    * where the steps of the loss go back and at least three rows rise from there, or the log says that the run went
      back, the later branch counts, and a note marks the seam; one or two rows alone are left out;
    * steps that start anew in each epoch are counted on.

A row whose step is no whole number is left out. Where no column counts steps but one counts samples or tokens, that one
orders the rows, and ``step_unit`` says so.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from poise.core.errors import UserError
from poise.postmortem import units
from poise.postmortem.columns import Columns, Series
from poise.postmortem.folders import members
from poise.postmortem.readers import READERS
from poise.postmortem.readers.names import GRAD_NORM, LOSS, SAMPLES, TOKENS, VAL_LOSS
from poise.postmortem.readers.source import Source, is_pipe

GENERAL = 4
"""Readers at the end of the table that take any program's log; the others are known by name."""

CERTAIN = 0.85


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
    if not str(path).strip():
        raise UserError("the name of the log is empty; name a file or a folder")
    try:
        return _read(Path(path), step_column, loss_column)
    except PermissionError as error:
        raise UserError(f"cannot read '{error.filename or path}': permission denied; see 'ls -l' and 'id'") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"cannot read '{error.filename or path}': {error.strerror}") from None


def _read(path: Path, step_column: str | None, loss_column: str | None) -> Log:
    files = _find(path)
    file = files[0]
    source = Source(file, files)
    if not source.head:
        raise UserError(f"'{file}' is empty; name a log with at least one step in it")
    reader = _reader(source)
    columns = Columns(source.notes, str(file), loss_column)
    columns.fill(reader.read(source), step_column)
    series, unit = _in_steps(columns.series(), units.step_unit(columns.step_column), source)
    return Log(
        file,
        trace_name(path),
        reader.FORMAT,
        series,
        source.notes.texts(),
        restarts=columns.restarts,
        settings=dict(source.settings),
        loss_unit=units.loss_unit(columns.names, series, source.settings),
        step_unit=unit,
    )


def _in_steps(series: Series, unit: str, source: Source) -> tuple[Series, str]:
    """Return a log whose rows are counted in tokens or samples with its steps, where they are all equally long."""
    main = next((name for name in (LOSS, VAL_LOSS, GRAD_NORM) if name in series), None)
    if unit not in (TOKENS, SAMPLES) or main is None or len(series[main][0]) < 3:
        return series, unit
    gaps = np.diff(series[main][0])
    size = int(np.median(gaps))
    if size < 2 or not np.isin(gaps, size * np.arange(1, 50)).mean() > 0.95:
        return series, unit
    source.notes.add(f"steps are counted from the {unit}: {size:,} in each")
    out = {name: (np.rint(at / size).astype(np.int64), values) for name, (at, values) in series.items()}
    if any((np.diff(at) <= 0).any() for at, _ in out.values()):
        return series, unit
    if unit not in out:
        out[unit] = out[main][0], series[main][0].astype(np.float64)
    return out, "steps"


def trace_name(path: Path) -> str:
    """Return what a log is called in tables: a folder's name, the file's without extension, a journal's folder's.

    >>> trace_name(Path("logs/run_lr1e-3.5.csv.gz")), trace_name(Path("runs/nano/journal.jsonl"))
    ('run_lr1e-3.5', 'nano')
    """
    if path.is_dir():
        return path.resolve().name or str(path)
    if str(path) == "-" or str(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin")):
        return "stdin"
    if path.name == "journal.jsonl" and path.resolve().parent.name:
        return path.resolve().parent.name
    name = re.sub(r"\.(gz|bz2|xz)$", "", path.name)
    return re.sub(r"(?<=.)\.[A-Za-z][A-Za-z0-9]*$", "", name)


def _find(path: Path) -> list[Path]:
    """Return the files that the log consists of, in order: one, but for a folder of event files."""
    if str(path) == "-":
        path = Path("/dev/stdin")
    if path.is_dir():
        return members(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"'{path}' is a link to '{path.readlink()}', which does not exist")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
        raise UserError(f"no log '{path}'" + (f", did you mean '{close[0]}'?" if close else ""))
    if not (path.is_file() or is_pipe(path) or path.samefile(os.devnull)):
        raise UserError(f"'{path}' is a terminal or a device; name a log file, or pipe one in")
    return [path]


def _reader(source: Source) -> Any:
    """Return the module that recognises the file."""
    modules = [importlib.import_module(name) for name in READERS]
    scores: list[float] = []
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
