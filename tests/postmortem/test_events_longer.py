"""Longer troubles of a loss curve, and curves that look like trouble and are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from poise.postmortem.event import Event
from poise.postmortem.events import find
from poise.postmortem.log import Log

N = 8000


def noise(sd: float, n: int = N, seed: int = 0) -> np.ndarray:
    return np.exp(sd * np.random.default_rng(seed).normal(size=n))


def curve(sd: float = 0.01, n: int = N, every: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(1, n + 1) * every
    return steps, (1.7 + 12.0 * (steps + 20.0) ** -0.25) * noise(sd, n, seed)


def everything(steps: np.ndarray, loss: np.ndarray) -> list[Event]:
    return find(Log(Path("made.csv"), "made", "table", {"loss": (steps, loss)}))


def found(steps: np.ndarray, loss: np.ndarray) -> list[Event]:
    return [e for e in everything(steps, loss) if e.severity != "note"]


# -- what is no trouble --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1.3, 0.69, 2.05, 20.0])
def test_fine_tuning_has_nothing_to_learn_from_scratch(start: float) -> None:
    steps = np.arange(1, 1001)
    assert found(steps, start * (1.0 - 0.05 * steps / 1000) * noise(0.03, 1000)) == []


@pytest.mark.parametrize("drop", [0.25, 0.5])
def test_falls_at_the_ends_of_epochs_are_notes(drop: float) -> None:
    steps, loss = curve(0.02, 4000, every=10)
    for end in (10_000, 20_000, 30_000):
        loss[steps > end] *= 1.0 - drop
    events = [e for e in everything(steps, loss) if e.kind != "data_outlier"]
    assert {e.kind for e in events} == {"level_drop"}
    assert [round(e.start, -3) for e in events] == [10_000, 20_000, 30_000]


def test_release_from_a_plateau_is_learning() -> None:
    steps = np.arange(1, N + 1)
    loss = np.where(steps < 1500, 7.0 + 3.8 * np.exp(-steps / 100), 3.3 + 3.7 * np.exp(-(steps - 1500) / 40.0))
    assert found(steps, loss * noise(0.01)) == []


@pytest.mark.parametrize("every", [100, 500, 1000])
def test_sparse_logs_of_healthy_runs(every: int) -> None:
    assert found(*curve(0.005, 400, every)) == []


def test_coming_back_from_a_dip_is_no_rise() -> None:
    steps, loss = curve()
    loss[3000:3200] *= 0.96  # data shown again after a faulty resume
    assert found(steps, loss) == []


@pytest.mark.parametrize("seed", range(3))
def test_record_lows_of_noise_are_no_level(seed: int) -> None:
    steps = np.arange(5, 50_001, 5)
    assert found(steps, 2.0 * noise(0.03, 10_000, seed)) == []


@pytest.mark.parametrize("floor", [0.02, 0.05])
def test_a_loss_that_has_sunk_into_its_noise_is_healthy(floor: float) -> None:
    steps = np.arange(1, 1001)
    for seed in range(3):
        additive = 0.03 * np.random.default_rng(seed).normal(size=1000)
        assert found(steps, np.maximum(floor + 0.7 * np.exp(-steps / 150) + additive, 1e-3)) == []


def test_the_points_before_a_step_down_are_no_spike() -> None:
    steps = np.arange(1, 901)
    stairs = np.array([1.3, 0.9, 0.5])[(steps - 1) // 300]
    hits = sum(bool(found(steps, stairs * noise(0.06, 900, seed))) for seed in range(8))
    assert hits <= 1


# -- what is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sd", "height", "decay"), [(0.045, 0.2, 40), (0.01, 0.05, 100), (0.02, 0.1, 100)])
def test_a_low_hump_that_goes_is_a_spike(sd: float, height: float, decay: float) -> None:
    steps, loss = curve(sd)
    loss[4000:] *= 1.0 + height * np.exp(-np.arange(N - 4000) / decay)
    (event,) = found(steps, loss)
    assert (event.kind, event.recovery) == ("fast_spike", "returned")
    assert event.end < 4000 + 4 * decay


@pytest.mark.parametrize("decay", [300, 700])
def test_a_spike_that_takes_long_has_come_back_in_the_end(decay: float) -> None:
    steps, loss = curve(n=20_000)
    loss[3000:] *= 1.0 + 0.3 * np.exp(-np.arange(17_000) / decay)
    (event,) = found(steps, loss)
    assert (event.kind, event.recovery) == ("fast_spike", "returned")


def test_what_a_tall_spike_leaves_is_not_hidden_by_its_height() -> None:
    steps, loss = curve(0.005, 20_000)
    loss[3000:] *= 1.02 * (1.0 + 0.3 * np.exp(-np.arange(17_000) / 15))
    (event,) = found(steps, loss)
    assert event.recovery == "partly"
    assert event.lasting == pytest.approx(0.02, abs=0.006)


def test_a_large_step_that_stays_is_one_event() -> None:
    steps, loss = curve()
    loss[4000:] *= 1.1
    (event,) = found(steps, loss)
    assert (event.kind, event.recovery) == ("level_shift", "never")
    assert abs(event.start - 4001) < 5
    loss[4000:4100] *= 1.0 + 4.0 * np.exp(-np.arange(100) / 15)
    (event,) = found(steps, loss)
    assert event.recovery == "never"


@pytest.mark.parametrize("length", [600, 1500])
def test_a_collapse_may_take_its_time(length: int) -> None:
    steps, loss = curve()
    loss *= np.exp(-np.clip((steps - 3000) / length, 0, 1) * np.log(3.2))
    (event,) = found(steps, loss)
    assert event.kind == "collapse"
    assert 2700 < event.start < 3200


def test_a_collapse_that_ends_is_one_event() -> None:
    steps, loss = curve()
    loss[3000:3300] *= 0.4
    (event,) = found(steps, loss)
    assert (event.kind, event.recovery) == ("collapse", "returned")
    assert event.end == pytest.approx(3300, abs=20)


def test_a_loss_that_becomes_zero() -> None:
    steps, loss = curve()
    loss[3000:] = 0.0
    (event,) = found(steps, loss)
    assert (event.kind, event.start, event.value, event.severity) == ("collapse", 3001, 0.0, "critical")


@pytest.mark.parametrize(
    ("losses", "start", "recovery"),
    [
        ([2.20, 2.24, 2.19, 2.22, 2.21, 5.1, 4.6, 3.9, 3.5, 3.2, 3.0], 6, "open"),
        ([2.2, 2.21, 5.0, 4.0, 3.1, 2.6, 2.3, 2.25, 2.2, 2.21, 2.2], 3, "returned"),
        ([2.4, 2.38, 2.41, 2.39, 2.4, 2.38, 2.42, 2.4, 2.43, 2.5, 4.1], 10, "open"),
    ],
)
def test_eleven_lines_of_a_log(losses: list[float], start: int, recovery: str) -> None:
    for first in (0, 31_000):
        (event,) = found(np.arange(first + 1, first + 12), np.array(losses))
        assert (event.kind, event.recovery) == ("fast_spike", recovery)
        assert abs(event.start - first - start) <= 1


def test_a_rise_that_only_means_show() -> None:
    hits = 0
    for seed in range(5):
        steps, loss = curve(0.2, 6000, seed=seed)
        loss[3000:] *= 1.0 + np.exp(-np.arange(3000) / 30)
        hits += any(e.start <= 3090 and e.end >= 3000 for e in found(steps, loss))
    assert hits >= 4


def test_a_run_that_learned_something_and_ended_is_no_plateau() -> None:
    steps = np.arange(1, 2001)
    assert found(steps, (5.0 + 3.0 * np.exp(-steps / 50)) * noise(0.01, 2000)) == []
    assert [e.kind for e in found(steps, (7.0 + 3.0 * np.exp(-steps / 50)) * noise(0.01, 2000))] == ["plateau"]
