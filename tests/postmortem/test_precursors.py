"""What moved before an event, in logs made for it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from poise.postmortem.diagnosis import explain
from poise.postmortem.event import Event, Precursor
from poise.postmortem.log import Log
from poise.postmortem.precursors import family_of, precursors
from poise.postmortem.rates import read_rates


def log_of(series: dict[str, np.ndarray], steps: np.ndarray, **more: object) -> Log:
    return Log(Path("a.csv"), "a", "table", {k: (steps, v.astype(float)) for k, v in series.items()}, **more)  # type: ignore[arg-type]


def spike(start: int, **more: object) -> Event:
    fields = {"kind": "fast_spike", "severity": "warning", "start": start, "peak": start + 5, "end": start + 30}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 31, "recovery": "returned"}
    return Event(**(fields | more))  # type: ignore[arg-type]


def noisy(steps: np.ndarray, level: float = 0.25, spread: float = 0.1) -> np.ndarray:
    return level * np.exp(spread * np.random.default_rng(0).standard_normal(len(steps)))


def only(found: tuple[Precursor, ...], signal: str) -> Precursor:
    assert [p.signal for p in found] == [signal], found
    return found[0]


STEPS = np.arange(1, 4001)


def test_a_run_up_of_the_gradient_norm_is_found_where_it_began() -> None:
    norm = noisy(STEPS)
    norm[(STEPS >= 2996) & (STEPS <= 3000)] = [0.95, 2.4, 16.0, 145.0, 960.0]
    found = only(precursors(log_of({"grad_norm": norm}, STEPS), spike(3000)), "grad_norm")
    assert (found.step, found.lead) == (2996, 4)
    assert "0.95, 2.4, 16, 145, 960" in found.text


def test_a_burst_at_the_same_step_has_no_lead_and_an_older_one_is_none() -> None:
    norm = noisy(STEPS)
    norm[STEPS == 3000] = 5.0
    assert only(precursors(log_of({"grad_norm": norm}, STEPS), spike(3000)), "grad_norm").lead == 0
    assert precursors(log_of({"grad_norm": norm}, STEPS), spike(3020)) == ()
    assert precursors(log_of({"grad_norm": norm}, STEPS), spike(2999)) == (), "what comes after is no precursor"


def test_quiet_norms_are_no_sign_and_non_finite_ones_are() -> None:
    norm = noisy(STEPS, spread=0.3)
    quiet = [precursors(log_of({"grad_norm": norm}, STEPS), spike(s)) for s in range(700, 3900, 37)]
    assert sum(map(len, quiet)) == 0
    norm[STEPS == 2999] = np.nan
    assert only(precursors(log_of({"grad_norm": norm}, STEPS), spike(3000)), "grad_norm").lead == 1


@pytest.mark.parametrize("every", [1, 5, 50])
def test_windows_are_steps_and_not_points(every: int) -> None:
    steps = np.arange(every, 8001, every)
    norm = noisy(steps)
    norm[(steps > 6000 - 2 * every) & (steps <= 6000)] = 3.0
    found = only(precursors(log_of({"grad_norm": norm}, steps), spike(6000)), "grad_norm")
    assert found.lead == every


def test_a_short_excerpt_is_enough() -> None:
    steps = np.arange(1, 12)
    norm = np.array([0.24, 0.23, 0.25, 0.24, 0.22, 0.24, 0.95, 2.4, 16.0, 145.0, 960.0])
    assert only(precursors(log_of({"grad_norm": norm}, steps), spike(10)), "grad_norm").step == 7


def test_a_series_may_be_sparse_and_start_late() -> None:
    late = STEPS[2500::7]
    norm = noisy(late)
    norm[late > 2980] = 2.0
    series = {"loss": (STEPS, np.full(len(STEPS), 3.0)), "grad_norm": (late, norm)}
    found = only(precursors(Log(Path("a"), "a", "table", series), spike(3000)), "grad_norm")
    assert 0 < found.lead < 20
    assert precursors(Log(Path("a"), "a", "table", series), spike(2400)) == ()


def test_the_update_norm_doubles_first_and_logits_grow() -> None:
    update = noisy(STEPS, 1e-3, 0.05)
    update[STEPS >= 2980] *= 2.0
    logits = 8.0 + np.where(STEPS > 2000, (STEPS - 2000) / 5.0, 0.0)
    series = {"update_rms": update, "attn_logit_max@block.3": logits, "attn_logit_max@block.4": logits}
    found = {p.signal: p for p in precursors(log_of(series, STEPS), spike(3000))}
    assert found["update_rms"].lead == 20
    grown = found["attn_logit_max@block.3"]
    assert 300 < grown.lead < 600 and "block.3" in grown.text and "1 more" in grown.text
    assert len(found) == 2


def test_norms_that_always_grow_are_no_sign_unless_faster() -> None:
    steps = np.arange(1, 12001, 10)
    steady = 100.0 * np.exp(steps / 4000.0)
    assert precursors(log_of({"params norm": steady}, steps), spike(9000)) == ()
    faster = 100.0 + np.where(steps > 7500, (steps - 7500) / 10.0, 0.0)
    assert only(precursors(log_of({"params norm": faster}, steps), spike(9000)), "params norm").lead > 0


@pytest.mark.parametrize("exponent", [False, True])
def test_a_sinking_loss_scale(exponent: bool) -> None:
    scale = np.full(len(STEPS), 16.0)
    for halved in (1, 2, 3, 4, 2200, 2700, 2900):
        scale[halved <= STEPS] -= 1.0
    series = {"loss scale": scale if exponent else 2.0**scale}
    found = only(precursors(log_of(series, STEPS), spike(3000)), "loss scale")
    assert (found.step, found.lead) == (2200, 800) and "3 halvings" in found.text
    assert precursors(log_of(series, STEPS), spike(1500)) == (), "the first search for a scale is no sinking"


def test_skipped_steps_counted_each_or_in_total() -> None:
    each = np.isin(STEPS, [2700, 2800, 2900]).astype(float)
    for name, values in (("number of skipped iterations", each), ("skipped_steps", np.cumsum(each) + 5)):
        found = only(precursors(log_of({name: values}, STEPS), spike(3000)), name)
        assert (found.step, found.lead) == (2700, 300) and found.text.startswith("3 steps")
        assert precursors(log_of({name: values}, STEPS), spike(3600)) == ()


def test_rates_warm_up_jump_and_restart_of_the_schedule() -> None:
    lr = np.where(STEPS <= 1000, STEPS / 1000.0, 0.5 + 0.5 * np.cos(np.pi * (STEPS - 1000) / 3000.0)) * 1e-3
    rates = read_rates(log_of({"lr": lr}, STEPS))
    assert rates is not None and rates.jumps == ()
    warm = rates.warmup()
    assert warm is not None and (warm.end, round(warm.high, 6)) == (1000, 1e-3) and len(rates.rises) == 1
    assert "warm-up" in only(precursors(log_of({"lr": lr}, STEPS), spike(1100)), "lr").text
    assert precursors(log_of({"lr": lr}, STEPS), spike(1600)) == ()
    lr[STEPS >= 2500] *= 1.5
    found = only(precursors(log_of({"lr": lr}, STEPS), spike(2510)), "lr")
    assert (found.step, found.lead) == (2500, 10) and "+50 %" in found.text


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "inverse"])
def test_ordinary_schedules_have_one_rise_and_no_jump(shape: str, every: int) -> None:
    steps = np.arange(every, 20001, every)
    part = (steps - 2000) / 18000.0
    falls = {
        "cosine": 0.5 + 0.5 * np.cos(np.pi * part),
        "linear": 1 - part,
        "wsd": np.minimum(1.0, (1 - part) / 0.2),
        "inverse": np.sqrt(2000.0 / steps),
    }
    lr = 6e-4 * np.where(steps <= 2000, steps / 2000.0, falls[shape])
    printed = np.array([float(f"{v:.2e}") for v in lr])
    rates = read_rates(log_of({"lr": printed}, steps))
    assert rates is not None
    assert [rise.first for rise in rates.rises] == [True] and rates.jumps == ()


def test_warming_up_again_after_a_restart_is_a_rise_of_its_own() -> None:
    lr = np.full(len(STEPS), 1e-3)
    lr[:200] *= STEPS[:200] / 200.0
    lr[2000:2300] *= np.arange(1, 301) / 300.0
    log = log_of({"loss": np.full(len(STEPS), 3.0), "lr": lr}, STEPS, restarts=(2001,))
    rates = read_rates(log)
    assert rates is not None and [(r.end, r.first) for r in rates.rises] == [(200, True), (2300, False)]
    assert [(j.step, j.after < j.before) for j in rates.jumps] == [(2001, True)]
    assert {p.signal for p in precursors(log, spike(2050))} == {"lr", "restart"}


def test_a_rise_ends_where_the_rate_falls_and_not_at_flat_prints() -> None:
    saw = np.concatenate([np.linspace(1e-5, 1e-3, 1000), np.linspace(1e-5, 1e-3, 3000)])
    rates = read_rates(log_of({"lr": saw}, STEPS))
    assert rates is not None and [(r.start, r.end) for r in rates.rises] == [(1, 1000), (1001, 4000)]
    rounded = np.round(np.minimum(STEPS / 2000.0, 1.0), 2)  # twenty equal prints, then a step
    rates = read_rates(log_of({"lr": rounded}, STEPS))
    assert rates is not None and [(r.end, r.first) for r in rates.rises] == [(1990, True)]


def test_restart_gap_batch_size_and_validation() -> None:
    steps = STEPS[(STEPS < 2900) | (STEPS > 2960)]
    log = log_of({"loss": np.full(len(steps), 3.0)}, steps, restarts=(2961,))
    assert {(p.signal, p.lead) for p in precursors(log, spike(3000))} == {("restart", 39), ("gap", 39)}
    size = np.where(STEPS < 2950, 256.0, 512.0)
    found = only(precursors(log_of({"global batch size": size}, STEPS), spike(3000)), "global batch size")
    assert found.step == 2950 and "from 256 to 512" in found.text
    held_out = {"loss": (STEPS, np.full(len(STEPS), 3.0))}
    held_out["val_loss"] = (np.arange(500, 3001, 500), np.array([4.0, 3.6, 3.4, 3.3, 3.25, 3.6]))
    assert only(precursors(Log(Path("a"), "a", "table", held_out), spike(3010)), "val_loss").lead == 10


def test_names_of_many_trainers() -> None:
    names = {
        "grad_norm": "gradient norm",
        "optim/total grad norm": "gradient norm",
        "grad_norm@block.3": "gradient norm",
        "optim/update norm": "update norm",
        "update_rms@head": "update norm",
        "max attention logit": "largest attention logit",
        "max_attn_logits/layer_3": "largest attention logit",
        "log_z": "output log Z",
        "z_loss": "z-loss",
        "params norm": "parameter norm",
        "weight_rms@block.2": "parameter norm",
        "residual_rms@block.2": "activation norm",
    }
    assert {name: family.name for name in names if (family := family_of(name))} == names
    assert not any(map(family_of, ("loss", "lr", "elapsed time per iteration (ms)", "num_zeros_in_grad", "update")))


def test_twenty_series_of_twenty_thousand_steps_in_milliseconds() -> None:
    steps = np.arange(1, 20001)
    series = {f"grad_norm@block.{i}": noisy(steps) for i in range(18)} | {"loss": noisy(steps), "lr": noisy(steps)}
    log, event = log_of(series, steps), spike(15000)
    precursors(log, event)
    begin = time.process_time()
    for _ in range(5):
        precursors(log, event)
    assert (time.process_time() - begin) / 5 < 0.1


def test_changes_a_little_after_the_start_are_told_without_a_lead() -> None:
    lr = np.where(STEPS < 3002, 1e-4, 3e-4)
    found = only(precursors(log_of({"lr": lr}, STEPS), spike(3000)), "lr")
    assert (found.step, found.lead) == (3002, 0)
    assert precursors(log_of({"lr": lr}, STEPS), spike(2995)) == ()
    shift = spike(2995, kind="level_shift")
    assert only(precursors(log_of({"lr": lr}, STEPS), shift), "lr").lead == 0


def test_one_is_no_plural() -> None:
    skipped = np.isin(STEPS, [2999]).astype(float)
    found = only(precursors(log_of({"skipped_steps": skipped}, STEPS), spike(3000)), "skipped_steps")
    assert found.text.startswith("1 step was skipped")


def test_a_long_log_with_many_events_is_explained_in_time() -> None:
    steps = np.arange(1, 200_001)
    rates = np.where(steps < 2000, steps / 2000.0, 1.0 - steps / 4e5)
    series = {"loss": noisy(steps, 3.0, 0.01), "grad_norm": noisy(steps), "lr": rates, "tokens": steps * 4096.0}
    series |= {"loss_scale": np.full(len(steps), 65536.0), "skipped_steps": (steps % 5000 == 0).cumsum()}
    log = log_of(series, steps)
    given = [spike(s) for s in range(5000, 195_000, 475)]
    begin = time.process_time()
    assert len(explain(log, given)) == 400
    assert time.process_time() - begin < 1.5
