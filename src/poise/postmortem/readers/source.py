"""A log file as clean lines, whoever wrote it: decompressed, decoded, without colours and blank lines.

A reader is a module with

    FORMAT: str                                      what ``Log.format`` says
    LOOKS_FOR: str                                   what it recognises, for the message when nothing fits
    sniff(source: Source) -> float                   0 (not mine) .. 1 (certainly mine), from ``source.head``
    read(source: Source) -> Iterator[Item]           streaming; remarks go to ``source.notes``

A row maps the log's own column names to numbers; which column is the step, the loss, ... is decided for all formats
together in ``log.py``. A value that is absent is left out of the row; NaN and infinity are values. A reader that
parses many rows at once yields a ``Block`` of them; one that sees the program begin again yields ``RESTARTED``. What a
log says of its own settings (a batch size, an argument dump) goes to ``source.settings``, by the log's own names.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.postmortem.readers import sift

T = TypeVar("T")
D = TypeVar("D")

Row = dict[str, float]

NULL = "\0null:"
"""Before a column's name in a row: the log says that there is no number, where others have one."""

HEAD_BYTES = 1 << 20
"""Enough for the header of a table with thousands of columns."""

PIECE = 1 << 13
MAX_LINE = 1 << 22
"""Characters; what is longer is not a line of a log, and is not held in memory."""

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_LOST_ESCAPE = re.compile(r"\[(?:\d{1,3}(?:;\d{1,3}){0,6})?m")
"""Colours copied from where the escape character does not show."""

_ABSENT = frozenset({"", "null", "none", "na", "n/a", "#n/a", "-", "--", "undefined", "undef"})
_NOT_A_NUMBER = re.compile(r"[+-]?(?:nan\(.*\)|1\.#(?:qnan|snan|ind)0*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rewound:
    """Among the rows: whatever came before and has a step above ``to`` does not count any more."""

    to: int


@dataclass(frozen=True, slots=True)
class Restarted:
    """Among the rows: the program was started again here; the next row is its first."""


@dataclass(frozen=True, slots=True)
class Block:
    """Many rows at once: for each column a float64 array, all of one length, with a value in every row."""

    columns: Mapping[str, NDArray[np.float64]]


RESTARTED = Restarted()

Item = Row | Block | Rewound | Restarted


class Notes:
    """One-line remarks about how a log was read; equal ones are counted."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def add(self, text: str, where: str = "") -> None:
        """Say ``text``; said again it is counted, and the first ``where`` stays."""
        self._first.setdefault(text, where)
        self._times[text] = self._times.get(text, 0) + 1

    def texts(self) -> tuple[str, ...]:
        """Return the remarks in the order in which they first came up."""
        out = []
        for text, where in self._first.items():
            times = self._times[text]
            about = [f"{times} times"] if times > 1 else []
            if where:
                about.append(f"first at {where}" if times > 1 else f"at {where}")
            out.append(f"{text} ({', '.join(about)})" if about else text)
        return tuple(out)


class Source:
    """One file to be read.

    Attributes:
        path: the file.
        head: its first bytes, decompressed.
        first_lines: the whole lines of ``head``, clean and not blank; garbage when the file is no text.
        head_lines: the same, and where few of them hold a loss those further on that may.
        telling: of a small file all its lines, else those lines of it that may hold a loss or its step.
        sifted: whether ``telling`` has left out lines.
        parts: the files it consists of, in order; one, but for a folder of event files.
        notes: remarks of whoever reads it.
        settings: what the log says of its run's settings, by the log's own names.
        line: number of the line that ``lines`` gave last, from 1.
        at_end: whether that line is the file's last.
        unfinished: whether that line is the file's last and has no line end: it may have been cut off.

    A pipe is copied to a temporary file, which is deleted with this object.

    Raises:
        OSError: the file cannot be opened.
        UserError: it is an archive, or compressed in a way that is not read.
    """

    def __init__(self, path: Path, parts: Sequence[Path] = ()) -> None:
        self.path = path
        self._file = path
        if is_pipe(path):
            self._file = _spooled(path)
            weakref.finalize(self, self._file.unlink, missing_ok=True)
        self.parts = tuple(parts) or (path,)
        self.notes = Notes()
        self.settings: dict[str, str] = {}
        self.line = 0
        self.at_end = False
        self.unfinished = False
        self._open = _opener(self._file)
        with self.binary() as file:
            self.head = b"".join(_pieces(file))
        self._encoding = next((name for bom, name in _BOMS.items() if self.head.startswith(bom)), "utf-8")
        _refuse_archive(path, self.head)
        texts = self.head.decode(self._encoding, errors="replace").splitlines()
        if len(self.head) >= HEAD_BYTES and texts:
            del texts[-1]
        self.first_lines = [line for text in texts if (line := clean(text)).strip()]

    @cached_property
    def head_lines(self) -> list[str]:
        """The whole lines of the head, and what may say something further on."""
        return [*self.first_lines, *self._further]

    @property
    def sifted(self) -> bool:
        """Whether ``telling`` has left out lines."""
        return bool(self._further) or len(self.first_lines) > sift.MANY_LINES

    @cached_property
    def telling(self) -> list[str]:
        """The lines by which the form of free text is learned."""
        return [*self._sieve.kept, *self._further] if self.sifted else self.first_lines

    @cached_property
    def _sieve(self) -> sift.Sieve:
        sieve = sift.Sieve()
        sieve.take(self.first_lines)
        return sieve

    @cached_property
    def _further(self) -> list[str]:
        """Lines beyond the head that may say something, where the head says little."""
        sieve, further = self._sieve, sift.Sieve()
        small = len(self.head) < HEAD_BYTES
        if small or sieve.losses >= sift.FEW or not sift.is_text(self.head, self._encoding):
            return []
        if sift.is_table(self.first_lines):
            return []
        encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(self.head[:2], "utf-8")
        end = 1 + max(self.head.rfind(b"\n"), self.head.rfind(b"\r"))
        end += end % 2 if encoding != "utf-8" else 0
        with self.binary() as file:
            for _ in _pieces(file):
                pass
            pieces = _pieces(file, sift.FURTHEST, sift.WINDOW)
            for lines in sift.windows(pieces, self.head[end:], encoding, clean):
                further.take(lines)
                if further.full:
                    break
        return further.kept

    def again(self) -> Source:
        """Return the same file, to be read a second time."""
        return Source(self._file, () if self.parts == (self.path,) else self.parts)

    def binary(self, part: Path | None = None) -> IO[bytes]:
        """Open the file, or one of its parts, for a reader of bytes, decompressed."""
        if part is not None and part != self.path:
            return cast(IO[bytes], _opener(part)(part, "rb"))
        return cast(IO[bytes], self._open(self._file, "rb"))

    def lines(self) -> Iterator[str]:
        """Yield every line that is not blank: no line end, no colours, no NUL bytes."""
        if self._encoding != "utf-8":
            self.notes.add("the file begins with a byte-order mark")
        with self.binary() as file, io.TextIOWrapper(file, encoding=self._encoding, errors="replace") as text:
            ahead, self.line = self._next(text), 0
            while ahead:
                raw, ahead = ahead, self._next(text)
                self.line += 1
                self.at_end = not ahead
                self.unfinished = self.at_end and not raw.endswith("\n")
                line = clean(raw)
                if not line.strip():
                    self.notes.add("blank line left out", self.where)
                    continue
                if "\x1b" in raw or "\x00" in raw:
                    self.notes.add("colour codes or NUL bytes taken out of a line", self.where)
                yield line
            if text.newlines is not None and text.newlines != "\n":
                self.notes.add("lines end with carriage returns (Windows, or a progress bar)")

    @property
    def where(self) -> str:
        """The present line, for a note."""
        return f"line {self.line}"

    def bad_line(self, what: str) -> None:
        """Note that the present line could not be used; at the end of a file it was probably cut off."""
        self.notes.add("the last line is cut off and left out" if self.at_end else what, self.where)

    def _next(self, text: io.TextIOWrapper) -> str:
        line = _patiently(lambda: text.readline(MAX_LINE), None)
        if line is None:
            self.notes.add("the compressed file is damaged or cut off; what came before is used")
            return ""
        if len(line) < MAX_LINE or line.endswith("\n"):
            return line
        self.notes.add(f"a line of more than {MAX_LINE} characters left out")
        while (more := _patiently(lambda: text.readline(MAX_LINE), "")) and not more.endswith("\n"):
            pass
        return "\n"


def _opener(path: Path) -> Callable[..., Any]:
    with path.open("rb") as file:
        start = file.read(8)
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), io.open)


def clean(line: str) -> str:
    """Return a line without colour codes, NUL bytes and the blanks around it.

    >>> clean("\\x1b[32mloss\\x1b[0m 2.5 \\r\\n")
    'loss 2.5'
    """
    if "\x1b" in line:
        line = _ESCAPE.sub("", line)
    elif "[0m" in line or "[39m" in line:
        line = _LOST_ESCAPE.sub("", line)
    if "\x00" in line:
        line = line.replace("\x00", "")
    return line.strip(" \r\n\v\f\ufeff")  # tabs stay: they may part empty cells


def number(value: object) -> float | None:
    """Return a value of a log as a float; ``None`` where there is none.

    >>> [number(x) for x in ("1e-3", "NaN", "-inf", 7, "", "null", "abc", True)]
    [0.001, nan, -inf, 7.0, None, None, None, None]
    """
    if isinstance(value, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        if not isinstance(value, str) or "_" not in value:
            return float(value)
    except OverflowError:  # a whole number beyond 1e308
        return float("inf") if isinstance(value, int) and value > 0 else float("-inf")
    except ValueError:
        if isinstance(value, str) and _NOT_A_NUMBER.fullmatch(value.strip()):  # as C libraries print it
            return float("nan")
    return None


def is_absent(text: str) -> bool:
    """Return whether a cell says that there is no value, rather than something that is no number."""
    return text.strip().lower() in _ABSENT


def _pieces(file: IO[bytes], length: int = HEAD_BYTES, size: int = PIECE) -> Iterator[bytes]:
    """Yield so many bytes of a file in pieces: of damaged compressed data all that comes before the damage."""
    read = getattr(file, "read1", file.read) if not hasattr(file, "raw") else file.read
    while length > 0:
        piece = _patiently(partial(read, min(size, length)), b"")
        if not piece:
            return
        length -= len(piece)
        yield piece


def is_pipe(path: Path) -> bool:
    """Return whether what is there can be read only once."""
    mode = path.stat().st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _spooled(path: Path) -> Path:
    """Copy a pipe to a temporary file."""
    handle, name = tempfile.mkstemp(prefix="poise-")
    try:
        with path.open("rb") as pipe, os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(pipe, file)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)


_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd, which is not read here; unpack it with 'zstd -d'",
    b"PK\x03\x04": "is a zip archive; unpack it and name the log in it",
    b"PAR1": "is a Parquet file; write it as CSV",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it and name the log in it",
}


def _refuse_archive(path: Path, head: bytes) -> None:
    """Say what to do with a file whose content cannot be read as it is."""
    said = next((text for magic, text in _FOREIGN.items() if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        said = "is a tar archive; unpack it with 'tar -xf' and name the log in it"
    if said:
        raise UserError(f"'{path}' {said}")


def _patiently(read: Callable[[], T], otherwise: D) -> T | D:
    """Return what ``read`` gives; ``otherwise`` where compressed data end too early or are damaged."""
    try:
        return read()
    except (EOFError, zlib.error, lzma.LZMAError):
        return otherwise
    except OSError as error:
        if error.errno is not None:  # the disk, not the data
            raise
        return otherwise
