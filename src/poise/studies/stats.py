"""The statistics of a study: learning-rate sensitivity, first diverging rate, spike scores, intervals over seeds.

Losses are nats per token. Nothing here knows of records or of torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError

Window = tuple[float, float]
Criterion = Literal["init", "half"]

CRITERIA: Final[Mapping[Criterion, str]] = {
    "init": "not finite, or a final validation loss not 0.01 nats below the floor, which is min(loss before the first "
    "step, ln V)",
    "half": "not finite, or, at or above the arm's best rate, a final validation loss that gave back at least half of "
    "the arm's best gain below that floor",
}
"""Operational definitions of a diverged run; ``diverged_seeds`` has them in full."""
MARGIN: Final = 0.01
"""Nats by which a run must end below the floor, else it diverged."""
NOWHERE: Final = 0.02
"""An arm whose best run is not farther below the floor has nowhere trained."""

_CLOSE: Final = 1e-9
"""Relative difference below which two rates are the same point of a grid."""
_CHUNK: Final = 2048
"""Rows of a sliding window that are held at once."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds and its two-sided 95 % t interval; the ends are ``None`` where it is unknown.

    It is unknown with fewer than two seeds. A geometric one (``t_interval`` of logarithms) is not symmetric.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class FirstDiverging:
    """The smallest grid rates at which an arm diverges; ``None`` means above the largest rate tried.

    ``majority``: from here on, at every larger rate that was run too, more than half of the seeds diverge.
    ``any_seed``: the smallest rate at which at least one seed diverged. ``islands``: rates below ``majority`` at which
    most seeds diverged although a larger rate trained again; they are not in ``majority`` and so are listed.
    """

    majority: float | None
    any_seed: float | None
    islands: tuple[float, ...]


@dataclass(frozen=True)
class SpikeScore:
    """A share of steps, and by which rule it was counted.

    ``window`` is what was used; ``published_window`` what the definition asks for. ``share`` is ``None`` where the run
    is too short to judge a single step. Non-finite values count as spikes and never enter a window (our convention).
    """

    share: float | None
    spikes: int
    judged: int
    window: int
    published_window: int


def t_quantile(df: int) -> float:
    """Return the two-sided 95 % point of the t distribution, from the closed form of its integral for whole ``df``.

    >>> [round(t_quantile(df), 3) for df in (1, 2, 4, 9, 100)]
    [12.706, 4.303, 2.776, 2.262, 1.984]
    """
    assert df >= 1, df
    low, high = 1.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, df) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, df: int) -> float:
    """Return P(|T| < t) (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    odd = df % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0.0))
    return math.sin(angle) * total


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the mean and its t interval; ``None`` for no values, no interval where a value is not finite."""
    if not values:
        return None
    n = len(values)
    if not all(math.isfinite(v) for v in values):
        return Interval(math.inf if all(v > -math.inf for v in values) else math.nan, None, None, n)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def geometric_interval(values: Sequence[float]) -> Interval | None:
    """Return the geometric mean and its t interval on the logarithm; ``None`` without values or with one <= 0."""
    if any(not math.isfinite(v) or v <= 0 for v in values):
        return None
    logs = mean_interval([math.log(v) for v in values])
    if logs is None:
        return None
    low, high = (None if end is None else _exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.mean), low, high, logs.n)


def paired_ratio(ours: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """Return ours / base over the seeds that both have: geometric mean and t interval on the log ratio.

    ``None`` where no seed is common or a value is zero or not finite: its logarithm is not defined.
    """
    common = sorted(ours.keys() & base.keys())
    if any(not math.isfinite(v) or v <= 0 for s in common for v in (ours[s], base[s])):
        return None
    return geometric_interval([ours[s] / base[s] for s in common])


def paired_difference(ours: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """Return ours - base over the seeds that both have, with its t interval; ``None`` without a common seed."""
    return mean_interval([ours[s] - base[s] for s in sorted(ours.keys() & base.keys())])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def capped(loss: float, init_loss: float) -> float:
    """Return min(loss, init_loss); a loss that is not finite counts as the loss at initialisation."""
    return min(loss, init_loss) if math.isfinite(loss) else init_loss


def lr_sensitivity(losses: Mapping[float, float], init_loss: float, window: Window | None = None) -> float:
    """Return E over the grid of [min(loss, init_loss) - best loss], after Wortsman et al. (2023), arXiv 2309.14322.

    A plain average over the rates of the grid, which is to be spaced evenly in the logarithm; 0 is best. A run that
    ends worse than it began counts as ``init_loss``, and so does one that is not finite (the latter our convention).
    Where no run is better than ``init_loss`` the result is 0 (our convention too: the best is taken of the capped
    losses, or it would be negative), which says nothing good: a model at chance level has no sensitivity, so always
    look at the losses too. Not comparable between methods that change the meaning of the rate.

    Args:
        losses: final validation loss by peak learning rate, one seed.
        init_loss: validation loss before the first step.
        window: rates (lowest, highest) to average over, both included; ``None`` takes all.

    Raises:
        UserError: no rate in the window, or ``init_loss`` is not finite.
    """
    if not math.isfinite(init_loss):
        raise UserError(f"init_loss is {init_loss}; it must be the finite loss before the first step")
    low, high = window or (0.0, math.inf)
    inside = [capped(loss, init_loss) for lr, loss in losses.items() if low * (1 - _CLOSE) <= lr <= high * (1 + _CLOSE)]
    if not inside:
        raise UserError(f"no learning rate of {sorted(losses)} lies in the window {low:g} to {high:g}; widen it")
    best = min(inside)
    return math.fsum(loss - best for loss in inside) / len(inside)


def best_window(
    tables: Sequence[tuple[Mapping[float, float], float]], decades: float = 3.0
) -> tuple[Window, tuple[float, ...]] | None:
    """Return the window of ``decades`` in which the mean sensitivity is smallest, and each table's value there.

    For methods that change the meaning of the learning rate: it takes out a shift of the optimum. The smallest of
    several windows is optimistic, so compare it only with the smallest of the other arm. ``None`` where the grid that
    all tables share is not wider than the window: there is nothing to slide. Ties go to the lowest window.

    Args:
        tables: (losses by rate, init loss) for each seed, as ``lr_sensitivity`` takes them.
        decades: width of the window; 3 is the width in the definition.
    """
    shared = sorted(set.intersection(*(set(losses) for losses, _ in tables))) if tables else []
    if not shared or shared[-1] <= shared[0] * 10**decades * (1 + 1e-6):
        return None
    best: tuple[float, Window, tuple[float, ...]] | None = None
    for low in shared:
        high = low * 10**decades * (1 + 1e-6)  # the ends of a grid that was computed are rounded
        if high < shared[-1] or math.isclose(high, shared[-1], rel_tol=1e-5):
            values = tuple(lr_sensitivity(losses, init, (low, high)) for losses, init in tables)
            mean = math.fsum(values) / len(values)
            if best is None or mean < best[0] - 1e-12:
                best = mean, (low, max(lr for lr in shared if lr <= high)), values
    assert best is not None, "a grid wider than the window holds one"
    return best[1], best[2]


def floor_of(init_loss: float, vocab_size: int | None) -> float:
    """Return the loss of a model that has learned nothing: min(loss before the first step, ln V).

    A run that collapsed to the uniform distribution ends at ln V, which lies below the loss of an untied start.
    """
    return init_loss if vocab_size is None else min(init_loss, math.log(vocab_size))


def best_rate(losses: Mapping[float, Mapping[int, float]], init_loss: Mapping[int, float]) -> float | None:
    """Return the rate of the lowest mean capped loss, of those that most seeds were run at; ties go to the lowest."""
    most = max(map(len, losses.values()), default=0)
    means = [
        (math.fsum(capped(loss, init_loss[seed]) for seed, loss in cells.items()) / most, lr)
        for lr, cells in losses.items()
        if cells and len(cells) == most
    ]
    return min(means)[1] if means else None


def diverged_seeds(
    losses: Mapping[float, Mapping[int, float]],
    init_loss: Mapping[int, float],
    criterion: Criterion = "init",
    vocab_size: int | None = None,
) -> dict[float, tuple[int, ...]]:
    """Return which seeds diverged at each rate of an arm; see ``CRITERIA``.

    The floor of a seed is ``floor_of``. "init": the final validation loss is not finite or above floor - ``MARGIN``.
    "half": it also exceeds best + 0.5 (floor - best), the best being the lowest finite final loss of any of the arm's
    runs. Rates below the arm's best rate (``best_rate``: of the mean over the seeds) are slow, not diverged: there
    "half" counts only runs that are not finite. An arm none of whose runs is more than ``NOWHERE`` below its floor has
    nowhere trained: all its runs diverged, by both.

    Args:
        losses: final validation loss by rate and seed.
        init_loss: loss before the first step, by seed.
        criterion: which of ``CRITERIA``.
        vocab_size: V; ``None`` where it is not known, which makes the floor the loss before the first step.
    """
    floor = {seed: floor_of(loss, vocab_size) for seed, loss in init_loss.items()}
    finite = [(loss, seed) for cells in losses.values() for seed, loss in cells.items() if math.isfinite(loss)]
    if all(loss >= floor[seed] - NOWHERE for loss, seed in finite):
        return {lr: tuple(cells) for lr, cells in losses.items()}
    best, at = min(loss for loss, _ in finite), best_rate(losses, init_loss)
    assert at is not None, "there is a run"

    def is_bad(lr: float, seed: int, loss: float) -> bool:
        if criterion == "half" and lr < at:
            return not math.isfinite(loss)
        return _diverged(loss, floor[seed], best, criterion)

    return {lr: tuple(s for s, loss in cells.items() if is_bad(lr, s, loss)) for lr, cells in losses.items()}


def _diverged(loss: float, floor: float, best: float, criterion: Criterion) -> bool:
    if not math.isfinite(loss) or loss >= floor - MARGIN:
        return True
    return criterion == "half" and loss > best + 0.5 * (floor - best)


def first_diverging_lr(
    losses: Mapping[float, Mapping[int, float]],
    init_loss: Mapping[int, float],
    criterion: Criterion = "init",
    vocab_size: int | None = None,
) -> FirstDiverging:
    """Return from which rate on an arm diverges, over the rates and seeds that were run.

    ``diverged_seeds`` has the arguments and says what counts. The result is known to one step of the grid only.
    """
    seeds = diverged_seeds(losses, init_loss, criterion, vocab_size)
    run = sorted(lr for lr, cells in losses.items() if cells)
    most = [(lr, 2 * len(seeds[lr]) > len(losses[lr])) for lr in run]
    any_seed = next((lr for lr in run if seeds[lr]), None)
    majority: float | None = None
    for lr, is_bad in reversed(most):
        if not is_bad:
            break
        majority = lr
    islands = tuple(lr for lr, is_bad in most if is_bad and (majority is None or lr < majority))
    return FirstDiverging(majority, any_seed, islands)


def spike_score_olmo2(values: Sequence[float]) -> SpikeScore:
    """Return the share of values at least 7 sigma from the rolling mean of the last 1000 (OLMo 2, 2501.00656, 3.2).

    Both sides count. The paper does not say over which window sigma is taken: here over the same one, the value itself
    left out (our interpretation). Only values with a whole window before them are judged. A run shorter than 4000
    steps is judged by a window of a quarter of its length, at least 20: a window as long as the run would hold the
    fall of the loss itself, whose spread hides every spike. Such a score is not comparable with a published one.
    """
    window = min(1000, len(values) // 4)
    if window < 20:
        return SpikeScore(None, 0, 0, window, 1000)
    return _spike_score(values, sigmas=7.0, window=window, least=window, two_sided=True, published=1000)


def spike_score_olmo_core(values: Sequence[float]) -> SpikeScore:
    """Return the share of values above mean + 6 sigma of the last 128 (OLMo-core, ``stability_monitor.py``).

    One-sided; judged as soon as 64 values are there. The callback also keeps a running score over 10 000 steps; this
    is its cumulative one, the same in shorter runs.
    """
    window = min(128, len(values))
    return _spike_score(values, sigmas=6.0, window=128, least=64, two_sided=False, published=128, used=window)


def _spike_score(
    values: Sequence[float],
    *,
    sigmas: float,
    window: int,
    least: int,
    two_sided: bool,
    published: int,
    used: int | None = None,
) -> SpikeScore:
    """Count spikes among ``values`` (N,); a value is judged by up to ``window`` finite ones before it."""
    series = np.asarray(values, dtype=np.float64).reshape(-1)
    good = np.isfinite(series)
    finite = series[good]
    before = np.cumsum(good) - good  # finite values before each position, (N,)
    judged = before >= least
    spikes = int((judged & ~good).sum())
    mean, sigma = _rolling(finite, window, least)
    above = finite - mean
    apart = np.abs(above) if two_sided else above
    # A constant stretch has no spread; rounding in its mean must not look like a spike.
    bar = sigmas * np.maximum(sigma, 1e-9 * np.abs(mean))
    hit = (apart >= bar) & (apart > 0) if two_sided else apart > bar
    spikes += int(hit[judged[good]].sum())
    count = int(judged.sum())
    return SpikeScore(spikes / count if count else None, spikes, count, used or window, published)


def _rolling(values: NDArray[np.float64], window: int, least: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and sample deviation (N,) of up to ``window`` values before each; nan where fewer than ``least``.

    Each window is summed anew: running sums would lose all digits after one value of 1e12.
    """
    n = len(values)
    mean, sigma = np.full(n, np.nan), np.full(n, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):  # squares of 1e200 have no float; such a window hides nothing
        for i in range(least, min(window, n)):
            mean[i], sigma[i] = values[:i].mean(), values[:i].std(ddof=1)
        if n > window:
            rows = np.lib.stride_tricks.sliding_window_view(values[:-1], window)
            for start in range(0, len(rows), _CHUNK):
                part = rows[start : start + _CHUNK]
                at = slice(window + start, window + start + len(part))
                mean[at], sigma[at] = part.mean(axis=1), part.std(axis=1, ddof=1)
    return mean, sigma
