"""The journal: an append-only file with one record a line, the truth about a run.

Every record has ``type`` and ``time`` (seconds since the epoch). A torn last line (the machine died while
writing) is tolerated. After a rollback or a resume a step is written again; later records win, and
``timeline`` gives the history as it counts. Non-finite numbers are written as the strings "nan", "inf"
and "-inf", because JSON has no numbers for them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from poise.core.errors import UserError
from poise.core.lock import claim

Record = dict[str, Any]

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "run": ("format", "recipe", "command", "environment"),
    "step": ("step", "loss", "grad_norm", "lr", "tokens"),
    "event": ("step", "kind", "severity", "signal", "value", "expected", "detector", "message"),
    "decision": ("step", "action", "reason"),
    "eval": ("step", "loss"),
    "save": ("step", "path"),
    "restart": ("step", "reason"),
    "rollback": ("step", "to"),
    "drop": ("step",),
    "layers": ("step", "readings"),
    "linears": ("step", "readings"),
    "verdict": ("step", "cause", "certainty", "evidence"),
    "end": ("step", "reason"),
}
"""Record types and the fields each must have; it may have more."""

_NON_FINITE: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Journal:
    """Append records to ``path``; safe to open again after a crash.

    Raises:
        UserError: another process is writing to this journal.
        OSError: the disk is full or the folder is gone; nothing already written is lost.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        if not claim(self._file):
            self._file.close()
            raise UserError(f"another process is writing to '{self.path}'; wait for it or stop it first")
        _end_torn_line(self.path)

    def write(self, kind: str, /, **fields: Any) -> Record:
        """Write one record and hand it to the operating system; return it as it will be read back."""
        missing = [name for name in FIELDS[kind] if name not in fields]
        assert not missing, f"a {kind} record needs {missing}"
        record: Record = {"type": kind, "time": round(time.time(), 3), **fields}
        self._file.write(to_json(record) + "\n")
        self._file.flush()
        return record

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()


def to_json(value: Any) -> str:
    """Return one line of strict JSON; non-finite numbers become the strings "nan", "inf" and "-inf".

    >>> to_json({"loss": float("nan")})
    '{"loss":"nan"}'
    """
    return json.dumps(_encode(value), separators=(",", ":"), allow_nan=False)


def read(path: str | Path) -> list[Record]:
    """Return all records in the order they were written; a torn or foreign line is left out."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        return [record for line in file if (record := parse_line(line)) is not None]


def parse_line(line: str | bytes) -> Record | None:
    """Return the record that a line holds; ``None`` for a torn or foreign line."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if isinstance(record, dict) and isinstance(record.get("type"), str) and record["type"] in FIELDS:
        decoded: Record = _decode(record)
        return decoded
    return None


def timeline(records: Iterable[Record]) -> list[Record]:
    """Return the ``step`` and ``eval`` records that count, in order: where a step was done again, the last.

    >>> a = [{"type": "step", "step": s, "loss": s} for s in (1, 2, 3)]
    >>> [r["loss"] for r in timeline(a + [{"type": "step", "step": 2, "loss": 20}])]
    [1, 20]
    """
    kept: list[Record] = []
    for record in records:
        if record["type"] == "step":
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
            kept.append(record)
        elif record["type"] == "eval":
            while kept and kept[-1]["step"] > record["step"]:
                kept.pop()
            kept.append(record)
        elif record["type"] == "rollback":
            while kept and kept[-1]["step"] > record["to"]:
                kept.pop()
    return kept


def _end_torn_line(path: Path) -> None:
    """Finish a half-written last line, so that the next record starts on its own line."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return value
