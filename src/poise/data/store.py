"""Prepared data on disk: what is in the folder, and opening it.

``{train,val}.bin`` raw little-endian token ids (uint16 up to 65,536 ids, else uint32), every document
followed by the end of text; ``{train,val}.idx`` see ``megatron_index``; ``{train,val}.docs.arrow`` an Arrow
file whose row number is the document number; ``tokenizer.json``; ``manifest.json`` with counts and the hash
of every other file. The manifest is written last and the folder is renamed into place: a folder with a
manifest is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.megatron_index import Index, open_index

FORMAT: Final = "poise-data"
VERSION: Final = 1
SPLITS: Final = ("train", "val")
MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer.json"
FILES: Final = (*(f"{s}.{kind}" for s in SPLITS for kind in ("bin", "idx", "docs.arrow")), TOKENIZER)
"""Every file of prepared data, the manifest aside."""

DOCUMENT_SCHEMA: Final = pa.schema(
    [
        pa.field("token_start", pa.int64(), nullable=False),
        pa.field("token_length", pa.int32(), nullable=False),
        pa.field("content_hash", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("replaced_bytes", pa.int64(), nullable=False),
    ]
)
"""Columns of ``docs.arrow``: tokens include the end of text; the hash is blake2b-128 of the UTF-8 text."""

_ABANDONED_AFTER: Final = 24 * 3600.0  # seconds after which another machine's unfinished folder is removed


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the type of the ids in a token file."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Split:
    """The training or the held-out part; arrays are memory-mapped and read-only.

    Attributes:
        name: ``train`` or ``val``.
        tokens: all ids end to end, (N,).
        index: lengths and positions of the documents.
        table: the documents, an Arrow table with ``DOCUMENT_SCHEMA``.
    """

    name: str
    tokens: NDArray[np.unsignedinteger]
    index: Index
    table: Any

    def document_tokens(self, number: int) -> NDArray[np.unsignedinteger]:
        """Return the ids of document ``number``, its end of text included."""
        start = int(self.index.pointers[number]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.index.lengths[number])]


@dataclass(frozen=True)
class Tokens:
    """Opened prepared data.

    Attributes:
        dir: the folder.
        manifest: contents of its ``manifest.json``.
    """

    dir: Path
    manifest: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is below it."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def end_of_text(self) -> int:
        """Id that follows every document."""
        return int(self.manifest["tokenizer"]["end_of_text"])

    @property
    def tokenizer_path(self) -> Path:
        """Path of the ``tokenizer.json``."""
        return self.dir / TOKENIZER

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the contents of all files; a run that resumes can check that its data is the same."""
        hashes = {name: facts["blake2b"] for name, facts in sorted(self.manifest["files"].items())}
        return hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()

    def split(self, name: str) -> Split:
        """Open ``train`` or ``val``; a split may be empty.

        Raises:
            UserError: there is no such split, or its files are damaged.
        """
        if name not in SPLITS:
            raise UserError(f"no split '{name}'; prepared data has train and val")
        dtype = token_dtype(self.vocab_size)
        facts = self.manifest["splits"][name]
        path = self.dir / f"{name}.bin"
        try:
            index = open_index(self.dir / f"{name}.idx", dtype)
            table = pa.ipc.open_file(pa.memory_map(str(self.dir / f"{name}.docs.arrow"))).read_all()
            empty = facts["tokens"] == 0  # an empty file cannot be mapped
            tokens = np.zeros(0, dtype) if empty else np.asarray(np.memmap(path, dtype, "r"))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.dir, f"{name} split: {_first_line(error)}") from None
        counted = (len(tokens), len(index.lengths), table.num_rows)
        if counted != (facts["tokens"], facts["documents"], facts["documents"]):
            raise _damaged(self.dir, f"the files of the {name} split disagree about its size")
        return Split(name, tokens, index, table)


def is_prepared(folder: Path) -> bool:
    """Tell whether a folder holds finished prepared data of any version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def open_tokens(folder: str | Path) -> Tokens:
    """Open prepared data, checking the manifest and the size of every file.

    Raises:
        UserError: the folder holds no prepared data, another version of it, or a file is missing or cut off.
    """
    path = Path(folder).expanduser().absolute()
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{folder}' holds no prepared data (no {MANIFEST}); run poise data prepare") from None
    except OSError as error:
        raise UserError(f"cannot read prepared data '{folder}': {error.strerror}") from None
    except ValueError:
        raise _damaged(path, f"{MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"'{folder}' holds a {MANIFEST} of another program; give a folder of prepared data")
    if manifest.get("version") != VERSION:
        theirs = manifest.get("version")
        raise UserError(f"'{folder}' has data format {theirs}, this poise reads {VERSION}; prepare it again")
    for name in FILES:
        size = manifest.get("files", {}).get(name, {}).get("bytes")
        file = path / name
        if size is None or not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(path, f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
    return Tokens(path, manifest)


def verify(folder: str | Path) -> Tokens:
    """Open prepared data and also check the hash of every file.

    Raises:
        UserError: as ``open_tokens``, or the contents of a file have changed.
    """
    tokens = open_tokens(folder)
    for name in FILES:
        if file_hash(tokens.dir / name) != tokens.manifest["files"][name]["blake2b"]:
            raise _damaged(tokens.dir, f"the contents of {name} have changed")
    return tokens


def file_hash(path: Path) -> str:
    """Return the blake2b-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def seal(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Flush and hash every file and write the manifest; return it as it is on disk."""
    files = {}
    for name in FILES:
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": (folder / name).stat().st_size, "blake2b": file_hash(folder / name)}
    whole: dict[str, Any] = {"format": FORMAT, "version": VERSION, **manifest, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8", newline="\n") as out:
        out.write(json.dumps(whole, indent=2, ensure_ascii=True) + "\n")
        out.flush()
        os.fsync(out.fileno())
    return whole


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends without an error.

    On any error, and on Ctrl-C, nothing is left behind and what was at ``out`` stays. What a killed process
    left is removed by the next call for the same ``out``.

    Raises:
        UserError: the place cannot be written to, or the disk is full.
    """
    aside = out.parent / f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        _publish(aside, out)
    except OSError as error:
        raise _cannot_write(out, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_foreign(out: Path) -> None:
    """Raise a ``UserError`` if ``out`` is something that preparing data must not replace."""
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        foreign = out.exists() and not out.is_dir()
    except OSError as error:
        raise _cannot_write(out, error) from None
    if foreign or not names <= {*FILES, MANIFEST}:
        what = "is a file" if foreign else "holds other files"
        raise UserError(f"'{out}' {what}; prepared data needs a folder of its own, give --data.dir PATH")


def _publish(aside: Path, out: Path) -> None:
    """Rename ``aside`` to ``out``, replacing older prepared data there."""
    old = out.parent / aside.name.replace(".partial-", ".old-")
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    if os.name == "posix":  # the renaming itself must survive a power cut
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left beside ``out``."""
    for kind in ("partial", "old"):
        for path in out.parent.glob(f".{_escaped(out.name)}.{kind}-*-*"):
            host, _, pid = path.name.split(f".{kind}-", 1)[1].rpartition("-")
            here = host == socket.gethostname() and pid.isdigit() and os.name == "posix"
            old = time.time() - path.stat().st_mtime > _ABANDONED_AFTER
            if (not _alive(int(pid))) if here else old:
                shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cannot_write(out: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"the disk is full at '{out.parent}'; free some space or give --data.dir PATH")
    reason = error.strerror or _first_line(error)
    return UserError(f"cannot write prepared data to '{out}': {reason}; give --data.dir PATH or set POISE_CACHE")


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"prepared data '{folder}' is damaged: {what}; remove the folder and prepare it again")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
