"""Looking over the cleaned blocks: a column of all of them, or a few texts chosen from all."""

from __future__ import annotations

import heapq
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data.dedup import exact, minhash
from poise.data.judge import KEPT, Judgement
from poise.data.pipeline import clean_path, read_batch


def codes(column: pa.Array, names: dict[str, int]) -> NDArray[np.int16]:
    """Return the reasons as codes; new ones get the next code."""
    encoded = column.dictionary_encode()
    table = np.array([names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()], np.int16)
    indices = encoded.indices
    codes = np.zeros(len(column), np.int16)
    there = np.asarray(column.is_valid())
    if there.any():
        codes[there] = table[np.asarray(indices.drop_null())]
    return codes


def mapped_signatures(path: Path) -> NDArray[np.uint32]:
    """Map the signatures written to ``path``, one row a document."""
    width = minhash.BANDS * minhash.ROWS
    if path.stat().st_size == 0:
        return np.zeros((0, width), np.uint32)
    return np.memmap(path, np.uint32, "r").reshape(-1, width)


def sample(folder: Path, judgement: Judgement, blocks: int, most: int) -> list[str]:
    """Return kept texts of ``most`` bytes together: those with the smallest hashes, so whatever their order."""
    heap: list[tuple[int, int, int, int]] = []
    held, bound = 0, 2**64  # no hash from ``bound`` on has a place
    limit = most // 4  # one huge document is not a sample
    for number in range(blocks):
        batch = read_batch(clean_path(folder, number))
        hashes = exact.from_binary(batch.column("content_hash"))[:, 0]
        sizes = np.minimum(np.asarray(batch.column("bytes")), limit)
        rows = np.flatnonzero(judgement.block(number).reason == KEPT)
        if bound < 2**64:  # most rows of a large corpus need no look
            rows = rows[hashes[rows] < np.uint64(bound)]
        for row in rows.tolist():
            size, key = int(sizes[row]), int(hashes[row])
            if key >= bound:
                continue
            heapq.heappush(heap, (-key, size, number, row))
            held += size
            while held > most:
                last = heapq.heappop(heap)
                held, bound = held - last[1], -last[0]
    wanted: dict[int, list[tuple[int, int]]] = {}
    for mark, _, number, row in heap:
        wanted.setdefault(number, []).append((-mark, row))
    texts: list[tuple[int, str]] = []
    for number, rows_of in wanted.items():
        column = read_batch(clean_path(folder, number)).column("text")
        texts += [
            (mark, column[row].as_buffer()[:limit].to_pybytes().decode("utf-8", "ignore")) for mark, row in rows_of
        ]
    return [text for _, text in sorted(texts)]
