"""Removing lines as C4 did: those that are no sentences, and those about scripts, cookies and terms of use.

Raffel et al. 2020 (arXiv 1910.10683, section 2.2) and the code published with it. For web text only: in books with hard
line ends, in manuals and in code it removes most of what is good. Different from the reference: citations are removed
before words are counted and white space at the line's end is cut again after that; sentence ends of other scripts and
typographic quotes end a line as well; a line over 2 MiB is removed whatever it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import record
from poise.data.clean import chars, flat
from poise.data.clean.flat import Bytes, Chunk, Ints

REMOVED: Final = "removed_bytes"
"""The column that ``CleanLines`` adds: bytes of text it has taken away."""

EMPTY: Final = "lines.empty"
"""Reason of a document of which no line would be left."""

POLICY: Final = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LONGEST_LINE: Final = flat.HEAD_BYTES

_END_QUOTES: Final = ("”".encode(), "’".encode())
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CleanLines:
    """Stage: edits ``text`` of rows without a reason, line by line, and adds the int64 column ``removed_bytes``.

    Kept lines lose white space at both ends; blank lines go. A document of which nothing would be left keeps its text
    and gets the reason ``lines.empty``. FineWeb used these rules with ``terminal=False``.

    Attributes:
        terminal: remove lines that do not end with . ? ! or a quote, and those that end with "...".
        min_words: remove lines with fewer words (3 in C4's paper, 5 in its code).
        max_word: remove lines with a word of more characters.
        javascript: remove lines that hold the word, in any case.
        policy: remove lines that hold one of the phrases ``POLICY``.
        citations: remove ``[1]``, ``[]``, ``[edit]`` and ``[citation needed]`` inside of lines, first of all.
    """

    terminal: bool = True
    min_words: int = 3
    max_word: int = 1000
    javascript: bool = True
    policy: bool = True
    citations: bool = True

    def __post_init__(self) -> None:
        if self.min_words < 1:
            raise UserError(f"min_words is {self.min_words}; give 1 (remove blank lines only) or more")
        if self.max_word < 1:
            raise UserError(f"max_word is {self.max_word}; give 1 or more characters")

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        old = batch.column("text")
        new, left_D = self._edited(old)
        open_D = record.kept(batch)
        text = pc.if_else(pa.array(open_D & left_D), new, old)
        removed = pc.cast(pc.subtract(pc.binary_length(old), pc.binary_length(text)), pa.int64())
        batch = record.set_column(record.set_column(batch, "text", text), REMOVED, removed)
        return record.drop(batch, ~left_D, EMPTY)

    def would_remove(self, batch: pa.RecordBatch) -> dict[str, tuple[int, int]]:
        """Return lines and bytes that each rule would remove from rows without a reason; a line counts for the first.

        White space at the ends of lines and blank lines are not counted. For ``citations``: citations and bytes.
        """
        counts: dict[str, tuple[int, int]] = {}
        for chunk, _, skipped in _pieces(batch.column("text").filter(pa.array(record.kept(batch)))):
            found = _removed(self._judged(chunk)) | {"longest_line": (int(skipped > 0), skipped)}
            for name, (number, size) in found.items():
                before = counts.get(name, (0, 0))
                counts[name] = (before[0] + number, before[1] + size)
        return counts

    def _edited(self, text: pa.StringArray) -> tuple[pa.StringArray, Bools]:
        """Return the texts after cleaning, and which have a line left (an empty text stays as it is)."""
        parts: list[Bytes] = []
        sizes: list[Ints] = []
        for chunk, begins, _ in _pieces(text):
            part, size_D = _kept(self._judged(chunk))
            parts.append(part)
            if begins:
                sizes.append(size_D)
            else:
                sizes[-1][-1] += size_D[0]
        size_D = np.concatenate([*sizes, np.zeros(0, np.int64)])
        end_D = np.cumsum(size_D)
        # Every kept line ends with a newline; the last one of a document goes.
        data = np.delete(np.concatenate([*parts, np.zeros(0, np.uint8)]), end_D[size_D > 0] - 1)
        offset_D1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(size_D - 1, 0))])
        assert len(offset_D1) == len(text) + 1 and offset_D1[-1] == len(data)
        offsets = pa.py_buffer(offset_D1.astype(np.int32))
        left_D = (size_D > 0) | (np.asarray(pc.binary_length(text)) == 0)
        return pa.StringArray.from_buffers(len(text), offsets, pa.py_buffer(data)), left_D

    def _judged(self, chunk: Chunk) -> _Judged:
        cited_bytes = cited = 0
        if self.citations:
            chunk, cited, cited_bytes = _without_citations(chunk)
        places = flat.layout(chunk)
        full = np.flatnonzero(np.diff(places.line_word) > 0)
        start_L, end_L = places.starts[places.line_word[full]], places.ends[places.line_word[full + 1] - 1]
        bad: dict[str, Bools] = {}
        bad["max_word"] = _with(_long_words(places, self.max_word), places, full)
        if self.terminal:
            bad["terminal"] = ~_ends_sentence(chunk.data, places.classes, end_L)
        bad["min_words"] = np.diff(places.line_word)[full] < self.min_words
        if self.javascript:
            bad["javascript"] = _with(flat.find(chunk.data, b"javascript", ignore_case=True), places, full)
        if self.policy:
            at = [flat.find(chunk.data, phrase.encode(), ignore_case=True) for phrase in POLICY]
            bad["policy"] = _with(np.concatenate(at), places, full)
        return _Judged(chunk, start_L, end_L, places.newlines[full], bad, cited, cited_bytes)


@dataclass(frozen=True, slots=True)
class _Judged:
    """Lines that hold a word, and which rules each breaks."""

    chunk: Chunk
    start: Ints
    end: Ints
    newline: Ints
    bad: dict[str, Bools]
    cited: int
    cited_bytes: int


def _pieces(text: pa.StringArray) -> Iterator[tuple[Chunk, bool, int]]:
    """Yield chunks of documents, and of a long document pieces of whole lines.

    With each, whether documents begin there; and the bytes of a line too long to keep, for which the piece is empty.
    """
    for start, end in flat.spans(text, flat.CHUNK_BYTES):
        data = flat.one(text, start) if end == start + 1 else None
        if data is None or len(data) <= LONGEST_LINE:
            yield flat.joined(text.slice(start, end - start)), True, 0
            continue
        ends = np.append(np.flatnonzero(data == ord("\n")) + 1, len(data))
        at = 0
        while at < len(data):
            fits = int(np.searchsorted(ends, at + LONGEST_LINE, side="right"))
            last = int(ends[fits - 1]) if fits else 0
            after = last if last > at else int(ends[np.searchsorted(ends, at, side="right")])
            skipped = after - at if last <= at else 0
            yield flat.alone(data[at:after] if not skipped else data[:0]), at == 0, skipped
            at = after


def _kept(judged: _Judged) -> tuple[Bytes, Ints]:
    """Return the bytes of the lines that break no rule, each with a newline, and their size by document."""
    keep_L = np.ones(len(judged.start), np.bool_)
    for bad_L in judged.bad.values():
        keep_L &= ~bad_L
    newline = judged.newline[keep_L]
    bytes_N = judged.chunk.data
    borders = np.stack([judged.start[keep_L], judged.end[keep_L], newline, newline + 1], axis=1).ravel()
    runs = np.diff(borders, prepend=0, append=len(bytes_N))
    keep_N = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return bytes_N[keep_N], flat.Rank(keep_N).within(judged.chunk.first)


def _removed(judged: _Judged) -> dict[str, tuple[int, int]]:
    counts = {"citations": (judged.cited, judged.cited_bytes)}
    left_L = np.ones(len(judged.start), np.bool_)
    for name, bad_L in judged.bad.items():
        taken_L = left_L & bad_L
        left_L &= ~bad_L
        counts[name] = (int(taken_L.sum()), int((judged.end - judged.start)[taken_L].sum()))
    return counts


def _with(at: Ints, places: flat.Layout, full: Ints) -> Bools:
    """Return which lines hold one of the places, (L,)."""
    held_K = np.zeros(len(places.newlines), np.bool_)
    held_K[np.searchsorted(places.newlines, at)] = True
    return held_K[full]


def _long_words(places: flat.Layout, most: int) -> Ints:
    """Return where words of more than ``most`` characters begin."""
    long = np.flatnonzero(places.ends - places.starts > most)
    start, end = places.starts[long], places.ends[long]
    return start[places.length(start, end) > most]


def _ends_sentence(bytes_N: Bytes, class_N: Bytes, end_L: Ints) -> Bools:
    """Return which lines end with a sentence's end or a quote, and not with three dots, (L,)."""
    last_L = bytes_N[end_L - 1]
    ends_L = (class_N[end_L - 1] & chars.TERMINAL) != 0
    ends_L |= (last_L == ord('"')) | (last_L == ord("'"))
    for quote in _END_QUOTES:
        ends_L |= flat.spells(bytes_N, end_L - len(quote), quote)
    return np.asarray(ends_L & ~flat.spells(bytes_N, end_L - 3, b"..."))


def _without_citations(chunk: Chunk) -> tuple[Chunk, int, int]:
    """Return the chunk without citations, and how many they were, and their bytes."""
    bytes_N = chunk.data
    open_M = np.flatnonzero(bytes_N == ord("["))
    close = np.flatnonzero(bytes_N == ord("]"))
    if not len(open_M) or not len(close):
        return chunk, 0, 0
    place_M = np.searchsorted(close, open_M)
    open_M, place_M = open_M[place_M < len(close)], place_M[place_M < len(close)]
    close_M = close[place_M]
    digits = flat.Rank((bytes_N >= ord("0")) & (bytes_N <= ord("9")))
    found_M = digits.before(close_M) - digits.before(open_M) == close_M - open_M - 1
    for word in (b"[edit]", b"[citation needed]"):
        found_M |= flat.spells(bytes_N, open_M, word)
    if not found_M.any():
        return chunk, 0, 0
    runs = np.diff(np.stack([open_M[found_M], close_M[found_M] + 1], axis=1).ravel(), prepend=0, append=len(bytes_N))
    gone_N = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    first_D1 = chunk.first - flat.Rank(gone_N).before(chunk.first)
    return Chunk(bytes_N[~gone_N], first_D1), int(found_M.sum()), int(gone_N.sum())
