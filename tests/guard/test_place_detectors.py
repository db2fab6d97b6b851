"""Detectors that watch places in the model: the right place, in time, and never on a young run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import Detector, Expectant
from poise.guard.detectors.entropy_collapse import EntropyCollapse
from poise.guard.detectors.logit_growth import LogitGrowth
from poise.guard.detectors.moment_lag import MomentLag
from poise.guard.detectors.places import Events, Streaks, Tracks, others
from poise.guard.detectors.stale_moment import StaleMoment
from poise.guard.detectors.update_jump import UpdateJump
from poise.guard.detectors.weight_jump import WeightJump

LAYERS = tuple(f"block.{i}" for i in range(4))


def run(detector: Detector, rows: Sequence[Signals]) -> list[Alarm]:
    found = [detector.update(row) for row in rows]
    return [alarm for alarm in found if alarm is not None]


def at_places(
    reading: str, value: Callable[[str, int], float], steps: Sequence[int], lr: float = 1e-3
) -> list[Signals]:
    return [
        Signals(step, 3.0, 1.0, lr, 0, {f"{reading}@{layer}": value(layer, step) for layer in LAYERS}) for step in steps
    ]


# ---------------------------------------------------------------- logits


def young(layer: str, step: int, top: float, seed: int = 0) -> float:
    """Logits of a young run: from 0.1 up to ``top`` around step 100 at a pace of its own in each layer."""
    rng = random.Random(f"{layer} {step} {seed}")
    middle = 60 + 20 * LAYERS.index(layer)
    return (0.1 + top / (1 + math.exp(-(step - middle) / 12))) * math.exp(rng.gauss(0.0, 0.1))


@pytest.mark.parametrize("every", [1, 10, 25])
@pytest.mark.parametrize("factor", [1.1, 1.2, 1.3])
@pytest.mark.parametrize("phase", [1, 3, 6, 9])
def test_a_layer_whose_query_and_key_grow_is_found_within_15_steps(every: int, factor: float, phase: int) -> None:
    """W_Q and W_K times ``factor`` a step: the logit grows by its square. Measured every 10 steps: one or two looks."""
    onset = 250 + phase
    rows = at_places(
        "attn_logit_max",
        lambda layer, s: young(layer, s, 8.0) * (factor ** (2 * max(s - onset, 0)) if layer == "block.2" else 1.0),
        range(every, 320, every),
    )
    alarms = run(LogitGrowth(), rows)
    assert alarms and (alarms[0].kind, alarms[0].severity, alarms[0].place) == ("logit_growth", "critical", "block.2")
    assert onset < alarms[0].step <= onset + max(15, every)
    assert all(alarm.place == "block.2" for alarm in alarms)


def test_a_runaway_that_began_just_before_a_look_is_found_at_the_next() -> None:
    """Four scaled steps triple a logit of 1, too small to tell; ten more make it 50. All logits grow slowly besides."""

    def value(layer: str, step: int) -> float:
        return math.exp((step - 300) / 120) * (1.15 ** (2 * max(step - 296, 0)) if layer == "block.2" else 1.0)

    alarms = run(LogitGrowth(), at_places("attn_logit_max", value, range(10, 320, 10)))
    assert [(alarm.step, alarm.place) for alarm in alarms] == [(310, "block.2")]


@given(top=st.floats(2.0, 60.0), seed=st.integers(0, 10**6), every=st.sampled_from([1, 5, 10, 50]))
@settings(max_examples=40, deadline=None)
def test_a_young_run_is_not_a_runaway(top: float, seed: int, every: int) -> None:
    assert (
        run(LogitGrowth(), at_places("attn_logit_max", lambda p, s: young(p, s, top, seed), range(every, 600, every)))
        == []
    )


def test_slow_growth_past_a_hundred_is_told_and_a_high_plateau_is_not() -> None:
    climbing = at_places(
        "attn_logit_max", lambda p, s: 20 * math.exp(s / 1200) if p == "block.1" else 15.0, range(10, 3000, 10)
    )
    alarms = run(LogitGrowth(), climbing)
    assert alarms[0].place == "block.1" and 100 < alarms[0].value < 130
    assert len(alarms) <= 3
    noisy = at_places("attn_logit_max", lambda p, s: young(p, 900 + s, 400.0), range(10, 3000, 10))
    assert run(LogitGrowth(), noisy) == []  # a pre-trained model may have large logits and keep them


def test_bounded_logits_and_common_growth_are_left_alone() -> None:
    qk = at_places("attn_logit_max", lambda p, s: 4.0 - 0.5 * math.exp(-s / 40), range(10, 600, 10))
    assert run(LogitGrowth(), qk) == []
    together = at_places("attn_logit_max", lambda p, s: 6.0 if s < 300 else 24.0, range(10, 600, 10))
    assert run(LogitGrowth(), together) == []


def test_two_runaway_layers_are_both_named_and_doubling_is_told_again() -> None:
    def value(layer: str, step: int) -> float:
        pace = {"block.1": 1.3, "block.3": 1.2}.get(layer, 1.0)
        return 6.0 * pace ** (2 * min(max(step - 300, 0), 25))

    alarms = run(LogitGrowth(), at_places("attn_logit_max", value, range(10, 500, 10)))
    assert alarms[0].place == "block.1" and "block.3" in alarms[0].message
    assert [alarm.step for alarm in alarms] == [310, 320, 330]  # it has doubled each time; then it stays: no more


# ---------------------------------------------------------------- entropy


def test_entropy_collapse_names_the_layer_once() -> None:
    rng = random.Random(0)

    def value(layer: str, step: int) -> float:
        level = 0.7 if layer != "block.0" else 0.3
        return 0.02 if layer == "block.3" and step > 300 else level + rng.gauss(0.0, 0.05)

    (alarm,) = run(EntropyCollapse(), at_places("attn_entropy", value, range(10, 900, 10)))
    assert (alarm.kind, alarm.severity, alarm.place, alarm.step) == ("entropy_collapse", "warning", "block.3", 310)
    assert alarm.expected == pytest.approx(0.7, abs=0.05)


def test_narrow_attention_that_always_was_is_no_collapse() -> None:
    assert run(EntropyCollapse(), at_places("attn_entropy", lambda p, s: 0.12, range(10, 900, 10))) == []
    falling = at_places("attn_entropy", lambda p, s: max(0.2, 1 - s / 300), range(10, 900, 10))
    assert run(EntropyCollapse(), falling) == []


# ---------------------------------------------------------------- second moments


def adam(
    beta2: float, fault: Callable[[int, float], float], steps: int = 140, seed: int = 0, burst: float = 1.0
) -> list[Signals]:
    """Transcribed Adam at each layer: v_t = beta2 v + (1 - beta2) g^2, ratio |g| / sqrt(v_t, corrected).

    ``fault`` may change v of block.2 at a step; ``burst`` multiplies its gradient from step 100 on.
    """
    rng = random.Random(seed)
    v = dict.fromkeys(LAYERS, 0.0)
    rows = []
    for step in range(1, steps + 1):
        shared = math.exp(rng.gauss(0.0, 0.3))
        extra: dict[str, float] = {}
        for layer in LAYERS:
            g = shared * math.exp(rng.gauss(0.0, 0.1))
            if layer == "block.2":
                v[layer] = fault(step, v[layer])
                g *= burst if step >= 100 else 1.0
            v[layer] = beta2 * v[layer] + (1 - beta2) * g * g
            extra[f"grad_norm@{layer}"] = g
            extra[f"adam_ratio@{layer}"] = g / math.sqrt(v[layer] / (1 - beta2**step))
        rows.append(Signals(step, 3.0, 1.0, 1e-3, 0, extra))
    return rows


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1e-4, 0.0])
def test_lost_moments_are_found_in_two_steps_at_their_place(beta2: float, scale: float) -> None:
    alarms = run(StaleMoment(), adam(beta2, lambda step, v: v * scale if step == 100 else v))
    assert (alarms[0].kind, alarms[0].severity, alarms[0].place) == ("stale_moment", "critical", "block.2")
    assert alarms[0].step <= 101 and {alarm.place for alarm in alarms} == {"block.2"}
    assert len(alarms) >= 2  # every bad step


def test_moments_halved_every_step_stay_an_alarm() -> None:
    steps = [a.step for a in run(StaleMoment(), adam(0.95, lambda step, v: v / 2 if step >= 100 else v))]
    assert steps[0] <= 108 and len(steps) >= 20


@pytest.mark.parametrize("burst", [3.0, 14.0, 1000.0])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_growing_gradient_is_not_a_stale_moment(burst: float, beta2: float) -> None:
    """The ratio of block.2 jumps because its gradient does: v is as it should be."""
    assert run(StaleMoment(), adam(beta2, lambda step, v: v, burst=burst)) == []


@given(seed=st.integers(0, 10**6), beta2=st.sampled_from([0.9, 0.95, 0.99, 0.999]))
@settings(max_examples=30, deadline=None)
def test_healthy_adam_has_no_stale_moment(seed: int, beta2: float) -> None:
    assert run(StaleMoment(), adam(beta2, lambda step, v: v, steps=200, seed=seed)) == []


def test_without_gradient_norms_only_a_tenfold_rise_at_one_place_counts() -> None:
    def bare(rows: list[Signals]) -> list[Signals]:
        kept = [{k: x for k, x in row.extra.items() if k.startswith("adam_ratio")} for row in rows]
        return [Signals(row.step, 3.0, 1.0, 1e-3, 0, extra) for row, extra in zip(rows, kept, strict=True)]

    alarms = run(StaleMoment(), bare(adam(0.999, lambda step, v: v * 1e-6 if step == 100 else v)))
    assert alarms[0].place == "block.2" and alarms[0].step == 100
    assert run(StaleMoment(), bare(adam(0.95, lambda step, v: v * 1e-6 if step == 100 else v))) == []


def test_frozen_moments_are_told_once_after_eight_steps() -> None:
    rows = at_places("v_stale", lambda p, s: 0.95 if p == "block.1" and s > 50 else 0.03, range(1, 120))
    (alarm,) = run(StaleMoment(), rows)
    assert (alarm.place, alarm.signal, alarm.step) == ("block.1", "v_stale", 58)


def test_skipped_steps_do_not_count_as_frozen() -> None:
    rows = [Signals(s, 3.0, 1.0, 1e-3, 0, {"v_stale@block.1": 1.0, "update_rms@block.1": 0.0}) for s in range(1, 60)]
    assert run(StaleMoment(), rows) == []


# ---------------------------------------------------------------- updates


def update_rows(times: Callable[[str, int], float], steps: int = 200, warm: int = 50) -> list[Signals]:
    """Updates of 0.3 lr of the step before, with 5 % noise, multiplied by ``times``; the whole is their mean."""
    rng = random.Random(4)
    rows = []
    for step in range(2, steps + 1):
        lr, made_with = 1e-3 * min(1, step / warm), 1e-3 * min(1, (step - 1) / warm)
        extra = {f"update_rms@{p}": 0.3 * made_with * math.exp(rng.gauss(0.0, 0.05)) * times(p, step) for p in LAYERS}
        extra["update_rms"] = sum(extra.values()) / len(LAYERS)
        rows.append(Signals(step, 3.0, 1.0, lr, 0, extra))
    return rows


def test_a_doubled_update_is_told_for_the_model_or_for_its_place() -> None:
    (alarm,) = run(UpdateJump(), update_rows(lambda p, s: 2.1 if s >= 120 else 1.0))
    assert (alarm.kind, alarm.severity, alarm.place, alarm.step) == ("update_jump", "warning", "", 121)
    assert alarm.expected == pytest.approx(3e-4, rel=0.1)
    (alarm,) = run(UpdateJump(), update_rows(lambda p, s: 3.5 if p == "block.1" and s >= 120 else 1.0))
    assert (alarm.place, alarm.step) == ("block.1", 121)


def test_an_update_belongs_to_the_rate_of_the_step_before() -> None:
    """The rate jumps at step 121; the update read there was made with the old one, and it is judged by that."""
    rows = update_rows(lambda p, s: 1.0)
    for i, row in enumerate(rows):
        if row.step >= 121:
            times = 1.0 if row.step == 121 else 10.0
            extra = {name: value * times for name, value in row.extra.items()}
            rows[i] = Signals(row.step, 3.0, 1.0, row.lr * 10, 0, extra)
    assert run(UpdateJump(), rows) == []
    # The rate falls to a tenth at step 161, the update made before it does not: 10 times what the new rate explains.
    falls = [
        Signals(r.step, 3.0, 1.0, r.lr * (0.1 if r.step >= 161 else 1), 0, r.extra)
        for r in update_rows(lambda p, s: 1.0 if s <= 161 else 0.1)
    ]
    assert run(UpdateJump(), falls) == []


def test_rate_changes_and_skipped_steps_are_no_update_jump() -> None:
    assert run(UpdateJump(), update_rows(lambda p, s: 0.0 if s % 40 == 0 else 1.0)) == []
    jumped = []
    for row in update_rows(lambda p, s: 10.0 if s > 120 else 1.0):
        jumped.append(Signals(row.step, 3.0, 1.0, row.lr * (10 if row.step >= 120 else 1), 0, row.extra))
    assert run(UpdateJump(), jumped) == []


# ---------------------------------------------------------------- weights


def weight_rows(
    rms: Callable[[str, int], float], top: Callable[[str, int], float], steps: Sequence[int]
) -> list[Signals]:
    rows = []
    for step in range(1, steps[-1] + 1):
        extra = {f"update_rms@{p}": 3e-5 for p in LAYERS}
        if step in steps:
            extra |= {f"weight_rms@{p}": rms(p, step) for p in LAYERS}
            extra |= {f"weight_max@{p}": top(p, step) for p in LAYERS}
        rows.append(Signals(step, 3.0, 1.0, 1e-3 * min(1, step / 40), 0, extra))
    return rows


def drift(layer: str, step: int) -> float:
    return 0.02 + 0.01 * math.sqrt(step / 200)


def high(layer: str, step: int) -> float:
    return 0.1 + 0.001 * step


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.1, 1.5, 10.0])
@pytest.mark.parametrize("every", [1, 10])
def test_a_scaled_layer_is_told_once_at_the_next_measurement(scale: float, every: int) -> None:
    rows = weight_rows(
        lambda p, s: drift(p, s) * (scale if p == "block.2" and s >= 155 else 1), high, range(every, 301, every)
    )
    (alarm,) = run(WeightJump(), rows)
    assert (alarm.kind, alarm.severity, alarm.place) == ("weight_jump", "critical", "block.2")
    assert alarm.step == (155 if every == 1 else 160) and alarm.signal == "weight_rms"


@pytest.mark.parametrize("power", [2, 8, 60, 127])
def test_a_flipped_exponent_bit_is_told(power: int) -> None:
    rows = weight_rows(
        drift, lambda p, s: high(p, s) * (2.0**power if p == "block.0" and s >= 155 else 1), range(10, 301, 10)
    )
    (alarm,) = run(WeightJump(), rows)
    assert (alarm.place, alarm.signal, alarm.step) == ("block.0", "weight_max", 160)


def test_weights_that_stop_being_finite_are_told_once() -> None:
    rows = weight_rows(drift, lambda p, s: math.nan if p == "block.1" and s >= 155 else high(p, s), range(10, 301, 10))
    (alarm,) = run(WeightJump(), rows)
    assert (alarm.place, alarm.step) == ("block.1", 160) and math.isnan(alarm.value)


def test_a_jump_is_not_learned_so_a_second_one_is_told() -> None:
    def value(layer: str, step: int) -> float:
        return drift(layer, step) * (1.5 if layer == "block.2" and 155 <= step < 195 else 1)

    assert [alarm.step for alarm in run(WeightJump(), weight_rows(value, high, range(10, 301, 10)))] == [160, 200]


def test_young_weights_and_a_jump_of_the_rate_are_training() -> None:
    """Weights start at 0.02 and move by up to 60 % between measurements while the rate warms up, or with it."""
    growing = weight_rows(lambda p, s: 0.02 + 0.06 * (1 - math.exp(-s / 60)), high, range(10, 301, 10))
    growing = [Signals(r.step, 3.0, 1.0, r.lr, 0, {**r.extra, "update_rms@block.0": 3e-4}) for r in growing]
    assert [a.message for a in run(WeightJump(), growing) if a.place == "block.0"] == []
    travel, weights, rows = 0.0, {}, []
    for step in range(1, 301):
        weights[step] = 0.02 * math.exp(travel * 5)
        travel += 1e-3 if step < 150 else 1e-2
    for row in weight_rows(lambda p, s: weights[s], high, range(10, 301, 10)):
        rows.append(Signals(row.step, 3.0, 1.0, 1e-3 if row.step < 150 else 1e-2, 0, row.extra))
    assert run(WeightJump(), rows) == []


def test_before_enough_is_known_the_updates_bound_the_weights() -> None:
    """The second measurement already: 20 steps of 3e-5 do not move a layer by half of itself."""
    rows = weight_rows(lambda p, s: drift(p, s) * (1.5 if p == "block.3" and s >= 25 else 1), high, range(20, 61, 20))
    (alarm,) = run(WeightJump(), rows)
    assert (alarm.place, alarm.step) == ("block.3", 40)


def test_a_change_on_purpose_is_expected() -> None:
    rows = weight_rows(lambda p, s: drift(p, s) * (0.5 if p == "block.2" and s >= 155 else 1), high, range(10, 301, 10))
    for places in ([], ["block.2"]):
        detector = WeightJump()
        assert run(detector, rows[:155]) == []
        detector.expect_change(places)
        assert run(detector, rows[155:]) == []
    detector = WeightJump()
    run(detector, rows[:155])
    detector.expect_change(["block.0"])
    assert len(run(detector, rows[155:])) == 1


@pytest.mark.parametrize("places", [(), ("block.2",)])
def test_reset_moments_are_expected(places: tuple[str, ...]) -> None:
    """The moments of block.2 are zeroed at step 100 by somebody who says so: neither ratio nor updates are news."""
    ratios = adam(0.95, lambda step, v: 0.0 if step == 100 else v)
    updates = update_rows(lambda p, s: 3.5 if p == "block.2" and 101 <= s < 110 else 1.0)
    whole = [Signals(s, 3.0, 1.0, 1e-3, 0, {"adam_ratio": 3.0 if 100 <= s < 104 else 1.0}) for s in range(1, 140)]
    told: list[tuple[type[StaleMoment | UpdateJump | MomentLag], list[Signals]]] = [
        (StaleMoment, ratios),
        (UpdateJump, updates),
        (MomentLag, whole),
    ]
    for maker, rows in told:
        before, after = [r for r in rows if r.step < 100], [r for r in rows if r.step >= 100]
        unaware, aware = maker(), maker()
        for detector, says in ((unaware, False), (aware, True)):
            assert isinstance(detector, Expectant) and isinstance(detector, Detector)
            assert run(detector, before) == []
            if says:
                detector.expect_change(places)
        assert run(unaware, after) != [] and run(aware, after) == []


# ---------------------------------------------------------------- helpers


def test_tracks_relearn_a_settled_level_and_not_a_moving_one() -> None:
    def fed(value: Callable[[int], float]) -> bool:
        tracks = Tracks(window=32, at_least=16, min_values=8, relearn_after=40)
        for step in range(1, 40):
            tracks.learn("", step, 0.01 * (step % 3))
        return any(tracks.hold("", step, value(step)) for step in range(40, 120))

    assert fed(lambda step: 3.0)
    assert not fed(lambda step: 3.0 + 0.1 * step)


def test_a_skewed_place_is_judged_by_its_upper_tail() -> None:
    tracks = Tracks(window=64, at_least=32, min_values=20, refresh=1)
    for step in range(60):
        tracks.learn("head", step, 1.0 if step % 10 == 0 else 0.0)
        tracks.learn("block.0", step, 0.0)
    head, block = tracks.level("head"), tracks.level("block.0")
    assert head is not None and block is not None
    assert head.sigma == pytest.approx(1 / 1.645, rel=0.01) and block.sigma < 1e-3


def test_held_values_have_to_come_in_a_row() -> None:
    tracks = Tracks(window=32, at_least=16, min_values=8, relearn_after=40)
    for step in range(1, 200):
        if step > 20 and step % 3:
            assert not tracks.hold("", step, 3.0)
        else:
            tracks.learn("", step, 0.0)


def test_a_restored_memory_still_goes_back() -> None:
    tracks, twin = (Tracks(window=32, at_least=16, min_values=3, refresh=1) for _ in range(2))
    for step in range(1, 11):
        tracks.learn("", step, float(step))
    twin.load_state_dict(tracks.state_dict())
    twin.forget_from(6)
    assert [step for step, _ in twin.points("")] == [1, 2, 3, 4, 5]


def test_tracks_windows_count_steps() -> None:
    tracks = Tracks(window=30, at_least=4, min_values=3, refresh=1)
    for step in range(0, 100, 10):
        tracks.learn("", step, float(step))
    assert [step for step, _ in tracks.points("")] == [60, 70, 80, 90]  # at_least, where steps are few
    tracks.forget_from(80)
    level = tracks.level("")
    assert [step for step, _ in tracks.points("")] == [60, 70] and level is None


def test_events_and_streaks() -> None:
    events = Events(quiet_after=5)
    assert [events.begins("x", step) for step in (1, 2, 6, 12)] == [True, False, False, True]
    streaks = Streaks()
    assert [streaks.count("x", s, s != 3) for s in range(1, 6)] == [1, 2, 0, 1, 2]
    streaks.forget_from(5)
    assert streaks.count("x", 5, True) == 2
    assert others(["a", "b", "c", "d", "e"]) == "; also at a, b, c, d and 1 more"
