"""What each stage of ``poise data prepare`` costs alone, on text that is in memory already.

Run by ``chain.py``; alone: ``python benchmarks/data/stages.py CORPUS TOKENIZER.json`` (CORPUS as ``corpus.py`` writes
it). Prints one JSON object: the bytes of text each stage saw and its processor seconds; all threads are counted, and
there is one (the environment says so before anything is imported). Every stage sees the whole text but "encode,
tokenizers", which sees every eighth block.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data import record, sources, store, work
from poise.data.clean.features import Score
from poise.data.clean.filters import Filter
from poise.data.clean.lines import CleanLines
from poise.data.clean.pii import MaskPII
from poise.data.dedup import clusters, exact, minhash
from poise.data.dedup.contamination import Decontaminate, Index
from poise.data.readers import Tally
from poise.data.tokens import periodic
from poise.data.tokens.tokenizer import Tokenizer, load
from poise.data.writer import SplitWriter

Result = TypeVar("Result")
Batches = list[pa.RecordBatch]

PART = 8  # every so manieth block is encoded by the slow encoder
CHECKED = 1_000_000  # bytes on which prepare compares the encoders


class Costs:
    """Bytes of text and processor seconds by stage."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, float]] = {}

    def take(self, name: str, size: int, action: Callable[[], Result]) -> Result:
        """Run a stage over ``size`` bytes of text and note what it took."""
        start = time.process_time()
        result = action()
        self.found[name] = (size, time.process_time() - start)
        return result


def read(corpus: str) -> Batches:
    """Return the corpus in blocks."""
    source = sources.resolve(corpus)
    return [record.of(group) for group in record.groups(sources.documents(source, "text", Tally()))]


def bytes_of(batches: Batches) -> int:
    """Return the bytes of text in blocks."""
    return sum(len(record.flat(batch.column("text"))[0]) for batch in batches)


def row_wise(costs: Costs, batches: Batches, size: int) -> None:
    """Measure the stages that see one block at a time."""
    scored = costs.take("score (all features)", size, lambda: [Score()(batch) for batch in batches])
    for preset in ("web", "manuals"):
        costs.take(f"filter {preset}, scored", size, partial(list, map(Filter(preset), scored)))
    costs.take("clean lines (C4)", size, lambda: [CleanLines()(batch) for batch in batches])
    costs.take("mask PII", size, lambda: [MaskPII()(batch) for batch in batches])
    index = Index.of(topics.values())
    check = Decontaminate(index, "topics")
    costs.take("decontamination", size, lambda: [check(batch) for batch in batches])


def duplicates(costs: Costs, batches: Batches, size: int) -> None:
    """Measure hashes, signatures and the search for clusters."""
    hashes = costs.take(
        "hashes (blake2b-128)", size, lambda: np.concatenate([exact.hashes(b.column("text")) for b in batches])
    )

    def signed(backend: minhash.Backend) -> NDArray[np.uint32]:
        return np.concatenate([minhash.signatures(b.column("text"), backend=backend) for b in batches])

    costs.take("signatures, rensa", size, partial(signed, "rensa"))
    signatures = costs.take("signatures, numpy", size, partial(signed, "numpy"))

    def join() -> Any:
        labels = clusters.merge(clusters.exact(hashes), clusters.near(signatures))
        return clusters.keep(labels, hashes)

    costs.take("clusters (exact, near, keep)", size, join)


def sample(batches: Batches) -> list[str]:
    """Return some texts of about ``CHECKED`` bytes from all blocks."""
    each = CHECKED // len(batches)
    return [batch.column("text")[0].as_py()[:each] for batch in batches]


def encode(batches: Batches, tokenizer: Tokenizer) -> list[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """Return ids and offsets of every block."""
    return [tokenizer.encode_flat(batch.column("text"), end=True) for batch in batches]


def tokens(costs: Costs, batches: Batches, size: int, tokenizer: Tokenizer) -> None:
    """Measure encoding, the search for repeats, writing and sealing."""
    some = batches[::PART]
    costs.take("encode, tokenizers", bytes_of(some), lambda: encode(some, tokenizer))
    verdict = costs.take("check of the fast encoder", size, lambda: tokenizer.accelerate(sample(batches)))
    assert tokenizer.is_fast, verdict
    encoded = costs.take("encode, gigatoken", size, lambda: encode(batches, tokenizer))
    dtype = store.token_dtype(tokenizer.vocab_size)
    small = [(ids.astype(dtype), offsets) for ids, offsets in encoded]
    blank = tokenizer.blank_ids
    repeats = costs.take(
        "repeats", size, lambda: [periodic.find(ids, edges[1:], blank_ids=blank) for ids, edges in small]
    )
    rows = []
    for batch, (_, edges) in zip(batches, small, strict=True):
        text = batch.column("text")
        row = record.set_column(batch, "token_length", pa.array(np.diff(edges).astype(np.int32)))
        row = record.set_column(row, "content_hash", exact.to_binary(exact.hashes(text)))
        row = record.set_column(row, "bytes", pa.array(np.diff(record.flat(text)[1])))
        rows.append(row.drop_columns(["text", record.REASON]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def write() -> None:
            writers = {name: SplitWriter(folder, name, dtype) for name in store.SPLITS}
            for (ids, _), row, found in zip(small, rows, repeats, strict=True):
                writers["train"].add_block(ids, row, found)
            for writer in writers.values():
                writer.close()

        costs.take("write tokens", size, write)
        (folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        costs.take("seal (hash, fsync)", size, lambda: store.seal(folder, {}))
        costs.take("work file: write, check", size, lambda: work_files(folder, batches))


def work_files(folder: Path, batches: Batches) -> None:
    """Write cleaned blocks as prepare does between its passes."""

    def save(batch: pa.RecordBatch, path: Path) -> None:
        with path.open("wb") as file, pa.ipc.new_file(file, batch.schema) as out:
            out.write_batch(batch)

    for number, batch in enumerate(batches):
        work.commit(folder / "clean" / str(number), {}, partial(save, batch))


def main() -> None:
    """Measure and print."""
    corpus, tokenizer = sys.argv[1:]
    costs = Costs()
    batches = costs.take("read (JSON lines)", 0, lambda: read(corpus))
    size = bytes_of(batches)
    costs.found["read (JSON lines)"] = (size, costs.found["read (JSON lines)"][1])
    row_wise(costs, batches, size)
    duplicates(costs, batches, size)
    tokens(costs, batches, size, load(tokenizer))
    print(json.dumps(costs.found))


if __name__ == "__main__":
    main()
