"""Which of several processes that write into one log is read.

Launchers put the rank before each line (``[rank3]:``, ``[default3]:``, ``3:``), programs name it (``rank=3``). Of
ranks that tell of the same steps the lowest counts. Without a rank the first line of each step does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from poise.postmortem.readers.source import Notes

NOBODY = -1

LOOK_AT = 200
"""Characters of a line in which its rank stands."""

SMALL = 4
"""Strides that a rank may lag behind another."""

_RANK = re.compile(
    r"^\[?(?:\d,)?(\d{1,5})\]?(?:<std\w{3}>)?:\s"
    r"|(?:^|(?<=[\s\[(|,;]))(?:default|rank)[ =:]{0,2}(\d{1,5})\b",
    re.I,
)


def rank_of(line: str) -> int:
    """Return who wrote a line; ``NOBODY`` where it does not say.

    >>> [rank_of(x) for x in ("[rank3]: a", "[default2]:a", "1: a", "a rank=5 b", "[Rank 0] a", "[1,4]<stdout>: a")]
    [3, 2, 1, 5, 0, 4]
    """
    found = _RANK.search(line, 0, LOOK_AT)
    return NOBODY if found is None else int(found[1] or found[2])


class Ranks:
    """Says whose lines count.

    Attributes:
        leader: the rank that counts; ``NOBODY`` for all.
        stride: how far apart steps are that several processes without a rank tell of; 0 for a single process.

    Args:
        points: rank and step of each line; NaN where no step is known.
    """

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        points = list(points)
        self.leader = _leader(points)
        self.stride = _stride([step for _, step in points]) if self.leader == NOBODY else 0.0
        self._highest = float("-inf")

    def skips(self, line: str) -> bool:
        """Return whether the line is another rank's."""
        return self.leader != NOBODY and rank_of(line) not in (NOBODY, self.leader)

    def repeats(self, step: float) -> bool:
        """Return whether another process has told of the step already."""
        if self.stride and self._highest - SMALL * self.stride <= step <= self._highest:
            return True
        self._highest = step
        return False

    def note(self, notes: Notes) -> None:
        """Say what is done."""
        if self.leader != NOBODY:
            notes.add(f"lines of several ranks: those of rank {self.leader} count")
        elif self.stride:
            notes.add("several processes tell of the same steps; the first line of each step counts")


def _leader(points: Sequence[tuple[int, float]]) -> int:
    """Return the lowest rank, if there are several that tell of the same steps."""
    steps: dict[int, list[float]] = {}
    for rank, step in points:
        if rank != NOBODY:
            steps.setdefault(rank, []).append(step)
    if len(steps) < 2:
        return NOBODY
    most = max(map(len, steps.values()))
    if most < 2:
        return NOBODY
    lowest = min(rank for rank, own in steps.items() if 2 * len(own) >= most)
    own = {step for step in steps[lowest] if step == step}
    others = {step for rank, told in steps.items() if rank != lowest for step in told}
    return lowest if 2 * len(own & others) >= len(own) else NOBODY


def _stride(steps: Sequence[float]) -> float:
    """Return how far apart the steps are, if they come several times and go back a little; else 0."""
    falls = [a - b for a, b in pairwise(steps) if b < a]
    distinct = sorted(set(steps))
    if not falls or len(distinct) < 2 or 2 * len(steps) < 3 * len(distinct):
        return 0.0
    gaps = sorted(b - a for a, b in pairwise(distinct))
    stride = gaps[len(gaps) // 2]
    reach = min(SMALL * stride, (distinct[-1] - distinct[0]) / SMALL)  # less than an epoch
    small = sum(fall <= reach for fall in falls)
    return stride if 20 * small >= 19 * len(falls) and len(falls) > 2 else 0.0
