"""Numbers as people read them. One place, so that the page and the terminal say the same."""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any, TypeGuard

MISSING = "–"
"""Shown where the journal has no value."""


def number(value: Any, places: int = 2) -> str:
    """Format a reading; non-finite values are named, missing ones are a dash.

    >>> [number(v) for v in (9.013, 0.00031, 1234567.0, float("nan"), float("inf"), None)]
    ['9.01', '0.00031', '1.23e+06', 'NaN', 'inf', '–']
    """
    if not is_number(value):
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-4:
        return f"{value:.3g}"
    if 0 < size < 0.1:
        return f"{value:.3g}"
    return f"{value:.{places}f}"


def count(value: Any) -> str:
    """Format a count with three figures.

    >>> [count(v) for v in (0, 950, 12_345, 999_999, 1_049_600, 3_000_000_000, None)]
    ['0', '950', '12.3k', '1M', '1.05M', '3B', '–']
    """
    if not is_number(value) or not math.isfinite(value):
        return MISSING
    size, unit = float(value), ""
    for unit in ("", "k", "M", "B", "T"):  # noqa: B007 - the unit it stopped at is the answer
        if abs(float(f"{size:.3g}")) < 1000:
            break
        size /= 1000
    return f"{size:.3g}{unit}" if unit else f"{value:.0f}"


def duration(seconds: Any) -> str:
    """Format a time span with the two units that matter.

    >>> [duration(v) for v in (0.42, 12.3, 133, 3900, 273_600, None)]
    ['0.4 s', '12 s', '2 min 13 s', '1 h 5 min', '3 d 4 h', '–']
    """
    if not is_number(seconds) or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small_size, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def plural(n: int, noun: str) -> str:
    """Return the count and its noun.

    >>> plural(1, "event"), plural(0, "rollback"), plural(12000, "step")
    ('1 event', '0 rollbacks', '12,000 steps')
    """
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def escape(value: Any) -> str:
    """Make any value safe inside HTML text, attributes and plotly labels."""
    return html.escape(str(value), quote=True)


def hover(*lines: str, width: int = 46, longest: int = 400) -> str:
    """Join plain lines into one escaped plotly label, wrapped so that it fits a phone."""
    out: list[str] = []
    for line in lines:
        short = line if len(line) <= longest else line[: longest - 1] + "…"
        out += textwrap.wrap(short, width) if short else []
    return "<br>".join(escape(line) for line in out)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a journal field holds a number (true and false are not numbers)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
