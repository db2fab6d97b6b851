"""Samples that are not to be shown: which ones come next, as a pure function of a number and a list of ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Range = tuple[int, int]
"""First and last sample, both inclusive."""


def after(first: int, count: int, skips: Sequence[Range]) -> Sequence[int]:
    """Return the next ``count`` samples from ``first`` on that are in no range; a ``range`` where they are consecutive.

    >>> list(after(8, 4, [(9, 10), (100, 200)]))
    [8, 11, 12, 13]
    >>> after(8, 4, [(1, 7)])
    range(8, 12)
    """
    out: list[int] = []
    at = first
    for low, high in merged([skip for skip in skips if skip[1] >= first]):
        if low > at:
            out += range(at, min(low, at + count - len(out)))
        if len(out) == count:
            break
        at = max(at, high + 1)
    out += range(at, at + count - len(out))
    return range(out[0], out[-1] + 1) if out[-1] - out[0] + 1 == count else out


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Return the same samples as the fewest ranges, in order.

    >>> merged([(5, 8), (0, 2), (3, 5)])
    [(0, 8)]
    """
    out: list[Range] = []
    for first, last in sorted(ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], last))
        else:
            out.append((first, last))
    return out


def spans(samples: Sequence[int]) -> list[Range]:
    """Return samples as ranges; the inverse of listing them.

    >>> spans([8, 11, 12, 13])
    [(8, 8), (11, 13)]
    """
    return merged((sample, sample) for sample in samples)


def listed(spans: Sequence[Range]) -> Sequence[int]:
    """Return the samples of ranges; the inverse of ``spans``.

    >>> listed([(3, 5)]), listed([(3, 3), (6, 7)])
    (range(3, 6), [3, 6, 7])
    """
    if len(spans) == 1:
        return range(spans[0][0], spans[0][1] + 1)
    return [sample for first, last in spans for sample in range(first, last + 1)]


def samples_of(record: Mapping[str, Any], batch_size: int) -> Sequence[int]:
    """Return the samples that a step showed, from its journal record: ``spans``, else ``rows`` from ``sample`` on.

    >>> samples_of({"sample": 16}, 8), samples_of({"sample": 3, "spans": [[3, 3], [6, 7]]}, 3)
    (range(16, 24), [3, 6, 7])
    """
    if "spans" in record:
        return listed([(int(first), int(last)) for first, last in record["spans"]])
    first = int(record["sample"])
    return range(first, first + int(record.get("rows", batch_size)))
