"""What the readings of every layer cost, taken every k steps of the nano model.

    python benchmarks/layer_cost.py --rounds 20 --threads 2 --every 10

Three steps take turns on the same model, optimizer and batch, so that drift of the machine cancels: plain;
``listen``, which hooks the training forward (what ``poise.watch`` does in a foreign loop); ``aside``, which runs the
first two sequences once more without gradient (what is done where parts of the model are compiled). The cost of a
measurement is the median difference to the plain step of the same round, by the clock and by processor time (which
other programs on the machine disturb less; all threads together); each reading is also taken to the host. The share
printed is that cost over ``every`` plain steps. The batch is random ids: nothing measured depends on the text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> None:
    import torch

    from poise.guard.signals.listen import find_sites, floats, listening
    from poise.guard.signals.probe import probe
    from poise.model.build import apply, build
    from poise.model.presets import preset

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = apply(preset("nano"), "qk_norm", "z_loss")
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model = build(spec, seed=0, device=options.device, compute_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, spec.vocab_size, (options.batch, spec.seq_len + 1), device=options.device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    sites, taken = find_sites(model), 0

    def step(how: str) -> tuple[float, float]:
        nonlocal taken
        start, used = time.perf_counter(), time.process_time()
        if how == "listen":
            with listening(model, options.rows, sites=sites) as heard:
                loss = model(inputs, targets).loss
            taken = len(floats(heard.readings()))
        else:
            loss = model(inputs, targets).loss
        loss.backward()
        if how == "aside":
            few = inputs[: options.rows], targets[: options.rows]
            floats(probe(model, lambda: model(*few), options.rows, sites=sites).readings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start, time.process_time() - used

    ways = ("plain", "listen", "aside")
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(options.rounds + 2):
        for place in range(3):  # each way takes each place in a round equally often
            way = ways[(place + number) % 3]
            seconds = step(way)
            if number >= 2:
                times[way].append(seconds)
    print(
        f"nano, {options.batch} x {spec.seq_len} tokens, {options.dtype}, {options.device}, {options.threads} threads,"
        f" {options.rounds} rounds, {taken} readings, attention of {options.rows} sequences"
    )
    for kind, name in enumerate(("clock", "processor")):
        plain = statistics.median(pair[kind] for pair in times["plain"])
        print(f"{name:<10}plain step                 median {plain * 1e3:.2f} ms")
        for way in ("listen", "aside"):
            extra = sorted(a[kind] - b[kind] for a, b in zip(times[way], times["plain"], strict=True))
            low, high = extra[len(extra) // 4], extra[(3 * len(extra)) // 4]
            cost = statistics.median(extra)
            print(
                f"{name:<10}{way:<7}a measurement costs {cost * 1e3:.2f} ms (quartiles {low * 1e3:.2f} .."
                f" {high * 1e3:.2f}) = {cost / (options.every * plain):.2%} of {options.every} steps"
            )


if __name__ == "__main__":
    main()
