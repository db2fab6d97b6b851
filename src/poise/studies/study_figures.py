"""The pictures of a study of learning-rate sensitivity, as plotly figures: plain dicts, colours as in the report.

The page keeps the ``x`` axes of all pictures together. Here only pictures over the learning rate use ``x``, so that
zooming into one zooms the others; all else is drawn on ``x2`` and further, which nothing follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal

from poise.dashboard.text import escape
from poise.studies.lr_sensitivity import ArmResult, Point, Result
from poise.studies.lr_table import ends, first_text, rate, short, spread
from poise.studies.stats import Criterion, Interval

Figure = dict[str, Any]

SHOWN: Final = 6
"""Most arms that the first pictures open with; the legend switches the others on."""
LOGIT_LIMIT: Final = 1e4
"""In Wortsman et al. (2023) every run whose largest attention logit passed this diverged."""

_SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "cross")
_DASHES: Final = ("solid", "dash", "dot", "dashdot")


def opened(result: Result) -> list[str]:
    """Return the arms that are switched on at first: the baseline and those with the lowest sensitivity."""
    if len(result.arms) <= SHOWN + 1:
        return [arm.label for arm in result.arms]
    ranked = sorted((arm for arm in result.arms if arm.sensitivity and arm.label != result.baseline), key=_rank)
    return [result.baseline, *(arm.label for arm in ranked[: SHOWN - 1])]


def loss_by_lr(result: Result) -> Figure:
    """Return final loss over the learning rate: mean and interval of every arm, capped at the loss of the start."""
    init = init_loss(result)
    traces = []
    for arm in result.arms:
        points = [p for p in arm.points if p.loss is not None]
        trace = _lines(result, arm, points, [p.loss for p in points])
        bad = [p.diverged["init"] for p in points]
        symbol = trace["marker"]["symbol"]
        trace["marker"]["symbol"] = [
            f"{symbol}-open" if 2 * n > len(p.losses) else symbol for n, p in zip(bad, points, strict=True)
        ]
        trace["text"] = [_loss_text(arm, p) for p in points]
        traces.append(trace)
    figure = _over_lr(result, traces, height=470)
    figure["layout"]["yaxis"] |= {
        "range": loss_range(result),
        "title": {"text": "validation loss, nats", "standoff": 4},
    }
    figure["layout"]["shapes"] = [_level(init)]
    figure["layout"]["annotations"] = [_note(init, "loss before the first step")]
    return figure


def logit_by_lr(result: Result) -> Figure | None:
    """Return the largest attention logit at the end over the learning rate; ``None`` where no arm has one."""
    traces = []
    for arm in result.arms:
        points = [p for p in arm.points if p.max_logit is not None]
        if points:
            trace = _lines(result, arm, points, [p.max_logit for p in points])
            trace["text"] = [
                f"{escape(arm.label)}<br>lr {p.lr:.3g}: max logit {ends(p.max_logit, '.3g')}" for p in points
            ]
            traces.append(trace)
    if not traces:
        return None
    figure = _over_lr(result, traces, height=380)
    means = [p.max_logit.mean for arm in result.arms for p in arm.points if p.max_logit is not None]
    top, bottom = math.log10(max(means)), math.log10(min(means))
    figure["layout"]["yaxis"] |= {
        "type": "log",
        "dtick": 1,
        "exponentformat": "power",
        "range": [bottom - 0.3, max(top, bottom + 0.5) + 0.3],
        "title": {"text": "max attention logit", "standoff": 4},
    }
    if top > math.log10(LOGIT_LIMIT) - 1:
        figure["layout"]["yaxis"]["range"][1] = max(top, math.log10(LOGIT_LIMIT)) + 0.4
        figure["layout"]["shapes"] = [_level(LOGIT_LIMIT)]
        figure["layout"]["annotations"] = [_note(math.log10(LOGIT_LIMIT), "runs above diverged in 2309.14322")]
    return figure


def first_by_arm(result: Result) -> Figure:
    """Return the first diverging rate of every arm by both criteria; a triangle is above the largest rate."""
    rows = [arm for arm in _ranked(result) if arm.runs]
    looks: tuple[tuple[Criterion, float, str], ...] = (("init", -0.16, "$bad"), ("half", 0.16, "$warn"))
    traces = []
    for criterion, shift, colour in looks:
        for most in (True, False):
            firsts = [arm.first[criterion].majority if most else arm.first[criterion].any_seed for arm in rows]
            shapes = ["triangle-right" if lr is None else "circle" for lr in firsts]
            traces.append(
                marks(
                    [result.lrs[-1] * 1.4 if lr is None else lr for lr in firsts],
                    [i + shift for i in range(len(rows))],
                    [f"{escape(arm.label)}<br>{criterion}: {first_text(arm, criterion)}" for arm in rows],
                    f"{criterion}, {'most seeds' if most else 'any seed'}",
                    shapes if most else [f"{shape}-open" for shape in shapes],
                    colour,
                    10 if most else 7,
                )
            )
    figure = _by_arm(rows, traces, axis="")
    figure["layout"]["xaxis"] = _lr_axis(result)
    inside = figure["layout"]["height"] - 60  # the plot: without its margins
    figure["layout"] |= {"showlegend": True, "legend": legend(-56 / inside), "height": inside + 120}
    figure["layout"]["margin"]["b"] = 110  # ticks, title, and two rows of the legend
    return figure


def bars(result: Result, what: Literal["sensitivity", "time_ratio"]) -> Figure | None:
    """Return a bar with its interval for every arm that has a value, the smallest first; ``None`` where none has."""
    found: list[tuple[ArmResult, Interval]] = []
    for arm in result.arms:
        value = arm.sensitivity if what == "sensitivity" else arm.time_ratio
        if value is not None:
            found.append((arm, value))
    if not found:
        return None
    found.sort(key=lambda one: (what == "sensitivity" and one[0].all_diverged, one[1].mean))
    rows, values = [arm for arm, _ in found], [value for _, value in found]
    form = spread if what == "sensitivity" else ends
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [float(f"{v.mean:.6g}") for v in values],
        "y": list(range(len(rows))),
        "xaxis": "x2",
        "width": 0.62,
        "marker": {"color": ["$run0" if arm.label == result.baseline else "$run2" for arm in rows]},
        "error_x": _errors(values) | {"color": "$ink"},
        "text": [f"{escape(arm.label)}<br>{form(v)}" for arm, v in found],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }
    figure = _by_arm(rows, [trace], axis="2")
    top = max(v.mean for v in values) or 1.0
    reach = [v.high for v in values if v.high is not None and v.high < 2.5 * top]
    figure["layout"]["xaxis2"]["range"] = [0, 1.06 * max([top, *reach])]
    base = result.arm(result.baseline).sensitivity if what == "sensitivity" else Interval(1.0, None, None, 0)
    if base is not None:
        line = {"type": "line", "xref": "x2", "yref": "paper", "x0": base.mean, "x1": base.mean, "y0": 0, "y1": 1}
        figure["layout"]["shapes"] = [line | {"line": {"color": "$faint", "width": 1.5, "dash": "dot"}}]
    return figure


# -- parts -------------------------------------------------------------------------------------------------------


def _lines(
    result: Result, arm: ArmResult, points: Sequence[Point], values: Sequence[Interval | None]
) -> dict[str, Any]:
    known = [v for v in values if v is not None]
    colour, dash, symbol, width = _style(result, arm)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(short(arm.label, 34)),
        "x": [p.lr for p in points],
        "y": [float(f"{v.mean:.6g}") for v in known],
        "error_y": _errors(known) | {"color": colour},
        "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"symbol": symbol, "size": 8, "color": colour, "line": {"width": 1.5, "color": colour}},
        "visible": True if arm.label in opened(result) else "legendonly",
        "hovertemplate": "%{text}<extra></extra>",
    }


def _style(result: Result, arm: ArmResult) -> tuple[str, str, str, float]:
    """Return colour, dash, symbol and width; the baseline is grey and thick, the others go through five colours."""
    if arm.label == result.baseline:
        return "$run0", "solid", "circle", 3.0
    # Opened arms come first, so that those seen together at first differ in colour.
    order = [x for x in opened(result) if x != result.baseline]
    order += [x.label for x in result.arms if x.label not in order and x.label != result.baseline]
    i = order.index(arm.label)
    return f"$run{1 + i % 5}", _DASHES[i // 5 % 4], _SYMBOLS[(i + i // 5) % 5], 1.8


def _errors(values: Sequence[Interval]) -> dict[str, Any]:
    up = [0.0 if v.high is None else min(v.high, 1e30) - v.mean for v in values]
    down = [0.0 if v.low is None else v.mean - v.low for v in values]
    return {
        "type": "data",
        "symmetric": False,
        "array": [float(f"{x:.4g}") for x in up],
        "arrayminus": [float(f"{x:.4g}") for x in down],
        "thickness": 1.2,
        "width": 3,
    }


def _loss_text(arm: ArmResult, point: Point) -> str:
    lines = [escape(arm.label), f"lr {point.lr:.3g}: {spread(point.loss)} over {len(point.losses)}"]
    lines += [f"{c}: {n} of {len(point.losses)} diverged" for c, n in point.diverged.items() if n]
    return "<br>".join(lines)


def marks(
    x: list[float], y: list[float], texts: list[str], name: str, symbols: list[str], colour: str, size: int
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": x,
        "y": y,
        "text": texts,
        "marker": {"symbol": symbols, "color": colour, "size": size, "line": {"width": 1.5, "color": colour}},
        "hovertemplate": "%{text}<extra></extra>",
        "cliponaxis": False,
    }


def _over_lr(result: Result, traces: list[dict[str, Any]], height: int) -> Figure:
    rows = math.ceil(len(traces) / 4)
    return {
        "data": traces,
        "layout": {
            "height": height + 22 * rows,
            "margin": {"l": 58, "r": 14, "t": 14, "b": 60 + 22 * rows},
            "hovermode": "closest",
            "showlegend": True,
            "legend": legend(-0.14),
            "xaxis": _lr_axis(result),
            "yaxis": {"zeroline": False, "nticks": 7},
        },
    }


def _by_arm(rows: Sequence[ArmResult], traces: list[dict[str, Any]], axis: str) -> Figure:
    layout: dict[str, Any] = {
        "height": 90 + 27 * len(rows),
        "margin": {"l": 10, "r": 20, "t": 10, "b": 50},
        "hovermode": "closest",
        "showlegend": False,
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [
                escape(short(arm.label)) + " †" * bool(arm.changes_lr) + ", all diverged" * arm.all_diverged
                for arm in rows
            ],
            "range": [len(rows) - 0.5, -0.5],
            "automargin": True,
            "fixedrange": True,
            "zeroline": False,
            "anchor": f"x{axis}",
        },
    }
    if axis:
        layout["xaxis"] = {"visible": False}
        layout[f"xaxis{axis}"] = axis_colours() | {"anchor": "y", "nticks": 8, "zeroline": False}
    return {"data": traces, "layout": layout}


def axis_colours() -> dict[str, Any]:
    """Return the colours that the page gives to the first axes only."""
    return {
        "gridcolor": "$rule",
        "linecolor": "$rule",
        "tickcolor": "$rule",
        "tickfont": {"color": "$soft", "size": 11},
        "zeroline": False,
    }


def legend(y: float) -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": y, "yanchor": "top", "itemwidth": 30}


def _lr_axis(result: Result) -> dict[str, Any]:
    lrs = result.lrs[:: math.ceil(len(result.lrs) / 12)]
    return {
        "type": "log",
        "range": lr_range(result),
        "tickvals": list(lrs),
        "ticktext": [rate(lr) for lr in lrs],
        "zeroline": False,
        "title": {"text": "peak learning rate", "standoff": 6},
    }


def lr_range(result: Result) -> list[float]:
    return [math.log10(result.lrs[0]) - 0.15, math.log10(result.lrs[-1]) + 0.25]


def _level(y: float) -> dict[str, Any]:
    line = {"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": y, "y1": y, "layer": "below"}
    return line | {"line": {"color": "$faint", "width": 1.5, "dash": "dot"}}


def _note(y: float, text: str) -> dict[str, Any]:
    place = {"x": 0, "y": y, "xref": "paper", "yref": "y", "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    return place | {"text": escape(text), "font": {"size": 12, "color": "$soft"}}


def _ranked(result: Result) -> list[ArmResult]:
    """Return the arms from the lowest sensitivity to the highest, those without one or wholly diverged last."""
    return sorted(result.arms, key=_rank)


def _rank(arm: ArmResult) -> float:
    return math.inf if arm.sensitivity is None or arm.all_diverged else arm.sensitivity.mean


def init_loss(result: Result) -> float:
    inits = [arm.init_loss.mean for arm in result.arms if arm.init_loss is not None]
    return max(inits, default=1.0)


def loss_range(result: Result) -> list[float]:
    means = [p.loss.mean for arm in result.arms for p in arm.points if p.loss is not None]
    low, high = min(means, default=0.0), init_loss(result)
    room = (high - low) or 1.0
    return [low - 0.06 * room, high + 0.09 * room]
