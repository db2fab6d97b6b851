"""How long it takes to name the documents of a step: ``poise blame`` on a billion tokens and a long run.

Run: ``python benchmarks/data/blame.py | tee benchmarks/results/data_blame.txt`` (half a minute). Made, in a temporary
folder: prepared data of 10**9 tokens in 10**6 documents with every column filled (the token file is sparse: 2 GB that
take no disk, and every token is the same), a million repeats, and two runs with a journal of 100,000 steps each, of 8
and of 64 rows of 2,048 tokens. Measured in new processes, files in memory (page cache): ``open``, a ``Tracer`` (reads
the manifest and where the steps are in the journal); ``first``, the first step asked for; ``next``, further steps, each
from another place (all of them; the median, and 95 of 100 are below); ``window``, all documents of 20 steps.
Milliseconds of processor time; in brackets the lowest and the highest of the processes. Importing torch and the rest is
apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

TOKENS = 10**9
DOCUMENTS = 10**6
REPEATS = 10**6
STEPS = 100_000
SEQ_LEN = 2048
ROWS = (8, 64)
BLOCK = 2**14
ASKED = 100
PROCESSES = 5


# -- what is asked -------------------------------------------------------------------------------------------------


def lengths_of(rng: np.random.Generator) -> NDArray[np.int32]:
    """Return lengths of documents, spread as in real text, that add up to ``TOKENS``."""
    raw = rng.lognormal(0.0, 1.2, DOCUMENTS)
    lengths = np.maximum(2, raw / raw.sum() * TOKENS).astype(np.int64)
    lengths[int(lengths.argmax())] += TOKENS - int(lengths.sum())
    out: NDArray[np.int32] = lengths.astype(np.int32)
    return out


def columns(first: int, lengths: NDArray[np.int32], starts: NDArray[np.int64], rng: np.random.Generator) -> Any:
    """Return rows of ``docs.arrow``, from document ``first`` on."""
    from poise.data.store import DOCUMENT_SCHEMA

    count = len(lengths)
    numbers = range(first, first + count)
    digest = [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in numbers]
    sizes = 4 * lengths.astype(np.int64)
    struct = DOCUMENT_SCHEMA.field("scores").type
    scores = [pa.array(rng.random(count, np.float32)) for _ in range(struct.num_fields)]
    given: dict[str, Any] = {
        "token_start": starts,
        "token_length": lengths,
        "content_hash": digest,
        "source": ["web"] * count,
        "origin": [f"crawl/part-{n // 5000:05}.jsonl.gz:{n % 5000 + 1}" for n in numbers],
        "offset": 4 * starts,
        "bytes": sizes,
        "replaced_bytes": np.zeros(count, np.int64),
        "id": [f"doc-{n:09}" for n in numbers],
        "url": [f"https://example.org/{n % 977}/{n}.html" for n in numbers],
        "cluster": [each if n % 7 == 0 else None for n, each in zip(numbers, digest, strict=True)],
        "cluster_size": np.where(np.arange(first, first + count) % 7 == 0, 3, 1).astype(np.int32),
        "repeat_count": rng.integers(0, 40, count, np.int32),
        "repeat_tokens": rng.integers(0, 400, count, np.int32),
        "language": ["en"] * count,
        "scores": pa.StructArray.from_arrays(scores, fields=list(struct)),
    }
    arrays = []
    for field in DOCUMENT_SCHEMA:
        values = given[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=DOCUMENT_SCHEMA)


def make_data(folder: Path) -> str:
    """Write prepared data; return its fingerprint."""
    from poise.data import store
    from poise.data.look.odd import quantiles
    from poise.data.megatron_index import write_index
    from poise.data.tokens.periodic import REPEAT
    from poise.data.tokens.tokenizer import train

    rng = np.random.default_rng(0)
    folder.mkdir()
    lengths = lengths_of(rng)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    dtype = np.dtype("<u2")
    for name, some in (("train", lengths), ("val", lengths[:0])):
        write_index(folder / f"{name}.idx", some, dtype)
        with pa.ipc.new_file(str(folder / f"{name}.docs.arrow"), store.DOCUMENT_SCHEMA) as out:
            for first in range(0, len(some), BLOCK):
                out.write_batch(columns(first, some[first : first + BLOCK], starts[first : first + BLOCK], rng))
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(dtype.itemsize * int(some.sum(dtype=np.int64)))
        repeats = np.zeros(REPEATS if len(some) else 0, REPEAT)
        repeats["start"] = np.sort(rng.integers(0, TOKENS - 1000, len(repeats)))
        repeats["length"], repeats["count"], repeats["period"] = 120, 40, 3
        (folder / f"{name}.repeats.bin").write_bytes(repeats.tobytes())
    tokenizer = train([(__doc__ or "") * 3, Path(store.__file__).read_text(encoding="utf-8")], 512)
    (folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    counts = {"train": {"documents": DOCUMENTS, "tokens": TOKENS, "bytes": 4 * TOKENS}}
    counts["val"] = dict.fromkeys(counts["train"], 0)
    facts = {
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text},
        "splits": counts,
        "sources": [{"name": "web", "description": "made", "files": 200, "splits": counts}],
        "quantiles": quantiles(store.documents_table(folder, "train")),
    }
    store.seal(folder, facts)
    return store.open_tokens(folder).fingerprint


def make_run(folder: Path, data: Path, fingerprint: str, rows: int) -> None:
    """Write the folder of a run: the recipe, and a journal with the fields of a real one."""
    from poise.core import config
    from poise.core.journal import to_json
    from poise.train.recipe import DataConfig, Recipe, TrainConfig

    folder.mkdir()
    recipe = Recipe(
        data=DataConfig(source=str(data), dir=str(data)),
        train=TrainConfig(steps=STEPS, batch_size=rows, seq_len=SEQ_LEN),
    )
    (folder / "recipe.toml").write_text(config.to_toml(recipe), encoding="utf-8")
    head = {"format": 1, "recipe": config.to_dict(recipe), "command": "poise train", "environment": {}}
    with (folder / "journal.jsonl").open("w", encoding="utf-8") as file:
        run = {"type": "run", "time": 0.0, **head, "data": {"fingerprint": fingerprint}}
        file.write(to_json(run) + "\n")
        for step in range(1, STEPS + 1):
            record = {
                "type": "step",
                "time": 1.7e9 + step,
                "step": step,
                "loss": 3.0 + 1 / step,
                "grad_norm": 0.5,
                "lr": 3e-4,
                "tokens": step * rows * SEQ_LEN,
                "sample": (step - 1) * rows,
                "rows": rows,
                "action": "proceed",
                "seconds": 0.4123,
                "tokens_per_s": 123456.7,
                **{f"signal_{number}": 0.123456789 * number for number in range(12)},
            }
            file.write(to_json(record) + "\n")


# -- what is measured ----------------------------------------------------------------------------------------------


def milliseconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return processor milliseconds and the result."""
    start = time.process_time()
    result = action()
    return 1e3 * (time.process_time() - start), result


def ask(folder: str) -> dict[str, Any]:
    """Open a run and ask for steps; return the milliseconds."""
    import torch

    from poise.train.blame import Tracer

    torch.set_num_threads(1)
    imported = 1e3 * time.process_time()
    rng = np.random.default_rng(1)
    opened, tracer = milliseconds(lambda: Tracer(folder))
    steps = rng.integers(20, STEPS, ASKED + 1).tolist()
    first, blame = milliseconds(lambda: tracer.blame(steps[0]))
    later = [milliseconds(partial(tracer.blame, step))[0] for step in steps[1:]]
    window, _ = milliseconds(lambda: tracer.around(steps[0], 20))
    return {
        "import": imported,
        "open": opened,
        "first": first,
        "next": statistics.median(later),
        "next, 95 %": float(np.quantile(later, 0.95)),
        "window of 20": window,
        "documents": sum(len(row.documents) for row in blame.rows),
    }


def spread(values: Iterable[float]) -> str:
    """Return "median (lowest to highest)"."""
    values = list(values)
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Make, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=PROCESSES, help="how often each run is opened anew")
    times = parser.parse_args().processes
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{platform.machine()}, {os.cpu_count()} cores{load}; Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        took, fingerprint = milliseconds(lambda: make_data(data))
        on_disk = sum(512 * path.stat().st_blocks for path in data.iterdir())
        made = f"{TOKENS:,} tokens, {DOCUMENTS:,} documents, {REPEATS:,} repeats"
        print(f"{made}: {on_disk / 1e6:.0f} MB on the disk, {took / 1e3:.0f} cpu-s to make")
        print(
            f"{STEPS:,} steps of sequences of {SEQ_LEN:,}; cpu-ms, {times} processes for each run, {ASKED} steps asked"
        )
        runs = {rows: Path(place) / f"rows-{rows}" for rows in ROWS}
        found: dict[int, list[dict[str, Any]]] = {rows: [] for rows in ROWS}
        for rows, folder in runs.items():
            make_run(folder, data, fingerprint, rows)
        for _ in range(times):
            for rows, folder in runs.items():
                words = [sys.executable, str(Path(__file__).resolve()), "--ask", str(folder)]
                done = subprocess.run(words, stdout=-1, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
                found[rows].append(json.loads(done.stdout))
        names = list(found[ROWS[0]][0])
        print(f"\n{'rows':>12} " + " ".join(f"{f'{rows} rows':>24}" for rows in ROWS))
        for name in names:
            cells = [spread(each[name] for each in found[rows]) for rows in ROWS]
            print(f"{name:>12} " + " ".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    if "--ask" in sys.argv:
        print(json.dumps(ask(sys.argv[2])))
    else:
        main()
