"""Is bf16 compute with fp32 parameters as good as fp32? The same short run in both, over several seeds.

    python benchmarks/quality.py --seeds 4 --steps 200

Prints the final validation loss of each run and the paired difference bf16 - fp32 with a 95 % interval (t
distribution over seeds). Runs in a temporary folder.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365}  # two-sided 95 % by number of seeds


def main() -> None:
    from poise.core.journal import read
    from poise.train.recipe import load
    from poise.train.run import train

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=4, choices=sorted(T95))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, help="base learning rate (default: the demo recipe's)")
    options = parser.parse_args()
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as tmp:
        for seed in range(options.seeds):
            for dtype, values in losses.items():
                out = Path(tmp) / f"{dtype}-{seed}"
                over = {
                    "seed": seed,
                    "optim": {} if options.lr is None else {"lr": options.lr},
                    "train": {"dtype": dtype, "steps": options.steps, "eval_every": options.steps, "save_every": 0,
                              "eval_batches": 16, "compile": "off"},
                }  # fmt: skip
                train(load("demo", over), out)
                values.append(next(r["loss"] for r in reversed(read(out / "journal.jsonl")) if r["type"] == "eval"))
                print(f"seed {seed} {dtype}: validation loss {values[-1]:.4f}", flush=True)
    differences = [b - f for b, f in zip(losses["bf16"], losses["fp32"], strict=True)]
    half = T95[options.seeds] * statistics.stdev(differences) / math.sqrt(options.seeds)
    lr = load("demo").optim.lr if options.lr is None else options.lr
    print(f"demo recipe, learning rate {lr:g}, {options.steps} steps, {options.seeds} seeds")
    for dtype, values in losses.items():
        print(f"{dtype}: mean {statistics.mean(values):.4f}, sd over seeds {statistics.stdev(values):.4f}")
    print(f"bf16 - fp32: {statistics.mean(differences):+.4f} +- {half:.4f} (95 % interval)")


if __name__ == "__main__":
    main()
