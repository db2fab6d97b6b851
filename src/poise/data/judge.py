"""What needs all documents at once: which are duplicates of each other, and which are held out.

It reads a few columns of the cleaned blocks, never their text, and keeps some 100 bytes a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.core.rng import derive
from poise.data.bits import mix
from poise.data.dedup import clusters, exact
from poise.data.settings import Settings

KEPT: Final = 0
"""Code of a document that has no reason to be left out."""

EXACT: Final = "duplicate.exact"
NEAR: Final = "duplicate.near"


class Verdicts(NamedTuple):
    """Verdicts on the documents of a block, each (N,).

    Attributes:
        reason: int16 code, ``KEPT`` or a place in ``Judgement.reasons``.
        side: int8, 0 for training and 1 for the held-out part.
        cluster: int64, number of the document that stands for its duplicates.
        size: int32, how many duplicates there are, itself included.
    """

    reason: NDArray[np.int16]
    side: NDArray[np.int8]
    cluster: NDArray[np.int64]
    size: NDArray[np.int32]


@dataclass(frozen=True)
class Judgement:
    """The verdicts on all documents, in a folder of memory-mapped arrays."""

    folder: Path

    @classmethod
    def open(cls, work: Path) -> Judgement:
        """Open what ``judge`` wrote into a work folder."""
        return cls(work / "judge")

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """The reasons by their codes; the first, of a kept document, is empty."""
        return tuple(json.loads((self.folder / "reasons.json").read_bytes()))

    def block(self, number: int) -> Verdicts:
        """Return the verdicts on block ``number``."""
        begin, end = self.array("edges")[number : number + 2].tolist()
        reason, side, cluster, size = (self.array(name)[begin:end] for name in Verdicts._fields)
        return Verdicts(reason, side, cluster, size)

    def array(self, name: str) -> NDArray[Any]:
        """Return a column of all documents."""
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return array

    def hashes_of(self, cluster: NDArray[np.int64], size: NDArray[np.int32]) -> pa.Array:
        """Return the content hashes of the documents that stand for clusters; null for a document alone."""
        found = exact.to_binary(self.array("hashes")[cluster])
        return pc.if_else(pa.array(size > 1), found, pa.scalar(None, found.type))


def judge(
    work: Path,
    settings: Settings,
    rows: Sequence[int],
    reasons: NDArray[np.int16],
    names: Sequence[str],
    hashes: NDArray[np.uint64],
    signatures: NDArray[np.uint32] | None,
) -> Judgement:
    """Judge all documents together and write the verdicts into the work folder.

    Args:
        work: the work folder.
        settings: what is asked for.
        rows: documents of each block.
        reasons: (N,) codes into ``names``, ``KEPT`` for documents without a reason so far.
        names: the reasons by code; the first is empty.
        hashes: (N, 2) content hashes.
        signatures: (M, bands * rows) MinHash signatures of the M documents without a reason, where near-duplicates are
            looked for.
    """
    reasons, names = reasons.copy(), list(names)
    count = len(hashes)
    left = np.flatnonzero(reasons == KEPT)
    cluster, size = np.arange(count), np.ones(count, np.int32)
    if settings.dedup != "none" and len(left):
        same = clusters.exact(hashes[left])
        labels = same
        if signatures is not None:
            labels = clusters.merge(same, clusters.near(signatures, threshold=settings.similarity))
        stays, sizes = clusters.keep(labels, hashes[left], how=settings.dedup_keep)
        stands = clusters.head(labels, hashes[left])
        cluster[left], size[left] = left[stands], sizes
        gone, equal = ~stays, (hashes[left] == hashes[left[stands]]).all(axis=1)
        for name, chosen in ((EXACT, gone & equal), (NEAR, gone & ~equal)):
            names.append(name)
            reasons[left[chosen]] = len(names) - 1
    side = _sides(hashes[cluster], reasons == KEPT, settings)
    folder = work / "judge"
    folder.mkdir(exist_ok=True)
    for name, array in (("reason", reasons), ("side", side), ("cluster", cluster), ("size", size), ("hashes", hashes)):
        _save(folder / f"{name}.npy", array)
    _save(folder / "edges.npy", np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]))
    (folder / "reasons.json").write_text(json.dumps(names), encoding="utf-8")
    return Judgement(folder)


def held_out(hashes: NDArray[np.uint64], fraction: float, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return a key for each text, (N,), and which are held out, from content hashes (N, 2) and the seed alone."""
    mark = np.uint64(derive(seed, "held-out"))
    key = mix(hashes[:, 0] ^ mark)
    return key, key < np.uint64(min(fraction * 2.0**64, 2.0**64 - 1025))


def _save(path: Path, array: NDArray[Any]) -> None:
    """As ``np.save``, but a full disk comes back as an ``OSError`` with its number."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def _sides(hashes: NDArray[np.uint64], kept: NDArray[np.bool_], settings: Settings) -> NDArray[np.int8]:
    """Return the side of every document: a pure function of its text (or its cluster's) and the seed.

    Where one side would be empty and there are different texts, one text moves over: that with the smallest key to
    the held-out part, that with the largest to the training part.
    """
    fraction = settings.val_fraction
    key, out = held_out(hashes, fraction, settings.seed)
    some = key[kept]
    if len(some) and out[kept].all():
        out &= key != some.max()
    elif len(some) and fraction > 0 and not out[kept].any() and some.min() != some.max():
        out |= key == some.min()
    return out.astype(np.int8)
