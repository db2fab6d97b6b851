"""Megatron-LM's indexed data set (``.bin`` and ``.idx``, MMIDIDX version 1), which NeMo and GPT-NeoX read too.

Prepared data has this layout already, so an export copies the pair byte for byte. An import takes any pair:
a document may have several sequences, and sequences need not stand in the order of the file.
Layout: ``megatron/core/datasets/indexed_dataset.py`` of Megatron-LM; see ``poise.data.megatron_index``.
"""

from __future__ import annotations

import struct
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
from poise.data.exchange.outgoing import Progress

_HEADER: Final = struct.Struct("<9sQBQQ")
_MAGIC: Final = b"MMIDIDX\x00\x00"
_DTYPES: Final = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def export(data: str | Path, out: str | Path, progress: Progress | None = None) -> tuple[Path, ...]:
    """Write prepared data as ``train.bin``, ``train.idx`` (and ``val``) into the new folder ``out``; return the files.

    Ids above 65,535 are marked int32, which has the same bytes (the layout knows no uint32).

    Raises:
        UserError: ``data`` is no prepared data or damaged, ``out`` is there already, or the disk is full.
    """
    tokens = outgoing.opened(data)
    meter = outgoing.Meter(tokens, progress)
    with outgoing.fresh(out) as folder:
        for name in store.SPLITS:
            split = tokens.split(name)
            if not len(split.index.lengths):
                continue
            outgoing.write_tokens(folder / f"{name}.bin", split.tokens, meter)
            index = np.memmap(tokens.dir / f"{name}.idx", np.uint8, "r")
            outgoing.write_tokens(folder / f"{name}.idx", index)
            (whole,) = outgoing.shards(split, None)
            outgoing.write_provenance(folder / f"{name}{outgoing.PROVENANCE}", split, whole)
        outgoing.copy_tokenizer(tokens, folder)
    return incoming.listing(Path(out).expanduser().absolute(), ".bin")


def import_(source: str | Path, out: str | Path, how: Import | None = None, progress: Progress | None = None) -> Any:
    """Turn Megatron pairs into prepared data at ``out``; return the manifest.

    Args:
        source: a folder with pairs, or the path of one pair, with or without ``.bin``.
        out: the folder to write; prepared data there is replaced.
        how: see ``incoming.Import``.
        progress: called while working.

    Raises:
        UserError: there is no pair, a file is damaged, ids do not fit the vocabulary, or the disk is full.
    """
    path = Path(source).expanduser()
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    files = [path.with_name(path.name + ".bin")] if not path.is_dir() else list(incoming.listing(path, ".bin"))
    if not files or not files[0].is_file():
        raise UserError(f"no Megatron data at '{source}'; give a folder with .bin and .idx files, or one pair")
    pairs = [_Pair(file, file.with_suffix(".idx")) for file in files]
    return build("megatron", source, pairs, Path(out), how or Import(), progress)


@dataclass(frozen=True)
class _Index:
    """An opened ``.idx`` of anybody's."""

    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Pair(Reading):
    """One ``.bin`` with its ``.idx``."""

    index: Path

    def documents(self, end_of_text: int | None) -> Iterator[Incoming]:
        """Yield the documents in the order of the index; their sequences are joined."""
        opened = self._open()
        raw = incoming.mapped(self.path, np.dtype(np.uint8))
        size = opened.dtype.itemsize
        for number in range(len(opened.documents) - 1):
            first, last = int(opened.documents[number]), int(opened.documents[number + 1])
            parts = [
                raw[at : at + size * length].view(opened.dtype)
                for at, length in zip(
                    opened.pointers[first:last].tolist(), opened.lengths[first:last].tolist(), strict=True
                )
            ]
            ids = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, opened.dtype), *parts])
            offset = int(opened.pointers[first]) if first < last else 0
            yield Incoming(ids, f"{self.path.name}:{number}", offset)

    def _open(self) -> _Index:
        path = self.index
        try:
            with path.open("rb") as file:
                head = file.read(_HEADER.size)
            size = path.stat().st_size
            held = self.path.stat().st_size
        except OSError as error:
            raise UserError(
                f"cannot read '{error.filename or path}': {error.strerror}; both files are needed"
            ) from None
        if len(head) < _HEADER.size or not head.startswith(_MAGIC) or head[9] != 1:
            raise UserError(f"'{path}' is not an index of Megatron-LM (MMIDIDX version 1); give the .idx of the .bin")
        _, _, code, count, documents = _HEADER.unpack(head)
        if code not in _DTYPES:
            raise UserError(f"'{path}' has tokens of type code {code}, which are not whole numbers; give token data")
        whole = _HEADER.size + 12 * count + 8 * documents
        if count and size == whole + count:
            raise UserError(f"'{path}' is multimodal (a mode for every sequence); only text can be imported")
        if size != whole:
            raise incoming.damaged(path, f"{size:,} bytes instead of {whole:,}")
        dtype, at = np.dtype(_DTYPES[code]), _HEADER.size
        lengths = incoming.mapped(path, np.dtype("<i4"), at, count)
        pointers = incoming.mapped(path, np.dtype("<i8"), at + 4 * count, count)
        starts = incoming.mapped(path, np.dtype("<i8"), at + 12 * count, documents)
        _check(path, held, _Index(lengths, pointers, starts, dtype))
        return _Index(lengths, pointers, starts, dtype)


def _check(path: Path, held: int, index: _Index) -> None:
    """Raise a ``UserError`` if the index points outside its token file or counts sequences that are not there."""
    count, block = len(index.lengths), 2**20
    for at in range(0, count, block):
        lengths = index.lengths[at : at + block].astype(np.int64)
        pointers = index.pointers[at : at + block]
        if (lengths < 0).any() or (pointers < 0).any() or (pointers + lengths * index.dtype.itemsize > held).any():
            raise incoming.damaged(path, f"it points outside the {held:,} bytes of its .bin file")
    starts = index.documents
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != count:
        raise incoming.damaged(path, f"its documents do not cover its {count:,} sequences")
    for at in range(0, len(starts), block):
        if (np.diff(starts[at : at + block + 1]) < 0).any():
            raise incoming.damaged(path, "its documents are out of order")
