"""A hash of what a step was trained on, so that a step that is shown again can be told. Imports torch when called.

Every element is mixed with its position by an integer hash of 64 bits (the finaliser of splitmix64, Steele, Lea
and Flood 2014, "Fast splittable pseudorandom number generators"), the results are summed, and the sum is cut to 53
bits. Integer sums do not depend on their order, so the hash is exact, equal on CPU and GPU and from run to run; it
does depend on the order of the elements and on the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

BITS: Final = 53
"""A float holds integers below ``2**53`` exactly, and so do JSON and ``Signals.extra``."""

_STEP: Final = 0x9E3779B97F4A7C15 - 2**64
_MUL1: Final = 0xBF58476D1CE4E5B9 - 2**64
_MUL2: Final = 0x94D049BB133111EB - 2**64
_MASK: Final = 2**64 - 1


def fingerprint(inputs: Tensor) -> Tensor:
    """Return the hash of a tensor of any shape and dtype: 0-dim int64 in ``[0, 2**53)``, on its device, no sync.

    Token ids hash alike whatever their integer dtype; of floats the bits are hashed. Costs a few passes over the
    ids, which are far fewer than anything else in a step.
    """
    import torch

    x = inputs.detach()
    if x.is_sparse:
        x = x.to_dense()
    x = x.to_local() if hasattr(x, "to_local") else x
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.is_floating_point():
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.contiguous().view(bits[x.element_size()])
    flat = x.reshape(-1).to(torch.int64)
    places = torch.arange(1, flat.numel() + 1, dtype=torch.int64, device=flat.device)
    total: Tensor = _mix(flat + places * _STEP).sum()
    for size in inputs.shape:
        total = _mix(total ^ (size + 1))
    return total.bitwise_and(2**BITS - 1)


def combine(parts: Sequence[Tensor]) -> Tensor:
    """Return the hash of a step's micro-batches from theirs, order-sensitive; of one, that one.

    Raises:
        ValueError: no parts.
    """
    import torch

    if not parts:
        raise ValueError("no fingerprints to combine; take one of every micro-batch")
    if len(parts) == 1:
        return parts[0]
    return fingerprint(torch.stack(list(parts)))


def combine_ints(parts: Sequence[int]) -> int:
    """Return the hash of several ranks' hashes, by rank; of one, that one. On the host, below ``2**53``.

    >>> combine_ints([7]), combine_ints([1, 2]) != combine_ints([2, 1])
    (7, True)
    """
    if len(parts) == 1:
        return parts[0]
    total = 0
    for part in parts:
        total = (total + part + _STEP) & _MASK
        total = ((total ^ (total >> 30)) * _MUL1) & _MASK
        total = ((total ^ (total >> 27)) * _MUL2) & _MASK
        total ^= total >> 31
    return int(total & (2**BITS - 1))


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's finaliser of int64 values; products wrap around, shifts fill with zeros."""
    x = (x ^ _shift(x, 30)) * _MUL1
    x = (x ^ _shift(x, 27)) * _MUL2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Return a logical right shift: torch's is arithmetic, so the copies of the sign are masked off."""
    return (x >> by) & ((1 << (64 - by)) - 1)
