"""What the same work costs in datatrove: filters, MinHash, tokenising.

Run by ``chain.py --datatrove-python PYTHON``; alone: ``PYTHON benchmarks/data/peers_datatrove.py SHARD.jsonl
TOKENIZER.json FOLDER --mb 5`` where PYTHON has ``datatrove[io,processing]`` and ``spacy``. Prints one JSON object with
processor seconds. Needs no poise.

``stages``: each stage on every document, alone, with the documents in memory; a filter stops at its first rule that
fails, as it does in use. ``chain``: FineWeb's order, a document that a filter drops goes no further, near-duplicates
go, what is left is tokenised. datatrove's own files between its jobs (documents written and read again) are left out,
in its favour; one process and no executor, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer
from loguru import logger

BUCKETS = 14


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return processor seconds and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def filters() -> dict[str, Any]:
    """Return the filters of FineWeb's chain in its order."""
    return {
        "Gopher repetition": GopherRepetitionFilter(),
        "Gopher quality": GopherQualityFilter(),
        "C4 quality": C4QualityFilter(),
        "FineWeb quality": FineWebQualityFilter(),
    }


def passed(step: Any, documents: Sequence[Document]) -> list[Document]:
    """Return the documents that a filter keeps."""
    kept = []
    for document in documents:
        verdict = step.filter(document)
        if (verdict[0] if isinstance(verdict, tuple) else verdict) is True:
            kept.append(document)
    return kept


def near_duplicates(documents: Sequence[Document], folder: Path) -> tuple[dict[str, float], list[Document]]:
    """Return the seconds of each of MinHash's four jobs, and the documents that stay."""
    signatures, buckets, gone = (str(folder / name) for name in ("signatures", "buckets", "gone"))
    seconds: dict[str, float] = {}
    seconds["MinHash signatures"], _ = timed(lambda: list(MinhashDedupSignature(signatures).run(documents, 0, 1) or ()))

    def join() -> None:
        for bucket in range(BUCKETS):
            MinhashDedupBuckets(signatures, buckets).run(None, bucket, BUCKETS)

    seconds["MinHash buckets"], _ = timed(join)
    seconds["MinHash cluster"], _ = timed(lambda: MinhashDedupCluster(buckets, gone).run(None, 0, 1))
    seconds["MinHash filter"], left = timed(lambda: list(MinhashDedupFilter(gone).run(documents, 0, 1)))
    return seconds, left


def tokenise(documents: Sequence[Document], tokenizer: str, folder: Path) -> None:
    """Write the tokens of the documents, unshuffled."""
    step = DocumentTokenizer(str(folder / "tokens"), tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
    step.run(iter(documents), 0, 1)


def read(shard: Path, limit: float) -> list[Document]:
    """Return the first documents of a shard up to ``limit`` bytes."""
    documents: list[Document] = []
    size = 0
    for document in JsonlReader(str(shard.parent), glob_pattern=shard.name).run():
        size += len(document.text.encode())
        if size > limit:
            break
        documents.append(document)
    return documents


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shard", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("folder", type=Path, help="an empty folder for what datatrove writes")
    parser.add_argument("--mb", type=float, default=1000, help="so much of it")
    options = parser.parse_args()
    logger.remove()
    for step in filters().values():  # the word splitter's start is not the filters' work
        step.filter(Document(text="It was a day. And the day was long, as days of that kind are.", id="0"))
    seconds, documents = timed(lambda: read(options.shard, options.mb * 1e6))
    stages = {"read": seconds}
    for name, step in filters().items():
        some = copy.deepcopy(documents)  # C4's filter edits the text
        stages[name], _ = timed(partial(passed, step, some))
    minhash, _ = near_duplicates(documents, options.folder / "all")
    stages |= minhash
    stages["tokenise"], _ = timed(lambda: tokenise(documents, options.tokenizer, options.folder / "all"))
    size = sum(len(document.text.encode()) for document in documents)

    left = copy.deepcopy(documents)
    chain = stages["read"]
    for step in filters().values():
        seconds, left = timed(partial(passed, step, left))
        chain += seconds
    minhash, left = near_duplicates(left, options.folder / "left")
    chain += sum(minhash.values())
    seconds, _ = timed(lambda: tokenise(left, options.tokenizer, options.folder / "left"))
    chain += seconds
    found = {
        "name": f"datatrove {version('datatrove')}",
        "bytes": size,
        "documents": len(documents),
        "stages": stages,
        "chain": chain,
        "left": len(left),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
