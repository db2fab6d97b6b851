"""Single values, each with a step and a column, as rows: one a step; blocks where many rows have the same columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from poise.postmortem.readers.names import STEP
from poise.postmortem.readers.source import Block, Item

BLOCK_ROWS = 8
"""Rows with the same columns that are worth a block."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def rows(steps: Ints, columns: Ints, values: Floats, names: Sequence[str]) -> Iterator[Item]:
    """Yield the values in the order of their steps as far as these rise; where the steps fall, a new stretch begins.

    What was written several times at one step and in one column is yielded as often, in the same order.

    Args:
        steps, columns, values: of one length N; ``columns`` are places in ``names``.
        names: what the columns are called.
    """
    falls = (np.flatnonzero(steps[1:] < steps[:-1]) + 1).tolist()
    if BLOCK_ROWS * len(falls) > len(steps):  # not worth the sorting
        for step, column, value in zip(steps.tolist(), columns.tolist(), values.tolist(), strict=True):
            yield {STEP: float(step), names[column]: value}
        return
    for begin, end in pairwise((0, *falls, len(steps))):
        part = slice(begin, end)
        if end > begin:
            yield from _rising(steps[part], columns[part], values[part], names)


def _rising(steps: Ints, columns: Ints, values: Floats, names: Sequence[str]) -> Iterator[Item]:
    order = np.lexsort((columns, steps))
    times = _times(steps[order], columns[order])
    if times.any():
        again = np.lexsort((columns[order], times, steps[order]))
        order, times = order[again], times[again]
    steps, columns, values = steps[order], columns[order], values[order]
    begins = np.flatnonzero(np.append(True, (steps[1:] != steps[:-1]) | (times[1:] != times[:-1])))
    widths = np.diff(np.append(begins, len(steps)))
    changes = np.flatnonzero(~_alike(columns, begins, widths)) + 1
    for first, last in pairwise((0, *changes.tolist(), len(begins))):
        width, begin = int(widths[first]), int(begins[first])
        table = values[begin : begin + (last - first) * width].reshape(-1, width)
        at = steps[begins[first:last]].astype(np.float64)
        called = [names[column] for column in columns[begin : begin + width].tolist()]
        if last - first >= BLOCK_ROWS:
            yield Block({STEP: at} | {name: table[:, i].copy() for i, name in enumerate(called)})
        else:
            for step, row in zip(at.tolist(), table.tolist(), strict=True):
                yield {STEP: step} | dict(zip(called, row, strict=True))


def _times(steps: Ints, columns: Ints) -> Ints:
    """Return how often each value's step and column came before; both are sorted."""
    new = np.append(True, (steps[1:] != steps[:-1]) | (columns[1:] != columns[:-1]))
    places = np.arange(len(steps))
    return places - np.maximum.accumulate(np.where(new, places, 0))


def _alike(columns: Ints, begins: Ints, widths: Ints) -> NDArray[np.bool_]:
    """Return for each row but the first whether it has the columns of the one before."""
    before = np.arange(len(columns)) - np.repeat(widths, widths)
    equal = columns == columns[np.maximum(before, 0)]
    alike: NDArray[np.bool_] = np.logical_and.reduceat(equal, begins)[1:] & (widths[1:] == widths[:-1])
    return alike
