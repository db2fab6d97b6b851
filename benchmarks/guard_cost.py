"""What the guard and the journal cost: the same step with both on and both off, interleaved.

    python benchmarks/guard_cost.py --steps 120 --threads 2

"On" is what ``poise train`` does. "Off" has the guard disabled and no journal. The two take turns step by step on
the same model, optimizer and data; each turn is the other's neighbour, so that drift of the machine cancels. The
direct cost (time inside ``guard.decide`` and ``run.record``) is printed too: it is far below the step's noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> None:
    from poise.guard.guard import build
    from poise.hardware import distributed
    from poise.train import recipe as recipes
    from poise.train.run import assemble, prepared, resolve
    from poise.train.step import train_step

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    recipe = recipes.load("nano", {"train": {"threads": options.threads, "steps": 100_000, "compile": "off"}})
    world = distributed.init()
    tokens, recipe = prepared(recipe, None, world)
    with tempfile.TemporaryDirectory() as tmp:
        run = assemble(resolve(recipe, tokens), Path(tmp), tokens, world, [])
        guard, journal = run.guard, run.journal
        silent = build(dataclasses.replace(recipe.guard, enabled=False))
        inside: list[float] = []

        def timed(function):
            def call(*arguments):
                start = time.perf_counter()
                out = function(*arguments)
                inside.append(time.perf_counter() - start)
                return out

            return call

        decide, record = guard.decide, run.record
        times: dict[str, list[float]] = {"on": [], "off": []}
        for index in range(2 * options.steps + 20):
            name = "on" if index % 2 == 0 else "off"
            run.guard, run.journal = (guard, journal) if name == "on" else (silent, None)
            if name == "on":
                guard.decide, run.record = timed(decide), timed(record)  # type: ignore[method-assign]
            else:
                run.record = record  # type: ignore[method-assign]
            start = time.perf_counter()
            train_step(run)
            if index >= 20:
                times[name].append(time.perf_counter() - start)
        assert journal is not None
        journal.close()
    on, off = times["on"], times["off"]
    ratio = statistics.median(a / b for a, b in zip(on, off, strict=True))
    direct = sum(inside) / (len(inside) / 2)
    print(f"nano, {options.threads} threads, {options.steps} steps each, alternating")
    print(f"step with guard and journal     median {statistics.median(on) * 1e3:.2f} ms")
    print(f"step without                    median {statistics.median(off) * 1e3:.2f} ms")
    print(f"ratio of neighbours             median {ratio:.4f}")
    print(f"inside guard.decide and record  {direct * 1e3:.3f} ms a step = {direct / statistics.median(off):.3%}")


if __name__ == "__main__":
    main()
