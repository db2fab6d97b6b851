"""Detectors: what they catch, what they leave alone, and that their memory is exact."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import Detector
from poise.guard.detectors.fast_spike import CARD as FAST_SPIKE_CARD
from poise.guard.detectors.fast_spike import FastSpike
from poise.guard.detectors.grad_spike import CARD as GRAD_SPIKE_CARD
from poise.guard.detectors.grad_spike import GradSpike
from poise.guard.detectors.level_shift import LevelShift
from poise.guard.detectors.nonfinite import CARD as NONFINITE_CARD
from poise.guard.detectors.nonfinite import NonFinite

MAKERS: list[Callable[[], Detector]] = [NonFinite, FastSpike, GradSpike]


def signals(step: int, loss: float = 3.0, grad_norm: float = 1.0) -> Signals:
    return Signals(step=step, loss=loss, grad_norm=grad_norm, lr=1e-3, tokens=step)


def feed(detector: Detector, losses: Sequence[float], first: int = 1, every: int = 1) -> list[Alarm]:
    found = [detector.update(signals(first + i * every, loss)) for i, loss in enumerate(losses)]
    return [alarm for alarm in found if alarm is not None]


def run_like(seed: int, steps: int, noise: float = 0.04, start: float = 9.0, end: float = 3.0) -> list[float]:
    """A healthy loss curve: a steep descent that flattens, times log-normal noise."""
    rng = random.Random(seed)
    falling = [end + (start - end) * math.exp(-8 * i / steps) for i in range(steps)]
    return [value * math.exp(rng.gauss(0.0, noise)) for value in falling]


@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.003, 0.03, 0.05, 0.2]),
    end=st.sampled_from([2.0, 4.0, 9.0]),
    every=st.sampled_from([1, 5, 10]),
)
@settings(max_examples=40, deadline=None, derandomize=True)  # noise may raise an alarm once in a blue moon
def test_no_alarm_on_healthy_noise(seed: int, noise: float, end: float, every: int) -> None:
    """Constant or falling, quiet or noisy, logged often or rarely: a healthy run raises nothing."""
    assert feed(FastSpike(), run_like(seed, 300, noise, 9.0, end), every=every) == []


def test_false_alarm_rate_on_healthy_noise() -> None:
    """At most one alarm in 10 000 steps of Gaussian noise of 4 %, start of the run included."""
    alarms = [alarm for seed in range(25) for alarm in feed(FastSpike(), run_like(seed, 400))]
    assert len(alarms) <= 1, [alarm.message for alarm in alarms]


def test_constant_loss_and_its_smallest_spike() -> None:
    """A point alone has to clear twice the floor; one that a second point confirms, or a thin log, the floor."""
    detector = FastSpike()
    assert feed(detector, [3.0] * 50) == []
    assert feed(detector, [3.0 * 1.055], first=51) == []
    (alarm,) = feed(detector, [3.0 * 1.07], first=52)
    assert (alarm.kind, alarm.severity, alarm.signal, alarm.step) == ("fast_spike", "critical", "loss", 52)
    assert alarm.expected == pytest.approx(3.0)
    assert "+7.0%" in alarm.message
    for rises, every, found in (([1.055, 1.0], 1, []), ([1.055, 1.055], 1, [52]), ([1.055, 1.0], 5, [251])):
        detector = FastSpike()
        feed(detector, [3.0] * 50, every=every)
        alarms = feed(detector, [3.0 * rise for rise in rises], first=1 + 50 * every, every=every)
        assert [alarm.step for alarm in alarms] == found, (rises, every)


def test_steep_start_with_a_jump_raises_nothing() -> None:
    """The first steps may do anything: a jump in the first 20 steps is the start, not a spike."""
    losses = [12.4, 12.2, 12.1, 16.8, 15.1, 14.0, 12.9, *run_like(3, 300, 0.02, start=11.5)]
    assert feed(FastSpike(), losses) == []


@given(seed=st.integers(0, 10**6), gap=st.integers(1, 30), tall=st.floats(1.7, 50.0))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_one_spike_does_not_hide_the_next(seed: int, gap: int, tall: float) -> None:
    """After a spike of any height, a second of 1.6 times the level within the window is caught."""
    losses = run_like(seed, 200, noise=0.02)
    losses[150] *= tall
    losses[150 + gap] *= 1.6
    assert [alarm.step for alarm in feed(FastSpike(), losses)] == [151, 151 + gap]


def test_a_long_spike_is_flagged_all_along() -> None:
    losses = run_like(0, 260, noise=0.01)
    for i in range(200, 240):
        losses[i] *= 1.5
    assert [alarm.step for alarm in feed(FastSpike(), losses)] == list(range(201, 241))


@given(seed=st.integers(0, 10**6), where=st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=25, deadline=None)
def test_nonfinite_values_never_enter(seed: int, where: list[int]) -> None:
    """Steps with NaN or infinity leave no trace: all other answers are the same without them."""
    losses = run_like(seed, 300, noise=0.03)
    losses[280] *= 2.0
    poisoned, clean = FastSpike(), FastSpike()
    for i, loss in enumerate(losses):
        if i in where:
            for bad in (math.nan, math.inf, 0.0, -1.0):
                assert poisoned.update(signals(i, bad)) is None
        assert poisoned.update(signals(i, loss)) == clean.update(signals(i, loss))
    assert poisoned.state_dict() == clean.state_dict()


@pytest.mark.parametrize("factor", [1.3, 3.0])
def test_level_shift_is_learned_once(factor: float) -> None:
    """A lasting new level is flagged for ``relearn_after`` steps, then accepted, then normal."""
    losses = [3.0 * (1 + 0.002 * (-1) ** i) for i in range(100)] + [
        3.0 * factor * (1 + 0.002 * (-1) ** i) for i in range(150)
    ]
    alarms = feed(FastSpike(relearn_after=50), losses)
    assert [alarm.step for alarm in alarms] == list(range(101, 152))
    assert [alarm.kind for alarm in alarms] == ["fast_spike"] * 50 + ["level_shift"]
    assert alarms[-1].severity == "warning"
    assert "taken as the new level" in alarms[-1].message
    again = FastSpike()
    feed(again, losses)
    (spike,) = feed(again, [3.0 * factor * 1.3], first=251)
    assert spike.kind == "fast_spike" and spike.expected == pytest.approx(3.0 * factor, rel=0.01)


def test_divergence_is_never_accepted() -> None:
    """A loss that goes on climbing is no new level: it is flagged to the end."""
    losses = [3.0] * 100 + [3.0 * 1.01**i for i in range(1, 200)]
    alarms = feed(FastSpike(), losses)
    assert {alarm.kind for alarm in alarms} == {"fast_spike"}
    assert [alarm.step for alarm in alarms] == list(range(alarms[0].step, 300))


def test_going_back_without_restoring_forgets_the_abandoned_steps() -> None:
    """The windows hold nothing of the abandoned steps, and the detector judges again after a short while."""
    detector = FastSpike()
    feed(detector, [3.0] * 100)
    feed(detector, [9.0] * 90, first=101)
    assert feed(detector, [3.0] * 40, first=101) == []
    (alarm,) = feed(detector, [3.6], first=141)
    assert alarm.expected == pytest.approx(3.0)


def test_the_bar_follows_the_wanted_rate_and_the_tail() -> None:
    """Fewer wanted alarms and heavier tails make the bar higher; nobody has to name a sigma."""

    def bar(noise: Callable[[random.Random], float], alarms_per_10k: float) -> float:
        rng, detector = random.Random(0), FastSpike(alarms_per_10k=alarms_per_10k)
        feed(detector, [3.0 * math.exp(0.02 * noise(rng)) for _ in range(3000)])
        (alarm,) = feed(detector, [9.0], first=3001)
        return float(alarm.message.rsplit("+", 1)[1].rstrip("%"))

    def light(rng: random.Random) -> float:
        return rng.gauss(0.0, 1.0)

    def heavy(rng: random.Random) -> float:  # Laplace with quartiles like the Gaussian's
        return rng.expovariate(1.0) * rng.choice((-1, 1)) * 0.97

    assert bar(light, 0.01) > bar(light, 5.0)
    assert bar(heavy, 0.5) > 1.2 * bar(light, 0.5)
    rng, detector = random.Random(1), FastSpike()
    feed(detector, [3.0 * math.exp(0.02 * heavy(rng)) for _ in range(500)])
    assert detector._bar(1, gap=10) < detector._bar(1, gap=2)  # a thin log has fewer points in 10 000 steps


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_no_rate_is_refused(value: float) -> None:
    for make in (FastSpike, LevelShift):
        with pytest.raises(UserError, match="alarms_per_10k is"):
            make(alarms_per_10k=value)


@pytest.mark.parametrize("make", MAKERS)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 199))
@example(seed=0, cut=150)  # while a new level is about to be accepted
@settings(max_examples=10, deadline=None)
def test_state_round_trip(make: Callable[[], Detector], seed: int, cut: int) -> None:
    """Saved as JSON at any step and loaded, a detector answers as one that went straight on."""
    rng = random.Random(seed)
    stream = []
    for step, loss in enumerate(run_like(seed, 200)):
        bad = rng.random()
        loss = math.nan if bad < 0.03 else loss * (3.0 if bad < 0.08 or step > 120 else 1.0)
        norm = (
            math.inf
            if bad > 0.98 and step != 195
            else rng.lognormvariate(0.0, 0.3) * (30.0 if bad > 0.93 or step == 195 else 1.0)
        )
        stream.append(signals(step, loss, norm))
    straight, first, second = make(), make(), make()
    expected = [straight.update(one) for one in stream]
    got = [first.update(one) for one in stream[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.update(one) for one in stream[cut:]]
    assert repr(got) == repr(expected)  # NaN in an alarm is equal to itself only by name
    assert any(expected)


def test_nonfinite_names_the_reading() -> None:
    detector = NonFinite()
    assert detector.update(signals(1, 3.0, 1.5)) is None
    alarm = detector.update(signals(2, 3.0, math.inf))
    assert alarm is not None
    assert (alarm.kind, alarm.severity, alarm.signal) == ("nonfinite", "critical", "grad_norm")
    assert (alarm.value, alarm.expected) == (math.inf, 1.5)
    both = detector.update(signals(3, math.nan, math.nan))
    assert both is not None and both.signal == "loss" and both.message == "loss is nan and grad_norm is nan"


def test_grad_spike_is_a_note_with_a_high_bar() -> None:
    rng = random.Random(0)
    detector = GradSpike()
    norms = [rng.lognormvariate(0.0, 0.15) for _ in range(300)]
    assert [a for i, norm in enumerate(norms) if (a := detector.update(signals(i, 3.0, norm)))] == []
    assert detector.update(signals(300, 3.0, 1.9)) is None
    alarm = detector.update(signals(301, 3.0, 20.0))
    assert alarm is not None and (alarm.kind, alarm.severity) == ("grad_spike", "note")
    assert detector.update(signals(302, 3.0, 0.0)) is None  # a log without norms
    assert detector.update(signals(303, 3.0, math.nan)) is None


def test_protocol_and_cards() -> None:
    for make, card in zip(MAKERS, (NONFINITE_CARD, FAST_SPIKE_CARD, GRAD_SPIKE_CARD), strict=True):
        detector = make()
        assert isinstance(detector, Detector)
        assert (card.name, card.kind) == (detector.name, "detector")
