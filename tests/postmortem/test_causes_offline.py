"""The causes that a finished log shows: one log made for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from poise.postmortem.cause import name_cause
from poise.postmortem.event import Cause, Event
from poise.postmortem.log import Log
from poise.postmortem.precursors import precursors

STEPS = np.arange(1, 4001)


def log_of(steps: np.ndarray = STEPS, restarts: tuple[int, ...] = (), **series: np.ndarray) -> Log:
    loss = 2.5 + 3.0 * np.exp(-steps / 800.0)
    all_series = {"loss": loss} | {name.replace("_of_", " "): values for name, values in series.items()}
    return Log(Path("a"), "a", "table", {k: (steps, v.astype(float)) for k, v in all_series.items()}, restarts=restarts)


def event(kind: str = "fast_spike", start: int = 3000, **more: object) -> Event:
    fields = {"kind": kind, "severity": "warning", "start": start, "peak": start + 5, "end": start + 30}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 31, "recovery": "returned"}
    return Event(**(fields | more))  # type: ignore[arg-type]


def cause(log: Log, e: Event, others: Sequence[Event] = ()) -> Cause:
    return name_cause(log, e, sorted([*others, e], key=lambda x: x.start), precursors(log, e))


def verdict(log: Log, e: Event, others: Sequence[Event] = ()) -> tuple[str, str, str]:
    found = cause(log, e, others)
    assert found.evidence and all(found.evidence)
    return found.name, found.kind, found.certainty


def warmed(end: int) -> np.ndarray:
    return 1e-3 * np.minimum(STEPS / end, 1.0)


def scale(*halved: int) -> np.ndarray:
    return np.array(2.0 ** (16 - np.sum([h <= STEPS for h in halved], axis=0)))


def runup(first: int, count: int) -> np.ndarray:
    norm = np.full(len(STEPS), 0.25) * np.exp(0.05 * np.random.default_rng(1).standard_normal(len(STEPS)))
    norm[first - 1 : first - 1 + count] = 0.25 * 4.0 ** np.arange(1, count + 1)
    return norm


def test_an_odd_batch_is_likely_only_where_every_step_is_logged() -> None:
    outlier = event("data_outlier", peak=3000, end=3000, points=1, severity="note")
    assert verdict(log_of(), outlier) == ("data outlier", "data", "likely")
    coarse = np.arange(5, 4001, 5)
    assert verdict(log_of(coarse), outlier) == ("data outlier", "data", "possible")
    assert "every 5th step" in " ".join(cause(log_of(coarse), outlier).evidence)


def test_nothing_but_a_loss_is_unknown_and_says_so() -> None:
    found = cause(log_of(), event())
    assert (found.name, found.kind, found.certainty) == ("unknown", "unknown", "possible")
    assert "the loss only" in found.evidence[0]
    quiet = cause(log_of(grad_norm=runup(1, 0)), event())
    assert quiet.name == "unknown" and "grad_norm" in quiet.evidence[0]
    three = [event(start=s) for s in (500, 900)]
    assert "3 spikes, 2 of them in the first quarter" in cause(log_of(), event(), three).evidence[1]


@pytest.mark.parametrize(
    ("lead", "certainty", "name"),
    [(0, "likely", "restart seam"), (30, "possible", "restart seam"), (200, "", "unknown")],
)
def test_restart_seam(lead: int, certainty: str, name: str) -> None:
    found = cause(log_of(restarts=(3000 - lead,)), event("level_shift", recovery="never"))
    assert found.name == name and (not certainty or found.certainty == certainty)


def test_schedule_at_jumps_and_at_the_end_of_warm_up() -> None:
    jump = np.where(STEPS < 2990, 1e-4, 3e-4)
    assert verdict(log_of(lr=jump), event()) == ("schedule", "schedule", "likely")
    fall = np.where(STEPS < 2990, 3e-4, 1e-4)
    assert verdict(log_of(lr=fall), event())[0] == "unknown", "a lower rate raises no loss"
    assert verdict(log_of(lr=warmed(2900)), event()) == ("schedule", "schedule", "possible")
    assert verdict(log_of(lr=warmed(3100)), event()) == ("schedule", "schedule", "possible")
    assert "97% of its rate" in cause(log_of(lr=warmed(3100)), event()).evidence[0]
    assert verdict(log_of(lr=warmed(1000)), event())[0] == "unknown"
    batch = np.where(STEPS < 2950, 16.0, 32.0)
    assert verdict(log_of(global_of_batch_of_size=batch), event()) == ("schedule", "schedule", "possible")


def test_precision_when_the_scale_sinks_before() -> None:
    sinking = log_of(loss_of_scale=scale(2300, 2600, 2900))
    assert verdict(sinking, event("slow_divergence", recovery="never")) == ("precision", "precision", "likely")
    at_once = log_of(loss_of_scale=scale(3000, 3000, 3000))
    assert verdict(at_once, event()) == ("precision", "precision", "possible")
    together = log_of(loss_of_scale=scale(3002, 3003, 3004))
    assert verdict(together, event())[0] == "unknown", "a scale that falls in a spike is its effect as well"
    found = cause(together, event("nonfinite", value=math.nan, recovery="never"))
    assert (found.name, found.certainty) == ("precision", "possible")
    assert "during the event" in found.evidence[0]


def test_nan_bare_after_a_rise_and_from_the_start() -> None:
    broken = event("nonfinite", value=math.nan, peak=3000, end=4000, recovery="never", severity="critical")
    assert verdict(log_of(), broken) == ("precision", "precision", "possible")
    climb = event("slow_divergence", start=2500, end=2999)
    assert verdict(log_of(), broken, [climb]) == ("too-high LR", "schedule", "possible")
    log = log_of()
    loss = log.series["loss"][1].copy()
    loss[2990:2999] += np.linspace(1.0, 5.0, 9)
    risen = dataclasses.replace(log, series={"loss": (STEPS, loss)})
    assert verdict(risen, broken) == ("too-high LR", "schedule", "possible")
    first = event("nonfinite", start=1, peak=1, end=4000, value=math.nan, recovery="never")
    never = np.full(len(STEPS), math.nan)
    assert verdict(log_of(loss=never, grad_norm=never), first) == ("set-up", "software", "likely")
    later = log_of(np.arange(5000, 6000), loss=never[:1000])
    assert verdict(later, event("nonfinite", start=5000, value=math.nan)) == ("set-up", "unknown", "possible")


def test_a_gradient_norm_that_is_no_number_is_not_told_as_a_loss() -> None:
    norm = np.full(len(STEPS), 0.3)
    norm[[0, 2999]] = math.nan
    for start in (1, 3000):
        note = event("nonfinite", start=start, signal="grad_norm", severity="note", value=math.nan)
        found = cause(log_of(grad_norm=norm), note)
        assert found.name in ("precision", "unknown") and not any("the loss was" in s for s in found.evidence)


def test_chaos_is_likely_the_rate_only_where_it_calmed_down_with_it() -> None:
    chaos = event("chaotic", start=60, peak=900, end=3000, recovery="returned")
    assert verdict(log_of(), chaos) == ("too-high LR", "schedule", "possible")
    cosine = 0.5 + 0.5 * np.cos(np.pi * STEPS / 4000.0)
    assert verdict(log_of(lr=cosine), chaos) == ("too-high LR", "schedule", "likely")
    never = dataclasses.replace(chaos, recovery="never")
    assert verdict(log_of(lr=cosine), never)[2] == "possible"


def test_run_up_logits_repeated_spikes_collapse() -> None:
    assert verdict(log_of(grad_norm=runup(2997, 4)), event()) == ("optimizer", "optimizer", "possible")
    assert verdict(log_of(grad_norm=runup(3000, 1)), event())[0] == "unknown", "a burst with the loss is no run-up"
    logits = 5.0 + np.where(STEPS > 2000, (STEPS - 2000) / 4.0, 0.0)
    found = log_of(max_of_attention_of_logit=logits)
    assert verdict(found, event()) == ("attention logits", "architecture", "likely")
    constant = log_of(lr=np.full(len(STEPS), 1e-3))
    others = [event(start=s) for s in (1000, 2000)]
    assert verdict(constant, event(), others) == ("too-high LR", "schedule", "possible")
    assert verdict(constant, event(), others[:1])[0] == "unknown"
    assert verdict(log_of(), event("collapse", value=1.0)) == ("collapse", "data", "possible")
    assert verdict(log_of(), event("grad_spike", signal="grad_norm"))[0] == "unknown"


def test_other_hints_are_told_and_two_signatures_are_no_verdict() -> None:
    both = log_of(lr=np.where(STEPS < 2990, 1e-4, 3e-4), grad_norm=runup(2997, 4))
    found = cause(both, event())
    assert (found.name, found.certainty) == ("schedule", "likely")
    assert any(s.startswith("also: the gradient norm rose") for s in found.evidence)
    seam = log_of(restarts=(2999,), lr=np.where(STEPS < 2999, 1e-4, 3e-4))
    found = cause(seam, event())
    assert (found.name, found.certainty) == ("restart seam", "possible")
    assert any("learning rate went" in s for s in found.evidence)


def test_starts_are_not_known_to_the_step() -> None:
    shift = event("level_shift", recovery="never")
    for late, name in ((8, "restart seam"), (15, "unknown")):
        found = cause(log_of(restarts=(3000 + late,)), shift)
        assert found.name == name
        assert name == "unknown" or (
            found.certainty == "likely" and f"{late} steps after its start" in found.evidence[0]
        )
    for late, name in ((2, "schedule"), (8, "unknown")):
        assert cause(log_of(lr=np.where(3000 + late > STEPS, 1e-4, 3e-4)), event()).name == name
    assert verdict(log_of(lr=np.where(STEPS < 3008, 1e-4, 3e-4)), shift) == ("schedule", "schedule", "likely")
    every = np.arange(10, 4001, 10)
    coarse = log_of(every, restarts=(3020,))
    assert cause(coarse, event()).name == "restart seam"


def test_only_a_rate_that_rises_is_a_cause_and_sizes_are() -> None:
    halved = cause(log_of(lr=np.where(STEPS < 2990, 2e-4, 1e-4)), event("level_shift", recovery="never"))
    assert halved.name == "unknown" and "-50 %" in halved.evidence[0]
    far = cause(log_of(lr=np.where(STEPS < 2990, 1e-5, 1e-3)), event())
    assert "(x 100)" in far.evidence[0]
    longer = cause(log_of(curriculum_of_seqlen=np.where(STEPS < 2990, 512.0, 1024.0)), event())
    assert longer.name == "schedule" and "sequence length went from 512 to 1024" in longer.evidence[0]
    smaller = cause(log_of(global_of_batch_of_size=np.where(STEPS < 2990, 64.0, 16.0)), event())
    assert smaller.name == "schedule" and any("noisier" in s for s in smaller.evidence)
    steady = log_of(lr=np.full(len(STEPS), 1e-3))
    assert "learning rate only" in cause(steady, event()).evidence[0]


def with_nan(at: np.ndarray) -> Log:
    loss = 2.5 + 3.0 * np.exp(-STEPS / 800.0)
    loss[at - 1] = math.nan
    return log_of(loss=loss)


def test_nan_in_the_first_rows_and_at_every_twentieth() -> None:
    first = event("nonfinite", start=1, peak=1, end=3, value=math.nan)
    found = cause(with_nan(np.arange(1, 4)), first)
    assert found.name == "start-up" and "first 3 values" in found.evidence[0] and "step 4 on" in found.evidence[0]
    assert "the first 1 value of the loss is" in cause(with_nan(np.array([1])), first).evidence[0]
    regular = np.arange(1000, 1241, 20)
    found = cause(with_nan(regular), event("nonfinite", 1000, peak=1000, end=1240, value=math.nan))
    assert found.name == "periodic" and "every 20th step (13 times from step 1000 to 1240)" in found.evidence[0]
    wide = np.arange(1000, 2001, 101)  # each an event of its own
    parts = [event("nonfinite", int(s), peak=int(s), end=int(s), value=math.nan) for s in wide]
    assert "every 101st step" in cause(with_nan(wide), parts[4], parts[:4] + parts[5:]).evidence[0]
    odd = np.array([1000, 1003, 1030, 1041, 1100])
    assert cause(with_nan(odd), event("nonfinite", 1000, peak=1000, end=1100, value=math.nan)).name == "precision"
    through = cause(with_nan(np.arange(1, 4001, 20)), event("nonfinite", 1, peak=1, end=3981, recovery="never"))
    assert through.name == "periodic", "no set-up: most of it is finite"


def test_a_fall_where_an_epoch_begins() -> None:
    fall = event("collapse", value=1.0, recovery="never")
    for epoch in (np.floor(STEPS / 1000.0), STEPS / 1000.0):
        found = cause(log_of(epoch=epoch), fall)
        assert (found.name, found.kind, found.certainty) == ("epoch boundary", "data", "possible")
        assert "epoch 3 begins at step 3000" in found.evidence[0]
    assert cause(log_of(epoch=np.floor((STEPS + 300) / 1000.0)), fall).name == "collapse"
    assert cause(log_of(epoch=np.floor(STEPS / 5.0)), fall).name == "collapse", "all steps are near one"
    assert cause(log_of(epoch=np.floor(STEPS / 1000.0)), event("level_drop", severity="note")).name == "epoch boundary"


def test_sentences_have_their_plurals_and_plain_numbers() -> None:
    one = cause(log_of(grad_norm=runup(2999, 2)), event())
    assert one.evidence[0].endswith("1 step before") and "steps before" not in one.evidence[0]
    sinking = cause(log_of(loss_of_scale=scale(2300, 2600, 2900)), event("slow_divergence", recovery="never"))
    assert "sank from 65536 at step" in sinking.evidence[0] and "3 halvings" in sinking.evidence[0]
