"""The noise of two runs side by side: whether they saw the same data in the same order.

The noise of a loss curve about its trend is mostly that of its batches, so that two runs on the same batches have the
same noise, whatever their optimizers. Measured on real runs: 0.99 for two optimizers on one order, 0.04 and less for
other orders and other seeds. The interval is Fisher's, with as many independent values as the two autocorrelations
leave (Bartlett 1946).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from poise.postmortem.log import Log
from poise.postmortem.trend import RAISED, SEED, Bools, Floats, Ints, Trend, fit, grown

Order = Literal["same", "shifted", "partly", "other", "unclear"]

SAME: Final = 0.3
"""Correlations of the noise above it are one data order; runs on other data have none."""

CAP: Final = 4.0
"""Deviations at which noise is cut off, so that a few spikes do not make the correlation."""

FEWEST: Final = 60
BLOCKS: Final = 10
LAGS: Final = 50


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of two runs at their common steps.

    Attributes:
        steps: in the second run's count, (N,).
        x, y: noise of the first and the second run in its own deviations, (N,).
        r, low, high: their correlation and its 95 % interval.
        shift: steps by which the second run is behind.
        shared: which of the steps lie where the runs share their data, (N,).
        order: whether they do.
        remark: what was done to compare them, if anything.
    """

    steps: Ints
    x: Floats
    y: Floats
    r: float
    low: float
    high: float
    shift: int
    shared: Bools
    order: Order
    remark: str

    def shares(self, step: int) -> bool:
        """Return whether the runs share their data at a step of the second run."""
        if self.order != "partly":
            return self.order in ("same", "shifted")
        place = min(int(np.searchsorted(self.steps, step)), len(self.steps) - 1)
        return bool(self.shared[place])


def noise_of(a: Trend, b: Trend, since: int) -> Noise:
    """Return the noise at common steps, raw or averaged, shifted or not: whichever agrees most.

    Args:
        a, b: the two curves.
        since: the first step that counts.
    """
    a, b = _cut(a, since), _cut(b, since)
    best = _measure(*_aligned(_scaled(a), _scaled(b)))
    if best.order in ("same", "partly"):
        return best
    if a.interval != b.interval:
        fine, coarse = (a, b) if a.interval < b.interval else (b, a)
        averaged = _averaged(fine, coarse)
        pair = (averaged, _scaled(coarse)) if fine is a else (_scaled(coarse), averaged)
        other = _measure(*_aligned(*pair), remark=f"means over {coarse.interval:g} steps compared")
        if other.order in ("same", "partly"):
            return other
        if best.order == "other":
            best = dataclasses.replace(best, order=other.order)
    if best.order == "other" and a.interval == b.interval and (shift := _shift(a, b)):
        other = _measure(*_aligned((_scaled(a)[0] + shift, _scaled(a)[1]), _scaled(b)), shift=shift)
        if other.order == "same":
            return dataclasses.replace(other, order="shifted")
    return best


def _measure(steps: Ints, x: Floats, y: Floats, *, shift: int = 0, remark: str = "") -> Noise:
    r, low, high = _correlation(x, y)
    edges = np.linspace(0, len(x), BLOCKS + 1).astype(int)
    parts = [_correlation(x[i:j], y[i:j]) for i, j in pairwise(edges)]
    share = np.array([part[1] > SAME for part in parts])
    order: Order
    if low > SAME:
        order = "same" if share.mean() > 0.7 or len(x) < 10 * FEWEST else "partly"
    elif share.sum() >= 2:
        order = "partly"
    else:
        order = "other" if high < SAME else "unclear"
    shared = np.repeat(share, np.diff(edges)) if order == "partly" else np.full(len(x), order == "same")
    return Noise(steps, x, y, r, low, high, shift, shared, order, remark)


def fitted(log: Log) -> Trend | None:
    """Return the trend of the loss; ``None`` where there are too few values."""
    if "loss" not in log.series:
        return None
    steps, values = log.series["loss"]
    good = np.isfinite(values) & (values > 0)
    return fit(steps[good], values[good]) if good.sum() >= FEWEST else None


def _cut(trend: Trend, since: int) -> Trend:
    late = slice(int(np.searchsorted(trend.steps, since)), None)
    return dataclasses.replace(
        trend, steps=trend.steps[late], x=trend.x[late], level=trend.level[late], sigma=trend.sigma[late]
    )


def _scaled(trend: Trend) -> tuple[Ints, Floats]:
    """Return (steps, noise in deviations) without spikes: two runs may have those at equal steps for other reasons."""
    z = trend.residual / trend.sigma
    raised = grown(z > SEED, z > RAISED)
    beside = np.convolve(raised, np.ones(3), mode="same") >= 2  # a point alone may be an odd batch, and stays
    return trend.steps[~(raised & beside)], np.clip(z, -CAP, CAP)[~(raised & beside)]


def _averaged(fine: Trend, coarse: Trend) -> tuple[Ints, Floats]:
    """Return the fine run's noise as a log of means would have it: over the steps up to each of the coarse run's."""
    steps, z = _scaled(fine)
    total = np.concatenate([[0.0], np.cumsum(z)])
    ends = np.searchsorted(steps, coarse.steps, side="right")
    begins = np.searchsorted(steps, coarse.steps - round(coarse.interval), side="right")
    full = ends - begins >= max(2, round(coarse.interval / fine.interval) - 1)
    means = (total[ends] - total[begins])[full] / (ends - begins)[full]
    return coarse.steps[full], means


def _aligned(a: tuple[Ints, Floats], b: tuple[Ints, Floats]) -> tuple[Ints, Floats, Floats]:
    """Return what both have at equal steps, without the first twentieth, where the trend is steep."""
    steps, i, j = np.intersect1d(a[0], b[0], assume_unique=True, return_indices=True)
    late = slice(len(steps) // 20, None)
    return steps[late], a[1][i][late], b[1][j][late]


def _correlation(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Return (correlation, lower, upper 95 % bound); NaN, -1, 1 where there are too few."""
    if len(x) < 12 or x.std() == 0 or y.std() == 0:
        return math.nan, -1.0, 1.0
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -0.999999, 0.999999))
    n = len(x) / max(1.0, 1.0 + 2.0 * float(np.sum(_autocorrelation(x) * _autocorrelation(y))))
    half = 1.96 / math.sqrt(max(n - 3.0, 1.0))
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _autocorrelation(x: Floats) -> Floats:
    x = x - x.mean()
    size = 1 << (2 * len(x) - 1).bit_length()
    spectrum = np.fft.rfft(x, size)
    raw = np.fft.irfft(spectrum * spectrum.conj(), size)[: min(LAGS, len(x) // 4) + 1]
    return np.asarray(raw[1:] / raw[0])


def _shift(a: Trend, b: Trend) -> int:
    """Return by how many steps ``b`` shows the noise of ``a`` later; 0 where no shift stands out."""
    gap = round(a.interval)
    first, last = max(a.steps[0], b.steps[0]), min(a.steps[-1], b.steps[-1])
    grid = np.arange(first, last + 1, gap)
    if len(grid) < 4 * FEWEST or len(grid) > 200_000:
        return 0
    sides = []
    for trend in (a, b):
        z = np.zeros(len(grid))
        steps, values = _scaled(trend)
        inside = (steps >= first) & (steps <= last) & ((steps - first) % gap == 0)
        z[(steps[inside] - first) // gap] = values[inside]
        sides.append(z)
    size = 1 << (2 * len(grid) - 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(sides[0], size).conj() * np.fft.rfft(sides[1], size), size)
    reach = len(grid) // 2
    lags = np.concatenate([np.arange(reach), np.arange(-reach, 0)])
    values = np.concatenate([product[:reach], product[-reach:]]) / (len(grid) - np.abs(lags))
    values /= max(sides[0].std() * sides[1].std(), 1e-12)
    best = int(np.argmax(values))
    return int(lags[best]) * gap if values[best] > SAME else 0


def parted(a: Trend, b: Trend) -> int | None:
    """Return the first common step at which the losses are not those of one run; ``None`` where they always are.

    Two runs that were continued from one checkpoint are the same up to there, and say nothing about each other.
    """
    steps, i, j = np.intersect1d(a.steps, b.steps, assume_unique=True, return_indices=True)
    equal = np.abs(a.x[i] - b.x[j]) < 1e-6
    wide = min(20, len(equal))
    total = np.concatenate([[0], np.cumsum(equal)])
    same = np.flatnonzero(total[wide:] - total[:-wide] >= 0.9 * wide)
    end = int(same[-1]) + wide if len(same) else 0
    return int(steps[end]) if end < len(steps) else None
