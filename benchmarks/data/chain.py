"""How fast text becomes training data: every stage, the whole of ``poise data prepare``, and the same work elsewhere.

Run: ``python benchmarks/data/corpus.py CORPUS`` once, then ``python benchmarks/data/chain.py CORPUS --datatrove-python
PYTHON1 --dolma-python PYTHON2 | tee benchmarks/results/data_chain.txt`` (6 minutes of processor time, 2 of them for
the peers, each of which has an environment of its own, see ``peers_datatrove.py`` and ``peers_dolma.py``).

MB (10**6 bytes of UTF-8 text read) per second of processor time of one process with one thread, so other work on the
machine and waiting for the disk do not count. Every measurement is a process of its own, all of them in turns, as often
as ``--runs`` and ``--peer-runs`` say: the median, and in brackets the lowest and the highest. ``whole`` is ``prepare``
with one process: reading, all features, filters, hashes, MinHash near-duplicates, encoding with a vocabulary of 32,768
ids made beforehand (its training is shown apart), repeats, writing, sealing, work files and start of the process
included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
FAST = ("gigatoken", "rensa")
VOCABULARY = 32_768
TRAINED_ON = 10_000_000
STAGE_SHARDS = 4
PEERS = ("datatrove", "dolma")
WEB = {"filters": ["web"], "dedup": "near"}
MANUALS = {"filters": ["manuals"], "dedup": "near"}
WHOLE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "all kept": ("corpus", {"dedup": "near"}),
    "manuals": ("corpus", MANUALS),
    "manuals, lines cleaned, PII masked": ("corpus", {**MANUALS, "clean_lines": True, "mask_pii": True}),
    "web": ("corpus", WEB),
    "shard: manuals": ("shard", MANUALS),
    "shard: manuals, MinHash by rensa": ("shard", {**MANUALS, "minhash": "rensa"}),
    "shard: manuals, without fast": ("shard", {**MANUALS, "without_fast": True}),
    "slice: all kept": ("slice", {"dedup": "near"}),
    "slice: web, lines cleaned": ("slice", {**WEB, "clean_lines": True}),
}
"""Name -> (text, settings). ``shard`` is the corpus' first file, ``slice`` what the peers get: in small texts the start
and the check of the fast encoder (on 1 MB) weigh more."""

CHAIN = (
    "read (JSON lines)",
    "score (all features)",
    "filter web, scored",
    "clean lines (C4)",
    "hashes (blake2b-128)",
    "signatures, numpy",
    "clusters (exact, near, keep)",
    "check of the fast encoder",
    "encode, gigatoken",
    "repeats",
    "write tokens",
    "seal (hash, fsync)",
    "work file: write, check",
)
"""The stages of the chain that the peers are compared with."""


# -- one measurement, in a process of its own ----------------------------------------------------------------------


def whole(text: str, tokenizer: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """Prepare ``text`` once; return processor seconds by stage, counts and the most memory."""
    if wanted.pop("without_fast", False):
        for name in FAST:
            sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    from poise.data.prepare import prepare
    from poise.data.settings import Settings

    edges: dict[str, float] = {}

    def note(stage: str, done: int, total: int | None) -> None:
        edges.setdefault(stage, time.process_time())

    wanted["filters"] = tuple(wanted.get("filters", ()))
    with tempfile.TemporaryDirectory() as place:
        made = prepare(text, Path(place) / "out", Settings(tokenizer=tokenizer, **wanted), progress=note)
        end = time.process_time()
    facts = made.manifest
    names, begins = ["start", *edges], [0.0, *edges.values(), end]
    return {
        "seconds": end,
        "stages": {name: begins[i + 1] - begins[i] for i, name in enumerate(names)},
        "documents": facts["read"]["documents"],
        "kept": sum(split["documents"] for split in facts["splits"].values()),
        "tokens": sum(split["tokens"] for split in facts["splits"].values()),
        "encoder": facts["libraries"]["encoder"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def trained(corpus: str, out: str) -> dict[str, Any]:
    """Train a vocabulary on the corpus' first texts and write it; return the seconds."""
    from poise.data.tokens.tokenizer import train

    texts, size = [], 0
    with min(Path(corpus).glob("*.jsonl")).open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > TRAINED_ON:
                break
    start = time.process_time()
    tokenizer = train(texts, VOCABULARY)
    seconds = time.process_time() - start
    Path(out).write_text(tokenizer.to_json(), encoding="utf-8")
    return {"seconds": seconds, "bytes": size}


# -- all measurements ----------------------------------------------------------------------------------------------


def called(python: str, *words: str) -> Any:
    """Return the JSON on the last line that a program prints, run with one thread."""
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run([python, *words], env=environment, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr.decode()[-3000:]}")
    return json.loads(done.stdout.decode().splitlines()[-1])


def ours(*words: str, script: str = "chain.py") -> Any:
    """Return what one of our own measurements finds."""
    return called(sys.executable, str(HERE / script), *words)


def size_of(text: Path) -> int:
    """Return the bytes of text in a shard or a folder of shards."""
    size = 0
    for shard in [text] if text.is_file() else sorted(text.glob("*.jsonl")):
        with shard.open("rb") as lines:
            size += sum(len(json.loads(line)["text"].encode()) for line in lines)
    return size


def cut(corpus: Path, folder: Path, limit: float) -> Path:
    """Write the corpus' first documents, ``limit`` bytes of JSON, as one shard; return its path."""
    path = folder / "slice" / "000.jsonl"
    path.parent.mkdir()
    size = 0
    with min(corpus.glob("*.jsonl")).open("rb") as lines, path.open("wb") as out:
        for line in lines:
            size += len(line)
            if size > limit:
                break
            out.write(line)
    return path


def measured(options: argparse.Namespace, folder: Path) -> dict[str, list[Any]]:
    """Run everything in turns; return the results of all runs by name."""
    corpus, tokenizer = options.corpus, folder / "tokenizer.json"
    slice_ = cut(corpus, folder, options.slice_mb * 1e6)
    part = folder / "part"
    part.mkdir()
    for shard in sorted(corpus.glob("*.jsonl"))[:STAGE_SHARDS]:
        (part / shard.name).symlink_to(shard.resolve())
    texts = {"corpus": corpus, "shard": min(corpus.glob("*.jsonl")), "slice": slice_}
    sizes = {name: size_of(path) for name, path in texts.items()}
    jobs: dict[str, Callable[..., Any]] = {
        "train": partial(ours, "--trained", str(corpus), str(tokenizer)),
        "stages": partial(ours, str(part), str(tokenizer), script="stages.py"),
    }
    for name, (text, wanted) in WHOLE.items():
        words = ("--whole", str(texts[text]), str(tokenizer), json.dumps(wanted))
        jobs[name] = partial(ours, *words)
    for name, python in zip(PEERS, (options.datatrove_python, options.dolma_python), strict=True):
        if python:
            jobs[name] = partial(called, python, str(HERE / f"peers_{name}.py"), str(slice_), str(tokenizer))
    if options.only:
        jobs = {name: jobs[name] for name in ("train", *options.only)}
    found: dict[str, list[Any]] = {name: [] for name in jobs}
    for run in range(options.runs):
        for name, job in jobs.items():
            if name in PEERS and run >= options.peer_runs:
                continue
            place = Path(tempfile.mkdtemp(dir=folder))
            found[name].append(job(str(place)) if name in PEERS else job())
            shutil.rmtree(place)
            print(f"run {run + 1}: {name} done", file=sys.stderr)
    for name, runs in found.items():
        for one in runs if name in WHOLE else ():
            one["bytes"] = sizes[WHOLE[name][0]]
    return found


# -- tables --------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Return "median (lowest to highest)"."""
    values = list(values)
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_stages(runs: Sequence[Mapping[str, tuple[int, float]]], train: Sequence[Mapping[str, Any]]) -> None:
    """Print what each stage costs alone, and their sum."""
    size = runs[0][CHAIN[0]][0]
    print(f"\neach stage alone, {size / 1e6:.1f} MB in memory; * belongs to the chain that peers are compared with")
    print(f"{'stage':<34} {'MB/cpu-s':>26} {'cpu-s':>8}")
    for name in runs[0]:
        rates = [run[name][0] / 1e6 / run[name][1] for run in runs]
        seconds = statistics.median(run[name][1] for run in runs)
        print(f"{'*' if name in CHAIN else ' '} {name:<32} {spread(rates):>26} {seconds:>8.2f}")
    sums = [sum(run[name][1] for name in CHAIN) for run in runs]
    print(f"  {'sum of *':<32} {spread(size / 1e6 / s for s in sums):>26} {statistics.median(sums):>8.2f}")
    rates = [run["bytes"] / 1e6 / run["seconds"] for run in train]
    text = f"(apart) train {VOCABULARY:,} ids, {train[0]['bytes'] / 1e6:.0f} MB"
    print(f"  {text:<32} {spread(rates):>26} {statistics.median(run['seconds'] for run in train):>8.2f}")


def print_whole(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what the whole costs, and where it goes."""
    here = [name for name in WHOLE if name in found]
    print("\nthe whole of prepare, processes=1, near-duplicates, vocabulary given; filters by preset")
    head = f"{'text, settings':<36} {'MB':>6} {'kept':>15} {'Mtok':>5} {'MB/cpu-s':>21} {'peak MB':>8}"
    print(f"{head}  encoder")
    for name in here:
        runs = found[name]
        one = runs[0]
        rates = spread(run["bytes"] / 1e6 / run["seconds"] for run in runs)
        kept = f"{one['kept']:,}/{one['documents']:,}"
        peak = statistics.median(run["peak_mb"] for run in runs)
        row = f"{name:<36} {one['bytes'] / 1e6:>6.1f} {kept:>15} {one['tokens'] / 1e6:>5.1f} {rates:>21} {peak:>8.0f}"
        print(f"{row}  {one['encoder']}")
    print("\nwhere it goes, cpu-s, median")
    names = list(found[here[0]][0]["stages"])
    print(f"{'':<36} " + " ".join(f"{name:>22}" for name in names))
    for name in here:
        seconds = [statistics.median(run["stages"].get(stage, 0.0) for run in found[name]) for stage in names]
        print(f"{name:<36} " + " ".join(f"{each:>22.2f}" for each in seconds))


def print_peer(name: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print a peer's stages and sum, and how many times faster we are."""
    runs = found[name]
    size = runs[0]["bytes"]
    print(f"\n{runs[0]['name']}: {runs[0]['documents']:,} documents, {size / 1e6:.1f} MB, every stage on all of them")
    print(f"{'stage':<34} {'MB/cpu-s':>26} {'cpu-s':>8}")
    for stage in runs[0]["stages"]:
        seconds = [run["stages"][stage] for run in runs]
        rates = spread((size / 1e6 / s for s in seconds), 2)
        print(f"{stage:<34} {rates:>26} {statistics.median(seconds):>8.2f}")
    sums = [size / 1e6 / sum(run["stages"].values()) for run in runs]
    print(f"{'sum':<34} {spread(sums, 3):>26}   peak {runs[0]['peak_mb']:.0f} MB")

    def rate(what: str) -> float:
        return statistics.median(float(run["bytes"]) / 1e6 / float(run["seconds"]) for run in found[what])

    alone = statistics.median(run[CHAIN[0]][0] / 1e6 / sum(run[stage][1] for stage in CHAIN) for run in found["stages"])
    peer = statistics.median(sums)
    print(f"our stages' sum against its sum: {alone:.1f} / {peer:.3f} = {alone / peer:.0f}x")
    for what in ("all kept", "slice: all kept"):
        print(f"our whole, {what}, against its sum: {rate(what):.1f} / {peer:.3f} = {rate(what) / peer:.0f}x")
    if "chain" in runs[0]:
        chain = statistics.median(size / 1e6 / run["chain"] for run in runs)
        print(f"its chain in which what a filter drops goes no further ({runs[0]['left']} left): {chain:.3f} MB/cpu-s")
        for what in ("web", "slice: web, lines cleaned"):
            print(f"our whole, {what}, against that: {rate(what):.1f} / {chain:.3f} = {rate(what) / chain:.0f}x")


def libraries() -> str:
    """Return the versions that matter."""
    found = []
    for name in ("numpy", "pyarrow", "tokenizers", *FAST):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder that corpus.py wrote")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--slice-mb", type=float, default=5, help="text for the peers")
    parser.add_argument(
        "--only", action="append", choices=list(WHOLE), help="these rows of the whole, no stages, no peers"
    )
    parser.add_argument("--datatrove-python")
    parser.add_argument("--dolma-python")
    options = parser.parse_args()
    load = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    with tempfile.TemporaryDirectory() as place:
        found = measured(options, Path(place))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}; Python {platform.python_version()}, {libraries()}")
    print(f"{options.runs} runs in turns, each in a process of its own with one thread; MB of text per cpu-second")
    print(f"peers: {options.peer_runs} run(s)")
    if "stages" in found:
        print_stages(found["stages"], found["train"])
    print_whole(found)
    for name in PEERS:
        if name in found:
            print_peer(name, found)


if __name__ == "__main__":
    if "--whole" in sys.argv:
        print(json.dumps(whole(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))))
    elif "--trained" in sys.argv:
        print(json.dumps(trained(sys.argv[2], sys.argv[3])))
    else:
        main()
