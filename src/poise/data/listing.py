"""Listing the files of a source, without reading them, in an order that depends on their names alone."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from poise.core.errors import UserError
from poise.data.readers.stream import COMPRESSED, Kind, SourceFile, first_line, remote_filesystem

_KINDS: Final[dict[str, Kind]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".warc": "warc",
    ".wet": "warc",
}
# These are read from their end or mapped, so they cannot be compressed once more as a whole.
_TABLES: Final[dict[str, Kind]] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
# Test data is not prose or code; encodings/ is tables of characters.
_STDLIB_LEFT_OUT: Final = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
)
TOPICS: Final = "pydoc_data/topics.py"
"""Python's ``help()`` texts, in the standard library."""

UNKNOWN_SIZE: Final = -1


def list_file(path: Path) -> SourceFile:
    """Return the one file of a source that is a file."""
    return _file(path, path.name, path.stat())


def list_folder(root: Path, skipped: Counter[str]) -> list[SourceFile]:
    """Return the files of a folder, sorted by path.

    Hidden files and folders (a leading dot), links to folders and folders that hold prepared data are left out; links
    that lead nowhere and special files are counted. Of a data set saved with ``save_to_disk`` only the tables are
    taken, and if it is several splits, those of ``train`` (the others are counted).
    """
    files = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root:
            raise error
        skipped["unreadable folder"] += 1

    for folder, folders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_prepared(here / name)]
        if "dataset_dict.json" in names and "train" in folders:
            skipped["other split of a saved data set (give its folder)"] += len(folders) - 1
            folders[:], names = ["train"], []
        if {"state.json", "dataset_info.json"} <= set(names):
            names = [name for name in names if name.startswith("data-") and name.endswith(".arrow")]
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


def list_remote(url: str) -> list[SourceFile]:
    """Return the file at an address, or the files of the folder there, without hidden ones, sorted by path.

    Raises:
        UserError: there is nothing, or it cannot be listed.
    """
    system, path = remote_filesystem(url)
    try:
        facts = system.info(path)
        if facts.get("type") != "directory":
            return [_remote_file(system, url, PurePosixPath(path.partition("?")[0]).name or "file", path, facts)]
        found: dict[str, Any] = system.find(path, detail=True)
    except FileNotFoundError:
        raise UserError(f"no file or folder '{url}'; check the address") from None
    except Exception as error:  # stores and networks raise many kinds
        raise UserError(f"cannot read '{url}': {first_line(error)}; check the address and the credentials") from None
    root, files = path.rstrip("/") + "/", []
    for place, facts in found.items():
        origin = place.removeprefix(root).lstrip("/")
        if facts.get("type") == "file" and not any(part.startswith(".") for part in origin.split("/")):
            files.append(_remote_file(system, system.unstrip_protocol(place), origin, place, facts))
    return sorted(files, key=lambda file: file.origin)


def list_stdlib(root: Path) -> list[SourceFile]:
    """Return the sources of the Python standard library, without tests, sorted by path."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            # _sysconfigdata*.py is a dump of this machine's build settings.
            if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
                origin = path.relative_to(root).as_posix()
                files.append(_file(path, origin, path.stat(), "topics" if origin == TOPICS else None))
    return sorted(files, key=lambda file: file.origin)


def _is_prepared(folder: Path) -> bool:
    # Only the names are looked at: this runs for every folder of a source.
    try:
        return (folder / "manifest.json").is_file() and (folder / "train.idx").is_file()
    except PermissionError:  # walking into it says so again, and counts it
        return False


def _file(path: Path, origin: str, status: os.stat_result, kind: Kind | None = None) -> SourceFile:
    kind = kind or _kind(path.suffixes)
    return SourceFile(path.absolute(), origin, kind, status.st_size, status.st_mtime_ns)


def _remote_file(system: Any, url: str, origin: str, path: str, facts: dict[str, Any]) -> SourceFile:
    size = facts.get("size")
    try:
        tag = str(system.ukey(path))
    except Exception:  # not every store can tell one version from another
        tag = ""
    size = UNKNOWN_SIZE if size is None else int(size)
    return SourceFile(url, origin, _kind(PurePosixPath(origin).suffixes), size, 0, tag)


def _kind(suffixes: Sequence[str]) -> Kind:
    last = suffixes[-1].lower() if suffixes else ""
    if last in COMPRESSED:
        inner = suffixes[-2].lower() if len(suffixes) > 1 else ""
        return _KINDS.get(inner, "text")
    return _TABLES.get(last) or _KINDS.get(last, "text")
