"""What a run reads of its own journal: everything but the losses of single rows, which would fill the memory."""

from __future__ import annotations

from pathlib import Path

from poise.core.journal import Record, parse_line

_LARGE = ("row_losses", "source_losses")


def records_of(path: Path) -> list[Record]:
    """Return the records of a journal in their order, a line at a time; none where there is no file."""
    found: list[Record] = []
    if not path.exists():
        return found
    with path.open("rb") as file:
        for line in file:
            if (record := parse_line(line)) is not None:
                for name in _LARGE:
                    record.pop(name, None)
                found.append(record)
    return found
