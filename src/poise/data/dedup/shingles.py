"""Words and word n-grams of documents as 64-bit hashes, computed on flat bytes without a Python loop over words.

What a word is: a run of letters and digits; white space, punctuation and control characters separate. Below U+0800
(Latin, Greek, Cyrillic, Hebrew, Arabic) case is folded and Unicode's categories decide; above, the typographic quotes,
dashes and spaces of U+2000-206F and the CJK punctuation of U+3000-303F separate and all else stands. Scripts written
without spaces (Thai, Lao, Khmer, Burmese, kana, Han) give one word a character, so that n-grams of them mean something.
So ``"Don't -- STOP!"`` and ``don’t stop`` are the same words: don, t, stop. Composed and decomposed accents differ.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data.bits import mix
from poise.data.record import flat

BLOCK_BYTES: Final = 2**20
"""Bytes of text worked on at once: vectors of this size pay, and stay near the processor's cache."""

BLOCK_DOCUMENTS: Final = 8192
"""Documents worked on at once, so that a signature for each stays small beside the text."""

_KEEP: Final = bytes(
    byte + 32 if 65 <= byte <= 90 else byte if 97 <= byte <= 122 or 48 <= byte <= 57 or byte >= 128 else 0
    for byte in range(256)
)
_BASE: Final = 0x9E3779B97F4A7C15  # multiplier of the word sequence's polynomial; odd, so no bit is lost
_PAD: Final = 8  # zero bytes behind a block, so that eight bytes may be read at any place in it


@dataclass(frozen=True)
class Words:
    """The words of consecutive documents ``row, row + 1, ...``, or of one part of document ``row``.

    ``hashes`` (W,) uint64; ``offsets`` (D + 1,) int64: words ``offsets[d]:offsets[d + 1]`` are of document ``row + d``.
    ``part``: this block holds one document too long for a block, ``part`` parts of it came before; ``last``: no more
    parts follow.
    """

    row: int
    hashes: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    part: int = 0
    last: bool = True


def words(text: pa.StringArray, block_bytes: int = BLOCK_BYTES) -> Iterator[Words]:
    """Yield the hashed words of a column, in blocks of about ``block_bytes`` bytes of text.

    A document that is longer comes in several blocks of its own, cut where a word ends, at places that depend on
    nothing but its own bytes; so memory is bounded and a document's hashes do not depend on its neighbours.
    """
    data, ends_N1 = flat(text)
    first, count = 0, len(ends_N1) - 1
    while first < count:
        # As many whole documents as fit; at least one, which then may be too long.
        after = int(np.searchsorted(ends_N1, ends_N1[first] + block_bytes, side="right")) - 1
        after = max(min(after, first + BLOCK_DOCUMENTS), first + 1)
        start, stop = int(ends_N1[first]), int(ends_N1[after])
        if stop - start <= block_bytes:
            hashes, offsets = _hash_words(data[start:stop], ends_N1[first : after + 1] - start)
            yield Words(first, hashes, offsets)
        else:
            yield from _parts(first, data[start:stop], block_bytes)
        first = after


def _parts(row: int, data: NDArray[np.uint8], block_bytes: int) -> Iterator[Words]:
    """Yield one long document in parts, each cut behind a byte that ends a word, or at a character's start."""
    start = part = 0
    while start < len(data):
        stop = min(start + block_bytes, len(data))
        if stop < len(data):
            stop = start + _cut(data[start:stop])
        hashes, offsets = _hash_words(data[start:stop], np.array([0, stop - start]))
        yield Words(row, hashes, offsets, part, stop == len(data))
        start, part = stop, part + 1


def _cut(data: NDArray[np.uint8]) -> int:
    """Return where to end a part: behind the last ASCII separator of its last 64 KiB, else before a character."""
    tail = data[-(2**16) :]
    kept = np.frombuffer(tail.tobytes().translate(_KEEP), np.uint8)
    places = np.flatnonzero(kept == 0)
    if len(places):
        return len(data) - len(tail) + int(places[-1]) + 1
    whole = np.flatnonzero((data[-4:] & 0xC0) != 0x80)  # bytes that begin a character
    return len(data) - 4 + int(whole[-1]) if len(data) > 8 and len(whole) else len(data)


def _hash_words(data: NDArray[np.uint8], ends: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the word hashes of a block, and the word offsets of its documents."""
    size = len(data)
    low = np.frombuffer(data.tobytes().translate(_KEEP) + bytes(_PAD), np.uint8)
    own: NDArray[np.int64] | None = None
    if size and data.max() >= 128:
        low, own = _beyond_ascii(low.copy(), size)
    inside = np.zeros(size + 2, bool)  # a border on both sides
    np.not_equal(low[:size], 0, out=inside[1:-1])
    begin = inside[1:] & ~inside[:-1]  # (size + 1,) a word begins at this byte
    begin[ends] |= inside[ends + 1]  # a document's first byte begins a word
    if own is not None:
        begin[own] |= inside[own + 1]
    begin[size] = False
    finish = inside[1:-1] & (begin[1:] | ~inside[2:])
    starts = np.flatnonzero(begin)
    lengths = np.flatnonzero(finish) + 1 - starts
    return _hash_spans(low, starts, lengths), np.searchsorted(starts, ends)


def _beyond_ascii(low: NDArray[np.uint8], size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Fold case and blank punctuation beyond ASCII in ``low``; return it and where a word must begin."""
    at = np.flatnonzero(low[:size] >= 0xC2)  # lead bytes of characters that are not ASCII
    lead, second, third = low[at], low[at + 1], low[at + 2]
    two = lead < 0xE0
    pair = at[two]
    folded = _two_byte_table()[(low[pair].astype(np.uint16) << np.uint16(8)) | low[pair + 1]]
    low[pair], low[pair + 1] = folded >> np.uint16(8), folded & np.uint16(255)
    blank = ((lead == 0xE2) & ((second == 0x80) | ((second == 0x81) & (third < 0xB0)))) | (
        (lead == 0xE3) & (second == 0x80)
    )
    for step in range(3):
        low[at[blank] + step] = 0
    kana_han = ((lead == 0xE3) & (second > 0x80)) | ((lead > 0xE3) & (lead <= 0xE9))
    # U+0E00-0EFF Thai, Lao; U+1000-109F Burmese; U+1780-17FF Khmer
    southeast = ((lead == 0xE0) & (second >= 0xB8)) | (
        (lead == 0xE1) & ((second == 0x80) | (second == 0x81) | (second == 0x82) | (second == 0x9E) | (second == 0x9F))
    )
    alone = at[kana_han | southeast]
    return low, np.minimum(np.concatenate([alone, alone + 3]), size)


@functools.cache
def _two_byte_table() -> NDArray[np.uint16]:
    """Return, for each two-byte character of UTF-8, its lower case, or 0 where it is neither letter, mark nor digit."""
    table = np.zeros(2**16, np.uint16)
    for code in range(0x80, 0x800):
        here, lower = chr(code), chr(code).lower()
        if unicodedata.category(here)[0] in "LMN":
            folded = lower if len(lower.encode()) == 2 else here
            table[int.from_bytes(here.encode(), "big")] = int.from_bytes(folded.encode(), "big")
    return table


def _hash_spans(low: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return one hash for each span of bytes: eight bytes at a time, the few long words again and again."""
    eight = np.ndarray((len(low) - _PAD + 1,), "<u8", low, strides=(1,))  # the eight bytes from every place on
    masks = (np.uint64(1) << (np.arange(8, dtype=np.uint64) * np.uint64(8))) - np.uint64(1)
    masks = np.append(masks, np.uint64(2**64 - 1))
    hashes = mix(eight[starts] & masks[np.minimum(lengths, 8)])
    left, done = np.flatnonzero(lengths > 8), 8
    while len(left):
        rest = lengths[left] - done
        more = eight[starts[left] + done] & masks[np.minimum(rest, 8)]
        hashes[left] = mix((hashes[left] * np.uint64(_BASE)) ^ more)
        left, done = left[rest > 8], done + 8
    return hashes


def ngrams(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return the hash of every ``n`` consecutive words, (W - n + 1,): a polynomial in the words, modulo 2**64.

    Built by doubling: the hash of a + b words is ``hash(a) * base**b + hash(b)``.
    """
    assert n >= 1, n
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    gram, size = hashes, 1
    for bit in bin(n)[3:]:
        gram = gram[:-size] * _power(size) + gram[size:]
        size *= 2
        if bit == "1":
            gram = gram[:-1] * _power(1) + hashes[size : size + len(gram) - 1]
            size += 1
    return mix(gram)


def runs(hashes: NDArray[np.uint64], starts: NDArray[np.int64], n: int) -> NDArray[np.uint64]:
    """Return the hash of the ``n`` words from each start on, (len(starts),); equals ``ngrams(hashes, n)[starts]``."""
    total = hashes[starts]
    for step in range(1, n):
        total = total * np.uint64(_BASE) + hashes[starts + step]
    return mix(total)


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 2**64))


@dataclass(frozen=True)
class Shingles:
    """Word n-grams of consecutive documents ``row, row + 1, ...``; fields as in :class:`Words`.

    A document of fewer than n words has one shingle, the hash of all its words; one without words has the hash of its
    bytes. ``hashes`` (S,) may hold a value several times.
    """

    row: int
    hashes: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    part: int = 0
    last: bool = True


def shingles(text: pa.StringArray, n: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Shingles]:
    """Yield the word n-grams of a column, block by block; every document has at least one."""
    carry, seen = np.zeros(0, np.uint64), 0
    for block in words(text, block_bytes):
        if block.part == 0 and block.last:
            yield _whole(text, block, n)
            continue
        if block.part == 0:
            carry, seen = np.zeros(0, np.uint64), 0
        # One long document in parts: the last n - 1 words go over to the next part, so that no n-gram is lost.
        run = np.concatenate([carry, block.hashes])
        grams = ngrams(run, n)
        carry = run[-(n - 1) :] if n > 1 else run[:0]
        seen += len(block.hashes)
        if block.last and seen < n:  # fewer than n words in all these bytes
            grams = np.array([_short(run) if len(run) else _raw(text, block.row)], np.uint64)
        yield Shingles(block.row, grams, np.array([0, len(grams)]), block.part, block.last)


def _whole(text: pa.StringArray, block: Words, n: int) -> Shingles:
    """Return the shingles of whole documents."""
    counts = np.diff(block.offsets)
    grams = ngrams(block.hashes, n)
    # n-grams that begin in the last n - 1 words of a document run into the next one; those are left out.
    each = np.maximum(counts - n + 1, 0)
    if (counts >= n).all():
        if n > 1 and len(counts) > 1:
            inside = np.ones(len(grams), bool)
            edges = block.offsets[1:-1, None] - np.arange(1, n)
            inside[edges.ravel()] = False
            grams = grams[inside]
        return Shingles(block.row, grams, np.concatenate([[0], np.cumsum(each)]))
    short = np.flatnonzero(counts < n)
    owner = np.repeat(np.arange(len(counts)), counts)
    at = np.arange(len(grams))
    grams = grams[at + n <= block.offsets[1:][owner[: len(grams)]]]
    each[short] = 1
    offsets = np.concatenate([[0], np.cumsum(each)])
    out = np.empty(offsets[-1], np.uint64)
    single = np.zeros(len(out), bool)
    single[offsets[short]] = True
    out[~single] = grams
    out[offsets[short]] = _short_hashes(text, block, short, n)
    return Shingles(block.row, out, offsets)


def _short_hashes(text: pa.StringArray, block: Words, short: NDArray[np.int64], n: int) -> NDArray[np.uint64]:
    """Return one hash for each document of fewer than n words, by number of words."""
    counts, out = np.diff(block.offsets)[short], np.empty(len(short), np.uint64)
    for count in range(n):
        rows = np.flatnonzero(counts == count)
        if not len(rows):
            continue
        if count == 0:
            out[rows] = [_raw(text, block.row + int(row)) for row in short[rows]]
            continue
        out[rows] = runs(block.hashes, block.offsets[short[rows]], count)
    return out


def _short(run: NDArray[np.uint64]) -> np.uint64:
    """Return the hash of a whole run of words; equals ``ngrams(run, len(run))[0]``."""
    return np.uint64(ngrams(run, len(run))[0])


def _raw(text: pa.StringArray, row: int) -> np.uint64:
    """Return a hash of the bytes of a text without words."""
    value = text[row].as_py() or ""
    return np.uint64(int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little"))
