"""Detectors on all signals but the loss: what all have in common, and those that watch the run as a whole."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.registry import cards_of
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import Detector
from poise.guard.detectors.entropy_collapse import EntropyCollapse
from poise.guard.detectors.grad_runup import GradRunup
from poise.guard.detectors.logit_growth import LogitGrowth
from poise.guard.detectors.loss_spread import LossSpread
from poise.guard.detectors.lr_jump import LrJump
from poise.guard.detectors.moment_lag import MomentLag
from poise.guard.detectors.places import tail_sigmas
from poise.guard.detectors.repeated_data import RepeatedData
from poise.guard.detectors.stale_moment import StaleMoment
from poise.guard.detectors.underflow import Underflow
from poise.guard.detectors.update_jump import UpdateJump
from poise.guard.detectors.weight_jump import WeightJump

MAKERS: list[Callable[[], Detector]] = [
    GradRunup,
    UpdateJump,
    MomentLag,
    StaleMoment,
    LogitGrowth,
    EntropyCollapse,
    WeightJump,
    Underflow,
    RepeatedData,
    LrJump,
    LossSpread,
]

BLOOM = (0.24, 0.95, 2.4, 16.0, 145.0, 960.0)
"""Gradient norms before BLOOM-176B's first loss spike; the loss jumped at the last."""

PLACES = ("embed", "block.0", "block.1", "block.2", "head")


def heavy(rng: random.Random, scale: float, tail: float = 0.01) -> float:
    """Log-noise: Gaussian, and once in ``1 / tail`` an outlier of 2 to 14 times."""
    return rng.gauss(0.0, scale) + (rng.uniform(math.log(2), math.log(14)) if rng.random() < tail else 0.0)


def lr_at(step: int, steps: int, warm: int, peak: float = 1e-3) -> float:
    """Linear warm-up from 1/warm, then a cosine to a tenth."""
    return peak * min(1.0, step / warm) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@cache
def healthy(seed: int, steps: int = 400, every: int = 10, logged: int = 1) -> list[Signals]:
    """A made-up healthy run with every reading: warm-up, growing logits, heavy-tailed gradients, smooth weights."""
    rng = random.Random(seed)
    warm, qk_norm, settle = rng.choice([1, 30, 100]), rng.random() < 0.3, rng.uniform(60, 150)
    tops = {f"block.{i}": rng.uniform(3, 30) for i in range(3)}
    v = dict.fromkeys(PLACES, 1.0)
    travel, rows = 0.0, []
    update = dict.fromkeys(PLACES, 1.0)
    for step in range(1, steps + 1):
        lr = lr_at(step, steps, warm)
        batch = heavy(rng, 0.3)
        norm = (1 + 3 * math.exp(-step / 30)) * math.exp(batch)
        extra: dict[str, float] = {
            "fingerprint": float(rng.getrandbits(53)),
            "loss_spread": 0.1 * math.exp(heavy(rng, 0.7)),
        }
        extra["loss_scale"] = 2.0 ** (16 + (step // 150) % 2)
        ratios = {}
        for place in PLACES:
            g = norm * math.exp(rng.gauss(0.0, 0.15 if place.startswith("block") else 0.4))
            v[place] = 0.95 * v[place] + 0.05 * min(g, 1.0) ** 2
            extra[f"grad_norm@{place}"] = g
            ratios[place] = min(g, 1.0) / math.sqrt(v[place]) * math.exp(rng.gauss(0.0, 0.05))
            extra[f"adam_ratio@{place}"] = ratios[place]
            extra[f"v_stale@{place}"] = 0.02 + 0.02 * rng.random()
            update[place] = 0.9 * update[place] + 0.1 * ratios[place] * math.exp(rng.gauss(0.0, 0.2))
            if step > 1:
                extra[f"update_rms@{place}"] = lr_at(step - 1, steps, warm) * (0.1 + 0.2 * update[place])
        extra["adam_ratio"] = sum(ratios.values()) / len(ratios)
        if step > 1:
            extra["update_rms"] = sum(extra[f"update_rms@{place}"] for place in PLACES) / len(PLACES)
        if step % every == 0:
            for place in PLACES:
                extra[f"weight_rms@{place}"] = 0.02 + 2.0 * math.sqrt(travel) * 0.05 + 1e-5 * rng.random()
                extra[f"weight_max@{place}"] = 0.09 + travel * 0.8 + 1e-3 * rng.random()
            for place, top in tops.items():
                grown = 4.0 if qk_norm else 0.1 + top / (1 + math.exp(-(step - settle) / 15))
                extra[f"attn_logit_max@{place}"] = grown * math.exp(rng.gauss(0.0, 0.1))
                extra[f"attn_entropy@{place}"] = min(1.0, max(0.25, 1 - grown / 50 + rng.gauss(0.0, 0.04)))
        travel += lr
        if step % logged == 0:
            rows.append(Signals(step, 3.0, norm, lr, step, extra))
    return rows


def changed(row: Signals, *, grad_norm: float | None = None, lr: float | None = None, **extra: float) -> Signals:
    """Return ``row`` with some readings replaced; ``__`` in a name stands for ``@``, and ``_dot_`` for ``.``."""
    more = {name.replace("__", "@").replace("_dot_", "."): value for name, value in extra.items()}
    return Signals(
        row.step,
        row.loss,
        row.grad_norm if grad_norm is None else grad_norm,
        row.lr if lr is None else lr,
        row.tokens,
        {**row.extra, **more},
    )


def run(detector: Detector, rows: Sequence[Signals]) -> list[Alarm]:
    found = [detector.update(row) for row in rows]
    return [alarm for alarm in found if alarm is not None]


def plain(values: Mapping[int, float], reading: str, lr: float = 1e-3, norm: float = 1.0) -> list[Signals]:
    """Rows that hold one reading of ``extra`` only."""
    return [Signals(step, 3.0, norm, lr, step, {reading: value}) for step, value in values.items()]


def norms(values: Sequence[float], first: int = 1, every: int = 1) -> list[Signals]:
    return [Signals(first + i * every, 3.0, value, 1e-3, 0) for i, value in enumerate(values)]


def quiet(n: int, level: float = 0.24, noise: float = 0.08, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level * math.exp(rng.gauss(0.0, noise)) for _ in range(n)]


def troubled(seed: int) -> list[Signals]:
    """A run in which every detector has something to say after step 200."""
    rows = [*healthy(seed, steps=260)]
    lost = {"adam_ratio__block_dot_1": 9.0, "adam_ratio": 4.4, "update_rms": 9e-3, "loss_spread": 9.0}
    weights = {"weight_rms__head": 0.9, "attn_logit_max__block_dot_2": 900.0, "attn_entropy__block_dot_2": 0.01}
    for i in range(200, 240):
        rows[i] = changed(rows[i], grad_norm=BLOOM[min((i - 200) // 2, 5)] * 4, lr=9e-3, fingerprint=7.0, **lost)
        if "weight_rms@head" in rows[i].extra:
            rows[i] = changed(rows[i], **weights)
        if i >= 220:
            rows[i] = changed(rows[i], loss_scale=2.0 ** (230 - i))
    return rows


@pytest.mark.parametrize("maker", MAKERS)
def test_healthy_runs_raise_nothing_that_moves_the_policy(maker: Callable[[], Detector]) -> None:
    """50 made-up runs of 400 steps: not one critical alarm; at most one warning of a kind in these 20 000 steps."""
    alarms = [alarm for seed in range(50) for alarm in run(maker(), healthy(seed))]
    assert [alarm for alarm in alarms if alarm.severity == "critical"] == []
    assert len([alarm for alarm in alarms if alarm.severity == "warning"]) <= 1, [alarm.message for alarm in alarms]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("logged", [5, 10])
def test_thinned_logs_of_healthy_runs_raise_nothing(maker: Callable[[], Detector], logged: int) -> None:
    for seed in range(6):
        rows = [row for row in healthy(seed) if row.step % logged == 0]
        assert [a.message for a in run(maker(), rows) if a.severity != "note"] == []


@pytest.mark.parametrize("maker", MAKERS)
def test_every_detector_speaks_on_a_troubled_run_and_each_event_once(maker: Callable[[], Detector]) -> None:
    alarms = run(maker(), troubled(3))
    assert alarms and all(alarm.step > 200 for alarm in alarms)
    for alarm in alarms:
        assert alarm.kind == alarm.detector == maker().name
        assert alarm.message and "\n" not in alarm.message
        json.dumps(alarm.message)
    if maker not in (RepeatedData, StaleMoment):  # these speak at every bad step
        assert len(alarms) <= 4, [alarm.message for alarm in alarms]


@pytest.mark.parametrize("maker", MAKERS)
def test_resumes_exactly_at_every_step(maker: Callable[[], Detector]) -> None:
    """A twin restored from JSON before each step says the same and remembers the same: by induction, for ever."""
    straight = maker()
    for row in troubled(5)[:245]:
        twin = maker()
        twin.load_state_dict(json.loads(json.dumps(straight.state_dict(), allow_nan=False)))
        assert twin.update(row) == straight.update(row)
        assert twin.state_dict() == straight.state_dict()


@pytest.mark.parametrize("maker", MAKERS)
def test_nan_never_gets_into_the_memory(maker: Callable[[], Detector]) -> None:
    """Every reading NaN or infinite for some steps: no exception, and what follows is judged as before."""
    rows = troubled(7)
    poisoned, clean = maker(), maker()
    run(clean, rows[:100] + rows[120:200])
    for i, row in enumerate(rows[:200]):
        if 100 <= i < 120:
            bad = math.nan if i % 2 else math.inf
            # Weights that were finite and are not are a finding, which is tested by itself.
            names = [name for name in row.extra if not name.startswith("weight")]
            row = Signals(row.step, bad, bad, bad, row.tokens, dict.fromkeys(names, bad))
        poisoned.update(row)
    json.dumps(poisoned.state_dict(), allow_nan=False)
    tail = rows[200:]
    assert [(a.step, a.kind) for a in run(poisoned, tail)][:1] == [(a.step, a.kind) for a in run(clean, tail)][:1]


@pytest.mark.parametrize("maker", MAKERS)
def test_goes_back_with_the_step_number(maker: Callable[[], Detector]) -> None:
    """After a rollback the troubled stretch is forgotten: the same trouble is told again, a healthy way is not."""
    rows = troubled(3)
    detector = maker()
    first = run(detector, rows)
    assert [alarm for alarm in run(detector, healthy(3, steps=260)[150:]) if alarm.severity != "note"] == []
    again = run(detector, rows[150:])
    assert again and again[0].kind == first[0].kind


@pytest.mark.parametrize("maker", MAKERS)
def test_absent_readings_are_silence(maker: Callable[[], Detector]) -> None:
    """A log of losses alone raises nothing, not even where the norm and the rate are written as 0."""
    assert run(maker(), [Signals(step, 3.0, 0.0, 0.0, 0) for step in range(1, 300)]) == []
    assert run(maker(), [Signals(step, math.nan, math.nan, math.nan, 0) for step in range(1, 300)]) == []


def test_cards_say_what_they_are() -> None:
    names = [maker().name for maker in MAKERS]
    cards = cards_of(f"poise.guard.detectors.{name}" for name in names)
    assert [card.name for card in cards] == names
    assert all(card.kind == "detector" and card.off and card.cost and card.formula for card in cards)
    for name in names:
        assert "Source:" in (importlib.import_module(f"poise.guard.detectors.{name}").__doc__ or "")


def test_tail_sigmas_is_the_laplace_tail() -> None:
    """The stated share of Laplace noise lies above the bar, in robust standard deviations."""
    rng = random.Random(0)
    draws = [rng.expovariate(1.0) * rng.choice((-1, 1)) for _ in range(200_000)]
    bar = tail_sigmas(20.0) * 1.4826 * math.log(2)
    assert 1e4 * sum(x > bar for x in draws) / len(draws) == pytest.approx(20.0, rel=0.2)
    assert tail_sigmas(0.5) < tail_sigmas(0.05) < tail_sigmas(0.05, chances=30)


# ---------------------------------------------------------------- gradient run-up


def test_bloom_is_seen_three_steps_before_its_loss_jumps() -> None:
    rows = norms([*quiet(40), *BLOOM])
    (alarm,) = run(GradRunup(), rows)
    assert (alarm.kind, alarm.severity, rows[-1].step - alarm.step) == ("grad_runup", "warning", 3)
    assert alarm.value == 2.4 and alarm.expected == pytest.approx(0.24, rel=0.1)


@given(height=st.floats(1.0, 1000.0), gap=st.integers(2, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_lone_outliers_of_any_height_are_no_run_up(height: float, gap: int, seed: int) -> None:
    values = quiet(200, noise=0.2, seed=seed)
    for i in range(50, 200, gap):
        values[i] *= height
    assert run(GradRunup(), norms(values)) == []


def test_slow_run_up_needs_more_steps_and_is_told_once() -> None:
    climb = [0.24 * 1.6**i for i in range(1, 10)]
    rows = norms([*quiet(60), *climb, *([climb[-1]] * 20)])
    (alarm,) = run(GradRunup(), rows)
    assert alarm.step == 60 + 3  # 1.6^3 = 4.1 times, three values
    assert run(GradRunup(), norms([*quiet(60), *[0.24 * 1.3**i for i in range(1, 4)], *quiet(60, seed=1)])) == []


def test_two_events_are_two_alarms_and_the_first_is_not_learned() -> None:
    rows = norms([*quiet(40), *BLOOM, *quiet(80, seed=1), *BLOOM])
    assert [alarm.step for alarm in run(GradRunup(), rows)] == [43, 129]
    assert [alarm.expected for alarm in run(GradRunup(), rows)] == pytest.approx([0.24, 0.24], rel=0.1)


# ---------------------------------------------------------------- moment lag


def test_moment_lag_wants_two_steps_running() -> None:
    ratios = [1.0 + 0.1 * math.sin(step) for step in range(100)]
    lone = ratios.copy()
    lone[60] = lone[70] = 4.4
    assert run(MomentLag(), plain(dict(enumerate(lone, 1)), "adam_ratio")) == []
    ratios[60:63] = [3.0, 3.1, 3.0]
    (alarm,) = run(MomentLag(), plain(dict(enumerate(ratios, 1)), "adam_ratio"))
    assert (alarm.kind, alarm.severity, alarm.step, alarm.value) == ("moment_lag", "warning", 62, 3.1)


@pytest.mark.parametrize("growth", [1.3, 1.6, 2.0])
def test_moment_lag_sees_a_growing_gradient_through_adam(growth: float) -> None:
    """Transcribed Adam (beta2 0.95): the gradient grows by 1.3 to 2 a step and v cannot follow."""
    rng = random.Random(1)
    v, correction, ratios = 0.0, 1.0, {}
    for step in range(1, 160):
        g = math.exp(rng.gauss(0.0, 0.2)) * (growth ** (step - 120) if step > 120 else 1.0)
        v, correction = 0.95 * v + 0.05 * g * g, correction * 0.95
        ratios[step] = math.sqrt(g * g / (v / (1 - correction)))
    alarms = run(MomentLag(), plain(ratios, "adam_ratio"))
    assert alarms and 121 < alarms[0].step <= 128


def test_moment_lag_learns_first() -> None:
    """Ratios fall from 6 to 1 in the first steps: that is the start."""
    ratios = {step: 1 + 5 * math.exp(-step / 10) for step in range(1, 200)}
    assert run(MomentLag(), plain(ratios, "adam_ratio")) == []


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize("warm", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("every", [1, 10])
def test_warm_up_and_decay_are_no_jump(warm: int, every: int) -> None:
    rows = [Signals(s, 3.0, 1.0, lr_at(s, 600, warm), 0) for s in range(every, 601, every)]
    assert run(LrJump(), rows) == []


@pytest.mark.parametrize("at", [10, 50, 250])
@pytest.mark.parametrize("times", [2.0, 10.0])
def test_a_jump_is_told_once_with_the_rate_it_should_have_been(at: int, times: float) -> None:
    course = [lr_at(s, 400, 30) for s in range(1, 401)]
    rows = [Signals(s, 3.0, 1.0, lr * (times if s >= at else 1), 0) for s, lr in enumerate(course, 1)]
    (alarm,) = run(LrJump(), rows)
    restart = times * course[at - 1] <= max(course[: at - 1])
    assert (alarm.severity, "restart" in alarm.message) == (("note", True) if restart else ("warning", False))
    assert (alarm.kind, alarm.step, alarm.value) == ("lr_jump", at, pytest.approx(times * course[at - 1]))
    assert alarm.expected == pytest.approx(course[at - 1], rel=0.02)


def test_a_short_dip_is_no_jump_and_a_repeated_jump_is_another() -> None:
    dip = [1e-3] * 50 + [1e-4] + [1e-3] * 50
    assert run(LrJump(), [Signals(s, 3.0, 1.0, lr, 0) for s, lr in enumerate(dip, 1)]) == []
    twice = [1e-3] * 50 + [1e-2] * 3 + [1e-3] * 50 + [1e-2] * 3
    steps = [alarm.step for alarm in run(LrJump(), [Signals(s, 3.0, 1.0, lr, 0) for s, lr in enumerate(twice, 1)])]
    assert steps == [51, 104]


def test_a_sudden_zero_is_a_note_and_a_decay_to_zero_is_nothing() -> None:
    (note,) = run(LrJump(), [Signals(s, 3.0, 1.0, 1e-3 if s < 30 else 0.0, 0) for s in range(1, 60)])
    assert (note.severity, note.step) == ("note", 30)
    assert run(LrJump(), [Signals(s, 3.0, 1.0, 1e-3 * max(0, 1 - s / 50), 0) for s in range(1, 60)]) == []


# ---------------------------------------------------------------- data


def marks(values: Sequence[int], first: int = 1) -> list[Signals]:
    return plain({first + i: float(value) for i, value in enumerate(values)}, "fingerprint")


def test_a_step_taken_again_goes_on_with_the_data() -> None:
    """The loop leaves a repeated batch out and takes the same step with the next one: still repeated, still told."""
    detector = RepeatedData()
    shown = [(step, step) for step in range(1, 51)] + [(51, 50)] * 6 + [(51, 60), (52, 61)]
    told = [
        detector.update(Signals(step, 3.0, 1.0, 1e-3, 0, {"fingerprint": float(mark)})) is not None
        for step, mark in shown
    ]
    assert told == [False] * 50 + [True] * 6 + [False] * 2


def test_the_same_batch_again_is_critical_at_every_step() -> None:
    alarms = run(RepeatedData(), marks([*range(1, 51), *([50] * 5), *range(60, 70)]))
    assert [(a.step, a.severity) for a in alarms] == [(step, "critical") for step in range(51, 56)]


@pytest.mark.parametrize("period", [2, 7, 64])
def test_a_loop_of_a_few_batches_is_critical_from_its_second_repeat(period: int) -> None:
    data = list(range(100)) + [100 - period + i % period for i in range(20)]
    alarms = run(RepeatedData(), marks(data))
    assert [a.severity for a in alarms] == ["note"] + ["critical"] * 19
    assert [a.step for a in alarms] == list(range(101, 121))


def test_an_epoch_and_a_chance_repeat_are_notes() -> None:
    epoch = run(RepeatedData(), marks([*range(300), *range(300)]))
    assert [(a.step, a.severity) for a in epoch] == [(301, "note")]
    lone = run(RepeatedData(), marks([*range(100), 70, *range(200, 300)]))
    assert [(a.step, a.severity) for a in lone] == [(101, "note")]
    assert run(RepeatedData(window=100), marks([*range(300), *range(300)])) == []


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_tiny_data_set_is_told_once_and_stops_nothing(size: int) -> None:
    """Somebody overfits ``size`` batches on purpose: all that the run has ever seen."""
    alarms = run(RepeatedData(), marks([i % size for i in range(200)]))
    assert [a.severity for a in alarms if a.severity != "note"] == ["warning"]


def test_data_shown_again_after_a_rollback_are_new() -> None:
    detector = RepeatedData()
    assert run(detector, marks(list(range(1, 100)))) == []
    assert run(detector, marks(list(range(50, 100)), first=50)) == []


# ---------------------------------------------------------------- underflow


def scales(values: Sequence[float]) -> list[Signals]:
    return plain(dict(enumerate(values, 1)), "loss_scale")


def test_a_grad_scaler_going_about_its_business_raises_nothing() -> None:
    """Descent from 2^32 at the start; then a doubling every 200 steps, undone by an overflow soon after."""
    rng = random.Random(0)
    values: list[float] = []
    scale, good = 2.0**32, 0
    for _ in range(4000):
        values.append(scale)
        overflow = scale > 2**17 or (scale > 2**16 and rng.random() < 0.3)
        scale, good = (scale / 2, 0) if overflow else (scale, good + 1)
        if good == 200:
            scale, good = scale * 2, 0
    assert run(Underflow(), scales(values)) == []


def test_four_halvings_within_100_steps_are_a_sign_though_a_doubling_came_between() -> None:
    """From 2^17: up once, then down five times in 60 steps, to 1/8 of what it held: only the count can tell."""
    values = [2.0**17] * 150 + [2.0**18] * 20 + [2.0 ** (17 - i // 15) for i in range(60)] + [2.0**14] * 200
    alarms = run(Underflow(), scales(values))
    assert [alarm.step for alarm in alarms] == [150 + 20 + 45 + 1]
    slow = [2.0**17] * 150 + [2.0 ** (17 - i // 90) for i in range(270)] + [2.0**14] * 200
    assert run(Underflow(), scales(slow)) == []


@pytest.mark.parametrize("pace", [1, 10, 24, 150])
def test_a_sinking_scale_is_told(pace: int) -> None:
    values = [2.0**16] * 300 + [2.0 ** max(16 - (1 + i // pace), 6) for i in range(12 * pace)]
    alarms = run(Underflow(), scales(values))
    assert alarms and alarms[0].kind == "underflow" and alarms[0].severity == "warning"
    assert 300 < alarms[0].step <= 300 + 4 * pace + 1
    assert alarms[0].expected == 2.0**16 and len(alarms) <= 3


def test_a_gradient_of_exactly_zero() -> None:
    rows = [Signals(s, 3.0, 0.0 if 40 <= s < 60 else 1.0, 1e-3, 0) for s in range(1, 100)]
    assert [alarm.step for alarm in run(Underflow(), rows)] == [42]
    rows = [Signals(s, 3.0, 1.0, 1e-3, 0, {"grad_norm@head": 0.0 if s >= 40 else 1.0}) for s in range(1, 200)]
    (alarm,) = run(Underflow(), rows)
    assert (alarm.place, alarm.step) == ("head", 47)
    never = [Signals(s, 3.0, 1.0, 1e-3, 0, {"grad_norm@unused": 0.0}) for s in range(1, 100)]
    assert run(Underflow(), never) == []


def test_outputs_near_the_top_matter_in_fp16_only() -> None:
    def rows(scale: float) -> list[Signals]:
        high: dict[str, Any] = {"loss_scale": scale, "out_max@block.1.fc2": 40000.0, "out_max@block.0.fc2": 90.0}
        return [Signals(s, 3.0, 1.0, 1e-3, 0, high) for s in range(1, 30)]

    (alarm,) = run(Underflow(), rows(2.0**15))
    assert (alarm.place, alarm.signal, alarm.step) == ("block.1.fc2", "out_max", 1)
    assert run(Underflow(), rows(1.0)) == []


# ---------------------------------------------------------------- spread


def test_a_bad_rank_is_noted_and_an_odd_document_is_not() -> None:
    rng = random.Random(2)
    values = {s: 0.1 * math.exp(rng.gauss(0.0, 0.4)) for s in range(1, 200)}
    odd = {**values, 100: 6.0, 101: 6.0, 150: 6.0}
    assert run(LossSpread(), plain(odd, "loss_spread")) == []
    bad = {s: (2.0 if s >= 100 else value) for s, value in values.items()}
    (alarm,) = run(LossSpread(), plain(bad, "loss_spread"))
    assert (alarm.kind, alarm.severity, alarm.step) == ("loss_spread", "note", 102)
