"""What the guard costs in the trainer, all of it: the same step with guard and journal, and with neither, in turns.

    python benchmarks/guard_cost.py --steps 200 --threads 2

"On" is what ``poise train`` does: the readings of every step, the layers every 10 steps, detectors, causes, policy and
journal. "Off" is ``guard.enabled = false`` without a journal: loss and gradient norm only. The two take turns step by
step on the same model, optimizer and data, so that drift of the machine cancels. The direct time (inside the
readings, ``guard.decide`` and ``run.record``, less what "off" spends in its reading) is the steadier figure; the steps
that measure layers are told apart from the others.
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
    from poise.train.senses import Blind
    from poise.train.step import train_step

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    shape = {"tied": True, "methods": ["qk_norm", "z_loss"]}
    recipe = recipes.load(
        "nano", {"model": shape, "train": {"threads": options.threads, "steps": 100_000, "compile": "off"}}
    )
    world = distributed.init()
    tokens, recipe = prepared(recipe, None, world)
    with tempfile.TemporaryDirectory() as tmp:
        run = assemble(resolve(recipe, tokens), Path(tmp), tokens, world, [])
        guard, journal, senses = run.guard, run.journal, run.senses
        silent, blind = build(dataclasses.replace(recipe.guard, enabled=False)), Blind(run)
        spent = 0.0

        def timed(function):
            def call(*arguments):
                nonlocal spent
                start = time.perf_counter()
                out = function(*arguments)
                spent += time.perf_counter() - start
                return out

            return call

        for owner, name in ((guard, "decide"), (run, "record"), (silent, "decide")):
            setattr(owner, name, timed(getattr(owner, name)))
        for owner in (senses, blind):
            for name in ("saw", "read", "settle"):
                setattr(owner, name, timed(getattr(owner, name)))
        times: dict[str, list[float]] = {"on": [], "off": []}
        inside: dict[str, list[float]] = {"on": [], "layers": [], "off": []}
        for index in range(2 * options.steps + 40):
            name = "on" if index % 2 == 0 else "off"
            run.position.step = index // 2  # both do the same step
            measures = name == "on" and senses.measures(run.position.step + 1)
            run.guard, run.journal, run.senses = (guard, journal, senses) if name == "on" else (silent, None, blind)
            spent = 0.0
            start = time.perf_counter()
            train_step(run)
            took = time.perf_counter() - start
            if index >= 40:
                inside["layers" if measures else name].append(spent)
                times[name].append(took)
        assert journal is not None
        journal.close()
    on, off = times["on"], times["off"]
    ratio = statistics.median(a / b for a, b in zip(on, off, strict=True))
    mean = statistics.mean(on) / statistics.mean(off)
    step, base = statistics.median(off), statistics.median(inside["off"])
    always, layers = (statistics.median(inside[name]) - base for name in ("on", "layers"))
    print(f"nano, {options.threads} threads, {options.steps} steps each, alternating")
    print(f"step without guard and journal       median {step * 1e3:.2f} ms")
    print(f"ratio of neighbours                  median {ratio:.4f}, of the means {mean:.4f}")
    print(f"every step: readings, guard, journal {always * 1e3:.2f} ms = {always / step:.2%} of the step")
    print(f"a step that measures the layers      {layers * 1e3:.2f} ms, every 10 steps = {layers / 10 / step:.2%}")


if __name__ == "__main__":
    main()
