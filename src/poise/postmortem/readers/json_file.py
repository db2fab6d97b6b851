"""One JSON document: columns as arrays, a list of records within, or TensorBoard's lists of three numbers.

{"step": [1, 2], "loss": [2.5, 2.4]}      {"train_losses": [2.5, 2.4]}      {"train": {"step": ..., "loss": ...}}
{"metrics": [{"step": 1, "loss": 2.5}]}   [{"step": 1, "loss": 2.5}]        [[1700000000.0, 1, 2.5], ...]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from poise.core.errors import UserError
from poise.postmortem.readers import jsonl, records
from poise.postmortem.readers.names import LOSS, ROW, STEP, choose, is_held_out, rank
from poise.postmortem.readers.source import HEAD_BYTES, Item, Row, Source, number

FORMAT = "json"
LOOKS_FOR = 'one JSON document like {"step": [1, 2], "loss": [2.5, 2.4]}'

MOST_BYTES = 64 << 20
"""A longer file is not read: it has to be held in memory."""

SCORE = 0.75
FEWEST = 2
"""Numbers that make an array a column."""

DEEPEST = 4
_BEGINS = re.compile(r'\A\s*(?:\[\s*[\[{]|\{\s*"[^"\\]{1,80}"\s*:\s*(?:\[|\{))')


def sniff(source: Source) -> float:
    """Return 0.75 for one document with columns or records in it."""
    start = source.head.decode("utf-8", errors="replace").lstrip("\ufeff")
    if not _BEGINS.match(start):
        return 0.0
    if len(source.head) < HEAD_BYTES:
        return SCORE if any(True for _ in tables(jsonl.loads(start))) else 0.0
    first = start.lstrip().partition("\n")[0]
    return 0.0 if jsonl.parse(first) is not None else SCORE  # else JSON lines


def read(source: Source) -> Iterator[Item]:
    """Yield one row a record, or a place in the arrays."""
    with source.binary() as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise UserError(
            f"'{source.path}' is one JSON document of more than {MOST_BYTES >> 20} MB; write it as JSON lines, one "
            "record a line"
        )
    document = jsonl.loads(text.decode("utf-8", errors="replace").lstrip("\ufeff"))
    if document is None:
        raise UserError(f"'{source.path}' begins like a JSON document, but is damaged or cut off; write JSON lines")
    found = list(tables(document))
    for folder, table in found:
        yield from _rows(source, folder if len(found) > 1 or is_held_out(folder) else "", table)


Table = Mapping[str, Sequence[Any]] | Sequence[Any]


def tables(value: Any, folder: str = "", depth: int = 0) -> Iterator[tuple[str, Table]]:
    """Yield the tables in a document, each with its folder: arrays by name, records, lists of three numbers."""
    if isinstance(value, list):
        if len(value) >= FEWEST and (all(isinstance(x, dict) for x in value) or all(map(_is_point, value))):
            yield folder, value
        return
    if not isinstance(value, dict) or depth > DEEPEST:
        return
    arrays = {name: x for name, x in value.items() if _is_column(x)}
    if arrays:
        yield folder, arrays
    for name, x in value.items():
        if name not in arrays and isinstance(x, dict | list):
            plain = isinstance(x, list)  # what a list of records is called says nothing about their names
            yield from tables(x, folder if plain else f"{folder}{name}/", depth + 1)


def _is_column(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < FEWEST:
        return False
    return all(x is None or number(x) is not None for x in value) and any(x is not None for x in value)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(number(x) is not None for x in value)


def _rows(source: Source, folder: str, table: Table) -> Iterator[Item]:
    if isinstance(table, Mapping):
        yield from _arrays(source, folder, table)
    elif table and isinstance(table[0], list):
        tag = tag_of(source)
        for _, step, value in table:
            yield {STEP: float(number(step) or 0.0), tag: float(number(value) or 0.0)}
    else:
        yield from records.rows(source, (_under(folder, jsonl.split(record)) for record in table))


def _under(folder: str, record: records.Record) -> records.Record:
    numbers, texts = record
    return {name if rank(STEP, name) is not None else folder + name: x for name, x in numbers.items()}, texts


def _arrays(source: Source, folder: str, table: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Yield the places of arrays of one length: that of the steps, else of the loss, else of the longest."""
    lengths = {name: len(values) for name, values in table.items()}
    step, _ = choose(STEP, lengths)
    loss, _ = choose(LOSS, lengths)
    length = lengths[step] if step else lengths[loss] if loss else max(lengths.values())
    for name in [name for name in lengths if lengths[name] != length]:
        source.notes.add(
            f"'{folder}{name}' has {lengths[name]} values and not {length}; left out, its steps are unknown"
        )
        del lengths[name]
    for place in range(length):
        record = {folder + name: table[name][place] for name in lengths if name != step}
        numbers, _ = jsonl.split(record)
        at = number(table[step][place]) if step else place + 1.0
        if at is not None:
            yield {STEP if step else ROW: at} | numbers


def tag_of(source: Source) -> str:
    """Return what the numbers of a scalar's export are: TensorBoard names the file ``...-tag-NAME``; else the loss.

    The name of the file has ``_`` where the tag has ``/``.
    """
    _, parted, tag = source.path.name.rpartition("-tag-")
    tag = re.sub(r"(?:\.(?:csv|json|gz|bz2|xz))+$", "", tag) if parted else ""
    source.notes.add(f"TensorBoard's export of one scalar; its values are taken as {tag or LOSS}")
    return tag or LOSS
