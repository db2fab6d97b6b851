"""Writing one split of prepared data, document by document, in bounded memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.megatron_index import write_index
from poise.data.readers import Document
from poise.data.store import DOCUMENT_SCHEMA

_ROWS: Final = 16_384  # documents in one record batch


def content_hash(text: str) -> bytes:
    """Return the 128-bit hash that stands for a text: equal texts, equal hashes, whatever their place."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class SplitWriter:
    """Write ``{name}.bin``, ``{name}.idx`` and ``{name}.docs.arrow`` into ``folder``.

    Errors:
        OSError: the disk is full.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._index_path, self._dtype = folder / f"{name}.idx", dtype
        self._bin = (folder / f"{name}.bin").open("wb")
        self._docs = (folder / f"{name}.docs.arrow").open("wb")
        self._arrow = pa.ipc.new_file(self._docs, DOCUMENT_SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._lengths: list[NDArray[np.int32]] = []
        self.tokens = self.documents = self.bytes = self.replaced_bytes = 0

    def add(self, ids: NDArray[np.unsignedinteger], row: dict[str, Any]) -> None:
        """Append a document: its ids with the end of text, and the other columns of its row."""
        if len(ids) >= 2**31:
            raise UserError(f"document '{row['origin']}' has {len(ids):,} tokens; cut it, the limit is 2**31 - 1")
        self._bin.write(ids.astype(self._dtype).data)
        self._rows.append({**row, "token_start": self.tokens, "token_length": len(ids)})
        self.tokens += len(ids)
        self.documents += 1
        self.bytes += row["bytes"]
        self.replaced_bytes += row["replaced_bytes"]
        if len(self._rows) == _ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the index, and close the files."""
        self._flush()
        self._arrow.close()
        self._docs.close()
        self._bin.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        write_index(self._index_path, lengths, self._dtype)

    def abandon(self) -> None:
        """Close the files after an error; what they hold is of no use."""
        for file in (self._docs, self._bin):
            try:
                file.close()
            except OSError:  # the disk is still full: the first error is the one to report
                continue

    def _flush(self) -> None:
        if self._rows:
            self._arrow.write_batch(pa.RecordBatch.from_pylist(self._rows, DOCUMENT_SCHEMA))
            self._lengths.append(np.array([row["token_length"] for row in self._rows], np.int32))
            self._rows.clear()


def row_of(document: Document, digest: bytes) -> dict[str, Any]:
    """Return what ``docs.arrow`` says about a document, the position of its tokens aside."""
    return {
        "content_hash": digest,
        "source": document.source,
        "origin": document.origin.encode("utf-8", "replace").decode(),  # a file name need not be UTF-8
        "offset": document.offset,
        "bytes": len(document.text.encode()),
        "replaced_bytes": document.replaced_bytes,
    }
