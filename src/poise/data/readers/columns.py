"""Parquet and Arrow files: one document a row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from poise.data.readers import encoding
from poise.data.readers.document import Document, Tally
from poise.data.readers.rows import label
from poise.data.readers.stream import Job, first_line, raw_file

_ROWS: Final = 256
_BATCH_BYTES: Final = 4 * 2**20  # text of one batch, where it can be known beforehand


def read_parquet(job: Job) -> Iterator[Document]:
    """Yield the text column of a Parquet file row by row; a file without that column is counted.

    Of a damaged row group the batches before the damage are used, and the groups after it.

    Raises:
        Damaged: a row group is damaged, and the job strict.
        pyarrow.ArrowException, OSError without a number: the file's description is damaged.
        OSError: the file cannot be opened or read.
    """
    with raw_file(job.file) as raw, pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True) as table:
        schema, facts = table.schema_arrow, table.metadata
        if not _is_text(job, schema):
            return
        paths = [job.text_field, *_labels(schema).values()]
        first = 0
        for group in range(facts.num_row_groups):
            rows = facts.row_group(group).num_rows
            if first + rows > job.number:
                size = max(1, min(_ROWS, _BATCH_BYTES * rows // max(1, _text_bytes(facts.row_group(group), job))))
                at = first
                batches = table.iter_batches(batch_size=size, row_groups=[group], columns=paths)
                while (batch := _tried(job, lambda batches=batches: next(batches, None))) is not None:  # type: ignore[misc]
                    yield from _documents(job, batch, at)
                    at += batch.num_rows
                    job.reached(job.file.size * at // max(1, facts.num_rows))
            first += rows


def read_arrow(job: Job) -> Iterator[Document]:
    """Yield the text column of an Arrow file or stream row by row; a file without that column is counted.

    A damaged batch of a file is left out (nobody knows how many rows it had: the rows after it count on without them);
    a stream ends there.

    Raises:
        Damaged: a batch is damaged, and the job strict.
        pyarrow.ArrowException, OSError without a number: the file is damaged; the rows before were yielded.
        OSError: the file cannot be opened or read.
    """
    with raw_file(job.file) as raw:
        head = raw.peek(8)[:8]  # type: ignore[attr-defined]
        if head.startswith(b"FEA1"):
            job.tally.skip("file in the old Feather format (write it anew)")
            return
        # Mapped where it lies on this machine: then a batch takes no memory of its own.
        local = not isinstance(job.file.path, str)
        with pa.memory_map(os.fsencode(job.file.path)) if local else pa.PythonFile(raw, "r") as file:
            yield from _of_file(job, file) if head.startswith(b"ARROW1") else _of_stream(job, file)


def _of_file(job: Job, file: Any) -> Iterator[Document]:
    with pa.ipc.open_file(file) as table:
        if not _is_text(job, table.schema):
            return
        first = 0
        for number in range(table.num_record_batches):
            # Damage before the job's place was counted before.
            counting = job if first >= job.number else replace(job, tally=Tally())
            batch = _tried(counting, lambda number=number: table.get_batch(number))  # type: ignore[misc]
            if batch is None:
                continue
            yield from _documents_of(job, batch, first)
            first += batch.num_rows
            job.reached(job.file.size * (number + 1) // table.num_record_batches)


def _of_stream(job: Job, file: Any) -> Iterator[Document]:
    with pa.ipc.open_stream(file) as table:
        if not _is_text(job, table.schema):
            return
        first = 0
        for batch in table:
            yield from _documents_of(job, batch, first)
            first += batch.num_rows
            job.reached(file.tell())


def _tried(job: Job, read: Callable[[], Any]) -> Any:
    """Return what ``read`` does; None, and count it, if it finds damage."""
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not about the contents
        job.damaged(first_line(error))
        return None


def _documents_of(job: Job, batch: pa.RecordBatch, first: int) -> Iterator[Document]:
    """Yield the documents of a batch of any size."""
    begin = max(0, min(batch.num_rows, job.number - first)) // _ROWS * _ROWS
    for at in range(begin, batch.num_rows, _ROWS):
        yield from _documents(job, batch.slice(at, _ROWS), first + at)


def _documents(job: Job, batch: pa.RecordBatch, first: int) -> Iterator[Document]:
    """Yield the documents of a small batch whose first row is row ``first`` of the file, after the job's place."""
    done = max(0, job.number - first)
    if done >= batch.num_rows:
        return
    batch = batch.slice(done)
    # As bytes, because writers do not always check that strings are UTF-8.
    texts = batch.column(job.text_field).cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    names = {name: _values(batch, path) for name, path in _labels(batch.schema).items()}
    none = [None] * len(texts)
    ids, urls = names.get("id", none), names.get("url", none)
    origin, tally = job.file.origin, job.tally
    for row, (data, id, url) in enumerate(zip(texts, ids, urls, strict=True), first + done):
        data = data or b""
        text = encoding.read(data)
        if text.replaced and encoding.is_unknown(data, text):
            tally.skip("row in an unknown encoding")
            continue
        if text.encoding:
            tally.converted[text.encoding] += 1
        yield job.document(text.text, f"{origin}:{row}", 0, text.replaced, (0, row + 1), label(id), label(url))


def _is_text(job: Job, schema: pa.Schema) -> bool:
    """Say whether the text field is a column of text; count the file if not."""
    kind = schema.field(job.text_field).type if schema.names.count(job.text_field) == 1 else pa.null()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return True
    job.tally.missing(job.text_field, tuple(schema.names))
    return False


def _labels(schema: pa.Schema) -> dict[str, str]:
    """Return where the id and the address are: ``{"id": "id", "url": "metadata.url"}``, as far as there are any."""
    found = {}
    for name in ("id", "url"):
        if schema.names.count(name) == 1 and _is_name(schema.field(name).type):
            found[name] = name
    if "url" not in found and schema.names.count("metadata") == 1:
        kind = schema.field("metadata").type
        if pa.types.is_struct(kind) and kind.get_field_index("url") >= 0 and _is_name(kind.field("url").type):
            found["url"] = "metadata.url"
    return found


def _is_name(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _values(batch: pa.RecordBatch, path: str) -> list[Any]:
    name, _, inside = path.partition(".")
    column = batch.column(name)
    if inside:
        column = column.field(inside) if column.null_count == 0 else pa.compute.struct_field(column, [inside])
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        as_bytes = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [None if value is None else encoding.decode(value)[0] for value in as_bytes]


def _text_bytes(group: Any, job: Job) -> int:
    """Return the bytes of the text column in a row group, uncompressed."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == job.text_field)
