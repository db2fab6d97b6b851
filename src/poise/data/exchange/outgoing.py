"""What every export shares: a fresh folder, raw tokens in files of bounded size, provenance beside them.

Beside the files that a format asks for, an export holds ``tokenizer.json`` and for every token file a
``<stem>.docs.arrow`` with the rows of ``docs.arrow`` for its documents: the other formats have no place for
where a text came from, so an import from such a folder gives back exactly the data that was exported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import staging, store

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total): tokens so far, and all of them; total is None if unknown."""

PROVENANCE: Final = ".docs.arrow"
_TOKENS: Final = 2**22  # tokens copied at once
_ROWS: Final = 65_536  # rows of provenance copied at once


def opened(data: str | Path) -> store.Tokens:
    """Open what is to be exported; damage must not travel on.

    Raises:
        UserError: ``data`` is no prepared data, or it has changed (looked for where ``store.check`` does).
    """
    tokens = store.open_tokens(data)
    store.check(tokens)
    return tokens


@dataclass(frozen=True, slots=True)
class Shard:
    """Documents ``first`` to ``last`` (exclusive) of a split, and the file that takes them.

    Attributes:
        stem: name of the file without its suffixes.
        first: number of the first document in the split.
        last: number after the last one.
        start: position of its first token in the split.
        tokens: how many tokens it has.
    """

    stem: str
    first: int
    last: int
    start: int
    tokens: int


def shards(split: store.Split, tokens_per_file: int | None) -> list[Shard]:
    """Cut a split between documents into files of at most ``tokens_per_file`` tokens, if a document is no longer.

    Without a limit there is one file, named like the split; else ``train_00000``, ``train_00001``, ...

    Raises:
        UserError: the limit is not positive.
    """
    if tokens_per_file is not None and tokens_per_file < 1:
        raise UserError(f"tokens_per_file is {tokens_per_file}; give a whole number above 0, or none for one file")
    count, total = len(split.index.lengths), len(split.tokens)
    if tokens_per_file is None:
        return [Shard(split.name, 0, count, 0, total)] if count else []
    starts = split.index.pointers  # in bytes; mapped, so searching it reads little
    size, found = split.tokens.itemsize, list[Shard]()
    first = at = 0
    while first < count:
        # The last document that begins early enough may still end too late: it goes to the next file.
        limit = np.searchsorted(starts, (at + tokens_per_file) * size, side="right")
        last = count if at + tokens_per_file >= total else max(first + 1, int(limit) - 1)
        end = total if last == count else int(starts[last]) // size
        found.append(Shard(f"{split.name}_{len(found):05d}", first, last, at, end - at))
        first, at = last, end
    return found


@contextmanager
def fresh(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an error.

    Raises:
        UserError: there is something at ``out`` already, or it cannot be written to, or the disk is full.
    """
    path = Path(out).expanduser().absolute()
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise UserError(f"cannot write to '{out}': {error.strerror}; give another folder") from None
    if taken:
        raise UserError(f"'{out}' is there already; an export never replaces anything, give a new folder")
    with staging.staged(path) as folder:
        yield folder


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing bytes; flushed to the disk when the block ends without an error."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class Meter:
    """Counts the tokens of an export, over all of its files."""

    def __init__(self, data: store.Tokens, progress: Progress | None) -> None:
        self._total = sum(int(facts["tokens"]) for facts in data.manifest["splits"].values())
        self._progress, self._done = progress, 0

    def add(self, tokens: int) -> None:
        """Tell that so many more tokens are written."""
        self._done += tokens
        if self._progress is not None:
            self._progress("exporting", self._done, self._total)


def write_tokens(path: Path, tokens: NDArray[Any], meter: Meter | None = None) -> None:
    """Write ids as they are, raw, in bounded memory."""
    with written(path) as file:
        for start in range(0, len(tokens), _TOKENS):
            part = np.ascontiguousarray(tokens[start : start + _TOKENS])
            file.write(part.data)
            if meter is not None:
                meter.add(len(part))


def ends_of(split: store.Split, shard: Shard) -> Iterator[NDArray[np.uint64]]:
    """Yield, some documents at a time, the position after each document's last token, counted in the shard's file."""
    size = split.tokens.itemsize
    for start in range(shard.first, shard.last, _ROWS):
        stop = min(start + _ROWS, shard.last)
        begins = split.index.pointers[start:stop] // size - shard.start
        yield (begins + split.index.lengths[start:stop]).astype("<u8")


def write_provenance(path: Path, split: store.Split, shard: Shard) -> None:
    """Write the rows of the shard's documents as an Arrow file; ``token_start`` counts in the shard's file."""
    with written(path) as file, pa.ipc.new_file(file, split.table.schema) as out:
        for table in rows_of(split, shard, _ROWS):
            starts = pa.compute.subtract(table["token_start"], pa.scalar(shard.start, pa.int64()))
            at = table.schema.get_field_index("token_start")
            out.write_table(table.set_column(at, table.schema.field(at), starts))


def rows_of(split: store.Split, shard: Shard, rows: int) -> Iterator[Any]:
    """Yield the document table of a shard, ``rows`` rows at a time."""
    for start in range(shard.first, shard.last, rows):
        yield split.table.slice(start, min(rows, shard.last - start))


def copy_tokenizer(data: store.Tokens, folder: Path) -> None:
    """Put the tokenizer beside the exported tokens."""
    shutil.copyfile(data.tokenizer_path, folder / store.TOKENIZER)
