"""The guard in Lightning: one line. Needs ``pip install lightning``.

python examples/lightning_trainer.py
"""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning
import torch
from torch import nn

from poise.integrations.lightning import GuardCallback


class Small(lightning.LightningModule):
    """A small regression whose 40th gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Return the loss."""
        (x,) = batch
        return (self.net(x) - x.sin().sum(1, keepdim=True)).square().mean()

    def on_after_backward(self) -> None:
        """Spoil one gradient."""
        if self.global_step == 40:
            self.net[0].weight.grad[0, 0] = math.inf

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train 100 steps."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(3200, 8)), batch_size=32)
    guard = GuardCallback()
    trainer = lightning.Trainer(
        max_steps=100,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[guard],  # the line
    )
    module = Small()
    trainer.fit(module, loader)
    print(f"skipped {guard.skipped} step; all weights finite: {all(p.isfinite().all() for p in module.parameters())}")


if __name__ == "__main__":
    main()
