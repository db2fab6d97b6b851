"""The learning rate in a log: where it rises (warm-up, and warming up again), and where it jumps.

A rise is a stretch of rising values, with flat pieces of a few points in it (rounded prints are flat). A jump is one
logged point that departs from the straight line through the two before by ``JUMP`` of the rate; so the steps of a
linear warm-up or decay are none, and the tail of a cosine, where all is near 0, is none either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from poise.postmortem.log import Log
from poise.postmortem.trend import Floats, Ints

JUMP: Final = 0.1
FLOOR: Final = 0.02
"""A change of less than this share of the largest rate is no jump."""

GROWTH: Final = 1.2
"""A rise ends at least this much above its beginning."""

FLAT_POINTS: Final = 10


@dataclass(frozen=True, slots=True)
class Rise:
    """A stretch in which the learning rate rises.

    Attributes:
        start, end: first step of it, and the step at which its highest rate is reached.
        low, high: the rates there.
        first: whether it begins with the log: the run's own warm-up.
    """

    start: int
    end: int
    low: float
    high: float
    first: bool


@dataclass(frozen=True, slots=True)
class Jump:
    """A learning rate that changed at once.

    Attributes:
        step: the first with the new rate.
        before, after: the rates.
    """

    step: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What the learning rate did.

    Attributes:
        steps, values: the finite values, (N,).
        rises: see ``Rise``, in order.
        jumps: see ``Jump``, in order.
        peak: the largest rate of the log.
        jump_steps: the steps of the jumps, (J,).
    """

    steps: Ints
    values: Floats
    rises: tuple[Rise, ...]
    jumps: tuple[Jump, ...]
    peak: float = field(init=False)
    jump_steps: Ints = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", float(self.values.max()))
        object.__setattr__(self, "jump_steps", np.array([jump.step for jump in self.jumps], dtype=np.int64))

    def raised(self) -> set[int]:
        """Return the steps at which the rate was raised: jumps upwards, and the ends of rises."""
        return {jump.step for jump in self.jumps if jump.after > jump.before} | {rise.end for rise in self.rises}

    def at(self, step: float) -> float:
        """Return the rate that counts at a step: the last that was logged at or before it."""
        place = int(np.searchsorted(self.steps, step, side="right")) - 1
        return float(self.values[max(place, 0)])

    def warmup(self) -> Rise | None:
        """Return the run's own warm-up, if the log has it."""
        return self.rises[0] if self.rises and self.rises[0].first else None


def read_rates(log: Log) -> Rates | None:
    """Return what the log's learning rate did; ``None`` where it has none."""
    if "lr" not in log.series:
        return None
    steps, values = log.series["lr"]
    good = np.isfinite(values) & (values >= 0)
    steps, values = steps[good], values[good]
    if len(steps) < 2 or values.max() <= 0:
        return None
    rises = _rises(steps, values)
    return Rates(steps, values, rises, _jumps(steps, values, rises))


def _rises(steps: Ints, values: Floats) -> tuple[Rise, ...]:
    change = np.diff(values)
    tiny = 1e-9 * values.max()
    ups, downs = np.flatnonzero(change > tiny), np.flatnonzero(change < -tiny)
    if not len(ups):
        return ()
    allowed = max(FLAT_POINTS, len(values) // 50)
    falls = np.searchsorted(downs, ups)
    apart = (np.diff(ups) > allowed) | (np.diff(falls) > 0)
    ends = np.flatnonzero(np.append(apart, True))
    begins = np.append(0, ends[:-1] + 1)
    first, last = ups[begins], ups[ends] + 1
    real = (ends > begins) & (values[last] >= GROWTH * values[first])
    return tuple(
        Rise(int(steps[a]), int(steps[b]), float(values[a]), float(values[b]), bool(a <= allowed))
        for a, b in zip(first[real].tolist(), last[real].tolist(), strict=True)
    )


def _jumps(steps: Ints, values: Floats, rises: tuple[Rise, ...]) -> tuple[Jump, ...]:
    if len(values) < 3:
        return ()
    gap = np.diff(steps).astype(np.float64)
    change = np.diff(values)
    line = np.maximum(values[1:-1] + change[:-1] / gap[:-1] * gap[1:], 0.0)
    larger = np.maximum(values[2:], values[1:-1])
    far = (np.abs(change[1:]) >= JUMP * larger) & (np.abs(values[2:] - line) >= JUMP * larger)
    far &= np.abs(change[1:]) >= FLOOR * values.max()
    if rises and rises[0].first:  # a curved warm-up departs from a line
        far &= steps[2:] > rises[0].end
    starts, ends = (np.array([getattr(rise, name) for rise in rises], dtype=np.int64) for name in ("start", "end"))
    latest = np.searchsorted(starts, steps[2:], side="left") - 1  # the last rise that began before the step
    if len(rises):
        far &= ~((latest >= 0) & (steps[2:] <= ends[np.maximum(latest, 0)]))
    # back on the line of before: the point between was the jump, and is in the list by itself
    return tuple(Jump(int(steps[i + 2]), float(values[i + 1]), float(values[i + 2])) for i in np.flatnonzero(far))
