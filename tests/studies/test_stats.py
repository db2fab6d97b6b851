"""The statistics of studies, against tables worked out by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.studies import stats

NAN, INF = math.nan, math.inf


def test_sensitivity_by_hand() -> None:
    # Capped at 6: 4, 3, 5, 6, 6, 6, 6; best 3; mean of 1, 0, 2, 3, 3, 3, 3.
    losses = {3e-4: 4.0, 1e-3: 3.0, 3e-3: 5.0, 1e-2: 6.5, 3e-2: 1e30, 1e-1: NAN, 3e-1: INF}
    assert stats.lr_sensitivity(losses, 6.0) == pytest.approx(15 / 7)
    assert stats.lr_sensitivity(losses | {3e-1: -INF}, 6.0) == pytest.approx(15 / 7)


def test_sensitivity_in_a_window_takes_the_best_of_the_window() -> None:
    losses = {1e-3: 3.0, 1e-2: 4.0, 1e-1: 4.5, 1.0: NAN}
    assert stats.lr_sensitivity(losses, 6.0, (1e-2, 1.0)) == pytest.approx((0 + 0.5 + 2) / 3)
    assert stats.lr_sensitivity(losses, 6.0, (1e-2 * (1 + 1e-12), 1e-1)) == pytest.approx(0.25)  # a rounded end


def test_a_shifted_curve_in_a_shifted_window_is_the_same() -> None:
    grid = [10 ** (k / 2) for k in range(-8, 1)]
    losses = {lr: 3.0 + math.log10(lr / 2e-3) ** 2 for lr in grid}
    shifted = {lr * 10: loss for lr, loss in losses.items()}
    window = (1e-4, 1e-1)
    moved = (1e-3, 1.0)
    assert stats.lr_sensitivity(losses, 9.0, window) == pytest.approx(stats.lr_sensitivity(shifted, 9.0, moved))
    assert stats.lr_sensitivity(losses, 9.0, window) != pytest.approx(stats.lr_sensitivity(losses, 9.0, moved))


def test_sensitivity_of_a_model_that_never_trains_is_zero() -> None:
    assert stats.lr_sensitivity({1e-3: NAN, 1e-2: 8.0}, 6.0) == 0.0


@pytest.mark.parametrize(
    ("losses", "init", "window"), [({}, 6.0, None), ({1.0: 2.0}, NAN, None), ({1.0: 2.0}, 6.0, (2, 3))]
)
def test_sensitivity_refuses_what_it_cannot_average(losses, init, window) -> None:
    with pytest.raises(UserError):
        stats.lr_sensitivity(losses, init, window)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1e300) | st.sampled_from([NAN, INF, -INF]), min_size=1, max_size=7), st.randoms())
def test_order_does_not_matter_and_the_bounds_hold(values, rng) -> None:
    items = [(10.0**-k, value) for k, value in enumerate(values)]
    first = stats.lr_sensitivity(dict(items), 5.0)
    rng.shuffle(items)
    assert stats.lr_sensitivity(dict(items), 5.0) == first
    finite = [min(v, 5.0) for v in values if math.isfinite(v)]
    assert 0 <= first <= 5.0 - min([5.0, *finite])


def test_best_window_follows_the_optimum() -> None:
    grid = [10 ** (k / 2) for k in range(-10, 1)]  # 1e-5 to 1, five decades
    table = {lr: 3.0 + math.log10(lr / 10**-1.5) ** 2 for lr in grid}
    found = stats.best_window([(table, 9.0)])
    assert found is not None
    (low, high), values = found
    assert (low, high) == pytest.approx((1e-3, 1.0))
    assert values[0] == pytest.approx(stats.lr_sensitivity(table, 9.0, (1e-3, 1.0)))
    assert values[0] < stats.lr_sensitivity(table, 9.0)


def test_best_window_of_a_grid_of_three_decades_is_none() -> None:
    assert stats.best_window([({3e-4: 1.0, 1e-2: 2.0, 3e-1: 3.0}, 5.0)]) is None
    assert stats.best_window([]) is None


def test_first_diverging_rate() -> None:
    init = {0: 6.0, 1: 6.0, 2: 6.0}
    losses = {
        1e-3: {0: 3.0, 1: 3.1, 2: 3.2},
        1e-2: {0: 3.5, 1: NAN, 2: 3.0},
        1e-1: {0: 5.0, 1: 5.0, 2: 3.5},
        1.0: {0: 7.0, 1: INF, 2: 3.0},
    }
    assert stats.first_diverging_lr(losses, init) == stats.FirstDiverging(1.0, 1e-2, ())
    # Half of the gain: above 3 + 0.5 * (6 - 3).
    assert stats.first_diverging_lr(losses, init, "half") == stats.FirstDiverging(1e-1, 1e-2, ())


def test_first_diverging_rate_needs_every_larger_rate() -> None:
    init = {0: 6.0}
    losses = {1e-3: {0: NAN}, 1e-2: {0: 3.0}, 1e-1: {0: 9.0}, 1.0: {}}
    assert stats.first_diverging_lr(losses, init) == stats.FirstDiverging(1e-1, 1e-3, (1e-3,))
    assert stats.first_diverging_lr({1e-3: {0: 3.0}}, init) == stats.FirstDiverging(None, None, ())


def test_half_of_the_seeds_is_no_majority() -> None:
    found = stats.first_diverging_lr({1.0: {0: NAN, 1: 3.0}}, {0: 6.0, 1: 6.0})
    assert found == stats.FirstDiverging(None, 1.0, ())


def test_half_of_the_gain_and_the_margin_at_the_floor() -> None:
    def found(last: float, criterion: stats.Criterion) -> float | None:
        return stats.first_diverging_lr({1e-3: {0: 3.0}, 1e-2: {0: last}}, {0: 6.0}, criterion).majority

    assert (found(4.5, "half"), found(4.51, "half")) == (None, 1e-2)
    assert (found(5.98, "init"), found(5.995, "init")) == (None, 1e-2)


def test_a_run_that_collapsed_to_the_uniform_output_diverged() -> None:
    uniform = math.log(1024)  # below the loss of an untied start
    losses = {1e-3: {0: 4.0}, 1e-2: {0: uniform - 0.005}, 1e-1: {0: uniform}}
    assert stats.first_diverging_lr(losses, {0: 7.1}).majority is None
    assert stats.first_diverging_lr(losses, {0: 7.1}, vocab_size=1024).majority == 1e-2
    # The gain is measured from ln V too: 4 + 0.5 * (6.93 - 4) = 5.47, and not 5.55.
    half = stats.first_diverging_lr({1e-3: {0: 4.0}, 1e-2: {0: 5.5}}, {0: 7.1}, "half", 1024)
    assert half.majority == 1e-2
    assert stats.first_diverging_lr({1e-3: {0: 4.0}, 1e-2: {0: 6.5}}, {0: 6.4}, vocab_size=1024).majority == 1e-2


@pytest.mark.parametrize("criterion", ["init", "half"])
def test_an_arm_that_nowhere_trained_diverged_everywhere(criterion: stats.Criterion) -> None:
    near = {1e-3: {0: 5.985, 1: 6.2}, 1e-2: {0: 6.0, 1: 6.19}}
    found = stats.diverged_seeds(near, {0: 6.0, 1: 6.2}, criterion)
    assert found == {1e-3: (0, 1), 1e-2: (0, 1)}
    trained = near | {1e-1: {0: 5.9, 1: 6.0}}
    assert stats.diverged_seeds(trained, {0: 6.0, 1: 6.2}, criterion)[1e-1] == ()


def test_slow_is_not_diverged() -> None:
    # Below the best rate of the mean, 1e-1, a run that gained less than half is slow; one that is not finite is not.
    losses = {1e-3: {0: 5.5, 1: 5.5}, 1e-2: {0: 5.0, 1: NAN}, 1e-1: {0: 3.0, 1: 3.1}, 1.0: {0: 5.0, 1: 5.0}}
    found = stats.first_diverging_lr(losses, {0: 6.0, 1: 6.0}, "half")
    assert found == stats.FirstDiverging(1.0, 1e-2, ())
    assert stats.diverged_seeds(losses, {0: 6.0, 1: 6.0}, "half") == {1e-3: (), 1e-2: (1,), 1e-1: (), 1.0: (0, 1)}


def quiet(n: int, seed: int = 0) -> list[float]:
    return list(3.0 + 0.1 * np.random.default_rng(seed).standard_normal(n))


def test_olmo2_score_counts_both_sides_and_the_end_of_the_run() -> None:
    values = quiet(4400)
    values[2000], values[3000], values[3500], values[100] = 9.0, -3.0, NAN, 50.0  # the last is before any window
    score = stats.spike_score_olmo2(values)
    assert (score.window, score.published_window, score.judged, score.spikes) == (1000, 1000, 3400, 3)
    assert score.share == pytest.approx(3 / 3400)


def test_a_short_run_is_judged_by_a_shorter_window_or_not_at_all() -> None:
    values = quiet(400)
    values[300] = 9.0
    score = stats.spike_score_olmo2(values)
    assert (score.window, score.judged, score.spikes) == (100, 300, 1)
    assert stats.spike_score_olmo2(quiet(79)).share is None
    assert stats.spike_score_olmo_core(quiet(64)).share is None


def test_olmo_core_score_is_one_sided() -> None:
    values = quiet(500)
    values[200], values[400] = 9.0, -3.0
    score = stats.spike_score_olmo_core(values)
    assert (score.judged, score.spikes) == (436, 1)


@pytest.mark.parametrize(("factor", "spikes"), [(6.99, 0), (7.01, 1), (-6.99, 0), (-7.01, 1)])
def test_seven_sigma_means_seven(factor, spikes) -> None:
    base = [1.0, -1.0] * 40  # mean 0 in every window of 20, and this deviation:
    values = [*base, factor * statistics.stdev(base[-20:])]
    score = stats.spike_score_olmo2(values)
    assert (score.window, score.judged, score.spikes) == (20, 61, spikes)


def test_a_huge_value_does_not_blind_the_score_for_ever() -> None:
    values = quiet(600)
    values[200], values[500] = 1e12, 9.0
    assert stats.spike_score_olmo_core(values).spikes == 2  # 500 is more than 128 after 200


def test_a_constant_series_has_no_spike() -> None:
    assert stats.spike_score_olmo2([2.3] * 400).spikes == 0
    assert stats.spike_score_olmo_core([0.1] * 400).spikes == 0


def test_intervals() -> None:
    found = stats.mean_interval([1.0, 2.0, 3.0])
    assert found is not None and found.mean == 2.0 and found.n == 3
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    one = stats.mean_interval([2.0])
    assert one == stats.Interval(2.0, None, None, 1)
    assert stats.mean_interval([]) is None
    lost = stats.mean_interval([2.0, INF])
    assert lost is not None and lost.mean == INF and lost.low is None


def test_paired_ratio_takes_out_what_the_seeds_share() -> None:
    base = {0: 1.0, 1: 2.0, 2: 8.0}
    ours = {0: 0.21, 1: 0.40, 2: 1.58, 3: 99.0}
    ratio = stats.paired_ratio(ours, base)
    assert ratio is not None and ratio.n == 3
    logs = [math.log(0.21), math.log(0.2), math.log(1.58 / 8)]
    half = 4.302653 * statistics.stdev(logs) / math.sqrt(3)
    assert ratio.mean == pytest.approx(math.exp(statistics.fmean(logs)))
    assert ratio.low == pytest.approx(math.exp(statistics.fmean(logs) - half), rel=1e-5)
    assert ratio.high is not None and ratio.high < 0.25
    assert stats.paired_ratio({0: 0.0}, {0: 1.0}) is None
    assert stats.paired_ratio({0: 1.0}, {1: 1.0}) is None
