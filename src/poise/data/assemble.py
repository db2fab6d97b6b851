"""Putting encoded blocks together, and keeping what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from poise.data import record, store, work
from poise.data.judge import KEPT, Judgement
from poise.data.pipeline import SIGNATURE, clean_path, read_batch, read_part
from poise.data.sources import Source
from poise.data.writer import SplitWriter

_FILE_BYTES: Final = 256 * 2**20  # text in one file of what was dropped


def assemble(
    folder: Path,
    final: Path,
    metas: Sequence[work.Meta],
    sources: Sequence[Source],
    dtype: np.dtype[np.unsignedinteger],
    progress: Callable[[str, int, int | None], None],
) -> dict[str, Any]:
    """Put the encoded blocks of a work folder together; return the manifest's ``splits`` and ``sources``.

    Blocks of one source follow each other, so each source fills one span of tokens.
    """
    writers = {name: SplitWriter(final, name, dtype) for name in store.SPLITS}
    done, total = 0, sum(meta["bytes"] for meta in metas)
    of_source = [{name: Counter[str]() for name in store.SPLITS} for _ in sources]
    try:
        for number, meta in enumerate(metas):
            for (name, writer), part in zip(writers.items(), read_part(folder, number, dtype), strict=True):
                before = writer.counts()
                writer.add_block(part.ids, part.rows, part.repeats)
                of_source[meta["source"]][name].update(writer.counts() - before)
            done += meta["bytes"]
            progress("writing", done, total)
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    per_source = [
        {
            "name": one.name,
            "description": one.description.encode("utf-8", "replace").decode(),
            "files": len(one.files),
            "splits": {name: _counts(counts) for name, counts in of_source[index].items()},
        }
        for index, one in enumerate(sources)
    ]
    return {"splits": {name: _counts(writer.counts()) for name, writer in writers.items()}, "sources": per_source}


def _counts(counts: Counter[str]) -> dict[str, int]:
    return {what: counts[what] for what in ("documents", "tokens", "bytes")}


def write_dropped(folder: Path, final: Path, blocks: int, judgement: Judgement) -> None:
    """Write what was left out, with its reason, to ``dropped/*.parquet``."""
    out: pq.ParquetWriter | None = None
    files = written = 0
    try:
        for number in range(blocks):
            batch = _dropped_of(folder, number, judgement)
            if batch.num_rows == 0:
                continue
            if out is not None and written >= _FILE_BYTES:
                out.close()
                out = None
            if out is None:
                (final / store.DROPPED).mkdir(exist_ok=True)
                path = final / store.DROPPED / f"{files:05}.parquet"
                out, files, written = pq.ParquetWriter(path, batch.schema, compression="zstd"), files + 1, 0
            out.write_batch(batch)
            written += pc.sum(batch.column("bytes")).as_py()
    finally:
        if out is not None:
            out.close()


def _dropped_of(folder: Path, number: int, judgement: Judgement) -> pa.RecordBatch:
    """Return the documents of a block that were left out, with their final reasons."""
    verdicts = judgement.block(number)
    rows = np.flatnonzero(verdicts.reason != KEPT)
    batch = read_batch(clean_path(folder, number)).take(pa.array(rows))
    if SIGNATURE in batch.schema.names:
        batch = batch.drop_columns([SIGNATURE])
    reasons = pa.array(judgement.reasons, pa.string()).take(pa.array(verdicts.reason[rows]))
    batch = record.set_column(batch, record.REASON, reasons)
    cluster = judgement.hashes_of(verdicts.cluster[rows], verdicts.size[rows])
    return record.set_column(batch, "cluster", cluster)
