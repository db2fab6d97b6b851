"""The guard in a plain PyTorch loop: two lines, and a third for going back without checkpoints.

    python examples/plain_loop.py

A tiny GPT on made-up tokens. At step 60 one gradient element becomes NaN: the step is skipped. At step 120 a weight
is spoilt between two steps: the guard goes back to a copy in memory.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from poise.integrations.plain import SnapshotHost

VOCAB, LENGTH = 64, 32


class TinyGpt(nn.Module):
    """Two blocks of attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the mean next-token loss in nats."""
        mask_TT = nn.Transformer.generate_square_subsequent_mask(tokens_BT.shape[1])
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, src_mask=mask_TT, is_causal=True)
        logits_BTV = self.head(x_BTD)
        return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def batch(step: int) -> torch.Tensor:
    """Counting with a random start and stride, (8, 32) int64."""
    random = torch.Generator().manual_seed(step)
    start, stride = torch.randint(VOCAB, (8, 1), generator=random), torch.randint(1, 4, (8, 1), generator=random)
    return (start + stride * torch.arange(LENGTH)) % VOCAB


def main() -> None:
    """Train 200 steps and print what happened."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    model = TinyGpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guard = SnapshotHost(model, optimizer, every=20).guard()  # or Guard.for_run(model, optimizer), without going back
    for step in range(1, 201):
        loss = model(batch(step))
        loss.backward()
        if step == 60:
            model.head.weight.grad[0, 0] = math.nan
        if guard.allows(loss):
            optimizer.step()
        optimizer.zero_grad()
        if step == 120:
            model.head.weight.data[0, 0] = math.nan
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    assert all(torch.isfinite(p).all() for p in model.parameters())


if __name__ == "__main__":
    main()
