"""Stability methods on a transformers model before training: one line. Needs ``pip install transformers``.

    python examples/hf_methods.py

A tiny Llama with random weights on made-up tokens, plain and with three methods, at an ordinary and at a much too high
learning rate, one seed. It shows how to apply, save and load; it is no measurement of what the methods buy.
"""

from __future__ import annotations

import tempfile

import torch
import transformers

import poise
from poise import load_hf

VOCAB, LENGTH, STEPS = 64, 32, 40
METHODS = ("qk_norm", "peri_ln", "z_loss:coefficient=1e-4")


def tiny_llama() -> transformers.LlamaForCausalLM:
    """Return the same random model every time."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def batch(step: int) -> torch.Tensor:
    """Counting with a random start and stride, (8, 32) int64."""
    random = torch.Generator().manual_seed(step)
    start, stride = torch.randint(VOCAB, (8, 1), generator=random), torch.randint(1, 4, (8, 1), generator=random)
    return (start + stride * torch.arange(LENGTH)) % VOCAB


def train(model: transformers.LlamaForCausalLM, lr: float) -> float:
    """Train and return the cross-entropy on a new batch, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(STEPS):
        ids_BT = batch(step)
        model(ids_BT, labels=ids_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids_BT = batch(STEPS)
        return float(model(ids_BT, labels=ids_BT).loss)


def main() -> dict[str, float]:
    """Train all four, save and load the last, and return the losses."""
    losses = {}
    for lr in (3e-3, 3e-1):
        for name, methods in (("plain", ()), ("with methods", METHODS)):
            model = poise.apply(tiny_llama(), *methods)  # the line
            losses[f"{name}, lr {lr:g}"] = train(model, lr)
    for name, loss in losses.items():
        print(f"{name:22s} loss {loss:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_hf(folder)  # with its methods; from_pretrained alone would leave them out
    ids_BT = batch(0)
    print(f"saved with {again.config.poise_methods}")
    print(f"loaded model is the same: {torch.equal(again(ids_BT).logits, model(ids_BT).logits)}")
    return losses


if __name__ == "__main__":
    main()
