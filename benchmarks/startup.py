"""Start-up times: ``import poise`` and ``poise --help``, as whole processes, and that neither imports torch.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import poise": [sys.executable, "-c", "import poise"],
    "poise --help": [sys.executable, "-m", "poise.cli", "--help"],
    "poise train --help": [sys.executable, "-m", "poise.cli", "train", "--help"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(11):
        for name, command in CASES.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        print(f"{name:20} median {statistics.median(values):.3f} s (min {min(values):.3f}, max {max(values):.3f})")
    code = "import sys, poise; sys.exit('torch' in sys.modules)"
    clean = subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    print(f"import poise imports torch: {'no' if clean else 'YES'}")


if __name__ == "__main__":
    main()
