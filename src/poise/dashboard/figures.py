"""The pictures of a run as plotly figures: plain dicts, ready for JSON.

A colour is written ``$name``; the page looks it up in its light or dark palette, so one figure serves both.
Every picture has a second, hidden value axis ``y2`` from 0 to 1: marks at its ends sit on the edge of the
picture wherever one zooms to: the place for values that have none (NaN, infinity, off the scale).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from poise.core.journal import Record, timeline
from poise.dashboard import curves
from poise.dashboard.curves import Floats, Line
from poise.dashboard.incidents import Fault, Incident
from poise.dashboard.summary import Summary, action_text
from poise.dashboard.text import hover, is_number, number

Figure = dict[str, Any]

LEVELS: Final = 3
"""Lines for the labels of faults; neighbours are written on different ones."""

ZOOM: Final = "Drag to zoom in, double-click to zoom out."
"""How to use a picture."""

_MARKS: Final[dict[str, tuple[str, str, str]]] = {
    "skip": ("skipped", "diamond", "$warn"),
    "clip": ("clipped", "triangle-down", "$note"),
    "lower_lr": ("lowered the learning rate", "triangle-left", "$warn"),
    "reset_moments": ("reset the moments", "pentagon", "$warn"),
    "drop_data": ("dropped data", "hexagon", "$warn"),
    "rollback": ("rolled back", "square", "$bad"),
    "halt": ("halted", "x", "$bad"),
}
"""Action -> (legend, plotly symbol, colour). Shape and colour both tell them apart."""

RUN_COLOURS: Final = 6
"""Colours of runs, or of sources, in the palette; further ones begin again."""

_NOTICED: Final = ("event, step taken", "circle-open", "$note")


def run_figures(records: Sequence[Record], summary: Summary) -> list[tuple[str, str, Figure]]:
    """Return (title, what it shows, figure) for every picture the journal has data for."""
    steps = [r for r in timeline(records) if r["type"] == "step"]
    out = [("Loss", f"nats per token, by training step. {ZOOM}", _loss_figure(records, steps, summary))]
    if sources := _by_source(steps):
        said = "nats per token, smoothed: a source whose loss leaves the others' course is where to look first"
        out.append(("Loss by source", said, _source_figure(sources, summary.faults)))
    for name, title, text, colour, log in (
        ("grad_norm", "Gradient norm", "before clipping, logarithmic scale", "$grad", True),
        ("lr", "Learning rate", "", "$lr", False),
        ("tokens_per_s", "Speed", "tokens per second", "$speed", False),
    ):
        series = curves.line(steps, name)
        if len(series):
            out.append((title, text, _plain_figure(series, name, colour, log, summary.faults)))
    return out


def _loss_figure(records: Sequence[Record], steps: Sequence[Record], summary: Summary) -> Figure:
    every = curves.line(steps, "loss")
    finite = every.finite()
    trained = curves.line(curves.trained(steps), "loss").finite()
    smoothed = Line(trained.steps, curves.smooth(trained.values))
    low, high = curves.view(finite.values, smoothed.values)
    traces = [
        *_abandoned(records),
        trace(finite.thinned(), "loss", "$loss", width=1.2, opacity=0.8),
        trace(smoothed.thinned(), "smoothed", "$smooth", width=2.4),
        *_validation(records),
        *edge_marks(every, high, "$bad"),
        *_incident_marks(summary.incidents, finite, low, high),
        *_rollback_marks(records),
        *fault_marks(summary.faults),
    ]
    figure = frame(traces, summary.faults, _span(every), height=430)
    figure["layout"]["yaxis"].update(range=[low, high])
    figure["layout"]["shapes"] += _rollback_bands(records)
    return figure


def _by_source(steps: Sequence[Record]) -> dict[str, Line]:
    """Return the loss of each source of a mixture, by name; empty where nothing is mixed."""
    found = [(r["step"], r["source_losses"]) for r in steps if isinstance(r.get("source_losses"), dict)]
    names = sorted({name for _, losses in found for name in losses})
    lines = {name: curves.line([{"step": s, name: losses.get(name)} for s, losses in found], name) for name in names}
    return {name: line.finite() for name, line in lines.items() if len(line.finite())}


def _source_figure(sources: Mapping[str, Line], faults: Sequence[Fault]) -> Figure:
    traces = [
        trace(Line(line.steps, curves.smooth(line.values)).thinned(), hover(name), f"$run{i % RUN_COLOURS}", width=1.6)
        for i, (name, line) in enumerate(sources.items())
    ]
    steps = np.concatenate([line.steps for line in sources.values()])
    return frame(traces, faults, (float(steps.min()), float(steps.max())), height=260, labels=False)


def _plain_figure(series: Line, name: str, colour: str, log: bool, faults: Sequence[Fault]) -> Figure:
    shown = series.finite()
    if log:
        positive = shown.values > 0
        shown = Line(shown.steps[positive], shown.values[positive])
    traces = [
        trace(shown.thinned(), name.replace("_", " "), colour, width=1.4),
        *edge_marks(series, np.inf, "$bad"),
    ]
    figure = frame(traces, faults, _span(series), height=190, labels=False, legend=False)
    axis = figure["layout"]["yaxis"]
    if log:
        axis.update(type="log", dtick="D2" if _decades(shown.values) < 1 else 1)
    else:
        axis.update(rangemode="tozero", nticks=4, tickformat=".1e" if name == "lr" else "~s")
    return figure


def trace(
    line: Line, name: str, colour: str, width: float, opacity: float = 1.0, dash: str = "solid"
) -> dict[str, Any]:
    """Return a drawn line."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": whole(line.steps),
        "y": rounded(line.values),
        "line": {"color": colour, "width": width, "dash": dash},
        "opacity": opacity,
        "hovertemplate": "step %{x}: %{y:.5g}<extra>" + name + "</extra>",
    }


def marks(
    x: Sequence[float], y: Sequence[float], texts: Sequence[str], name: str, symbol: str, colour: str
) -> dict[str, Any]:
    """Return marks with a label each; ``texts`` must be escaped already."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "text": list(texts),
        "marker": {"symbol": symbol, "color": colour, "size": 10, "line": {"width": 1.5, "color": colour}},
        "hovertemplate": "%{text}<extra></extra>",
        "cliponaxis": False,
    }


def edge_marks(line: Line, high: float, colour: str, at: float = 1.0) -> list[dict[str, Any]]:
    """Return marks at the top edge for values that have no place in the picture.

    A stretch of non-finite values gets a cross at its first step and a bar to its last; a stretch above
    ``high`` gets an arrow at its peak.
    """
    out: list[dict[str, Any]] = []
    lost = curves.stretches(~np.isfinite(line.values))
    if lost:
        ends = [(int(line.steps[run[0]]), int(line.steps[run[-1]])) for run in lost]
        first = [number(float(line.values[run[0]])) for run in lost]
        texts = [f"step {steps_text(*end)}: {value}" for end, value in zip(ends, first, strict=True)]
        cross = marks([e[0] for e in ends], [at] * len(ends), texts, "NaN or infinite", "x-thin", colour)
        cross["marker"]["line"]["width"] = 2.5
        bar = trace(Line(np.empty(0), np.empty(0)), "", colour, width=3)
        bar |= {"x": [x for end in ends for x in (*end, None)], "y": [at] * (3 * len(ends))}
        out += [{**bar, "yaxis": "y2", "showlegend": False, "hoverinfo": "skip"}, {**cross, "yaxis": "y2"}]
        out[0].pop("hovertemplate")
    above = curves.stretches(np.isfinite(line.values) & (line.values > high))
    if above:
        peaks = [int(run[line.values[run].argmax()]) for run in above]
        texts = [f"step {line.steps[i]:,.0f}: {number(float(line.values[i]))}, off the scale" for i in peaks]
        steps = whole(line.steps[np.array(peaks)])
        arrow = marks(steps, [at] * len(peaks), texts, "off the scale", "triangle-up-open", colour)
        out.append({**arrow, "yaxis": "y2"})
    return out


def fault_marks(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """Return a mark with a label at the bottom edge for every injected fault."""
    if not faults:
        return []
    texts = [
        hover(f"injected on purpose: {f.name.replace('_', ' ')}", f"step {steps_text(f.first, f.last)}") for f in faults
    ]
    x = [(f.first + f.last) / 2 for f in faults]
    mark = marks(x, [0.02] * len(x), texts, "injected fault", "triangle-up", "$fault")
    return [{**mark, "yaxis": "y2"}]


def frame(
    traces: list[dict[str, Any]],
    faults: Sequence[Fault],
    span: tuple[float, float],
    height: int,
    labels: bool = True,
    legend: bool = True,
) -> Figure:
    """Return a figure with our axes, and a band for every injected fault."""
    bands, notes = fault_bands(faults, span, labels)
    lines = 1 + max(note["yshift"] // 16 for note in notes) if notes else 0
    room = (span[1] - span[0]) * 0.01 or 1.0
    return {
        "data": traces,
        "layout": {
            "height": height,
            "margin": {"l": 60, "r": 14, "t": 14 + 16 * lines, "b": 30},
            "hovermode": "closest",
            "showlegend": legend,
            "legend": {"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top", "itemwidth": 30},
            "xaxis": {"range": [span[0] - room, span[1] + room], "zeroline": False, "nticks": 8},
            "yaxis": {"zeroline": False, "nticks": 7, "automargin": False},
            "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
            "shapes": bands,
            "annotations": notes,
        },
    }


def fault_bands(
    faults: Sequence[Fault], span: tuple[float, float], labels: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (bands, labels) for the injected faults; more than 12 labels would be a smear, so then none."""
    width = (span[1] - span[0]) or 1.0
    bands, notes = [], []
    newest = [-1.0] * LEVELS
    for fault in faults:
        middle = (fault.first + fault.last) / 2
        reach = max(0.003 * width, (fault.last - fault.first) / 2)
        bands.append(_band(middle - reach, middle + reach, "$fault", 0.25))
        if labels and len(faults) <= 12:
            share = (middle - span[0]) / width
            level = next((k for k in range(LEVELS) if share - newest[k] > 0.34), newest.index(min(newest)))
            newest[level] = share
            name = fault.name.replace("_", " ")
            note = label(middle, 1.0, share, name if len(name) <= 24 else name[:23] + "…", "$fault")
            notes.append({**note, "yshift": 4 + 16 * level, "yanchor": "bottom"})
    return bands, notes


def label(x: float, y: float, share: float, text: str, colour: str) -> dict[str, Any]:
    """Return text at step ``x``, ``share`` of the way along the axis, that does not leave the picture."""
    return {
        "x": x,
        "y": y,
        "yref": "paper",
        "xanchor": "left" if share < 0.2 else "right" if share > 0.8 else "center",
        "text": hover(text),
        "showarrow": False,
        "font": {"size": 12, "color": colour},
    }


def rounded(values: Floats) -> list[float]:
    """Return values with six significant digits: more cannot be seen and would double the page."""
    return [float(f"{v:.6g}") for v in values.tolist()]


def whole(steps: Floats) -> list[int]:
    """Return steps as whole numbers."""
    return [int(s) for s in steps.tolist()]


def _abandoned(records: Sequence[Record]) -> list[dict[str, Any]]:
    branches = [b.finite() for b in curves.abandoned(records)]
    branches = [b for b in branches if len(b)]
    if not branches:
        return []
    limit = max(8, curves.POINTS // len(branches))
    x: list[int | None] = []
    y: list[float | None] = []
    for branch in branches:
        drawn = branch.thinned(limit)
        x += [*whole(drawn.steps), None]
        y += [*rounded(drawn.values), None]
    line = trace(Line(np.empty(0), np.empty(0)), "abandoned, does not count", "$faint", width=1.2, dash="dot")
    return [{**line, "x": x, "y": y}]


def _validation(records: Sequence[Record]) -> list[dict[str, Any]]:
    points = curves.line([r for r in timeline(records) if r["type"] == "eval"], "loss").finite().thinned()
    if not len(points):
        return []
    texts = [f"step {s:,.0f}: validation loss {number(float(v), 4)}" for s, v in _pairs(points)]
    mark = marks(whole(points.steps), rounded(points.values), texts, "validation", "circle", "$eval")
    mark["marker"]["size"] = 7 if len(points) <= 100 else 3
    return [mark]


def _incident_marks(found: Sequence[Incident], finite: Line, low: float, high: float) -> list[dict[str, Any]]:
    """Return a trace for every action; an incident sits on the loss curve, or at the top edge if off it."""
    asked = np.isin(finite.steps, [one.step for one in found])
    at_step = dict(zip(finite.steps[asked].tolist(), finite.values[asked].tolist(), strict=True))
    inside: dict[str, list[tuple[float, float, str]]] = {}
    above: dict[str, list[tuple[float, float, str]]] = {}
    for one in found:
        loss = one.loss if one.loss is not None else at_step.get(float(one.step))
        placed = loss is not None and low <= loss <= high
        action = one.action if one.action in _MARKS else ""
        (inside if placed else above).setdefault(action, []).append(
            (one.step, loss if placed and loss is not None else 0.955, incident_label(one))
        )
    out = []
    for action in [*_MARKS, ""]:
        name, symbol, colour = _MARKS.get(action, _NOTICED)
        shown_in_legend = True
        for points, axis in ((inside.get(action), "y"), (above.get(action), "y2")):
            if points:
                mark = marks(
                    [p[0] for p in points],
                    [p[1] for p in points],
                    [p[2] for p in points],
                    name,
                    symbol,
                    colour,
                )
                out.append({**mark, "yaxis": axis, "legendgroup": name, "showlegend": shown_in_legend})
                shown_in_legend = False
    return out


def incident_label(one: Incident) -> str:
    """Return what happened, what was done and why, as an escaped plotly label."""
    times = f" ({one.count:,} times)" if one.count > 1 else ""
    reading = ""
    if one.signal and one.value is not None:
        expected = f", expected {number(one.expected)}" if one.expected is not None else ""
        reading = f"{one.signal} {number(one.value)}{expected}"
    return hover(
        f"step {one.steps}: {one.kind.replace('_', ' ')}{times}",
        reading,
        one.message,
        f"guard: {action_text(one)}",
        f"why: {one.reason}" if one.reason else "",
        f"injected on purpose: {one.injected.replace('_', ' ')}" if one.injected else "",
    )


def _rollbacks(records: Sequence[Record]) -> list[tuple[int, int, Record]]:
    return [
        (int(r["to"]), int(r["step"]), r)
        for r in records
        if r["type"] == "rollback" and is_number(r.get("to")) and is_number(r.get("step"))
    ]


def _rollback_bands(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [_band(to, step, "$faint", 0.13) for to, step, _ in _rollbacks(records)[: curves.POINTS]]


def _rollback_marks(records: Sequence[Record]) -> list[dict[str, Any]]:
    found = _rollbacks(records)
    if not found:
        return []
    texts = []
    for to, step, record in found:
        dropped = ""
        if is_number(record.get("dropped_first")) and is_number(record.get("dropped_last")):
            dropped = f"samples {record['dropped_first']:,} to {record['dropped_last']:,} are not shown again"
        texts.append(hover(f"rolled back from step {step:,} to step {to:,}", dropped))
    x = [to for to, _, _ in found]
    mark = marks(x, [0.04] * len(x), texts, "went back to here", "triangle-left", "$faint")
    return [{**mark, "yaxis": "y2"}]


def _band(first: float, last: float, colour: str, opacity: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": first,
        "x1": last,
        "y0": 0,
        "y1": 1,
        "fillcolor": colour,
        "opacity": opacity,
        "line": {"width": 0},
        "layer": "below",
    }


def _span(line: Line) -> tuple[float, float]:
    return (float(line.steps.min()), float(line.steps.max())) if len(line) else (0.0, 1.0)


def _decades(values: Floats) -> float:
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def _pairs(line: Line) -> list[tuple[float, float]]:
    return list(zip(line.steps.tolist(), line.values.tolist(), strict=True))


def steps_text(first: int, last: int) -> str:
    """Return a step or a range of steps."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
