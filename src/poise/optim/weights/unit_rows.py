"""Unit rows: after every step, bring vectors of given matrices back to length one (nGPT's weights on the sphere).

Citation: Loshchilov et al. 2024, nGPT: Normalized Transformer with Representation Learning on the Hypersphere,
arXiv 2410.01131 (reference code NVIDIA/ngpt).
Formula: w <- w / |w| for every vector w of a matrix along a dimension: dimension 1 for rows (queries, keys, values,
inner MLP, embedding, head), dimension 0 for columns (the matrices that write into the residual stream).
Differs from the paper in: lengths are computed in at least fp32 and the result is rounded once to the parameter's
dtype (the reference normalises in fp32 too); a zero vector stays zero; a refused step changes nothing.
Acts: once when it is attached, and after every step. Cost: one pass over the matrices a step; under FSDP2, for those
that are sharded along the dimension of their vectors, one all-reduce of their squared lengths together. Switch off: do
not attach it.

It is a hook and not a link of the chain, because a link sees one tensor at a time without its identity; as a hook it
serves any ``torch.optim.Optimizer``. Use weight decay 0 with it: decay along a vector is undone by the hook.

Shapes: O rows of a parameter, D columns, 1 a kept dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.optim.sharded import local_part

CARD = Card(
    name="unit_rows",
    kind="optimizer",
    title="Bring rows or columns of matrices back to length one after every step (nGPT)",
    citation="Loshchilov et al. 2024, nGPT, arXiv 2410.01131",
    formula="w <- w / |w| for every row (or column) of the given matrices",
    acts="when it is attached, and after every step",
    cost="one pass over the matrices a step; under FSDP2 one all-reduce of lengths for those sharded across them",
    off="do not attach it",
    differs="a zero vector stays zero; a refused step changes nothing",
)


class UnitRows:
    """Unit vectors after every step of an optimizer.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> handle = UnitRows([(weight, 1)]).attach(optimizer)
    >>> [[round(value, 6) for value in row] for row in weight.tolist()]
    [[0.6, 0.8], [0.0, 1.0]]

    Parameters may be whole or sharded (FSDP2, DTensor); with several ranks all of them step together. Where the
    optimizer refused the step (its ``skipped`` is true, as of ``poise.optim.chain.Chain``), weights keep their bits.
    Nothing waits for the device.

    Args:
        parameters: matrices, each with the dimension along which its vectors lie: 1 (or -1) for rows, 0 for columns.
            Describe them after sharding. A tied matrix counts once.

    Raises:
        UserError: no parameters, one that is no matrix, another dimension, or two dimensions for one matrix.
    """

    def __init__(self, parameters: Iterable[tuple[Tensor, int]]) -> None:
        found: dict[int, tuple[Tensor, int]] = {}
        for parameter, dim in parameters:
            if parameter.ndim != 2 or dim not in (-2, -1, 0, 1):
                raise UserError(
                    f"unit_rows got a parameter of shape {tuple(parameter.shape)} with dimension {dim}; "
                    "give matrices with 1 for rows or 0 for columns"
                )
            along = dim % 2
            if found.setdefault(id(parameter), (parameter, along))[1] != along:
                raise UserError("unit_rows got one matrix with both dimensions; choose rows (1) or columns (0)")
        if not found:
            raise UserError("unit_rows got no parameters; give at least one matrix, e.g. [(weight, 1)]")
        self._parameters = list(found.values())

    def attach(self, optimizer: torch.optim.Optimizer, *, now: bool = True) -> RemovableHandle:
        """Normalise after every ``optimizer.step()`` from now on; ``remove()`` of what is returned ends it.

        Args:
            optimizer: any.
            now: also normalise at once. Where a checkpoint was loaded before, ``False`` keeps its weights bit for bit.
        """
        if now:
            self()
        return optimizer.register_step_post_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: Any = None, args: Any = (), kwargs: Any = None) -> None:
        """Normalise all matrices."""
        skipped = getattr(optimizer, "skipped", None)
        locals_ = [(local_part(parameter), along) for parameter, along in self._parameters]
        squares = [_wide(local_OD).square().sum(along, keepdim=True) for local_OD, along in locals_]
        self._over_ranks(squares)
        for (local_OD, _), square in zip(locals_, squares, strict=True):
            factor = torch.where(square > 0, square.rsqrt(), 1.0)
            if skipped is not None:
                factor = torch.where(skipped.to(factor.device), 1.0, factor)
            local_OD.copy_(_wide(local_OD) * factor)

    def _over_ranks(self, squares: list[Tensor]) -> None:
        """Add up, in place, the squared lengths of vectors that are spread over ranks: one collective a group."""
        spread: dict[Any, list[Tensor]] = {}
        for (parameter, along), square in zip(self._parameters, squares, strict=True):
            for group in _spread_along(parameter, along):
                spread.setdefault(group, []).append(square)
        for group, parts in spread.items():
            flat = torch.cat([part.flatten() for part in parts])
            distributed.all_reduce(flat, group=group)
            for part, whole in zip(parts, torch.split(flat, [p.numel() for p in parts]), strict=True):
                part.copy_(whole.view_as(part))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread_along(parameter: Any, along: int) -> list[Any]:
    """Return the process groups over which the vectors of a parameter are cut into pieces."""
    if not hasattr(parameter, "placements"):
        return []
    mesh = parameter.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if placement.is_shard(along) and mesh.size(dim) > 1
    ]
