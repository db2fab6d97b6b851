"""Lines of cells, ``... iteration 5/ 100 | lm loss: 2.5 | grad norm: 0.8 |``: one line as a row of numbers."""

from __future__ import annotations

import re

from poise.postmortem.readers.source import Row, number

MAX_CELLS = 200

_CELL = re.compile(r"\s*([A-Za-z][^:=]{0,79})[:=]\s*(\S.*)?")
_QUANTITY = re.compile(
    r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-DF-Za-df-z%][A-Za-z%/. ]*|[Ee][A-Za-z]+)"
)
_HUMAN = re.compile(r"([+-]?\d+(?:\.\d+)?)([kKMGBTPE])")
_THOUSANDS = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_RANK = re.compile(r"\s*(?:\[?(?:default|rank|Rank)[ _]?(\d{1,9})\]?:?|(\d{1,9}):)\s")


def cells(text: str, whole: bool = True, suffixes: bool = False) -> Row:
    """Return the numbers of ``name: value | name: value | ...``; ``=`` parts them as well.

    Args:
        text: the line, or what follows the cell of the step.
        whole: whether a last cell without a bar counts; not where the line may have been cut off.
        suffixes: whether ``K``, ``M``, ... behind a number are thousands and not units.

    >>> cells("lm loss: 2.5E+00 | speed: 150.3TFLOPS | note: none | skipped:   0 |")
    {'lm loss': 2.5, 'speed': 150.3, 'skipped': 0.0}
    """
    row: Row = {}
    parts = text.split("|", MAX_CELLS)
    for part in parts[: len(parts) if whole else -1]:
        found = _CELL.match(part)
        if found is None:
            if part.strip() == "time (ms)":  # a line of timers on the same line
                break
            continue
        value = human(found[2] or "") if suffixes else quantity(found[2] or "")
        if value is not None:
            row[found[1].rstrip()] = value
    return row


def quantity(text: str) -> float | None:
    """Return a number, with or without a unit behind it; ``None`` where there is none.

    >>> quantity("2.5E+00"), quantity("150.3 TFLOP/s"), quantity("nan"), quantity("1.24E"), quantity("a lot")
    (2.5, 150.3, nan, None, None)
    """
    text = text.strip()
    value = number(text)
    if value is None and (found := _QUANTITY.fullmatch(text)):
        return float(found[1])
    return value


def human(text: str) -> float | None:
    """Return a number that may be written with a suffix for thousands.

    >>> human("1.05M"), human("12.3K"), human("3.4"), human("7 apples")
    (1050000.0, 12300.0, 3.4, 7.0)
    """
    text = text.strip()
    found = _HUMAN.fullmatch(text)
    return round(float(found[1]) * _THOUSANDS[found[2]], 6) if found else quantity(text)


def rank_of(line: str) -> str:
    """Return the rank that a launcher wrote before the line, empty where there is none.

    >>> rank_of("[default7]: iteration 5/ 10 |"), rank_of("3: iteration"), rank_of("[2024-10-16 04:23] iteration")
    ('7', '3', '')
    """
    found = _RANK.match(line)
    return (found[1] or found[2]) if found else ""
