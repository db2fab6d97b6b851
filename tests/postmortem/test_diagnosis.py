"""The whole of a diagnosis: health, headline, record, on logs made for it and on real ones where they are at hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.journal import to_json
from poise.postmortem.cost import total_cost
from poise.postmortem.diagnosis import Diagnosis, diagnose, explain, headline, health_of
from poise.postmortem.event import Cause, Event, Kind, Recovery
from poise.postmortem.log import Log, read_log

SHARED = Path(__file__).resolve().parents[3] / "shared"
real = pytest.mark.skipif(not (SHARED / "traces").is_dir(), reason="the labelled traces are not on this machine")


def log_of(loss: np.ndarray, steps: np.ndarray | None = None, **series: np.ndarray) -> Log:
    steps = np.arange(1, len(loss) + 1) if steps is None else steps
    table = {"loss": loss} | series
    return Log(Path("run.csv"), "run", "table", {k: (steps, v.astype(float)) for k, v in table.items()}, ("a note",))


def healthy(n: int = 3000) -> np.ndarray:
    noise = 0.004 * np.random.default_rng(0).standard_normal(n)
    return np.asarray((2.5 + 6.0 * np.exp(-np.arange(n) / 250.0)) * np.exp(noise))


def event(kind: str = "fast_spike", start: int = 1000, **more: object) -> Event:
    fields = {"kind": kind, "severity": "warning", "start": start, "peak": start + 5, "end": start + 30}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 31, "recovery": "returned"}
    return Event(**(fields | more))  # type: ignore[arg-type]


def say(log: Log, *events: Event) -> tuple[str, str]:
    health = health_of(log, events)
    return health, headline(log, events, health, total_cost(events, log))


def test_a_healthy_log() -> None:
    found = diagnose(log_of(healthy()))
    assert (found.health, found.events, found.lost_steps, found.ettr) == ("healthy", (), 0, 1.0)
    assert found.headline == "Healthy: nothing that needs a reaction in 3,000 points, steps 1 to 3000."
    assert (found.format, found.points, found.notes) == ("table", 3000, ("a note",))


def test_a_spike_that_came_back_with_its_run_up() -> None:
    loss, norm = healthy(), np.full(3000, 0.3)
    loss[1500:1540] *= 1 + 0.5 * np.exp(-np.arange(40) / 12.0)
    norm[1496:1500] = [0.95, 2.4, 16.0, 145.0]
    found = diagnose(log_of(loss, grad_norm=norm * np.exp(0.05 * healthy())), tokens_per_step=1000)
    assert found.health == "events" and found.headline.startswith("1 loss spike in 3,000 points")
    (spike,) = found.events
    assert abs(spike.start - 1501) <= 2 and spike.recovery == "returned"
    assert spike.precursors[0].signal == "grad_norm" and spike.precursors[0].lead >= 2
    assert spike.cause.name == "optimizer" and spike.advice.action == "wait"
    assert found.lost_steps == spike.cost.steps > 10
    assert found.lost_tokens == 1000 * spike.cost.steps
    assert found.ettr == pytest.approx(1 - spike.cost.steps / 3000)


def test_nan_at_the_end_and_from_the_start() -> None:
    loss = healthy()
    loss[2000:] = math.nan
    found = diagnose(log_of(loss))
    assert found.health == "diverged" and "is not finite from step 2001" in found.headline
    assert found.events[-1].cause.kind == "precision" and found.events[-1].advice.action in (
        "roll_back",
        "raise_precision",
    )
    assert found.lost_steps == 1000
    record = json.loads(to_json(found.record()))
    assert record["events"][-1]["value"] == "nan" and record["ettr"] == pytest.approx(2 / 3)
    set_up = diagnose(log_of(np.full(100, math.nan)))
    assert set_up.events[0].cause.name == "set-up" and set_up.events[0].advice.action == "stop"


def test_the_record_has_what_programs_ask_for() -> None:
    loss = healthy()
    loss[1500] *= 1.4
    record = json.loads(to_json(diagnose(log_of(loss)).record()))
    for key in (
        "format",
        "points",
        "events",
        "health",
        "headline",
        "lost_steps",
        "lost_tokens",
        "ettr",
        "spike_scores",
    ):
        assert key in record
    (outlier,) = record["events"]
    assert outlier["kind"] == "data_outlier" and outlier["cause"]["name"] == "data outlier"
    wanted = {"start", "peak", "end", "severity", "recommendation", "cost", "precursors", "recovery"}
    assert wanted <= set(outlier) and outlier["cost"] == {"steps": 0, "tokens": None, "share": 0.0}
    assert record["health"] == "healthy" and "1 odd batch" in record["headline"]
    assert record["spike_scores"]["loss"] and record["notes"] == ["a note"]


def test_health_and_headline_by_what_stayed() -> None:
    log = log_of(healthy())
    assert say(log, event(), event(start=2000, recovery="open"))[0] == "events"
    health, text = say(log, event(), event("level_shift", 2000, recovery="partly", lasting=0.021))
    assert health == "damaged" and "level shift at step 2000" in text and "stayed up (+2.1 %;" in text
    health, text = say(log, event("slow_divergence", 2000, recovery="never", end=3000))
    assert health == "diverged" and "climbs" in text and "1,001 steps (33.4%) lost" in text
    health, text = say(log, event(), event(start=1500))
    assert text == "2 loss spikes in 3,000 points, steps 1 to 3000, all back on trend; 62 steps (2.1%) lost."
    assert say(log, event("grad_spike", signal="grad_norm", severity="note"))[0] == "healthy"
    assert "open" in say(log, event(start=2990, recovery="open"))[1]
    assert "growth of attention logits" in say(log, event("logit_growth", signal="max logit"))[1]


def test_tokens_come_from_the_log_where_it_counts_them() -> None:
    loss = healthy()
    loss[1500:1540] *= 1 + 0.5 * np.exp(-np.arange(40) / 12.0)
    counted = diagnose(log_of(loss, tokens=np.arange(1, 3001) * 512.0))
    assert counted.lost_tokens == 512 * counted.lost_steps > 0
    said = log_of(loss)
    said = Log(said.path, said.name, said.format, said.series, settings={"global_batch_size": "4", "seq_length": "128"})
    assert diagnose(said).lost_tokens == 512 * counted.lost_steps
    assert diagnose(log_of(loss)).lost_tokens is None
    ramp = diagnose(log_of(loss, tokens=np.cumsum(np.where(np.abs(np.arange(3000) - 1520) < 150, 300, 100))))
    assert ramp.lost_tokens == pytest.approx(300 * ramp.lost_steps, rel=0.01)


def test_events_are_explained_in_order_and_nothing_else_is_changed() -> None:
    log = log_of(healthy())
    given = [event(start=2000), event(start=1000)]
    found = explain(log, given)
    assert [e.start for e in found] == [1000, 2000]
    assert all(e.advice.source and e.cause.evidence and e.cost.steps == 31 for e in found)
    assert [(e.kind, e.end, e.value) for e in found] == [("fast_spike", s + 30, 4.0) for s in (1000, 2000)]


VALUES = st.one_of(st.floats(0.0, 20.0), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, 1e-30]))
NAMES = ("grad_norm", "lr", "tokens", "val_loss", "loss scale", "skipped_steps", "params norm", "log_z",
         "max attention logit", "update_rms@head", "global batch size")  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_log_is_too_odd(data: st.DataObject) -> None:
    series = {}
    for name in ("loss", *data.draw(st.sets(st.sampled_from(NAMES), max_size=5))):
        gaps = data.draw(st.lists(st.sampled_from([1, 1, 1, 5, 700]), min_size=1, max_size=40))
        values = data.draw(st.lists(VALUES, min_size=len(gaps), max_size=len(gaps)))
        series[name] = np.cumsum(np.array(gaps)), np.array(values)
    steps = series["loss"][0]
    unit = data.draw(st.sampled_from(["steps", "samples", "tokens"]))
    log = Log(Path("x"), "x", "table", series, restarts=(int(steps[len(steps) // 2]),), step_unit=unit)
    at = st.integers(int(steps[0]), int(steps[-1]))
    given_events = [
        event(kind, data.draw(at), value=data.draw(VALUES), baseline=data.draw(VALUES), recovery=recovery)
        for kind, recovery in zip(get_args(Kind), itertools.cycle(get_args(Recovery)), strict=False)
    ]
    with np.errstate(all="raise", under="ignore"):
        found = explain(log, given_events)
    say(log, *found)
    assert all(0 <= e.cost.share <= 1 and e.cause.evidence and e.advice.text for e in found)
    assert all(p.lead >= 0 and p.text for e in found for p in e.precursors)
    to_json([e.record() for e in found if e.baseline])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_shortest_logs(n: int) -> None:
    found = diagnose(log_of(np.full(n, 3.0)))
    assert found.health == "unknown" and found.points == n
    assert found.headline == f"Too short to judge ({n} point{'s' * (n > 1)})."
    json.loads(to_json(found.record()))
    no_loss = Log(Path("v"), "v", "table", {"val_loss": (np.arange(n), np.full(n, 2.0))})
    assert diagnose(no_loss).health == "unknown"
    enough = Log(Path("v"), "v", "table", {"val_loss": (np.arange(9), np.full(9, 2.0))})
    assert diagnose(enough).health == "healthy"


def of(name: str) -> Diagnosis:
    return diagnose(read_log(SHARED / "traces" / f"{name}.csv"))


@real
def test_real_healthy_runs_are_healthy() -> None:
    for name in ("gpt3_15b_megatron_dev_h100_healthy", "tinystories17m_cs336_lr1e-3", "gpt2_124m_modded_nanogpt_adam"):
        found = of(name)
        assert found.health == "healthy" and found.ettr == 1.0, found.headline
        assert all(e.advice.action == "nothing" for e in found.events)


@real
def test_real_troubles_have_their_names() -> None:
    broken = of("gpt2_124m_llmc_nan_from_step1")
    assert (broken.health, broken.events[0].cause.name, broken.lost_steps) == ("diverged", "set-up", 100)
    hot = of("tinystories17m_cs336_lr3e-1")
    chaotic = next(e for e in hot.events if e.kind == "chaotic")
    assert (chaotic.cause.name, chaotic.cause.certainty) == ("too-high LR", "likely")
    assert chaotic.advice.action == "lower_lr"
    for name in ("llama31_8b_mlperf_cisco_n8_run4", "mixtral8x7b_megatron_core080"):
        found = of(name)
        spikes = [e for e in found.events if e.kind == "fast_spike"]
        assert len(spikes) >= 3 and found.health == "events"
        assert all(e.advice.action == "qk_norm" and "do not go back" in e.advice.text for e in spikes)
        json.loads(to_json(found.record()))


@real
def test_labelled_spikes_cost_what_their_labels_say() -> None:
    """A label's end is good to about five steps; cost counts from start to end and one interval."""
    for name, every in (("llama31_8b_mlperf_cisco_n16_run5", 1), ("mixtral8x7b_megatron_core080", 5)):
        log = read_log(SHARED / "traces" / f"{name}.csv")
        labels = json.loads((SHARED / "traces" / f"{name}.labels.json").read_text())["events"]
        rows = [row for row in labels if row["kind"] == "fast_spike"]
        given = [event(start=row["start"], peak=row["peak_step"], end=row["end"]) for row in rows]
        assert [e.cost.steps for e in explain(log, given)] == [row["end"] - row["start"] + every for row in rows]


def test_a_gradient_norm_without_numbers_is_not_told_as_the_loss() -> None:
    norm = np.full(3000, 0.3)
    norm[2000:] = math.nan
    found = diagnose(log_of(healthy(), grad_norm=norm))
    assert found.health == "events" and found.lost_steps == 0 and found.ettr == 1.0
    assert "without a finite gradient norm" in found.headline and "loss" not in found.headline
    both = say(log_of(healthy()), event("nonfinite", signal="grad_norm", recovery="never"), event(start=2000))
    assert both[0] == "events" and "1 loss spike" in both[1] and "not finite" not in both[1]
    logits = say(log_of(healthy()), event("logit_growth", signal="max logit", recovery="never"))
    assert logits[0] == "events" and "stayed" not in logits[1]


def test_first_rows_and_regular_rows_without_a_loss() -> None:
    loss = healthy()
    loss[:3] = math.nan
    found = diagnose(log_of(loss))
    assert found.events[0].cause.name == "start-up" and found.health in ("events", "healthy")
    assert found.lost_steps <= 3 and found.events[0].advice.action == "nothing"
    loss = healthy()
    loss[19::20] = math.nan
    found = diagnose(log_of(loss))
    assert found.health == "events" and found.lost_steps == 150 and "iverged" not in found.headline
    assert "every 20th step" in found.events[0].cause.evidence[0] and "every 20th step" in found.events[0].advice.text


def test_too_short_and_zero_or_negative_losses() -> None:
    found = diagnose(log_of(np.full(7, 3.0)))
    assert (found.health, found.headline) == ("unknown", "Too short to judge (7 points).")
    assert diagnose(log_of(np.full(8, 3.0))).health == "healthy"
    loss = healthy()
    loss[::10] = 0.0
    found = diagnose(log_of(loss))
    assert found.notes[0] == "300 of 3000 losses are zero or negative and are not judged" and found.health != "unknown"
    loss[100:2500] = -1.0
    found = diagnose(log_of(loss))
    assert found.health == "unknown" and "are zero or negative" in found.headline
    loss = healthy()
    loss[::50] = 0.0
    assert diagnose(log_of(loss)).notes == ("a note",)
    nothing = Log(Path("v"), "v", "table", {"grad_norm": (np.arange(1, 101), np.full(100, 0.3))})
    assert diagnose(nothing).health == "unknown" and "no loss" in diagnose(nothing).headline


def test_headlines_in_plain_words() -> None:
    log = log_of(healthy())
    health, text = say(log, event("collapse", 2000, recovery="never", value=1.0, lasting=-0.692))
    assert health == "damaged" and "fell at step 2000 and stayed down (-69 %" in text and "stayed up" not in text
    assert "(x 41;" in say(log, event("level_shift", 2000, recovery="never", lasting=40.0))[1]
    one = say(log, event(start=1500, end=1500))[1]
    assert "; 1 step (0.0%) lost" in one
    epoch = event("collapse", 2000, recovery="never", value=1.0, cause=Cause("epoch boundary"))
    assert say(log, epoch)[0] == "events"
    drop = event("level_drop", severity="note", recovery="never")
    assert say(log, drop) == ("healthy", "Healthy: nothing that needs a reaction in 3,000 points, steps 1 to 3000 "
                              "(noted: 1 step downwards of the loss).")  # fmt: skip
    assert say(log, event("novelty", severity="note"))[0] == "healthy"
    (told,) = explain(log, [event(start=1000, recovery="open")])
    assert "cannot be told" in told.advice.text and "1 not known to be back" in say(log, told)[1]


def test_a_restart_a_few_steps_after_a_shift_and_a_raised_rate() -> None:
    loss = healthy()
    loss[2000:] *= 1.1
    lr = np.where(np.arange(3000) < 2000, 1e-4, 3e-4)
    found = diagnose(log_of(loss, lr=lr))
    shift = next(e for e in found.events if e.kind == "level_shift")
    assert shift.cause.name == "schedule" and shift.advice.action == "wait"
    assert "skip the data" not in shift.advice.text
