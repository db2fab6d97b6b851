"""WARC files: the text records, as they are in Common Crawl's WET files.

HTML responses are counted and left out on purpose. Turning a page into its text without menus, notices and lists of
links is a craft of its own (trafilatura, resiliparse); a plain tag remover would put that boilerplate, repeated on
every page of a site, into the training data, which is what the cleaning is there to keep out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from typing import Any, Final

from poise.core.errors import UserError
from poise.data.readers import encoding
from poise.data.readers.document import Document
from poise.data.readers.stream import Damaged, Job, first_line, opened

MAX_RECORD: Final = 64 * 2**20
"""Longest record, in bytes; a longer one is skipped and counted."""

_BLOCK: Final = 2**16
_BEGIN: Final = b"WARC/"
_RECORD: Final = re.compile(rb"\n\r?\n(WARC/[01]\.[0-9]+\r?\nWARC-|WARC/[01]\.[0-9]+\r?\nContent-)")
_HEAD: Final = 32  # bytes that the beginning of a record has at most

HTML: Final = "HTML page in a WARC (extract its text first, e.g. into WET)"
"""Reason under which HTML responses are counted."""


def read_warc(job: Job) -> Iterator[Document]:
    """Yield the ``conversion`` records, and resources and responses of type ``text/plain``; count all others.

    Raises:
        UserError: the ``warcio`` package is missing.
        Damaged: a record is damaged, and the job strict.
        OSError: the file cannot be opened or read.
    """
    try:
        warcio = importlib.import_module("warcio.archiveiterator")
        failed = importlib.import_module("warcio.exceptions").ArchiveLoadFailed
        unreadable = importlib.import_module("warcio.statusandheaders").StatusAndHeadersParserException
    except ImportError:
        raise UserError(
            f"'{job.file.path}' needs the warcio package, which is not installed; pip install 'poise[warc]'"
        ) from None
    with opened(job, convert=False) as stream:
        blocks, number = _Blocks(stream.reader, job.offset), job.number
        while True:
            records = warcio.ArchiveIterator(blocks, block_size=_BLOCK)
            why = ""
            while not why:
                begin, wrong = records.offset, records.err_count
                try:
                    with contextlib.redirect_stderr(io.StringIO()):  # warcio prints what it finds, with the text
                        record = next(records, None)
                        if record is None:
                            break
                        document = _document(job, record, records, number)
                    if records.err_count > wrong:  # what follows a record tells whether its length was right
                        document = None
                        job.damaged(f"record {number} is longer than it says")
                except Damaged as error:  # the record breaks off
                    why = str(error)
                except (failed, unreadable, UnicodeDecodeError, ValueError) as error:
                    why = first_line(error)
                else:
                    job.reached(stream.position())
                    number += 1
                    if document is not None:
                        yield document
            found = bool(why) and blocks.find_record(begin + 1)
            if why and (found or not stream.broken):
                job.damaged(why, member=found)
            if not found:
                if not stream.go_on():
                    return
                if not blocks.at_record():
                    blocks.find_record(blocks.tell())


def _document(job: Job, record: Any, records: Any, number: int) -> Document | None:
    length = record.rec_headers.get_header("Content-Length")
    if not hasattr(record.raw_stream, "limit") or not (length or "").strip().isdecimal():
        raise Damaged(f"record {number} does not say how long it is")
    why = _why_not(record)
    raw = b"" if why else record.content_stream().read(MAX_RECORD + 1)
    short = record.raw_stream.limit if not why and len(raw) <= MAX_RECORD else 0
    offset = records.get_record_offset()
    if short:
        raise Damaged(f"record {number} breaks off")
    if _RECORD.search(raw):
        raise Damaged(f"record {number} says that it is longer than it is")
    if len(raw) > MAX_RECORD:
        why = f"WARC record over {MAX_RECORD >> 20} MiB"
    if why:
        job.tally.skip(why)
        return None
    headers = record.rec_headers
    text = encoding.read(raw)
    if text.encoding:
        job.tally.converted[text.encoding] += 1
    origin, after = f"{job.file.origin}:{number}", (records.offset, number + 1)
    id, url = headers.get_header("WARC-Record-ID"), headers.get_header("WARC-Target-URI")
    return job.document(text.text, origin, offset, text.replaced, after, id, url)


def _why_not(record: Any) -> str:
    """Return why a record is no document, or an empty string."""
    if record.rec_type == "conversion":
        return ""
    if record.rec_type not in ("response", "resource"):
        return "WARC record without text"
    headers = record.http_headers if record.rec_type == "response" and record.http_headers else record.rec_headers
    kind = (headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if kind == "text/plain":
        return ""
    return HTML if kind in ("text/html", "application/xhtml+xml") else "WARC record without text"


class _Blocks:
    """A stream that knows its place although it may not be seekable, and can look for the next record."""

    def __init__(self, reader: io.BufferedReader, offset: int) -> None:
        self._reader, self._at = reader, offset
        self._before = self._last = self._rest = b""  # the last two blocks read, and what is to be read again

    def read(self, size: int) -> bytes:
        data, self._rest = self._rest[:size], self._rest[size:]
        data = data or self._reader.read(size)
        self._at += len(data)
        self._before, self._last = self._last, data
        return data

    def tell(self) -> int:
        return self._at

    def at_record(self) -> bool:
        """Say whether a record begins here."""
        return self._reader.peek(len(_BEGIN)).startswith(_BEGIN)

    def find_record(self, offset: int) -> bool:
        """Go to the first record from ``offset`` on, or from 64 KiB back; say whether there is one."""
        data = self._before + self._last
        begin = self._at - len(data)
        data = data[max(0, offset - 1 - begin) :] + self._rest
        end, self._rest = self._at + len(self._rest), b""
        while (match := _RECORD.search(data)) is None:
            more = self._reader.read(_BLOCK)
            if not more:
                self._at, self._before, self._last = end, b"", b""
                return False
            data, end = data[-_HEAD:] + more, end + len(more)
        self._rest = data[match.start(1) :]
        self._at, self._before, self._last = end - len(self._rest), b"", b""
        return True
