"""Loss and gradient norm of anybody's loop, equal on all ranks. Imports torch only when called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, 0-dim fp32 on their device, without a host sync.

    Sharded gradients (DTensor) are counted whole, so every rank of their mesh has to call this. Gradients on
    different meshes are grouped by mesh first.
    """
    import torch

    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            grad = grad.detach()
            if grad.is_sparse:
                grad = grad.coalesce().values()
            groups.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms: list[Tensor] = []
    for grads in groups.values():
        # fp32 accumulation: the norm of a bf16 tensor in bf16 has two or three digits
        each = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        whole = torch.linalg.vector_norm(torch.stack(each))
        norms.append(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)
    if not norms:
        return torch.zeros((), dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def agree(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Return (loss, norm) as floats that are equal on all ranks; the step's one wait for the device.

    The loss is the mean over ranks, the norm the largest; NaN on any rank is NaN on all. One collective.
    """
    import torch
    from torch import distributed

    both = torch.stack([loss.detach().float().mean(), norm.detach().float().to(loss.device)])
    if not (distributed.is_available() and distributed.is_initialized()):
        own_loss, own_norm = both.tolist()
        return own_loss, own_norm
    if distributed.get_backend() == "nccl" and not both.is_cuda:
        both = both.cuda()
    every = [torch.empty_like(both) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, both)
    ranks = torch.stack(every)
    mean_loss, largest_norm = torch.stack([ranks[:, 0].mean(), ranks[:, 1].max()]).tolist()
    return mean_loss, largest_norm
