"""The values of one column of a log, with the rows they are from: no numbers of rows where there are no gaps."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from poise.postmortem import branches

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Column:
    """The values of one column, and which rows they are from."""

    __slots__ = ("rows", "start", "values")

    def __init__(self, row: int) -> None:
        self.start = row
        self.rows: array[int] | None = None  # none while there is a value in every row from ``start`` on
        self.values = array("d")

    def __len__(self) -> int:
        return len(self.values)

    def add(self, row: int, value: float) -> None:
        """Take in one value."""
        if self.rows is not None:
            self.rows.append(row)
        elif row != self.start + len(self.values):
            self._part().append(row)
        self.values.append(value)

    def extend(self, row: int, values: Floats) -> None:
        """Take in the values of consecutive rows."""
        if self.rows is not None or row != self.start + len(self.values):
            self._part().frombytes(np.arange(row, row + len(values), dtype=np.uint32).tobytes())
        self.values.frombytes(np.ascontiguousarray(values, dtype=np.float64).tobytes())

    def numbers(self) -> Ints:
        """Return the rows' numbers."""
        if self.rows is None:
            return np.arange(self.start, self.start + len(self.values), dtype=np.int64)
        return np.array(self.rows, dtype=np.int64)

    def at(self, every: Ints) -> Ints:
        """Return of something of every row what is of this column's rows; no copy where it has no gaps."""
        return every[self.start : self.start + len(self)] if self.rows is None else every[self.numbers()]

    def key(self) -> tuple[int, int, int]:
        """Return what columns with the same rows have in common."""
        return self.start, len(self.values), 0 if self.rows is None else hash(self.rows.tobytes())

    def _part(self) -> array[int]:
        if self.rows is None:
            self.rows = array("I", range(self.start, self.start + len(self.values)))
        return self.rows


def counting(column: Column, steps: Ints, gone: Ints, rewinds: tuple[Floats, Ints]) -> tuple[Ints | None, Ints, int]:
    """Return which values of a column count (``None`` for all), their steps, and how many steps had several."""
    at = column.at(steps)
    if not len(gone) and not len(rewinds[0]) and (at[1:] > at[:-1]).all():
        return None, at, 0
    rows = column.numbers()
    places = np.flatnonzero(~np.isin(rows, gone)) if len(gone) else np.arange(len(rows))
    chosen, at, repeated = branches.counted(rows[places], at[places], rewinds)
    return places[chosen], at, repeated
