"""Detectors against labelled loss curves of real runs: what they catch, how late, and how often they cry wolf.

    python benchmarks/scoreboard_traces.py PATH_TO_TRACES [--details]

PATH_TO_TRACES is a folder with ``NAME.csv`` (columns ``step,loss[,grad_norm][,lr]``) and ``NAME.labels.json``
(``{"events": [{"kind", "start", "end"}, ...]}``, steps inclusive). The curves are not part of this repository; all are
published; the list is printed at the end. Each curve is replayed causally, one row at a time.

How it is scored. An event is hit when an alarm falls between two steps before its start and its end; the delay is
counted from the start of the label, which hindsight has set to the first raised step. A false alarm is one outside all
labels by more than 5 steps; false alarms at most 50 steps apart are one cluster. Healthy steps are steps (not logged
points) outside all labels. Of our own alarms those of severity critical and warning count; notes do not. Intervals are
Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_rules import peers

from poise.core.types import Alarm, Signals
from poise.guard.detectors.standard import standard

SLACK, EARLY, CLUSTER = 5, 2, 50

SOURCES = """\
Where the curves come from (all public; pick the named file at the named commit and keep step and loss of each line):
  Llama-3.1-8B, MLPerf v5.1     github.com/mlcommons/training_results_v5.1 @ 441d65f4445c, folder Cisco/results,
                                hpf_n16/llama31_8b/result_5.txt, hpf_n8/llama31_8b/result_2.txt and result_4.txt
                                (Apache-2.0; result logs, not MLPerf scores)
  Mixtral 8x7B, Megatron        github.com/NVIDIA/Megatron-LM @ 7b5b8b44cab7, tests/functional_tests/test_cases/mixtral/
                                mixtral_8x7b_alltoall_tp2pp4ep4_release/golden_values_{0.8.0,0.9.0}.json (BSD-3-Clause)
  GPT-3 15B, Megatron           same repository @ 7c926adc2507, tests/functional_tests/test_cases/gpt/
                                gpt3_15b_8t_release/golden_values_dev_dgx_h100.json (BSD-3-Clause)
  GPT-2 52B, BigScience         github.com/bigscience-workshop/bigscience @ 9e64edec2ad1,
                                experiments/gpt2-meg-ds-3d/meg_ds_3d_gpt2_perf_n16-ds-off.out (Apache-2.0)
  GPT-2 124M, llm.c             github.com/HectorFCardenas/llm.c @ 6cbc4b5812c4, gpt2_train.11679010.log (NaN) and
                                gpt2_train.11685414.log (MIT)
  GPT-2 124M, modded-nanogpt    github.com/KellerJordan/modded-nanogpt @ f411b3d346aa, folder records/track_1_short/
                                2024-10-29_Optimizers, runs 95a9fd44-7c13-49c7-b324-3e7d9e23a499 (Adam) and
                                8d6193f4-27fc-4e68-899f-af70019a4d54 (Muon) (MIT)
  TinyStories 17M, cs336        github.com/xiamishaonian111/cs336 @ 3871a66785e3, folder assignment1-basics/experiments,
                                lr_sweep_3e-1 and lr_sweep_1e-3, metrics.jsonl (MIT)
"""


@dataclass(frozen=True, slots=True)
class Event:
    """A labelled interval of steps, ends included."""

    kind: str
    start: int
    end: int

    @property
    def benign(self) -> bool:
        """Whether the right reaction is none."""
        return self.kind.startswith("benign")


@dataclass(frozen=True, slots=True)
class Trace:
    """One replayed curve: ``alarms`` has every rule's raised steps."""

    name: str
    events: tuple[Event, ...]
    steps: tuple[int, ...]
    alarms: dict[str, list[int]]
    ours: list[Alarm]
    microseconds: float


@dataclass(slots=True)
class Score:
    """One rule over all traces."""

    spikes: list[bool] = field(default_factory=list)
    families: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    others: list[bool] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    false_clusters: dict[str, int] = field(default_factory=dict)
    outliers: list[bool] = field(default_factory=list)
    transients: int = 0
    missed: list[str] = field(default_factory=list)


def replay(folder: Path, name: str, alarms_per_10k: float) -> Trace:
    """Run every rule causally over one curve."""
    labels: dict[str, Any] = json.loads((folder / f"{name}.labels.json").read_text())
    events = tuple(Event(e["kind"], int(e["start"]), int(e["end"])) for e in labels["events"])
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    rules = peers(len(rows))
    detectors = standard(alarms_per_10k)
    raised: dict[str, list[int]] = {"poise": [], **{rule: [] for rule in rules}}
    ours: list[Alarm] = []
    spent = 0.0
    for row in rows:
        step, loss = int(row["step"]), float(row["loss"])
        signals = Signals(step, loss, float(row.get("grad_norm") or 0.0), float(row.get("lr") or 0.0), 0)
        start = time.perf_counter()
        found = [alarm for one in detectors if (alarm := one.update(signals)) is not None]
        spent += time.perf_counter() - start
        ours += found
        if any(alarm.severity != "note" for alarm in found):
            raised["poise"].append(step)
        for rule, judge in rules.items():
            if judge(loss):
                raised[rule].append(step)
    return Trace(name, events, tuple(int(row["step"]) for row in rows), raised, ours, 1e6 * spent / len(rows))


def family(name: str) -> str:
    """Return the part of a trace's name that says whose runs it belongs to."""
    for start in ("llama31_8b", "mixtral8x7b"):
        if name.startswith(start):
            return start
    return "other"


def clusters(steps: Sequence[int]) -> int:
    """Count alarms more than ``CLUSTER`` steps apart as separate."""
    return sum(1 for i, step in enumerate(steps) if i == 0 or step - steps[i - 1] > CLUSTER)


def outside(trace: Trace, step: int) -> bool:
    """Whether a step is away from every label."""
    return not any(event.start - SLACK <= step <= event.end + SLACK for event in trace.events)


def healthy_steps(trace: Trace) -> int:
    """Count the steps of a curve that are outside all labels; a point stands for the steps up to the next one."""
    return sum(
        outside(trace, step)
        for here, following in zip(trace.steps, (*trace.steps[1:], trace.steps[-1] + 1), strict=True)
        for step in range(here, following)
    )


def score(rule: str, traces: Sequence[Trace]) -> Score:
    """Compare one rule's alarms with the labels of all traces."""
    total = Score()
    for trace in traces:
        raised = trace.alarms[rule]
        for event in trace.events:
            hits = [step for step in raised if event.start - EARLY <= step <= event.end]
            if event.kind == "benign_data_outlier":
                total.outliers.append(bool(hits))
            elif event.benign:
                total.transients += bool(hits)
            elif event.kind == "fast_spike":
                total.spikes.append(bool(hits))
                total.families[family(trace.name)].append(bool(hits))
                total.delays += [max(hits[0] - event.start, 0)] if hits else []
            else:
                total.others.append(bool(hits))
            if not hits and not event.benign:
                total.missed.append(f"{trace.name} {event.kind} {event.start}-{event.end}")
        count = clusters([step for step in raised if outside(trace, step)])
        if count:
            total.false_clusters[trace.name] = count
    return total


def wilson(hits: int, n: int, z: float = 1.96) -> str:
    """Return ``hits/n`` with Wilson's 95 % interval.

    >>> wilson(9, 10)
    '9/10 (60-98 %)'
    """
    if n == 0:
        return "0/0"
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return f"{hits}/{n} ({100 * max(centre - half, 0):.0f}-{100 * min(centre + half, 1):.0f} %)"


def of(hits: list[bool]) -> str:
    """Return a list of hits as ``wilson`` prints it."""
    return wilson(sum(hits), len(hits))


def print_table(traces: Sequence[Trace]) -> None:
    """Print the scoreboard."""
    healthy = sum(healthy_steps(trace) for trace in traces)
    points = sum(len(trace.steps) for trace in traces)
    print(f"{len(traces)} curves, {points} logged points, {healthy} healthy steps\n")
    header = ("rule", "fast spikes hit", "delay", "other events", "FA", "per 10k", "benign outliers", "transients")
    widths = (12, 21, 6, 20, 4, 8, 22, 10)
    print("  ".join(f"{text:<{width}}" for text, width in zip(header, widths, strict=True)))
    scores = {rule: score(rule, traces) for rule in traces[0].alarms}
    for rule, total in scores.items():
        false = sum(total.false_clusters.values())
        delay = f"{statistics.median(total.delays):g}" if total.delays else "-"
        cells = (rule, of(total.spikes), delay, of(total.others), str(false), f"{1e4 * false / healthy:.2f}")
        cells += (of(total.outliers), str(total.transients))
        print("  ".join(f"{text:<{width}}" for text, width in zip(cells, widths, strict=True)))
    print("\nfast spikes hit, by family")
    for rule, total in scores.items():
        print(f"  {rule:<12}" + "  ".join(f"{name} {of(hits)}" for name, hits in sorted(total.families.items())))
    ours = scores["poise"]
    print(f"\npoise: missed {ours.missed or 'nothing'}")
    print(f"poise: false-alarm clusters {ours.false_clusters or 'none'}")
    noted = [
        any(a.kind == "data_outlier" and event.start < a.step <= event.end + EARLY for a in trace.ours)
        for trace in traces
        for event in trace.events
        if event.kind == "benign_data_outlier"
    ]
    print(f"poise: benign outliers noted as data_outlier (a note) {of(noted)}")
    kinds = Counter((alarm.kind, alarm.severity) for trace in traces for alarm in trace.ours)
    print("poise: alarms by kind " + ", ".join(f"{kind} ({how}) {n}" for (kind, how), n in sorted(kinds.items())))
    cost = statistics.fmean(trace.microseconds for trace in traces)
    print(f"poise: all detectors of an ordinary run together: mean {cost:.0f} microseconds a step on this machine")


def print_details(traces: Sequence[Trace]) -> None:
    """Print the first alarm of each cluster, and whether it lies in a label."""
    for trace in traces:
        last: dict[str, int] = {}
        for alarm in trace.ours:
            if alarm.step - last.get(alarm.kind, -(10**9)) > CLUSTER:
                where = [e.kind for e in trace.events if e.start - SLACK <= alarm.step <= e.end + SLACK]
                print(f"{trace.name} {alarm.step} {alarm.kind} ({alarm.severity}) {where}: {alarm.message}")
            last[alarm.kind] = alarm.step


def main() -> None:
    parser = argparse.ArgumentParser(description="Detectors against labelled loss curves.")
    parser.add_argument("traces", type=Path, help="folder with NAME.csv and NAME.labels.json")
    parser.add_argument("--alarms-per-10k", type=float, default=0.5, help="target of false alarms (default 0.5)")
    parser.add_argument("--details", action="store_true", help="print our alarms one by one")
    options = parser.parse_args()
    names = sorted(path.name.removesuffix(".labels.json") for path in options.traces.glob("*.labels.json"))
    if not names:
        parser.error(f"no *.labels.json in {options.traces}; give the folder of the labelled curves")
    traces = [replay(options.traces, name, options.alarms_per_10k) for name in names]
    print_table(traces)
    if options.details:
        print_details(traces)
    print(f"\n{SOURCES}")


if __name__ == "__main__":
    main()
