"""The pictures of a diagnosis as plotly figures: plain dicts, colours as in the report of a run.

The page keeps the ``x`` axes of all pictures together. Here only pictures over the steps of whole logs use ``x``;
close-ups are drawn on ``x2``, which nothing follows. Names of a log's columns are escaped before they come near plotly,
which reads tags and templates in every text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from poise.dashboard.curves import Line
from poise.dashboard.figures import Figure, edge_marks, label, marks, trace
from poise.dashboard.text import escape, hover, number
from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.event import Event
from poise.postmortem.log import Log
from poise.postmortem.page_curve import Curve, between, line_of, trend_between
from poise.postmortem.readers.names import GRAD_NORM, LOSS, LOSS_SCALE, LR, VAL_LOSS
from poise.postmortem.steps import interval
from poise.postmortem.wording import cause_text, cost_text, peak_text, plain, recovery_text, span_text, worst_first

PANELS: Final = 8
"""Most pictures below the loss."""

BANDS: Final = 80
"""Most events that get a band; more would be one smear, and slow. The marks show all."""

LABELS: Final = 8
LABEL_WIDTH: Final = 0.3
"""Share of the picture that a label takes on a phone."""

MARKS: Final = 2000
RESTARTS: Final = 100
CLOSE_UPS: Final = 6
MARGIN: Final = 20
"""Points that a close-up shows on each side, at least."""

COLOUR: Final = {"critical": "$bad", "warning": "$warn", "note": "$note"}
_SYMBOL: Final = {"critical": "x", "warning": "diamond", "note": "circle-open"}
_LEGEND: Final = {"critical": "critical", "warning": "warning", "note": "noted, harmless"}
_LOOK: Final[Mapping[str, tuple[str, bool]]] = {
    GRAD_NORM: ("$grad", True),
    LR: ("$lr", False),
    VAL_LOSS: ("$eval", False),
    LOSS_SCALE: ("$speed", True),
}
"""Series -> (colour, logarithmic)."""

_RIGHT: Final = {"overlaying": "y", "side": "right", "showgrid": False, "anchor": "x2"}
_TITLES: Final = {
    LOSS: "Loss",
    GRAD_NORM: "Gradient norm",
    LR: "Learning rate",
    VAL_LOSS: "Validation loss",
    LOSS_SCALE: "Loss scale",
}
_DASHES: Final = ("solid", "dash", "dot", "dashdot")


# -- one log -------------------------------------------------------------------------------------------


def main_figure(d: Diagnosis, drawn: Curve) -> Figure:
    """Return the loss with its trend, its events and restarts."""
    finite = drawn.every.finite()
    shown = Line(finite.steps, finite.values)
    if drawn.log:
        shown = Line(finite.steps[finite.values > 0], finite.values[finite.values > 0])
    title = _name(drawn.name or "value")
    traces = [trace(shown.thinned(), title, "$loss", width=1.1, opacity=0.85)]
    if len(drawn.trend):
        traces.append(trace(drawn.trend.thinned(), "trend", "$smooth", width=2.2))
    traces += edge_marks(drawn.every, math.inf, "$bad") + edge_marks(finite, drawn.top, "$faint")
    traces += _event_marks([e for e in d.events if e.signal in (drawn.name, "loss")], drawn)
    traces += _restart_marks(d.log, drawn.steps)
    figure = _frame(traces, drawn.steps, height=460)
    axis: dict[str, Any] = {"range": list(drawn.span), "title": {"text": _unit(d.log, title), "standoff": 4}}
    if drawn.log:
        axis |= {"type": "log", "dtick": 1 if drawn.span[1] - drawn.span[0] > 2 else "D2"}
    figure["layout"]["yaxis"] |= axis
    figure["layout"]["shapes"] = _bands(d) + _restart_lines(d.log)
    figure["layout"]["annotations"] = _labels(d.events, drawn.steps)
    return _counted(figure, d.log)


def panels(d: Diagnosis, drawn: Curve) -> list[tuple[str, Figure]]:
    """Return (title, picture) for every further series that is worth one, under the same steps."""
    return [(name, _panel(d, name, drawn.steps)) for name in panel_names(d, drawn.name)]


def panel_title(d: Diagnosis, name: str) -> str:
    """Return what a picture below the loss shows."""
    values = d.log.series[name][1]
    bad = int((~np.isfinite(values)).sum())
    title = _TITLES.get(name) or plain(name, 100).replace("_", " ")
    return title + (f" ({bad:,} values not finite)" if bad else "")


def panel_names(d: Diagnosis, main: str) -> list[str]:
    """Return the series to draw: the usual ones, then those that events and their first signs speak of."""
    spoken = [e.signal for e in d.events] + [p.signal for e in d.events for p in e.precursors]
    wanted = dict.fromkeys([*_LOOK, *spoken])
    return [name for name in wanted if name in d.log.series and name != main][:PANELS]


def _panel(d: Diagnosis, name: str, span: tuple[float, float]) -> Figure:
    every = line_of(*d.log.series[name])
    shown = every.finite()
    colour, wants_log = _LOOK.get(name, ("$run5", False))
    positive = shown.values[shown.values > 0]
    log = wants_log and len(positive) > 0 and float(positive.max()) > 3.0 * float(positive.min())
    if log:
        shown = Line(shown.steps[shown.values > 0], positive)
    line = trace(shown.thinned(), _name(name), colour, width=1.3)
    if name == VAL_LOSS and len(shown) <= 200:
        line |= {"mode": "lines+markers", "marker": {"size": 5, "color": colour}}
    own = [e for e in d.events if e.signal == name]
    figure = _frame([line, *edge_marks(every, math.inf, "$bad"), *_own_marks(own)], span, height=190, legend=False)
    axis = figure["layout"]["yaxis"]
    axis |= {"nticks": 4, "tickformat": ".1e" if name == LR else "~g"}
    if log:
        decades = math.log10(float(positive.max()) / float(positive.min()))
        axis |= {"type": "log", "dtick": "D2" if decades < 2 else max(1, round(decades / 4)), "tickformat": "~g"}
    figure["layout"]["shapes"] = _bands(d, serious=True) + _restart_lines(d.log)
    return _counted(figure, d.log)


def close_ups(d: Diagnosis, drawn: Curve) -> list[tuple[str, Figure]]:
    """Return (title, picture) for the worst events; of notes only where there is nothing worse, and then two."""
    serious = worst_first(e for e in d.events if e.severity != "note")[:CLOSE_UPS]
    kept = serious or worst_first(d.events)[:2]
    return [(close_up_title(e), _close_up(d, e, drawn)) for e in sorted(kept, key=lambda e: e.start)]


def close_up_title(event: Event) -> str:
    """Return what a close-up shows."""
    return f"{plain(event.kind).replace('_', ' ')} at {span_text(event)}: {plain(peak_text(event))}"


def _close_up(d: Diagnosis, event: Event, drawn: Curve) -> Figure:
    room = max(event.end - event.start, MARGIN * interval(d.log))
    first, last = max(float(event.start - room), drawn.steps[0]), min(float(event.end + room), drawn.steps[1])
    at_signal = event.signal not in (LOSS, drawn.name) and event.signal in d.log.series
    main = line_of(*d.log.series[event.signal]) if at_signal else drawn.every
    inner = between(main, first, last)
    finite = inner.finite()
    few = len(finite) <= 150
    colour = _LOOK.get(event.signal, ("$run5", False))[0] if at_signal else "$loss"
    line = trace(finite.thinned(1500), _name(event.signal), colour, width=1.6)
    line |= {"mode": "lines+markers", "marker": {"size": 4, "color": colour}} if few else {}
    traces = [line]
    if not at_signal:
        traces.append(trace(trend_between(drawn.trend, first, last), "trend", "$smooth", width=2.0))
    traces += edge_marks(inner, math.inf, "$bad")
    layout = _frame([], (first, last), height=260)["layout"]
    grad = between(line_of(*d.log.series[GRAD_NORM]), first, last).finite() if GRAD_NORM in d.log.series else None
    if grad is not None and len(grad) and event.signal != GRAD_NORM:
        other = trace(grad.thinned(1500), "gradient norm (right)", "$grad", width=1.1, opacity=0.8)
        traces.insert(0, other | {"yaxis": "y3"})
        positive = bool((grad.values > 0).all())
        scale = (
            {"type": "log", "dtick": 1} if positive and grad.values.max() > 20 * grad.values.min() else {"nticks": 4}
        )
        layout["yaxis3"] = _colours() | scale | _RIGHT
        layout["margin"]["r"] = 48
    if math.isfinite(event.value):
        peak = marks([event.peak], [_round(event.value)], [_event_text(event)], "peak", _SYMBOL[event.severity], "")
        peak["marker"] |= {"color": COLOUR[event.severity], "line": {"width": 1.5, "color": COLOUR[event.severity]}}
        traces.append(peak | {"showlegend": False})
    for one in traces:
        one["xaxis"] = "x2"
    layout["xaxis2"] = _colours() | layout.pop("xaxis") | {"anchor": "y", "nticks": 5}
    layout["xaxis"] = {"visible": False}
    layout["yaxis"] |= {"type": "log"} if drawn.log and not at_signal else {"nticks": 5}
    layout["shapes"] = [
        _band(event.start, event.end, COLOUR[event.severity], 0.13, drawn_on="x2"),
        *(_rule(p.step, "$faint", "x2") for p in event.precursors if first <= p.step <= last),
        *(_rule(step, "$fault", "x2") for step in d.log.restarts[:RESTARTS] if first <= step <= last),
    ]
    layout["legend"] |= {"y": -0.16, "font": {"size": 11}}
    return _counted({"data": traces, "layout": layout}, d.log)


# -- several logs --------------------------------------------------------------------------------------


def overlay(diagnoses: Sequence[Diagnosis], drawn: Sequence[Curve]) -> Figure:
    """Return all curves over each other: the trend of each strong, its points faint behind."""
    behind, front = [], []
    each = max(200, 8000 // len(drawn))
    log = any(c.log for c in drawn)
    for i, (d, one) in enumerate(zip(diagnoses, drawn, strict=True)):
        colour, dash, name = f"$run{i % 6}", _DASHES[i // 6 % len(_DASHES)], _name(d.log.name)
        finite = one.every.finite()
        if log:
            finite = Line(finite.steps[finite.values > 0], finite.values[finite.values > 0])
        raw = trace(finite.thinned(each), name, colour, width=0.8, opacity=0.35)
        if len(one.trend):
            behind.append(raw | {"showlegend": False, "legendgroup": str(i), "hoverinfo": "skip"})
            behind[-1].pop("hovertemplate")
            front.append(trace(one.trend.thinned(each), name, colour, 2.0, dash=dash) | {"legendgroup": str(i)})
        else:
            front.append(raw | {"legendgroup": str(i), "opacity": 1.0})
    ends = (min(c.steps[0] for c in drawn), max(c.steps[1] for c in drawn))
    figure = _frame([*behind, *front], ends, height=460)
    spans = [c.span if c.log == log else tuple(math.log10(max(v, 1e-9)) for v in c.span) for c in drawn]
    figure["layout"]["yaxis"] |= {"range": [min(s[0] for s in spans), max(s[1] for s in spans)]}
    if log:
        figure["layout"]["yaxis"] |= {"type": "log"}
    return figure


# -- marks ---------------------------------------------------------------------------------------------


def _event_marks(events: Iterable[Event], drawn: Curve) -> list[dict[str, Any]]:
    """Return a mark at each event's peak, at the top edge where that is off the picture."""
    out = []
    kept = worst_first(events)[:MARKS]
    for severity in ("note", "warning", "critical"):
        shown_in_legend = True
        for placed in (True, False):
            group = [e for e in kept if e.severity == severity and drawn.inside(e.value) == placed]
            if not group:
                continue
            y = [_round(e.value) if placed else 0.955 for e in group]
            mark = _marks_of(group, y, severity)
            out.append(
                mark | {"yaxis": "y" if placed else "y2", "legendgroup": severity, "showlegend": shown_in_legend}
            )
            shown_in_legend = False
    return out


def _own_marks(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return marks for the events of another series than the loss, on that series."""
    out = []
    for severity in COLOUR:
        group = [e for e in events if e.severity == severity and math.isfinite(e.value)][:MARKS]
        if group:
            out.append(_marks_of(group, [_round(e.value) for e in group], severity))
    return out


def _marks_of(events: Sequence[Event], y: Sequence[float], severity: str) -> dict[str, Any]:
    texts = [_event_text(e) for e in events]
    mark = marks([e.peak for e in events], y, texts, _LEGEND[severity], _SYMBOL[severity], COLOUR[severity])
    mark["marker"]["size"] = 6 if severity == "note" else 9
    return mark


def _event_text(e: Event) -> str:
    """Return all that is known of an event as an escaped label."""
    lasting = "" if e.severity == "note" else f"came back: {recovery_text(e)}"
    cost = "" if cost_text(e) == "-" else f"cost: {cost_text(e)}"
    return hover(
        f"{e.kind.replace('_', ' ')} at {span_text(e)} ({e.severity})",
        f"{plain(peak_text(e))} at {e.peak}" + (f", trend {number(e.baseline)}" if math.isfinite(e.baseline) else ""),
        lasting,
        "" if e.severity == "note" and e.cause.name == "unknown" else f"cause: {plain(cause_text(e))}",
        cost,
        plain(e.advice.text) if e.severity != "note" else "",
    )


def _labels(events: Iterable[Event], span: tuple[float, float]) -> list[dict[str, Any]]:
    """Return names above the picture for the worst events, on different lines where they are close."""
    chosen = sorted(worst_first(e for e in events if e.severity != "note")[:LABELS], key=lambda e: e.start)
    width = (span[1] - span[0]) or 1.0
    newest = [-1.0, -1.0, -1.0]
    out = []
    for e in chosen:
        share = ((e.start + e.end) / 2 - span[0]) / width
        level = next((k for k, at in enumerate(newest) if share - at > LABEL_WIDTH), None)
        if level is None:
            continue
        newest[level] = share
        text = f"{e.kind.replace('_', ' ')} {e.start}"
        note = label((e.start + e.end) / 2, 1.0, share, text, COLOUR[e.severity])
        out.append(note | {"yshift": 2 + 14 * level, "yanchor": "bottom", "font": note["font"] | {"size": 11}})
    return out


def _bands(d: Diagnosis, serious: bool = False) -> list[dict[str, Any]]:
    events = [e for e in d.events if e.severity != "note" or not serious]
    kept = worst_first(events)[:BANDS]
    return [_band(e.start, e.end, COLOUR[e.severity], 0.08 if e.severity == "note" else 0.16) for e in kept]


def _restart_lines(log: Log) -> list[dict[str, Any]]:
    return [_rule(step, "$fault", "x") for step in log.restarts[:RESTARTS]]


def _restart_marks(log: Log, span: tuple[float, float]) -> list[dict[str, Any]]:
    kept = [step for step in log.restarts[:RESTARTS] if span[0] <= step <= span[1]]
    if not kept:
        return []
    texts = [hover(f"restart: {log.step_unit} {step:,} was the first after it") for step in kept]
    mark = marks(kept, [0.03] * len(kept), texts, "restart", "triangle-up", "$fault")
    return [mark | {"yaxis": "y2"}]


# -- parts ---------------------------------------------------------------------------------------------


def _frame(traces: list[dict[str, Any]], span: tuple[float, float], height: int, legend: bool = True) -> Figure:
    """Return a figure with our axes; ``y2`` goes from its lower edge, 0, to its upper one, 1."""
    room = (span[1] - span[0]) * 0.01 or 1.0
    return {
        "data": traces,
        "layout": {
            "height": height,
            "margin": {"l": 62, "r": 14, "t": 48 if height > 400 else 12, "b": 30},
            "hovermode": "closest",
            "showlegend": legend,
            "legend": {"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top", "itemwidth": 30},
            "xaxis": {"range": [span[0] - room, span[1] + room], "zeroline": False, "nticks": 8},
            "yaxis": {"zeroline": False, "nticks": 7, "automargin": False},
            "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        },
    }


def _colours() -> dict[str, Any]:
    """Return the colours of an axis that the page does not paint by itself."""
    return {"gridcolor": "$rule", "linecolor": "$rule", "tickcolor": "$rule", "tickfont": {"color": "$soft"}}


def _band(first: float, last: float, colour: str, opacity: float, drawn_on: str = "x") -> dict[str, Any]:
    """Return a band over all values; a line of that colour keeps a short one visible."""
    place = {"type": "rect", "xref": drawn_on, "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1}
    return place | {"fillcolor": colour, "opacity": opacity, "line": {"width": 1, "color": colour}, "layer": "below"}


def _rule(step: float, colour: str, drawn_on: str) -> dict[str, Any]:
    place = {"type": "line", "xref": drawn_on, "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1}
    return place | {"line": {"color": colour, "width": 1.2, "dash": "dot"}, "layer": "below"}


def _counted(figure: Figure, log: Log) -> Figure:
    """Return the figure with labels that count what the log counts."""
    one = {"steps": "step", "samples": "sample", "tokens": "token", "rows": "row"}.get(log.step_unit, "step")
    for drawn in figure["data"]:
        if "hovertemplate" in drawn:
            drawn["hovertemplate"] = drawn["hovertemplate"].replace("step %{x}", one + " %{x}")
    return figure


def _unit(log: Log, title: str) -> str:
    return f"{title}, {escape(log.loss_unit)}" if log.loss_unit else title


def _name(name: str) -> str:
    """Return a column's name for plotly: no tags, no templates, not endless."""
    text = plain(name, 60).replace("%{", "% {").replace("_", " ")
    return escape(text + " " if text.startswith("$") else text)  # the page takes "$name" alone for a colour


def _round(value: float) -> float:
    return float(f"{value:.6g}")
