"""The journal of a poise run (``journal.jsonl``), or of its folder.

What counts is what ``poise.core.journal.timeline`` says: a step that was done again, and everything after it, is
replaced; after a rollback nothing above its target counts. The same is said here with ``Rewound`` marks, so that
the file is streamed and the readings of ``layers`` records follow the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from poise.core.journal import FIELDS
from poise.postmortem.readers import jsonl
from poise.postmortem.readers.names import LOSS, STEP, VAL_LOSS
from poise.postmortem.readers.source import Item, Rewound, Row, Source, number

FORMAT = "poise"
LOOKS_FOR = "a poise run folder or its journal.jsonl"

INNER = ("extra", "readings")
"""Fields of a record that hold further readings by name."""


def sniff(source: Source) -> float:
    """Return 1 when the records are typed and timed as a journal's are."""
    records = [record for line in source.head_lines[: jsonl.LOOK_AT] if (record := jsonl.parse(line)) is not None]
    return 1.0 if any(is_record(record) and "time" in record for record in records) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield steps, evaluations (as ``val_loss``) and the layers' readings."""
    last = -1
    for line in source.lines():
        record = jsonl.parse(line)
        if record is None or not is_record(record):
            source.bad_line("line that is no journal record left out")
            continue
        match record["type"]:
            case "step":
                step = int(record["step"])
                if step <= last:
                    yield Rewound(step - 1)
                last = step
                yield _numbers(record)
            case "eval":
                yield {STEP: float(record["step"])} | _only(VAL_LOSS, record[LOSS])
            case "layers" | "linears":
                yield _numbers(record)
            case "rollback":
                yield Rewound(int(record["to"]))
                last = min(last, int(record["to"]))


def is_record(record: dict[str, Any]) -> bool:
    """Return whether this is a record of a known type with a step where one is needed."""
    kind = record.get("type")
    if not isinstance(kind, str) or kind not in FIELDS:
        return False
    fields = FIELDS[kind]
    whole = ("step", "to")
    return all(name in record and (name not in whole or isinstance(record[name], int)) for name in fields)


def _numbers(record: dict[str, Any]) -> Row:
    """Return the record's numbers; readings keep their plain names."""
    out: Row = {}
    for name, value in record.items():
        if name in INNER and isinstance(value, dict):
            out |= jsonl.row(value)
        elif name != "time":
            out |= _only(name, value)
    return out


def _only(name: str, value: object) -> Row:
    x = number(value)
    return {} if x is None else {name: x}
