"""How fast a Megatron log is read, on one core.

Run: ``python benchmarks/diagnose_speed.py [--mb 200] | tee benchmarks/results/diagnose_speed.txt`` (seconds).
The logs are synthetic and lie in a temporary folder. ``dense`` has nothing but lines of iterations, the worst case;
``timers`` has a line of timers after each, as Megatron prints with ``--log-timers``; ``mixed`` has also skipped
iterations without a loss, time stamps, warnings and validations. Each is read by ``read_log`` in a process of its own:
CPU seconds of the call, and the peak memory of the process above what it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KINDS = ("dense", "timers", "mixed")
TURNS = 3
LINES_WRITTEN_TOGETHER = 2000


def iteration(step: int, loss: float | None, skipped: int, rng: random.Random) -> str:
    """One line as Megatron prints it."""
    lm_loss = "" if loss is None else f" lm loss: {loss:.6E} |"
    return (
        f" iteration {step:8d}/{1000000:8d} | consumed samples: {512 * step:12d} |"
        f" elapsed time per iteration (ms): {1000 + 900 * rng.random():.1f} |"
        f" learning rate: {6e-4 * min(step / 2000, 1.0):.6E} | global batch size: {512:5d} |{lm_loss}"
        f" loss scale: {65536 if skipped else 131072:.1f} | grad norm: {20 * rng.random() ** 4:.3f} |"
        f" number of skipped iterations: {skipped:3d} | number of nan iterations: {0:3d} |\n"
    )


def timers(rng: random.Random) -> str:
    """One line of timers."""
    names = ("forward-compute", "backward-compute", "backward-params-all-reduce", "optimizer-unscale-and-check-inf")
    names += ("optimizer-clip-main-grad", "optimizer-copy-main-to-model-params", "optimizer", "batch-generator")
    return "time (ms) | " + " | ".join(f"{name}: {1000 * rng.random():.2f}" for name in names) + "\n"


def lines(kind: str, rng: random.Random) -> Iterator[str]:
    """A log without end."""
    step = 0
    while True:
        step += 1
        skipped = kind == "mixed" and rng.random() < 0.02
        loss = None if skipped else 2.0 + 9.0 * 0.999**step + 0.05 * rng.random()
        stamp = f" [2025-01-01 12:{step // 60 % 60:02d}:{step % 60:02d}]" if kind == "mixed" else ""
        yield stamp + iteration(step, loss, int(skipped), rng)
        if kind != "dense":
            yield timers(rng)
        if kind == "mixed" and step % 100 == 0:
            yield "WARNING: a worker was slow, waiting for it\n"
            yield f" validation loss at iteration {step} | lm loss value: {loss or 2.0:.6E} | lm loss PPL: 1.1E+01 |\n"


def write(path: Path, kind: str, size: int, steps: int | None = None) -> int:
    """Write a log of so many bytes, or of so many steps; return how many bytes there are."""
    rng = random.Random(0)
    source, written, done = lines(kind, rng), 0, 0
    with path.open("w") as file:
        while written < size if steps is None else done < steps:
            count = LINES_WRITTEN_TOGETHER if steps is None else min(LINES_WRITTEN_TOGETHER, steps - done)
            written += file.write("".join(next(source) for _ in range(count)))
            done += count
    return written


def measure(path: Path) -> dict[str, float]:
    """Read a log in this process; return CPU seconds, MiB and points."""
    from poise.postmortem.log import read_log
    from poise.postmortem.readers import megatron  # noqa: F401 - not part of what is timed

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    log = read_log(path)
    seconds = time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "mib": memory, "points": len(log.series["loss"][0])}


def elsewhere(path: Path) -> dict[str, float]:
    """Measure in a fresh process on one thread."""
    command = [sys.executable, __file__, "--measure", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mb", type=int, default=200, help="size of each log in 10^6 bytes (default 200)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread, best of {TURNS} turns")
    print(f"{'log':>22} {'MB':>6} {'points':>8} {'seconds':>8} {'MB/s':>6} {'peak MiB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, steps in [(kind, kind, None) for kind in KINDS] + [("20k steps, dense", "dense", 20_000)]:
            path = Path(folder) / "megatron.out"
            size = write(path, kind, args.mb * 10**6, steps) / 1e6
            best = min((elsewhere(path) for _ in range(TURNS)), key=lambda turn: turn["seconds"])
            speed = size / best["seconds"]
            counts = f"{best['points']:>8.0f} {best['seconds']:>8.3f} {speed:>6.0f} {best['mib']:>9.0f}"
            print(f"{name:>22} {size:>6.1f} {counts}")


if __name__ == "__main__":
    main()
