"""The loss detectors on real training traces, where they are at hand: recall and false alarms against labels."""

from __future__ import annotations

import csv
import functools
import json
import math
from pathlib import Path

import pytest

from poise.core.types import Signals
from poise.guard.detectors.chaotic import Chaotic
from poise.guard.detectors.collapse import Collapse
from poise.guard.detectors.fast_spike import FastSpike
from poise.guard.detectors.level_shift import LevelShift
from poise.guard.detectors.nonfinite import NonFinite
from poise.guard.detectors.slow_divergence import SlowDivergence

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"

pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason="the labelled traces are not on this machine")

SLACK = 5
"""Labels are good to about five steps."""


@functools.cache
def alarms(csv_path: Path) -> list[int]:
    """Replay a trace causally; return the steps at which something more than a note was raised."""
    detectors = (NonFinite(), FastSpike(), LevelShift(), SlowDivergence(), Chaotic(), Collapse())
    found: list[int] = []
    with csv_path.open() as file:
        for row in csv.DictReader(file):
            signals = Signals(int(row["step"]), float(row["loss"]), 0.0, 0.0, 0)
            for detector in detectors:
                alarm = detector.update(signals)
                if alarm is not None and alarm.severity != "note":
                    found.append(signals.step)
    return found


def clusters(steps: list[int]) -> int:
    """Count alarms that are more than 50 steps apart as separate."""
    return sum(1 for before, step in zip([-math.inf, *steps], steps, strict=False) if step - before > 50)


def test_labelled_spikes_are_caught_and_healthy_stretches_left_alone() -> None:
    caught, spikes, other_caught, others, outliers = 0, 0, 0, 0, 0
    false_alarms: dict[str, int] = {}
    for labels_path in sorted(TRACES.glob("*.labels.json")):
        name = labels_path.name.removesuffix(".labels.json")
        events = json.loads(labels_path.read_text())["events"]
        raised = alarms(TRACES / f"{name}.csv")
        for event in events:
            hit = any(event["start"] - 2 <= step <= event["end"] for step in raised)
            if event["kind"] == "fast_spike":
                caught, spikes = caught + hit, spikes + 1
            elif event["kind"] == "benign_data_outlier":
                outliers += hit
            elif not event["kind"].startswith("benign"):
                other_caught, others = other_caught + hit, others + 1
        outside = [
            step
            for step in raised
            if not any(event["start"] - SLACK <= step <= event["end"] + SLACK for event in events)
        ]
        if outside:
            false_alarms[name] = clusters(outside)
    story = f"{caught}/{spikes} spikes, {other_caught}/{others} others, {outliers} outliers, false {false_alarms}"
    assert spikes >= 20 and caught >= 0.95 * spikes, story
    assert other_caught == others, story
    assert sum(false_alarms.values()) <= 3, story
    assert outliers <= 2, story


def test_early_transients_raise_nothing() -> None:
    for labels_path in sorted(TRACES.glob("*.labels.json")):
        events = json.loads(labels_path.read_text())["events"]
        for event in events:
            if event["kind"] == "benign_early_transient":
                raised = alarms(labels_path.with_name(labels_path.name.replace(".labels.json", ".csv")))
                assert not [step for step in raised if step <= event["end"]], labels_path.name
