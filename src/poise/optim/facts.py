"""Facts about a whole gradient, computed once, on the device, right for sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from poise.core.errors import UserError


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together: 0-dim, on their device, fp32 (fp64 if any of them is).

    DTensors count as a whole, so every rank of their mesh has to call this; tensors on different meshes are
    grouped by mesh and the norms combined. Gradients in 16 bits are summed in fp32. No host sync.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms: list[Tensor] = []
    for group in by_mesh.values():
        if all(grad.dtype in (torch.float32, torch.float64) for grad in group):
            norm = torch.nn.utils.get_total_norm(group)
        else:
            wide = [torch.linalg.vector_norm(grad, dtype=working_dtype(grad)) for grad in group]
            norm = torch.linalg.vector_norm(torch.stack(wide))
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not norms:
        return torch.zeros((), dtype=torch.float32)
    if len(norms) == 1:
        return norms[0]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the precision to compute in: fp32, or fp64 where the tensor has it."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class NormCache:
    """The norm of the present gradients, computed when first asked for and again only when they changed.

    Replaced gradients and in-place changes (another backward pass, another clipper) are seen by identity and
    version counter, which costs nothing on the device. Gradients are only weakly referenced. What changes
    sharded gradients has to do so on all ranks alike, so that all of them measure again or none does.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None
        self._each: list[Tensor] = []
        self._seen: list[tuple[TensorWeakRef, int]] = []

    def norm(self, params: Iterable[Tensor]) -> Tensor:
        """Return the global norm of the parameters' gradients.

        Raises:
            UserError: a gradient is sparse.
        """
        grads = [p.grad for p in params if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise UserError("a gradient is sparse, which no link can handle; build the embedding with sparse=False")
        if self._norm is None or not self._same(grads):
            self._each = _plain_norms(grads)
            whole = torch.linalg.vector_norm(torch.stack(self._each)) if self._each else None
            self._norm = global_norm(grad.detach() for grad in grads) if whole is None else whole
            self._seen = [(TensorWeakRef(grad), _version(grad)) for grad in grads]
        return self._norm

    def each(self, params: Iterable[Tensor]) -> dict[int, Tensor]:
        """Return the norm of every gradient by ``id`` of its parameter; nothing where they are sharded or mixed."""
        held = [p for p in params if p.grad is not None]
        self.norm(held)
        return dict(zip(map(id, held), self._each, strict=True)) if self._each else {}

    def forget(self) -> None:
        """Drop the norm: the gradients were used or cleared."""
        self._norm, self._each, self._seen = None, [], []

    def _same(self, grads: list[Tensor]) -> bool:
        return len(grads) == len(self._seen) and all(
            ref() is grad and version == _version(grad) for grad, (ref, version) in zip(grads, self._seen, strict=True)
        )


def _plain_norms(grads: list[Tensor]) -> list[Tensor]:
    """Return the norm of each of some whole tensors of one device in fp32 or fp64; nothing where they are not that."""
    kinds = {(grad.device, grad.dtype) for grad in grads}
    plain = len(kinds) == 1 and all(type(grad) is Tensor for grad in grads)
    if not plain or next(iter(kinds))[1] not in (torch.float32, torch.float64):
        return []
    return list(torch._foreach_norm([grad.detach() for grad in grads]))


def _version(grad: Tensor) -> int:
    """Count the in-place changes; a sharded gradient is accumulated into through its local part."""
    local: Tensor = getattr(grad, "_local_tensor", grad)
    return local._version
