"""Hugging Face data sets saved to disk: ``input_ids`` and where each document came from.

The export writes the folder that ``datasets.load_from_disk`` memory-maps (Arrow streams and small JSON files), with
splits ``train`` and ``validation``, and needs no library. The import reads any saved data set that has a column of
ids, through ``datasets`` (``pip install 'poise[hf]'``). Layout: ``Dataset.save_to_disk`` of datasets 5.2.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from poise.core.errors import UserError, nearest
from poise.data import store
from poise.data.exchange import incoming, outgoing
from poise.data.exchange.building import build
from poise.data.exchange.incoming import REQUIRED, Import, Incoming, Known, Reading
from poise.data.exchange.outgoing import Progress

COLUMN: Final = "input_ids"
_NAMES: Final = {"train": "train", "val": "validation"}
_SHARD_BYTES: Final = 500_000_000  # as datasets itself cuts
_BATCH_TOKENS: Final = 2**20
_BATCH_ROWS: Final = 1000
_HASHES: Final = ("content_hash", "cluster")  # datasets knows no binary of fixed width: hexadecimal there


def export(data: str | Path, out: str | Path, *, progress: Progress | None = None) -> tuple[Path, ...]:
    """Write prepared data as a data set with splits into the new folder ``out``; return the Arrow files.

    Columns: ``input_ids`` (uint16 or uint32, the end of text included) and those of ``docs.arrow``, hashes as
    hexadecimal text.

    Raises:
        UserError: ``data`` is no prepared data or damaged, ``out`` is there already, or the disk is full.
    """
    tokens = outgoing.opened(data)
    meter = outgoing.Meter(tokens, progress)
    used = [name for name in store.SPLITS if tokens.manifest["splits"][name]["documents"]]
    with outgoing.fresh(out) as folder:
        for name in used:
            split = tokens.split(name)
            place = folder / _NAMES[name]
            place.mkdir()
            shards = outgoing.shards(split, max(1, _SHARD_BYTES // split.tokens.itemsize))
            files = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
            for shard, file in zip(shards, files, strict=True):
                _write_stream(place / file, split, shard)
                meter.add(shard.tokens)
            _write_json(place / "dataset_info.json", {})
            _write_json(place / "state.json", _state(files, _NAMES[name], tokens.fingerprint))
        _write_json(folder / "dataset_dict.json", {"splits": [_NAMES[name] for name in used]})
        outgoing.copy_tokenizer(tokens, folder)
    root = Path(out).expanduser().absolute()
    return tuple(file for name in used for file in incoming.listing(root / _NAMES[name], ".arrow"))


def _write_stream(path: Path, split: store.Split, shard: outgoing.Shard) -> None:
    """Write the documents of a shard as an Arrow stream, in bounded memory: ids are views of the mapped file."""
    with outgoing.written(path) as file:
        writer: Any = None
        for first, last in _batches(split, shard):
            columns = {COLUMN: _ids(split, first, last)}
            table = split.table.slice(first, last - first).combine_chunks()
            for field in table.schema:
                if field.name in ("token_start", "token_length"):
                    continue
                column = table[field.name]
                columns[field.name] = _hex(column) if field.name in _HASHES else column.combine_chunks()
            flat = {k: v.chunk(0) if isinstance(v, pa.ChunkedArray) else v for k, v in columns.items()}
            batch = pa.RecordBatch.from_pydict(flat)
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        writer.close()


def _batches(split: store.Split, shard: outgoing.Shard) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of documents that go into one record batch."""
    first = shard.first
    while first < shard.last:
        lengths = np.cumsum(split.index.lengths[first : min(first + _BATCH_ROWS, shard.last)], dtype=np.int64)
        last = first + max(1, int(np.searchsorted(lengths, _BATCH_TOKENS, side="right")))
        yield first, last
        first = last


def _ids(split: store.Split, first: int, last: int) -> pa.ListArray:
    start = int(split.index.pointers[first]) // split.tokens.itemsize
    ends = np.cumsum(split.index.lengths[first:last], dtype=np.int64)
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(split.tokens[start : start + int(ends[-1])]))


def _hex(column: Any) -> pa.Array:
    return pa.array([None if value is None else value.hex() for value in column.to_pylist()], pa.string())


def _state(files: list[str], split: str, fingerprint: str) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }


def _write_json(path: Path, value: Any) -> None:
    with outgoing.written(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def import_(
    source: str | Path,
    out: str | Path,
    how: Import | None = None,
    *,
    column: str = COLUMN,
    progress: Progress | None = None,
) -> Any:
    """Turn a data set saved by ``save_to_disk`` into prepared data at ``out``; return the manifest.

    Splits ``train`` and ``validation`` (or ``val``) keep their side; all others are for training. A data set with the
    columns of an export keeps its provenance, but not with ``how.split``.

    Args:
        source: the saved folder, of one data set or of several splits.
        out: the folder to write; prepared data there is replaced.
        how: see ``incoming.Import``.
        column: the column with a list of ids in each row.
        progress: called while working.

    Raises:
        UserError: ``datasets`` is missing, no such data set or column, ids that do not fit the vocabulary, full disk.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("reading a saved data set needs datasets; pip install 'poise[hf]'") from None
    path = Path(source).expanduser()
    try:
        found = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:  # FileNotFoundError, Arrow's, and what its JSON can raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no data set saved by save_to_disk at '{source}': {first}; give its folder") from None
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    how = how or Import()
    readings = []
    for name, rows in splits.items():
        if column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UserError(f"'{source}' has no column '{column}'{nearest(column, rows.column_names)}; it has {known}")
        readings.append(_Rows(path / name, rows, column, how.split))
    return build("hf", source, readings, Path(out), how, progress)


@dataclass(frozen=True)
class _Rows(Reading):
    """One split of a data set; ``path`` is its name in messages."""

    rows: Any
    column: str
    split: bool

    def documents(self, end_of_text: int | None) -> Iterator[Incoming]:
        """Yield one document a row."""
        number = 0
        own_ids = self.column != "id" and "id" in self.rows.column_names
        names = [self.column, "id"] if own_ids else [self.column]
        some = self.rows.select_columns(names).with_format("arrow")
        for table in some.iter(batch_size=_BATCH_ROWS):
            for batch in table.to_batches():
                lists, ids = batch.column(self.column), batch.column("id").to_pylist() if own_ids else []
                if pa.types.is_fixed_size_list(lists.type):
                    lists = lists.cast(pa.list_(lists.type.value_type))
                if not _holds_ids(lists.type):
                    raise UserError(f"column '{self.column}' is {lists.type}, not lists of whole numbers; give another")
                if lists.null_count or lists.values.null_count:
                    raise UserError(f"column '{self.column}' of '{self.path}' has empty places; remove those rows")
                values = lists.values.to_numpy(zero_copy_only=False)
                edges = lists.offsets.to_numpy().tolist()
                for row, (start, stop) in enumerate(itertools.pairwise(edges)):
                    own = str(ids[row]) if ids and ids[row] is not None else None
                    yield Incoming(values[start:stop], f"{self.path.name}:{number}", 0, own)
                    number += 1

    def known(self) -> Known | None:
        """Return the columns of an export as provenance, or None."""
        names = [name for name in self.rows.column_names if name != self.column]
        if self.split or not set(REQUIRED) <= set(names):
            return None
        some = self.rows.select_columns(names).with_format("arrow")
        return Known(len(some), lambda first, count: _with_bytes(some[first : first + count]))


def _with_bytes(table: Any) -> Any:
    """Return a table with its hashes as binary values."""
    for name in set(_HASHES) & set(table.column_names):
        try:
            values = [None if text is None else bytes.fromhex(text) for text in table[name].to_pylist()]
            column = pa.array(values, pa.binary(16))
        except (TypeError, ValueError, pa.ArrowException):
            raise UserError(
                f"column '{name}' does not hold 32 hexadecimal digits; remove it to import the rest"
            ) from None
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _holds_ids(kind: pa.DataType) -> bool:
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type))
