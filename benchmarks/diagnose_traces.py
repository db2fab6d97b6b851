"""``poise diagnose`` against labelled loss curves of real runs: what it finds with hindsight, and what it makes up.

    python benchmarks/diagnose_traces.py PATH_TO_TRACES [--details] [--every K] [--drop K] [--bits] [--offset N]

PATH_TO_TRACES is a folder with ``NAME.csv`` and ``NAME.labels.json`` as for ``scoreboard_traces.py``, whose list of
sources holds here too. The curves are not part of this repository.

How it is scored. A labelled event is found when an event of severity warning or critical (for a benign one: of any)
overlaps it, or begins within the 2 steps before it.
A false event is one of severity warning or critical that lies outside all
labels by more than 5 steps; false ones at most 50 steps apart are one cluster. Benign outliers count as recognised when
the event there is a note. The end is the last step off the trend, compared with the label's for spikes.

The options ask whether the answers depend on how a run was logged: every K-th row alone, every K-th row missing, losses
in bits, steps counted from elsewhere. The labels are moved along; those of which no raised row is left are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scoreboard_traces import EARLY, SLACK, clusters, wilson

from poise.postmortem.event import Event
from poise.postmortem.events import find
from poise.postmortem.log import Log, read_log

BENIGN = "benign"


@dataclass(slots=True)
class Score:
    """All curves together."""

    spikes: list[bool] = field(default_factory=list)
    others: list[bool] = field(default_factory=list)
    outliers: list[bool] = field(default_factory=list)
    alarmed: int = 0
    transients: int = 0
    ends: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    false: dict[str, int] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    healthy: int = 0
    points: int = 0
    seconds: float = 0.0
    recovery: Counter[str] = field(default_factory=Counter)


def changed(log: Log, options: argparse.Namespace) -> Log:
    """Return the log as it would have been written otherwise."""
    series = {}
    for name, (steps, values) in log.series.items():
        keep = slice(None, None, options.every)
        s, v = steps[keep] + options.offset, values[keep]
        if options.drop:
            kept = [i for i in range(len(s)) if (i + 1) % options.drop]
            s, v = s[kept], v[kept]
        series[name] = s, v / math.log(2) if options.bits and name == "loss" else v
    return Log(log.path, log.name, log.format, series)


def visible(log: Log, event: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a labelled spike or outlier still shows: a row that is left of it is 4 % above its baseline."""
    if "baseline" not in event:
        return True
    steps, values = log.series["loss"]
    inside = (steps >= event["start"] + options.offset) & (steps <= event["end"] + options.offset)
    unit = math.log(2) if options.bits else 1.0
    return bool(inside.any()) and float(values[inside].max()) * unit >= 1.04 * event["baseline"]


def judge(log: Log, labels: dict[str, Any], options: argparse.Namespace, total: Score) -> None:
    """Add one curve to the score."""
    began = time.perf_counter()
    found = find(log)
    total.seconds += time.perf_counter() - began
    steps = log.series["loss"][0]
    shown = [e for e in labels["events"] if visible(log, e, options)]
    events = [(e["kind"], e["start"] + options.offset, e["end"] + options.offset) for e in shown]
    acute = [e for e in found if e.severity != "note"]
    for kind, start, end in events:
        hits = [e for e in found if e.end >= start and e.start <= end] or [
            e for e in found if start - EARLY <= e.start <= end
        ]
        loud = [e for e in hits if e.severity != "note"]
        if kind == "benign_data_outlier":
            total.outliers.append(any(e.kind == "data_outlier" for e in hits))
            total.alarmed += bool(loud)
        elif kind.startswith(BENIGN):
            total.transients += bool(loud)
        elif kind == "fast_spike":
            total.spikes.append(bool(loud))
            if loud:
                total.ends.append(max(e.end for e in loud) - end)
                total.starts.append(min(e.start for e in loud) - start)
                total.recovery[loud[-1].recovery] += 1
        else:
            total.others.append(bool(loud))
        if not loud and not kind.startswith(BENIGN):
            total.missed.append(f"{log.name} {kind} {start}-{end}")
    outside = [e for e in acute if not any(a - SLACK <= e.end and e.start <= b + SLACK for _, a, b in events)]
    if outside:
        total.false[log.name] = clusters([e.start for e in outside])
    inside = sum(min(b + SLACK, int(steps[-1])) - max(a - SLACK, int(steps[0])) for _, a, b in events)
    total.healthy += int(steps[-1] - steps[0]) - inside
    total.points += len(steps)
    if options.details:
        print_details(log.name, found, events)


def print_details(name: str, found: list[Event], events: list[tuple[str, int, int]]) -> None:
    """Print every event of one curve that is more than a note, and whether it lies in a label."""
    for e in found:
        if e.severity == "note":
            continue
        where = [kind for kind, a, b in events if a - SLACK <= e.end and e.start <= b + SLACK]
        rise = f"{e.rise:+.1%}" if math.isfinite(e.rise) else "not finite"
        print(f"{name} {e.start}-{e.peak}-{e.end} {e.kind} ({e.severity}) {rise}, {e.recovery} {where}")


def main() -> None:
    parser = argparse.ArgumentParser(description="poise diagnose against labelled loss curves.")
    parser.add_argument("traces", type=Path, help="folder with NAME.csv and NAME.labels.json")
    parser.add_argument("--details", action="store_true", help="print events one by one")
    parser.add_argument("--every", type=int, default=1, help="keep every K-th row")
    parser.add_argument("--drop", type=int, default=0, help="leave every K-th row out")
    parser.add_argument("--bits", action="store_true", help="losses in bits")
    parser.add_argument("--offset", type=int, default=0, help="add to all steps")
    options = parser.parse_args()
    names = sorted(path.name.removesuffix(".labels.json") for path in options.traces.glob("*.labels.json"))
    if not names:
        parser.error(f"no *.labels.json in {options.traces}; give the folder of the labelled curves")
    total = Score()
    for name in names:
        log = changed(read_log(options.traces / f"{name}.csv"), options)
        judge(log, json.loads((options.traces / f"{name}.labels.json").read_text()), options, total)
    false = sum(total.false.values())
    print(f"{len(names)} curves, {total.points} points, {total.healthy} healthy steps")
    print(f"fast spikes found            {wilson(sum(total.spikes), len(total.spikes))}")
    print(f"other events found           {wilson(sum(total.others), len(total.others))}")
    print(f"missed                       {total.missed or 'nothing'}")
    print(
        f"false events, in clusters    {false} = {1e4 * false / total.healthy:.2f} in 10k healthy steps {total.false}"
    )
    within = sum(abs(d) <= 10 for d in total.ends)
    print(
        f"end of spikes                {within}/{len(total.ends)} within 10 steps of the label, "
        f"median error {statistics.median(map(abs, total.ends)):g}, largest {max(map(abs, total.ends))}"
    )
    print(f"start of spikes              {sum(abs(d) <= 10 for d in total.starts)}/{len(total.starts)} within 10 steps")
    print(f"recovery of labelled spikes  {dict(total.recovery)}")
    print(f"benign outliers as notes     {wilson(sum(total.outliers), len(total.outliers))}; {total.alarmed} as alarms")
    print(f"early transients as alarms   {total.transients}")
    print(f"time                         {1e6 * total.seconds / total.points:.1f} microseconds a point")


if __name__ == "__main__":
    main()
