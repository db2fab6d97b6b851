"""datatrove's tokenised files: ``.ds`` (raw ids), ``.ds.index`` (where documents end), ``.ds.metadata`` (text).

The ids are uint16 up to 65,536 ids, else uint32, as in prepared data, so an export copies the tokens and
writes an index: the position after each document, uint64. Layout: ``TokenizedFile`` of datatrove 0.10.1
(``datatrove/pipeline/tokens/tokenizer.py``). Does not need datatrove.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.core.errors import UserError
from poise.data import store
from poise.data.exchange import incoming, outgoing
from poise.data.exchange.building import build
from poise.data.exchange.incoming import Import, Incoming, Reading
from poise.data.exchange.outgoing import Progress


def export(
    data: str | Path, out: str | Path, *, tokens_per_file: int | None = None, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write prepared data as ``train.ds`` (and ``val.ds``) with index and metadata into the new folder ``out``.

    With ``tokens_per_file`` the files are cut between documents and numbered. Returns the token files.

    Raises:
        UserError: ``data`` is no prepared data or damaged, ``out`` is there already, or the disk is full.
    """
    tokens = outgoing.opened(data)
    meter = outgoing.Meter(tokens, progress)
    with outgoing.fresh(out) as folder:
        for name in store.SPLITS:
            split = tokens.split(name)
            for shard in outgoing.shards(split, tokens_per_file):
                file = folder / f"{shard.stem}.ds"
                outgoing.write_tokens(file, split.tokens[shard.start : shard.start + shard.tokens], meter)
                with outgoing.written(folder / f"{file.name}.index") as index:
                    for ends in outgoing.ends_of(split, shard):
                        index.write(ends.data)
                size = split.tokens.itemsize
                facts = f"{store.TOKENIZER}|{size}\n{shard.tokens}\n{_metric(shard.tokens)}"
                with outgoing.written(folder / f"{file.name}.metadata") as metadata:
                    metadata.write(facts.encode())
                outgoing.write_provenance(folder / f"{shard.stem}{outgoing.PROVENANCE}", split, shard)
        outgoing.copy_tokenizer(tokens, folder)
    return incoming.listing(Path(out).expanduser().absolute(), ".ds")


def import_(source: str | Path, out: str | Path, how: Import | None = None, progress: Progress | None = None) -> Any:
    """Turn ``.ds`` files with their ``.ds.index`` into prepared data at ``out``; return the manifest.

    The size of an id follows from the index; a ``.ds.metadata`` must agree. A ``.ds.loss`` mask has no place in
    prepared data: it is left out and counted under ``skipped``.

    Args:
        source: a folder with ``.ds`` files, or one of them.
        out: the folder to write; prepared data there is replaced.
        how: see ``incoming.Import``.
        progress: called while working.

    Raises:
        UserError: no such file, no index, a damaged file, ids that do not fit the vocabulary, or a full disk.
    """
    path = Path(source).expanduser()
    files = list(incoming.listing(path, ".ds")) if path.is_dir() else [path]
    if not files or not files[0].is_file() or files[0].suffix != ".ds":
        raise UserError(f"no datatrove tokens at '{source}'; give a folder with .ds files, or one of them")
    masks = sum(file.with_name(file.name + ".loss").is_file() for file in files)
    skipped = {"loss mask (.ds.loss)": masks} if masks else {}
    return build("datatrove", source, [_File(file) for file in files], Path(out), how or Import(), progress, skipped)


@dataclass(frozen=True)
class _File(Reading):
    """One ``.ds`` with its index."""

    def documents(self, end_of_text: int | None) -> Iterator[Incoming]:
        """Yield the documents in the order of the file."""
        index = self.path.with_name(self.path.name + ".index")
        if not index.is_file():
            raise UserError(
                f"'{self.path}' has no {index.name}; write it with save_index=True, it tells documents apart"
            )
        if index.stat().st_size % 8:
            raise incoming.damaged(index, "its size is not a multiple of 8 bytes")
        ends = incoming.mapped(index, np.dtype("<u8"))
        dtype = self._dtype(index, int(ends[-1]) if len(ends) else 0)
        tokens = incoming.mapped(self.path, dtype)
        start = number = 0
        for at in range(0, len(ends), 2**16):
            for end in ends[at : at + 2**16].tolist():
                if not start <= end <= len(tokens):
                    raise incoming.damaged(index, f"document {number} ends at token {end:,}, after {start:,}")
                yield Incoming(tokens[start:end], f"{self.path.name}:{number}", start * dtype.itemsize)
                start, number = end, number + 1

    def _dtype(self, index: Path, total: int) -> np.dtype[Any]:
        held = self.path.stat().st_size
        fits = [size for size in (2, 4) if size * total == held]
        if not fits:
            raise incoming.damaged(index, f"it counts {total:,} tokens, its .ds has {held:,} bytes")
        said = _said(self.path.with_name(self.path.name + ".metadata"))
        if said is not None and said not in fits:
            raise incoming.damaged(index, f"the .metadata says {said} bytes a token, index and .ds say {fits[0]}")
        return np.dtype(f"<u{said or fits[0]}")


def _said(path: Path) -> int | None:
    """Return the bytes a token of a ``.ds.metadata``: after the last bar of its first line."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    size = lines[0].rpartition("|")[2] if lines else ""
    return int(size) if size in ("2", "4") else None


def _metric(count: int) -> str:
    """Return a count of tokens with a unit, three digits.

    >>> _metric(999), _metric(12_345_678)
    ('999 T', '12.3 MT')
    """
    value, units = float(count), iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}T"
