"""Batches from prepared data: a batch is a pure function of (seed, sample number).

Documents stand end to end, each followed by the end of text; sequence k is tokens k*T .. k*T + T, so that
consecutive sequences share one token and no target falls between them; only the last, incomplete sequence of
a split is left out. Sample number n is sequence ``order(n mod S)`` of epoch ``n // S``, where ``order`` is a
permutation of that epoch. Resuming needs the number of the next sample and nothing else, and any sample can
be traced to its documents later.

Shape letters: B sequences in a batch, T positions in a sequence, S sequences in an epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.core.types import Batch
from poise.data.permute import Permutation
from poise.data.store import Tokens

_BLOCK: Final = 1024  # sample numbers permuted at once: one call costs as much for eight of them


class Loader:
    """Reads one split of prepared data as sequences.

    The training split is shuffled anew every epoch; the held-out split is read in its own order, the same
    for every seed, and begins again after its last sequence.

    Attributes:
        sequences: S, sequences in an epoch.
        seq_len: T, positions in a sequence.

    Raises:
        UserError: the split has too few tokens for one sequence, or ``seq_len`` is not positive.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, split: str = "train") -> None:
        if seq_len < 1:
            raise UserError(f"the sequence length is {seq_len}; give a positive number, e.g. 256")
        self._split = tokens.split(split)
        ids = self._split.tokens
        if len(ids) < seq_len + 1:
            raise UserError(_too_short(split, len(ids), seq_len))
        self.seq_len = seq_len
        self.sequences = (len(ids) - 1) // seq_len
        self._seed = seed
        self._shuffled = split == "train"
        self._block = lru_cache(maxsize=4)(self._permuted_block)  # saves time, changes nothing
        # (S, T + 1) without a copy: row k begins at token k*T and ends with the last target.
        self._rows = np.lib.stride_tricks.as_strided(
            ids, (self.sequences, seq_len + 1), (seq_len * ids.itemsize, ids.itemsize), writeable=False
        )

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` .. ``first + count - 1``; inputs and targets are (B=count, T) int64."""
        assert first >= 0 and count > 0, (first, count)
        rows = self._rows[self._positions(first, count)].astype(np.int64)
        block = torch.from_numpy(rows)
        inputs_BT, targets_BT = block[:, :-1].contiguous(), block[:, 1:].contiguous()
        return Batch(inputs_BT, targets_BT, tuple(range(first, first + count)))

    def row(self, sample: int) -> NDArray[np.int64]:
        """Return the T + 1 tokens of a sample: its inputs, and one more that is the last target."""
        row: NDArray[np.int64] = self._rows[self._position(sample)].astype(np.int64)
        return row

    def documents(self, sample: int) -> list[dict[str, Any]]:
        """Return the documents that a sample shows, in order.

        Each is a dict: ``document`` (row in ``docs.arrow``), ``source``, ``origin``, ``offset`` and ``bytes``
        (where the text is), ``content_hash`` (hexadecimal), ``span`` (first and last-plus-one position in
        ``row``), ``document_start`` (which token of the document is at the beginning of the span).
        """
        start = self._position(sample) * self.seq_len
        end = start + self.seq_len + 1
        size, index = self._split.tokens.itemsize, self._split.index
        # Not numpy's searchsorted: the mapped array is not aligned, which would make it copy the whole array.
        first = bisect_right(index.pointers, start * size) - 1
        last = bisect_right(index.pointers, (end - 1) * size)
        found = []
        for number, facts in enumerate(self._split.table.slice(first, last - first).to_pylist(), first):
            begin = facts["token_start"]
            here = max(start, begin)
            found.append(
                {
                    "document": number,
                    "source": facts["source"],
                    "origin": facts["origin"],
                    "offset": facts["offset"],
                    "bytes": facts["bytes"],
                    "content_hash": facts["content_hash"].hex(),
                    "span": (here - start, min(end, begin + facts["token_length"]) - start),
                    "document_start": here - begin,
                }
            )
        return found

    def _position(self, sample: int) -> int:
        assert sample >= 0, sample
        return int(self._positions(sample, 1)[0])

    def _positions(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the sequences that samples ``first`` .. ``first + count - 1`` show."""
        begin, end = first // _BLOCK, (first + count - 1) // _BLOCK + 1
        blocks = [self._block(number) for number in range(begin, end)]
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined[first - begin * _BLOCK :][:count]

    def _permuted_block(self, number: int) -> NDArray[np.int64]:
        samples = np.arange(number * _BLOCK, (number + 1) * _BLOCK)
        epochs, places = np.divmod(samples, self.sequences)
        if not self._shuffled:
            return places
        out = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = Permutation(self.sequences, self._seed, epoch)(places[here])
        return out


def _too_short(split: str, tokens: int, seq_len: int) -> str:
    need = f"the {split} split has {tokens:,} tokens, and one sequence of {seq_len:,} needs {seq_len + 1:,}"
    if split == "val":
        share = "more text or a larger --data.val_fraction"
        return f"{need}; use {f'a sequence length of at most {tokens - 1:,}, ' if tokens > 1 else ''}{share}"
    return f"{need}; use a sequence length of at most {tokens - 1:,} or more text"
