"""What to do: never a rollback where waiting was right, and far enough back where it was not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from poise.postmortem.advice import advise
from poise.postmortem.event import Advice, Cause, Event, Kind, Precursor, Recovery
from poise.postmortem.log import Log

ACTIONS = {
    "nothing", "wait", "skip_data", "roll_back", "lower_lr", "longer_warmup", "qk_norm", "filter_data",
    "check_restart", "raise_precision", "stop",
}  # fmt: skip


def log_of(first: int = 1, **more: object) -> Log:
    steps = np.arange(first, 10001)
    return Log(Path("a"), "a", "table", {"loss": (steps, np.full(len(steps), 3.0))}, **more)  # type: ignore[arg-type]


def event(kind: str = "fast_spike", start: int = 5000, **more: object) -> Event:
    fields = {"kind": kind, "severity": "critical", "start": start, "peak": start + 5, "end": start + 30}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 31, "recovery": "never"}
    return Event(**(fields | more))  # type: ignore[arg-type]


def advice(e: Event, others: Sequence[Event] = (), log: Log | None = None) -> Advice:
    return advise(log or log_of(), e, sorted([*others, e], key=lambda x: x.start))


def target(found: Advice) -> int:
    match = re.search(r"from step (-?\d+) or before", found.text)
    assert match, found.text
    return int(match[1])


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("recovery", get_args(Recovery))
@pytest.mark.parametrize("name", ["unknown", "precision", "restart seam", "schedule", "too-high LR", "optimizer"])
def test_every_event_has_an_action_with_its_source(kind: str, recovery: str, name: str) -> None:
    value = math.nan if kind == "nonfinite" else 4.0
    crowd = [event(start=s, recovery="returned") for s in (4300, 4800, 7000)]
    for others in ([], crowd):
        e = event(kind, recovery=recovery, value=value, cause=Cause(name, "unknown", "likely"))
        found = advice(e, others)
        assert found.action in ACTIONS and found.text and found.source
        harmless = kind in ("data_outlier", "early_transient", "grad_spike")
        assert not harmless or found.action == "nothing"
        back = found.action == "roll_back" or "Go back to" in found.text
        assert not back or (not harmless and (recovery in ("never", "partly") or kind == "nonfinite"))
        assert not (recovery == "returned" and back)


def test_how_far_back_and_how_much_to_skip() -> None:
    found = advice(event("level_shift"))
    assert (found.action, target(found)) == ("roll_back", 4900)
    assert "200 steps" in found.text and "PaLM" in found.source
    sign = Precursor("grad_norm", 4700, 300, "rose")
    assert target(advice(event("level_shift", precursors=(sign,)))) == 4699
    outside = Precursor("lr", 4700, 300, "the learning rate rose")
    assert target(advice(event("level_shift", precursors=(outside,)))) == 4900, "that is no state of the run"


def test_a_second_hit_goes_further_back_and_lowers_the_rate() -> None:
    found = advice(event("level_shift"), [event(start=4500, recovery="returned")])
    assert found.action == "roll_back" and target(found) == 4400
    assert "400 steps" in found.text and "lower the learning rate" in found.text and "OPT" in found.source
    assert target(advice(event("level_shift"), [event(start=3900)])) == 4900, "more than 1000 steps ago"
    note = event(start=4500, kind="nonfinite", severity="note", signal="grad_norm")
    assert target(advice(event("level_shift"), [note])) == 4900


def test_a_spike_that_came_back_is_left_alone_and_several_are_prevented() -> None:
    spike = event(recovery="returned", severity="warning")
    assert advice(spike).action == "wait" and "do not go back" in advice(spike).text
    crowd = [event(start=s, recovery="returned") for s in (1000, 8000)]
    assert advice(spike, crowd).action == "qk_norm"
    assert "one of 3" in advice(spike, crowd).text
    has = log_of(settings={"model.qk_layernorm": "True"})
    assert advice(spike, crowd, has).action == "lower_lr"
    assert advice(spike, crowd, log_of(settings={"qk_layernorm": "False"})).action == "qk_norm"
    for name, action in (("schedule", "longer_warmup"), ("too-high LR", "lower_lr"), ("precision", "raise_precision")):
        caused = event(recovery="returned", cause=Cause(name, "schedule", "possible"))
        assert advice(caused, crowd).action == action


def test_where_going_back_cannot_help() -> None:
    seam = event("level_shift", cause=Cause("restart seam", "software", "likely"))
    assert advice(seam).action == "check_restart"
    young = event("slow_divergence", start=40)
    assert advice(young).action == "lower_lr" and "Begin again" in advice(young).text
    assert advice(event("slow_divergence", start=9040), log=log_of(9000)).action == "lower_lr"
    set_up = event("nonfinite", start=1, value=math.nan, cause=Cause("set-up", "software", "likely"))
    assert advice(set_up).action == "stop"
    sinking = Precursor("loss scale", 3500, 1500, "sank")
    fp16 = event("nonfinite", cause=Cause("precision", "precision", "likely"), precursors=(sinking,))
    assert advice(fp16).action == "raise_precision" and target(advice(fp16)) == 3499
    assert advice(event("collapse")).action == "filter_data"
    assert advice(event("logit_growth", signal="max logit")).action == "qk_norm"


def test_a_spike_at_the_end_waits_a_hundred_steps() -> None:
    found = advice(event(start=9980, recovery="open"))
    assert found.action == "wait" and "10080" in found.text and "3 %" in found.text
    assert advice(event("nonfinite", start=9999, value=math.nan)).action == "roll_back"


def test_distances_in_a_log_of_samples_are_scaled() -> None:
    steps = np.arange(1, 2001) * 64
    log = Log(
        Path("a"),
        "a",
        "mllog",
        {"loss": (steps, np.full(2000, 3.0))},
        (),
        (),
        {"global_batch_size": "64"},
        "",
        "samples",
    )
    assert target(advice(event("level_shift", start=64000), log=log)) == 64000 - 100 * 64

    unknown = Log(Path("a"), "a", "mllog", {"loss": (steps, np.full(2000, 3.0))}, step_unit="tokens")
    assert target(advice(event("level_shift", start=64000), log=unknown)) == 64000 - 100 * 64, "a point for a step"


RISEN = Precursor("lr", 4990, 10, "the learning rate went from 0.0001 to 0.0003 (+200 %) at step 4990")
SCHEDULE = Cause("schedule", "schedule", "likely", (RISEN.text,))


def with_rate(last: int = 10000) -> Log:
    steps = np.arange(1, last + 1)
    lr = np.where(steps < 4990, 1e-4, 3e-4)
    return Log(Path("a"), "a", "table", {"loss": (steps, np.full(last, 3.0)), "lr": (steps, lr)})


@pytest.mark.parametrize("kind", ["level_shift", "fast_spike"])
def test_what_the_schedule_did_is_not_rolled_back(kind: str) -> None:
    shift = event(kind, cause=SCHEDULE, precursors=(RISEN,))
    found = advice(shift, log=with_rate())
    assert found.action == "wait" and found.text.startswith("Expected from the schedule: with a higher learning rate")
    assert "smaller" in found.text and "warm up" in found.text and "2308.04014" in found.source
    assert "skip the data" not in found.text and "Go back" not in found.text
    batch = Precursor("global batch size", 4990, 10, "the batch size went from 16 to 32")
    sized = advice(event(kind, cause=SCHEDULE, precursors=(batch,)))
    assert "batch size" in sized.text and "higher learning rate" not in sized.text and sized.action == "wait"
    assert "no published practice" in sized.source
    slow = advice(event("slow_divergence", cause=SCHEDULE, precursors=(RISEN,)), log=with_rate())
    assert slow.action == "lower_lr" and "Skipping data cannot help" in slow.text
    back = advice(event(kind, cause=SCHEDULE, recovery="returned"))
    assert "Waiting was right" not in back.text and "Expected from the schedule" in back.text


def test_waiting_is_for_steps_that_are_still_to_come() -> None:
    for start, end in ((9990, 9995), (9000, 9980), (9850, 9880), (5000, 5030)):
        found = advice(event(start=start, peak=start + 3, end=end, recovery="open"))
        ahead = [int(s) for s in re.findall(r"(?:until|at) step (\d+):", found.text)]
        assert all(step > 10000 for step in ahead), found.text
        assert bool(ahead) == (end > 9900)
        assert (found.action == "wait") == bool(ahead) and ("cannot be told" in found.text) != bool(ahead)


def test_a_spike_that_ends_in_nan_shares_its_advice() -> None:
    nan = event("nonfinite", start=5040, peak=5040, end=10000, value=math.nan, cause=Cause("too-high LR"))
    spike = event(recovery="open")
    assert advice(spike, [nan]) == advice(nan, [spike])
    assert advice(nan, [spike]).action == "roll_back" and target(advice(nan, [spike])) == 4900
    assert "second trouble" not in advice(nan, [spike]).text, "it is one trouble"
    far = event("nonfinite", start=6000, peak=6000, end=6000, value=math.nan)
    assert advice(spike, [far]).action == "nothing"
    single = event("nonfinite", start=5040, peak=5040, end=5040, value=math.nan, recovery="returned")
    assert advice(spike, [single]).action == "nothing"


def test_nan_that_leaves_the_run_alone() -> None:
    start_up = event("nonfinite", start=1, peak=1, end=3, recovery="returned", cause=Cause("start-up"))
    assert advice(start_up).action == "nothing" and "loss scale" in advice(start_up).text
    regular = Cause("periodic", evidence=("the loss is not finite at every 20th step (12 times)",))
    found = advice(event("nonfinite", recovery="never", cause=regular))
    assert "every 20th step" in found.text and "Do not go back" in found.text and "batch" in found.text


def test_waiting_was_right_only_where_it_was_short() -> None:
    short = advice(event(recovery="returned", end=5030))
    assert "Waiting was right" in short.text and "within 25 steps" in short.text
    assert "within 1 step of" in advice(event(recovery="returned", end=5006)).text
    long = advice(event(recovery="returned", end=5900))
    assert "900 steps after it began" in long.text and "Waiting was right" not in long.text
    assert "Next time" in long.text and "cost less" in long.text and "PaLM" in long.source
    assert long.action == "wait" and "Go back" not in long.text
    hot = advice(event(recovery="returned", end=5900, cause=Cause("too-high LR", "schedule", "possible")))
    assert "900 steps" in hot.text and "cost less" not in hot.text, "other data do not mend a rate"


def test_an_odd_batch_that_is_not_odd_by_itself_and_kinds_not_known() -> None:
    alone = event("data_outlier", severity="note", cause=Cause(evidence=("this batch is not odd by itself",)))
    assert "one odd batch" not in advice(alone).text and advice(alone).action == "nothing"
    assert "one odd batch" in advice(event("data_outlier", severity="note", cause=Cause("data outlier"))).text
    drop = event("level_drop", severity="note", recovery="never")
    assert advice(drop).action == "nothing" and advice(drop).source
    epoch = advice(event("collapse", cause=Cause("epoch boundary", "data", "possible")))
    assert "epochs" in epoch.text and "Do not trust" not in epoch.text
