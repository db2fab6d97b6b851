"""The binary file of a Weights & Biases run, ``run-ID.wandb``: its history and its config.

The file is a LevelDB log with a header of W&B's own (blocks of 32 KiB; records whole, or in a first, middle and last
part; CRC-32 of type and data). It holds ``Record`` messages (``wandb/proto/wandb_internal.proto``). A history record
is one ``wandb.log`` step: items of a name, or a path of names, and a value in JSON. The folder of an offline run has
this file, and that of an online run has it too.

Names are joined by a dot as W&B shows them: ``wandb.log({"opt": {"lr": 1e-3}})`` is the column ``opt.lr``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from typing import IO, Any

from poise.postmortem.readers import wire
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source, number
from poise.postmortem.readers.wire import BYTES, Malformed

FORMAT = "wandb"
LOOKS_FOR = "a W&B run-*.wandb file"

IDENT, MAGIC = b":W&B", b"\xe1\xbe"
HEADER = 7
"""Bytes of the file's header, and also of a record's."""

BLOCK = 1 << 15
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

MAX_RECORD = 1 << 25
"""Bytes; a longer record is no history, and is not held in memory."""

MAX_VALUE = 1 << 16
"""Bytes of JSON; a longer value is a table or a picture."""

MAX_NAMES = 50_000
MAX_SETTINGS = 10_000

HISTORY, CONFIG, RUN, EXIT = 2, 5, 17, 18
"""Fields of ``Record``."""

_DAMAGED = "damaged record left out"
_CUT = "the last record is cut off and left out"
_CRC_OF_TYPE = tuple(zlib.crc32(bytes([kind])) for kind in range(LAST + 1))


def sniff(source: Source) -> float:
    """Return 1 for the header that W&B writes."""
    head = source.head
    if not head.startswith(IDENT) or len(head) < HEADER:
        return 0.0
    return 1.0 if head[4:6] == MAGIC else 0.9 * (b"\0" in head[:64])


def read(source: Source) -> Iterator[Item]:
    """Yield one row a history record."""
    run = _Run(source)
    for i, part in enumerate(source.parts):
        if i and run.rows:
            yield RESTARTED
        with source.binary(part) as file:
            for record in _records(file, source):
                row = run.take(record)
                if row:
                    yield row
        run.end()


def _records(file: IO[bytes], source: Source) -> Iterator[bytes]:
    """Yield every record whose checksum holds, its parts put together."""
    pending: list[bytes] | None = None
    held, header = 0, HEADER
    lost = False  # within a damaged stretch that has been noted
    while block := wire.pull(file, BLOCK):
        at, header = header, 0
        while at + HEADER <= len(block):
            kind, size = block[at + 6], int.from_bytes(block[at + 4 : at + 6], "little")
            if not any(block[at : at + HEADER]):
                break  # room that was never written
            data = block[at + HEADER : at + HEADER + size]
            if len(data) < size and len(block) < BLOCK:
                source.notes.add(_CUT)
                return
            good = FULL <= kind <= LAST and len(data) == size
            good = good and zlib.crc32(data, _CRC_OF_TYPE[kind]) == int.from_bytes(block[at : at + 4], "little")
            at += HEADER + size
            if not good or (kind in (MIDDLE, LAST)) != (pending is not None):
                if not lost:
                    source.notes.add(_DAMAGED)
                lost, pending = True, None
                if not good or kind in (MIDDLE, LAST):
                    continue
            if kind == FULL:
                lost = False
                yield data
                continue
            if kind == FIRST:
                pending, held = [], 0
            assert pending is not None
            held += size
            if held <= MAX_RECORD:
                pending.append(data)
            if kind == LAST:
                lost = False
                if held <= MAX_RECORD:
                    yield b"".join(pending)
                pending = None
    if pending is not None:
        source.notes.add(_CUT)


class _Run:
    """What the records of one run say."""

    def __init__(self, source: Source) -> None:
        self._notes = source.notes
        self._settings = source.settings
        self._names: dict[bytes, str] = {}
        self._ended = False
        self.rows = 0

    def take(self, record: bytes) -> Row | None:
        """Return the row of a history record; keep what others say."""
        try:
            for field, kind, value, _ in wire.fields(record):
                if kind != BYTES or not isinstance(value, bytes):
                    continue
                if field == HISTORY:
                    self.rows += 1
                    return self._history(value)
                if field == CONFIG:
                    self._config(value)
                elif field == RUN:
                    for config in wire.parts(value, 4):
                        self._config(config)
                elif field == EXIT:
                    self._exit(value)
        except Malformed:
            self._notes.add("record that is no message of W&B left out")
        return None

    def end(self) -> None:
        """Note where a file ends without saying that the run did."""
        if self.rows and not self._ended:
            self._notes.add("the run was killed, or is still running: its file has no closing record")
        self._ended = False

    def _history(self, data: bytes) -> Row:
        row: Row = {}
        step = 0
        for field, kind, value, _ in wire.fields(data):
            if not isinstance(value, bytes) or kind != BYTES:
                continue
            if field == 1:
                name, found = self._item(value)
                if name:
                    _add(row, name, found)
            elif field == 2:
                step = next((wire.signed(n) for f, _, n, _ in wire.fields(value) if f == 1 and isinstance(n, int)), 0)
        if row:
            row.setdefault("_step", float(step))
        return row

    def _item(self, item: bytes) -> tuple[str, bytes]:
        """Return a name and its value in JSON. Names are remembered by their bytes: they come again each step."""
        cut = item.find(b"\x82\x01")  # the key of field 16, unless a name holds these bytes
        name = self._names.get(item[:cut]) if cut > 0 else None
        if name is not None and 0 <= len(item) - cut - 3 < 0x80 and item[cut + 2] == len(item) - cut - 3:
            return name, item[cut + 3 :]
        names: list[str] = []
        found, before = b"", 0
        for field, _, value, end in wire.fields(item):
            if isinstance(value, bytes):
                if field in (1, 2):
                    names.append(wire.text(value))
                    before = end
                elif field == 16:
                    found = value
        name = ".".join(names)
        if before == cut and len(self._names) < MAX_NAMES:
            self._names[item[:cut]] = name
        return name, found

    def _config(self, data: bytes) -> None:
        for item in wire.parts(data, 1):
            name, found = self._item(item)
            if name and name.partition(".")[0] != "_wandb":
                value = _parse(found)
                if isinstance(value, dict) and value.keys() == {"desc", "value"}:
                    value = value["value"]
                self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                self._set(f"{name}.{key}", inner)
        elif value is not None and (name in self._settings or len(self._settings) < MAX_SETTINGS):
            self._settings[name] = value if isinstance(value, str) else json.dumps(value)

    def _exit(self, data: bytes) -> None:
        self._ended = True
        for field, _, value, _ in wire.fields(data):
            if field == 1 and isinstance(value, int) and value:
                self._notes.add(f"the run ended with exit code {wire.signed(value)}")


def _add(row: Row, name: str, found: bytes) -> None:
    """Put a value's numbers into the row: those of inner objects by their own names; texts and media are none."""
    try:
        row[name] = float(found)  # also NaN and Infinity, which Python writes into JSON
    except ValueError:
        _inner(row, name, _parse(found))


def _inner(row: Row, name: str, value: Any) -> None:
    if isinstance(value, dict):
        if "_type" not in value:  # a histogram, a picture, a table
            for key, inner in value.items():
                _inner(row, f"{name}.{key}", inner)
    elif isinstance(value, str):
        x = number(value)
        if x is not None and not math.isfinite(x):  # "NaN" and "Infinity" in quotes
            row[name] = x
    elif (x := number(value)) is not None:
        row[name] = x


def _parse(found: bytes) -> Any:
    if len(found) > MAX_VALUE:
        return None
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        return None
