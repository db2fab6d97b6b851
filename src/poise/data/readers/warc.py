"""WARC files: the text records, as they are in Common Crawl's WET files.

HTML responses are counted and left out on purpose. Turning a page into its text without menus, notices and lists of
links is a craft of its own (trafilatura, resiliparse); a plain tag remover would put that boilerplate, repeated on
every page of a site, into the training data, which is what the cleaning is there to keep out.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from typing import Any, Final

from poise.core.errors import UserError
from poise.data.readers import encoding
from poise.data.readers.document import Document
from poise.data.readers.stream import Damaged, Job, first_line, opened

MAX_RECORD: Final = 64 * 2**20
"""Longest record, in bytes; a longer one is skipped and counted."""

HTML: Final = "HTML page in a WARC (extract its text first, e.g. into WET)"
"""Reason under which HTML responses are counted."""


def read_warc(job: Job) -> Iterator[Document]:
    """Yield the ``conversion`` records, and resources and responses of type ``text/plain``; count all others.

    Raises:
        UserError: the ``warcio`` package is missing.
        Damaged: the file breaks off or is not a WARC; the records before were yielded.
        OSError: the file cannot be opened or read.
    """
    try:
        warcio = importlib.import_module("warcio.archiveiterator")
        failed = importlib.import_module("warcio.exceptions").ArchiveLoadFailed
    except ImportError:
        raise UserError(
            f"'{job.file.path}' needs the warcio package, which is not installed; pip install 'poise[warc]'"
        ) from None
    with opened(job, convert=False) as stream:
        records = warcio.ArchiveIterator(_Counted(stream.reader, job.offset), block_size=2**16)
        number = job.number
        while True:
            try:
                record = next(records, None)
            except (failed, UnicodeDecodeError, ValueError) as error:
                raise Damaged(stream.damage or first_line(error)) from None
            if record is None:
                return
            document = _document(job, record, records, number)
            job.reached(stream.position())
            if stream.damage:
                return
            number += 1
            if document is not None:
                yield document


def _document(job: Job, record: Any, records: Any, number: int) -> Document | None:
    why = _why_not(record)
    raw = b"" if why else record.content_stream().read(MAX_RECORD + 1)
    short = record.raw_stream.limit if not why and len(raw) <= MAX_RECORD else 0
    offset = records.get_record_offset()
    if short:
        raise Damaged(f"record {number} breaks off")
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


class _Counted:
    """A stream that knows its place although it may not be seekable."""

    def __init__(self, reader: io.BufferedReader, offset: int) -> None:
        self._reader, self._at = reader, offset

    def read(self, size: int) -> bytes:
        data = self._reader.read(size)
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at
