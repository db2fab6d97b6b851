"""How fast text becomes tokens, stage by stage, and how fast the loader makes batches.

Run: ``python benchmarks/data.py | tee benchmarks/results/data.txt`` (about a minute). The text is the standard
library's sources. Wall time with every core the machine has for encoding and vocabulary training (other work
on the machine slows it down: the load is printed); the loader and the readers use one core. Each figure is the
median of several runs with the lowest and the highest.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch

from poise.data import sources
from poise.data.loader import Loader
from poise.data.prepare import prepare
from poise.data.readers import Tally
from poise.data.store import open_tokens, verify

RUNS = 5
BATCHES = 400
SETUPS = ((256, 8), (2048, 8))
STAGES = ("sampling", "training tokenizer", "encoding", "sealing")


def stage_seconds(out: Path) -> dict[str, float]:
    """Prepare the standard library at ``out``; return the seconds of every stage, and of the whole."""
    begun: dict[str, float] = {}

    def note(stage: str, done: int, total: int | None) -> None:
        begun.setdefault(stage, time.perf_counter())

    start = time.perf_counter()
    prepare(sources.STDLIB, out, progress=note)
    end = time.perf_counter()
    edges = [begun[stage] for stage in STAGES] + [end]
    seconds = {stage: after - before for stage, before, after in zip(STAGES, edges[:-1], edges[1:], strict=True)}
    # Reading happens inside two stages; alone it shows what is left for the tokenizer.
    again = time.perf_counter()
    for _ in sources.documents(sources.resolve(sources.STDLIB), "text", Tally()):
        pass
    return {"reading alone": time.perf_counter() - again, **seconds, "whole": end - start}


def loader_rate(folder: Path, seq_len: int, batch: int, first: int) -> float:
    """Return tokens a second of the loader alone, from sample ``first`` on."""
    loader = Loader(open_tokens(folder), seq_len, seed=0)
    start = time.perf_counter()
    for number in range(BATCHES):
        loader.batch(first + number * batch, batch)
    return BATCHES * batch * seq_len / (time.perf_counter() - start)


def spread(values: list[float], digits: int) -> str:
    """Return "median (lowest to highest)"."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def cpu_name() -> str:
    """Return the processor's model name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{cpu_name()}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, ", end="")
    print(f"numpy {np.__version__}, tokenizers {tokenizers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as place:
        runs = [stage_seconds(Path(place) / str(run)) for run in range(RUNS)]
        folder = Path(place) / "0"
        counts = open_tokens(folder).manifest["splits"]
        size = sum(split["bytes"] for split in counts.values())
        tokens = sum(split["tokens"] for split in counts.values())
        print(f"\nprepare: {size / 1e6:.1f} MB of text, {tokens:,} tokens, vocabulary 8192; {RUNS} runs")
        print(f"{'stage':<20} {'seconds':>24} {'MB/s':>24}")
        for stage in runs[0]:
            seconds = [run[stage] for run in runs]
            print(f"{stage:<20} {spread(seconds, 2):>24} {spread([size / 1e6 / s for s in seconds], 1):>24}")
        for name, action in (("reuse", lambda: prepare(sources.STDLIB, folder)), ("verify", lambda: verify(folder))):
            times = []
            for _ in range(RUNS):
                start = time.perf_counter()
                action()
                times.append(1e3 * (time.perf_counter() - start))
            print(f"{name:<20} {spread(times, 1):>24} ms")
        print(f"\nloader alone, one core, batches of (B, T) int64; {RUNS} runs of {BATCHES} batches")
        print(f"{'B':>4} {'T':>6} {'million tokens/s':>26} {'microseconds/batch':>26}")
        for seq_len, batch in SETUPS:
            rates = [loader_rate(folder, seq_len, batch, run * 10_000) for run in range(RUNS)]
            micro = spread([1e6 * batch * seq_len / rate for rate in rates], 0)
            print(f"{batch:>4} {seq_len:>6} {spread([rate / 1e6 for rate in rates], 0):>26} {micro:>26}")


if __name__ == "__main__":
    main()
