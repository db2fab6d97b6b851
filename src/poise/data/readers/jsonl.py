"""JSON lines, and a list of objects in one JSON file."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple

from poise.data.readers import encoding
from poise.data.readers.document import Document, Tally
from poise.data.readers.rows import of_row
from poise.data.readers.stream import COMPRESSED, Damaged, Job, Stream, opened
from poise.data.readers.text import read_text

MAX_LINE: Final = 64 * 2**20
"""Longest line of a JSON-lines file (object of a list), in bytes; a longer one is skipped and counted."""

# Strings with a raw tab or another control character are not JSON by the letter, but what is meant is plain.
_DECODE: Final = json.JSONDecoder(strict=False)
_LIST: Final = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*\{")
_GAP: Final = re.compile("[ \t\r\n\ufeff]*[\\[,]?[ \t\r\n]*")  # what may stand before a value of a list
_CHUNK: Final = 2**18  # of a list, read at once
_REPORT: Final = 2**18  # bytes between two reports of progress
_MARK: Final = "\ufeff"


def read_jsonl(job: Job) -> Iterator[Document]:
    """Yield the text field of every line that is a JSON object and has one; count the others.

    Raises:
        Damaged: the file is damaged, and the job strict.
        OSError: the file cannot be opened or read.
    """
    with opened(job) as stream:
        yield from _rows(job, stream)


def read_json(job: Job) -> Iterator[Document]:
    """Yield the text fields of a JSON file: a list of objects, or JSON lines.

    A plain ``.json`` is taken for records only if its first object has the text field; else it is a text, as in a
    folder of code. A compressed one that is no list is JSON lines (the custom of C4 and Dolma).

    Raises:
        Damaged, OSError: as ``read_jsonl``; a list that breaks off is damaged.
    """
    form = _form(job)
    if form == "list":
        with opened(job) as stream:
            yield from _elements(job, stream)
    else:
        yield from read_text(job) if form == "text" else read_jsonl(job)


def _form(job: Job) -> Literal["list", "lines", "text"]:
    """Look at the beginning of a file, which decides for a resumed reading too."""
    first: Any = None
    listed = False
    with suppress(Damaged), opened(replace(job, offset=0, number=0, tally=Tally(), strict=False)) as stream:
        listed = _LIST.match(stream.reader.peek(encoding.HEAD)) is not None
        if listed:
            first = next(_objects(stream), None)
        else:
            with suppress(json.JSONDecodeError, RecursionError):
                first = _value(encoding.read(stream.reader.readline(MAX_LINE)).text)
    row = first.row if isinstance(first, _Element) else first
    if job.file.suffixes[-1] in COMPRESSED:
        return "list" if listed else "lines"
    if not (isinstance(row, dict) and isinstance(row.get(job.text_field), str)):
        return "text"
    return "list" if listed else "lines"


class _Element(NamedTuple):
    """One value of a list, where it lies, and how its bytes were read."""

    row: Any
    offset: int
    end: int
    replaced: int
    encoding: str | None


def _elements(job: Job, stream: Stream) -> Iterator[Document]:
    for number, element in enumerate(_whole(stream, job.offset), job.number):
        job.reached(stream.position())
        after = (element.end, number + 1)
        document = of_row(job, element.row, f"{job.file.origin}:{number}", element.offset, element.replaced, after)
        if document is not None:
            if other := element.encoding or stream.encoding:
                job.tally.converted[other] += 1
            yield document


def _whole(stream: Stream, offset: int) -> Iterator[_Element]:
    """Yield the values up to the end of the list, or to the first damage: behind it nobody knows how deep one is."""
    try:
        yield from _objects(stream, offset)
    except Damaged:
        if not stream.broken:
            raise
        stream.go_on()


def _objects(stream: Stream, offset: int = 0) -> Iterator[_Element]:
    """Yield the values of a JSON list from ``offset`` on, reading no more than is needed for the next one."""
    # Bytes that are not UTF-8 become lone surrogates, so that a value's very bytes can be had again.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, at, ended = "", 0, False
    while True:
        start = _GAP.match(text, at).end()  # type: ignore[union-attr]
        offset, at = offset + _size(stream, text[at:start]), start
        if text.startswith("]", at):
            return
        try:
            row, end = _DECODE.raw_decode(text, at)
            whole = end < len(text) or ended
        except json.JSONDecodeError:
            whole = False
        except RecursionError:
            raise Damaged(f"a value at byte {offset} is nested too deeply") from None
        if whole:
            raw = text[at:end].encode("utf-8", "surrogateescape")
            after = offset + stream.size(raw)
            yield _element(row, raw, offset, after)
            offset, at = after, end
        elif ended or len(text) - at > MAX_LINE:
            why = "it breaks off or is not JSON" if ended else f"no JSON value of at most {MAX_LINE >> 20} MiB"
            raise Damaged(f"{why} at byte {offset}")
        else:
            data = stream.reader.read(max(_CHUNK, len(text) - at))
            text, at, ended = text[at:] + decoder.decode(data, final=not data), 0, not data


def _element(row: Any, raw: bytes, offset: int, end: int) -> _Element:
    text, replaced, other = encoding.read(raw)
    if replaced or other:
        row = _DECODE.decode(text)
    return _Element(row, offset, end, replaced, other)


def _size(stream: Stream, text: str) -> int:
    return stream.size(text.encode("utf-8", "surrogateescape"))


def _rows(job: Job, stream: Stream) -> Iterator[Document]:
    tally, origin, due = job.tally, job.file.origin, 0
    done, reached, fresh = job.number, job.offset, False
    while True:
        for number, offset, end, line in lines(stream.reader, done, reached, stream.size):
            done, reached = number, end
            # A line at damage may be a part of one; then it is a part of what was lost.
            torn, fresh = fresh or (stream.broken and not line.endswith(b"\n")), False
            if end >= due:
                job.reached(stream.position())
                due = end + _REPORT
            read = _row(line, Tally() if torn else tally)
            if read is None or (torn and not isinstance(read[0], dict)):
                continue
            row, replaced, other = read
            document = of_row(job, row, f"{origin}:{number}", offset, replaced, (end, number))
            if document is not None:
                if other := other or stream.encoding:
                    tally.converted[other] += 1
                yield document
        if not stream.go_on():
            return
        fresh = True


def _row(line: bytes, tally: Tally) -> tuple[Any, int, str | None] | None:
    """Return the JSON value of a line, the bytes replaced and the encoding; None for a blank or (counted) bad line."""
    if len(line) > MAX_LINE:
        tally.skip(f"line over {MAX_LINE >> 20} MiB")
        return None
    read = encoding.read(line)
    text, replaced, other = read
    if text.isspace():
        return None
    if replaced and encoding.is_unknown(line, read):
        tally.skip("line in an unknown encoding")
        return None
    try:
        return _value(text), replaced, other
    except (json.JSONDecodeError, RecursionError):
        tally.skip("line that is not JSON")
        return None


def _value(text: str) -> Any:
    """Return the JSON value that a line is."""
    if text.startswith("{"):  # nearly always; decode() would look for blanks at both ends
        row, end = _DECODE.raw_decode(text)
        if end == len(text) or text[end:].isspace():
            return row
    return _DECODE.decode(text.removeprefix(_MARK))


def lines(
    stream: io.BufferedReader, number: int = 0, offset: int = 0, size: Callable[[bytes], int] = len
) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (number from 1, offset, end, line); of a line over the limit only its beginning, which is over it too.

    ``size`` says what bytes count in the offsets.
    """
    while line := stream.readline(MAX_LINE + 1):
        number, end = number + 1, offset + size(line)
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            rest = stream.readline(2**20)
            end += size(rest)
            if not rest or rest.endswith(b"\n"):
                break
        yield number, offset, end, line
        offset = end
