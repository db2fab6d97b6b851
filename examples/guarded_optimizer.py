"""The guard for somebody who has nothing but an optimizer: one line, and the loop stays as it is.

python examples/guarded_optimizer.py
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from poise.integrations.optimizer import guarded


def main() -> None:
    """Fit a small function; at step 50 a gradient is infinite, and that step is not taken."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = guarded(torch.optim.AdamW(model.parameters(), lr=3e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for step in range(1, 201):
        x = torch.randn(32, 8)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        if step == 50:
            model[0].weight.grad[0, 0] = math.inf
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(loss=loss)
        schedule.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  skipped {optimizer.skipped}")


if __name__ == "__main__":
    main()
