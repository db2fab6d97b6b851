"""Our row-wise stages over a Ray data set, block by block on a cluster.

What needs all documents at once (duplicates, the tokenizer) is not a row-wise stage: run ``poise data prepare`` on
what the data set writes. Needs ``pip install 'poise[ray]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from poise.core.errors import UserError
from poise.data import record

ROWS = 1024
"""Rows that Ray hands over at once."""


def map_stages(
    dataset: Any, stages: Sequence[record.Stage], *, text_field: str = "text", source: str = "ray", rows: int = ROWS
) -> Any:
    """Return the data set with the stages applied to every row; lazy, like all of Ray Data.

    The result has the columns of ``record.RECORD_SCHEMA`` (those that the data set lacks are made up), what the
    stages added, and the data set's other columns unchanged. No row is removed: keep those whose ``reason`` is null.
    Ray may hand the rows on in another order; its ``preserve_order`` option prevents that.

    Args:
        dataset: a ``ray.data.Dataset`` with a column of text.
        stages: pure functions of a record batch; they must be picklable.
        text_field: the column of text; it is called ``text`` in the result.
        source: name of the source where the data set has no column ``source``.
        rows: rows in one call.

    Raises:
        UserError: Ray is not installed. A column of text that is missing or is none is told when the work is done.
    """
    try:
        import ray.data
    except ImportError:
        raise UserError("stages over a Ray data set need Ray; pip install 'poise[ray]'") from None
    if not isinstance(dataset, ray.data.Dataset):
        raise UserError(f"map_stages needs a ray.data.Dataset, not {type(dataset).__name__}; see ray.data.read_parquet")
    apply = Apply(tuple(stages), text_field, source)
    return dataset.map_batches(apply, batch_format="pyarrow", batch_size=rows, zero_copy_batch=True)


@dataclass(frozen=True)
class Apply:
    """A picklable function of an Arrow table: its rows after the stages. Also fits Spark's ``mapInArrow``."""

    stages: tuple[Callable[[pa.RecordBatch], pa.RecordBatch], ...]
    text_field: str = "text"
    source: str = "ray"

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the stages applied."""
        fit = conform(table, self.text_field, self.source)
        done = [record.run(batch, self.stages) for batch in _batches(fit)]
        return pa.Table.from_batches(done)


def conform(table: pa.Table, text_field: str, source: str) -> pa.Table:
    """Return a table with the columns of ``record.RECORD_SCHEMA`` first and its own other columns after them.

    Raises:
        UserError: there is no such column of text, or a column has another type than its name promises.
    """
    names = table.column_names
    if text_field not in names:
        raise UserError(f"no column '{text_field}'; the data set has {', '.join(names)}: give text_field")
    columns: dict[str, Any] = {}
    defaults = {"text": "", "source": source, "origin": ""}
    for field in record.RECORD_SCHEMA:
        name = text_field if field.name == "text" else field.name
        if name in names:
            try:
                columns[field.name] = table[name].cast(field.type)
            except pa.ArrowException:
                raise UserError(
                    f"column '{name}' is {table[name].type}, not {field.type}; rename or convert it"
                ) from None
        else:
            columns[field.name] = pa.nulls(table.num_rows, field.type)
        if not field.nullable:
            columns[field.name] = columns[field.name].fill_null(defaults.get(field.name, 0))
    columns |= {name: table[name] for name in names if name not in (*columns, text_field)}
    fields = [
        record.RECORD_SCHEMA.field(name) if name in record.RECORD_SCHEMA.names else pa.field(name, column.type)
        for name, column in columns.items()
    ]
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield record batches of about ``record.BLOCK_BYTES`` of text; one without rows for an empty table."""
    if table.num_rows == 0:
        yield pa.RecordBatch.from_arrays([pa.array([], field.type) for field in table.schema], schema=table.schema)
    for batch in table.combine_chunks().to_batches():
        sizes = np.asarray(pa.compute.binary_length(batch.column("text")), np.int64)
        ends, first = np.cumsum(sizes), 0
        while first < batch.num_rows:
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + record.BLOCK_BYTES, side="right")))
            # A copy and not a slice: what a stage gets is laid out as where our own readers made it.
            yield batch.take(pa.array(np.arange(first, last)))
            first = last
