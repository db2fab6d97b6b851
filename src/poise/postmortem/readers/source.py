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
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
D = TypeVar("D")

Row = dict[str, float]

HEAD_BYTES = 1 << 20
"""Enough for the header of a table with thousands of columns."""

PIECE = 1 << 13
MAX_LINE = 1 << 22
"""Characters; what is longer is not a line of a log, and is not held in memory."""

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
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
        head_lines: the whole lines of ``head``, clean and not blank; garbage when the file is no text.
        parts: the files it consists of, in order; one, but for a folder of event files.
        notes: remarks of whoever reads it.
        settings: what the log says of its run's settings, by the log's own names.
        line: number of the line that ``lines`` gave last, from 1.
        at_end: whether that line is the file's last.
        unfinished: whether that line is the file's last and has no line end: it may have been cut off.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, parts: Sequence[Path] = ()) -> None:
        self.path = path
        self.parts = tuple(parts) or (path,)
        self.notes = Notes()
        self.settings: dict[str, str] = {}
        self.line = 0
        self.at_end = False
        self.unfinished = False
        self._open = _opener(path)
        with self.binary() as file:
            self.head = b"".join(_pieces(file))
        self._encoding = next((name for bom, name in _BOMS.items() if self.head.startswith(bom)), "utf-8")
        texts = self.head.decode(self._encoding, errors="replace").splitlines()
        if len(self.head) >= HEAD_BYTES:
            del texts[-1]
        self.head_lines = [line for text in texts if (line := clean(text)).strip()]

    def binary(self, part: Path | None = None) -> IO[bytes]:
        """Open the file, or one of its parts, for a reader of bytes, decompressed."""
        if part is not None and part != self.path:
            return cast(IO[bytes], _opener(part)(part, "rb"))
        return cast(IO[bytes], self._open(self.path, "rb"))

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


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the beginning of a file in small pieces, so that damage costs no more than one."""
    for _ in range(HEAD_BYTES // PIECE):
        piece = _patiently(lambda: file.read(PIECE), b"")
        if not piece:
            return
        yield piece


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
