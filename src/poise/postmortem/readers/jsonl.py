"""JSON lines: one record a line, as training loops, Hugging Face callbacks and trackers write them.

Nested records are taken apart: ``{"train": {"loss": 2}}`` is the column ``train/loss``. The summary with which
the Hugging Face Trainer ends (it has ``train_runtime``, and a mean as ``train_loss``) is not a step. ``nan`` and
``inf``, which are no JSON, are read as programs write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from poise.postmortem.readers import records
from poise.postmortem.readers.names import LOSS, STEP, VAL_LOSS, rank
from poise.postmortem.readers.source import NULL, Item, Row, Source, number

FORMAT = "jsonl"
LOOKS_FOR = 'JSON lines like {"step": 1, "loss": 2.5}'

LOOK_AT = 50
"""Lines looked at to recognise the format."""

# A string, to its end or the text's, or a bare word; linear: no quantifier gives back what it took.
_BARE = re.compile(
    r'"(?>[^"\\]++|\\.)*+(?:"|\\?\Z)|(?<![\w.])([+-]?)(nan|inf(?:inity)?)(?:\([a-z]{0,8}\))?(?![\w.])', re.I
)


def sniff(source: Source) -> float:
    """Return how likely these are flat JSON records, most lines, with a loss or a step."""
    found = [record for line in source.head_lines[:LOOK_AT] if (record := parse(line)) is not None]
    if not found or 2 * len(found) < len(source.head_lines[:LOOK_AT]):
        return 0.0
    names = {name for record in found for name in row(record)}
    known = any(rank(meaning, name) is not None for name in names for meaning in (LOSS, STEP))
    return 0.8 if known else 0.2


def read(source: Source) -> Iterator[Item]:
    """Yield one row a record."""
    return records.rows(source, _records(source))


def _records(source: Source) -> Iterator[records.Record]:
    for line in source.lines():
        record = parse(line)
        if record is None:
            source.bad_line("line that is not a JSON record left out")
        elif "train_runtime" in record:
            source.notes.add("the trainer's closing summary is not a step and is left out", source.where)
        else:
            yield split(record)


def parse(line: str) -> dict[str, Any] | None:
    """Return the line's JSON object, ``None`` where it holds none."""
    if not line.startswith("{"):
        return None
    record = loads(line)
    return record if isinstance(record, dict) else None


def loads(text: str) -> Any:
    """Return what a text holds as JSON, with numbers that are not finite as any program writes them; or ``None``.

    >>> loads('{"loss": nan, "note": "nan", "lr": -INF}')
    {'loss': nan, 'note': 'nan', 'lr': -inf}
    """
    try:
        return json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            return json.loads(_BARE.sub(_as_json, text))
        except (ValueError, RecursionError):
            return None


def _as_json(match: re.Match[str]) -> str:
    if match[2] is None:
        return match[0]
    sign = "-" if match[1] == "-" else ""
    return "NaN" if match[2].lower() == "nan" else sign + "Infinity"


def row(record: Mapping[str, Any], folder: str = "") -> Row:
    """Return a record's numbers, those of inner records with the outer name before them."""
    out: Row = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= row(value, f"{folder}{name}/")
        elif (x := number(value)) is not None:
            out[folder + name] = x
    return out


def split(record: Mapping[str, Any]) -> records.Record:
    """Return a record's numbers and its words, as far as they say anything about the numbers."""
    numbers: Row = {}
    texts: dict[str, str] = {}
    nulls: list[str] = []
    _take(record, "", numbers, texts, nulls)
    if nulls and not any(rank(VAL_LOSS, name) is not None for name in numbers):
        numbers |= {NULL + name: float("nan") for name in nulls}
    return numbers, texts


def _take(record: Mapping[str, Any], folder: str, numbers: Row, texts: dict[str, str], nulls: list[str]) -> None:
    for name, value in record.items():
        if isinstance(value, dict):
            _take(value, f"{folder}{name}/", numbers, texts, nulls)
        elif (x := number(value)) is not None:
            numbers[folder + name] = x
        elif isinstance(value, str):
            if records.matters(name):
                texts[folder + name] = value
        elif value is None and rank(LOSS, folder + name) is not None:
            nulls.append(folder + name)
