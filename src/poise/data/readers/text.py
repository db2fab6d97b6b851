"""Plain text."""

from __future__ import annotations

import io
from collections.abc import Iterator

from poise.data.readers.document import Document
from poise.data.readers.encoding import read, why_not_text
from poise.data.readers.stream import Job, opened

_BOM = b"\xef\xbb\xbf"


def read_text(job: Job) -> Iterator[Document]:
    """Yield a text file as documents of at most ``job.piece`` bytes, cut at blank lines where there are any.

    A file up to that size is one document, and a file that is not text is counted. Of a damaged file the document in
    which it breaks off is left out.

    Raises:
        Damaged: after the last document, if the file is damaged.
        OSError: the file cannot be opened or read.
    """
    with opened(job) as stream:
        number = job.number
        for offset, data in pieces(stream.reader, job.piece, job.offset):
            if stream.damage:
                return
            job.reached(stream.position())
            number += 1
            mark = 3 if offset == 0 and data.startswith(_BOM) else 0
            text = read(data[mark:] if mark else data, stream.named)
            why = why_not_text(data, text, first=offset == 0)
            if why and offset == 0:
                job.tally.skip(why)
                return
            if why:
                job.tally.skip(why.replace("file", "part of a file"))
                continue
            if encoding := stream.encoding or text.encoding:
                job.tally.converted[encoding] += 1
            after = (offset + len(data), number)
            yield job.document(text.text, job.file.origin, offset + mark, text.replaced, after)


def pieces(stream: io.BufferedReader, limit: int, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of pieces of at most ``limit`` bytes; joined they are the rest of the stream."""
    rest = b""
    while True:
        data = rest + stream.read(limit + 1 - len(rest))
        if len(data) <= limit:
            if data:
                yield offset, data
            return
        at = _cut(data, limit)
        yield offset, data[:at]
        offset, rest = offset + at, data[at:]


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
