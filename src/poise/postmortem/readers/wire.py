"""The wire format of protocol buffers, as far as readers of logs need it: fields by number, no schema.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator
from typing import IO

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

PIECE = 1 << 13

MAX_VARINT = 10
"""Bytes of the longest varint: 64 bits, seven a byte."""


class Malformed(ValueError):  # noqa: N818 - read as "except Malformed"
    """These bytes are no message. Readers catch it: one damaged record is not the end of a log."""


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (the unsigned varint at ``at``, where it ends).

    Raises:
        Malformed: it is longer than 64 bits, or the data end within it.

    >>> varint(bytes([0xAC, 0x02]), 0)
    (300, 2)
    """
    value = shift = 0
    for byte in data[at : at + MAX_VARINT]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + shift // 7
    raise Malformed("varint without an end")


def signed(value: int) -> int:
    """Return an int64 (or int32) from its varint: two's complement in 64 bits.

    >>> signed(2**64 - 5)
    -5
    """
    return value - (1 << 64) if value >> 63 else value


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes, int]]:
    """Yield (number, wire type, value, where it ends) of each field, in order.

    The value is an int for ``VARINT``, and the raw bytes for the others (8, 4, or as many as the field says).

    Raises:
        Malformed: these bytes are no message.
    """
    at, end = 0, len(data)
    while at < end:
        key = data[at]
        if key < 0x80:
            at += 1
        else:
            key, at = varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = varint(data, at)
            yield key >> 3, kind, value, at
            continue
        if kind == BYTES:
            size, at = varint(data, at)
        elif kind == FIXED64:
            size = 8
        elif kind == FIXED32:
            size = 4
        else:
            raise Malformed(f"wire type {kind}")
        if size > end - at or key < 8:
            raise Malformed("field longer than its message")
        at += size
        yield key >> 3, kind, data[at - size : at], at


def parts(data: bytes, number: int) -> Iterator[bytes]:
    """Yield the strings or inner messages with this number.

    Raises:
        Malformed: these bytes are no message.
    """
    for found, _, value, _ in fields(data):
        if found == number and isinstance(value, bytes):
            yield value


def pull(file: IO[bytes], size: int) -> bytes:
    """Read ``size`` bytes, fewer at the end, or where a compressed file is damaged or cut off.

    Read in small pieces, so that damage costs no more than one of them.
    """
    pieces, left = [], size
    while left > 0:
        try:
            piece = file.read(min(left, PIECE))
        except (EOFError, zlib.error, lzma.LZMAError):
            break
        except OSError as error:
            if error.errno is not None:  # the disk, not the data
                raise
            break
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def text(data: bytes) -> str:
    """Return a string field; what is no UTF-8 is replaced."""
    return data.decode("utf-8", errors="replace")
