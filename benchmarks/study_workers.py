"""Two single-thread workers against one two-thread worker, on the tiny size of ``poise study``.

The two ways run the same number of cells in turns, several rounds; workers are started and warmed up before the
clock. Usage: python benchmarks/study_workers.py [--size tiny] [--rounds 5] [--cells 4]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from poise.hardware import environment
from poise.studies import sizes
from poise.studies.cell import Cell
from poise.studies.grid import prepared
from poise.studies.pool import serve


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=4, help="of a round, for each way; even")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=40.0, help="no round begins after that")
    arguments = parser.parse_args()
    over = {"train": {"steps": arguments.steps}}
    tokens, recipe = prepared(sizes.recipe(arguments.size, over))
    seeds = iter(range(10**9))  # every cell is a new one: nothing is found done

    def cells(number: int) -> list[Cell]:
        some = (dataclasses.replace(recipe, seed=next(seeds)) for _ in range(number))
        return [Cell("baseline", one.optim.lr, one.seed, one, tokens.fingerprint) for one in some]

    ways = {"two workers, 1 thread each": (2, 1), "one worker, 2 threads": (1, 2), "one worker, 1 thread": (1, 1)}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        crews = {
            name: [_start(Path(folder), tokens.dir, threads) for _ in range(workers)]
            for name, (workers, threads) in ways.items()
        }
        for crew in crews.values():
            _run(crew, cells(len(crew)))
        started = time.perf_counter()
        for _ in range(arguments.rounds):
            if time.perf_counter() - started > arguments.seconds:
                break  # a busy machine: threads that wait for each other make a round very long
            for name, crew in crews.items():
                began = time.perf_counter()
                _run(crew, cells(arguments.cells))
                taken[name].append(time.perf_counter() - began)
        for crew in crews.values():
            for pipe in crew:
                pipe.send(None)
    machine = environment.describe()
    print(f"python benchmarks/study_workers.py --size {arguments.size} --steps {arguments.steps}")
    print(f"{machine['cpus_usable']} cores of {machine['cpu']}, torch {machine['torch']}")
    print(
        f"{arguments.cells} cells a round, {len(taken[next(iter(ways))])} rounds, the ways in turns; seconds a round\n"
    )
    first = next(iter(ways))
    for name, times in taken.items():
        ratios = [time_ / base for time_, base in zip(times, taken[first], strict=True)]
        print(
            f"{name:28s} median {statistics.median(times):6.2f}   each {' '.join(f'{t:.2f}' for t in times)}"
            f"   x first, median of rounds {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def _start(folder: Path, tokens: Path, threads: int) -> Connection:
    ours, theirs = get_context("spawn").Pipe()
    get_context("spawn").Process(target=serve, args=(theirs, folder, tokens, threads), daemon=True).start()
    theirs.close()
    assert ours.recv()[0] == "ready"
    return ours


def _run(crew: Sequence[Connection], cells: Sequence[Cell]) -> None:
    """Give the cells out evenly and wait for all."""
    for start in range(0, len(cells), len(crew)):
        for pipe, cell in zip(crew, cells[start:], strict=False):
            pipe.send(cell)
        for pipe, _ in zip(crew, cells[start:], strict=False):
            while (message := pipe.recv())[0] != "over":
                pass
            assert not message[1], message[1]


if __name__ == "__main__":
    main()
