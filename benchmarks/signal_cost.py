"""What the always-on readings cost: the same step with them and without, interleaved.

    python benchmarks/signal_cost.py --steps 60 --threads 1

"On" takes the readings of ``poise.guard.signals.tracker`` and the fingerprint of the batch. "Off" reads what a step
needs in any case: the mean loss and the norm that the optimizer clips by, in one wait for the device. The two take
turns step by step on the same model, optimizer and data; each turn is the other's neighbour, so that drift of the
machine cancels. The main figure is the direct cost: time inside the readings, less that of the optimizer's own norm,
which both ways take; it is far below the noise of a step. Processor time is given besides time, because a busy machine
takes the processor away in the middle of a reading.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> None:
    import torch

    from poise.guard.signals.fingerprint import fingerprint
    from poise.guard.signals.tracker import Tracker
    from poise.hardware import distributed
    from poise.train import recipe as recipes
    from poise.train.run import assemble, prepared, resolve

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also print where the time of the readings goes")
    options = parser.parse_args()
    recipe = recipes.load("nano", {"train": {"threads": options.threads, "steps": 100_000, "compile": "off"}})
    world = distributed.init()
    tokens, recipe = prepared(recipe, None, world)
    steps: dict[str, list[float]] = {"on": [], "off": []}
    inside: dict[str, list[float]] = {"on": [], "off": [], "norm": []}
    cpu: dict[str, list[float]] = {"on": [], "off": [], "norm": [], "step": []}
    with tempfile.TemporaryDirectory() as tmp:
        run = assemble(resolve(recipe, tokens), Path(tmp), tokens, world, [])
        model, optimizer, size = run.model, run.optimizer, recipe.train.batch_size

        def norm():
            start, start_cpu = time.perf_counter(), time.process_time()
            found = optimizer.measure()
            inside["norm"].append(time.perf_counter() - start)
            cpu["norm"].append(time.process_time() - start_cpu)
            return found

        tracker = Tracker(model, optimizer, norm=norm)
        taken = 0
        for index in range(2 * options.steps + 10):
            name = "on" if index % 2 == 0 else "off"
            start, start_cpu = time.perf_counter(), time.process_time()
            batch = run.loader.batch(index * size, size)
            out = model(batch.inputs, batch.targets)
            out.loss.backward()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            if name == "on":
                taken = len(
                    tracker.read(
                        [out.ce.detach()],
                        index + 1,
                        optimizer.lr,
                        extra={"log_z": out.log_z.detach(), "fingerprint": fingerprint(batch.inputs)},
                    ).extra
                )
            else:
                torch.stack([out.ce.detach().float(), norm()]).tolist()
            end, end_cpu = time.perf_counter(), time.process_time()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if index >= 10:
                steps[name].append(time.perf_counter() - start)
                inside[name].append(end - begin)
                cpu[name].append(end_cpu - begin_cpu)
                if name == "off":
                    cpu["step"].append(time.process_time() - start_cpu)
        if options.profile:
            profile(tracker, model, batch, optimizer)
        if run.journal is not None:
            run.journal.close()
    off, own_norm = statistics.median(steps["off"]), statistics.median(inside["norm"])
    ratio = statistics.median(a / b for a, b in zip(steps["on"], steps["off"], strict=True))
    read = statistics.median(inside["on"])
    params = sum(p.numel() for p in model.parameters())
    print(f"nano, {params / 1e6:.1f}M parameters, {options.threads} threads, {options.steps} steps each, alternating")
    print(f"readings a step              {taken}")
    print(f"step without                 median {off * 1e3:.2f} ms")
    print(f"ratio of neighbouring steps  median {ratio:.4f}")
    print(f"inside the readings          median {read * 1e3:.3f} ms, the optimizer's norm {own_norm * 1e3:.3f} ms")
    print(f"cost of the readings         {(read - own_norm) * 1e3:.3f} ms a step = {(read - own_norm) / off:.3%}")
    read, own_norm, off = (statistics.median(cpu[name]) for name in ("on", "norm", "step"))
    extra = read - own_norm
    print(f"the same in processor time   {extra * 1e3:.3f} ms of {off * 1e3:.2f} ms = {extra / off:.3%}")


def profile(tracker, model, batch, optimizer) -> None:
    """Print the dearest operators of ten readings."""
    import torch

    out = model(batch.inputs, batch.targets)
    out.loss.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for step in range(10**6, 10**6 + 10):
            tracker.read([out.ce.detach()], step, optimizer.lr)
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


if __name__ == "__main__":
    main()
