"""Training speed against HF transformers Llama, litgpt and a nanoGPT-style loop, interleaved on one machine.

    pip install -c constraints.txt -e '.[train]' && pip install transformers lightning 'jsonargparse[signatures]'
    pip install --no-deps litgpt      # its pins of other packages contradict those of transformers
    python benchmarks/speed.py --size 7m          # or 30m; --threads 2 --rounds 9

Every contender trains the same shape on the same tokens: forward, backward, clip at 1.0, AdamW. "documented" is
what each project's instructions give on a CPU (fp32, eager); "best" is bf16 autocast with the model compiled, the
fastest setting found for it here. poise runs its real step, guard and journal on. The contenders take turns,
round by round; ratios are taken within a round and their median is printed. Utilisation is
(training FLOP per token x tokens/s) / (the bf16 rate of a 2048^3 matrix product measured in the same rounds).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # the same for all: torch's own switch for huge pages

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"7m": (6, 256, 4, 8), "30m": (8, 512, 8, 4)}  # layers, width, heads, batch
T, V = 256, 8192
Step = Callable[[], None]


class NanoBlock(nn.Module):
    """The block of a nanoGPT-style model: pre-norm, fused QKV, SDPA, GELU, no biases."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.h = h
        self.n1, self.n2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.fc, self.out = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, t, d))
        return x + self.out(F.gelu(self.fc(self.n2(x))))


class NanoGPT(nn.Module):
    def __init__(self, n: int, d: int, h: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, d), nn.Embedding(T, d)
        self.blocks = nn.ModuleList(NanoBlock(d, h) for _ in range(n))
        self.norm = nn.LayerNorm(d, bias=False)
        self.head = nn.Linear(d, V, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def hf_llama(n: int, d: int, h: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=d, intermediate_size=ff(d), num_hidden_layers=n, num_attention_heads=h,
        max_position_embeddings=T, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids).logits

    return Logits()


def litgpt(n: int, d: int, h: int) -> nn.Module:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=T, vocab_size=V, padded_vocab_size=V, n_layer=n, n_head=h, n_embd=d, rotary_percentage=1.0,
            parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
            intermediate_size=ff(d),
        )
    )  # fmt: skip
    model.lm_head.weight = model.transformer.wte.weight
    return model


def ff(d: int) -> int:
    return -(-8 * d // 3 // 64) * 64


def peer(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], best: bool) -> Step:
    """A plain loop around somebody's model: fp32 eager, or bf16 autocast + compile + fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=best or None)
    forward = torch.compile(model) if best else model
    turn = iter(range(10**9))

    def step() -> None:
        inputs, targets = batches[next(turn) % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            loss = F.cross_entropy(forward(inputs).view(-1, V), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def poise_run(size: str, compiled: bool, folder: Path, threads: int):
    from poise.hardware import distributed
    from poise.train import recipe as recipes
    from poise.train.run import assemble, prepared, resolve

    n, d, h, batch = SIZES[size]
    recipe = recipes.load(
        "nano",
        {
            "model": {"n_layers": n, "d_model": d, "n_heads": h, "mlp": "swiglu", "methods": []},
            "train": {"batch_size": batch, "seq_len": T, "steps": 100_000, "threads": threads,
                      "dtype": "bf16", "compile": "on" if compiled else "off"},
            "optim": {"lr": 1e-3},
        },
    )  # fmt: skip
    world = distributed.init()
    tokens, recipe = prepared(recipe, None, world)
    folder.mkdir()
    return assemble(resolve(recipe, tokens), folder, tokens, world, [])


def poise_step(run) -> Step:
    from poise.train.step import train_step

    def step() -> None:
        train_step(run)

    return step


def matmul_rate() -> float:
    a = torch.randn(2048, 2048).to(torch.bfloat16)
    best = 1e9
    for _ in range(4):
        t = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - t)
    return 2 * 2048**3 / best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--only", default="", help="comma-separated beginnings of contender names")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, d, h, batch = SIZES[options.size]
    tokens_per_turn = batch * T * options.steps

    with tempfile.TemporaryDirectory() as tmp:
        eager = poise_run(options.size, False, Path(tmp) / "eager", options.threads)
        steps: dict[str, Step] = {"poise": poise_step(eager)}
        steps["poise compiled"] = poise_step(poise_run(options.size, True, Path(tmp) / "compiled", options.threads))
        batches = []
        for i in range(8):
            b = eager.loader.batch(i * batch, batch)
            batches.append((b.inputs, b.targets))
        for name, make in (
            ("HF Llama", hf_llama),
            ("litgpt", litgpt),
            ("nanoGPT-style", NanoGPT),
        ):
            for best in (False, True):
                steps[f"{name} {'best' if best else 'documented'}"] = peer(make(n, d, h), batches, best)
        if options.only:
            steps = {k: s for k, s in steps.items() if k.startswith(tuple(options.only.split(",")))}
        for name, step in steps.items():
            t = time.perf_counter()
            step()
            step()
            print(f"warm-up {name}: {time.perf_counter() - t:.1f} s", flush=True)
        speed: dict[str, list[float]] = {name: [] for name in steps}
        rates = []
        for _ in range(options.rounds):
            rates.append(matmul_rate())
            for name, step in steps.items():
                t = time.perf_counter()
                for _ in range(options.steps):
                    step()
                speed[name].append(tokens_per_turn / (time.perf_counter() - t))
        report(options, eager, speed, rates)


def report(options, eager, speed: dict[str, list[float]], rates: list[float]) -> None:
    from poise.model.counts import count

    counts = count(eager.model.spec)
    rate = statistics.median(rates)
    print(
        f"\nsize {options.size}: {counts.params / 1e6:.1f}M parameters, "
        f"{counts.flops_per_token / 1e6:.1f} MFLOP/token, {options.threads} threads, "
        f"{options.rounds} rounds of {options.steps} steps, torch {torch.__version__}"
    )
    low, high = min(rates) / 1e9, max(rates) / 1e9
    print(f"bf16 matrix product: median {rate / 1e9:.0f} GFLOP/s (min {low:.0f}, max {high:.0f})")
    ours = [name for name in speed if name.startswith("poise")]
    print(f"{'':26}{'tokens/s median':>16}{'best':>8}{'of product':>12}" + "".join(f"{o + ' /':>20}" for o in ours))
    for name, values in speed.items():
        share = statistics.median(v * counts.flops_per_token / r for v, r in zip(values, rates, strict=True))
        ratios = [statistics.median(a / b for a, b in zip(speed[o], values, strict=True)) for o in ours]
        print(f"{name:26}{statistics.median(values):16.0f}{max(values):8.0f}{share:12.1%}"
              + "".join(f"{r:19.2f}x" for r in ratios))  # fmt: skip


if __name__ == "__main__":
    main()
