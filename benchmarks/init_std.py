"""Why recipes start matrices at sqrt(2 / (5 d_model)) and not at 0.02: clean runs of both, over several seeds.

    python benchmarks/init_std.py --seeds 3 --steps 150

The demo recipe, guard off. Prints the validation loss at the end, the largest gradient norm after step 25 and how
many of those steps have a norm above 3.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

FROM_STEP, HIGH = 25, 3.0


def main() -> None:
    from poise.core.journal import read
    from poise.train.recipe import load
    from poise.train.run import train

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    print(f"demo recipe, {options.steps} steps, guard off")
    with tempfile.TemporaryDirectory() as tmp:
        for init in ("default", "small"):
            for seed in range(options.seeds):
                over = {
                    "seed": seed,
                    "model": {"init": init},
                    "guard": {"enabled": False},
                    "train": {"steps": options.steps, "eval_every": options.steps, "save_every": 0},
                }
                out = Path(tmp) / f"{init}-{seed}"
                train(load("demo", over), out)
                records = read(out / "journal.jsonl")
                norms = [r["grad_norm"] for r in records if r["type"] == "step" and r["step"] > FROM_STEP]
                loss = next(r["loss"] for r in reversed(records) if r["type"] == "eval")
                print(
                    f"init {init:8} seed {seed}: validation loss {loss:.3f}, largest gradient norm {max(norms):.1f}, "
                    f"{sum(norm > HIGH for norm in norms)} steps above {HIGH:g}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
