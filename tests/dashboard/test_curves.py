"""Lines to draw: thinning keeps extremes, smoothing ignores a lone spike, abandoned branches are found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.dashboard import curves
from poise.dashboard.curves import Line


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(8, 60))
def test_thinning_keeps_ends_and_extremes_within_the_limit(values, limit):
    row = np.array(values, dtype=np.float64)
    keep = curves.thin(row, limit)
    assert len(keep) <= max(limit, 0) or len(row) <= limit
    assert (np.diff(keep) > 0).all()
    if len(row):
        assert keep[0] == 0 and keep[-1] == len(row) - 1
        assert row[keep].max() == row.max() and row[keep].min() == row.min()
    if len(row) <= limit:
        assert len(keep) == len(row)


def test_smoothing_ignores_a_lone_spike_and_follows_a_shift():
    flat = np.full(400, 3.0)
    spiked = flat.copy()
    spiked[200] = 1e6
    assert np.allclose(curves.smooth(spiked), 3.0)
    shifted = np.where(np.arange(400) < 200, 3.0, 5.0)
    out = curves.smooth(shifted)
    assert out[150] == pytest.approx(3.0, abs=1e-3) and out[250] == pytest.approx(5.0, abs=1e-3)


def test_smoothing_does_not_lie_beside_a_falling_curve():
    falling = 9.0 - 0.01 * np.arange(400.0)
    out = curves.smooth(falling)
    assert np.abs(out - falling)[:380].max() < 0.02
    noisy = falling + np.random.default_rng(0).normal(0, 0.1, 400)
    assert np.abs(curves.smooth(noisy) - falling)[20:380].mean() < 0.05


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_smoothing_of_few_points(n):
    out = curves.smooth(np.arange(float(n)))
    assert out.shape == (n,) and np.isfinite(out).all()


def test_view_holds_the_curve_and_not_the_divergence():
    row = np.linspace(9.0, 3.0, 1000)
    low, high = curves.view(row, row)
    assert low < 3.0 and high > 9.0
    row[400:420] = 1e9
    low, high = curves.view(row, curves.smooth(row))
    assert low < 3.0 and 9.0 < high < 30.0
    assert curves.view(np.full(5, 2.0), np.full(5, 2.0))[0] < 2.0


def test_branches_of_two_rollbacks_and_a_restart(made):
    maker = made("rolled_back")
    lost = curves.abandoned(maker.records)
    assert [(b.steps[0], b.steps[-1]) for b in lost] == [(201, 250)]
    maker.add("restart", step=380, reason="resumed")
    maker.steps(381, 400)
    lost = curves.abandoned(maker.records)
    assert [(b.steps[0], b.steps[-1]) for b in lost] == [(201, 250), (381, 400)]
    assert curves.abandoned(made("healthy").records) == []


def test_stretches_are_runs_of_neighbours():
    chosen = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 1], dtype=bool)
    assert [run.tolist() for run in curves.stretches(chosen)] == [[1, 2], [5], [7, 8, 9]]
    assert [run.tolist() for run in curves.stretches(chosen, limit=1)] == [[7, 8, 9]]
    assert curves.stretches(np.zeros(3, dtype=bool)) == []


def test_missing_values_are_not_points_and_nonfinite_ones_are():
    records = [
        {"type": "step", "step": 1, "loss": 2.0},
        {"type": "step", "step": 2, "loss": None},
        {"type": "step", "step": 3},
        {"type": "step", "step": 4, "loss": math.nan},
        {"type": "step", "step": 5, "loss": True},
    ]
    line = curves.line(records, "loss")
    assert isinstance(line, Line) and line.steps.tolist() == [1, 4]
    assert line.finite().steps.tolist() == [1]
