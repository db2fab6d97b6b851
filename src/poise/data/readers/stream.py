"""Opening a file for reading: local or remote, decompressed, UTF-16 and UTF-32 turned into UTF-8.

A stream that breaks off or is damaged ends there as if it were the end of the file, and says so in ``damage``: what
came before is not lost.
"""

from __future__ import annotations

import bz2
import codecs
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

import pyarrow as pa

from poise.core.errors import UserError
from poise.data.readers import encoding
from poise.data.readers.document import Document, Place, Tally

Kind = Literal["text", "jsonl", "json", "parquet", "arrow", "warc", "topics"]
"""How a file is read; ``json`` is told from text by its beginning."""

COMPRESSED: Final = frozenset({".gz", ".zst", ".bz2", ".xz"})

_BUFFER: Final = 2**18
_BLOCK: Final = 2**16


class Damaged(Exception):  # noqa: N818 - a fact about a file, not an error of ours
    """A file breaks off or cannot be decoded."""


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
    _raw: BinaryIO
    _unpacked: _Unpacked | None

    @property
    def damage(self) -> str:
        """What is wrong with the file as far as it has been read; empty if nothing is."""
        return self._unpacked.damage if self._unpacked else ""

    def position(self) -> int:
        """Return how far the file has been read, in its own bytes."""
        return self._raw.tell()

    def skip_to(self, offset: int) -> None:
        """Go to a byte of the contents: at once if they lie as they are in the file, else by reading."""
        if self._unpacked is None and self.encoding is None:
            self.reader.seek(offset)
            return
        while offset > 0 and (data := self.reader.read(min(offset, 2**20))):
            offset -= len(data)


@contextmanager
def opened(job: Job, convert: bool = True) -> Iterator[Stream]:
    """Open the file of a job, at the job's offset; with ``convert`` UTF-16 and UTF-32 become UTF-8.

    Raises:
        Damaged: at the end, if the file was damaged.
        OSError: it cannot be opened or read.
    """
    with raw_file(job.file) as raw:
        unpacked = _unpacked(job.file, raw)
        reader = cast(io.BufferedReader, io.BufferedReader(unpacked, _BUFFER) if unpacked else raw)
        head = reader.peek(encoding.HEAD)[: encoding.HEAD] if convert else b""
        name = encoding.wide(head)
        if name:
            reader = cast(io.BufferedReader, io.BufferedReader(_Converted(reader, name), _BUFFER))
        stream = Stream(reader, name, encoding.named(head), raw, unpacked)
        if job.offset:
            stream.skip_to(job.offset)
        yield stream
        if stream.damage:
            raise Damaged(stream.damage)


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


class _Unpacked(io.RawIOBase):
    """The contents of a compressed file, up to its end or the first damage."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.damage = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.damage:
            return 0
        try:
            data = self._some(len(buffer))
        except (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not about the contents
            self.damage, data = first_line(error), b""
        buffer[: len(data)] = data
        return len(data)

    def _some(self, most: int) -> bytes:
        raise NotImplementedError


class _Zstd(_Unpacked):
    """Arrow's decompressor also notices a stream that breaks off."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(raw)
        self._inner = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")

    def _some(self, most: int) -> bytes:
        # Little at a time: what is asked for in the call that meets the damage is lost.
        return bytes(self._inner.read(min(most, _BLOCK)))


class _Members(_Unpacked):
    """gzip, bzip2 and xz: one or more compressed members, one after the other."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        super().__init__(raw)
        self._new = new
        self._member: Any = None
        self._rest = b""

    def _some(self, most: int) -> bytes:
        while True:
            if self._member is None:
                self._rest = self._beginning()
                if not self._rest:
                    return b""
                self._member = self._new()
            hungry = not self._rest and self._member.hungry
            data = self._raw.read(_BLOCK) if hungry else self._rest
            if hungry and not data:
                raise EOFError("it breaks off before the end of its compressed data")
            out, self._rest = self._member.step(data, most)
            if self._member.eof:
                self._member = None
            if out:
                return cast(bytes, out)

    def _beginning(self) -> bytes:
        """Return the first bytes of the next member; none at the end. Zeros between members are padding."""
        data = self._rest.lstrip(b"\0")
        while not data and (more := self._raw.read(_BLOCK)):
            data = more.lstrip(b"\0")
        return data


class _Zlib:
    """One gzip member."""

    hungry = True

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def step(self, data: bytes, most: int) -> tuple[bytes, bytes]:
        out = self._inner.decompress(data, most)
        return out, self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail


class _Other:
    """One bzip2 or xz member; these keep the input they have not used yet themselves."""

    def __init__(self, inner: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._inner = inner

    @property
    def hungry(self) -> bool:
        return self._inner.needs_input

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def step(self, data: bytes, most: int) -> tuple[bytes, bytes]:
        out = self._inner.decompress(data, most)
        return out, self._inner.unused_data if self._inner.eof else b""


def _unpacked(file: SourceFile, raw: BinaryIO) -> _Unpacked | None:
    suffix = file.suffixes[-1] if file.suffixes else ""
    if suffix == ".zst":
        return _Zstd(raw)
    if suffix == ".gz":
        return _Members(raw, _Zlib)
    if suffix == ".bz2":
        return _Members(raw, lambda: _Other(bz2.BZ2Decompressor()))
    if suffix == ".xz":
        return _Members(raw, lambda: _Other(lzma.LZMADecompressor()))
    return None


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
