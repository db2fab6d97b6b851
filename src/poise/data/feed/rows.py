"""Sequences on disk: the tokens of sequence k, and where in the token file each of them is.

Two ways to cut documents into sequences of T positions (and one token more, the last target). ``Concatenated``:
documents stand end to end, sequence k is tokens kT .. kT + T, nothing is padded, documents are cut wherever a sequence
ends. ``Packed``: best-fit packing (``pack``), only documents longer than a sequence are cut, what is left is padding.

Shape letters: N sequences asked for, T positions, C = T + 1 tokens of a sequence.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from poise.data.feed.pack import Packing
from poise.data.store import Split

Ints = NDArray[np.int64]


class Rows(Protocol):
    """Sequences by their number.

    Attributes:
        count: how many there are.
    """

    count: int

    def tokens(self, numbers: Ints) -> NDArray[np.int64]:
        """Return the tokens of sequences, (N, C); padding is the end of text."""
        ...

    def places(self, numbers: Ints) -> tuple[Ints, NDArray[np.int32] | None]:
        """Return where the tokens are in the token file, (N, C), -1 for padding; and the number of the piece in its
        sequence that each belongs to, (N, C), or ``None`` where a sequence is one piece."""
        ...


class Concatenated:
    """Documents end to end; consecutive sequences share one token, so no target falls between them."""

    def __init__(self, split: Split, start: int, tokens: int, seq_len: int) -> None:
        self._start, self._seq_len = start, seq_len
        self.count = max(0, (tokens - 1) // seq_len)
        ids = split.tokens[start : start + tokens]
        # (S, C) without a copy: row k begins at token k*T and ends with the last target.
        self._rows = np.lib.stride_tricks.as_strided(
            ids, (self.count, seq_len + 1), (seq_len * ids.itemsize, ids.itemsize), writeable=False
        )

    def tokens(self, numbers: Ints) -> NDArray[np.int64]:
        """See ``Rows``."""
        found: NDArray[np.int64] = self._rows[numbers].astype(np.int64)
        return found

    def first(self, numbers: Ints) -> Ints:
        """Return where the sequences begin in the token file, (N,)."""
        return self._start + numbers * self._seq_len

    def places(self, numbers: Ints) -> tuple[Ints, None]:
        """See ``Rows``."""
        return self.first(numbers)[:, None] + np.arange(self._seq_len + 1), None


class Packed:
    """Best-fit packed documents."""

    def __init__(self, split: Split, first: int, packing: Packing, end_of_text: int) -> None:
        self._ids, self._packing, self._end = split.tokens, packing, end_of_text
        self.count = packing.rows
        self._begins = split.begins[first : first + packing.documents]

    def tokens(self, numbers: Ints) -> NDArray[np.int64]:
        """See ``Rows``."""
        places, _ = self.places(numbers)
        padding = places < 0
        found: NDArray[np.int64] = self._ids[np.where(padding, 0, places)].astype(np.int64)
        found[padding] = self._end
        return found

    def places(self, numbers: Ints) -> tuple[Ints, NDArray[np.int32]]:
        """See ``Rows``."""
        return self._packing.place(numbers, self._begins)
