"""A curve as rows of characters: braille dots, or plain ASCII for terminals that have no others.

Every column spans its lowest to its highest value, so that no spike is lost however long the curve is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.trend import Floats, Ints

ROWS: Final = 8
GAP: Final = 3
"""Usual distances of two points beyond which they are not joined."""

START: Final = 0.03
"""Share of the steps whose height a picture does not heed."""

_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Braille dots of a cell, from the top row to the bottom one, left and right."""


def roof(steps: Ints | Floats, values: Floats, peaks: Sequence[tuple[int, float]]) -> float:
    """Return the highest value worth showing: the descent of the first steps does not count, events in it do.

    It would take most of the height, and a spike later on would be a dot.

    Args:
        steps, values: (N,), the finite points of a curve.
        peaks: (step, value) of the events that must be seen.
    """
    if not len(steps):
        return 1.0
    until = steps[0] + START * (steps[-1] - steps[0])
    shown = [value for step, value in peaks if step <= until and math.isfinite(value)]
    low, high = float(values.min()), float(values.max())
    top = max(float(values[steps > until].max(initial=low)), *shown, low)
    return top if low < top < low + 0.75 * (high - low) else high


def peaks_of(d: Diagnosis) -> list[tuple[int, float]]:
    """Return (step, value) of the peaks that a picture of the loss must show."""
    return [(e.start, e.value) for e in d.events if e.severity != "note" and e.signal == "loss"]


def columns_of(steps: Ints, span: tuple[int, int], columns: int) -> Ints:
    """Return the column of each step, where ``columns`` columns are ``span`` (first and last step) wide."""
    share = (steps - span[0]) / (max(span[1] - span[0], 1) + 1)
    return np.minimum(np.floor(share * columns), columns - 1).astype(np.int64)


def braille_rows(steps: Ints, x: Floats, columns: int, span: tuple[int, int]) -> list[str]:
    """Return ``ROWS`` texts of ``columns`` characters with 2 by 4 dots each.

    Args:
        steps: (N,), rising.
        x: (N,), finite.
        columns: characters across.
        span: first and last step of the picture.
    """
    cells = np.zeros((ROWS, columns), dtype=np.int64)
    for i, (top, bottom) in _extents(steps, x, 2 * columns, 4 * ROWS, span).items():
        for dot in range(top, bottom + 1):
            cells[dot // 4, i // 2] |= _DOTS[dot % 4][i % 2]
    return ["".join(chr(0x2800 + c) if c else " " for c in row) for row in cells.tolist()]


def ascii_rows(steps: Ints, x: Floats, columns: int, span: tuple[int, int]) -> list[str]:
    """Return the same picture of ``*`` signs."""
    cells = [[" "] * columns for _ in range(ROWS)]
    for i, (top, bottom) in _extents(steps, x, columns, ROWS, span).items():
        for row in range(top, bottom + 1):
            cells[row][i] = "*"
    return ["".join(row) for row in cells]


def _extents(steps: Ints, x: Floats, wide: int, tall: int, span: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Return column -> (top, bottom) row, 0 is the top; what stands in neighbouring columns touches."""
    steps, x = _joined(steps, x, wide, span)
    at = columns_of(steps, span, wide)
    low, high = float(x.min()), float(x.max())
    scale = (tall - 1) / (high - low) if high > low else 0.0
    level = np.rint((high - x) * scale).astype(np.int64)
    top, bottom = np.full(wide, tall), np.full(wide, -1)
    np.minimum.at(top, at, level)
    np.maximum.at(bottom, at, level)
    out: dict[int, tuple[int, int]] = {}
    for i in np.flatnonzero(bottom >= 0).tolist():
        a, b = int(top[i]), int(bottom[i])
        if i - 1 in out:
            a, b = min(a, int(bottom[i - 1]) + 1), max(b, int(top[i - 1]) - 1)
        out[i] = (a, b)
    return out


def _joined(steps: Ints, x: Floats, wide: int, span: tuple[int, int]) -> tuple[Ints, Floats]:
    """Return the points and, for every column between two neighbours, one on the line between them."""
    if len(steps) < 2:
        return steps, x
    apart = np.diff(steps)
    width = (max(span[1] - span[0], 1) + 1) / wide
    middles = span[0] + (np.arange(wide) + 0.5) * width
    after = np.searchsorted(steps, middles)
    between = (after > 0) & (after < len(steps))
    between[between] = apart[after[between] - 1] <= max(GAP * float(np.median(apart)), width)
    added = middles[between]
    return (
        np.concatenate([steps.astype(np.float64), added]),
        np.concatenate([x, np.interp(added, steps, x)]),
    )
