"""Where text comes from: files, folders, remote folders, the Python standard library, a Hugging Face data set.

``resolve`` lists a source without reading it, ``resolve_all`` several; ``documents`` reads one, always in the same
order. Nothing here keeps more than one document in memory.

Every document carries its ``place``: ``documents(source, field, tally, start=document.place)`` yields exactly what
comes after it. With ``Tally.of(state)``, where ``state`` is the ``tally.state()`` taken when the document was handed
out (or after the last one), the counts go on as well.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pyarrow as pa

from poise.core.errors import UserError, nearest
from poise.data.listing import TOPICS, UNKNOWN_SIZE, list_file, list_folder, list_remote, list_stdlib
from poise.data.readers import Document, Place, Tally, clean, read_arrow, read_json, read_jsonl, read_parquet, read_text
from poise.data.readers.encoding import repair as repaired
from poise.data.readers.encoding import tidy
from poise.data.readers.hub import read_hub
from poise.data.readers.stream import Damaged, Job, Kind, SourceFile, first_line
from poise.data.readers.warc import read_warc

__all__ = ["STDLIB", "Kind", "Place", "Source", "SourceFile", "documents", "resolve", "resolve_all"]

STDLIB: Final = "stdlib"
"""Name of the source that is on every machine: the Python standard library's own sources."""

_MAX_PIECE: Final = 2**20
_MIN_PIECE: Final = 2**12
_PIECES: Final = 64
_NAMED: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """A listed source.

    Attributes:
        name: short name, e.g. the folder's; it is written beside every document.
        description: what it is, for people.
        files: its files in reading order; empty for a Hugging Face data set.
        hub: (data set, split) of a Hugging Face data set.
        skipped: what the listing left out, by reason.
    """

    name: str
    description: str
    files: tuple[SourceFile, ...] = ()
    hub: tuple[str, str] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int | None:
        """Bytes of all files as they are on disk; None where that cannot be known beforehand."""
        sizes = [file.size for file in self.files]
        return None if self.hub or UNKNOWN_SIZE in sizes else sum(sizes)

    @property
    def piece(self) -> int:
        """Longest document made of plain text, in bytes.

        At most 1 MiB, and at most a 64th of all plain text but not under 4 KiB: a corpus of one or two
        files has documents enough for a held-out part of about the size asked for.
        """
        text = sum(file.size for file in self.files if file.kind in ("text", "json"))
        return min(_MAX_PIECE, max(_MIN_PIECE, text // _PIECES))

    def fingerprint(self) -> str:
        """Return a hash of the listing (names, sizes, times of change): equal when nothing has changed."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.name, self.hub)).encode())
        for file in self.files:
            facts = (file.origin, file.kind, file.size, file.mtime_ns, file.tag)
            digest.update(repr(facts).encode("utf-8", "replace"))
        return digest.hexdigest()


def resolve(source: str) -> Source:
    """List a source: ``stdlib``, ``hf:owner/name[:split]``, a file, a folder, or an address like ``s3://...``.

    In a folder, hidden files and folders (a leading dot), links to folders and folders that hold prepared
    data are left out; everything else is listed, sorted by path.

    Raises:
        UserError: there is no such source, or it cannot be listed.
    """
    if not source.strip():
        raise UserError(f"the name of a source is empty; give a file, a folder, hf:owner/name or {STDLIB}")
    if source == STDLIB:
        return _stdlib(Path(sysconfig.get_path("stdlib")))
    if "://" in source:
        name = source.partition("?")[0].rstrip("/").rpartition("/")[2]
        return Source(name or "root", source, tuple(list_remote(source)))
    if source.startswith("hf:"):
        return _hub(source)
    path = Path(source).expanduser()
    skipped: Counter[str] = Counter()
    try:
        if path.is_dir():
            files = list_folder(path, skipped)
        elif path.exists():
            files = [list_file(path)]
        else:
            near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            hint = near or f"; give a file, a folder, hf:owner/name or {STDLIB}"
            raise UserError(f"no file or folder '{source}'{hint}")
    except OSError as error:
        raise UserError(f"cannot read '{source}': {error.strerror}; check its permissions") from None
    path = path.absolute()
    name = Path(os.path.realpath(path)).name.encode("utf-8", "replace").decode()  # a file name need not be UTF-8
    return Source(name or "root", str(path), tuple(files), None, dict(skipped))


def resolve_all(sources: Sequence[str]) -> tuple[Source, ...]:
    """List several sources, each ``NAME=SOURCE`` or what ``resolve`` takes; a name met again gets ``-2``, ``-3``, ...

    Raises:
        UserError: no source, the same place twice, or as ``resolve``.
    """
    if not sources:
        raise UserError(f"no source of text; give a file, a folder, hf:owner/name or {STDLIB}")
    found: list[Source] = []
    places: dict[str, str] = {}
    names: set[str] = set()
    for text in sources:
        match = _NAMED.fullmatch(text)
        name, place = match.groups() if match and not Path(text).exists() else (None, text)
        key = _place(place)
        if key in places:
            raise UserError(
                f"'{text}' is the same place as '{places[key]}'; give it once (mix weights repeat a source)"
            )
        places[key] = text
        source = resolve(place)
        # '=' stands between name and weight wherever a source is named.
        wanted = (name or source.name).replace("=", "-")
        unique, number = wanted, 1
        while unique in names:
            number += 1
            unique = f"{wanted}-{number}"
        names.add(unique)
        found.append(replace(source, name=unique))
    return tuple(found)


def documents(
    source: Source,
    text_field: str,
    tally: Tally,
    *,
    start: Place | None = None,
    strict: bool = False,
    repair: bool = False,
) -> Iterator[Document]:
    """Yield the documents of a source in reading order; empty ones are counted and left out.

    NULs and control characters are removed, CR LF becomes LF; ``tally`` counts that, and what was skipped or damaged.

    Args:
        source: what to read.
        text_field: field or column of records that holds the text.
        tally: counts.
        start: the ``place`` of a document; only what follows it is read.
        strict: a damaged, vanished or unreadable file is an error; else what can be read of it is used, and the file
            is counted (a damaged one by name).
        repair: turn UTF-8 that was read as cp1252 back where that is nearly certain (``encoding.repair``).

    Raises:
        UserError: with ``strict`` as above; in any case if a source's only file is gone or unreadable, if a disk, a
            network or a remote store fails, and if a package for the kind of file is missing.
    """
    if start is not None and tally.over == source.name:
        return
    for document in _all_documents(source, text_field, tally, start, strict):
        text = tidy(document.text, tally)
        if repair and (mended := repaired(text)) != text:
            tally.repaired, text = tally.repaired + 1, mended
        if not text or text.isspace():
            tally.skip("empty document")
            continue
        tally.replaced_bytes += document.replaced_bytes
        yield document if text is document.text else replace(document, text=text)
    tally.ended = source.name


def _all_documents(
    source: Source, text_field: str, tally: Tally, start: Place | None, strict: bool
) -> Iterator[Document]:
    start = start or Place(0, 0, 0)
    if source.hub:
        yield from read_hub(*source.hub, source.name, text_field, tally, start.number)
    base, piece = 0, source.piece
    for index, file in enumerate(source.files):
        if index >= start.file:
            done = start[1:] if index == start.file else (0, 0)
            job = Job(file, index, source.name, text_field, piece, tally, base, *done, strict)
            if file.size == 0:
                tally.skip("empty file")
            else:
                yield from _read(job, alone=len(source.files) == 1)
        base += max(0, file.size)
        tally.reached(base)


def _read(job: Job, alone: bool) -> Iterator[Document]:
    """Yield the documents of a file, and deal with whatever is wrong with it."""
    path, tally = job.file.path, job.tally
    try:
        yield from _READERS[job.file.kind](job)
    except FileNotFoundError:
        if job.strict or alone:
            raise UserError(f"'{path}' has gone since the source was listed; put it back or start again") from None
        tally.skip("vanished file")
    except PermissionError as error:
        if job.strict or alone:
            raise UserError(f"cannot read '{path}': {error.strerror}; check its permissions") from None
        tally.skip("unreadable file")
    except (Damaged, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; Arrow's own have no number
            raise UserError(f"cannot read '{path}': {error.strerror}; check the disk") from None
        if job.strict:
            raise UserError(f"'{path}' is damaged: {first_line(error)}; fetch it again or remove it") from None
        job.damaged(first_line(error), member=False)


def _topics(job: Job) -> Iterator[Document]:
    """Yield the texts of Python's ``help()``, which its source file holds as escaped strings."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    for number, name in enumerate(sorted(topics)):
        if number >= job.number:
            text, replaced = clean(topics[name])
            yield job.document(text, f"{TOPICS}:{name}", 0, replaced, (0, number + 1))


_READERS: Final[Mapping[Kind, Callable[[Job], Iterator[Document]]]] = {
    "arrow": read_arrow,
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "text": read_text,
    "topics": _topics,
    "warc": read_warc,
}


def _place(source: str) -> str:
    """Return what is equal for two spellings of one place."""
    if source == STDLIB or source.startswith("hf:") or "://" in source:
        return source.rstrip("/")
    return os.path.realpath(Path(source).expanduser())  # unlike Path.resolve, no error for a loop of links


def _stdlib(root: Path) -> Source:
    files = list_stdlib(root)
    if not files:
        raise UserError(f"this Python has no standard library sources in '{root}'; give --data.source PATH")
    return Source(STDLIB, f"sources and documentation of the Python standard library in {root}", tuple(files))


def _hub(source: str) -> Source:
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"'{source}' names no data set; write hf:owner/name or hf:owner/name:split")
    return Source(name, f"Hugging Face data set {name}, split {split or 'train'}", (), (name, split or "train"))
