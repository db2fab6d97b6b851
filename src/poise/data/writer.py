"""Writing one split of prepared data, block by block or document by document, in bounded memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.megatron_index import write_index
from poise.data.store import DOCUMENT_SCHEMA
from poise.data.tokens.periodic import REPEAT

_ROWS: Final = 16_384  # documents in one record batch
MOST_TOKENS: Final = 2**31 - 1
"""Tokens a document may have: the index holds lengths as int32."""


def content_hash(text: str) -> bytes:
    """Return the 128-bit hash that stands for a text: equal texts, equal hashes, whatever their place."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class SplitWriter:
    """Write ``{name}.bin``, ``{name}.idx``, ``{name}.docs.arrow`` and ``{name}.repeats.bin`` into ``folder``.

    Attributes:
        tokens, documents, bytes, replaced_bytes: what has been added so far.

    Errors:
        OSError: the disk is full.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._index_path, self._dtype = folder / f"{name}.idx", dtype
        self._bin = (folder / f"{name}.bin").open("wb")
        self._docs = (folder / f"{name}.docs.arrow").open("wb")
        self._repeats = (folder / f"{name}.repeats.bin").open("wb")
        self._arrow = pa.ipc.new_file(self._docs, DOCUMENT_SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._waiting: list[pa.RecordBatch] = []
        self._lengths: list[NDArray[np.int32]] = []
        self.tokens = self.documents = self.bytes = self.replaced_bytes = 0

    def add(self, ids: NDArray[np.unsignedinteger], row: dict[str, Any]) -> None:
        """Append a document: its ids with the end of text, and what is known of it; absent columns become null."""
        check_length(len(ids), row["origin"])
        self._rows.append({**row, "token_start": self.tokens, "token_length": len(ids)})
        self._take(ids, 1, row["bytes"], row["replaced_bytes"])
        if len(self._rows) == _ROWS:
            self._collect()

    def add_block(self, ids: NDArray[np.unsignedinteger], rows: pa.RecordBatch, repeats: NDArray[np.void]) -> None:
        """Append documents together.

        Args:
            ids: their tokens end to end, each document's end of text included.
            rows: columns of ``DOCUMENT_SCHEMA`` but ``token_start``; columns that are absent become null.
            repeats: repeated n-grams, (R,) ``REPEAT``; places count from the block's first token.
        """
        if rows.num_rows == 0:
            return
        self._collect()
        lengths = np.asarray(rows.column("token_length"))
        assert int(lengths.sum(dtype=np.int64)) == len(ids), "the rows do not fit the tokens"
        starts = self.tokens + np.cumsum(lengths, dtype=np.int64) - lengths
        # A copy: a slice that waits would keep the whole mapped file that it comes from.
        self._waiting.append(_conform(rows, starts).take(pa.array(np.arange(rows.num_rows))))
        self._lengths.append(lengths.astype(np.int32))
        moved = repeats.astype(REPEAT)
        moved["start"] += self.tokens
        self._repeats.write(moved.tobytes())
        self._take(ids, rows.num_rows, _sum(rows, "bytes"), _sum(rows, "replaced_bytes"))
        if sum(batch.num_rows for batch in self._waiting) >= _ROWS:
            self._flush()

    def counts(self) -> Counter[str]:
        """Return what has been added so far."""
        return Counter(documents=self.documents, tokens=self.tokens, bytes=self.bytes)

    def close(self) -> None:
        """Write what is left and the index, and close the files."""
        self._collect()
        self._flush()
        self._arrow.close()
        for file in (self._docs, self._bin, self._repeats):
            file.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        write_index(self._index_path, lengths, self._dtype)

    def abandon(self) -> None:
        """Close the files after an error; what they hold is of no use."""
        for file in (self._docs, self._bin, self._repeats):
            try:
                file.close()
            except OSError:  # the disk is still full: the first error is the one to report
                continue

    def _take(self, ids: NDArray[np.unsignedinteger], documents: int, size: int, replaced: int) -> None:
        self._bin.write(np.ascontiguousarray(ids, self._dtype).data)
        self.tokens += len(ids)
        self.documents += documents
        self.bytes += size
        self.replaced_bytes += replaced

    def _collect(self) -> None:
        """Turn the rows added one by one into a batch."""
        if self._rows:
            self._waiting.append(pa.RecordBatch.from_pylist(self._rows, DOCUMENT_SCHEMA))
            self._lengths.append(np.array([row["token_length"] for row in self._rows], np.int32))
            self._rows.clear()

    def _flush(self) -> None:
        """Write the waiting batches as one: small ones would make a file slow to open."""
        if self._waiting:
            whole = pa.Table.from_batches(self._waiting, DOCUMENT_SCHEMA).combine_chunks()
            for batch in whole.to_batches():
                self._arrow.write_batch(batch)
            self._waiting.clear()


def check_length(tokens: int, origin: str) -> None:
    """Raise a ``UserError`` where a document has more tokens than the index can say."""
    if tokens > MOST_TOKENS:
        raise UserError(f"document '{origin}' has {tokens:,} tokens; cut it, the limit is 2**31 - 1")


def _conform(rows: pa.RecordBatch, starts: NDArray[np.int64]) -> pa.RecordBatch:
    """Return the rows with exactly the columns of ``DOCUMENT_SCHEMA``."""
    columns = []
    for field in DOCUMENT_SCHEMA:
        if field.name == "token_start":
            columns.append(pa.array(starts))
        elif field.name in rows.schema.names:
            columns.append(rows.column(field.name).cast(field.type))
        else:
            columns.append(pa.nulls(rows.num_rows, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=DOCUMENT_SCHEMA)


def _sum(rows: pa.RecordBatch, name: str) -> int:
    return int(pc.sum(rows.column(name)).as_py() or 0)
