"""Opening a file for reading: local or remote, decompressed, UTF-16 and UTF-32 turned into UTF-8.

Where something of a compressed file is lost, its reader is at an end; ``Stream.go_on`` counts the loss and leads behind
it. So what came before is never lost, and never joined to what comes after.
"""

from __future__ import annotations

import codecs
import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

from poise.core.errors import UserError
from poise.data.readers import encoding
from poise.data.readers.document import Document, Place, Tally
from poise.data.readers.unpack import FORMS, Unpacked

Kind = Literal["text", "jsonl", "json", "parquet", "arrow", "warc", "topics"]
"""How a file is read; ``json`` is told from text by its beginning."""

COMPRESSED: Final = frozenset(FORMS)

_BUFFER: Final = 2**18
_BLOCK: Final = 2**16
_CONTINUING: Final = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character
_FOUR: Final = bytes(range(0xF0, 0xF5))  # those that begin one of four bytes, which is two units of UTF-16


class Damaged(Exception):  # noqa: N818 - a fact about a file, not an error of ours
    """A file breaks off or cannot be decoded, and nothing more can be read of it."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: the file, or its address (``s3://...``).
        origin: its path relative to the source's root, with forward slashes.
        kind: how it is read.
        size: bytes, compressed as it is.
        mtime_ns: time of its last change; 0 for a remote file.
        tag: what else changes with its contents, of a remote file.
    """

    path: Path | str
    origin: str
    kind: Kind
    size: int
    mtime_ns: int
    tag: str = ""

    @property
    def suffixes(self) -> list[str]:
        """The endings of its name, in lower case."""
        return [suffix.lower() for suffix in Path(self.origin).suffixes]


@dataclass(frozen=True, slots=True)
class Job:
    """The reading of one file.

    Attributes:
        file: which file.
        index: its number in the source.
        source: the source's name, for the documents.
        text_field: field or column of the text.
        piece: longest document made of plain text, in bytes.
        tally: counts.
        base: bytes of the source in the files before.
        offset: bytes of the file that are done already.
        number: lines, rows, records or pieces that are done already.
        strict: whether damage is an error.
    """

    file: SourceFile
    index: int
    source: str
    text_field: str
    piece: int
    tally: Tally
    base: int = 0
    offset: int = 0
    number: int = 0
    strict: bool = False

    def document(
        self,
        text: str,
        origin: str,
        offset: int,
        replaced: int,
        after: tuple[int, int],
        id: str | None = None,
        url: str | None = None,
    ) -> Document:
        """Return a document of this file; ``after`` is (offset, number) of the place after it."""
        return Document(text, self.source, origin, offset, replaced, id, url, Place(self.index, *after))

    def damaged(self, why: str, member: bool = True) -> None:
        """Count damage: a member (row group, batch, record) that is left out, or a file that breaks off.

        Raises:
            Damaged: the job is strict.
        """
        if self.strict:
            raise Damaged(why)
        if member:
            self.tally.skip("damaged member")
        if self.tally.damaged[-1:] != [self.file.origin]:
            self.tally.damaged.append(self.file.origin)
            self.tally.skip("damaged file")

    def reached(self, position: int) -> None:
        """Note that the file has been read up to ``position``."""
        self.tally.reached(self.base + position)


@dataclass(slots=True)
class Stream:
    """An open file.

    Attributes:
        reader: its contents, decompressed and (unless asked otherwise) in UTF-8 where they were UTF-16 or UTF-32.
        encoding: the encoding it was converted from, if it was.
        named: the encoding the file names in its first lines, if it is an older one.
    """

    reader: io.BufferedReader
    encoding: str | None
    named: str | None
    _job: Job
    _raw: BinaryIO
    _unpacked: Unpacked | None

    @property
    def broken(self) -> bool:
        """Whether something has been lost since the last ``go_on``: the reader ends there."""
        return self._unpacked is not None and self._unpacked.lost

    @property
    def torn(self) -> bool:
        """At an end of the reader: whether what came last breaks off."""
        return self._unpacked is not None and self._unpacked.torn

    def go_on(self) -> bool:
        """At an end of the reader: count what was lost there, and say whether more can be read now.

        Raises:
            Damaged: something was lost, and the job is strict.
        """
        if self._unpacked is None:
            return False
        more, lost = self._unpacked.go_on()
        for loss in lost:
            self._job.damaged(loss.why, loss.member)
        return more

    def position(self) -> int:
        """Return how far the file has been read, in its own bytes."""
        return self._raw.tell()

    def size(self, data: bytes) -> int:
        """Return how many bytes of the (uncompressed) file became ``data`` of the reader.

        What is invalid in UTF-16 or UTF-32 became one U+FFFD for each of its units, so this is exact.
        """
        if self.encoding is None:
            return len(data)
        characters = len(data.translate(None, _CONTINUING))
        if self.encoding.startswith("utf-32"):
            return 4 * characters
        return 2 * (characters + len(data) - len(data.translate(None, _FOUR)))


@contextmanager
def opened(job: Job, convert: bool = True) -> Iterator[Stream]:
    """Open the file of a job, at the job's offset; with ``convert`` UTF-16 and UTF-32 become UTF-8.

    Raises:
        OSError: it cannot be opened or read.
    """
    with raw_file(job.file) as raw:
        form = FORMS.get(job.file.suffixes[-1]) if job.file.suffixes else None
        unpacked = Unpacked(raw, form) if form else None
        reader = cast(io.BufferedReader, io.BufferedReader(unpacked, _BUFFER) if unpacked else raw)
        head = reader.peek(encoding.HEAD)[: encoding.HEAD] if convert else b""
        if job.offset:
            _skip(reader, unpacked, job.offset)
        name = encoding.wide(head)
        if name:
            reader = cast(io.BufferedReader, io.BufferedReader(_Converted(reader, name), _BUFFER))
        yield Stream(reader, name, encoding.named(head), job, raw, unpacked)


def _skip(reader: io.BufferedReader, unpacked: Unpacked | None, offset: int) -> None:
    """Go to a byte of the contents: at once if they lie as they are in the file, else by reading.

    Losses on the way were counted before; one that lies just at ``offset`` was not.
    """
    if unpacked is None:
        reader.seek(offset)
        return
    while offset > 0:
        data = reader.read(min(offset, 2**20))
        offset -= len(data)
        if not data and not unpacked.go_on()[0]:
            return


@contextmanager
def raw_file(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a file as it is, buffered."""
    if isinstance(file.path, Path):
        with file.path.open("rb", buffering=_BUFFER) as raw:
            yield raw
        return
    with io.BufferedReader(_Remote(file.path), _BUFFER) as raw:
        yield cast(BinaryIO, raw)


def remote_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it.

    Raises:
        UserError: fsspec or the package for this kind of address is missing, or there is no such kind.
    """
    kind = url.partition("://")[0]
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError:
        raise UserError(f"'{url}' needs fsspec, which is not installed; pip install 'poise[cloud]'") from None
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"'{url}' cannot be opened: {first_line(error)}; pip install 'poise[cloud]'") from None
    except Exception as error:  # each kind of store raises its own: no credentials, no such protocol
        raise UserError(
            f"'{url}' cannot be opened: {first_line(error)}; check '{kind}://' and the credentials"
        ) from None
    return found


def first_line(error: BaseException) -> str:
    """Return an exception's message in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Remote(io.RawIOBase):
    """A remote file, read ahead in blocks; whatever goes wrong is an error of one line, never an end of the file."""

    def __init__(self, url: str) -> None:
        self._url = url
        system, path = remote_filesystem(url)
        self._file = self._try(lambda: system.open(path, "rb", block_size=2**22, cache_type="readahead"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._try(lambda: self._file.seek(offset, whence)))

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # stores and networks raise many kinds
            raise UserError(f"cannot read '{self._url}': {first_line(error)}; run it again to go on") from None


class _Converted(io.RawIOBase):
    """UTF-16 or UTF-32 as UTF-8; a byte-order mark stays one."""

    def __init__(self, reader: io.BufferedReader, name: str) -> None:
        self._reader = reader
        self._decoder = codecs.getincrementaldecoder(name)("replace")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._reader.read(_BLOCK)
            text = self._decoder.decode(data, final=not data)
            self._rest = text.encode("utf-8", "replace")
            if not data:
                break
        out, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(out)] = out
        return len(out)
