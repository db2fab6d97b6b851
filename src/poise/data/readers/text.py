"""Plain text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from poise.data.readers.document import Document
from poise.data.readers.encoding import read, why_not_text
from poise.data.readers.stream import Job, opened

_BOM = b"\xef\xbb\xbf"


def read_text(job: Job) -> Iterator[Document]:
    """Yield a text file as documents of at most ``job.piece`` bytes, cut at blank lines where there are any.

    A file up to that size is one document, and a file that is not text is counted. Of a damaged file the document in
    which it breaks off is left out.

    Raises:
        Damaged: the file is damaged, and the job strict.
        OSError: the file cannot be opened or read.
    """
    with opened(job) as stream:
        number, after = job.number, job.offset
        while True:
            for offset, data, last in pieces(stream.reader, job.piece, after, stream.size):
                after = offset + stream.size(data)
                if last and stream.torn:
                    continue
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
                begin = offset + stream.size(data[:mark])
                yield job.document(text.text, job.file.origin, begin, text.replaced, (after, number))
            if not stream.go_on():
                return


def pieces(
    stream: io.BufferedReader, limit: int, offset: int = 0, size: Callable[[bytes], int] = len
) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (offset, bytes, whether it is the last) of pieces of at most ``limit`` bytes; joined they are the rest of
    the stream. ``size`` says what bytes count in the offset."""
    rest = b""
    while True:
        data = rest + stream.read(limit + 1 - len(rest))
        if len(data) <= limit:
            if data:
                yield offset, data, True
            return
        at = _cut(data, limit)
        yield offset, data[:at], False
        offset, rest = offset + size(data[:at]), data[at:]


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
