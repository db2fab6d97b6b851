"""The trend of a loss curve with hindsight: where the loss would have been, and how noisy it is about that.

Everything is on x = ln loss, so that nats and bits, and losses of 8 and of 2, are judged alike. Windows are in steps,
not in logged points: a spike lasts as long in a log of every tenth step.

    level   running median of x over ``HALF`` steps on both sides. Towards the beginning the window shrinks, both sides
            alike, so that the steep descent has no bias; at the end the last window's median goes on with its slope
    sigma   robust deviation of x - level over three times as many steps, and at least half of what the differences
            of neighbouring values say

What stands above the trend would lift it: points that are found raised are put on the level that their neighbours
give, and the level is taken again. A median of every point costs too much on long logs: it is taken at every tenth of
a half window and interpolated.

Source: running medians and median absolute deviations are Hampel 1974.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

HALF: Final = 100
"""Steps on each side of the window of the level: more than twice as long as the spikes of large runs last."""

MIN_HALF_POINTS: Final = 7
MAX_HALF_POINTS: Final = 400
GRID: Final = 10
"""Medians in half a window; between them the level is interpolated."""

MAD_TO_SIGMA: Final = 1.4826
SIGMA_FLOOR: Final = 1e-4
GAUSSIAN: Final = 2.7
"""The 1 % point of quiet runs, in robust deviations; 2.33 for pure Gaussian noise."""

ROUNDS: Final = 3
SEED: Final = 4.0
"""Deviations above the level from which on a point must not count for it."""

BRIDGED: Final = 6.0
"""Steps between two logged points up to which a point that is not raised may lie within a rise."""

RAISED: Final = 2.0
"""Deviations above the level that a neighbour of such a point has, when it belongs to the same rise."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A curve and its trend.

    Attributes:
        steps: of the finite, positive values, (N,) int64.
        x: their logarithms.
        level: the trend, on the same scale.
        sigma: the noise about it, one deviation, on the same scale.
        interval: usual distance of two logged steps.
        half: points in half a window.
        residual: how far each point lies above the trend, x - level.
    """

    steps: Ints
    x: Floats
    level: Floats
    sigma: Floats
    interval: float
    half: int
    residual: Floats = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "residual", self.x - self.level)

    @property
    def heaviness(self) -> float:
        """How much higher a bar in deviations must be than for Gaussian noise, 1 or more.

        Read off the 1 % point below the trend, where no spike is; the tail beyond it grows faster than that point.
        """
        below = -(self.residual / self.sigma)[len(self.x) // 50 :]
        return max(1.0, float(np.quantile(below, 0.99)) / GAUSSIAN) ** 2 if len(below) >= 100 else 1.0

    def points(self, steps: float) -> int:
        """Return how many logged points that many steps are, at least 1."""
        return max(1, round(steps / self.interval))


def fit(steps: Ints, values: Floats) -> Trend:
    """Return the trend of a curve.

    Args:
        steps: rising strictly, (N,).
        values: (N,), finite and above 0.
    """
    x = np.log(values)
    interval = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    half = int(min(max(round(HALF / interval), MIN_HALF_POINTS), MAX_HALF_POINTS, max((len(x) - 1) // 3, 1)))
    kept = x
    raised = np.zeros(len(x), dtype=bool)
    level = sigma = np.zeros(len(x))
    for _ in range(ROUNDS):
        level = _level(steps, kept, half)
        sigma = _sigma(x - level, raised, half, x)
        found = grown(x - level > SEED * sigma, x - level > RAISED * sigma, interval)
        if not (found & ~raised).any():
            break
        raised |= found
        if raised.mean() > 0.4:  # then it is not a trend with spikes on it
            break
        kept = bridged(x, raised)
    return Trend(steps, x, level, sigma, interval, half)


def running_median(x: Floats, half: int) -> Floats:
    """Return the median of ``half`` points on both sides, fewer towards the ends, (N,)."""
    n = len(x)
    half = min(half, (n - 1) // 2)
    if half < 1:
        return x.copy()
    stride = max(1, half // GRID)
    at = np.arange(half, n - half, stride)
    middle = np.median(sliding_window_view(x, 2 * half + 1)[::stride], axis=1)
    short = np.unique(np.linspace(0, half - 1, min(half, 2 * GRID)).astype(int))
    left = [float(np.median(x[: 2 * i + 1])) for i in short]
    right = [float(np.median(x[n - 1 - 2 * i :])) for i in short]
    where = np.concatenate([short, at, (n - 1 - short)[::-1]])
    out: Floats = np.interp(np.arange(n), where, np.concatenate([left, middle, right[::-1]]))
    return out


def bridged(x: Floats, raised: Bools) -> Floats:
    """Return ``x`` with its raised points on the line between the medians of what is left and right of them."""
    out = x.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], raised.astype(np.int8), [0]])))
    for first, end in edges.reshape(-1, 2):
        before, after = _beside(x, raised, first, -1), _beside(x, raised, end - 1, 1)
        if before is None and after is None:
            continue
        left = after if before is None else before
        right = before if after is None else after
        assert left is not None and right is not None
        out[first:end] = np.linspace(left, right, end - first + 2)[1:-1]
    return out


def grown(seeds: Bools, raised: Bools, interval: float = 1.0) -> Bools:
    """Return the stretches of ``raised`` that hold a seed; gaps of two points are bridged, of fewer in sparse logs."""
    wide = raised | seeds
    at = np.flatnonzero(wide)
    bridge = 2 if interval <= BRIDGED / 2 else 1 if interval <= BRIDGED else 0
    for i in np.flatnonzero((np.diff(at) > 1) & (np.diff(at) <= bridge + 1)):
        wide[at[i] : at[i + 1]] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wide.astype(np.int8), [0]]))).reshape(-1, 2)
    out = np.zeros(len(wide), dtype=bool)
    total = np.concatenate([[0], np.cumsum(seeds)])
    for first, end in edges:
        if total[end] > total[first]:
            out[first:end] = True
    return out


def _beside(x: Floats, raised: Bools, at: int, direction: int) -> float | None:
    """Return the median of the nearest unraised points on one side; ``None`` where there are none."""
    span = x[max(at - 40, 0) : at][::-1] if direction < 0 else x[at + 1 : at + 41]
    free = ~(raised[max(at - 40, 0) : at][::-1] if direction < 0 else raised[at + 1 : at + 41])
    values = span[free][:9]
    return float(np.median(values)) if len(values) else None


def _level(steps: Ints, x: Floats, half: int) -> Floats:
    """Return the running median; at the end it goes on with the slope of the last window."""
    level = running_median(x, half)
    n = len(x)
    if n < 2 * half + 1:
        return level
    tail = slice(n - 2 * half - 1, n)
    t = steps[tail].astype(np.float64)
    early, late = x[tail][:half], x[tail][-half:]
    run = float(np.median(t[-half:]) - np.median(t[:half]))
    slope = min(float(np.median(late) - np.median(early)) / run, 0.0) if run > 0 else 0.0
    middle = n - 1 - half
    line = level[middle] + slope * (steps[middle:] - steps[middle])
    level[middle:] = line
    return level


def _sigma(residual: Floats, raised: Bools, half: int, x: Floats) -> Floats:
    """Return the noise about the level, from points that are not raised."""
    n = len(residual)
    size = np.abs(residual)
    free = size[~raised]
    if len(free) < 8:
        return np.full(n, MAD_TO_SIGMA * float(np.median(np.abs(np.diff(x)))) / np.sqrt(2) + SIGMA_FLOOR)
    filled = np.where(raised, np.nan, size)
    filled[raised] = np.interp(np.flatnonzero(raised), np.flatnonzero(~raised), free)
    wide = min(3 * half, (n - 1) // 2)
    sigma = running_median(filled, wide)
    inner = min(wide, n // 2)
    sigma[:inner] = np.maximum(sigma[:inner], sigma[inner])  # shrinking windows follow the points themselves
    sigma[n - inner :] = sigma[n - inner - 1]
    changes = np.abs(np.diff(x, prepend=x[0]))
    near = running_median(changes, wide) / np.sqrt(2)
    near[:inner], near[n - inner :] = near[inner], near[n - inner - 1]
    out: Floats = MAD_TO_SIGMA * np.maximum(sigma, 0.5 * near) + SIGMA_FLOOR
    return out
