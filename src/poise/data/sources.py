"""Where text comes from: files, folders, the Python standard library, a Hugging Face data set.

``resolve`` lists a source without reading it; ``documents`` reads it, always in the same order. Nothing here
keeps more than one document in memory.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from poise.core.errors import UserError, nearest
from poise.data.readers import Document, Tally, clean, read_jsonl, read_parquet, read_text

STDLIB: Final = "stdlib"
"""Name of the source that is on every machine: the Python standard library's own sources."""

Kind = Literal["text", "jsonl", "parquet", "topics"]

_MAX_PIECE: Final = 2**20
_MIN_PIECE: Final = 2**12
_PIECES: Final = 64
# Test data is not prose or code; encodings/ is tables of characters.
_STDLIB_LEFT_OUT: Final = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
)
_TOPICS: Final = "pydoc_data/topics.py"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source; ``origin`` is its path relative to the source's root, with forward slashes."""

    path: Path
    origin: str
    kind: Kind
    size: int
    mtime_ns: int


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
        return None if self.hub else sum(file.size for file in self.files)

    @property
    def piece(self) -> int:
        """Longest document made of plain text, in bytes.

        At most 1 MiB, and at most a 64th of all plain text but not under 4 KiB: a corpus of one or two
        files has documents enough for a held-out part of about the size asked for.
        """
        text = sum(file.size for file in self.files if file.kind == "text")
        return min(_MAX_PIECE, max(_MIN_PIECE, text // _PIECES))

    def fingerprint(self) -> str:
        """Return a hash of the listing (names, sizes, times of change): equal when nothing has changed."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.name, self.hub)).encode())
        for file in self.files:
            digest.update(repr((file.origin, file.kind, file.size, file.mtime_ns)).encode("utf-8", "replace"))
        return digest.hexdigest()


def resolve(source: str) -> Source:
    """List a source: ``stdlib``, ``hf:owner/name[:split]``, a file or a folder.

    In a folder, hidden files and folders (a leading dot), links to folders and folders that hold prepared
    data are left out; everything else is listed, sorted by path.

    Raises:
        UserError: there is no such source, or it cannot be listed.
    """
    if source == STDLIB:
        return _stdlib(Path(sysconfig.get_path("stdlib")))
    if source.startswith("hf:"):
        return _hub(source)
    path = Path(source).expanduser()
    skipped: Counter[str] = Counter()
    try:
        if path.is_dir():
            files = _walk(path, skipped)
        elif path.exists():
            files = [_file(path, path.name)]
        else:
            near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            hint = near or f"; give a file, a folder, hf:owner/name or {STDLIB}"
            raise UserError(f"no file or folder '{source}'{hint}")
    except OSError as error:
        raise UserError(f"cannot read '{source}': {error.strerror}; check its permissions") from None
    path = path.absolute()
    return Source(path.resolve().name or "root", str(path), tuple(files), None, dict(skipped))


def documents(source: Source, text_field: str, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a source in reading order; empty ones are counted and left out.

    Raises:
        UserError: a file is damaged, or cannot be read although it was asked for by name. An unreadable
            file among others in a folder is counted.
    """
    for document in _all_documents(source, text_field, tally):
        if document.text and not document.text.isspace():
            yield document
        else:
            tally.skip("empty document")


def _all_documents(source: Source, text_field: str, tally: Tally) -> Iterator[Document]:
    if source.hub:
        yield from _hub_documents(source, text_field, tally)
    base = 0
    for file in source.files:
        if len(source.files) > 1 and not os.access(file.path, os.R_OK):
            tally.skip("unreadable file")
        elif file.size == 0:
            tally.skip("empty file")
        elif file.kind == "jsonl":
            yield from read_jsonl(file.path, file.origin, source.name, text_field, tally, base)
        elif file.kind == "parquet":
            yield from read_parquet(file.path, file.origin, source.name, text_field, tally, base)
        elif file.kind == "topics":
            yield from _topics(source.name)
        else:
            yield from read_text(file.path, file.origin, source.name, source.piece, tally, base)
        base += file.size
        tally.reached(base)


def _walk(root: Path, skipped: Counter[str]) -> list[SourceFile]:
    files = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root:
            raise error
        skipped["unreadable folder"] += 1

    for folder, folders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_prepared(here / name)]
        for name in names:
            if name.startswith("."):
                continue
            try:
                status = (here / name).stat()
            except OSError:
                skipped["broken link"] += 1
                continue
            if not stat.S_ISREG(status.st_mode):
                skipped["special file"] += 1
                continue
            files.append(_file(here / name, (here / name).relative_to(root).as_posix(), status))
    return sorted(files, key=lambda file: file.origin)


def _is_prepared(folder: Path) -> bool:
    # Only the names are looked at: this runs for every folder of a source.
    return (folder / "manifest.json").is_file() and (folder / "train.idx").is_file()


def _file(path: Path, origin: str, status: os.stat_result | None = None) -> SourceFile:
    status = status or path.stat()
    return SourceFile(path.absolute(), origin, _kind(path), status.st_size, status.st_mtime_ns)


def _kind(path: Path) -> Kind:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in (".gz", ".zst")
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    # A compressed .json in a corpus is JSON lines by custom (C4, Dolma); a plain one is usually one value.
    if suffix in (".jsonl", ".ndjson") or (packed and suffix == ".json"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" and not packed else "text"


def _stdlib(root: Path) -> Source:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            # _sysconfigdata*.py is a dump of this machine's build settings.
            if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
                file = _file(path, path.relative_to(root).as_posix())
                if file.origin == _TOPICS:
                    file = SourceFile(file.path, file.origin, "topics", file.size, file.mtime_ns)
                files.append(file)
    if not files:
        raise UserError(f"this Python has no standard library sources in '{root}'; give --data.source PATH")
    description = f"sources and documentation of the Python standard library in {root}"
    return Source(STDLIB, description, tuple(sorted(files, key=lambda file: file.origin)))


def _topics(source: str) -> Iterator[Document]:
    """Yield the texts of Python's ``help()``, which its source file holds as escaped strings."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        text, replaced = clean(topics[name])
        yield Document(text, source, f"{_TOPICS}:{name}", 0, replaced)


def _hub(source: str) -> Source:
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"'{source}' names no data set; write hf:owner/name or hf:owner/name:split")
    return Source(name, f"Hugging Face data set {name}, split {split or 'train'}", (), (name, split or "train"))


def _hub_documents(source: Source, text_field: str, tally: Tally) -> Iterator[Document]:
    assert source.hub is not None
    name, split = source.hub
    for number, row in enumerate(_hub_rows(name, split)):
        value = row.get(text_field)
        if isinstance(value, str):
            text, replaced = clean(value)
            yield Document(text, source.name, f"{name}/{split}:{number}", 0, replaced)
        else:
            tally.missing(text_field, tuple(row))


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"'hf:{name}' needs the datasets package, which is not installed; pip install 'poise[hf]'"
        ) from None
    try:
        yield from hub.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot read 'hf:{name}:{split}': {first}; check the name, the split and the network"
        ) from None
