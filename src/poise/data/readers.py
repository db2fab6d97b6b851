"""Reading documents out of files, one at a time: text, JSON lines and Parquet, compressed or not.

Memory stays bounded by one document (text is read in pieces, a JSON line has a limit, Parquet comes in small
batches), so the size of a corpus does not matter. What cannot be used is counted in a ``Tally``, never
silently dropped and never fatal; a file that breaks off in the middle is an error.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from poise.core.errors import UserError

MAX_LINE: Final = 64 * 2**20
"""Longest line of a JSON-lines file, in bytes; a longer one is skipped and counted."""

_HEAD: Final = 64 * 2**10  # bytes looked at to tell text from other files
_BINARY_SHARE: Final = 0.30
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_CODECS: Final = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        text: its text, without lone surrogates, so that it has a UTF-8 form.
        source: short name of the source it came from.
        origin: path relative to the source's root; ``path:line`` (from 1) in JSON lines, ``path:row``
            (from 0) in Parquet.
        offset: byte at which it begins in the (uncompressed) file; 0 in Parquet.
        replaced_bytes: bytes that were not valid UTF-8 and became U+FFFD.
    """

    text: str
    source: str
    origin: str
    offset: int
    replaced_bytes: int


@dataclass(slots=True)
class Tally:
    """What a reading pass has met so far.

    Attributes:
        skipped: how many files, rows or lines were left out, by reason.
        done: bytes of the source's files read, compressed as they are.
        fields: the fields of the first row that had no usable text field.
        on_read: called whenever ``done`` has grown.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    done: int = 0
    fields: tuple[str, ...] = ()
    on_read: Callable[[int], None] = lambda done: None

    def skip(self, reason: str) -> None:
        """Count one thing left out."""
        self.skipped[reason] += 1

    def missing(self, text_field: str, fields: tuple[str, ...]) -> None:
        """Count a row (or a Parquet file) without the text field, and keep its fields for the message."""
        self.skip(f"no text field '{text_field}'")
        self.fields = self.fields or fields

    def reached(self, done: int) -> None:
        """Note that ``done`` bytes of the source have been read."""
        self.done = done
        self.on_read(done)


def decode(raw: bytes) -> tuple[str, int]:
    r"""Return UTF-8 bytes as text, and how many bytes were invalid and became U+FFFD.

    >>> decode(b"caf\xc3\xa9 \xff\xfe!")
    ('café ��!', 2)
    """
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
    # A genuine U+FFFD in the input is EF BF BD and is not a replacement.
    marks = text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
    return text, len(raw) - (len(text.encode("utf-8")) - 3 * marks)


def clean(text: str) -> tuple[str, int]:
    r"""Replace lone surrogates (JSON can hold them, UTF-8 cannot); return the text and the bytes replaced.

    >>> clean("a\ud800")
    ('a�', 3)
    """
    if text.isascii():
        return text, 0
    text, count = _LONE_SURROGATE.subn("\ufffd", text)
    return text, 3 * count


def read_text(path: Path, origin: str, source: str, piece: int, tally: Tally, base: int = 0) -> Iterator[Document]:
    """Yield a text file as documents of at most ``piece`` bytes, cut at blank lines where there are any.

    Args:
        path: the file; ``.gz`` and ``.zst`` are decompressed.
        origin: what to write into the documents.
        source: what to write into the documents.
        piece: longest document, in bytes; a file up to this size is one document.
        tally: counts binary and empty files.
        base: bytes of the source read before this file, for progress.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    with _opened(path) as (raw, stream):
        for offset, data in _pieces(stream, piece):
            tally.reached(base + raw.tell())
            reason = _not_text(data[:_HEAD])
            if reason and offset == 0:
                tally.skip(f"{reason} file")
                return
            if reason:
                tally.skip(f"{reason} part of a file")
                continue
            mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0  # a byte-order mark
            text, replaced = decode(data[mark:])
            yield Document(text, source, origin, offset + mark, replaced)


def read_jsonl(
    path: Path, origin: str, source: str, text_field: str, tally: Tally, base: int = 0
) -> Iterator[Document]:
    """Yield the text field of every line that is a JSON object and has one; count the others.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    with _opened(path) as (raw, stream):
        for number, offset, line in _lines(stream):
            tally.reached(base + raw.tell())
            if len(line) > MAX_LINE:
                tally.skip(f"line over {MAX_LINE >> 20} MiB")
                continue
            text, replaced = decode(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text.removeprefix("\ufeff"))
            except (json.JSONDecodeError, RecursionError):
                tally.skip("line that is not JSON")
                continue
            value = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(value, str):
                tally.missing(text_field, tuple(row) if isinstance(row, dict) else ())
                continue
            value, surrogates = clean(value)
            yield Document(value, source, f"{origin}:{number}", offset, replaced + surrogates)


def read_parquet(
    path: Path, origin: str, source: str, text_field: str, tally: Tally, base: int = 0
) -> Iterator[Document]:
    """Yield the text column of a Parquet file row by row; a file without that column is counted.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    with _readable(path), pq.ParquetFile(path, memory_map=True, pre_buffer=False) as table:
        schema, rows, size = table.schema_arrow, table.metadata.num_rows, path.stat().st_size
        kind = schema.field(text_field).type if text_field in schema.names else pa.null()
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            tally.missing(text_field, tuple(schema.names))
            return
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            # As bytes, because Parquet writers do not always check that strings are UTF-8.
            for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()):
                data = value.as_py()
                text, replaced = decode(data) if data is not None else ("", 0)
                yield Document(text, source, f"{origin}:{row}", 0, replaced)
                row += 1
            tally.reached(base + size * row // max(1, rows))


def _not_text(head: bytes) -> str:
    """Return why ``head`` is not UTF-8 text, or an empty string."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 (convert it to UTF-8)"
    if b"\0" in head or decode(head)[1] > _BINARY_SHARE * len(head):
        return "binary"
    return ""


def _pieces(stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of pieces of at most ``limit`` bytes; joined they are the whole stream."""
    offset, rest = 0, b""
    while True:
        data = rest + stream.read(limit + 1 - len(rest))
        if len(data) <= limit:
            if data:
                yield offset, data
            return
        cut = _cut(data, limit)
        yield offset, data[:cut]
        offset, rest = offset + cut, data[cut:]


def _cut(data: bytes, limit: int) -> int:
    """Return where to cut: after the last blank line, line or word in the second half of ``limit``."""
    for mark in (b"\n\n", b"\n", b" "):
        at = data.rfind(mark, limit // 2, limit)
        if at >= 0:
            return at + len(mark)
    cut = limit
    while cut > limit - 4 and data[cut] & 0xC0 == 0x80:  # never inside a character
        cut -= 1
    return cut


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, offset, line); of a line over the limit only its beginning."""
    number = offset = 0
    while line := stream.readline(MAX_LINE + 1):
        number, length = number + 1, len(line)
        while length > MAX_LINE and not line.endswith(b"\n"):
            rest = stream.readline(2**20)
            length += len(rest)
            if not rest or rest.endswith(b"\n"):
                break
        yield number, offset, line
        offset += length


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, io.BufferedReader]]:
    """Open a file for reading, decompressed; yield the file as it is (for its position) and the contents."""
    with _readable(path), path.open("rb") as raw:
        codec = _CODECS.get(path.suffix.lower())
        if codec is None:
            yield raw, raw
            return
        # Arrow's decompressor also notices a stream that breaks off, which most Python ones do not.
        with pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec) as inner:
            yield raw, io.BufferedReader(cast(Any, inner), 2**17)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' is damaged: {_first_line(error)}; fetch it again or remove it") from None
    except OSError as error:
        if error.errno is None:  # Arrow's own, about the contents
            raise UserError(f"'{path}' is damaged: {_first_line(error)}; fetch it again or remove it") from None
        raise UserError(f"cannot read '{path}': {error.strerror}; check its permissions") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
