"""Counting records whose own id came before, in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from typing import Final

import numpy as np

_PENDING: Final = 2**20
_MOST: Final = 2**23


class Ids:
    """Counts ids that were met before, in bounded memory: 16 bytes each and at most ``most`` of them (128 MiB).

    Exact (but for a collision of 64-bit hashes) up to that number of different ids. Above it only those whose hash
    lies in a half, a quarter, ... of the range are kept and the count is scaled up: every copy of an id has the same
    hash, so the estimate has no bias.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most, self._halvings = most, 0
        self._hashes = np.empty(0, np.uint64)
        self._counts = np.empty(0, np.int64)
        self._pending = array("Q")

    def add(self, source: str, id: str) -> None:
        """Note one id; ids of different sources are different."""
        digest = hashlib.blake2b(f"{source}\0{id}".encode("utf-8", "replace"), digest_size=8).digest()
        self._pending.append(int.from_bytes(digest, "little"))
        if len(self._pending) >= _PENDING:
            self._fold()

    def duplicates(self) -> int:
        """Return how many documents had an id that an earlier one had."""
        self._fold()
        return int((self._counts - 1).sum()) << self._halvings

    def _fold(self) -> None:
        if not self._pending:
            return
        new = np.frombuffer(self._pending, np.uint64)
        hashes, where = np.unique(np.concatenate([self._hashes, new]), return_inverse=True)
        weights = np.concatenate([self._counts, np.ones(len(new), np.int64)])
        counts = np.zeros(len(hashes), np.int64)
        np.add.at(counts, where, weights)
        self._pending = array("Q")
        # Once there are too many, far fewer are kept: folding again after every few new ones would take for ever.
        most = self._most if len(hashes) <= self._most else self._most // 2
        while True:
            kept = hashes <= np.uint64((1 << (64 - self._halvings)) - 1)
            hashes, counts = hashes[kept], counts[kept]
            if len(hashes) <= most:
                break
            self._halvings += 1
        self._hashes, self._counts = hashes, counts
