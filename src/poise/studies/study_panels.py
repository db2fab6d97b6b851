"""Small pictures, one for every arm of a study: final loss by learning rate, and training curves.

They are drawn on ``x2`` and further axes, so that no other picture of the page follows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from poise.dashboard import curves
from poise.dashboard.figures import rounded
from poise.dashboard.text import escape, number
from poise.studies.lr_sensitivity import Record, Result, as_float
from poise.studies.lr_table import rate, short
from poise.studies.stats import capped
from poise.studies.study_figures import Figure, axis_colours, init_loss, legend, loss_range, lr_range, marks

COLUMNS: Final = 3
CURVE_POINTS: Final = 80
"""Points of a training curve; twenty arms of seven rates have 140 of them."""


def loss_panels(result: Result) -> Figure:
    """Return a panel for every arm: its final losses by seed and their mean, over the baseline's mean in grey."""
    base = result.arm(result.baseline)
    traces: list[dict[str, Any]] = []
    for i, arm in enumerate(result.arms):
        axes = _axes(i)
        for one, colour, width in ((base, "$faint", 1.5), (arm, "$run2", 2.2)):
            points = [p for p in one.points if p.loss is not None]
            y = [float(f"{p.loss.mean:.6g}") for p in points if p.loss is not None]
            line = {"type": "scatter", "mode": "lines", "x": [p.lr for p in points], "y": y, "hoverinfo": "skip"}
            traces.append(line | axes | {"line": {"color": colour, "width": width}, "showlegend": False})
        init = init_loss(result) if arm.init_loss is None else arm.init_loss.mean
        runs = [(p.lr, seed, loss) for p in arm.points for seed, loss in p.losses]
        lost = [seed in p.diverged_seeds for p in arm.points for seed, _ in p.losses]
        texts = [f"{escape(arm.label)}<br>lr {lr:.3g}, seed {seed}: {number(loss, 3)}" for lr, seed, loss in runs]
        mark = marks(
            [lr for lr, _, _ in runs],
            [float(f"{capped(loss, init):.6g}") for _, _, loss in runs],
            texts,
            arm.label,
            ["circle-open" if bad else "circle" for bad in lost],
            "$run2",
            5,
        )
        traces.append(mark | axes | {"showlegend": False})
    y_axis = {"range": loss_range(result)}
    ticks = result.lrs if len(result.lrs) <= 4 else result.lrs[:: max(1, math.ceil(len(result.lrs) / 4))]
    x_axis = {"type": "log", "range": lr_range(result), "tickvals": list(ticks), "ticktext": [rate(lr) for lr in ticks]}
    return _panels(result, traces, x_axis, y_axis)


def training_panels(result: Result, records: Sequence[Record]) -> Figure | None:
    """Return a panel for every arm: training loss by step of the first seed, a line for every rate, thinned."""
    by_cell: dict[tuple[str, int], Record] = {}
    for record in records:
        at = _nearest(result.lrs, as_float(record["lr"]))
        if at is not None and record["seed"] == result.seeds[0]:
            by_cell[record["arm"], at] = record
    traces: list[dict[str, Any]] = []
    named: set[int] = set()
    last, views = 1, []
    for i, arm in enumerate(result.arms):
        for k, lr in enumerate(result.lrs):
            run = by_cell.get((arm.label, k))
            values = np.array([as_float(x) for x in run.get("loss", ())] if run else [], dtype=np.float64)
            every = curves.Line(np.arange(1, len(values) + 1, dtype=np.float64), values).finite()
            if not len(every):
                continue
            smoothed = curves.Line(every.steps, curves.smooth(every.values))
            views.append(curves.view(every.values, smoothed.values))
            drawn = smoothed.thinned(CURVE_POINTS)
            last = max(last, len(values))
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"lr {lr:.3g}",
                    "legendgroup": f"lr{k}",
                    "showlegend": k not in named,
                    "legendrank": k + 1,
                    "x": [int(s) for s in drawn.steps.tolist()],
                    "y": rounded(drawn.values),
                    "line": {"color": _lr_colour(k, len(result.lrs)), "width": 1.4},
                    "hovertemplate": f"lr {lr:.3g}, step %{{x}}: %{{y:.4g}}<extra></extra>",
                }
                | _axes(i)
            )
            named.add(k)
    if not traces:
        return None
    low = min(v[0] for v in views)
    high = max(min(max(v[1] for v in views), init_loss(result) * 1.25), low + 0.1)
    figure = _panels(result, traces, {"range": [0, last]}, {"range": [low, high]})
    figure["layout"]["margin"]["t"] = 70
    figure["layout"] |= {"showlegend": True, "legend": legend(1.0) | {"yanchor": "bottom", "yref": "container"}}
    figure["layout"]["legend"] |= {"y": 0.995, "yanchor": "top"}
    return figure


def _panels(
    result: Result, traces: list[dict[str, Any]], x_axis: Mapping[str, Any], y_axis: Mapping[str, Any]
) -> Figure:
    """Return small pictures in a grid, one an arm, with the same axes in all."""
    rows = math.ceil(len(result.arms) / COLUMNS)
    height = 60 + 190 * rows
    gap = 46 / height
    tall = (1 - gap * (rows - 1)) / rows
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"l": 44, "r": 12, "t": 26, "b": 30},
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": {"visible": False},
        "yaxis": {"visible": False},
        "annotations": [],
    }
    for i, arm in enumerate(result.arms):
        row, column = divmod(i, COLUMNS)
        top = 1 - row * (tall + gap)
        across = [column / COLUMNS + 0.02 * (column > 0), (column + 1) / COLUMNS - 0.015 * (column < COLUMNS - 1)]
        n = i + 2
        shared_x = {"matches": "x2"} if i else {}
        shared_y = {"matches": "y2"} if i else {}
        layout[f"xaxis{n}"] = (
            axis_colours() | {"domain": across, "anchor": f"y{n}", "nticks": 5} | shared_x | dict(x_axis)
        )
        y = {"domain": [max(0.0, top - tall), top], "anchor": f"x{n}", "nticks": 4, "showticklabels": column == 0}
        layout[f"yaxis{n}"] = axis_colours() | y | shared_y | dict(y_axis)
        layout["annotations"].append(
            {
                "x": across[0],
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "text": escape(short(arm.label, 30)) + (" †" if arm.changes_lr else ""),
                "showarrow": False,
                "font": {"size": 12, "color": "$ink"},
            }
        )
    return {"data": traces, "layout": layout}


def _axes(i: int) -> dict[str, str]:
    return {"xaxis": f"x{i + 2}", "yaxis": f"y{i + 2}"}


def _nearest(lrs: Sequence[float], lr: float) -> int | None:
    return next((k for k, one in enumerate(lrs) if math.isclose(one, lr, rel_tol=1e-9)), None)


def _lr_colour(k: int, n: int) -> str:
    """Return blue for the smallest rate to red for the largest, readable on light and on dark."""
    share = k / max(1, n - 1)
    return f"hsl({round(225 - 215 * share)}, 68%, 52%)"
