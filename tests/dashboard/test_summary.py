"""The figures of a run, and events joined with what was decided about them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from poise.core import journal
from poise.dashboard.incidents import GAP, Fault, faults, group, incidents
from poise.dashboard.summary import render_text, summarise, verdict


def test_figures_of_a_healthy_run(made):
    maker = made("healthy")
    steps = [r for r in maker.records if r["type"] == "step"]
    summary = summarise(maker.records)
    assert (summary.state, summary.step, summary.total_steps) == ("finished", 400, 400)
    assert summary.loss_first == steps[0]["loss"]
    assert summary.loss_last == pytest.approx(sum(r["loss"] for r in steps[-10:]) / 10)
    assert summary.tokens == 400 * 4096 and summary.parameters == 10_600_000
    assert summary.wall_s == pytest.approx(maker.records[-1]["time"] - maker.records[0]["time"])
    assert summary.productive == pytest.approx(sum(r["seconds"] for r in steps) / summary.wall_s)
    assert 0.97 < summary.productive < 1
    assert min(r["tokens_per_s"] for r in steps) < summary.tokens_per_s < max(r["tokens_per_s"] for r in steps)
    evals = [r["loss"] for r in maker.records if r["type"] == "eval"]
    assert (summary.eval_last, summary.eval_best) == (evals[-1], min(evals))
    assert (summary.events, summary.skipped, summary.rollbacks, summary.lost_steps) == (0, 0, 0, 0)


def test_skips_and_injected_faults(made):
    summary = summarise(made("spiked").records)
    assert (summary.events, summary.skipped) == (2, 2)
    assert summary.actions == (("skip", 2),)
    assert summary.faults == (Fault("garbage_batch", 150, 150), Fault("garbage_batch", 263, 263))
    first = summary.incidents[0]
    assert (first.step, first.kind, first.action, first.injected) == (
        150,
        "fast_spike",
        "skip",
        "garbage_batch",
    )
    assert first.loss == 10.4 and "would undo many steps" in first.reason
    assert verdict(summary).endswith("2 events, 2 skipped steps, 0 rollbacks.")


def test_a_skipped_loss_is_not_the_final_loss(made):
    maker = made("healthy")
    maker.records.pop()
    maker.step(401, loss=50.0, action="skip")
    maker.end(401)
    assert summarise(maker.records).loss_last < 4


def test_rollback_costs_time_and_steps(made):
    summary = summarise(made("rolled_back").records)
    assert (summary.rollbacks, summary.lost_steps, summary.skipped) == (1, 50, 0)
    assert summary.productive == pytest.approx(400 / 450, abs=0.02)
    assert [i.action for i in summary.incidents] == ["rollback"]


def test_order_of_step_event_decision_does_not_matter(made):
    for order in ((0, 1, 2), (1, 2, 0), (1, 0, 2)):
        maker = made("healthy")
        maker.records = maker.records[:20]
        maker.step(20, loss=30.0, action="rollback")
        maker.alarm(20, "rollback")
        block = maker.records[-3:]
        maker.records[-3:] = [block[i] for i in order]
        maker.add("rollback", step=20, to=10)
        found = incidents(maker.records)
        assert [(i.step, i.action, i.loss) for i in found] == [(20, "rollback", 30.0)], order


def test_step_record_after_the_rollback_still_belongs_to_it(made):
    maker = made("healthy")
    maker.records = maker.records[:20]
    maker.alarm(20, "rollback")
    maker.add("rollback", step=20, to=10)
    maker.step(20, loss=30.0, action="rollback")
    maker.steps(11, 20)
    maker.alarm(20, "skip")
    assert [(i.step, i.action) for i in incidents(maker.records)] == [(20, "rollback"), (20, "skip")]


def test_decision_without_events_is_an_incident(made):
    maker = made("healthy")
    maker.records = maker.records[:20]
    maker.add("decision", step=20, action="clip", reason="r", alarms=["norm_spike"])
    maker.step(21, action="skip")
    assert [(i.step, i.kind, i.action) for i in incidents(maker.records)] == [
        (20, "norm_spike", "clip"),
        (21, "decision", "skip"),
    ]


def test_repetitions_are_folded_and_keep_the_worst(made):
    maker = made("healthy")
    maker.records = maker.records[:20]
    for step, value in ((100, 5.0), (101, 9.0), (102, 6.0), (102 + GAP, 5.0), (103 + 2 * GAP, 5.0)):
        maker.step(step, loss=value, action="skip")
        maker.alarm(step, "skip", value=value)
    folded = group(incidents(maker.records))
    assert [(i.step, i.last, i.count, i.value) for i in folded] == [(100, 107, 4, 9.0), (113, 113, 1, 5.0)]
    summary = summarise(maker.records)
    assert (summary.events, summary.skipped) == (5, 5)


def test_second_pass_over_a_step_is_another_moment(made):
    maker = made("healthy")
    maker.records = maker.records[:20]
    maker.alarm(20, "rollback", value=30.0)
    maker.add("rollback", step=20, to=19)
    maker.alarm(20, "skip", value=40.0)
    maker.step(20, loss=40.0, action="skip")
    assert [(i.value, i.action) for i in incidents(maker.records)] == [(30.0, "rollback"), (40.0, "skip")]
    assert summarise(maker.records).actions == (("rollback", 1), ("skip", 1))


def test_alarm_inside_a_long_fault_is_injected(made):
    maker = made("healthy")
    maker.records = maker.records[:20]
    maker.add("event", step=20, kind="high_lr", detector="injector", injected="high_lr", length=5)
    for step in range(20, 30):
        maker.step(step)
        maker.alarm(step, "skip")
    assert [i.injected for i in incidents(maker.records)] == ["high_lr"] * 5 + [""] * 5


def test_faults_of_several_records(made):
    maker = made("healthy")
    maker.step(401, injected="high_lr")
    maker.step(402, injected="high_lr")
    maker.add("event", step=500, kind="inf", detector="injector", injected="inf", length=12)
    assert faults(maker.records) == [Fault("high_lr", 401, 402), Fault("inf", 500, 511)]


@pytest.mark.parametrize(
    ("tail", "state"),
    [
        ([("end", {"step": 400, "reason": "halted", "message": "budget used up"})], "halted"),
        (
            [("end", {"step": 400, "reason": "stopped"}), ("restart", {"step": 300, "reason": "resumed"})],
            "partial",
        ),
        ([("end", {"step": 400, "reason": "SIGTERM"})], "stopped"),
        ([], "partial"),
    ],
)
def test_how_a_run_ended(made, tail, state):
    maker = made("healthy")
    maker.records.pop()
    for kind, fields in tail:
        maker.add(kind, **fields)
    assert summarise(maker.records).state == state


def test_time_between_crash_and_restart_is_not_wall_time(made):
    maker = made("crashed")
    before = summarise(maker.records).wall_s
    maker.time += 86_400
    maker.add("restart", step=200, reason="resumed from step 200")
    maker.steps(201, 400)
    summary = summarise(maker.records)
    assert before < summary.wall_s < before + 70
    assert (summary.restarts, summary.lost_steps) == (1, 17)


def test_final_loss_of_a_dead_run_is_nan(made):
    summary = summarise(made("with_nan", guarded=False).records)
    assert math.isnan(summary.loss_last) and summary.nonfinite_steps == 201
    assert summary.productive < 0.5


def test_text_at_the_end_of_a_run(made, tmp_path):
    maker = made("spiked")
    text = render_text(summarise(maker.records), tmp_path, ["poise resume x"])
    assert "Finished 400 of 400 steps." in text and "poise resume x" in text
    assert "8.98 -> 3.33" in text and "2 events, 2 x skip" in text
    assert "step 150: fast spike, loss 10.40 (expected 3.60), injected: skipped the update" in text
    assert "report.html" not in text, "the report has not been written"
    (tmp_path / "report.html").touch()
    assert str(tmp_path / "report.html") in render_text(summarise(maker.records), tmp_path)


def test_many_incidents_are_cut_in_the_terminal(made):
    maker = made("healthy")
    for i in range(30):
        maker.alarm(500 + 20 * i, "skip")
    text = render_text(summarise(maker.records), Path("run"))
    assert "and 22 more, all in the report" in text and len(text.splitlines()) < 20


def test_empty_journal(made):
    summary = summarise([])
    assert summary.state == "empty" and verdict(summary) == "No step was recorded."
    assert "No step was recorded" in render_text(summary, Path("run"))


@pytest.mark.parametrize("name", ["healthy", "spiked", "with_nan", "rolled_back", "crashed"])
def test_made_up_journals_are_journals(made, tmp_path, name):
    """What these tests make up has the fields that the journal asks for, and its reader reads all of it."""
    maker = made(name)
    for record in maker.records:
        assert set(journal.FIELDS[record["type"]]) <= set(record), record
    read = journal.read(maker.write(tmp_path / "run") / "journal.jsonl")
    assert [(r["type"], r.get("step")) for r in read] == [(r["type"], r.get("step")) for r in maker.records]
    assert repr(read) == repr(maker.records)
