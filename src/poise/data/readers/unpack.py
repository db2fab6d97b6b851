"""Decompression that goes on behind damage: gzip, bzip2, xz and Zstandard, each one or more members (frames).

After damage the next member is looked for by its first bytes; what has them by chance is not taken, because it does
not decode. Until then, and at the damage itself, the stream is at an end, so nobody joins what does not belong
together; ``go_on`` leads behind it. What comes out depends on the file alone, never on how it is read.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import pyarrow as pa

_BLOCK: Final = 2**16
_HELD: Final = 2**19  # of a member's contents, kept back until they are followed by as much, or by its end
_TRIAL: Final = 2**20  # bytes a member is tried with; more than a block of any of the formats
_ENOUGH: Final = 2**16  # bytes that come out of a member if it is one
_BACK: Final = 2**26  # bytes looked through once more before the place where damage was noticed
_MAGIC: Final = 16  # no magic is longer

_ERRORS: Final = (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, OSError)


class Loss(NamedTuple):
    """What was wrong, and whether it is one member of several (else the file breaks off, or is no such file)."""

    why: str
    member: bool


class Unpacked(io.RawIOBase):
    """The contents of a compressed file; at an end wherever something is lost.

    The last half MiB before damage is not handed out, as wrong bytes are often noticed late (a checksum stands at the
    end of a member). So a small damaged member is left out whole. A file that just breaks off is used up to there.

    Attributes:
        torn: at an end: whether it lies inside a member, of which something was handed out.
    """

    def __init__(self, raw: BinaryIO, form: Form) -> None:
        self._input, self._form = _Input(raw), form
        self._member: _Member | None = None
        self._start = 0
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._ready: deque[bytes] = deque()
        self._lost: list[Loss] = []
        self._used = self._given = self._stopped = self._ended = False
        self.torn = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._stopped:
            self._step()
        size, most = 0, len(buffer)
        while self._ready and size < most:
            data = self._ready.popleft()
            part = data[: most - size]
            buffer[size : size + len(part)] = part
            size += len(part)
            if len(part) < len(data):
                self._ready.appendleft(data[len(part) :])
        return size

    @property
    def lost(self) -> bool:
        """Whether something was lost that was not yet asked for."""
        return bool(self._lost)

    def go_on(self) -> tuple[bool, list[Loss]]:
        """At an end: go on behind it; return whether there is anything, and what was lost."""
        lost, self._lost = self._lost, []
        self._stopped, self.torn = self._ended, False
        return not self._ended, lost

    def _step(self) -> None:
        if self._member is None:
            if not self._input.skip_zeros():
                self._stopped = self._ended = True
                return
            self._start, self._given = self._input.at, False
            self._member = self._form.new(self._input)
        try:
            data = self._member.read()
        except _ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not about the contents
            self._fail((str(error).strip() or type(error).__name__).splitlines()[0])
            return
        if not data:
            self._member = None
        self._held.append(data)
        self._held_bytes += len(data)
        while self._held and (self._member is None or self._held_bytes - len(self._held[0]) >= _HELD):
            self._hand_out()

    def _hand_out(self) -> None:
        data = self._held.popleft()
        self._held_bytes -= len(data)
        if data:
            self._ready.append(data)
            self._used = self._given = True

    def _fail(self, why: str) -> None:
        """Leave the member, and find the next one."""
        at_end = self._input.ended
        found = self._search()
        breaks_off = at_end and not found
        self._lost.append(Loss(why, not breaks_off and (found or self._used)))  # else it is the file
        while breaks_off and self._held:  # all bytes that there are are right
            self._hand_out()
        self._held.clear()
        self._member, self._held_bytes = None, 0
        # Before the first byte there is nothing to keep apart.
        self.torn, self._stopped, self._ended = self._given, self._used or not found, not found

    def _search(self) -> bool:
        self._input.back_to(max(self._start + 1, self._input.at - _BACK))
        data = b""
        while True:
            more = self._input.take(_TRIAL)
            data += more
            for match in self._form.magic.finditer(data):
                at = match.start()
                if more and len(data) - at < _TRIAL:
                    data = data[at:]
                    break
                if self._decodes(data[at : at + _TRIAL]):
                    self._input.push(data[at:])
                    return True
            else:
                if not more:
                    return False
                data = data[-_MAGIC:]

    def _decodes(self, data: bytes) -> bool:
        member, size = self._form.new(_Input(io.BytesIO(data))), 0
        try:
            while size < _ENOUGH and (part := member.read()):
                size += len(part)
        except _ERRORS:
            return False
        return True


class _Input:
    """The compressed bytes, with a way back. ``at`` is the place of the next one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._rest, self.at, self.ended = raw, b"", 0, False

    def some(self) -> bytes:
        """Return the next bytes; none at the end."""
        data = self._rest[:_BLOCK] or self._raw.read(_BLOCK)
        self._rest = self._rest[_BLOCK:]
        self.at += len(data)
        self.ended = not data
        return data

    def take(self, size: int) -> bytes:
        """Return so many bytes; fewer at the end."""
        rest, self._rest = self._rest[:size], self._rest[size:]
        if len(rest) < size:
            rest += self._raw.read(size - len(rest))
            self.ended = len(rest) < size
        self.at += len(rest)
        return rest

    def push(self, data: bytes) -> None:
        """Give bytes back."""
        self._rest = data + self._rest
        self.at -= len(data)

    def back_to(self, at: int) -> None:
        """Go back, if the file can be read again (not every remote one can)."""
        if self._raw.seekable():
            self._raw.seek(at)
            self._rest, self.at = b"", at

    def skip_zeros(self) -> bool:
        """Skip zeros, which are padding between members; return whether anything follows."""
        while data := self.some():
            if data := data.lstrip(b"\0"):
                self.push(data)
                return True
        return False


class _Member(Protocol):
    def read(self) -> bytes:
        """Return the next piece of the contents; nothing at the end."""


class Form(NamedTuple):
    """A format: a reader of one member, and the bytes every member begins with."""

    new: Callable[[_Input], _Member]
    magic: re.Pattern[bytes]


class _Stepwise:
    """A member whose decoder is fed."""

    def __init__(self, data: _Input, decoder: _Zlib | _Other) -> None:
        self._input, self._decoder, self._rest, self._ended = data, decoder, b"", False

    def read(self) -> bytes:
        while not self._ended:
            hungry = not self._rest and self._decoder.hungry
            data = self._input.some() if hungry else self._rest
            if hungry and not data:
                raise EOFError("it breaks off before the end of its compressed data")
            out, self._rest = self._decoder.step(data)
            self._ended = self._decoder.eof
            if self._ended:
                self._input.push(self._rest)
            if out:
                return out
        return b""


class _Zlib:
    hungry = True

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        out = self._inner.decompress(data, _BLOCK)
        return out, self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail


class _Other:
    """bzip2 and xz; these keep the input they have not used yet themselves."""

    def __init__(self, inner: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._inner = inner

    @property
    def hungry(self) -> bool:
        return self._inner.needs_input

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        out = self._inner.decompress(data, _BLOCK)
        return out, self._inner.unused_data if self._inner.eof else b""


class _Frame:
    """A Zstandard frame. Arrow's decompressor also notices one that breaks off."""

    def __init__(self, data: _Input) -> None:
        self._inner = pa.CompressedInputStream(pa.PythonFile(_FrameBytes(data), "r"), "zstd")

    def read(self) -> bytes:
        # Little at a time: what is asked for in the call that meets the damage is lost.
        return bytes(self._inner.read(_BLOCK))


class _FrameBytes(io.RawIOBase):
    """The bytes of one frame; those of a frame that may be skipped are."""

    def __init__(self, data: _Input) -> None:
        self._parts, self._rest = _parts(data), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = part
        out, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(out)] = out
        return len(out)


def _parts(data: _Input) -> Iterator[bytes]:
    """Yield the bytes of a frame as RFC 8878 lays it out: header, blocks, checksum. What is wrong, the decoder says."""
    head = data.take(4)
    if head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        left = int.from_bytes(data.take(4), "little")
        while left > 0 and (part := data.take(min(left, _BLOCK))):
            left -= len(part)
        return
    flags = data.take(1)
    yield head + flags
    if head != b"\x28\xb5\x2f\xfd" or not flags:
        yield data.take(_BLOCK)
        return
    single, size_flag = flags[0] >> 5 & 1, flags[0] >> 6
    yield data.take((1 - single) + (0, 1, 2, 4)[flags[0] & 3] + ((single, 2, 4, 8)[size_flag]))
    last = False
    while not last:
        block = data.take(3)
        value = int.from_bytes(block, "little")
        last, kind = bool(value & 1), value >> 1 & 3
        yield block + data.take(1 if kind == 1 else min(value >> 3, _TRIAL))
        if len(block) < 3 or kind == 3:
            return
    if flags[0] & 4:
        yield data.take(4)


FORMS: Final[dict[str, Form]] = {
    ".gz": Form(lambda data: _Stepwise(data, _Zlib()), re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")),
    ".bz2": Form(lambda data: _Stepwise(data, _Other(bz2.BZ2Decompressor())), re.compile(rb"BZh[1-9]1AY&SY")),
    ".xz": Form(lambda data: _Stepwise(data, _Other(lzma.LZMADecompressor())), re.compile(rb"\xfd7zXZ\x00")),
    ".zst": Form(_Frame, re.compile(rb"\x28\xb5\x2f\xfd")),
}
"""The formats, by the endings of files."""
