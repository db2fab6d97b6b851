"""TFRecord framing: how TensorBoard's event files part their records, checked and found again after damage.

A record is its length (uint64), a checksum of the length, the payload, and a checksum of the payload, little-endian;
the checksums are CRC-32C, rotated and offset ("masked") (https://www.tensorflow.org/tutorials/load_data/tfrecord).
Python has no fast CRC-32C, so many records are checked at once, column by column. A checked length is so unlikely to
come about by chance (2^-32) that after damage the next one found is where the log goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from poise.postmortem.readers import wire

CHUNK = 1 << 20
HEAD = 12
"""Bytes of a length and its checksum."""

AROUND = 16
"""Bytes of a record beside its payload."""

MAX_RECORD = 1 << 25
"""Bytes; a longer record (a graph, a video) is skipped without being held in memory."""

MAX_CHECKED = 1 << 13
"""Bytes; longer payloads are pictures and the like, and are not checked."""

DAMAGED = "damaged record left out"

Ints = NDArray[np.int64]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Records one after another: the bytes they lie in, where each payload begins, and how long it is."""

    data: bytes
    starts: Ints
    sizes: Ints


def _table() -> NDArray[np.uint32]:
    crc: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = (crc >> np.uint32(1)) ^ np.where(crc & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return crc


_TABLE = _table()


def _mask(crc: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)


def checksums(raw: NDArray[np.uint8], starts: Ints, sizes: Ints) -> NDArray[np.uint32]:
    """Return the masked CRC-32C of the stretches of ``raw`` that begin at ``starts``.

    >>> hex(int(checksums(np.frombuffer(b"123456789", np.uint8), np.array([0]), np.array([9]))[0]))
    '0xc78ab0e5'
    """
    order = np.argsort(-sizes, kind="stable")
    at, size = starts[order], sizes[order]
    crc = np.full(len(at), 0xFFFFFFFF, dtype=np.uint32)
    longer = np.searchsorted(-size, -np.arange(int(size[0]) if len(size) else 0), side="left")
    for column, count in enumerate(longer.tolist()):  # the first ``count`` are longer than ``column``
        part = crc[:count]
        low = (part & 0xFF).astype(np.uint8) ^ raw[at[:count] + column]
        np.bitwise_xor(_TABLE[low], part >> 8, out=part)
    out = np.empty_like(crc)
    out[order] = _mask(~crc)
    return out


def words(raw: NDArray[np.uint8], at: Ints) -> NDArray[np.uint32]:
    """Return the little-endian uint32 at each place."""
    out = np.zeros(len(at), dtype=np.uint32)
    for i in range(4):
        out |= raw[at + i].astype(np.uint32) << np.uint32(8 * i)
    return out


class Framing:
    """Parts a file into records, a MiB at a time.

    Args:
        say: is told in one line what was left out.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._lost = False  # in a damaged stretch that has been spoken of

    def batches(self, file: IO[bytes]) -> Iterator[Batch]:
        """Yield all records whose checksums hold."""
        data, want = b"", CHUNK
        while True:
            more = wire.pull(file, want)
            data += more
            at_end = len(more) < want
            raw = np.frombuffer(data, dtype=np.uint8)
            heads, sizes = _heads(raw)
            kept, used, missing = self._chain(heads, heads + sizes + AROUND, len(data), at_end)
            batch = self._checked(data, raw, heads[kept] + HEAD, sizes[kept])
            if len(batch.starts):
                yield batch
            if at_end:
                return
            data, want = data[used:], max(CHUNK, missing)
            if missing > MAX_RECORD:  # passed over piece by piece
                self._say(f"a record of {missing >> 20} MiB left out")
                data, want, self._lost = data[HEAD:], CHUNK, True

    def _checked(self, data: bytes, raw: NDArray[np.uint8], starts: Ints, sizes: Ints) -> Batch:
        good = np.ones(len(starts), dtype=bool)
        short = np.flatnonzero(sizes <= MAX_CHECKED)
        good[short] = checksums(raw, starts[short], sizes[short]) == words(raw, starts[short] + sizes[short])
        for _ in range(len(good) - int(good.sum())):
            self._say(DAMAGED)
        return Batch(data, starts[good], sizes[good])

    def _chain(self, heads: Ints, ends: Ints, length: int, at_end: bool) -> tuple[Any, int, int]:
        """Return (which heads begin a whole record, bytes done with, bytes that the next record lacks)."""
        at, i, kept = 0, 0, []
        whole = int((ends <= length).sum())
        if whole and heads[0] == 0 and (ends[: whole - 1] == heads[1:whole]).all():  # no damage, nothing to look for
            at, i, kept = int(ends[whole - 1]), whole, list(range(whole))
            self._lost = False
        begin, end = heads[i:].tolist(), ends[i:].tolist()
        known = set(begin)
        for head, stop in zip(begin, end, strict=True):
            if head < at:
                i += 1
                continue
            if head > at:
                self._gap()
            if stop > length and not at_end:
                return kept, head, stop - length
            if stop > length:  # cut off: here the file ends, or another writer went on after a crash
                at = head + HEAD
                i += 1
                continue
            kept.append(i)
            i += 1
            self._lost = False
            at = stop
            if stop <= length - HEAD and stop not in known:  # no record follows where one should: look for the next
                self._gap()
                at = head + HEAD
        return kept, self._rest(at, int(ends[kept[-1]]) if kept else 0, length, at_end), 0

    def _rest(self, at: int, after: int, length: int, at_end: bool) -> int:
        """Return up to where the bytes are done with, when no record begins at ``at`` or later."""
        if at_end:
            if length > after and not self._lost:
                self._say("the last record is cut off and left out")
            return length
        if length - at < HEAD:
            return at
        self._gap()
        return length - HEAD + 1

    def _gap(self) -> None:
        if not self._lost:
            self._say(DAMAGED)
        self._lost = True


def _heads(raw: NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Return every place at which a length with its checksum stands, and the lengths."""
    count = len(raw) - HEAD + 1
    if count <= 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    small = (raw[4 : 4 + count] | raw[5 : 5 + count] | raw[6 : 6 + count] | raw[7 : 7 + count]) == 0
    at = np.flatnonzero(small)
    size = words(raw, at)
    at, size = at[size > 0], size[size > 0]
    good = checksums(raw, at, np.full(len(at), 8)) == words(raw, at + 8)
    return at[good], size[good].astype(np.int64)
