"""Groups of duplicate documents, and which of a group stays.

Groups are *labels*: an int64 array with one entry a document, the smallest row number of its group; a document that is
alone has its own row number. They come from equal content hashes (:func:`exact`), from similar signatures
(:func:`near`), or from both (:func:`merge`). Groups do not depend on the order of the rows.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.bits import mix

_READ: Final = 2**15  # rows of signatures read at once
_SMALL: Final = 16  # a bucket of so many documents has all its pairs compared
_PIVOTS: Final = 8  # a larger one is compared with its first so often
_PAIRS: Final = 2**14  # pairs compared at once


def exact(hashes_N2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the labels (N,) of documents with equal content hashes (N, 2)."""
    order = np.lexsort((hashes_N2[:, 1], hashes_N2[:, 0]))  # stable: the first of equal rows is the smallest
    new = np.ones(len(order), bool)
    ordered = hashes_N2[order]
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    labels = np.empty(len(order), np.int64)
    labels[order] = order[new][np.cumsum(new) - 1]
    return labels


def near(
    signatures: NDArray[np.uint32], *, bands: int = 14, rows: int = 8, threshold: float = 0.8
) -> NDArray[np.int64]:
    """Return the labels (N,) of documents whose signatures (N, bands * rows) are alike.

    Two documents are candidates when a band of ``rows`` numbers is equal (probability 1 - (1 - s**rows)**bands at
    Jaccard similarity s), and are joined when at least ``threshold`` of all numbers are equal. A group is what such
    pairs connect. Signatures may be a memory map: the bands are worked on one after another, and memory is O(N).

    A band's bucket of up to 16 documents has all its pairs compared. In a larger bucket all are compared with the
    first, the rest again with their first, and so on 8 times: linear, at the price that pairs may be missed
    which meet in no other band. "First" goes by the signature's hash, so the order of the rows does not matter.

    Errors:
        UserError: the width is not ``bands * rows``, or the threshold is not in [0, 1].
    """
    if signatures.ndim != 2 or signatures.shape[1] != bands * rows:
        raise UserError(f"signatures have shape {signatures.shape}; {bands} bands of {rows} rows need {bands * rows}")
    if not 0 <= threshold <= 1:
        raise UserError(f"similarity threshold is {threshold}; it must be between 0 and 1")
    count = len(signatures)
    whole = _band_keys(signatures, np.arange(count), 0, bands * rows)
    order = np.argsort(whole, kind="stable")
    new = np.ones(count, bool)
    new[1:] = whole[order][1:] != whole[order][:-1]
    parent = np.empty(count, np.int64)
    parent[order] = order[new][np.cumsum(new) - 1]  # equal signatures are alike; one of them stands for all
    one = order[new]  # (U,) in the order of the signatures' hashes
    for band in range(bands):
        keys = _band_keys(signatures, one, band * rows, rows)
        order = np.argsort(keys, kind="stable")
        _join_band(signatures, parent, one[order], keys[order], threshold)
        _flatten(parent)
    return _settle(parent)


def merge(*labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the labels of documents connected by any of the given groupings, each (N,).

    Errors:
        UserError: no labels are given, or their lengths differ.
    """
    if not labels or len({len(each) for each in labels}) != 1:
        raise UserError(f"merge needs labels of one length; lengths are {[len(each) for each in labels]}")
    parent = _settle(labels[0].astype(np.int64))
    for each in labels[1:]:
        _union(parent, np.arange(len(parent)), each)
    return _settle(parent)


def keep(
    labels_N: NDArray[np.int64], hashes_N2: NDArray[np.uint64], how: Literal["one", "log"] = "one"
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Return which documents stay (N,) and how many documents each one's group has (N,), 1 where it is alone.

    Of a group the document with the lowest content hash stays (bytes compared from the first on), of equal ones the
    smallest row; ``log`` keeps the ``1 + floor(log2(size))`` lowest, so that what is frequent stays a little more
    frequent. What stays depends on the contents alone, not on the order of the rows.

    Errors:
        UserError: ``how`` is neither of the two.
    """
    if how not in ("one", "log"):
        raise UserError(f"unknown keep rule '{how}'; choose one or log")
    order = _ordered(labels_N, hashes_N2)
    counts = np.bincount(labels_N, minlength=len(labels_N))
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    rank = np.arange(len(order)) - first[labels_N[order]]
    most = np.ones(len(counts), np.int64) if how == "one" else np.frexp(counts.astype(np.float64))[1].astype(np.int64)
    kept = np.zeros(len(labels_N), bool)
    kept[order] = rank < most[labels_N[order]]  # frexp's exponent of n is 1 + floor(log2 n)
    return kept, counts[labels_N].astype(np.int32)


def head(labels_N: NDArray[np.int64], hashes_N2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for every document the row of the first one that ``keep`` keeps of its group, (N,)."""
    order = _ordered(labels_N, hashes_N2)
    ordered = labels_N[order]
    new = np.ones(len(order), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    rows = np.empty(len(order), np.int64)
    rows[order] = order[new][np.cumsum(new) - 1]
    return rows


def _ordered(labels_N: NDArray[np.int64], hashes_N2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the rows sorted by label, then by the bytes of the content hash, then by row."""
    big = hashes_N2.astype("<u8").view(">u8").astype(np.uint64)  # as numbers in the order of their bytes
    return np.lexsort((big[:, 1], big[:, 0], labels_N))


def _band_keys(signatures: NDArray[np.uint32], chosen: NDArray[np.int64], start: int, width: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of columns ``start:start + width`` of the chosen rows, (len(chosen),), in their order."""
    every = np.empty(len(signatures), np.uint64)
    for first in range(0, len(signatures), _READ):
        part = np.asarray(signatures[first : first + _READ, start : start + width])
        key = np.full(len(part), width, np.uint64)
        for column in range(width):
            key = mix(key * np.uint64(0x9E3779B97F4A7C15) + part[:, column])
        every[first : first + len(part)] = key
    return every[chosen]


def _join_band(
    signatures: NDArray[np.uint32],
    parent: NDArray[np.int64],
    members: NDArray[np.int64],
    keys: NDArray[np.uint64],
    threshold: float,
) -> None:
    """Join the documents of one band's buckets; ``members`` and ``keys`` are sorted by key."""
    start = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    size = np.diff(np.append(start, len(keys)))
    for apart in range(1, _SMALL):  # small buckets: the first with the second, the second with the third, ...
        left = np.flatnonzero(np.repeat((size > apart) & (size <= _SMALL), size))
        place = left - np.repeat(start, size)[left]
        left = left[place + apart < np.repeat(size, size)[left]]
        _compare(signatures, parent, members[left], members[left + apart], threshold)
    large = np.repeat(size > _SMALL, size)
    members, keys = members[large], keys[large]
    for _ in range(_PIVOTS):
        if not len(members):
            return
        new = np.concatenate([[True], keys[1:] != keys[:-1]])
        pivot = members[new][np.cumsum(new) - 1]
        alike = _compare(signatures, parent, pivot, members, threshold)
        members, keys = members[~alike], keys[~alike]


def _compare(
    signatures: NDArray[np.uint32],
    parent: NDArray[np.int64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    threshold: float,
) -> NDArray[np.bool_]:
    """Join the pairs whose signatures agree in ``threshold`` of the numbers; return which are joined now, (P,)."""
    joined: NDArray[np.bool_] = _roots(parent, left) == _roots(parent, right)
    todo = np.flatnonzero(~joined)
    width = signatures.shape[1]
    for first in range(0, len(todo), _PAIRS):
        part = todo[first : first + _PAIRS]
        equal = (signatures[left[part]] == signatures[right[part]]).sum(1)
        joined[part] = equal >= threshold * width - 1e-9
    good = todo[joined[todo]]
    _union(parent, left[good], right[good])
    return joined


def _union(parent: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Join the sets of each pair; the root of a set is its smallest row."""
    while len(left):
        a, b = _roots(parent, left), _roots(parent, right)
        apart = a != b
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))


def _roots(parent: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the root of each of some rows."""
    here = parent[rows]
    while not np.array_equal(above := parent[here], here):
        here = above
    return here


def _flatten(parent: NDArray[np.int64]) -> None:
    """Point every row at its root, so that the next look is short."""
    while not np.array_equal(above := parent[parent], parent):
        parent[:] = above


def _settle(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the root of every row."""
    parent = parent.copy()
    _flatten(parent)
    return parent
