"""Documents as one flat array of bytes, with what text features need of it: words, lines, counts, hashes, equal items.

Shapes: N bytes, D documents, W words, L lines, M items of any kind. Every document is followed by one newline, so that
no word and no line reaches over the border of two documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.data.clean import chars

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

CHUNK_BYTES: Final = 2**19
"""Text looked at together. Arrays of some MiB stay in a core's cache: measured twice as fast as 8 MiB at a time."""

HEAD_BYTES: Final = 2**21
"""A longer document is judged by its beginning of this size, so that one huge document cannot take the memory."""

_BASE: Final = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_MIX: Final = np.uint64(0xFF51AFD7ED558CCD)
_HALF: Final = np.uint64(32)
_SIX: Final = np.uint64(6)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some neighbouring documents.

    Attributes:
        data: UTF-8 of the documents, each followed by one newline, (N,).
        first: where each document begins, and N, (D + 1,).
    """

    data: Bytes
    first: Ints


def spans(text: pa.StringArray, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of at most ``chunk_bytes`` of text, but of at least one row."""
    assert pa.types.is_string(text.type) and not text.null_count, (text.type, text.null_count)
    count = len(text)
    if count == 0:
        return
    end_D1 = np.frombuffer(text.buffers()[1], np.int32)[text.offset : text.offset + count + 1].astype(np.int64)
    at = 0
    while at < count:
        end = max(at + 1, int(np.searchsorted(end_D1, end_D1[at] + chunk_bytes, side="right")) - 1)
        yield at, end
        at = end


def chunks(text: pa.StringArray, chunk_bytes: int = CHUNK_BYTES, head_bytes: int = HEAD_BYTES) -> Iterator[Chunk]:
    """Yield the documents of an array in order, ``chunk_bytes`` at a time and at least one; long ones are cut."""
    for start, end in spans(text, chunk_bytes):
        data = one(text, start) if end == start + 1 else None
        if data is not None and len(data) > head_bytes:
            # Cut before the first byte of a character.
            near = data[head_bytes - 3 : head_bytes + 1]
            yield alone(data[: head_bytes - 3 + int(np.flatnonzero((near & 0xC0) != 0x80)[-1])])
        else:
            yield joined(text.slice(start, end - start))


def one(text: pa.StringArray, row: int) -> Bytes:
    """Return the bytes of one document, not copied."""
    buffer = text[row].as_buffer()
    return np.frombuffer(buffer, np.uint8) if buffer is not None and buffer.size else np.zeros(0, np.uint8)


def alone(data: Bytes) -> Chunk:
    """Return one document as a chunk."""
    return Chunk(np.append(data, np.uint8(ord("\n"))), np.array([0, len(data) + 1]))


def joined(text: pa.StringArray) -> Chunk:
    """Return documents as a chunk."""
    lined = pc.binary_join_element_wise(text, "", "\n")
    _, offsets, data = lined.buffers()
    first_D1 = np.frombuffer(offsets, np.int32)[lined.offset : lined.offset + len(lined) + 1].astype(np.int64)
    bytes_N = np.frombuffer(data, np.uint8)[first_D1[0] : first_D1[-1]]
    return Chunk(bytes_N, first_D1 - first_D1[0])


def ones(words_M: Hashes) -> NDArray[np.uint8]:
    """Return the number of set bits of each value; NumPy has it from 2.0 on."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words_M))
    return _ones_by_halves(words_M)


def _ones_by_halves(words_M: Hashes) -> NDArray[np.uint8]:
    """Return the number of set bits by adding neighbours of 1, 2 and 4 bits, then all bytes by one product."""
    one, two, four = (np.uint64(pattern) for pattern in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    x = words_M - ((words_M >> np.uint64(1)) & one)
    x = (x & two) + ((x >> np.uint64(2)) & two)
    x = (x + (x >> np.uint64(4))) & four
    return np.asarray((x * np.uint64(0x0101010101010101)) >> np.uint64(56), np.uint8)


class Rank:
    """How many bytes before a place carry a mark: bits packed 64 to a word, with a running count of words."""

    def __init__(self, marks_N: NDArray[np.bool_]) -> None:
        self._bits = np.zeros(len(marks_N) // 64 + 1, np.uint64)
        packed = np.packbits(marks_N, bitorder="little")
        self._bits.view(np.uint8)[: len(packed)] = packed
        self._running = np.zeros(len(self._bits), np.int64)
        np.cumsum(ones(self._bits[:-1]), out=self._running[1:])

    def before(self, places_M: Ints) -> Ints:
        """Return the number of marks before each place, 0 <= place <= N, (M,)."""
        at_M = places_M >> 6
        low_M = (np.uint64(1) << (places_M & 63).astype(np.uint64)) - np.uint64(1)
        counted: Ints = self._running[at_M] + ones(self._bits[at_M] & low_M)
        return counted

    def within(self, borders_M: Ints) -> Ints:
        """Return the number of marks between neighbouring borders, (M - 1,)."""
        return np.diff(self.before(borders_M))


@cache
def _powers(base: int, size: int) -> Hashes:
    powers = np.full(size, base, np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    powers.flags.writeable = False
    return powers


class Prefix:
    """Hashes of any stretches of a sequence: a polynomial modulo 2**64, summed from the left (Karp and Rabin 1987).

    The hash of items s .. e is the sum of item[i] * B**(i - s). Two different stretches have the same hash with a
    probability near 2**-64 for text nobody made to collide.
    """

    def __init__(self, items_N: NDArray[np.unsignedinteger]) -> None:
        size = len(items_N)
        # Tables of one size serve all usual chunks; a longer one is made for one document and forgotten.
        table = _powers if size <= 2 * CHUNK_BYTES else _powers.__wrapped__
        rounded = max(2 * CHUNK_BYTES, size)
        self._inverse = table(pow(_BASE, -1, 2**64), rounded)
        self._sums = np.zeros(size + 1, np.uint64)
        np.multiply(items_N, table(_BASE, rounded)[:size], out=self._sums[1:], dtype=np.uint64)
        np.cumsum(self._sums[1:], out=self._sums[1:])

    def hashes(self, start_M: Ints, end_M: Ints) -> Hashes:
        """Return the hash of each stretch, well mixed, (M,)."""
        return mixed((self._sums[end_M] - self._sums[start_M]) * self._inverse[start_M])


def mixed(x_M: Hashes) -> Hashes:
    """Return hashes with all bits of a value spread over the high bits, (M,)."""
    x_M = x_M ^ (x_M >> _HALF)
    x_M *= _MIX
    return x_M


@dataclass(frozen=True, slots=True)
class Groups:
    """Items sorted so that equal ones stand together, each group in its first order.

    Attributes:
        order: number of the item at each place, (M,).
        again: whether the item equals the one before it here, so whether it has occurred earlier, (M,).
    """

    order: Ints
    again: NDArray[np.bool_]

    def repeats(self) -> Ints:
        """Return the items that have occurred before, in order."""
        return np.sort(self.order[self.again])

    def shared(self) -> Ints:
        """Return the items that occur twice or more, in no order."""
        shared_M = self.again.copy()
        shared_M[:-1] |= self.again[1:]
        return self.order[shared_M]

    def counted(self) -> tuple[Ints, Ints]:
        """Return the first item and the size of each group of two or more, (G,) and (G,)."""
        first_G = np.flatnonzero(~self.again)
        size_G = np.diff(first_G, append=len(self.again))
        several = size_G > 1
        return self.order[first_G[several]], size_G[several]


def groups(hash_M: Hashes, owner_M: Ints) -> Groups:
    """Group items that have the same owner and the same hash.

    The item's number is packed below the high bits of its hash, and one plain sort does the rest: several times
    faster than an indirect sort. For 80,000 words 47 bits of hash remain: one false pair in some 40,000 such chunks.
    """
    count = len(hash_M)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    key_M = (hash_M + owner_M.astype(np.uint64)) * _MIX  # before the product, so that the owner reaches the high bits
    key_M ^= key_M >> _HALF
    key_M *= _MIX
    key_M = (key_M & ~low) | np.arange(count, dtype=np.uint64)
    key_M.sort()
    again_M = np.zeros(count, np.bool_)
    again_M[1:] = (key_M[1:] ^ key_M[:-1]) <= low
    return Groups((key_M & low).astype(np.int64), again_M)


def spells(bytes_N: Bytes, at_M: Ints, phrase: bytes) -> NDArray[np.bool_]:
    """Return whether a phrase stands at each place; a place before the beginning or near the end is none, (M,)."""
    marks_M = (at_M >= 0) & (at_M <= len(bytes_N) - len(phrase))
    for step, letter in enumerate(phrase):
        marks_M &= bytes_N[np.clip(at_M + step, 0, len(bytes_N) - 1)] == letter
    return marks_M


_BY_FREQUENCY: Final = b" etaoinshrdlcumwfgypbvkjxqz"  # English text, commonest first; what is not here is rarer


def find(bytes_N: Bytes, phrase: bytes, ignore_case: bool = False) -> Ints:
    """Return where a phrase begins, overlapping ones too, in order, (M,).

    The rarest byte of the phrase is looked for; only where it stands are the others compared.

    Args:
        bytes_N: text.
        phrase: what to find; in lower case if ``ignore_case``.
        ignore_case: take ASCII capitals for small letters.
    """
    rank = {byte: number for number, byte in enumerate(_BY_FREQUENCY)}
    anchor = max(range(len(phrase)), key=lambda at: rank.get(phrase[at], len(rank)))
    steps = [anchor, *(step for step in range(len(phrase)) if step != anchor)]
    at = np.arange(0)
    for number, step in enumerate(steps):
        letter = phrase[step]
        fold = 0x20 if ignore_case and chr(letter).isalpha() else 0
        if number == 0:
            at = np.flatnonzero((bytes_N | fold if fold else bytes_N) == letter) - anchor
            at = at[(at >= 0) & (at <= len(bytes_N) - len(phrase))]
        else:
            at = at[(bytes_N[at + step] | fold) == letter]
    return at


@dataclass(frozen=True, slots=True)
class Layout:
    """Words and lines of a chunk, as places in its bytes.

    Attributes:
        classes: class bits of every byte (``chars``), (N,).
        inner: rank of the bytes that do not begin a character; None where all is ASCII.
        starts, ends: each word's bytes, (W,) and (W,).
        first_word: first word of each document, and W, (D + 1,).
        line_start: beginning of every line, blank or not, (K,).
        newlines: the newline that ends it, (K,).
        line_word: first word at or after each line's beginning, and W, (K + 1,).
    """

    classes: Bytes
    inner: Rank | None
    starts: Ints
    ends: Ints
    first_word: Ints
    line_start: Ints
    newlines: Ints
    line_word: Ints

    def length(self, start_M: Ints, end_M: Ints) -> Ints:
        """Return the number of characters between places, (M,)."""
        if self.inner is None:
            return end_M - start_M
        return end_M - start_M - (self.inner.before(end_M) - self.inner.before(start_M))


def layout(chunk: Chunk) -> Layout:
    """Find the words (runs without white space) and the lines of a chunk."""
    bytes_N = chunk.data
    class_N = chars.classes(bytes_N)
    inner_N = (class_N & chars.INNER) != 0
    space_N = (class_N & chars.SPACE) != 0
    edges = np.flatnonzero(space_N[1:] != space_N[:-1]) + 1
    if not space_N[0]:
        edges = np.concatenate([np.zeros(1, np.int64), edges])
    start_W = np.ascontiguousarray(edges[0::2])
    newline_K = np.flatnonzero(bytes_N == ord("\n"))
    line_K = np.concatenate([np.zeros(1, np.int64), newline_K[:-1] + 1])
    return Layout(
        classes=class_N,
        inner=Rank(inner_N) if inner_N.any() else None,
        starts=start_W,
        ends=np.ascontiguousarray(edges[1::2]),
        first_word=np.searchsorted(start_W, chunk.first),
        line_start=line_K,
        newlines=newline_K,
        line_word=np.searchsorted(start_W, np.append(line_K, len(bytes_N))),
    )
