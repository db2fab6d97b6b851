"""Rows that hold several documents: where each begins, and the rotary angles and masks that follow from it.

A document is a run of equal numbers in a row of ``documents_BT``. Nothing else of the numbers counts, and all that
attention needs is the position at which each position's document begins: query t sees the keys from there to t.

Shapes: B batch, T positions, K head width; with rotary angles half of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from poise.core.errors import UserError


class Documents:
    """The documents of a batch of rows, made once for all blocks.

    A plain class: in a tuple or a dataclass that enters a block FSDP2 would find the angles and round them to the
    parameters' dtype.

    Attributes:
        first: position at which the document of each position begins, (B, T) int64; never falls along a row.
        angles: cosine and sine of the rotary embedding, (B, 1, T, K/2) each, counted from there.
    """

    def __init__(self, first_BT: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        self.first, self.angles = first_BT, angles
        self._masks: dict[torch.dtype, Tensor] = {}
        self._lengths: list[list[int]] = []

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores: 0 where a key is seen and -inf elsewhere, (B, 1, T, T).

        Blocks share one; a compiler finds by itself that it is the same in each.
        """
        if torch.compiler.is_compiling():
            return self._mask(dtype)
        if dtype not in self._masks:
            self._masks[dtype] = self._mask(dtype)
        return self._masks[dtype]

    def _mask(self, dtype: torch.dtype) -> Tensor:
        at_T = torch.arange(self.first.shape[1], device=self.first.device)
        unseen_BTT = (at_T < self.first[:, :, None]) | (at_T > at_T[:, None])
        zero_BTT = torch.zeros((), dtype=dtype, device=at_T.device).expand_as(unseen_BTT)
        return zero_BTT.masked_fill(unseen_BTT, float("-inf"))[:, None]

    def lengths(self) -> list[list[int]]:
        """Return the lengths of the documents of each row, in order. On a GPU this waits for it."""
        if not self._lengths:
            T = self.first.shape[1]
            for first_T in self.first.cpu():
                begins = [*first_T.unique_consecutive().tolist(), T]
                self._lengths.append([stop - start for start, stop in pairwise(begins)])
        return self._lengths


def checked(documents_BT: Tensor, inputs_BT: Tensor) -> Tensor:
    """Return ``documents_BT`` if it can be the documents of ``inputs_BT``; values are not looked at.

    Raises:
        UserError: another shape than that of the inputs, or no integers.
    """
    if documents_BT.shape != inputs_BT.shape:
        shapes = f"{tuple(documents_BT.shape)} and inputs_BT {tuple(inputs_BT.shape)}"
        raise UserError(f"documents_BT has the shape {shapes}; give one document number for each position")
    if documents_BT.is_floating_point() or documents_BT.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise UserError(f"documents_BT is {documents_BT.dtype}; give int32 or int64 numbers of documents")
    return documents_BT


def first_positions(documents_BT: Tensor) -> Tensor:
    """Return the position at which the document of each position begins, (B, T) int64.

    >>> first_positions(torch.tensor([[7, 7, 8, 8, 8], [0, 0, 0, 0, 3]])).tolist()
    [[0, 0, 2, 2, 2], [0, 0, 0, 0, 4]]
    """
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    at_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return torch.where(begins_BT, at_T, 0).cummax(1).values
