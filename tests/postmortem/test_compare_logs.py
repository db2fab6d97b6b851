"""Do two runs share their data, and does what happened to one come from it?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from poise.core.journal import to_json
from poise.postmortem.compare import Comparison, _binomial, _mostly, compare, explain_with
from poise.postmortem.diagnosis import beside, diagnose
from poise.postmortem.event import Cause, Event
from poise.postmortem.log import Log, read_log

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
N = 3000
STEPS = np.arange(1, N + 1)


def batches(seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


def run(
    name: str,
    data: np.ndarray,
    seed: int,
    *,
    own: float = 0.3,
    spikes: Sequence[int] = (),
    odd: Sequence[int] = (),
    every: int = 1,
) -> Log:
    """A run whose noise is its batches' and, by ``own``, its own."""
    n = len(data)
    noise = data + own * np.random.default_rng(seed).standard_normal(n)
    x = np.log(2.5 + 6.0 * np.exp(-np.arange(n) / 300.0)) + 0.01 * noise
    for start in spikes:
        x[start - 1 : start + 39] += 0.3 * np.exp(-np.arange(40) / 12.0)
    for step in odd:
        x[step - 1] += 0.15
    steps = np.arange(1, n + 1)
    keep = steps % every == 0
    return Log(Path(name), name, "table", {"loss": (steps[keep], np.exp(x)[keep])})


def events(spikes: Sequence[int] = (), odd: Sequence[int] = (), **more: object) -> list[Event]:
    rows = [("fast_spike", "warning", s, 40) for s in spikes] + [("data_outlier", "note", s, 1) for s in odd]
    fields = {"baseline": 3.0, "value": 4.0, "recovery": "returned"} | more
    found = [Event(k, v, s, s, s + n - 1, points=n, **fields) for k, v, s, n in rows]  # type: ignore[arg-type]
    return sorted(found, key=lambda e: e.start)


def pair(a: dict[str, object], b: dict[str, object], seeds: tuple[int, int] = (0, 0)) -> Comparison:
    one = run("one", batches(seeds[0]), 10, **a)  # type: ignore[arg-type]
    two = run("two", batches(seeds[1]), 20, **b)  # type: ignore[arg-type]
    found = [events(side.get("spikes", ()), side.get("odd", ())) for side in (a, b)]  # type: ignore[arg-type]
    return compare(one, two, *found)


def test_odd_batches_of_one_order_are_the_data() -> None:
    odd = [500, 1200, 1900, 2600]
    found = pair({"odd": odd}, {"odd": odd})
    assert (found.order, found.verdict) == ("same", "data")
    assert found.low < found.correlation < found.high and 0.85 < found.correlation < 0.97
    assert [(s.start, s.also) for s in found.seen] == [(s, True) for s in odd]
    cause = explain_with(events(odd=odd)[0], found).cause
    assert (cause.name, cause.kind, cause.certainty) == ("data outlier", "data", "likely")
    assert "two is" in cause.evidence[0] and "step 500" in cause.evidence[0]


def test_an_odd_batch_that_only_one_run_has_is_not_the_data() -> None:
    odd = [500, 1200, 1900, 2600]
    found = pair({"odd": odd}, {})
    assert (found.order, found.verdict) == ("same", "not (only) data")
    before = dataclasses.replace(events(odd=odd)[0], cause=Cause("data outlier", "data", "likely", ("one step",)))
    cause = explain_with(before, found).cause
    assert cause.name == "unknown" and "not odd by itself" in cause.evidence[0] and "one step" in cause.evidence


def test_spikes_of_one_order() -> None:
    spikes = [600, 1300, 2100]
    together = pair({"spikes": spikes}, {"spikes": [s + 3 for s in spikes]})
    assert (together.verdict, together.coincide, together.of) == ("data", 3, 3) and together.p < 0.01
    assert explain_with(events(spikes)[0], together).cause.name == "data"
    apart = pair({"spikes": spikes}, {"spikes": [900, 1700, 2500]})
    assert (apart.verdict, apart.coincide) == ("not (only) data", 0)
    cause = explain_with(events(spikes)[0], apart).cause
    assert cause.name == "unknown" and "did not leave its trend" in cause.evidence[-1]
    assert pair({"spikes": spikes}, {}).verdict == "not (only) data"


def test_other_data_says_so_and_cannot_tell() -> None:
    found = pair({"spikes": [600, 1300]}, {"spikes": [900, 2000]}, seeds=(0, 1))
    assert (found.order, found.verdict, found.seen) == ("other", "cannot tell", ())
    assert abs(found.correlation) < 0.1
    assert explain_with(events([600])[0], found) == events([600])[0]
    same_steps = pair({"spikes": [600, 1300, 2100]}, {"spikes": [600, 1300, 2100]}, seeds=(0, 1))
    assert (same_steps.order, same_steps.verdict) == ("other", "not (only) data")


def test_nothing_to_compare_too_short_and_copies() -> None:
    assert pair({}, {}).verdict == "cannot tell"
    short = run("short", batches(0, 40), 1)
    assert "too few" in compare(short, short, [], []).evidence[0]
    late = Log(Path("l"), "late", "table", {"loss": (STEPS + 10 * N, run("x", batches(0), 1).series["loss"][1])})
    assert "0 common steps" in compare(run("one", batches(0), 1), late, [], []).evidence[0]
    one = run("one", batches(0), 1, spikes=[600])
    copy = compare(one, one, events([600]), events([600]))
    assert copy.verdict == "cannot tell" and "copies of one run" in copy.evidence[0]
    no_loss = Log(Path("n"), "n", "table", {"val_loss": one.series["loss"]})
    assert compare(one, no_loss, [], []).verdict == "cannot tell"


def test_a_run_continued_twice_is_compared_from_the_fork() -> None:
    one = run("one", batches(0), 1, spikes=[600, 2500])
    loss = one.series["loss"][1].copy()
    other = run("two", batches(5), 2)
    loss[1500:] = other.series["loss"][1][1500:]
    two = Log(Path("two"), "two", "table", {"loss": (STEPS, loss)})
    found = compare(one, two, events([600, 2500]), events([600]))
    assert (found.order, found.of, found.coincide) == ("other", 1, 0)
    assert any("one run continued twice" in s for s in found.evidence)


def test_a_shifted_order_is_found() -> None:
    data = batches(0, N + 200)
    one = run("one", data[200:], 10, odd=[1000])
    two = run("two", data[:N], 20, odd=[1200])
    found = compare(one, two, events(odd=[1000]), events(odd=[1200]))
    assert (found.order, found.shift, found.verdict) == ("shifted", 200, "data")


def test_an_order_shared_for_a_part() -> None:
    data = batches(0)
    parted = np.concatenate([data[:1800], batches(1)[1800:]])
    odd = [1000, 2500]
    found = compare(
        run("one", data, 10, odd=odd), run("two", parted, 20, odd=[1000]), events(odd=odd), events(odd=[1000])
    )
    assert found.order == "partly"
    assert [s.start for s in found.seen] == [1000], "at 2500 they see other data"


def test_logs_of_different_intervals() -> None:
    found = pair({}, {"every": 5})
    assert found.order == "same" and "every 1 and every 5" in found.evidence[-1]
    fine = run("fine", batches(0, 9000), 10)
    steps, loss = run("coarse", batches(0, 9000), 20).series["loss"]
    means = np.exp(np.log(loss).reshape(-1, 10).mean(axis=1))
    averaged = Log(Path("c"), "coarse", "table", {"loss": (steps[9::10], means)})
    found = compare(fine, averaged, [], [])
    assert found.order == "same" and "means over 10 steps" in found.evidence[0]
    assert compare(averaged, fine, [], []).order == "same"
    assert compare(run("other", batches(3, 9000), 10), averaged, [], []).order == "other"


def test_spikes_of_the_schedule_are_left_out() -> None:
    log = run("one", batches(0), 10, spikes=[600]), run("two", batches(0), 20, spikes=[600])
    scheduled = events([600], cause=Cause("schedule", "schedule", "likely", ("warm-up",)))
    found = compare(*log, scheduled, scheduled)
    assert (found.of, found.verdict) == (0, "cannot tell")


def test_the_interval_holds_on_unrelated_runs_and_the_record_is_json() -> None:
    inside = 0
    for seed in range(20):
        found = compare(run("a", batches(seed), 1001), run("b", batches(100 + seed), 1002), [], [])
        inside += found.low <= 0 <= found.high
        assert found.order == "other"
    assert inside >= 16
    assert json.loads(to_json(found.record()))["order"] == "other"


real = pytest.mark.skipif(not TRACES.is_dir(), reason="the labelled traces are not on this machine")


def labelled(name: str) -> tuple[Log, list[Event]]:
    """Return a trace and its labels as events."""
    kinds = {"fast_spike": "fast_spike", "benign_data_outlier": "data_outlier"}
    found = []
    for r in json.loads((TRACES / f"{name}.labels.json").read_text())["events"]:
        if r["kind"] in kinds:
            spans = r["start"], r["peak_step"], r["end"], r["baseline"], r["peak_loss"], r["points"]
            found.append(Event(kinds[r["kind"]], "warning", *spans, "returned"))  # type: ignore[arg-type]
    return read_log(TRACES / f"{name}.csv"), found


@real
def test_two_optimizers_on_the_same_batches() -> None:
    (adam, own), (muon, other) = (labelled(f"gpt2_124m_modded_nanogpt_{name}") for name in ("adam", "muon"))
    found = compare(adam, muon, own, other)
    assert (found.order, found.verdict) == ("same", "data") and found.low > 0.98
    assert sum(s.also for s in found.seen) >= 16 and len(found.seen) == 17
    explained = [explain_with(e, found).cause for e in own]
    assert sum((c.name, c.certainty) == ("data outlier", "likely") for c in explained) >= 16


@real
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("mixtral8x7b_megatron_core080", "mixtral8x7b_megatron_core090"),
        ("llama31_8b_mlperf_cisco_n16_run5", "llama31_8b_mlperf_cisco_n8_run4"),
        ("llama31_8b_mlperf_cisco_n8_run4", "llama31_8b_mlperf_cisco_n8_run2"),
    ],
)
def test_other_orders_and_other_seeds(a: str, b: str) -> None:
    one, two = labelled(a), labelled(b)
    found = compare(one[0], two[0], one[1], two[1])
    assert (found.order, found.verdict) == ("other", "cannot tell") and abs(found.correlation) < 0.1


def test_half_of_the_odd_batches_are_no_verdict() -> None:
    assert pair({"odd": [500, 1200]}, {"odd": [500]}).verdict == "cannot tell"
    assert pair({"odd": [500, 1200, 1900]}, {"odd": [500, 1200]}).verdict == "data", "two by chance are rare"
    assert pair({"odd": [500, 1200, 1900]}, {"odd": [500]}).verdict == "not (only) data"
    assert pair({"spikes": [600, 1300]}, {"spikes": [600, 2500]}).verdict == "cannot tell"


def test_the_bar_of_the_verdict() -> None:
    assert not _mostly(1, 2, 0.001) and _mostly(2, 3, 0.001) and not _mostly(2, 3, 0.02)
    assert _mostly(4, 5, 0.02) and not _mostly(2, 2, 0.02) and not _mostly(4, 5, 0.2)
    assert _binomial(1, 3, 0.1) == pytest.approx(1 - 0.9**3) and _binomial(0, 4, 0.3) == pytest.approx(1.0)


def test_a_batch_that_is_not_odd_in_the_other_run_is_told_without_a_contradiction() -> None:
    one, two = run("one", batches(0), 10, odd=[500]), run("two", batches(0), 20)
    loss = two.series["loss"][1].copy()
    loss[499] *= 0.98
    two = dataclasses.replace(two, series={"loss": (STEPS, loss)})
    told, _ = beside(diagnose(one), diagnose(two))
    (outlier,) = [e for e in told.events if e.start == 500]
    assert "deviations below its trend" in outlier.cause.evidence[0] and "-" not in outlier.cause.evidence[0]
    assert "one odd batch" not in outlier.advice.text and outlier.advice.action == "nothing"
