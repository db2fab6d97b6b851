"""A forecast of the largest attention logit at full size, from proxies.

Wortsman et al. 2023 (arXiv 2309.14322), in their section on predicting instabilities from the scaling of model
characteristics, take the largest attention logit of the first block at one early step, fit it for each learning rate
as a quadratic in the number of weights, and find that every run above 1e4 diverged; the fit foretold that a model of
4.8B weights would, at 1e-2 and without QK-norm.

Here it is log10 of the largest logit of all blocks,

    a + b x + c y + d y² + e x y        x = log10 of the blocks' weights, y = log10 of the learning rate

fitted to all runs at once, because two or three sizes cannot carry a curve in x. The fit's error is that of leaving a
cell out (all seeds of a size and rate). The interval is that of 95 % of refits to resampled left-out errors, with one
more such error added for the new model itself, widened to where a curve through three sizes would end, since a
quadratic is what the paper fits. That line or curve goes on over four decades nothing here can tell; two sizes alone
say nothing so far away. It speaks of as many steps as the proxies were trained: logits can grow for longer than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from poise.preflight.measure_proxies import Run

THRESHOLD: Final = 1e4
"""Every run of Wortsman et al. with a larger logit diverged."""

REFITS: Final = 1000
WIDE: Final = 4.0
"""Decades above which an interval says nothing."""

NEAR: Final = 1.0
"""Decades beyond the largest proxy up to which two sizes are enough."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """The forecast at one learning rate.

    Attributes:
        lr: the rate.
        logit: the largest attention logit that the fit gives at full size.
        low, high: its interval.
    """

    lr: float
    logit: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the proxies say of the configured model, as far as they can.

    Attributes:
        runs: all of them.
        weights: of the configured model's blocks, for which it is made.
        steps: of each run, and the step that the forecast speaks of.
        points: one a learning rate; empty where there is too little to fit.
        left_out_error: root mean square error, in decades, of predicting a cell that the fit has not seen.
        largest_error: the mean of (seen - predicted) at the largest size, in decades, fitted without that size;
            ``nan`` with two sizes.
        decades: how far beyond the largest proxy it reaches.
        crossing: the smallest rate of the grid whose forecast is above ``THRESHOLD``; ``None`` where none is.
        reason: why there are no points.
    """

    runs: tuple[Run, ...]
    weights: float
    steps: int
    points: tuple[Point, ...]
    left_out_error: float = math.nan
    largest_error: float = math.nan
    decades: float = math.nan
    crossing: float | None = None
    reason: str = ""

    @property
    def informative(self) -> bool:
        """Whether the interval at the configured rate says something: narrow, and of three sizes unless it is near."""
        if not self.points or (math.isnan(self.largest_error) and self.decades > NEAR):
            return False
        return math.log10(self.points[0].high / self.points[0].low) <= WIDE

    def diverged(self, lr: float) -> tuple[int, int]:
        """Return how many runs at a rate diverged, of how many."""
        there = [run for run in self.runs if math.isclose(run.lr, lr, rel_tol=1e-9)]
        return sum(run.diverged for run in there), len(there)


def forecast(runs: Sequence[Run], weights: float, steps: int, seed: int = 0) -> Forecast:
    """Fit the runs that have a positive attention logit, and extrapolate to ``weights`` at every rate they ran at."""
    sound = [run for run in runs if math.isfinite(run.logit) and run.logit > 0 and not run.diverged]
    sizes, rates = sorted({run.weights for run in sound}), sorted({run.lr for run in sound})
    nothing = Forecast(tuple(runs), weights, steps, ())
    terms = _terms(len(rates))
    if len(sizes) < 2:
        return _without(nothing, "attention logits of two sizes at least are needed")
    if len(sound) < terms + 2:
        return _without(nothing, f"{len(sound)} runs are too few for a fit with {terms} terms")
    x, y, z = (np.log10([getattr(run, name) for run in sound]) for name in ("weights", "lr", "logit"))
    full = math.log10(weights)
    target_RK = _design(np.full(len(rates), full), np.log10(rates), terms)
    errors = _left_out(x, y, z, terms)
    if not np.isfinite(errors).all():
        return _without(nothing, "without one of its cells the fit is not determined")
    design = _design(x, y, terms)
    weights_K, *_ = np.linalg.lstsq(design, z, rcond=None)
    fitted, centre = design @ weights_K, target_RK @ weights_K
    drawn = _resampled(design, fitted, errors, target_RK, seed)
    largest = _largest_error(x, y, z)
    bent = centre + _bend(x, largest, full)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    low, high = np.minimum(low, bent), np.maximum(high, bent)
    points = tuple(
        Point(rate, *(float(10.0 ** min(v, 300.0)) for v in values))
        for rate, *values in zip(rates, centre, np.minimum(low, centre), np.maximum(high, centre), strict=True)
    )
    return Forecast(
        tuple(runs),
        weights,
        steps,
        points,
        left_out_error=float(np.sqrt(np.mean(errors**2))),
        largest_error=largest,
        decades=full - float(x.max()),
        crossing=next((point.lr for point in points if point.logit > THRESHOLD), None),
    )


def _without(nothing: Forecast, reason: str) -> Forecast:
    return Forecast(nothing.runs, nothing.weights, nothing.steps, (), reason=reason)


def _terms(rates: int) -> int:
    """Return how many terms so many rates can carry, in the order of ``_design``."""
    return {1: 2, 2: 3}.get(rates, 5)


def _design(x: Floats, y: Floats, terms: int) -> Floats:
    # Centred, so that the columns are not almost parallel; both lie within a few decades of these.
    x, y = x - 5.0, y + 2.0
    return np.stack([np.ones_like(x), x, y, y**2, x * y][:terms], axis=1)


def _left_out(x: Floats, y: Floats, z: Floats, terms: int) -> Floats:
    """Return, for each run, its error when its whole cell is not fitted; ``nan`` where the rest has too little."""
    errors = np.full(len(z), np.nan)
    for cell in set(zip(x.tolist(), y.tolist(), strict=True)):
        out = (x == cell[0]) & (y == cell[1])
        rest = _design(x[~out], y[~out], terms)
        if np.linalg.matrix_rank(rest) < terms:
            continue
        found, *_ = np.linalg.lstsq(rest, z[~out], rcond=None)
        errors[out] = z[out] - _design(x[out], y[out], terms) @ found
    return errors


def _largest_error(x: Floats, y: Floats, z: Floats) -> float:
    """Return the mean error at the largest size of a fit without it: how well this very line extrapolates."""
    out = x == x.max()
    terms = _terms(len(set(y[~out].tolist())))
    rest = _design(x[~out], y[~out], terms)
    if len(set(x[~out].tolist())) < 2 or np.linalg.matrix_rank(rest) < terms:
        return math.nan
    found, *_ = np.linalg.lstsq(rest, z[~out], rcond=None)
    return float(np.mean(z[out] - _design(x[out], y[out], terms) @ found))


def _bend(x: Floats, largest_error: float, full: float) -> float:
    """Return how far a curve through the sizes leaves the line at full size, in decades; 0 where there is no third."""
    sizes: list[float] = [math.nan, math.nan, *sorted(set(x.tolist()))]
    first, second, last = sizes[-3:]
    if math.isnan(largest_error) or math.isnan(first):
        return 0.0
    return largest_error * (full - last) * (full - second) / ((last - first) * (last - second))


def _resampled(design: Floats, fitted: Floats, errors: Floats, target: Floats, seed: int) -> Floats:
    """Return (refits, rates): forecasts of refits to resampled errors, each with one error of its own."""
    generator = np.random.default_rng(seed)
    noisy = fitted + generator.choice(errors, size=(REFITS, len(fitted)))
    solved = np.linalg.pinv(design) @ noisy.T
    drawn: Floats = (target @ solved).T + generator.choice(errors, size=(REFITS, len(target)))
    return drawn
