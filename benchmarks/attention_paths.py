"""What a cap, a clip and a sink cost on a CPU: blocks of scores against dense eager code and torch's fused attention.

Run: ``python benchmarks/attention_paths.py | tee benchmarks/results/attention_paths.txt`` (about half a minute).
Forward and backward, one thread, CPU time. All columns take turns; a ratio is the median over the turns of the time of
a column divided by that of the fused kernel in the same turn, which computes plain softmax attention without cap or
sink. ``dense`` is the capped formula in plain torch with all scores at once; ``cap``, ``clip``, ``sink`` and ``plain``
are blocks; ``kept`` is what a forward pass keeps for the backward pass.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from poise.model.attention import fused_attention
from poise.model.blockwise import Maps, blockwise_attention

HEADS, HEAD_DIM, TOKENS, TURNS = 8, 64, 1024, 5
SCALE, CAP = HEAD_DIM**-0.5, 50.0

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Capped attention as one would write it; in bf16 the product is rounded, the rest is in fp32."""
    shared, T = q_BHTK.shape[1] // k_BGTK.shape[1], q_BHTK.shape[2]
    k_BHTK, v_BHTK = (x.repeat_interleave(shared, 1) for x in (k_BGTK, v_BGTK))
    scores_BHTT = CAP * torch.tanh((q_BHTK @ k_BHTK.mT).float() * (SCALE / CAP))
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(-1).to(q_BHTK.dtype) @ v_BHTK


def cores() -> dict[str, Core]:
    """The columns of the table."""
    sink_H = torch.zeros(HEADS, requires_grad=True)
    return {
        "fused": lambda q, k, v: fused_attention(q, k, v, SCALE),
        "dense": dense,
        "cap": lambda q, k, v: blockwise_attention(q, k, v, Maps(SCALE, cap=CAP)),
        "clip": lambda q, k, v: blockwise_attention(q, k, v, Maps(SCALE, zeta=1.03, gamma=-0.03)),
        "sink": lambda q, k, v: blockwise_attention(q, k, v, Maps(SCALE), sink_H),
        "plain": lambda q, k, v: blockwise_attention(q, k, v, Maps(SCALE)),
    }


def milliseconds(core: Core, qkv: list[Tensor], gradient: Tensor) -> float:
    """Time one forward and backward pass, in CPU time: a busy machine disturbs it less."""
    for tensor in qkv:
        tensor.grad = None
    start = time.process_time()
    core(*qkv).backward(gradient)
    return 1e3 * (time.process_time() - start)


def kept_mb(core: Core, qkv: list[Tensor]) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, in MB, each storage once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = core(*qkv)
    del out
    return sum(kept.values()) / 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, {cpu_name()}, 1 thread")
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, forward + backward, {TURNS} turns after one to warm up")
    print("fused in ms of CPU time (median), the others relative to it (median of ratios); kept in MB\n")
    columns = cores()
    names = "".join(f"{name:>8}" for name in columns)
    print(f"{'dtype':>9} {'kv heads':>8} {'T':>5}{names}{'dense kept':>12}{'cap kept':>10}")
    for dtype in (torch.bfloat16, torch.float32):
        for kv_heads in (HEADS, HEADS // 4):
            for length in (128, 512, 1024):
                shapes = [(TOKENS // length, heads, length, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
                qkv = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
                gradient = torch.randn(shapes[0]).to(dtype)
                turns = [{n: milliseconds(c, qkv, gradient) for n, c in columns.items()} for _ in range(TURNS + 1)][1:]
                fused = statistics.median(turn["fused"] for turn in turns)
                ratios = [statistics.median(t[n] / t["fused"] for t in turns) for n in columns if n != "fused"]
                kept = [kept_mb(columns[name], qkv) for name in ("dense", "cap")]
                numbers = f"{fused:8.1f}" + "".join(f"{ratio:8.2f}" for ratio in ratios)
                name = str(dtype).removeprefix("torch.")
                print(f"{name:>9} {kv_heads:>8} {length:>5}{numbers}{kept[0]:12.1f}{kept[1]:10.1f}")


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
