"""The stretches of a mixture between two ends of sources: inside one, which sequence a sample shows is arithmetic.

See ``mix``. A block has a fixed number of samples of each source, ordered elsewhere; places in a block are numbered
source after source here. Shares that are no whole number in a block are settled over M blocks, and then again.

Shape letters: S sources, M blocks over which shares are settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BLOCK: Final = 4096
"""Samples in a block."""

_M: Final = 64  # blocks over which the shares are settled


@dataclass(frozen=True)
class Phase:
    """Blocks between two ends of sources.

    Attributes:
        first_block: number of its first block.
        blocks: how many, None for without end.
        block: samples in each of its blocks, 4096 but for the last of all.
        base: samples every source has given before, (S,).
        cum: samples of every source before block i, i in 0..M, after which it begins again, (M + 1, S).
    """

    first_block: int
    blocks: int | None
    block: int
    base: Ints
    cum: Ints

    @property
    def end(self) -> int | None:
        """Number of the first sample after it."""
        return None if self.blocks is None else (self.first_block + self.blocks - 1) * BLOCK + self.block

    @cached_property
    def _ends(self) -> Ints:
        """Place in a block after each source's part, (M, S)."""
        return np.cumsum(np.diff(self.cum, axis=0), axis=1)

    @cached_property
    def _flat_ends(self) -> Ints:
        """The same as one rising line, block after block, (M * S,)."""
        return (self._ends + np.arange(len(self._ends))[:, None] * BLOCK).reshape(-1)

    def place(self, block: Ints, spot: Ints) -> tuple[Ints, Ints]:
        """Return source and local number of place ``spot`` in the phase's block ``block``."""
        turn, row = np.divmod(block, len(self.cum) - 1)
        s = self.cum.shape[1]
        source = np.searchsorted(self._flat_ends, row * BLOCK + spot, "right") - row * s
        before = np.where(source > 0, self._ends[row, source - 1], 0)
        return source, self.base[source] + turn * self.cum[-1, source] + self.cum[row, source] + spot - before

    def find(self, source: int, local: Ints) -> tuple[Ints, Ints]:
        """Return the phase's block and the place in it; the inverse of ``place``."""
        cum = self.cum[:, source]
        turn, rest = np.divmod(local - self.base[source], cum[-1])
        row = np.searchsorted(cum, rest, "right") - 1
        before = self._ends[row, source - 1] if source else np.zeros_like(row)
        return turn * (len(cum) - 1) + row, before + rest - cum[row]

    def taken(self, blocks: int) -> Ints:
        """Return the samples of every source before the phase's block ``blocks``, (S,)."""
        turn, row = divmod(blocks, len(self.cum) - 1)
        out: Ints = self.base + turn * self.cum[-1] + self.cum[row]
        return out


def phases_of(weights: Sequence[float], caps: Sequence[int | None]) -> list[Phase]:
    """Divide the stream at the ends of sources; the last phase is endless, or ends with the last source."""
    share = np.array(weights)
    left = np.array([2**62 if cap is None else cap for cap in caps], np.int64)
    left[share == 0] = 0
    endless = np.array([cap is None for cap in caps]) & (share > 0)
    base = np.zeros(len(share), np.int64)
    phases: list[Phase] = []
    block = 0
    while (left > 0).any():
        active = np.where(left > 0, share, 0.0)
        cum = _settle(active)
        if endless[left > 0].all():
            phases.append(Phase(block, None, BLOCK, base, cum))
            break
        blocks = _whole_blocks(cum, left, endless)
        if blocks == 0:  # a source ends inside this block: its last sequences, and more of the others
            counts = _last_counts(active, left)
            cum, blocks = np.stack([np.zeros_like(counts), counts]), 1
        size = int(cum[1].sum())
        phases.append(Phase(block, blocks, size, base, cum))
        base = phases[-1].taken(blocks)
        left = np.where(endless, left, left - (base - phases[-1].base))
        block += blocks
    return phases


def _settle(weights: NDArray[np.float64]) -> Ints:
    """Return the samples of every source before each of M blocks, (M + 1, S), for weights of any scale."""
    total = BLOCK * _M
    exact = weights / weights.sum() * total
    counts = _largest_remainder(exact, total)
    while ((counts == 0) & (weights > 0)).any():  # every source with a weight comes
        counts[np.argmax(counts)] -= 1
        counts[np.argmax((counts == 0) & (weights > 0))] += 1
    floors, extra = np.divmod(counts, _M)
    # Extras lie end to end on a ring of M blocks: none has two of one source, and every block gets as many. The order
    # of the ring reverses the bits of the block's number, so that neighbours on the ring lie far apart in time.
    bits = _M.bit_length() - 1
    ring = np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(_M)])
    source = np.repeat(np.arange(len(weights)), extra)
    per_block = np.tile(floors, (_M, 1))
    np.add.at(per_block, (ring[np.arange(len(source)) % _M], source), 1)
    assert (per_block.sum(axis=1) == BLOCK).all()
    return np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(per_block, axis=0)])


def _whole_blocks(cum: Ints, left: Ints, endless: NDArray[np.bool_]) -> int:
    """Return how many blocks go by before one would take more from a source than it has left."""
    fewest = 2**62
    for s in np.flatnonzero((cum[-1] > 0) & ~endless).tolist():
        turns, rest = divmod(int(left[s]), int(cum[-1, s]))
        fewest = min(fewest, turns * _M + int(np.searchsorted(cum[:, s], rest, "right")) - 1)
    return fewest


def _last_counts(weights: NDArray[np.float64], left: Ints) -> Ints:
    """Return the counts of one block in which no source gives more than it has left, (S,)."""
    left = np.minimum(left, BLOCK)  # more does not matter here, and sources without an end would overflow the sum
    size = min(BLOCK, int(left.sum()))
    full = np.zeros(len(weights), bool)  # sources that give all they have left
    while True:
        room = size - int(left[full].sum())
        open_ = np.where(full, 0.0, weights)
        exact = open_ / open_.sum() * room if room and open_.sum() > 0 else np.zeros(len(weights))
        over = ~full & (exact >= left) & (left > 0)
        if not over.any():
            break
        full |= over
    # What is not whole lies below what is left, which is whole: rounding up never exceeds it.
    counts = _largest_remainder(exact, room)
    counts[full] = left[full]
    return counts


def _largest_remainder(exact: NDArray[np.float64], total: int) -> Ints:
    """Return whole numbers near ``exact`` that add up to ``total``; ties go to the first."""
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    assert counts.sum() == total, (counts.sum(), total)
    return counts
