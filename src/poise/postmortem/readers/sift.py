"""The lines of a large text that may say something, so that a format can be recognised below any amount of noise.

A job of many ranks may print a hundred megabytes of what its libraries do before its first step. Of such a file the
lines with a number and a word for a loss are kept, with the few before each that speak of a step.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

WINDOW = 1 << 20
FURTHEST = 256 << 20
"""Bytes that are looked at."""

ENOUGH = 2000
"""Lines with a loss, after which nothing more is looked at."""

FEW = 100
"""Lines with a loss in the beginning of a file that tell its form; with fewer the rest is looked at."""

MANY_LINES = 20_000
"""Lines of a beginning that are looked at without being sifted."""

MOST = 8 << 20
"""Characters that are kept."""

LONGEST = 16_000
"""Characters of a line that is kept."""

BEFORE = 64
"""Lines that speak of a step and are kept with the loss below."""

MOST_CODE = 500
NULS = 64
"""Zero bytes in a beginning that is no text."""

_WORDS = (b"loss", b"bpb", b"ppl", b"nll", b"xent", b"entropy", b"tel:", b"trl:", b"mllog")
_LOSS = re.compile("|".join(word.decode() for word in _WORDS))
_STEP = re.compile(r"step|iter|epoch|batch|update|lr|rate|norm|\d/\d|\d\|\d|eval|valid")
_NUMBER = re.compile(r"\d|\bnan\b")
_CODE = ("def ", "class ", "import ", "from ", "assert ", "#include", "```")
_FIGURES = re.compile(r"[-+0-9.eE,;:\t |\"naifNAIF]+")


class Sieve:
    """Keeps the lines that may say something, in order.

    Attributes:
        kept: those lines.
        losses: how many of them may hold a loss.
    """

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.losses = 0
        self._before: deque[str] = deque(maxlen=BEFORE)
        self._room = MOST
        self._code = 0

    @property
    def full(self) -> bool:
        """Whether nothing more needs to be looked at."""
        return self.losses >= ENOUGH or self._room <= 0

    def take(self, lines: Iterable[str]) -> None:
        """Keep what may say something."""
        for line in lines:
            if len(line) > LONGEST:
                continue
            low = line.lower()
            if _LOSS.search(low) and _NUMBER.search(low):
                for other in (*self._before, line):
                    self._keep(other)
                self._before.clear()
                self.losses += 1
            elif line.startswith(_CODE):
                self._code += 1
                if self._code < MOST_CODE:
                    self._keep(line)
            elif _STEP.search(low) or _LOSS.search(low):
                self._before.append(line)
            if self.full:
                return

    def _keep(self, line: str) -> None:
        self.kept.append(line)
        self._room -= len(line)


def is_text(head: bytes, encoding: str) -> bool:
    """Return whether a beginning is worth looking further."""
    return encoding != "utf-8" or head.count(0) < NULS


def is_table(lines: list[str]) -> bool:
    """Return whether the lines are rows of figures, in which no words are to be found."""
    last = lines[-200:]
    return bool(last) and 10 * sum(_FIGURES.fullmatch(line) is not None for line in last) >= 9 * len(last)


def windows(pieces: Iterator[bytes], kept: bytes, encoding: str, clean: Callable[[str], str]) -> Iterator[list[str]]:
    """Yield the clean lines of those windows of a file that hold a word for a loss.

    Args:
        pieces: the file's bytes.
        kept: the beginning of the line that comes first.
        encoding: of the text.
        clean: what to do to each line.
    """
    plain = encoding == "utf-8"
    wide = "utf-16-be" if encoding == "utf-16-be" else "utf-16-le"
    end = b"\n" if plain else "\n".encode(wide)
    looked = 0
    for piece in pieces:
        looked += len(piece)
        kept += piece
        cut = kept.rfind(end)
        if cut < 0 and plain:
            cut = kept.rfind(b"\r")
        if not plain:  # a whole number of characters
            cut = cut if cut % 2 == 0 else -1
        if cut >= 0:
            block, kept = kept[: cut + len(end)], kept[cut + len(end) :]
            low = block.lower() if plain else b""
            if not plain or any(word in low for word in _WORDS):
                text = block.decode("utf-8" if plain else wide, errors="replace")
                yield [line for raw in text.splitlines() if (line := clean(raw)).strip()]
        elif len(kept) > 8 * WINDOW:  # no line of a log
            kept = b""
        if looked >= FURTHEST:
            return
    if kept:
        text = kept.decode("utf-8" if plain else wide, errors="replace")
        yield [line for raw in text.splitlines() if (line := clean(raw)).strip()]
