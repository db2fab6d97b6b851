"""Where the fused attention kernel overtakes plain matrix products on a CPU, by dtype and head sharing.

Run: ``python benchmarks/attention_switch.py | tee benchmarks/results/attention_switch.txt`` (about a minute).
The rule that uses the result is ``poise.model.attention.use_matmul``. Forward and backward, one thread, best
of several repeats, the same number of tokens whatever the length.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from poise.model.attention import fused_attention, matmul_attention

LENGTHS = (64, 128, 256, 384, 512, 768, 1024)
HEAD_DIM, HEADS, TOKENS = 64, 8, 2048


def best_ms(core: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: tuple[Tensor, ...], repeats: int) -> float:
    """Return the shortest of ``repeats`` forward-and-backward times, in milliseconds."""
    times = []
    for _ in range(repeats + 1):
        for tensor in qkv:
            tensor.grad = None
        start = time.perf_counter()
        core(*qkv).sum().backward()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, {cpu_name()}, 1 thread")
    print(f"{TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, forward + backward, ms (best of 6)\n")
    print(f"{'dtype':>9} {'kv heads':>8} {'T':>5} {'matmul':>8} {'fused':>8}  faster")
    for dtype in (torch.bfloat16, torch.float32):
        for kv_heads in (HEADS, HEADS // 4):
            for length in LENGTHS:
                batch = max(1, TOKENS // length)
                shapes = [(batch, heads, length, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
                qkv = tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
                matmul, fused = (best_ms(core, qkv, 6) for core in (matmul_attention, fused_attention))
                name = str(dtype).removeprefix("torch.")
                faster = "matmul" if matmul < fused else "fused"
                print(f"{name:>9} {kv_heads:>8} {length:>5} {matmul:>8.1f} {fused:>8.1f}  {faster}")


def cpu_name() -> str:
    """Return the processor's model name where Linux tells it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "unknown processor"


if __name__ == "__main__":
    main()
