"""What passes from stage to stage before tokens exist: Arrow record batches with one document a row.

A stage is a pure function ``RecordBatch -> RecordBatch``. It may add columns, and change ``text``; it never removes,
adds or reorders rows. A row that shall not be used gets a ``reason``; the first reason stays. So a stage runs unchanged
in one process, in many, and inside other people's engines, and what was dropped can be kept with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.data.readers import Document

Item = TypeVar("Item")

Stage = Callable[[pa.RecordBatch], pa.RecordBatch]
"""A pure, picklable function of one record batch."""

REASON: Final = "reason"
"""Column of text: null for a document that is kept, else ``<preset>.<rule>`` that dropped it."""

RECORD_SCHEMA: Final = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("replaced_bytes", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("url", pa.string()),
        pa.field(REASON, pa.string()),
    ]
)
"""Columns every stage may rely on; the meaning is that of ``readers.Document``."""

BLOCK_BYTES: Final = 8 * 2**20
"""Text of one record batch: enough for vectors to pay, little enough for memory."""

BLOCK_DOCUMENTS: Final = 8192


def groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists, cut by the size of their text and their number."""
    return grouped(documents, lambda document: len(document.text), BLOCK_BYTES, BLOCK_DOCUMENTS)


def grouped(items: Iterable[Item], size_of: Callable[[Item], int], most_size: int, most: int) -> Iterator[list[Item]]:
    """Yield items in lists, cut by size alone, so always in the same places; nothing is read ahead of a list."""
    rows: list[Item] = []
    size = 0
    for item in items:
        rows.append(item)
        size += size_of(item)
        if size >= most_size or len(rows) == most:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def of(documents: Sequence[Document]) -> pa.RecordBatch:
    """Return documents as one record batch with ``RECORD_SCHEMA``; no reasons yet."""
    return pa.RecordBatch.from_arrays(
        [
            pa.array([d.text for d in documents], pa.string()),
            pa.array([d.source for d in documents], pa.string()),
            pa.array([d.origin.encode("utf-8", "replace").decode() for d in documents], pa.string()),
            pa.array([d.offset for d in documents], pa.int64()),
            pa.array([d.replaced_bytes for d in documents], pa.int64()),
            pa.array([d.id for d in documents], pa.string()),
            pa.array([d.url for d in documents], pa.string()),
            pa.nulls(len(documents), pa.string()),
        ],
        schema=RECORD_SCHEMA,
    )


def kept(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Return which rows have no reason, (N,)."""
    return np.asarray(batch.column(REASON).is_null())


def drop(batch: pa.RecordBatch, rows: NDArray[np.bool_], reason: str) -> pa.RecordBatch:
    """Give ``reason`` to the chosen rows that have none yet."""
    chosen = rows & kept(batch)
    if not chosen.any():
        return batch
    reasons = pc.if_else(pa.array(chosen), reason, batch.column(REASON))
    return set_column(batch, REASON, reasons)


def set_column(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    """Return the batch with a column replaced, or added at the end."""
    at = batch.schema.get_field_index(name)
    if at < 0:
        return batch.append_column(name, values)
    field = batch.schema.field(at)
    return batch.set_column(at, pa.field(name, values.type, field.nullable), values)


def run(batch: pa.RecordBatch, stages: Iterable[Stage]) -> pa.RecordBatch:
    """Apply stages one after another."""
    for stage in stages:
        batch = stage(batch)
    return batch


def flat(text: pa.StringArray | pa.LargeStringArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the UTF-8 bytes of N texts end to end, not copied, and the (N + 1,) places where they begin and end.

    A null reads as an empty text.
    """
    wide = pa.types.is_large_string(text.type)
    if text.null_count:
        text = text.fill_null("")
    _, offsets, data = text.buffers()
    if len(text) == 0 or offsets is None:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    places = np.frombuffer(offsets, np.int64 if wide else np.int32)[text.offset : text.offset + len(text) + 1]
    places = places.astype(np.int64)
    raw = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return raw[places[0] : places[-1]], places - places[0]
