"""Validation loss on the held-out split."""

from __future__ import annotations

from typing import Any

import torch

from poise.core.types import Batch
from poise.data.feed.loader import Loader
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
            inputs, targets, named = arguments_of(batch, device)
            total += model(inputs, targets, **named).ce
    model.train()
    return float(total) / batches


def arguments_of(
    batch: Batch, device: torch.device, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return what a decoder is called with for a batch (its first ``rows`` rows): inputs, targets, the rest by name."""
    named = {} if batch.documents is None else {"documents_BT": batch.documents[:rows].to(device)}
    return batch.inputs[:rows].to(device), batch.targets[:rows].to(device), named
