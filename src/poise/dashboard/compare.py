"""Several runs on one page: one picture and one table, e.g. the same run clean, with faults, and guarded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from poise.core import journal
from poise.core.errors import UserError
from poise.core.journal import Record, timeline
from poise.dashboard import curves
from poise.dashboard.curves import Line
from poise.dashboard.figures import RUN_COLOURS, ZOOM, Figure, edge_marks, fault_marks, frame, label, trace
from poise.dashboard.incidents import Fault
from poise.dashboard.page import Page
from poise.dashboard.summary import LAST_STEPS, Summary, newest, outcome, summarise
from poise.dashboard.text import MISSING, escape, number

_DASHES: Final = ("solid", "dash", "dot")


def write_comparison(
    runs: Sequence[tuple[str, Path]],
    out: Path,
    title: str,
    note: str,
    rows: Sequence[Mapping[str, object]] = (),
) -> Path:
    """Write a page that compares runs, and return its path.

    Args:
        runs: (label, run folder) for each run, the order of legend and table.
        out: the HTML file to write.
        title: title of the page.
        note: what the reader should know, e.g. how the runs differ; plain text.
        rows: optionally one mapping a run of further table cells by column name; ``weights_finite`` fills the
            column "Weights finite", and a name of a derived column replaces it. What the journals tell
            (losses, outcome, skipped steps, rollbacks) is derived from them.

    Raises:
        UserError: no runs, a folder without a journal, or not as many rows as runs.
        OSError: the file cannot be written.
    """
    if not runs:
        raise UserError("nothing to compare: give at least one run")
    if rows and len(rows) != len(runs):
        raise UserError(f"{len(rows)} rows for {len(runs)} runs; give one row a run or none")
    read = []
    for name, run_dir in runs:
        path = Path(run_dir) / "journal.jsonl"
        if not path.is_file():
            raise UserError(f"no journal '{path}' for the run '{name}'")
        records = journal.read(path)
        read.append((name, records, summarise(records)))
    page = Page(title)
    if note:
        page.paragraph(note, "verdict")
    page.heading("Loss")
    page.paragraph(
        "nats per token, by training step; thin lines are single steps, thick lines are smoothed. " + ZOOM,
        "soft",
    )
    page.figure(_figure(read), f"Loss of {', '.join(name for name, _ in runs)} by training step")
    page.heading("Outcome")
    head, cells = _table(read, rows)
    page.table(head, cells, wide=["Outcome"])
    page.paragraph(
        f"Final loss is the mean over the last {LAST_STEPS} trained steps; NaN if the last was not finite.",
        "soft",
    )
    return page.write(Path(out))


def _table(
    read: Sequence[tuple[str, Sequence[Record], Summary]], rows: Sequence[Mapping[str, object]]
) -> tuple[list[str], list[list[str]]]:
    table: list[dict[str, str]] = []
    for i, (name, records, summary) in enumerate(read):
        row = {
            "Run": name,
            "Final loss": number(summary.loss_last, 3),
            "Validation loss": number(summary.eval_last, 3),
            "Outcome": _outcome(summary),
            "Skipped steps": f"{summary.skipped:,}",
            "Rollbacks": f"{summary.rollbacks:,}",
            "Weights finite": _cell((newest(records, "end") or {}).get("weights_finite")),
        }
        row |= {_column(key): _cell(value) for key, value in (rows[i] if rows else {}).items()}
        table.append(row)
    head = list(dict.fromkeys(name for row in table for name in row))
    if all(row["Weights finite"] == MISSING for row in table):
        head.remove("Weights finite")
    return head, [[row.get(name, MISSING) for name in head] for row in table]


def _outcome(summary: Summary) -> str:
    """Return how the run ended; a run that goes on with NaN weights to the last step has not survived."""
    dead = "loss not finite" if summary.loss_last is not None and not math.isfinite(summary.loss_last) else ""
    return ": ".join(part for part in (outcome(summary), summary.message, dead) if part)


def _column(name: str) -> str:
    return name[:1].upper() + name[1:].replace("_", " ")


def _cell(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 3)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figure(read: Sequence[tuple[str, Sequence[Record], Summary]]) -> Figure:
    drawn = []
    for _, records, _ in read:
        steps = [r for r in timeline(records) if r["type"] == "step"]
        trained = curves.line(curves.trained(steps), "loss").finite()
        drawn.append((curves.line(steps, "loss"), Line(trained.steps, curves.smooth(trained.values))))
    views = [curves.view(every.finite().values, smoothed.values) for every, smoothed in drawn if len(every)]
    low, high = (min(v[0] for v in views), max(v[1] for v in views)) if views else (0.0, 1.0)
    ends = [s for every, _ in drawn if len(every) for s in (every.steps.min(), every.steps.max())]
    span = (float(min(ends)), float(max(ends))) if ends else (0.0, 1.0)
    traces: list[dict[str, Any]] = []
    deaths: list[dict[str, Any]] = []
    for i, ((name, _, _), (every, smoothed)) in enumerate(zip(read, drawn, strict=True)):
        traces += _run_traces(i, escape(name), every, smoothed, high)
        deaths += _death(i, name, every, span)
    faults = _faults([summary for _, _, summary in read])
    figure = frame([*traces, *fault_marks(faults)], faults, span, height=480)
    figure["layout"]["yaxis"]["range"] = [low, high]
    figure["layout"]["annotations"] += deaths
    return figure


def _run_traces(i: int, name: str, every: Line, smoothed: Line, high: float) -> list[dict[str, Any]]:
    colour, dash = _colour(i), _DASHES[i // RUN_COLOURS % len(_DASHES)]
    raw = trace(every.finite().thinned(), name, colour, width=1.0, opacity=0.45, dash=dash)
    mean = trace(smoothed.thinned(), name, colour, width=2.6, dash=dash)
    edges = [{**mark, "showlegend": False} for mark in edge_marks(every, high, colour, at=_lane(i))]
    return [{**t, "legendgroup": f"run{i}"} for t in ({**raw, "showlegend": False}, mean, *edges)]


def _death(i: int, name: str, every: Line, span: tuple[float, float]) -> list[dict[str, Any]]:
    """Return a label where a run lost its loss for good."""
    lost = curves.stretches(~np.isfinite(every.values))
    if not lost or lost[-1][-1] != len(every) - 1:
        return []
    first = float(every.steps[lost[-1][0]])
    share = (first - span[0]) / ((span[1] - span[0]) or 1.0)
    note = label(first, _lane(i), share, f"{name}: loss not finite", _colour(i))
    return [
        {
            **note,
            "xanchor": "left" if share < 0.5 else "right",
            "yanchor": "top",
            "yshift": -5,
            "bgcolor": "$ground",
        }
    ]


def _colour(i: int) -> str:
    return f"$run{i % RUN_COLOURS}"


def _lane(i: int) -> float:
    """Return the height of a run's marks: each run has its own, so that they do not cover each other."""
    return max(0.5, 1.0 - 0.05 * i)


def _faults(summaries: Sequence[Summary]) -> list[Fault]:
    """Return the faults of all runs, those that two runs share once."""
    found = {fault for summary in summaries for fault in summary.faults}
    return sorted(found, key=lambda fault: (fault.first, fault.name, fault.last))
