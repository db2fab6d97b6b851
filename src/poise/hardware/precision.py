"""Which number format to compute in."""

from __future__ import annotations

import functools
import time
from typing import Final, Literal

import torch

from poise.core.errors import UserError

_PROBE_SIZE: Final = 384
_WORTH_IT: Final = 1.25


def pick_dtype(name: Literal["auto", "bf16", "fp32"], device: torch.device | str) -> torch.dtype:
    """Return the dtype to compute in.

    ``auto`` is bfloat16 where the hardware has it: on a GPU that says so, and on a CPU where a quick
    measurement finds its matrix product clearly faster than float32 (with avx512_bf16 or AMX about twice;
    without, many times slower). float16 is never chosen: CPUs have no units for it and training in it
    needs loss scaling.

    Raises:
        UserError: an unknown name, or bf16 on a GPU that lacks it.
    """
    device = torch.device(device)
    if name not in ("auto", "bf16", "fp32"):
        raise UserError(f"dtype is '{name}', but must be auto, bf16 or fp32")
    if name == "fp32":
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bf16" and not native:
            raise UserError(f"dtype is 'bf16', but {torch.cuda.get_device_name(device)} lacks it; use fp32")
        return torch.bfloat16 if native else torch.float32
    if name == "bf16" or (device.type == "cpu" and cpu_bf16_speedup() >= _WORTH_IT):
        return torch.bfloat16
    return torch.float32


@functools.cache
def cpu_bf16_speedup() -> float:
    """Return how many times faster this CPU multiplies matrices in bfloat16 than in float32.

    Measured once a process, in a few tens of milliseconds; the best of several tries of each, taken in
    turns, because other processes may disturb any one of them.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(5):
        for dtype in best:
            a_NN = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
            a_NN @ a_NN[:, :8]  # warms the kernels up, not the clock
            started = time.perf_counter()
            a_NN @ a_NN
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]
