"""Validation loss on the held-out split."""

from __future__ import annotations

import torch

from poise.core.types import Batch
from poise.data.loader import Loader
from poise.model.decoder import Decoder


def validation_loss(model: Decoder, loader: Loader, batches: int, batch_size: int, device: torch.device) -> float:
    """Return the mean cross-entropy in nats over the first ``batches`` of the held-out split, always the same.

    Auxiliary loss terms are not part of it.
    """
    batches = min(batches, max(1, loader.sequences // batch_size))
    size = min(batch_size, loader.sequences)
    total = torch.zeros((), device=device)
    model.eval()
    with torch.no_grad():
        for index in range(batches):
            batch: Batch = loader.batch(index * size, size)
            total += model(batch.inputs.to(device), batch.targets.to(device)).ce
    model.train()
    return float(total) / batches
