"""OLMo's token files: ``.npy`` (raw ids without a header, despite the name) and ``.csv.gz`` (one line a document).

The lines have no heading: start, end (tokens in the file, end exclusive), id, src, loc (line in src, from 1).
Layout: ``MemmapWriter`` of Dolma (``dolma/tokenizer/memmap_writer.py``), which OLMo and OLMo-core read; both can also
tell documents apart by the end of text alone. Ids are uint16 up to 65,536 ids, else uint32. Needs no library.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import store
from poise.data.exchange import incoming, outgoing
from poise.data.exchange.building import build
from poise.data.exchange.incoming import Import, Incoming, Reading
from poise.data.exchange.meaning import vocab_size
from poise.data.exchange.outgoing import Progress

TOKENS_PER_FILE: Final = 512 * 1024 * 1024
"""Dolma's own limit."""

_NPY: Final = b"\x93NUMPY"


def export(
    data: str | Path,
    out: str | Path,
    *,
    tokens_per_file: int | None = TOKENS_PER_FILE,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write prepared data as ``train_00000.npy``, ``train_00000.csv.gz``, ... (and ``val``) into a new folder.

    The id of a document is its record's own, else its content hash. Returns the token files.

    Raises:
        UserError: ``data`` is no prepared data or damaged, ``out`` is there already, or the disk is full.
    """
    tokens = outgoing.opened(data)
    meter = outgoing.Meter(tokens, progress)
    with outgoing.fresh(out) as folder:
        for name in store.SPLITS:
            split = tokens.split(name)
            for shard in outgoing.shards(split, tokens_per_file):
                part = split.tokens[shard.start : shard.start + shard.tokens]
                outgoing.write_tokens(folder / f"{shard.stem}.npy", part, meter)
                _write_lines(folder / f"{shard.stem}.csv.gz", split, shard)
                outgoing.write_provenance(folder / f"{shard.stem}{outgoing.PROVENANCE}", split, shard)
        outgoing.copy_tokenizer(tokens, folder)
    return incoming.listing(Path(out).expanduser().absolute(), ".npy")


def _write_lines(path: Path, split: store.Split, shard: outgoing.Shard) -> None:
    with (
        outgoing.written(path) as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,  # no name and no time: equal data, equal bytes
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        out = csv.writer(text)
        for table in outgoing.rows_of(split, shard, 2**14):
            columns = (table[name].to_pylist() for name in ("token_start", "token_length", "content_hash", "origin"))
            ids = table["id"].to_pylist() if "id" in table.schema.names else [None] * table.num_rows
            for own, start, length, digest, origin in zip(ids, *columns, strict=True):
                begin = start - shard.start
                src, _, number = origin.rpartition(":")
                src, loc = (src, int(number)) if src and number.isdecimal() else (origin, 1)
                out.writerow((begin, begin + length, digest.hex() if own is None else own, src, loc))


def import_(
    source: str | Path,
    out: str | Path,
    how: Import | None = None,
    *,
    token_bytes: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Turn ``.npy`` files into prepared data at ``out``; return the manifest.

    Without a ``.csv.gz`` a file is cut after every end of text. A ``.npy`` that does have NumPy's header is read too.

    Args:
        source: a folder with ``.npy`` files, or one of them.
        out: the folder to write; prepared data there is replaced.
        how: see ``incoming.Import``.
        token_bytes: bytes of an id, 1, 2, 4 or 8; by default 2 up to 65,536 ids, else 4.
        progress: called while working.

    Raises:
        UserError: no such file, a damaged file, ids that do not fit the vocabulary, or a full disk.
    """
    how = how or Import()
    path = Path(source).expanduser()
    files = list(incoming.listing(path, ".npy")) if path.is_dir() else [path]
    if not files or not files[0].is_file() or files[0].suffix != ".npy":
        raise UserError(f"no OLMo tokens at '{source}'; give a folder with .npy files, or one of them")
    if token_bytes not in (None, 1, 2, 4, 8):
        raise UserError(f"token_bytes is {token_bytes}; give 1, 2, 4 or 8")
    if token_bytes is None:
        token_bytes = store.token_dtype(vocab_size(path, how)).itemsize
    return build("olmo", source, [_File(f, token_bytes) for f in files], Path(out), how, progress)


@dataclass(frozen=True)
class _File(Reading):
    """One ``.npy``, with its ``.csv.gz`` if there is one."""

    token_bytes: int

    def documents(self, end_of_text: int | None) -> Iterator[Incoming]:
        """Yield the documents in the order of the lines, or of the file."""
        ids = self._ids()
        lines = self.path.with_suffix(".csv.gz")
        if lines.is_file():
            yield from self._by_lines(ids, lines)
            return
        if end_of_text is None:
            raise UserError(f"'{self.path}' has no {lines.name}; give end_of_text, the id that ends its documents")
        whole = Incoming(ids, self.path.name, 0)
        for number, part in enumerate(incoming.split(whole, end_of_text)):
            yield part._replace(origin=f"{self.path.name}:{number}")

    def _by_lines(self, ids: NDArray[Any], lines: Path) -> Iterator[Incoming]:
        number = 0
        try:
            with gzip.open(lines, "rt", encoding="utf-8", errors="replace", newline="") as file:
                for number, row in enumerate(csv.reader(file), 1):
                    start, end = int(row[0]), int(row[1])
                    if not 0 <= start <= end <= len(ids):
                        raise incoming.damaged(lines, f"line {number} has tokens {start} to {end} of {len(ids):,}")
                    name = row[2] if len(row) > 2 else None
                    origin = ":".join(row[3:5]) if len(row) > 4 else f"{self.path.name}:{number - 1}"
                    place = (
                        0 if len(row) > 4 else start * ids.itemsize
                    )  # of another's file nothing but the line is known
                    yield Incoming(ids[start:end], origin, place, name)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise incoming.damaged(lines, f"it breaks off after line {number}") from None
        except (ValueError, IndexError, csv.Error) as error:
            if isinstance(error, UserError):
                raise
            raise incoming.damaged(lines, f"line {number} is not start,end,id,src,loc") from None

    def _ids(self) -> NDArray[Any]:
        with self.path.open("rb") as file:
            head = file.read(len(_NPY))
        if head != _NPY:
            return incoming.mapped(self.path, np.dtype(f"<u{self.token_bytes}"))
        try:
            ids = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise incoming.damaged(self.path, "its NumPy header does not fit its contents") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"'{self.path}' is an array of {ids.dtype} with {ids.ndim} axes; give one row of ids")
        return np.asarray(ids)
