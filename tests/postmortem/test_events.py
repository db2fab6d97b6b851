"""Events of a loss curve with hindsight: made curves whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.postmortem.event import Event
from poise.postmortem.events import find
from poise.postmortem.log import Log
from poise.postmortem.scores import spike_score, spike_scores
from poise.postmortem.trend import fit, running_median

N = 4000


def curve(noise: float = 0.01, every: int = 1, n: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A healthy loss: a power law from 11 to 2.8 with noise."""
    steps = np.arange(1, n + 1) * every
    rng = np.random.default_rng(seed)
    return steps, (2.0 + 9.0 * (1.0 + steps / 30.0) ** -0.5) * np.exp(noise * rng.normal(size=n))


def log_of(steps: np.ndarray, loss: np.ndarray, **series: np.ndarray) -> Log:
    named = {"loss": (steps, loss)} | {name: (steps, values) for name, values in series.items()}
    return Log(Path("made.csv"), "made", "table", named)


def found(steps: np.ndarray, loss: np.ndarray, **series: np.ndarray) -> list[Event]:
    return [e for e in find(log_of(steps, loss, **series)) if e.severity != "note"]


def spiked(loss: np.ndarray, at: int, height: float, decay: float, length: int = 80) -> np.ndarray:
    out = loss.copy()
    out[at : at + length] *= 1.0 + height * np.exp(-np.arange(length) / decay)
    return out


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_has_no_events(noise: float, seed: int) -> None:
    assert found(*curve(noise, seed=seed)) == []


def test_wandering_and_heavy_tailed_noise_are_healthy_too() -> None:
    steps, loss = curve(0.0)
    rng = np.random.default_rng(0)
    wander = np.zeros(N)
    for i in range(1, N):
        wander[i] = 0.95 * wander[i - 1] + 0.005 * rng.normal()
    assert found(steps, loss * np.exp(wander)) == []
    assert found(steps, loss * np.exp(0.01 * rng.standard_t(3, N))) == []


@pytest.mark.parametrize("every", [1, 2, 5, 10])
@pytest.mark.parametrize("height", [0.08, 0.4, 3.0])
def test_a_spike_is_found_where_it_was(every: int, height: float) -> None:
    steps, loss = curve(every=every)
    width = max(3.0, 20.0 / every)
    (event,) = found(steps, spiked(loss, 2000, height, width))
    assert event.kind == "fast_spike"
    assert event.recovery == "returned"
    assert abs(event.start - steps[2000]) <= 2 * every
    assert abs(event.peak - steps[2000]) <= 3 * every
    assert event.rise == pytest.approx(height, rel=0.3, abs=0.02)
    gone = steps[2000] + every * min(80, width * np.log(height / 0.03))  # where it has sunk into the noise
    assert abs(event.end - gone) <= max(20, 3 * every)


def test_units_and_where_the_steps_begin_do_not_matter() -> None:
    steps, loss = curve()
    loss = spiked(spiked(loss, 1500, 0.3, 15), 3000, 0.1, 30)
    plain = found(steps, loss)
    moved = found(steps + 10**6, loss / np.log(2))
    assert [(e.kind, e.start, e.peak, e.end) for e in plain] == [
        (e.kind, e.start - 10**6, e.peak - 10**6, e.end - 10**6) for e in moved
    ]
    assert len(plain) == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 12), st.integers(0, 2))
def test_rows_that_are_missing_change_little(k: int, seed: int) -> None:
    steps, loss = curve(seed=seed)
    loss = spiked(loss, 2000, 0.3, 20)
    keep = np.arange(N) % k != 0
    (whole,) = found(steps, loss)
    (part,) = found(steps[keep], loss[keep])
    assert part.kind == whole.kind
    assert abs(part.start - whole.start) <= 3
    assert abs(part.end - whole.end) <= 15


def test_one_odd_batch_is_a_note_and_a_spike_is_not() -> None:
    steps, loss = curve()
    loss[2500] *= 1.3
    (event,) = find(log_of(steps, loss))
    assert (event.kind, event.severity, event.start, event.end) == ("data_outlier", "note", 2501, 2501)
    loss[2501:2504] *= 1.3
    assert [e.kind for e in found(steps, loss)] == ["fast_spike"]


def test_a_log_of_every_fifth_step_cannot_tell_an_odd_batch() -> None:
    steps, loss = curve(every=5)
    loss[2500] *= 1.3
    assert [e.kind for e in found(steps, loss)] == ["fast_spike"]


@pytest.mark.parametrize("height", [0.03, 0.1])
def test_a_step_that_stays_is_a_level_shift(height: float) -> None:
    steps, loss = curve()
    loss[2000:] *= 1.0 + height
    (event,) = found(steps, loss)
    assert event.kind == "level_shift"
    assert event.recovery == "never"
    assert abs(event.start - 2000) <= 10
    assert event.lasting == pytest.approx(height, abs=0.01)


def test_what_a_small_spike_leaves_behind() -> None:
    """A 32B run stepped up by 3 % and came back to 0.75 % above its trend: lasting damage."""
    steps, loss = curve(0.003, n=6000)
    loss[3000:] *= 1.0075
    (event,) = found(steps, spiked(loss, 3000, 0.03, 15))
    assert event.kind == "fast_spike"
    assert event.recovery == "partly"
    assert event.lasting == pytest.approx(0.0075, abs=0.003)
    steps, loss = curve(0.003, n=6000)
    (event,) = found(steps, spiked(loss, 3000, 0.03, 15))
    assert event.recovery == "returned"


def test_a_climb_that_does_not_turn_is_slow_divergence() -> None:
    steps, loss = curve()
    loss[2000:] *= np.exp(np.minimum(np.arange(2000) * 3e-4, 0.6))
    (event,) = found(steps, loss)
    assert (event.kind, event.severity, event.recovery) == ("slow_divergence", "critical", "never")
    assert 1900 <= event.start <= 2200
    assert event.end == N


def test_a_run_that_explodes_and_stays_up() -> None:
    steps, loss = curve()
    loss[2000:] = 14.0 * np.exp(0.01 * np.random.default_rng(1).normal(size=2000))
    (event,) = found(steps, loss)
    assert (event.kind, event.recovery) == ("level_shift", "never")
    assert abs(event.start - 2001) <= 3


def test_erratic_for_long_is_chaotic() -> None:
    steps, loss = curve()
    rng = np.random.default_rng(2)
    loss[300:2000] *= np.exp(np.abs(rng.normal(size=1700)) * 0.8)
    (event,) = found(steps, loss)
    assert event.kind == "chaotic"
    assert 250 <= event.start <= 400
    assert 1800 <= event.end <= 2050


def test_worse_than_knowing_nothing() -> None:
    steps, loss = curve(n=300)
    high = loss.copy()
    high[3:40] = np.linspace(45.0, 11.5, 37)
    (event,) = found(steps, high)
    assert (event.kind, event.start) == ("chaotic", 4)
    assert 35 <= event.end <= 45
    mild = loss.copy()
    mild[3:8] = 14.0
    assert found(steps, mild) == []
    assert [e.kind for e in find(log_of(steps, mild))] == ["early_transient"]


def test_a_loss_that_falls_too_fast() -> None:
    steps, loss = curve()
    loss[3000:] *= 0.4 + 0.6 * np.exp(-np.arange(1000) / 60)
    (event,) = found(steps, loss)
    assert event.kind == "collapse"
    assert 2950 <= event.start <= 3100
    assert event.value < event.baseline


def test_a_run_that_does_not_learn() -> None:
    steps = np.arange(10, 5001, 10)
    noise = np.exp(0.01 * np.random.default_rng(5).normal(size=500))
    (event,) = found(steps, (7.4 + 1.8 * np.exp(-steps / 150)) * noise)
    assert (event.kind, event.end, event.recovery) == ("plateau", 5000, "never")
    assert event.start < 1000
    resumed = 2.6 + 0.02 * np.exp(-steps / 500)
    assert found(steps + 40_000, resumed * noise) == []


def test_non_finite_values_are_events() -> None:
    steps, loss = curve()
    loss[2000] = np.nan
    (event,) = found(steps, loss)
    assert (event.kind, event.severity, event.start, event.recovery) == ("nonfinite", "warning", 2001, "returned")
    loss[3000:] = np.inf
    first, second = found(steps, loss)
    assert first.start == 2001
    assert (second.start, second.end, second.recovery, second.severity) == (3001, N, "never", "critical")
    (event,) = found(steps[:50], np.full(50, np.nan))
    assert (event.start, event.end, event.points) == (1, 50, 50)


def test_gradient_outliers_are_notes() -> None:
    steps, loss = curve()
    norm = np.exp(0.1 * np.random.default_rng(3).normal(size=N))
    norm[2200] = 14.0
    norm[100] = np.inf
    events = find(log_of(steps, loss, grad_norm=norm))
    assert [(e.kind, e.severity, e.peak) for e in events] == [("nonfinite", "note", 101), ("grad_spike", "note", 2201)]


def test_a_gradient_norm_that_stays_infinite_is_no_note() -> None:
    steps, loss = curve()
    norm = np.ones(N)
    norm[2000:] = np.nan
    (event,) = found(steps, loss, grad_norm=norm)
    assert (event.kind, event.signal, event.severity) == ("nonfinite", "grad_norm", "critical")


def test_growing_attention_logits() -> None:
    steps, loss = curve()
    logits = 5.0 * np.exp(np.arange(N) / 800.0)
    (event,) = found(steps, loss, max_attention_logit=logits)
    assert event.kind == "logit_growth"
    assert logits[event.start - 1] > 100.0 >= logits[event.start - 2]
    assert found(steps, loss, max_attention_logit=np.full(N, 20.0)) == []


def test_a_spike_at_the_end_is_open() -> None:
    steps, loss = curve()
    loss[-8:] *= np.linspace(1.1, 1.6, 8)
    (event,) = found(steps, loss)
    assert (event.kind, event.recovery, event.end) == ("fast_spike", "open", N)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=0, max_size=80),
    st.integers(1, 1000),
)
def test_any_numbers_are_survived(values: list[float], every: int) -> None:
    loss = np.array(values, dtype=np.float64)
    for event in find(log_of(np.arange(len(loss)) * every, loss, grad_norm=loss)):
        assert event.start <= event.peak <= event.end
        assert event.points >= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 9), st.integers(0, 5))
def test_running_median_is_a_median(n: int, half: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=n)
    got = running_median(x, half)
    half = min(half, (n - 1) // 2)
    if half < 10:  # every point is computed
        want = [np.median(x[i - w : i + w + 1]) for i in range(n) for w in [min(half, i, n - 1 - i)]]
        np.testing.assert_allclose(got, want)


def test_a_long_spike_does_not_lift_the_trend() -> None:
    steps, loss = curve()
    clean = fit(steps, loss).level
    high = loss.copy()
    high[2000:2080] *= 1.5
    np.testing.assert_allclose(fit(steps, high).level, clean, atol=0.02)


def test_spike_scores_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_t(3, 2500) + 5.0
    for window, needed, deviations, both in [(1000, 128, 7.0, True), (128, 64, 6.0, False)]:
        out = 0
        for i in range(needed, len(x)):
            past = x[max(0, i - window) : i]
            away = x[i] - past.mean()
            out += (abs(away) if both else away) > deviations * past.std()
        assert spike_score(x, window, needed, deviations, both) == pytest.approx(100 * out / (len(x) - needed))
    assert spike_scores(log_of(np.arange(1, 51), np.ones(50))) == {}
