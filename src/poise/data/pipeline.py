"""The two stages that work on one block at a time: cleaning, before duplicates are known, and encoding, after.

Both are functions of a block and a job, so they run in this process or in any other and give the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.data import record, work
from poise.data.clean.features import Score
from poise.data.clean.filters import Filter
from poise.data.clean.language import KeepLanguage
from poise.data.clean.lines import CleanLines
from poise.data.clean.pii import MaskPII
from poise.data.clean.urls import BlockUrls
from poise.data.dedup import contamination, exact, minhash
from poise.data.judge import KEPT, Judgement
from poise.data.settings import Settings
from poise.data.store import TOKENIZER, token_dtype
from poise.data.tokens import periodic
from poise.data.tokens.augment import BpeDropout, FillInTheMiddle
from poise.data.tokens.tokenizer import Tokenizer, load
from poise.data.writer import check_length

SIGNATURE: Final = "signature"


def stages_of(settings: Settings) -> tuple[record.Stage, ...]:
    """Return the row-wise stages that the settings ask for, in their order."""
    stages: list[record.Stage] = []
    if settings.clean_lines:
        stages.append(CleanLines())
    if settings.mask_pii:
        stages.append(MaskPII())
    stages.append(Score())
    stages += [Filter(name) for name in settings.filters]
    if settings.languages:
        stages.append(KeepLanguage(settings.languages))
    if settings.block_urls:
        stages.append(BlockUrls.read(settings.block_urls))
    for path in settings.decontaminate:
        index = contamination.Index.read(path)
        stages.append(contamination.Decontaminate(index, Path(path).stem))
    return tuple(stages)


class Block(NamedTuple):
    """A block to be cleaned, and what the reader knows at its end."""

    number: int
    batch: pa.RecordBatch
    meta: dict[str, Any]


@dataclass(frozen=True)
class Clean:
    """Cleans a block and writes ``clean/<number>.arrow`` into the work folder."""

    folder: Path
    stages: tuple[record.Stage, ...]
    near: bool
    minhash: Literal["numpy", "rensa"] = "numpy"

    def __call__(self, block: Block) -> work.Meta:
        """Return the block's description: what the reader knew, and its rows."""
        batch = record.run(block.batch, self.stages)
        text = batch.column("text")
        sizes = np.diff(record.flat(text)[1])
        batch = record.set_column(batch, "content_hash", exact.to_binary(exact.hashes(text)))
        batch = record.set_column(batch, "bytes", pa.array(sizes))
        if self.near:
            left = pc.if_else(pa.array(record.kept(batch)), text, "")  # the others are not compared
            signatures = minhash.signatures(left, backend=self.minhash)
            batch = record.set_column(batch, SIGNATURE, _binary(signatures))
        meta = block.meta | {
            "rows": batch.num_rows,
            "bytes": int(sizes.sum()),
            "read": int(record.flat(block.batch.column("text"))[1][-1]),
        }
        return work.commit(clean_path(self.folder, block.number), meta, lambda path: _write_batch(path, batch))


@dataclass(frozen=True)
class Encode:
    """Encodes what is kept of a cleaned block and writes ``tokens/<number>.part`` into the work folder.

    A part is the rows (an Arrow stream), the ids and the repeats one after another; the training side comes first.
    """

    folder: Path
    tokenizer: str  # hash of the one in the folder
    fast: bool
    settings: Settings
    threads: int | None

    def __call__(self, number: int) -> work.Meta:
        """Return the description of the part: the sizes of what is in it."""
        path = part_path(self.folder, number)
        if (done := work.committed(path)) is not None:
            return done
        tokenizer = _tokenizer(str(self.folder / TOKENIZER), self.tokenizer, self.fast)
        judged = Judgement.open(self.folder)
        batch = read_batch(clean_path(self.folder, number))
        span = judged.block(number)
        rows = np.concatenate([np.flatnonzero((span.reason == KEPT) & (span.side == side)) for side in (0, 1)])
        documents = int(((span.reason == KEPT) & (span.side == 0)).sum())
        some = batch.take(pa.array(rows))
        ids, edges = self._encoded(some, tokenizer)
        ids, ends, lengths = ids.astype(token_dtype(tokenizer.vocab_size)), edges[1:], np.diff(edges)
        if len(lengths):
            longest = int(lengths.argmax())
            check_length(int(lengths[longest]), some.column("origin")[longest].as_py())
        repeats = periodic.find(ids, ends, blank_ids=tokenizer.blank_ids)
        count, inside = periodic.per_document(repeats, ends, ~repeats["blank"])
        columns = {
            "token_length": pa.array(lengths.astype(np.int32)),
            "repeat_count": pa.array(count),
            "repeat_tokens": pa.array(inside),
            "cluster": judged.hashes_of(span.cluster[rows], span.size[rows]),
            "cluster_size": pa.array(span.size[rows]),
        }
        for name, column in columns.items():
            some = record.set_column(some, name, column)
        some = some.drop_columns([name for name in ("text", SIGNATURE, record.REASON) if name in some.schema.names])
        tokens = int(ends[documents - 1]) if documents else 0
        meta = {
            "ids": len(ids),
            "repeats": len(repeats),
            "train": {
                "documents": documents,
                "tokens": tokens,
                "repeats": int(np.searchsorted(repeats["start"], tokens)),
            },
        }
        return work.commit(path, meta, lambda aside: _write_part(aside, some, ids, repeats))

    def _encoded(
        self, batch: pa.RecordBatch, tokenizer: Tokenizer
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Return the ids of the documents, each with its end of text, and where they begin and the last ends."""
        text, settings = batch.column("text"), self.settings
        if not (settings.fim_rate or settings.bpe_dropout):
            return tokenizer.encode_flat(text, threads=self.threads, end=True)
        hashes = exact.from_binary(batch.column("content_hash"))
        if settings.bpe_dropout:
            return BpeDropout(settings.bpe_dropout, settings.seed).encode(tokenizer, text, hashes, end=True)
        change = FillInTheMiddle(settings.fim_rate, settings.seed)
        return change.encode(tokenizer, text, hashes, threads=self.threads, end=True)


class Part(NamedTuple):
    """One side of an encoded block, as ``SplitWriter.add_block`` takes it."""

    ids: NDArray[np.unsignedinteger]
    rows: pa.RecordBatch
    repeats: NDArray[np.void]


def read_part(folder: Path, number: int, dtype: np.dtype[np.unsignedinteger]) -> tuple[Part, Part]:
    """Return the training and the held-out side of an encoded block.

    Raises:
        OSError: the part is not there or not whole.
    """
    path = part_path(folder, number)
    meta = work.committed(path)
    if meta is None:
        raise OSError(f"the work file '{path}' is damaged; remove the folder '{folder}' and start again")
    with pa.memory_map(os.fsencode(path)) as file:
        whole = file.read_buffer()
    at = meta["size"] - meta["ids"] * dtype.itemsize - meta["repeats"] * periodic.REPEAT.itemsize
    rows = pa.ipc.open_stream(whole[:at]).read_next_batch()
    ids = np.frombuffer(whole, dtype, meta["ids"], at)
    repeats = np.frombuffer(whole, periodic.REPEAT, meta["repeats"], at + ids.nbytes)
    documents, tokens, some = (meta["train"][name] for name in ("documents", "tokens", "repeats"))
    rest = repeats[some:].copy()
    rest["start"] -= tokens
    return (
        Part(ids[:tokens], rows.slice(0, documents), repeats[:some]),
        Part(ids[tokens:], rows.slice(documents), rest),
    )


def clean_path(folder: Path, number: int) -> Path:
    """Return the file of a cleaned block."""
    return folder / "clean" / f"{number:06}.arrow"


def part_path(folder: Path, number: int) -> Path:
    """Return the file of an encoded block."""
    return folder / "tokens" / f"{number:06}.part"


def read_batch(path: Path) -> pa.RecordBatch:
    """Return a cleaned block, memory-mapped: columns that are not looked at cost nothing."""
    with pa.memory_map(os.fsencode(path)) as file:
        return pa.ipc.open_file(file).get_batch(0)


def _write_batch(path: Path, batch: pa.RecordBatch) -> None:
    with path.open("wb") as file, pa.ipc.new_file(file, batch.schema) as out:
        out.write_batch(batch)


def _write_part(path: Path, rows: pa.RecordBatch, ids: NDArray[np.unsignedinteger], repeats: NDArray[np.void]) -> None:
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, rows.schema) as out:
            out.write_batch(rows)
        file.write(ids.data)
        file.write(repeats.tobytes())


@lru_cache(maxsize=1)
def _tokenizer(path: str, digest: str, fast: bool) -> Tokenizer:
    """Load the tokenizer with this hash once in each process; that the fast encoder can be trusted is known by then."""
    tokenizer = load(path)
    if fast:
        tokenizer.trust_fast()
    return tokenizer


def _binary(rows: NDArray[Any]) -> pa.Array:
    """Return the rows of a matrix as binary values of fixed width."""
    rows = np.ascontiguousarray(rows)
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.tobytes())])
