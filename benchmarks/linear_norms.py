"""What the norms of every linear layer cost, on the steps that are measured and on those between.

    python benchmarks/linear_norms.py --rounds 20 --threads 1

Three steps take turns on the same model, optimizer and batch, so that drift of the machine cancels: plain; ``between``,
inside ``LinearNorms.step`` of a step that is not measured; ``measured``, hooks on and the readings taken to the host.
The cost is the median difference to the plain step of the same round; the share printed is that over ``every`` plain
steps. The batch is random ids: nothing measured depends on the text.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> None:
    import torch

    from poise.guard.signals.linears import LinearNorms
    from poise.model.build import build
    from poise.model.presets import preset

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = preset(options.preset)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model = build(spec, seed=0, device=options.device, compute_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, spec.vocab_size, (options.batch, spec.seq_len + 1), device=options.device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    norms, taken = LinearNorms(model, every=2), 0

    def step(how: str) -> tuple[float, float]:
        nonlocal taken
        start, used = time.perf_counter(), time.process_time()
        number = {"measured": 0, "between": 1}.get(how)
        with contextlib.nullcontext() if number is None else norms.step(number):
            loss = model(inputs, targets).loss
            loss.backward()
        if how == "measured":
            taken = len(norms.readings())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start, time.process_time() - used

    ways = ("plain", "between", "measured")
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(options.rounds + 3):
        for place in range(3):  # each way takes each place in a round equally often
            way = ways[(place + number) % 3]
            seconds = step(way)
            if number >= 3:
                times[way].append(seconds)
    print(
        f"{options.preset}, {options.batch} x {spec.seq_len} tokens, {options.dtype}, {options.device}, "
        f"{options.threads} threads, {options.rounds} rounds, {len(norms.places)} linear layers, {taken} readings"
    )
    for kind, name in enumerate(("clock", "processor")):
        plain = statistics.median(pair[kind] for pair in times["plain"])
        print(f"{name:<10}plain step                     median {plain * 1e3:.2f} ms")
        for way, share in (("between", 1), ("measured", options.every)):
            extra = sorted(a[kind] - b[kind] for a, b in zip(times[way], times["plain"], strict=True))
            low, high = extra[len(extra) // 4], extra[(3 * len(extra)) // 4]
            cost = statistics.median(extra)
            print(
                f"{name:<10}a step {way:<9}costs more by {cost * 1e3:.2f} ms (quartiles {low * 1e3:.2f} .."
                f" {high * 1e3:.2f}) = {cost / (share * plain):.2%} of {share} step{'s' if share > 1 else ''}"
            )


if __name__ == "__main__":
    main()
