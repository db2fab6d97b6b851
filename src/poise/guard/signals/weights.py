"""RMS and largest element of all weights, place by place. Reads every weight once, so it is not for every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poise.guard.signals.gradient import Parts

if TYPE_CHECKING:
    from torch import Tensor, nn


def weight_readings(model: nn.Module) -> dict[str, Tensor]:
    """Return ``weight_rms@<place>`` and ``weight_max@<place>`` of the trainable weights: 0-dim float64, no host sync.

    Sharded weights (DTensor) count whole; then every rank has to call this, and it is one collective. Tied weights
    count once. A NaN anywhere in a place makes both of its readings NaN.
    """
    import torch
    from torch import distributed

    parts = Parts(model)
    if not parts.params:
        return {}
    with torch.no_grad():
        local = parts.local_params()
        squares = parts.norms(local).square()
        sizes = torch.tensor([float(p.numel()) for p in local], dtype=torch.float64).to(parts.device, non_blocking=True)
        sums_QP = parts.by_place(torch.stack([squares, sizes]), parts.places)
        highest_P = parts.largest(parts.norms(local, torch.inf))
        whole, sharded = sums_QP.chunk(2, dim=1)
        if any(parts.sharded) and distributed.is_initialized():
            row = torch.cat([sharded.flatten(), highest_P])
            every = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
            distributed.all_gather(every, row)
            rows = torch.stack(every)
            sharded = rows[:, : sharded.numel()].sum(0).view_as(sharded)
            highest_P = rows[:, -len(parts.places) :].amax(0)
        squares_P, sizes_P = whole + sharded
        rms_P = (squares_P / sizes_P).sqrt()
    found = {f"weight_rms@{place}": rms for place, rms in zip(parts.places, rms_P, strict=True)}
    return found | {f"weight_max@{place}": high for place, high in zip(parts.places, highest_P, strict=True)}
