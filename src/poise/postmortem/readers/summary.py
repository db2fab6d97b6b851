"""One event of TensorBoard: its step, its scalars and its texts, taken out of the ``Event`` message by hand.

Field numbers are those of TensorFlow's ``event.proto``, ``summary.proto``, ``tensor.proto`` and ``types.proto``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from poise.postmortem.readers import wire
from poise.postmortem.readers.wire import BYTES, FIXED32, VARINT

START = 1
"""``SessionLog.status``: the program began (again)."""

FLOAT = struct.Struct("<f")
DOUBLE = struct.Struct("<d")

_HALF, _BFLOAT16, _STRING = 19, 14, 7
_CONTENT = {1: "<f", 2: "<d", 3: "<i", 4: "<B", 5: "<h", 6: "<b", 9: "<q", 10: "<?", 17: "<H", 22: "<I", 23: "<Q"}
"""``DataType`` -> how one number of it lies in ``tensor_content``."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number by name.

    Attributes:
        tag: what it is called.
        value: the number.
        at: where it lies in the message, from the message's beginning; -1 where its place or length may vary.
        form: how it lies there.
    """

    tag: str
    value: float
    at: int = -1
    form: struct.Struct = FLOAT


@dataclass(slots=True)
class Event:
    """What is used of an ``Event``; ``values`` counts all that its summary holds, of any kind."""

    step: int = 0
    start: bool = False
    scalars: list[Scalar] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    values: int = 0


def event(payload: bytes, plugins: dict[str, str]) -> Event:
    """Return what a message says.

    Args:
        payload: the message.
        plugins: tag -> the plugin it belongs to, which only a tag's first message has to say; kept up to date.

    Raises:
        wire.Malformed: these bytes are no event.
    """
    out = Event()
    for number, kind, value, end in wire.fields(payload):
        if number == 2 and kind == VARINT and isinstance(value, int):
            out.step = wire.signed(value)
        elif kind == BYTES and isinstance(value, bytes):
            if number == 5:
                _summary(out, value, end - len(value), plugins)
            elif number == 7:
                out.start = any(n == 1 and status == START for n, _, status, _ in wire.fields(value))
    return out


def _summary(out: Event, data: bytes, at: int, plugins: dict[str, str]) -> None:
    for number, kind, value, end in wire.fields(data):
        if number != 1 or kind != BYTES or not isinstance(value, bytes):
            continue
        out.values += 1
        found = _value(value, at + end - len(value), plugins)
        if isinstance(found, Scalar):
            out.scalars.append(found)
        elif found is not None:
            out.texts.append(found)


def _value(data: bytes, at: int, plugins: dict[str, str]) -> Scalar | tuple[str, str] | None:
    """Return a ``Summary.Value`` when it is a number or a text."""
    tag = node = plugin = ""
    number_at = tensor_at = -1
    tensor = b""
    for number, kind, value, end in wire.fields(data):
        if kind == FIXED32 and number == 2:
            number_at = end - 4
        elif isinstance(value, bytes) and kind == BYTES:
            if number == 1:
                tag = wire.text(value)
            elif number == 7:
                node = wire.text(value)
            elif number == 8:
                tensor, tensor_at = value, end - len(value)
            elif number == 9:
                plugin = _plugin(value)
    tag = tag or node
    if number_at >= 0:
        return Scalar(tag, FLOAT.unpack_from(data, number_at)[0], at + number_at)
    if tensor_at < 0:
        return None
    plugin = plugins.setdefault(tag, plugin) if plugin or len(plugins) < 100_000 else ""
    if plugin in ("", "scalars", "text"):
        return _tensor(tag, tensor, at + tensor_at)
    return None


def _plugin(metadata: bytes) -> str:
    for data in wire.parts(metadata, 1):
        for name in wire.parts(data, 1):
            return wire.text(name)
    return ""


def _tensor(tag: str, data: bytes, at: int) -> Scalar | tuple[str, str] | None:
    """Return a tensor of one element; ``None`` for larger ones, and for what is no number."""
    dtype, held, held_at, held_in, kind_of = 0, b"", -1, 0, BYTES
    varint = 0
    for number, kind, value, end in wire.fields(data):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2 and isinstance(value, bytes):
            if not _is_one(value):
                return None
        elif held_in and number == held_in:
            return None  # a list of several
        elif number >= 4:
            held_in, kind_of, held_at = number, kind, end
            if isinstance(value, bytes):
                held, held_at = value, end - len(value)
            else:
                varint = value
    if dtype == _STRING:
        return (tag, wire.text(held)) if held_in == 8 else None
    if dtype not in _CONTENT and dtype not in (_HALF, _BFLOAT16):
        return None
    if not held_in:
        return Scalar(tag, 0.0)  # no value is written for zero
    return _number(tag, dtype, held_in, held if kind_of != VARINT else varint, at + held_at)


def _is_one(shape: bytes) -> bool:
    for dim in wire.parts(shape, 2):
        sizes = [value for number, _, value, _ in wire.fields(dim) if number == 1]
        if sizes[-1:] != [1]:
            return False
    return True


def _number(tag: str, dtype: int, held_in: int, held: bytes | int, at: int) -> Scalar | None:
    """Return the one number of a tensor, from whichever field holds it."""
    if isinstance(held, bytes):
        if held_in == 4:
            return _content(tag, dtype, held, at)
        if held_in == 5:
            return Scalar(tag, FLOAT.unpack(held)[0], at, FLOAT) if len(held) == 4 else None
        if held_in == 6:
            return Scalar(tag, DOUBLE.unpack(held)[0], at, DOUBLE) if len(held) == 8 else None
        if held_in not in (7, 10, 11, 13, 16, 17) or not held:
            return None
        size = len(held)
        held, end = wire.varint(held, 0)
        if end < size:
            return None  # several
    whole = wire.signed(held) if held_in in (7, 10) else held
    if held_in == 13:
        return Scalar(tag, _half(dtype, whole))
    return Scalar(tag, float(whole))


def _content(tag: str, dtype: int, held: bytes, at: int) -> Scalar | None:
    if dtype in (_HALF, _BFLOAT16):
        return Scalar(tag, _half(dtype, int.from_bytes(held, "little"))) if len(held) == 2 else None
    form = struct.Struct(_CONTENT[dtype])
    return Scalar(tag, float(form.unpack(held)[0]), at, form) if len(held) == form.size else None


def _half(dtype: int, bits: int) -> float:
    if dtype == _BFLOAT16:
        return float(FLOAT.unpack(struct.pack("<I", (bits & 0xFFFF) << 16))[0])
    return float(struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0])
