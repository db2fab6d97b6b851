"""JSON lines: one record a line, as training loops, Hugging Face callbacks and trackers write them.

Nested records are taken apart: ``{"train": {"loss": 2}}`` is the column ``train/loss``. The summary with which
the Hugging Face Trainer ends (it has ``train_runtime``, and a mean as ``train_loss``) is not a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from poise.postmortem.readers.names import LOSS, STEP, rank
from poise.postmortem.readers.source import Item, Row, Source, number

FORMAT = "jsonl"
LOOKS_FOR = 'JSON lines like {"step": 1, "loss": 2.5}'

LOOK_AT = 50
"""Lines looked at to recognise the format."""


def sniff(source: Source) -> float:
    """Return how likely these are flat JSON records, most lines, with a loss or a step."""
    records = [record for line in source.head_lines[:LOOK_AT] if (record := parse(line)) is not None]
    if not records or 2 * len(records) < len(source.head_lines[:LOOK_AT]):
        return 0.0
    names = {name for record in records for name in row(record)}
    known = any(rank(meaning, name) is not None for name in names for meaning in (LOSS, STEP))
    return 0.8 if known else 0.2


def read(source: Source) -> Iterator[Item]:
    """Yield one row a record."""
    for line in source.lines():
        record = parse(line)
        if record is None:
            source.bad_line("line that is not a JSON record left out")
        elif "train_runtime" in record:
            source.notes.add("the trainer's closing summary is not a step and is left out", source.where)
        else:
            yield row(record)


def parse(line: str) -> dict[str, Any] | None:
    """Return the line's JSON object, ``None`` where it holds none."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def row(record: Mapping[str, Any], folder: str = "") -> Row:
    """Return a record's numbers, those of inner records with the outer name before them."""
    out: Row = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= row(value, f"{folder}{name}/")
        elif (x := number(value)) is not None:
            out[folder + name] = x
    return out
