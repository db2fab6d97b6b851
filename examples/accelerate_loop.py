"""The guard in an Accelerate loop with gradient accumulation: one line. Needs ``pip install accelerate``.

python examples/accelerate_loop.py
"""

from __future__ import annotations

import logging
import math

import torch
from accelerate import Accelerator
from torch import nn

import poise.integrations.accelerate as poise_accelerate


def main() -> None:
    """Fit a small function over 100 updates of 2 micro-batches; one gradient is NaN."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    guard = poise_accelerate.guard(accelerator, model, optimizer)  # the line
    for index in range(200):
        with accelerator.accumulate(model):
            x = torch.randn(32, 8)
            loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            if index == 80:
                model[0].weight.grad[0, 0] = math.nan
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if index % 40 == 39:
            print(f"micro-batch {index + 1:3d}  loss {loss.item():.3f}  skipped {guard.skipped}")


if __name__ == "__main__":
    main()
