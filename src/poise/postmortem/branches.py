"""Rows whose steps do not simply rise: which of them count.

A log goes back for four reasons, and only one of them ends what came before. A run that was **rewound** goes on from an
earlier step, row after row; what it had logged above that step does not count any more. A **stray** row (a closing
summary, the best checkpoint so far, a line that was cut off) stands alone. Steps that **start anew in each epoch** are
counted on. And a file may have its rows from the last to the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

FEWEST_ROWS = 3
"""Rising rows after a step back that make it a rewind, where the log does not say that it went back."""

NEAR = 10
"""Rows before, whose steps say how far apart rows are."""


def out_of_order(steps: Ints) -> bool:
    """Return whether rows only stand in another order: each step once, and many steps back all along."""
    falls = int((np.diff(steps) < 0).sum())
    return falls >= max(5, len(steps) // 50) and falls < len(steps) - 1 and len(np.unique(steps)) == len(steps)


def stray(steps: Ints, said: Sequence[int] = ()) -> Mask:
    """Return which rows step back and are no rewind: fewer than ``FEWEST_ROWS`` rise from there.

    Rows that rise up to the highest step before do not count on when they leap over it: 1, 2, ... 100, **3**, 101, 102.

    Args:
        steps: of the rows with a loss, in the file's order.
        said: places in ``steps`` before which the log says that the run went back or was started again.
    """
    out = np.zeros(len(steps), dtype=bool)
    rising = np.diff(steps)
    falls = (np.flatnonzero(rising < 0) + 1).tolist()
    if not falls or not (rising > 0).any():
        return out
    usual = float(np.median(rising[rising > 0]))
    marks = set(said)
    highest = int(steps[0])
    at = 0
    for fall in falls:
        if fall < at:
            continue
        highest = max(highest, int(steps[at:fall].max())) if fall > at else highest
        row = fall
        while row < len(steps) and steps[row] < highest:
            near = np.diff(steps[max(row - NEAR, 0) : row])
            apart = max(usual, float(np.median(near[near > 0])) if (near > 0).any() else 0.0)
            if row in marks or _goes_on(steps, row, highest, apart):
                highest = int(steps[row])
                break
            out[row] = True
            row += 1
        at = row
    return out


def _goes_on(steps: Ints, row: int, highest: int, apart: float) -> bool:
    """Return whether rows rise from ``row`` on, without a leap over the highest step before."""
    count, last = 1, int(steps[row])
    for step in steps[row + 1 : row + 1 + 20 * FEWEST_ROWS].tolist():
        if step < last or (step > highest and step - last > 1.5 * apart):
            break
        count += step > last
        last = step
        if count >= FEWEST_ROWS:
            return True
    return False


def count_on(steps: Ints, epochs: Floats) -> int:
    """Count steps on, in place, that start anew in each epoch; return in how many epochs they did.

    Args:
        steps: of all rows, in the file's order.
        epochs: of the same rows, NaN where the log does not say. They are whole or fractions.
    """
    told = np.flatnonzero(np.isfinite(epochs))
    if len(told) < 2:
        return 0
    last_told = np.searchsorted(told, np.arange(len(steps)), side="right") - 1
    epochs = np.where(last_told < 0, np.nan, epochs[told[np.maximum(last_told, 0)]])
    rising = np.diff(steps)
    anew = (rising < 0) & (np.diff(epochs) > 0) & (2 * steps[1:] <= steps[:-1])
    if not anew.any():
        return 0
    apart = int(np.median(rising[rising > 0])) if (rising > 0).any() else 1
    back = np.diff(epochs) < 0  # the run itself went back
    offset, times = 0, 0
    offsets = np.zeros(len(steps), dtype=np.int64)
    began: dict[float, int] = {float(epochs[0]): 0}
    places = (np.flatnonzero(anew | back) + 1).tolist()
    for place, following in zip(places, [*places[1:], len(steps)], strict=True):
        epoch = float(epochs[place])
        if anew[place - 1]:
            offset += int(steps[place - 1]) + apart - int(steps[place])
            times += 1
        else:
            offset = began.get(epoch, offset)
        began[epoch] = offset
        offsets[place:following] = offset
    steps += offsets
    return times


def counted(rows: Ints, steps: Ints, rewinds: tuple[Floats, Ints]) -> tuple[Ints, Ints, int]:
    """Return (places, their steps) of the rows that count, one a step; and how many steps had several.

    Args:
        rows: numbers of the rows, rising.
        steps: of these rows.
        rewinds: (positions, bound) of ``log.py``: what stands before a position counts only up to its bound.
    """
    at, bound = rewinds
    after = np.searchsorted(at, rows, side="right")
    inside = after < len(at)
    keep = np.ones(len(rows), dtype=bool)
    keep[inside] = steps[inside] <= bound[after[inside]]
    places = np.flatnonzero(keep)
    steps = steps[places]
    if (np.diff(steps) > 0).all():
        return places, steps, 0
    order = np.argsort(steps, kind="stable")
    places, steps = places[order], steps[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return places[last], steps[last], int((~last).sum())
