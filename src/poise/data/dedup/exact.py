"""Equal texts: 128-bit content hashes of a column of documents."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data.record import flat


def hashes(text: pa.StringArray) -> NDArray[np.uint64]:
    """Return blake2b-128 of the UTF-8 bytes of every text, (N, 2).

    ``hashes(text)[i].tobytes()`` equals ``writer.content_hash(text[i])`` on a little-endian machine: the two words
    are the sixteen bytes, read as they lie. A missing text (null) counts as an empty one.
    """
    data, offsets_N1 = flat(text)
    view, ends = data.data, offsets_N1.tolist()
    # One call a document: the hash itself runs at about 1 GB/s and takes nearly all of the time.
    digest = hashlib.blake2b
    joined = b"".join([digest(view[a:b], digest_size=16).digest() for a, b in itertools.pairwise(ends)])
    return np.frombuffer(joined, "<u8").astype(np.uint64).reshape(-1, 2)


def from_binary(column: pa.Array) -> NDArray[np.uint64]:
    """Return a ``binary(16)`` column of content hashes, without nulls, in the form of :func:`hashes`, (N, 2)."""
    assert column.type == pa.binary(16) and not column.null_count, (column.type, column.null_count)
    if len(column) == 0:
        return np.zeros((0, 2), np.uint64)
    words = np.frombuffer(column.buffers()[1], "<u8", 2 * len(column), offset=16 * column.offset)
    return words.astype(np.uint64).reshape(-1, 2)


def to_binary(hashes_N2: NDArray[np.uint64]) -> pa.FixedSizeBinaryArray:
    """Return hashes as a ``binary(16)`` column, the form of ``content_hash`` in ``docs.arrow``."""
    data = pa.py_buffer(np.ascontiguousarray(hashes_N2, "<u8"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(hashes_N2), [None, data])
