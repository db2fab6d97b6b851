"""What makes a folder a checkpoint: a manifest that lists every file with its size and hash, and itself.

The manifest is JSON. Its last field is the SHA-256 of every byte before it, and the bytes after it are
fixed, so a flip of any bit in the file is noticed, in the digest as well. The hash finds damage; it is no
protection against somebody who wants to deceive (a checkpoint holds pickles: load only what you trust).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from poise.core.errors import UserError

FORMAT: Final = 1
NAME: Final = "manifest.json"
_TAIL: Final = ',\n "sha256": "{}"\n}}\n'
_TAIL_BYTES: Final = len(_TAIL.format("0" * 64))


class Damaged(Exception):  # noqa: N818 - names a finding about a checkpoint, not a failure of this program
    """The folder is not a whole, undamaged checkpoint; the message says why."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: name inside the folder, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All there is to know about a checkpoint without reading its tensors.

    Attributes:
        step: the step after which it was saved.
        metric: validation loss or any other number where lower is better; None if not measured.
        meta: what the caller wanted to keep beside the tensors.
        files: every file except the manifest.
        tensors: name to (shape, dtype name); shapes are whole, whatever the sharding.
        state: the nesting and the values that are not tensors, see ``state.flatten``.
        torch: version that wrote it.
    """

    step: int
    metric: float | None
    meta: dict[str, Any]
    files: tuple[FileEntry, ...]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    state: Any
    torch: str

    @property
    def bytes(self) -> int:
        """Size of the files in bytes, without the manifest."""
        return sum(entry.size for entry in self.files)


def write(folder: Path, manifest: Manifest) -> None:
    """Write and fsync the manifest; the caller fsyncs the folder.

    Raises:
        OSError: the disk refuses.
    """
    body = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False)
    head = body.removesuffix("\n}").encode()
    data = head + _tail(head)
    with (folder / NAME).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        Damaged: it is missing, torn or not what was written.
        OSError: the disk refuses.
        UserError: it was written by a newer version of this program.
    """
    try:
        data = (folder / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged("the manifest is missing") from None
    head = data[:-_TAIL_BYTES]
    if not head or data[-_TAIL_BYTES:] != _tail(head):
        raise Damaged("the manifest is damaged")
    values = json.loads(data)
    if values["format"] != FORMAT:
        raise UserError(
            f"checkpoint '{folder.name}' has format {values['format']}, this version reads {FORMAT}; update poise"
        )
    return Manifest(
        step=values["step"],
        metric=values["metric"],
        meta=values["meta"],
        files=tuple(FileEntry(**entry) for entry in values["files"]),
        tensors={name: (tuple(shape), dtype) for name, (shape, dtype) in values["tensors"].items()},
        state=values["state"],
        torch=values["torch"],
    )


def _tail(head: bytes) -> bytes:
    return _TAIL.format(hashlib.sha256(head).hexdigest()).encode()


def hash_file(path: Path, sync: bool = False) -> FileEntry:
    """Return size and hash of a file as it reads back; with ``sync``, force it to the disk first.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(path.name, os.fstat(file.fileno()).st_size, digest)


def fault(folder: Path, entry: FileEntry) -> str | None:
    """Return what is wrong with one file of a checkpoint, or None.

    Raises:
        OSError: the file is there but cannot be read.
    """
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{entry.name} has {size} bytes instead of {entry.size}"
        if hash_file(path) != entry:
            return f"{entry.name} is damaged (its hash differs)"
    except FileNotFoundError:
        return f"{entry.name} is missing"
    return None


def check_meta(meta: Mapping[str, Any]) -> None:
    """Refuse what JSON would not give back as it was.

    >>> check_meta({"position": 12, "guard": {"window": [1.5, float("nan")]}})
    >>> check_meta({"scores": {1: 0.5}})
    Traceback (most recent call last):
    TypeError: meta 'scores' has the key 1; keys are text
    """
    _check_meta(meta, "")


def _check_meta(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"meta '{name}' has the key {key!r}; keys are text")
            _check_meta(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_meta(inner, name)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"meta '{name}' is a {type(value).__name__}; meta holds plain values")
