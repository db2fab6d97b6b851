"""What the comparable work costs in dolma: its taggers that need no download, and its tokens.

Run by ``chain.py --dolma-python PYTHON``; alone: ``PYTHON benchmarks/data/peers_dolma.py SHARD.jsonl TOKENIZER.json
FOLDER --mb 5`` where PYTHON has ``dolma``. Prints one JSON object with processor seconds. Needs no poise.

``stages``: each on every document, the taggers called as its own processor calls them (a document in, spans out). What
it does with them (attribute files, its mixer) is left out, in its favour. dolma has no search for near-duplicates (a
Bloom filter of equal paragraphs only), so there is none in its sum.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

with contextlib.redirect_stderr(io.StringIO()):  # it asks for a word list that its taggers here do not use
    from dolma.core.data_types import InputSpec
    from dolma.core.registry import TaggerRegistry
    from dolma.tokenizer.tokenizer import tokenize_file

TAGGERS = {
    "Gopher quality": "gopher_v2",
    "repetitions": "repetitions_v1",
    "C4 quality": "c4_v2",
    "PII": "pii_regex_v2",
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return processor seconds and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def old_form(tokenizer: Path, folder: Path) -> Path:
    """Write the tokenizer as the old ``tokenizers`` that dolma asks for reads it: a merge is one text."""
    content = json.loads(tokenizer.read_bytes())
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(shard: Path, limit: float) -> list[InputSpec]:
    """Return the first documents of a shard up to ``limit`` bytes."""
    documents, size = [], 0
    with shard.open("rb") as file:
        for line in file:
            record = json.loads(line)
            size += len(record["text"].encode())
            if size > limit:
                break
            documents.append(InputSpec(id=record["id"], text=record["text"], source="corpus"))
    return documents


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shard", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path, help="an empty folder for what is written")
    parser.add_argument("--mb", type=float, default=1000, help="so much of it")
    options = parser.parse_args()
    stages: dict[str, float] = {}
    stages["read"], documents = timed(lambda: read(options.shard, options.mb * 1e6))
    for name, tagger in TAGGERS.items():
        step = TaggerRegistry.get(tagger)()
        step.tag(documents[0])
        stages[name], _ = timed(partial(list, map(step.tag, documents)))
    shard = options.folder / "slice.jsonl"
    with shard.open("w", encoding="utf-8") as file:
        for document in documents:
            record = {"id": document.id, "text": document.text, "source": document.source}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    tokenizer = old_form(options.tokenizer, options.folder)
    stages["tokenise"], _ = timed(
        lambda: sum(
            len(one.tokens) for one in tokenize_file(str(tokenizer), str(shard), eos_token_id=0, pad_token_id=0)
        )
    )
    found = {
        "name": f"dolma {version('dolma')}",
        "bytes": sum(len(document.text.encode()) for document in documents),
        "documents": len(documents),
        "stages": stages,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
