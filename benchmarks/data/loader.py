"""How fast the loader alone makes batches: plain, with repeats masked, packed, with document numbers, mixed.

Run: ``python benchmarks/data/corpus.py CORPUS`` once, then ``python benchmarks/data/feed/loader.py CORPUS | tee
benchmarks/results/data_loader.txt`` (a minute). The first four files of the corpus are prepared as four sources
(vocabulary 8192). A batch is (B, T) int64 inputs and targets as a training step gets them; samples follow each other,
as in training, from a new epoch in each run. Million tokens (B * T per batch) a second of processor time, one thread,
token file in memory (page cache); all ways in turns, the median of the runs and in brackets the lowest and the highest.
``open`` is what making the loader and its first batch take, before any of that.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
import torch

from poise.data.feed.loader import Feed, Loader
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.data.store import Tokens, open_tokens

SHARDS = 4
RUNS = 5
BATCHES = 400
SETUPS = ((8, 256), (8, 2048), (64, 2048))
MIX = ("a=4", "b=3", "c=2", "d=1")
FEEDS = {
    "concat": Feed(mask_repeats=False),
    "concat, repeats masked": Feed(),
    "best fit": Feed(mask_repeats=False, pack="best_fit"),
    "best fit, repeats masked": Feed(pack="best_fit"),
    "concat, document numbers": Feed(mask_repeats=False, document_mask=True),
    "concat, documents, repeats": Feed(document_mask=True),
    "best fit, documents, repeats": Feed(pack="best_fit", document_mask=True),
    "mix of four, concat": Feed(mask_repeats=False, mix=MIX),
    "mix of four, repeats masked": Feed(mix=MIX),
}
"""The second is the default."""


def rate(loader: Loader, batch: int, first: int) -> float:
    """Return million tokens a processor second, from sample ``first`` on."""
    start = time.process_time()
    for number in range(BATCHES):
        loader.batch(first + number * batch, batch)
    return BATCHES * batch * loader.seq_len / (time.process_time() - start) / 1e6


def opened(tokens: Tokens, seq_len: int, feed: Feed, batch: int) -> tuple[float, Loader]:
    """Return a loader that has made a batch, and the milliseconds it took."""
    start = time.process_time()
    loader = Loader(tokens, seq_len, seed=0, feed=feed)
    loader.batch(0, batch)
    return 1e3 * (time.process_time() - start), loader


def masked(loader: Loader, batch: int) -> float:
    """Return the share of targets that do not count."""
    seen = [loader.batch(number * batch, batch).targets for number in range(100)]
    return float(np.mean([(targets < 0).float().mean() for targets in seen]))


def spread(values: Sequence[float]) -> str:
    """Return "median (lowest to highest)"."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder that corpus.py wrote")
    corpus = parser.parse_args().corpus
    torch.set_num_threads(1)
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{platform.machine()}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, ", end="")
    print(f"numpy {np.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as place:
        shards = sorted(corpus.glob("*.jsonl"))[:SHARDS]
        named = [f"{name}={path}" for name, path in zip("abcd", shards, strict=True)]
        made = prepare(named, Path(place) / "prepared", Settings())
        tokens = open_tokens(made.dir)
        facts = tokens.manifest["splits"]["train"]
        print(f"{facts['tokens'] / 1e6:.1f} million tokens of {facts['documents']:,} documents in {SHARDS} sources")
        for batch, seq_len in SETUPS:
            loaders = {name: opened(tokens, seq_len, feed, batch) for name, feed in FEEDS.items()}
            rates: dict[str, list[float]] = {name: [] for name in loaders}
            for run in range(RUNS):
                for name, (_, loader) in loaders.items():
                    rates[name].append(rate(loader, batch, run * loader.sequences))
            print(f"\nB = {batch}, T = {seq_len}; {RUNS} runs of {BATCHES} batches")
            print(f"{'':<30} {'million tokens/cpu-s':>26} {'us/batch':>9} {'masked':>7} {'open, ms':>9}")
            for name, (took, loader) in loaders.items():
                micro = batch * seq_len / statistics.median(rates[name])
                share = f"{masked(loader, batch):.2%}"
                print(f"{name:<30} {spread(rates[name]):>26} {micro:>9.0f} {share:>7} {took:>9.0f}")


if __name__ == "__main__":
    main()
