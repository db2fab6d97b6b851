"""Lines of cells read many at once: names and units compared, numbers taken apart, with array operations.

Lines such as ``iteration 5/ 100 | lm loss: 2.5 | grad norm: 0.8 |`` are alike: between the bars stand the same names,
and only the numbers differ. A ``Layout`` is learnt from one line. ``Layout.rows`` finds all lines of a ``Page`` (a
block of whole lines) that are written so, and reads their numbers. It accepts only what ``cells.cells`` and ``float``
read as the very same numbers; whatever differs is left to the slow way, line by line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise.postmortem.readers.cells import MAX_CELLS
from poise.postmortem.readers.pages import LONGEST, WIDTH, Bytes, Floats, Ints, Mask, Page

EXACT_DIGITS = 15
"""Whole numbers of so many digits are exact as float64."""

_BLANK, _ZERO, _UNDERSCORE, _DOT, _PLUS, _MINUS = b" 0_.+-"
_TENS = 10.0 ** np.arange(23)
"""Powers of ten that are exact as float64: a quotient or product with one is rounded once, as reading a decimal is."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands around a number between two bars; without a ``name`` the cell is ``key`` and nothing else."""

    name: str
    key: bytes
    unit: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """How the lines of one kind are written.

    Attributes:
        head: what stands before the first bar, every digit a zero.
        exact: places in it where digits count, with the digits.
        step: from where to where in ``head`` the step's number may reach.
        cells: what follows, one each between two bars, the last one between a bar and the line's end.
        source: who wrote the line; only the reader knows what that means.
    """

    head: bytes
    exact: tuple[tuple[int, int], ...]
    step: tuple[int, int]
    cells: tuple[Cell, ...]
    source: tuple[str, str]

    @property
    def names(self) -> list[str]:
        """The columns of ``rows`` after the first, which is the step."""
        return [cell.name for cell in self.cells if cell.name]

    def rows(self, page: Page, free: Mask) -> tuple[Ints, list[Floats]]:
        """Return which of the ``free`` lines of a page are written so, and their columns, the step first."""
        at = np.flatnonzero(free & (page.bars == len(self.cells)))
        at = at[page.parts[page.first[at]] - page.begins[at] == len(self.head)]
        at = at[self._headed(page, at)]
        bounds = [page.parts[page.first[at] + place] for place in range(len(self.cells) + 1)]
        fits = np.ones(len(at), dtype=bool)
        for cell, before, end in zip(self.cells, bounds, bounds[1:], strict=False):
            length = end - before - (1 + len(cell.key) + len(cell.unit))
            fits &= page.same(before + 1, cell.key)
            if cell.unit:
                fits &= page.same(end - len(cell.unit), cell.unit)
            fits &= (length > 0) & (length < WIDTH) if cell.name else length == 0
        if not fits.all():
            at, bounds = at[fits], [bound[fits] for bound in bounds]
        if not len(at):
            return at, []
        begin, end = self.step
        windows = [page.numbers(page.begins[at] + end, np.full(len(at), end - begin))]
        units = [b""]
        for cell, before, end_of in zip(self.cells, bounds, bounds[1:], strict=False):
            if cell.name:
                last = end_of - len(cell.unit)
                windows.append(page.numbers(last, last - before - 1 - len(cell.key)))
                units.append(cell.unit.strip(b" "))
        read = [parse(window, plain=not unit) for window, unit in zip(windows, units, strict=True)]
        if all(good is None for _, good in read):
            return at, [values for values, _ in read]
        keep = np.logical_and.reduce([good for _, good in read if good is not None])
        return at[keep], [values[keep] for values, _ in read]

    def _headed(self, page: Page, at: Ints) -> Mask:
        """Return which of the lines begin as they should; digits count only where it is said."""
        heads = page.windows(page.begins[at], len(self.head))
        digit = heads - np.uint8(_ZERO) < 10
        same = np.where(digit, np.uint8(_ZERO), heads) == np.frombuffer(self.head, np.uint8)
        inside = slice(*self.step)
        same[:, inside] = digit[:, inside] | (heads[:, inside] == _BLANK)
        for place, byte in self.exact:
            same[:, place] = heads[:, place] == byte
        return np.asarray(same.all(axis=1))


def learn(
    line: bytes, step: tuple[int, int], exact: tuple[tuple[int, int], ...], source: tuple[str, str]
) -> Layout | None:
    """Return how a line is written; ``None`` where that cannot be said.

    Args:
        line: it, without the line end.
        step: from where to where the step's number may reach, blanks before it included.
        exact: stretches before the first bar where digits count.
        source: who wrote it.
    """
    head, *rest = line.split(b"|")
    if not all(_BLANK <= byte < 0x7F for byte in line):  # control characters and accents are read one by one
        return None
    if not rest or len(rest) > MAX_CELLS or len(head) > LONGEST or not 0 < step[1] - step[0] < WIDTH:
        return None
    found: list[Cell] = []
    for place, text in enumerate(rest):
        cell = _cell(text)
        if cell is None and place == len(rest) - 1 and not text.strip():
            cell = Cell("", text, b"")
        if cell is None or len(text) > LONGEST:
            return None
        found.append(cell)
    if not any(cell.name for cell in found):
        return None
    digits = tuple((place, head[place]) for begin, end in exact for place in range(begin, end))
    plain = bytes(_ZERO if chr(byte).isdigit() and byte < 128 else byte for byte in head)
    return Layout(plain, digits, step, tuple(found), source)


def _cell(text: bytes) -> Cell | None:
    """Return what surrounds the number of ``name: number unit``."""
    part = min((at for mark in b":=" if (at := text.find(mark)) >= 0), default=-1)
    name = text[:part].strip(b" \t").decode("ascii")
    value = text[part + 1 :]
    body = value.lstrip(b" ")
    size = len(body) - len(body.lstrip(b"+-.0123456789eE"))
    number, unit = body[:size], body[size:]
    if part < 1 or not name[:1].isalpha() or len(name) > 79 or not number[-1:].isdigit():
        return None
    try:
        float(number)
    except ValueError:
        return None
    if unit.strip(b" ") and (unit.strip(b" ")[:1] in b"Ee" or unit.strip(b" ").strip(_UNIT_BYTES)):
        return None
    return Cell(name, text[: part + 1], unit)


_UNIT_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ%/. "


def parse(window: Bytes, plain: bool = True) -> tuple[Floats, Mask | None]:
    """Return the numbers that stand at the right of each row, and which of them are numbers; ``None``: all.

    Exactly what ``float`` gives, by columns where all rows have point and exponent in one place. Where a unit stands
    behind (not ``plain``), NaN and infinity are left to the slow way.
    """
    values = _decimals(np.ascontiguousarray(window.T))
    if values is not None:
        return values, None
    out = np.zeros(len(window))
    good = ~(window == _UNDERSCORE).any(axis=1)
    for row, text in enumerate(np.ascontiguousarray(window).view(f"S{WIDTH}").ravel().tolist()):
        try:
            out[row] = float(text)
        except ValueError:
            good[row] = False
    return out, good if plain else good & np.isfinite(out)


def _decimals(places: Bytes) -> Floats | None:
    """Return (rows,) numbers from (WIDTH, rows) bytes; ``None`` where they are not of one simple form."""
    low, high = places.min(axis=1), places.max(axis=1)
    end = WIDTH
    exponent: Ints | int = 0
    if high[end - 4] in b"Ee" and low[end - 4] in b"Ee":  # 1.25E-04
        sign = places[end - 3]
        if not (np.all((sign == _PLUS) | (sign == _MINUS)) and _all_digits(low, high, end - 2, end)):
            return None
        size = (places[end - 2] - np.int64(_ZERO)) * 10 + (places[end - 1] - np.int64(_ZERO))
        exponent = np.where(sign == _MINUS, -size, size)
        end -= 4
    whole = end
    while whole > 0 and not low[whole - 1] == high[whole - 1] == _DOT and _all_digits(low, high, whole - 1, whole):
        whole -= 1
    point = whole if whole > 0 and low[whole - 1] == high[whole - 1] == _DOT else end
    left = point - 1 if point < end else end
    begin = left
    while begin > 0 and high[begin - 1] != _BLANK:
        begin -= 1
    if left == begin or not _all_digits(low, high, left - 1, left) or left - begin + end - point > EXACT_DIGITS:
        return None
    if (high[:begin] != _BLANK).any() or (low[:begin] != _BLANK).any():
        return None
    total = np.zeros(places.shape[1], dtype=np.int64)
    begun = np.zeros(places.shape[1], dtype=bool)
    for place in range(begin, left):
        digit = places[place] - np.uint8(_ZERO)
        if low[place] >= _ZERO and high[place] <= _ZERO + 9:
            begun[:] = True
        else:
            is_digit = digit < 10
            if not np.all(is_digit | ((places[place] == _BLANK) & ~begun)):
                return None
            begun |= is_digit
            digit = np.where(is_digit, digit, np.uint8(0))
        total *= 10
        total += digit
    for place in range(point, end):
        total *= 10
        total += places[place] - np.uint8(_ZERO)
    shift = exponent - (end - point)
    if np.abs(shift).max() >= len(_TENS):
        return None
    mantissa = total.astype(np.float64)
    if isinstance(shift, int):
        return np.asarray(mantissa / _TENS[-shift] if shift < 0 else mantissa * _TENS[shift])
    scaled = np.where(shift < 0, mantissa / _TENS[np.maximum(-shift, 0)], mantissa * _TENS[np.maximum(shift, 0)])
    return np.asarray(scaled, dtype=np.float64)


def _all_digits(low: Bytes, high: Bytes, begin: int, end: int) -> bool:
    return bool((low[begin:end] >= _ZERO).all() and (high[begin:end] <= _ZERO + 9).all())
