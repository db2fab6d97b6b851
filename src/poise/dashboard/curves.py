"""From journal records to lines that can be drawn: series, smoothing, thinning, abandoned branches.

Shape letters: N recorded points, M points kept for drawing (M <= N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poise.core.journal import Record, timeline
from poise.dashboard.text import is_number

Floats = NDArray[np.float64]

POINTS: Final = 4000
"""Most points of one drawn line; more than a screen has pixels."""

NOT_TRAINED: Final = frozenset({"skip", "lower_lr", "reset_moments", "drop_data", "rollback", "halt"})
"""Actions after which the step's update was not applied."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points in the order of the journal: ``steps`` (N,) and ``values`` (N,), non-finite values included."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Line:
        """Return the points whose value is a finite number."""
        good = np.isfinite(self.values)
        return Line(self.steps[good], self.values[good])

    def thinned(self, limit: int = POINTS) -> Line:
        """Return at most ``limit`` points, extremes kept; values must be finite."""
        keep = thin(self.values, limit)
        return Line(self.steps[keep], self.values[keep])


def line(records: Sequence[Record], name: str) -> Line:
    """Return the points of the records that have a number under ``name``."""
    points = [(r["step"], r[name]) for r in records if is_number(r.get(name)) and is_number(r.get("step"))]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return Line(table[:, 0], table[:, 1])


def trained(records: Sequence[Record]) -> list[Record]:
    """Return the step records whose update was applied."""
    return [r for r in records if r["type"] == "step" and r.get("action") not in NOT_TRAINED]


def abandoned(records: Sequence[Record], name: str = "loss") -> list[Line]:
    """Return the branches of history that do not count: steps done again after a rollback or a restart."""
    counted = {id(r) for r in timeline(records)}
    branches: list[list[Record]] = [[]]
    for record in records:
        if record["type"] in ("rollback", "restart", "run"):
            branches.append([])
        elif record["type"] == "step":
            branch = branches[-1]
            if id(record) in counted or (branch and record["step"] <= branch[-1]["step"]):
                branches.append([])
            if id(record) not in counted:
                branches[-1].append(record)
    return [drawn for branch in branches if len(drawn := line(branch, name))]


def smooth(values: Floats) -> Floats:
    """Return a smoothed copy (N,) of finite ``values`` (N,): a running median of 5, then a running mean.

    The median keeps a lone spike out, so that one bad step does not bend the line for the next fifty; a
    lasting change of level passes. The mean weighs neighbours on both sides by ``exp(-distance / scale)``,
    with a scale of N/80 steps, between 3 and 250: a mean over the past alone would lie above a falling curve.
    """
    n = len(values)
    if n == 0:
        return values
    padded = np.pad(values, 2, mode="edge")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    scale = min(250.0, max(3.0, n / 80))
    # Before the start the curve is continued by its own mirror image: else the mean of the steep first steps
    # would lie below them.
    extra = min(n - 1, int(4 * scale))
    medians = np.concatenate([2 * medians[0] - medians[extra:0:-1], medians])
    decay = math.exp(-1.0 / scale)
    ahead_sum, ahead_weight = _decayed(medians, decay)
    behind_sum, behind_weight = (part[::-1] for part in _decayed(medians[::-1], decay))
    # Each point is in both passes, so it is taken out once.
    return np.asarray((ahead_sum + behind_sum - medians) / (ahead_weight + behind_weight - 1.0))[extra:]


def _decayed(values: Floats, decay: float) -> tuple[Floats, Floats]:
    """Return the running sums (N,) of values and weights; each step back counts ``decay`` times as much."""
    sums, weights = np.empty(len(values)), np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values.tolist()):
        total = decay * total + value
        weight = decay * weight + 1.0
        sums[i], weights[i] = total, weight
    return sums, weights


def thin(values: Floats, limit: int = POINTS) -> NDArray[np.int64]:
    """Return the indices (M,) of at most ``limit`` of the finite ``values`` (N,) that look the same drawn.

    The row is cut into ``limit/2 - 1`` equal buckets, and each keeps its lowest and highest point; the first
    and the last point stay. No spike is lost.
    """
    n = len(values)
    assert limit >= 8, limit
    if n <= limit:
        return np.arange(n)
    edges = np.linspace(0, n, limit // 2, dtype=np.int64)
    keep = {0, n - 1}
    for low, high in pairwise(edges.tolist()):
        bucket = values[low:high]
        keep |= {int(low + bucket.argmin()), int(low + bucket.argmax())}
    return np.array(sorted(keep), dtype=np.int64)


def stretches(chosen: NDArray[np.bool_], limit: int = 500) -> list[NDArray[np.int64]]:
    """Return the runs of neighbouring True positions, as index arrays; the ``limit`` longest, in order."""
    hits = np.flatnonzero(chosen)
    if not len(hits):
        return []
    found = np.split(hits, np.flatnonzero(np.diff(hits) > 1) + 1)
    longest = sorted(found, key=len, reverse=True)[:limit]
    return sorted(longest, key=lambda run: int(run[0]))


def view(values: Floats, smoothed: Floats) -> tuple[float, float]:
    """Return the value range (low, high) worth opening a picture with; zooming out shows the rest.

    The range holds the smoothed line and 99.5% of the points, but not a divergence to many times the start,
    which would press everything else flat.
    """
    if len(values) == 0:
        return 0.0, 1.0
    low = float(values.min())
    high = max(float(np.quantile(values, 0.995)), float(smoothed.max(initial=-np.inf)))
    roof = max(low + 2 * (float(values[0]) - low), 3 * float(np.median(values)))
    high = min(high, roof) if roof > low else high
    top = float(values.max())
    if top <= high + 0.5 * (high - low):
        high = top
    pad = (high - low) or abs(high) * 0.1 or 1.0
    return low - 0.05 * pad, high + 0.10 * pad
