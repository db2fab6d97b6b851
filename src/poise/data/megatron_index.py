"""The index file beside raw tokens, in the layout of Megatron-LM's indexed data set (MMIDIDX, version 1).

Little-endian and packed: magic (9 bytes), version u64, dtype code u8, sequence count u64, length of the
document index u64, then tokens per sequence int32[], byte position of each sequence int64[], and the number
of the first sequence of each document int64[] with one closing entry. One sequence is one document here, so
Megatron-LM, NeMo and GPT-NeoX read our ``.bin``/``.idx`` pair as it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError

_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEADER: Final = struct.Struct("<9sQBQQ")
# The layout knows no uint32: its int32 has the same bytes for every id below 2**31.
_CODES: Final = {"<u2": 8, "<u4": 4}


@dataclass(frozen=True, slots=True)
class Index:
    """An opened index; the arrays are memory-mapped and read-only.

    Attributes:
        lengths: tokens of each document, (N,) int32.
        pointers: byte position of each document in the token file, (N,) int64.
    """

    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]


def write_index(path: Path, lengths: NDArray[np.int32], dtype: np.dtype[np.unsignedinteger]) -> None:
    """Write the index of documents with ``lengths`` tokens of type ``dtype``, laid end to end."""
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(min(1, len(ends)), "<i8"), ends[:-1]])
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[_name(dtype)], len(lengths), len(documents)))
        # File objects and not ndarray.tofile: a full disk must come back as an OSError with its errno.
        for part in (lengths.astype("<i4"), pointers, documents):
            file.write(part.data)


def open_index(path: Path, dtype: np.dtype[np.unsignedinteger]) -> Index:
    """Map an index written by ``write_index``.

    Raises:
        UserError: the file is not such an index, is for another token type, or is too short.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise UserError(f"'{path}' is damaged: it is too short for an index; prepare the data again")
    magic, version, code, count, documents = _HEADER.unpack(head)
    size = _HEADER.size + 12 * count + 8 * documents
    good = magic == _MAGIC and version == 1 and code == _CODES[_name(dtype)] and documents == count + 1
    if not good or path.stat().st_size != size:
        raise UserError(f"'{path}' is damaged: its header does not fit its contents; prepare the data again")
    if count == 0:
        return Index(np.zeros(0, np.int32), np.zeros(0, np.int64))
    lengths = np.memmap(path, "<i4", "r", _HEADER.size, (count,))
    return Index(lengths, np.memmap(path, "<i8", "r", _HEADER.size + 4 * count, (count,)))


def _name(dtype: np.dtype[np.unsignedinteger]) -> str:
    return f"<u{dtype.itemsize}"
