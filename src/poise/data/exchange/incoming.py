"""What every import reads: foreign documents as token ids, and what an export of ours put beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.exchange.outgoing import PROVENANCE

REQUIRED: Final = ("content_hash", "source", "origin", "offset", "bytes", "replaced_bytes")
"""Columns without which rows are no provenance."""

_MOST_STAND_IN: Final = 2**22  # ids of a vocabulary of numbers: more would make its file huge
_SEARCHED: Final = 2**21  # tokens searched at once
_SIDES: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val"}


@dataclass(frozen=True, slots=True)
class Import:
    """How to turn foreign tokens into prepared data.

    Attributes:
        tokenizer: path of the ``tokenizer.json`` the tokens were made with; by default the one beside them.
        vocab_size: without any tokenizer: the number of ids. Texts are then shown as numbers, a document's hash is
            that of its ids, and its ``bytes`` are 0: nobody knows.
        end_of_text: without any tokenizer: the id that ends a document; by default the id that all documents seen
            first end with.
        split: cut documents after every end of text inside them, e.g. sequences that others have packed.
        val_fraction: share of the documents held out, 0 to 0.5, chosen by content; unused where the source has a
            held-out part of its own, a file named ``val`` or ``validation``.
        seed: chooses which documents are held out.
        name: name of the source; by default that of the file or folder.
    """

    tokenizer: str | None = None
    vocab_size: int | None = None
    end_of_text: int | None = None
    split: bool = False
    val_fraction: float = 0.01
    seed: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction <= 0.5:
            raise UserError(f"val_fraction is {self.val_fraction}; give a share from 0 to 0.5, e.g. 0.01")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError("tokenizer and vocab_size are both given; vocab_size is for tokens without a tokenizer")
        if self.vocab_size is not None and not 2 <= self.vocab_size <= _MOST_STAND_IN:
            raise UserError(f"vocab_size is {self.vocab_size}; without a tokenizer give 2 to {_MOST_STAND_IN:,}")
        if self.end_of_text is not None and self.end_of_text < 0:
            raise UserError(f"end_of_text is {self.end_of_text}; give the id that ends a document")


class Incoming(NamedTuple):
    """One foreign document.

    Attributes:
        ids: its tokens, of any whole-number type; may be a view of a mapped file.
        origin: where it came from, in words.
        offset: byte at which it begins in its token file.
        id: the record's own id.
    """

    ids: NDArray[Any]
    origin: str
    offset: int
    id: str | None = None


class Known(NamedTuple):
    """Provenance of the documents of a file, in their order.

    Attributes:
        total: how many documents.
        rows: called with (first, count), returns a table with columns of ``docs.arrow``.
    """

    total: int
    rows: Callable[[int, int], Any]


@dataclass(frozen=True)
class Reading:
    """One token file (or folder) to import; each format has its own.

    Attributes:
        path: the file.
    """

    path: Path

    def documents(self, end_of_text: int | None) -> Iterator[Incoming]:
        """Yield its documents in order; ``end_of_text`` is None where it is not known yet."""
        raise NotImplementedError

    def known(self) -> Known | None:
        """Return the document rows that an export put beside the file, or None."""
        path = self.path.with_name(self.path.name.removesuffix(self.path.suffix) + PROVENANCE)
        if not path.is_file():
            return None
        try:
            table = pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()
        except (OSError, pa.ArrowException):
            raise damaged(path, "it is not an Arrow file (remove it to import without provenance)") from None
        return Known(table.num_rows, table.slice)

    def side(self) -> str | None:
        """Return the split this file is by its name, or None."""
        stem = self.path.name.removesuffix(self.path.suffix).partition("_")[0]
        return _SIDES.get(stem)


def split(document: Incoming, end_of_text: int) -> Iterator[Incoming]:
    """Yield the parts of a document that end with an end of text, and what is left after the last one."""
    ids, start, step = document.ids, 0, _SEARCHED
    for at in range(0, len(ids), step):
        for last in (np.flatnonzero(ids[at : at + step] == end_of_text) + at).tolist():
            yield document._replace(ids=ids[start : last + 1], offset=document.offset + start * ids.itemsize)
            start = last + 1
    if start < len(ids):
        yield document._replace(ids=ids[start:], offset=document.offset + start * ids.itemsize)


def listing(folder: Path, suffix: str) -> tuple[Path, ...]:
    """Return the files of a folder with a suffix, by name."""
    found = [path for path in folder.iterdir() if path.is_file() and path.name.endswith(suffix)]
    return tuple(sorted(found, key=lambda path: path.name))


def mapped(path: Path, dtype: np.dtype[Any], offset: int = 0, count: int | None = None) -> NDArray[Any]:
    """Map a raw file (or a part of it) for reading.

    Raises:
        UserError: the file is not there, cannot be read, or is not a whole number of elements.
    """
    try:
        held = path.stat().st_size - offset
        if count is None and held % dtype.itemsize:
            raise damaged(path, f"{held:,} bytes are not a whole number of {dtype.itemsize}-byte values")
        number = held // dtype.itemsize if count is None else count
        return np.memmap(path, dtype, "r", offset, (number,)) if number else np.zeros(0, dtype)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; it belongs to the data") from None


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file that contradicts itself or its neighbour."""
    return UserError(f"'{path}' is damaged: {what}; fetch it again")
