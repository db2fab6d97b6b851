"""Every reader on real log files: the number of points, and the first, last and extreme values, exactly.

    python benchmarks/diagnose_logs.py PATH_TO_LOGS

PATH_TO_LOGS is a folder with the files named in ``EXPECTED``; each is a published log, not part of this repository:

    Hugging Face    suzushi-tw/luojiu-7b-base, trainer_state.json @ f6a05a26564c (Apache-2.0)
    llm.c           github.com/HectorFCardenas/llm.c @ 6cbc4b5812c4, gpt2_train.11672114.log and 11679010.log (MIT)
    MLPerf          github.com/mlcommons/training_results_v5.1 @ 441d65f4445c, NVIDIA/results/
                    theia_ngpu8_ngc25.09_nemo/llama31_8b/result_0.txt (Apache-2.0; not an MLPerf score)
    Megatron-LM     github.com/bigscience-workshop/bigscience @ 9e64edec2ad1, experiments/gpt2-meg-ds-3d/
                    meg_ds_3d_gpt2_perf_n16-ds-off.out (Apache-2.0)
    torchtitan      github.com/pytorch/torchtitan @ b5bcd76c66d0, tests/assets/losses/llama3_cuda.txt (BSD-3-Clause)
    TensorBoard     an event file written from gpt2_train.11685414.log of the llm.c repository above
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from poise.postmortem.diagnosis import diagnose
from poise.postmortem.log import Log, read_log

EXPECTED = {
    "hf_trainer_state__luojiu7b.json": {"loss": (1742, 5, 8710, 1.7484, 1.3703, 1.2345, 3820)},
    "llmc_stdout__gpt2_124m_750steps.log": {
        "loss": (750, 1, 750, 11.010252, 4.763922, None, None),
        "grad_norm": (750, 1, 750, None, None, 15.2986, 2),
        "val_loss": (4, None, None, None, None, None, None),
    },
    "llmc_stdout__gpt2_124m_all_nan.log": {"loss": (100, 1, 100, math.nan, math.nan, None, None)},
    "mllog__nvidia_theia8_llama31_8b_run0.txt": {
        "loss": (360, 32, 11520, 8.1666, 3.2600, None, None),
        "val_loss": (15, None, None, None, None, None, None),
    },
    "megatron_stdout__bigscience_gpt2_n16.out": {"loss": (62, 1, 62, 12.44, 20.44, 48.14, 4)},
    "torchtitan_losses__llama3_cuda.txt": {"loss": (100, None, None, 8.0491, 2.7465, None, None)},
    "events.out.tfevents.1700000000.gpt2_124m_llmc_a100_steps10001-12000.0": {
        "loss": (2000, 10001, 12000, None, None, None, None),
        "grad_norm": (2000, 10001, 12000, None, None, 3.9078, 10822),
        "lr": (2000, 10001, 12000, None, None, None, None),
    },
}
"""File -> series -> (points, first step, last step, first value, last value, extreme value, its step)."""


def wrong(log: Log, name: str, expected: tuple[float | None, ...]) -> list[str]:
    """Return what is not as expected."""
    if name not in log.series:
        return [f"no {name}"]
    steps, values = log.series[name]
    points, first, last, start, end, extreme, where = expected
    out = []
    for what, got, want in (("points", len(steps), points), ("first step", steps[0], first), ("last", steps[-1], last)):
        if want is not None and got != want:
            out.append(f"{name}: {what} {got}, not {want}")
    for what, got, want in (("first value", values[0], start), ("last value", values[-1], end)):
        if want is not None and not (math.isnan(got) if math.isnan(want) else abs(got - want) < 6e-3):
            out.append(f"{name}: {what} {got}, not {want}")
    if extreme is not None and where is not None:
        at = int(np.argmin(np.abs(values - extreme)))
        if abs(values[at] - extreme) > 6e-3 or steps[at] != where:
            out.append(f"{name}: {extreme} is at step {steps[at]}, not {where}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Every reader on real log files.")
    parser.add_argument("logs", type=Path, help="folder with the files")
    folder = parser.parse_args().logs
    failed = 0
    for name, series in EXPECTED.items():
        began = time.perf_counter()
        log = read_log(folder / name)
        taken = time.perf_counter() - began
        errors = [error for key, expected in series.items() for error in wrong(log, key, expected)]
        failed += bool(errors)
        points = ", ".join(f"{key} {len(log.series[key][0])}" for key in series if key in log.series)
        print(f"{'WRONG' if errors else 'exact'}  {log.format:<12} {taken:5.2f} s  {points}  {name}")
        for error in errors:
            print(f"       {error}")
        print(f"       {diagnose(log).headline}")
    print(f"{len(EXPECTED) - failed} of {len(EXPECTED)} files exact")


if __name__ == "__main__":
    main()
