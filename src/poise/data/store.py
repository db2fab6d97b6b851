"""Prepared data on disk: what is in the folder, and opening it.

``{train,val}.bin`` raw little-endian token ids (uint16 up to 65,536 ids, else uint32), every document
followed by the end of text; ``{train,val}.idx`` see ``megatron_index``; ``{train,val}.docs.arrow`` an Arrow
file whose row number is the document number; ``{train,val}.repeats.bin`` the repeated n-grams (``periodic.REPEAT``
records); ``tokenizer.json``; ``dropped/`` what was left out, with its reason; ``manifest.json`` with counts and the
hash of every other file. Tokens of one source stand together. The manifest is written last and the folder is renamed
into place: a folder with a manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.clean.features import FEATURES
from poise.data.megatron_index import Index, open_index
from poise.data.tokens.periodic import REPEAT

FORMAT: Final = "poise-data"
VERSION: Final = 2
SPLITS: Final = ("train", "val")
MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer.json"
DROPPED: Final = "dropped"
FILES: Final = (*(f"{s}.{kind}" for s in SPLITS for kind in ("bin", "idx", "docs.arrow", "repeats.bin")), TOKENIZER)
"""Every file that prepared data must have, the manifest aside."""

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
        pa.field("id", pa.string()),
        pa.field("url", pa.string()),
        pa.field("cluster", pa.binary(16)),
        pa.field("cluster_size", pa.int32()),
        pa.field("repeat_count", pa.int32()),
        pa.field("repeat_tokens", pa.int32()),
        pa.field("language", pa.string()),
        pa.field("scores", pa.struct([pa.field(name, pa.float32()) for name in FEATURES])),
    ]
)
"""Columns of ``docs.arrow``. Tokens include the end of text; the hash is blake2b-128 of the UTF-8 text; ``offset`` is
the byte of the (uncompressed) file at which the document, or its line or record, begins (0 in tables), ``bytes`` the
length of its cleaned text in UTF-8, so their sum is not where it ends there; ``cluster`` is the hash of the text that
was kept of its duplicates (null if it has none), ``cluster_size`` how many there were, itself included;
``repeat_count`` is the largest number of repeats of an n-gram that is not blank, ``repeat_tokens`` the tokens in such
repeats."""

MOST_CHECKED: Final = 4 * 2**30
"""Bytes of files whose hashes are checked unasked."""


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the type of the ids in a token file."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Span:
    """What one source fills of a split: ``tokens`` from ``token_start`` on, ``documents`` from ``document_start``."""

    name: str
    token_start: int
    tokens: int
    document_start: int
    documents: int


@dataclass(frozen=True)
class Split:
    """The training or the held-out part; arrays are memory-mapped and read-only.

    Attributes:
        name: ``train`` or ``val``.
        tokens: all ids end to end, (N,).
        index: lengths and positions of the documents.
        folder: of the prepared data.
        repeats: repeated n-grams in the order of their places, (R,) ``periodic.REPEAT``.
        sources: the sources in their order, with the span of tokens and of documents that each fills.
    """

    name: str
    tokens: NDArray[np.unsignedinteger]
    index: Index
    folder: Path
    repeats: NDArray[np.void]
    sources: tuple[Span, ...]

    @cached_property
    def table(self) -> Any:
        """The documents, an Arrow table with ``DOCUMENT_SCHEMA``; opened when it is first asked for, training does not.

        Raises:
            UserError: it is damaged.
        """
        try:
            table = documents_table(self.folder, self.name)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self.folder, self.name, error) from None
        if table.num_rows != len(self.index.lengths):
            raise damaged(self.folder, f"the files of the {self.name} split disagree about its size")
        return table

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """First token of every document, (documents,); in memory, because a mapped index is too slow to search."""
        begins: NDArray[np.int64] = np.array(self.index.pointers, np.int64) // self.tokens.itemsize
        return begins

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
        """Hash over the contents of all files but those in ``dropped``; a resumed run checks that its data are so."""
        hashes = {name: facts["blake2b"] for name, facts in sorted(self.manifest["files"].items()) if name in FILES}
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
            tokens = _mapped(path, dtype)
            repeats = _mapped(self.dir / f"{name}.repeats.bin", REPEAT)
        except OSError as error:
            raise _unreadable(self.dir, name, error) from None
        if (len(tokens), len(index.lengths)) != (facts["tokens"], facts["documents"]):
            raise damaged(self.dir, f"the files of the {name} split disagree about its size")
        return Split(name, tokens, index, self.dir, repeats, self._spans(name))

    def _spans(self, name: str) -> tuple[Span, ...]:
        spans: list[Span] = []
        tokens = documents = 0
        for source in self.manifest["sources"]:
            facts = source["splits"][name]
            spans.append(Span(source["name"], tokens, facts["tokens"], documents, facts["documents"]))
            tokens, documents = tokens + facts["tokens"], documents + facts["documents"]
        return tuple(spans)


def _unreadable(folder: Path, split: str, error: BaseException) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"cannot read the {split} split of '{folder}': {error.strerror}; check its permissions")
    return damaged(folder, f"{split} split: {first_line(error)}")


def documents_table(folder: Path, split: str) -> Any:
    """Map the table of a split's documents."""
    return pa.ipc.open_file(pa.memory_map(os.fsencode(folder / f"{split}.docs.arrow"))).read_all()


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))


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
        raise damaged(path, f"{MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"'{folder}' holds a {MANIFEST} of another program; give a folder of prepared data")
    if manifest.get("version") != VERSION:
        theirs = manifest.get("version")
        raise UserError(f"'{folder}' has data format {theirs}, this poise reads {VERSION}; prepare it again")
    if not _is_complete(manifest):
        raise damaged(path, f"{MANIFEST} does not say what it should")
    for name in FILES:
        size = manifest["files"].get(name, {}).get("bytes")
        file = path / name
        if size is None or not file.is_file():
            raise damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise damaged(path, f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
    return Tokens(path, manifest)


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has what the other functions of this file look for, and in that form."""
    try:
        whole = [manifest["tokenizer"][name] for name in ("vocab_size", "end_of_text")]
        for one in (manifest, *manifest["sources"]):
            whole += [one["splits"][split][what] for split in SPLITS for what in ("documents", "tokens", "bytes")]
        names = [one["name"] for one in manifest["sources"]]
        hashes = [facts["blake2b"] for facts in manifest["files"].values()]
        whole += [facts["bytes"] for facts in manifest["files"].values()]
        if "vocabulary" in manifest:  # older folders have none
            whole += [manifest["vocabulary"][what] for what in ("tokens_counted", "never", "under_10")]
    except (KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(n, int) for n in whole) and all(isinstance(text, str) for text in (*names, *hashes))


def verify(folder: str | Path) -> Tokens:
    """Open prepared data and also check the hash of every file.

    Raises:
        UserError: as ``open_tokens``, or the contents of a file have changed.
    """
    tokens = open_tokens(folder)
    _check_hashes(tokens, tokens.manifest["files"])
    return tokens


def check(tokens: Tokens, most_bytes: int = MOST_CHECKED, *, dropped: bool = False) -> bool:
    """Check the hash of every file where together they are small; about a second a GiB.

    Args:
        tokens: opened prepared data; their sizes have been checked.
        most_bytes: with more than this nothing is checked, as it would take too long to be done unasked.
        dropped: whether what was left out counts too; training does not read it.

    Returns:
        Whether it was checked.

    Raises:
        UserError: the contents of a file have changed.
    """
    files = tokens.manifest["files"]
    names = [name for name in files if dropped or name in FILES]
    if sum(files[name]["bytes"] for name in names) > most_bytes:
        return False
    _check_hashes(tokens, names)
    return True


def _check_hashes(tokens: Tokens, names: Iterable[str]) -> None:
    for name in names:
        if name not in FILES and not (tokens.dir / name).exists():
            continue  # what was dropped may be removed
        try:
            changed = file_hash(tokens.dir / name) != tokens.manifest["files"][name]["blake2b"]
        except OSError as error:
            raise UserError(
                f"cannot read '{tokens.dir / name}': {error.strerror}; check disk and permissions"
            ) from None
        if changed:
            raise damaged(tokens.dir, f"the contents of {name} have changed")


def check_ids(tokens: Tokens, split: str, ids: NDArray[np.unsignedinteger]) -> None:
    """Raise a ``UserError`` where tokens of a split are outside the vocabulary: their file has changed."""
    if len(ids) and (largest := int(ids.max())) >= tokens.vocab_size:
        raise damaged(tokens.dir, f"{split}.bin has id {largest:,}, the vocabulary {tokens.vocab_size:,} ids")


def file_hash(path: Path) -> str:
    """Return the blake2b-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def seal(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Flush and hash every file and write the manifest; return it as it is on disk."""
    files = {}
    dropped = (f"{DROPPED}/{path.name}" for path in sorted((folder / DROPPED).glob("*")))
    for name in (*FILES, *dropped):
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": (folder / name).stat().st_size, "blake2b": file_hash(folder / name)}
    whole: dict[str, Any] = {"format": FORMAT, "version": VERSION, **manifest, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8", newline="\n") as out:
        text = json.dumps(whole, indent=2, ensure_ascii=True)
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
    on_disk: dict[str, Any] = json.loads(text)
    return on_disk


def damaged(folder: Path, what: str) -> UserError:
    """Return the error for prepared data that are not what they were."""
    return UserError(f"prepared data '{folder}' is damaged: {what}; remove the folder and prepare it again")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
