"""Spikes and odd batches with hindsight: where the loss stands clearly above its trend and comes back.

A rise is seeded by a point at which r = x - level (``trend.py``) is above its bar,

    r > max(6 sigma, ln 1.04)    or    r > max(10 sigma, ln 1.015)    or    median of 5 r > max(4 sigma, ln 1.02)

(in a run of heavy-tailed noise the numbers of deviations are larger, ``Trend.heaviness``), that also stands above the
points before it (just before a fall the loss stands above the median of both sides, too), and grown to both sides
while neighbours stay raised. Rises at most ``JOIN`` steps apart are one spike with aftershocks.

An odd batch is told from a spike by its length: a model that was hurt needs tens of steps to recover, so what lasts
one step (two at most, where every step is logged) and leaves nothing behind was in the data. A log of every fifth step
shows a short spike as one point, too; there a point alone counts as a spike.

After a spike the level is compared with the trend from before, carried on (``offset``): the curve may be back on it,
stay somewhat above, or never come down. What is compared begins ``SETTLE`` steps after it, because a large model's
loss takes that long to creep back once the spike itself is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from poise.postmortem.event import Recovery
from poise.postmortem.trend import MAD_TO_SIGMA, SIGMA_FLOOR, Bools, Trend, grown, running_median

BARS: Final = ((6.0, math.log(1.04)), (10.0, math.log(1.015)))
"""(deviations, rise): a point above both numbers of one pair seeds a rise."""

MEANS: Final = (10, 20, 40)
"""Steps over which the loss is averaged to find low rises that last."""

NOISY: Final = math.log(1.12)
"""Where a single point must rise so far to stand out, means are looked at, too."""

MEAN_BAR: Final = 8.0
LEAST_MEAN: Final = math.log(1.02)
CLIP: Final = 4.0
"""Deviations at which a point counts no more in such a mean."""

SUSTAINED: Final = (4.0, math.log(1.02))
ODD_BAR: Final = (5.5, math.log(1.04))
"""The same for an odd batch, which is a note only."""

TALL: Final = math.log(1.8)
"""Height from which on the tail of a spike is looked for."""

BACK: Final = 3.0
"""Deviations within which a point is back on the trend."""

JOIN: Final = 75
"""Steps between two rises of one spike."""

SHORTEST: Final = 6
"""Steps within which a point alone, between two that are not raised, shows an odd batch."""

FEW: Final = 60
"""Points below which a log has no trend to speak of."""

FEW_BAR: Final = math.log(1.1)
YOUNG, YOUNG_STEPS, YOUNG_LEAST = 20, 100, 8
"""Logged points before which the trend is not known well enough; in sparse logs fewer, that hold so many steps."""

AFTER: Final = 200
"""Steps that are looked at before and after a spike to tell whether it left something."""

AFTER_POINTS: Final = 10
SETTLE: Final = 200
"""Steps that a loss is given to settle before it is compared for the first time."""

LASTING: Final = 0.005
ERRORS: Final = 4.0
STEEP: Final = 0.25
"""Share of the loss's own fall over the stretch: where the curve is steep, its bend may pass for a step. Measured
with the same fit where nothing happened: 0.1 to 0.2 of the fall in 95 of 100 places, more where it is beyond
``BENT``."""

BENT: Final = 0.3
"""Fall of x over the stretch beyond which the fit does not hold."""

TELLING: Final = 0.5
"""Share of the rise below which a step must be visible, for a comparison to tell anything."""

GONE: Final = 0.7
"""Share of an earlier step that a later one must be below, to count as gone where no more can be seen."""

PARTLY: Final = 0.5
"""Share of the rise; what stays higher than that has never come back."""


@dataclass(frozen=True, slots=True)
class Rise:
    """A stretch above the trend, as indices into its points: ``first`` to ``last``, both inside."""

    first: int
    last: int
    peak: int
    odd: bool


def rises(trend: Trend, blocked: Bools) -> list[Rise]:
    """Return spikes and odd batches in order; nothing where ``blocked``.

    Args:
        trend: of the loss.
        blocked: points that something else explains, (N,).
    """
    r, sigma = trend.residual, trend.sigma
    heavy = trend.heaviness
    sure = _sustained(trend)
    for deviations, least in BARS:
        sure |= r > np.maximum(heavy * deviations * sigma, least)
    seeds = sure | (r > np.maximum(heavy * ODD_BAR[0] * sigma, ODD_BAR[1]))
    seeds &= ~blocked
    seeds[: min(YOUNG, max(YOUNG_LEAST, trend.points(YOUNG_STEPS)), len(r) // 2)] = False
    edges = np.flatnonzero(
        np.diff(np.concatenate([[0], grown(seeds, r > BACK * sigma, trend.interval).astype(np.int8), [0]]))
    )
    found: list[Rise] = []
    for first, end in edges.reshape(-1, 2):
        rise = _rise(trend, int(first), _tail(trend, int(first), int(end) - 1))
        if not rise.odd and not sure[first:end].any():
            continue
        if not _above_before(trend, rise) or _steps_down(trend, rise):
            continue
        before = found[-1] if found else None
        if before is not None and not before.odd and not rise.odd and _apart(trend, before, rise) <= JOIN:
            found[-1] = _rise(trend, before.first, rise.last)
        else:
            found.append(rise)
    return sorted([*found, *_low(trend, blocked, found)], key=lambda rise: rise.first)


def rises_of_few(trend: Trend, blocked: Bools) -> list[Rise]:
    """Return rises of a log of too few points for a trend: above the median of the points before it.

    A loss does not rise by itself, so that what came before says what would have been. The noise is that of
    neighbouring points, without their largest changes.
    """
    x, n = trend.x, len(trend.x)
    changes = np.sort(np.abs(np.diff(x)))
    noise = MAD_TO_SIGMA * float(np.median(changes[: max(3, (2 * len(changes)) // 3)])) / math.sqrt(2) + SIGMA_FLOOR
    bar = max(BARS[0][0] * noise, FEW_BAR)
    found: list[Rise] = []
    i = 2
    while i < n:
        level = float(np.median(x[max(0, i - 8) : i]))
        if blocked[i] or x[i] - level <= bar:
            i += 1
            continue
        first = i
        while i + 1 < n and x[i + 1] - level > max(3.0 * noise, 0.1 * float(x[first : i + 1].max() - level)):
            i += 1
        while first > 1 and x[first - 1] - level > 3.0 * noise:
            first -= 1
        peak = first + int(np.argmax(x[first : i + 1]))
        odd = first == i and i + 1 < n and trend.interval * 2 <= SHORTEST
        found.append(Rise(first, i, peak, odd))
        i += 1
    return found


def recovery(trend: Trend, first: int, last: int, height: float) -> tuple[Recovery, float]:
    """Return whether the loss came back, and how far it lies above the old trend afterwards, relative.

    It has come back if it lies on the old trend at any distance after the event at which that can be told; it is looked
    at later and later, to the log's end. Where it never does, the last such look counts.

    Args:
        trend: of the loss.
        first, last: indices of the event's first and last points.
        height: of its peak above the trend, on the logarithmic scale.
    """
    step = math.nan
    for settle in _delays(trend, last):
        seen, error, change = offset(trend, first, last + 1 + trend.points(settle), max(settle, 1.0))
        unseen = max(ERRORS * error, STEEP * change, LASTING)
        if math.isnan(seen) or unseen > max(TELLING * height, 2 * LASTING) or (change > BENT and settle > SETTLE):
            continue
        if seen <= unseen and not seen > GONE * step:  # far off less can be seen: what is no smaller has not gone
            return "returned", math.expm1(seen)
        if seen > unseen:
            step = seen
    if math.isnan(step):  # too small a spike to be told from the curve's bend: what follows it has to do
        next_to_it = trend.residual[last + 1 : last + 1 + AFTER_POINTS]
        back = len(next_to_it) >= 3 and float(np.median(next_to_it)) < PARTLY * height
        return ("returned" if back else "open"), math.nan
    return ("partly" if step < PARTLY * height else "never"), math.expm1(step)


def _delays(trend: Trend, last: int) -> list[float]:
    """Return the distances in steps at which the loss is compared: doubling, to the log's end; at least one."""
    left = float(trend.steps[-1] - trend.steps[last]) - reach_of(trend) / 2
    found = [delay for k in range(40) if 1.5 * (delay := SETTLE * 2.0**k) <= left]
    return found or [max(left / 2, 0.0), 0.0]


def reach_of(trend: Trend) -> float:
    """Return how many steps are looked at on each side: ``AFTER``, and in sparse logs as many as hold some points."""
    return max(AFTER, AFTER_POINTS * trend.interval)


def offset(trend: Trend, first: int, after: int, span: float = 0.0) -> tuple[float, float, float]:
    """Return by how much x steps up between two points, its error, and how far x falls over the stretch anyway.

    x = a + b u + d u^2 + c [t is after], u = ln t, is fitted to ``span`` steps on both sides, at least ``AFTER``; a
    loss falls nearly evenly along ln t, so that what is left is the step c. Points far off are left out and the fit is
    done again. NaN where too little is known.
    """
    n, reach = len(trend.x), trend.points(max(reach_of(trend), span))
    before_at, after_at = np.arange(max(0, first - reach), first), np.arange(after, min(n, after + reach))
    if min(len(before_at), len(after_at)) < 4:
        return math.nan, math.nan, math.nan
    at = np.concatenate([before_at, after_at])
    t = np.log(np.maximum(trend.steps[at] - min(int(trend.steps[0]), 0), 1).astype(np.float64))
    u = t - t.mean()
    design = np.stack([np.ones(len(at)), u, (at >= after).astype(np.float64), u * u], axis=1)
    x, good = trend.x[at], np.ones(len(at), dtype=bool)
    fitted = np.zeros(4)
    for _ in range(3):
        fitted = np.linalg.lstsq(design[good], x[good], rcond=None)[0]
        away = np.abs(x - design @ fitted)
        good = away <= 3.0 * MAD_TO_SIGMA * np.median(away) + SIGMA_FLOOR
        if good[: len(before_at)].sum() < 3 or good[len(before_at) :].sum() < 3:
            return math.nan, math.nan, math.nan
    left = x[good] - design[good] @ fitted
    lag = float(np.corrcoef(left[1:], left[:-1])[0, 1]) if len(left) > 5 and left.std() > 0 else 0.0
    widened = math.sqrt((1 + max(lag, 0.0)) / (1 - min(max(lag, 0.0), 0.9)))  # neighbours that are alike say less
    covariance = np.linalg.pinv(design[good].T @ design[good])
    error = float(left.std() * widened * math.sqrt(max(covariance[2, 2], 0.0)))
    smooth = fitted[1] * u + fitted[3] * u * u
    return float(fitted[2]), error, float(smooth.max() - smooth.min())


def _tail(trend: Trend, first: int, last: int) -> int:
    """Return the last point of a tall spike, whose tail has lifted the trend.

    The trend inside it is put on the line between the points before it and those that follow it at its own length.
    """
    height = float(trend.residual[first : last + 1].max())
    length = last - first + 1
    before = trend.x[max(0, first - 20) : first]
    after = trend.x[last + 1 + length : last + 1 + length + max(20, length)]
    if height < TALL or len(before) < 5 or len(after) < 10:
        return last
    left, right = float(np.median(before)), float(np.median(after))
    middle = last + 1 + length + len(after) // 2
    end = last
    while end + 2 < middle:
        line = left + (right - left) * (end + 1 - first) / max(middle - first, 1)
        if float(np.mean(trend.x[end + 1 : end + 4])) - line <= BACK * float(trend.sigma[end + 1]) / math.sqrt(3):
            break
        end += 1
    return end


def _rise(trend: Trend, first: int, last: int) -> Rise:
    peak = first + int(np.argmax(trend.residual[first : last + 1]))
    return Rise(first, last, peak, _is_odd(trend, first, last))


def _is_odd(trend: Trend, first: int, last: int) -> bool:
    """Whether the rise is over at the next step: an odd batch, not a hurt model."""
    steps = trend.steps
    left = int(steps[first - 1]) if first > 0 else int(steps[first])
    right = int(steps[last + 1]) if last + 1 < len(steps) else None
    longest = 2 if trend.interval < 2 else 1
    raised = trend.residual[first : last + 1] > BACK * trend.sigma[first : last + 1]
    consecutive = max((len(run) for run in "".join("x" if up else " " for up in raised).split()), default=0)
    if right is None:
        return False
    return consecutive <= longest and last - first <= 4 and right - left - (last - first) <= SHORTEST


def _sustained(trend: Trend) -> Bools:
    """Return where five points together are raised: a small rise that lasts is as sure a sign as a tall one."""
    if len(trend.x) < 2 * YOUNG:
        return np.zeros(len(trend.x), dtype=bool)
    middle = running_median(trend.residual, 2)
    out: Bools = middle > np.maximum(trend.heaviness * SUSTAINED[0] * trend.sigma, SUSTAINED[1])
    return out


def _low(trend: Trend, blocked: Bools, known: list[Rise]) -> list[Rise]:
    """Return rises that only means over several points show: low ones that last, in a noisy log."""
    n = len(trend.x)
    if n < 4 * YOUNG or BARS[0][0] * float(np.median(trend.sigma)) < NOISY:
        return []  # single points show as much
    taken, tail = blocked.copy(), trend.points(AFTER)
    for rise in known:
        taken[max(0, rise.first - 2) : rise.last + (3 if rise.odd else tail)] = True
    kept = np.clip(np.where(taken, 0.0, trend.residual), -CLIP * trend.sigma, CLIP * trend.sigma)
    found: list[Rise] = []
    for steps in MEANS:
        width = trend.points(steps)
        if width < 5 or n < 8 * width:
            continue
        mean = np.convolve(kept, np.full(width, 1.0 / width), mode="same")
        noise = MAD_TO_SIGMA * float(np.median(np.abs(mean[~taken]))) + SIGMA_FLOOR
        high = np.flatnonzero((mean > max(MEAN_BAR * trend.heaviness * noise, LEAST_MEAN)) & ~taken)
        for group in np.split(high, np.flatnonzero(np.diff(high) > width) + 1):
            if not len(group) or group[0] < 2 * YOUNG or taken[group].any():
                continue
            peak = int(group[np.argmax(mean[group])])
            up = mean > max(2.0 * noise, 0.3 * float(mean[peak]))
            first, last = peak, peak
            while first > 0 and up[first - 1]:
                first -= 1
            while last < n - 1 and up[last + 1]:
                last += 1
            half = width // 2
            first, last = min(first + half, peak), max(last - half, peak)
            top = first + int(np.argmax(trend.residual[first : last + 1]))
            rise = Rise(first, last, top, odd=False)
            if not _steps_down(trend, rise):
                found.append(rise)
            taken[max(0, first - tail) : last + tail] = True
    return found


def _steps_down(trend: Trend, rise: Rise) -> bool:
    """Whether the loss steps down after a rise, to below what was before it: the trend has turned too early there."""
    before = trend.x[max(0, rise.first - min(20, max(3, trend.points(50)))) : rise.first]
    following = trend.x[rise.last + 1 : rise.last + 1 + min(24, max(5, trend.points(40)))]
    if len(before) < 3 or len(following) < 3:
        return False
    height = float(trend.residual[rise.first : rise.last + 1].max())
    return float(np.median(before) - np.median(following)) > 0.7 * height


def _above_before(trend: Trend, rise: Rise) -> bool:
    """Whether the rise stands above the points before it, and not only above what comes after it."""
    before = trend.x[max(0, rise.first - min(20, max(3, trend.points(50)))) : rise.first]
    if len(before) == 0:
        return True
    level, inside = float(np.median(before)), slice(rise.first, rise.last + 1)
    peak = trend.x[rise.peak] - level > 0.5 * trend.residual[rise.peak]
    return bool(peak and np.mean(trend.x[inside]) - level > 0.4 * np.mean(trend.residual[inside]))


def _apart(trend: Trend, a: Rise, b: Rise) -> int:
    return int(trend.steps[b.first] - trend.steps[a.last])
