"""What a step and its memory cost with each method of the model, relative to the model without.

    python benchmarks/method_cost.py --rounds 9 --threads 1

A step is forward, backward and AdamW on random ids: nothing measured depends on the text. The plain model is timed
before and after every method, and a method's ratio in a round is its time over the mean of the two; printed are the
median over rounds and the quartiles. Processor time of one thread, which other programs on the machine disturb less
than the clock; on a GPU the clock. ``saved`` is what the forward pass keeps for the backward pass beside parameters
and inputs; ``passes`` is how often the method goes over activations that it adds or changes: the elements that extra
operations of the forward pass write (matrix products and views left out), over the elements of one (B, T, D) tensor
of every branch, of which a block has two. The code is eager; a compiler fuses neighbouring passes into one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from poise.core.errors import UserError
from poise.model.build import apply, build
from poise.model.methods import METHODS
from poise.model.spec import Part, Spec
from poise.train.optimizer import optimizer_for
from poise.train.recipe import OptimConfig

GOAL = 1.03
"""Goal for norms and gates."""

NORMS_AND_GATES = [
    "qk_norm",
    "qkv_norm",
    "qk_fc_norm",
    "embed_norm",
    "post_ln",
    "peri_ln",
    "sandwich_ln",
    "olmo2_norm",
    "mix_ln",
    "hybrid_norm",
    "deep_norm",
    "sub_ln",
    "layer_norm_scaling",
    "gated_attention",
    "gated_attention:score=headwise",
    "layer_scale",
    "value_residual",
]

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul")


class Writes(TorchDispatchMode):
    """Counts the elements that operations write which are neither products nor views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in (*PRODUCTS, "t", "detach", "_unsafe_view", "empty"):
            return out
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.elements += one.numel()
        return out


class Arm:
    """A model with some methods, its optimizer and one batch."""

    def __init__(self, spec: Spec, words: list[str], batch: int, device: str, dtype: torch.dtype) -> None:
        self.spec = apply(spec, *words)
        self.model = build(self.spec, seed=0, device=device, compute_dtype=dtype)
        self.optimizer = optimizer_for(OptimConfig(lr=1e-4), self.model)
        ids = torch.randint(0, spec.vocab_size, (batch, spec.seq_len + 1), generator=torch.Generator().manual_seed(0))
        self.inputs, self.targets = ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)

    def step(self) -> float:
        clock = time.perf_counter if self.inputs.is_cuda else time.process_time
        if self.inputs.is_cuda:
            torch.cuda.synchronize()
        start = clock()
        self.model(self.inputs, self.targets).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.inputs.is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    def saved(self) -> int:
        """Bytes kept for the backward pass, each memory block once."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.model(self.inputs, self.targets).loss
        del loss
        return sum(kept.values())

    def writes(self) -> int:
        with Writes() as counted, torch.no_grad():
            self.model.hidden(self.inputs)
        return counted.elements


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--only", nargs="*", default=[], help="methods to time, with settings; default all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    spec = Spec(
        vocab_size=512,
        seq_len=256,
        n_layers=options.layers,
        d_model=options.width,
        n_heads=options.width // 64,
        n_kv_heads=options.width // 64,
        d_ff=-(-8 * options.width // 3 // 64) * 64,
        tied=False,
        init=Part("small"),
    )
    words = options.only or [*METHODS, "gated_attention:score=headwise"]

    def arm(methods: list[str]) -> Arm:
        return Arm(spec, methods, options.batch, options.device, dtype)

    plain = arm([])
    for _ in range(2):
        plain.step()
    saved, written = plain.saved(), plain.writes()
    unit = 2 * spec.n_layers * options.batch * spec.seq_len * spec.d_model
    print(
        f"{spec.n_layers} layers of width {spec.d_model}, {options.batch} x {spec.seq_len} tokens, {options.dtype}, "
        f"{options.device}, {options.threads} thread(s), {options.rounds} rounds; plain step "
        f"{statistics.median(plain.step() for _ in range(5)) * 1e3:.0f} ms, {saved / 1e6:.1f} MB saved"
    )
    print(f"{'method':<34}{'step':>8}  {'quartiles':<16}{'saved':>8}{'passes':>9}")
    over = []
    for word in words:
        try:
            treated = arm([word])
        except UserError as error:
            print(f"{word:<34}refused: {error}")
            continue
        treated.step()
        ratios = []
        for _ in range(options.rounds):
            before, own, after = plain.step(), treated.step(), plain.step()
            ratios.append(2 * own / (before + after))
        ratios.sort()
        ratio = statistics.median(ratios)
        extra, passes = treated.saved() / saved, (treated.writes() - written) / unit
        goal = word in NORMS_AND_GATES
        missed = goal and ratio > GOAL
        over += [word] if missed else []
        quartiles = f"{ratios[len(ratios) // 4]:.3f} .. {ratios[3 * len(ratios) // 4]:.3f}"
        mark = " over the goal" if missed else ""
        print(f"{word:<34}{ratio:>7.3f}x  {quartiles:<16}{extra:>7.3f}x{passes:>9.2f}{mark}")
        sys.stdout.flush()
    print(f"norms and gates above {GOAL}x: {', '.join(over) or 'none'}")


if __name__ == "__main__":
    main()
