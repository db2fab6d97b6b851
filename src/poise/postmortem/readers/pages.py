"""A log as blocks of whole lines, for readers that look at many lines at once.

Lines end here where ``Source.lines`` ends them: at a line feed, a carriage return, or both.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from poise.postmortem.readers.source import MAX_LINE, PIECE, Source

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

BLOCK = 1 << 20
"""Bytes looked at together."""

WIDTH = 24
"""Bytes of the widest number that is looked at."""

LONGEST = 120
"""Bytes of the longest text that is compared."""

_BLANK, _LINE_END, _BAR = b" \n|"


def pages(source: Source) -> Iterator[tuple[Page, bool]]:
    """Yield the file as blocks of whole lines, each with whether it is the last. The very last line may have no end."""
    before = b""
    for block in _blocks(source):
        if before:
            yield Page(before), False
        before = block
    if before:
        yield Page(before if before.endswith(b"\n") else before + b"\n"), True


def _blocks(source: Source) -> Iterator[bytes]:
    kept, skipping, returns = b"", False, False
    for piece in _pieces(source):
        if piece is None:
            source.notes.add("the compressed file is damaged or cut off; what came before is used")
            kept = b""  # the line in which it is damaged
            break
        returns = returns or b"\r" in piece
        kept += piece
        cut = 1 + max(kept.rfind(b"\n"), kept.rfind(b"\r", 0, len(kept) - 1) if returns else -1)
        if cut == 0:
            if len(kept) > MAX_LINE:
                source.notes.add(f"a line of more than {MAX_LINE} characters left out")
                kept, skipping = b"", True
            continue
        block, kept = _line_feeds(kept[:cut], returns), kept[cut:]
        if skipping:
            block, skipping = block[block.index(b"\n") + 1 :], False
        if block:
            yield block
    if returns:
        source.notes.add("lines end with carriage returns (Windows, or a progress bar)")
    if kept and not skipping:
        yield _line_feeds(kept, returns)


def _line_feeds(block: bytes, returns: bool) -> bytes:
    return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if returns else block


def _pieces(source: Source) -> Iterator[bytes | None]:
    """Yield the bytes, and ``None`` where compressed data are damaged; those in small steps, so that little is lost."""
    with source.binary() as file:
        if hasattr(file, "raw"):
            while piece := file.read(BLOCK):
                yield piece
            return
        steps: list[bytes] = []
        while True:
            try:
                step = file.read1(PIECE)  # type: ignore[attr-defined]
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk, not the data
                    raise
                yield b"".join(steps)
                yield None
                return
            steps.append(step)
            if not step or len(steps) * PIECE >= BLOCK:
                yield b"".join(steps)
                steps = []
            if not step:
                return


class Page:
    """A block of whole lines, with the places of its line ends and bars.

    Attributes:
        block: the bytes, the last one a line end.
        begins: of each line.
        bars: how many bars each line has.
    """

    def __init__(self, block: bytes) -> None:
        self.block = block
        self._padded = b" " * LONGEST + block + b" " * LONGEST
        self._bytes = np.frombuffer(self._padded, np.uint8)
        inner = self._bytes[LONGEST : LONGEST + len(block)]
        self.parts: Ints = np.flatnonzero((inner == _BAR) | (inner == _LINE_END))
        ends = np.flatnonzero(inner[self.parts] == _LINE_END)
        self.first = np.concatenate([[0], ends[:-1] + 1])
        self.begins: Ints = np.concatenate([[0], self.parts[ends[:-1]] + 1])
        self.ends: Ints = self.parts[ends]
        self.bars: Ints = ends - self.first

    def __len__(self) -> int:
        return len(self.begins)

    def line(self, place: int) -> bytes:
        """Return a line without its end."""
        return self.block[self.begins[place] : self.ends[place]]

    def windows(self, begins: Ints, width: int) -> Bytes:
        """Return (rows, width) bytes from each of the places on."""
        return self._strings(begins, width).view(np.uint8).reshape(len(begins), width)

    def same(self, begins: Ints, text: bytes) -> Mask:
        """Return where ``text`` stands."""
        if not text:
            return np.ones(len(begins), dtype=bool)
        return np.asarray(self._strings(begins, len(text)) == text)

    def numbers(self, ends: Ints, lengths: Ints) -> Bytes:
        """Return (rows, WIDTH) bytes that end at ``ends``; all but the last ``lengths`` are blanks."""
        out = self.windows(ends - WIDTH, WIDTH)
        before = np.arange(WIDTH, dtype=np.uint8) < (WIDTH - lengths).astype(np.uint8)[:, None]
        np.copyto(out, np.uint8(_BLANK), where=before)
        return out

    def _strings(self, begins: Ints, width: int) -> NDArray[np.bytes_]:
        count = len(self._padded) - width + 1
        view = np.ndarray((count,), f"S{width}", buffer=self._padded, strides=(1,))
        return view[begins + LONGEST]
