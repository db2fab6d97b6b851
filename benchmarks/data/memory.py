"""Peak memory of ``poise data prepare`` on a large corpus, with filters, near-duplicates and a vocabulary of its own.

The corpus is made here and removed in the end: JSON lines of sentences of pseudo-random words (drawn as Zipf's law
says, the common English words first, so that the published filters keep most of it). Of a hundred documents, ``NEAR``
are copies of an earlier one with one word in eighty replaced, ``EXACT`` are copies letter by letter, ``BAD`` repeat one
line.

Resident memory is read from /proc for the command and all its children every 20 ms; pages shared by two processes are
counted twice. ``anonymous`` is the part that the system cannot drop and read again from a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

COMMON: Final = re.findall(
    r"\w+",
    "the of and to a in that is was he for it with as his on be at by i this had not are but from or have "
    "an they which one you were her all she there would their we him been has when who will more no if "
    "out so said what ",
)
VOCABULARY: Final = 60_000
NEAR, EXACT, BAD = 10, 3, 2
SHORTEST, LONGEST = 80, 900  # words
RECENT: Final = 2_000  # a copy is of one of the last so many documents
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
EVERY: Final = 0.02


def vocabulary(rng: np.random.Generator) -> NDArray[np.object_]:
    """Return different words, the common ones first."""
    letters = np.array(list(string.ascii_lowercase))
    words = dict.fromkeys(COMMON)
    while len(words) < VOCABULARY:
        words["".join(rng.choice(letters, rng.integers(3, 11)))] = None
    return np.array(list(words), object)


def sentences(words: list[str]) -> str:
    """Return words as lines of a few sentences, about 14 words each."""
    parts = []
    for at in range(0, len(words), 14):
        sentence = " ".join(words[at : at + 14])
        parts.append(f"{sentence[0].upper()}{sentence[1:]}.{chr(10) if at % 56 == 42 else ' '}")
    return "".join(parts).strip()


def write_corpus(path: Path, size: int, seed: int) -> dict[str, int]:
    """Write JSON lines of ``size`` bytes; return what is in them."""
    rng = np.random.default_rng(seed)
    known = vocabulary(rng)
    edges = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    counts = {"documents": 0, "bytes": 0, "near copies": 0, "exact copies": 0, "of one line": 0}
    recent: list[NDArray[np.int64]] = []
    with path.open("w", encoding="ascii") as out:
        while counts["bytes"] < size:
            kind, replaced = int(rng.integers(100)), 0
            if kind < NEAR + EXACT and len(recent) == RECENT:
                ranks = recent[int(rng.integers(RECENT))]
                if kind < NEAR:
                    ranks, replaced = ranks.copy(), -(-len(ranks) // 80)
                    ranks[rng.integers(len(ranks), size=replaced)] = rng.integers(VOCABULARY, size=replaced)
                counts["near copies" if replaced else "exact copies"] += 1
            else:
                drawn = rng.random(int(rng.integers(SHORTEST, LONGEST))) * edges[-1]
                ranks = np.searchsorted(edges, drawn, side="right")
                recent.append(ranks)
                if len(recent) > RECENT:
                    recent.pop(int(rng.integers(RECENT)))
            text = sentences(known[ranks].tolist())
            if kind >= 100 - BAD:
                text, counts["of one line"] = "\n".join([text[:80]] * 20), counts["of one line"] + 1
            number = counts["documents"]
            row = {"id": f"d{number}", "url": f"https://host{number % 997}.example/{number}", "text": text}
            counts["bytes"] += out.write(json.dumps(row) + "\n")
            counts["documents"] += 1
    return counts


@dataclass
class Watch:
    """The largest memory of a process and its children, in bytes, for each stage and in all."""

    pid: int
    stage: str = "start"
    resident: dict[str, int] = field(default_factory=dict)
    anonymous: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: int = 0

    def run(self, ended: threading.Event) -> None:
        """Sample until told that it has ended."""
        before = time.perf_counter()
        while not ended.wait(EVERY):
            resident = anonymous = 0
            for pid in _tree(self.pid):
                try:
                    facts = Path(f"/proc/{pid}/statm").read_text().split()
                except OSError:  # it has ended meanwhile
                    continue
                resident += int(facts[1]) * PAGE
                anonymous += (int(facts[1]) - int(facts[2])) * PAGE
            stage, now = self.stage, time.perf_counter()
            self.resident[stage] = max(resident, self.resident.get(stage, 0))
            self.anonymous[stage] = max(anonymous, self.anonymous.get(stage, 0))
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - before
            before, self.samples = now, self.samples + 1


def _tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def stage_of(line: str) -> str | None:
    """Return the stage that a line of progress is about."""
    if line.startswith("sealing:"):  # its end, and that of the preparation
        return "counts for the user"
    begins = line.rstrip().endswith("...")
    return line.partition(":")[0].rstrip(" .\n") if begins else None


def measured(command: list[str]) -> tuple[int, Watch, float, float, str]:
    """Run a command; return its exit code, memory, wall and processor seconds, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = threading.Event()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        watch = Watch(process.pid)
        sampler = threading.Thread(target=watch.run, args=(ended,))
        sampler.start()
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            watch.stage = stage_of(line) or watch.stage
            print(f"  {line}", end="", file=sys.stderr, flush=True)
        printed = process.stdout.read()
        code = process.wait()
        ended.set()
        sampler.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, watch, time.perf_counter() - start, used, printed


def main() -> int:
    """Make the corpus, prepare it, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the corpus and the result are put (and removed)")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes that must not be exceeded")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"$ {' '.join(['python', 'benchmarks/data/memory.py', 'FOLDER', *sys.argv[2:]])}")
    libraries = ", ".join(f"{name} {__import__(name).__version__}" for name in ("numpy", "pyarrow", "tokenizers"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; {libraries}")
    options.folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="poise-memory-", dir=options.folder))
    try:
        start = time.perf_counter()
        counts = write_corpus(place / "corpus.jsonl", round(options.gigabytes * 1e9), options.seed)
        made = time.perf_counter() - start
        print("corpus: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + f"; {made:.0f} s")
        words = ["poise", "data", "prepare", "corpus.jsonl", "--out", "tokens", "--filters", "gopher"]
        words += ["gopher_repetition", "--dedup", "near", "--processes", str(options.processes), "--json"]
        print(f"$ {' '.join(words)}")
        real = [str(place / word) if word in ("corpus.jsonl", "tokens") else word for word in words[1:]]
        code, watch, wall, used, printed = measured([sys.executable, "-m", "poise.cli.main", *real])
        if code:
            print(f"failed with exit code {code}")
            return 1
        facts = json.loads(printed)
        dropped = ", ".join(f"{reason} {each['documents']:,}" for reason, each in facts["dropped"].items())
        print(f"kept {facts['documents']:,} documents, {facts['tokens']:,} tokens; dropped: {dropped}")
        print(f"\n{'stage':<24} {'seconds':>8} {'resident MB':>12} {'anonymous MB':>13}")
        for stage, seconds in watch.seconds.items():
            resident, anonymous = watch.resident[stage] / 1e6, watch.anonymous[stage] / 1e6
            print(f"{stage:<24} {seconds:8.1f} {resident:12.0f} {anonymous:13.0f}")
        peak, anonymous = max(watch.resident.values()), max(watch.anonymous.values())
        print(f"{'whole':<24} {wall:8.1f} {peak / 1e6:12.0f} {anonymous / 1e6:13.0f}   ({watch.samples:,} samples)")
        speed = counts["bytes"] / 1e6 / used
        print(f"\n{used:.0f} processor seconds, {speed:.1f} MB/cpu-s of the corpus as it lies on disk")
        held = peak <= options.limit * 1e9
        print(f"peak {peak / 1e6:.0f} MB: {'under' if held else 'OVER'} the limit of {options.limit * 1e3:.0f} MB")
        return 0 if held else 1
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
