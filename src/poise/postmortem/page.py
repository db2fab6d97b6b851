"""``poise diagnose --html``: a diagnosis on one page that needs no network, of one log or of several side by side.

Everything that comes from a log is plain text to the page: names, settings and notes are escaped where they are put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from poise.dashboard.figures import ZOOM, Figure
from poise.dashboard.page import Page
from poise.dashboard.text import MISSING, count, escape, number, plural
from poise.postmortem import page_figures as figures
from poise.postmortem.compare import Comparison
from poise.postmortem.diagnosis import Diagnosis
from poise.postmortem.event import Event
from poise.postmortem.page_curve import Curve, curve_of
from poise.postmortem.scores import DEFINITIONS
from poise.postmortem.steps import curve
from poise.postmortem.wording import (
    KINDS,
    RANK,
    cause_text,
    cost_text,
    evidence,
    last_loss,
    note_texts,
    peak_text,
    plain,
    recovery_text,
    span_text,
    starts_text,
    todos,
    worst_first,
)

ROWS: Final = 300
"""Most rows of a table; ``--json`` has the rest."""

DRAWN_LOGS: Final = 12
"""Most logs in one picture."""

_SCORES: Final = {"olmo2": "OLMo 2", "olmo_core": "OLMo-core"}
_LOOK: Final = {"critical": "bad", "warning": "warn", "note": "note"}

_WHOLE: Final = 'style="white-space:nowrap"'

_METHOD: Final = (
    "Found from the log alone, with hindsight: what came later was used to judge what came before, so a monitor "
    "inside the run would have seen some of this later, and less surely. The trend is the median of the loss over "
    "about 100 steps on both sides of each point, on a logarithmic scale, taken again without what stands above it. "
    "An event is what stands above it by far more than the log's own noise, or above the best level so far for long. "
    "It came back when the level after it is that of the trend from before. Lost steps run from an event's start until "
    "the loss is on its trend again, or to the end of the log; a step that belongs to several events counts once; odd "
    "batches and the like cost nothing."
)
_CAUSES: Final = (
    "A cause is read from the log, nothing was run again: 'likely' means that it left a signature of its own, "
    "'possible' that it fits and so would others, 'unknown' that the log does not tell. Recommendations are other "
    "people's published practice, named beside each; they promise nothing for this run."
)


class _Report(Page):
    """A page with folded parts, tags in the colour of a severity, and pictures side by side."""

    def part(self, title: str, level: int) -> None:
        """Start a part with a heading of level 2 or 3."""
        self._body.append(f"<h{level}>{escape(title)}</h{level}>")

    def advice(self, action: str, where: str, text: str, source: str) -> None:
        """Add one piece of advice."""
        named = f' <span class="soft">[{escape(source)}]</span>' if source else ""
        self._body.append(f"<p><strong>{escape(action)}</strong> ({escape(where)}): {escape(text)}{named}</p>")

    def folded(self, title: str, html: Sequence[str]) -> None:
        """Add what is shown on a click; ``html`` must be escaped already."""
        self._body.append(f"<details><summary>{escape(title)}</summary>{''.join(html)}</details>")

    def folded_table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table that is shown on a click."""
        start = len(self._body)
        self.table(head, rows, wide=head)
        self.folded(title, [self._body.pop(start)])

    def events(self, rows: Sequence[Event], unit: str) -> None:
        """Add the table of events."""
        head = [unit, "what", "peak", "came back", "likely cause", "cost", "what to do"]
        top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        body = "".join(f"<tr>{''.join(_cells(event))}</tr>" for event in rows)
        self._body.append(
            f'<div class="box" tabindex="0"><table style="min-width:900px"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def beside(self, pictures: Sequence[tuple[str, Figure]]) -> None:
        """Add pictures in as many columns as there is room for."""
        self._body.append(
            '<div style="display:grid;gap:4px 18px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))">'
        )
        for title, figure in pictures:
            self._body.append(f'<div style="min-width:0"><p class="soft" style="margin:12px 0 0">{escape(title)}</p>')
            self.figure(figure, title)
            self._body.append("</div>")
        self._body.append("</div>")


def _cells(e: Event) -> list[str]:
    """Return the cells of an event's row, escaped."""
    colour = f"var(--{_LOOK[e.severity]})"
    tag = f'<span class="tag" style="border-color:{colour};color:{colour}">{escape(e.severity)}</span>'
    texts = [plain(text) for text in evidence(e)]
    seen = "".join(f"<li>{escape(text)}</li>" for text in texts)
    why = f"<details><summary>evidence</summary><ul>{seen}</ul></details>" if seen else ""
    source = f"<details><summary>source</summary>{escape(plain(e.advice.source))}</details>" if e.advice.source else ""
    return [
        f'<td class="tight" {_WHOLE}>{escape(span_text(e))}</td>',
        f"<td>{escape(plain(e.kind).replace('_', ' '))}<br>{tag}</td>",
        f'<td class="tight" {_WHOLE}>{escape(plain(peak_text(e)))}<br><span class="soft">at {e.peak}</span></td>',
        f'<td class="tight">{escape(recovery_text(e))}</td>',
        f'<td class="wide">{escape(plain(cause_text(e)))}{why}</td>',
        f'<td class="tight">{escape(cost_text(e))}</td>',
        f'<td class="wide">{escape(plain(e.advice.text))}{source}</td>',
    ]


def write(diagnoses: Sequence[Diagnosis], comparisons: Sequence[Comparison], path: Path) -> Path:
    """Write the page and return its path.

    Args:
        diagnoses: of one log or more.
        comparisons: of pairs of them.
        path: the HTML file to write.

    Raises:
        OSError: the file cannot be written.
    """
    assert diagnoses
    several = len(diagnoses) > 1
    page = _Report(plain(diagnoses[0].log.name) if not several else f"{len(diagnoses)} training logs")
    drawn = [curve_of(d) for d in diagnoses]
    if several:
        _together(page, diagnoses, comparisons, drawn)
    for d, one in zip(diagnoses, drawn, strict=True):
        if several:
            page.heading(plain(d.log.name))
        _one(page, d, one, 3 if several else 2)
    _method(page, diagnoses)
    return page.write(Path(path))


# -- one log -------------------------------------------------------------------------------------------


def _one(page: _Report, d: Diagnosis, drawn: Curve, level: int) -> None:
    page.paragraph(plain(d.headline), "verdict")
    page.paragraph(f"{plain(d.log.path.name)}, read as {d.format}", "soft")
    page.key_figures(_key_figures(d))
    _todo(page, d, level)
    if d.points:
        _pictures(page, d, drawn, level)
    _events(page, d, level)
    _reading(page, d)


def _key_figures(d: Diagnosis) -> list[tuple[str, str]]:
    steps, values = curve(d.log)
    serious = sum(e.severity != "note" for e in d.events)
    lost = f"{d.lost_steps:,} ({1 - d.ettr:.1%})" if d.lost_steps else "none"
    unit = f", {d.log.loss_unit}" if d.log.loss_unit else ""
    bad = int((~np.isfinite(values)).sum())
    pairs = [
        ("Points", f"{d.points:,}"),
        (d.log.step_unit.capitalize(), f"{steps[0]:,} to {steps[-1]:,}" if len(steps) else MISSING),
        (f"Last loss{unit} (median of 9)", number(last_loss(d), 3)),
        ("Events that need a look", f"{serious:,}"),
        ("Noted, harmless", f"{len(d.events) - serious:,}"),
        (f"Lost {d.log.step_unit}", lost),
        ("Lost tokens", count(d.lost_tokens) if d.lost_tokens else ""),
        ("Not finite", f"{bad:,}" if bad else ""),
        ("Restarts", f"{len(d.log.restarts):,}" if d.log.restarts else ""),
    ]
    for name, kinds in d.spike_scores.items():
        pairs += [
            (f"Spike score, {plain(name).replace('_', ' ')} ({_SCORES.get(kind, kind)})", f"{value:.2f} %")
            for kind, value in kinds.items()
        ]
    return [(name, value) for name, value in pairs if value]


def _pictures(page: _Report, d: Diagnosis, drawn: Curve, level: int) -> None:
    title = "Loss" if drawn.name in ("loss", "") else plain(drawn.name).replace("_", " ")
    page.part(title, level)
    scale = ", logarithmic scale" if drawn.log else ""
    trend = "strong: the trend" if len(drawn.trend) else "no trend, for most of the log is off any"
    page.paragraph(
        f"By {d.log.step_unit}{scale}. Thin: every value; {trend}; bands and marks: events. "
        f"Point at a mark for what it is. {ZOOM}",
        "soft",
    )
    page.figure(figures.main_figure(d, drawn), f"{title} by {d.log.step_unit}. {plain(d.headline)}")
    for name, figure in figures.panels(d, drawn):
        page.paragraph(figures.panel_title(d, name), "soft")
        page.figure(figure, f"{plain(name).replace('_', ' ')} by {d.log.step_unit}")
    close = figures.close_ups(d, drawn)
    if close:
        page.part("Close-ups" if len(close) > 1 else "Close-up", level)
        page.paragraph(
            "The window is about three times as long as the event. Dotted lines: what moved before it, and restarts. "
            "These pictures zoom by themselves.",
            "soft",
        )
        page.beside(close)


def _todo(page: _Report, d: Diagnosis, level: int) -> None:
    found = todos(d.events)
    if found:
        page.part("What to do", level)
    for one in found:
        where = f"at {starts_text(one.events, 8)}"
        page.advice(one.advice.action.replace("_", " "), where, plain(one.advice.text), plain(one.advice.source))


def _events(page: _Report, d: Diagnosis, level: int) -> None:
    serious = [e for e in d.events if e.severity != "note"]
    notes = [e for e in d.events if e.severity == "note"]
    if serious:
        page.part("Events", level)
        kept = sorted(worst_first(serious)[:ROWS], key=lambda e: e.start)
        page.events(kept, d.log.step_unit)
        if len(kept) < len(serious):
            page.paragraph(f"{len(serious) - len(kept):,} smaller ones are in the output of --json.", "soft")
    if notes:
        rows = [
            [span_text(e), e.kind.replace("_", " "), plain(peak_text(e)), plain(" ".join(evidence(e)) or e.advice.text)]
            for e in notes[:ROWS]
        ]
        more = "" if len(notes) <= ROWS else f", the first {ROWS} shown"
        page.folded_table(
            f"{plural(len(notes), 'harmless thing')} noted{more}", [d.log.step_unit, "what", "peak", "why"], rows
        )


def _reading(page: _Report, d: Diagnosis) -> None:
    notes = [[plain(note)] for note in note_texts(d.notes)]
    if notes:
        page.folded_table(f"{plural(len(notes), 'remark')} on the reading of this log", ["remark"], notes[:ROWS])
    left = [name for name in d.log.series if name not in figures.panel_names(d, "") and name != "loss"]
    if left:
        shown = ", ".join(plain(name, 60) for name in left[:40]) + (", ..." if len(left) > 40 else "")
        page.folded(f"{len(left):,} further series, not drawn", [f"<p>{escape(shown)}</p>"])
    settings = sorted(d.log.settings.items())
    if settings:
        rows = [[plain(name, 100), plain(value, 300)] for name, value in settings[: 2 * ROWS]]
        more = "" if len(settings) <= 2 * ROWS else f", the first {2 * ROWS} shown"
        page.folded_table(f"{plural(len(settings), 'setting')} that the log states{more}", ["setting", "value"], rows)


# -- several logs --------------------------------------------------------------------------------------


def _together(
    page: _Report, diagnoses: Sequence[Diagnosis], comparisons: Sequence[Comparison], drawn: Sequence[Curve]
) -> None:
    ill = sum(d.health not in ("healthy", "unknown") for d in diagnoses)
    fine = "None has events that need a look."
    page.paragraph(f"{ill} of {len(diagnoses)} logs have events that need a look." if ill else fine, "verdict")
    units = {d.log.step_unit for d in diagnoses}
    if len(units) > 1:
        page.paragraph(f"The logs count different things: {', '.join(sorted(units))}.", "warning")
    kept = [i for i, d in enumerate(diagnoses) if d.points][:DRAWN_LOGS]
    if kept:
        page.paragraph(f"Strong: the trend of each log; faint: its values. {ZOOM}", "soft")
        page.figure(figures.overlay([diagnoses[i] for i in kept], [drawn[i] for i in kept]), "Loss of all logs by step")
    rows = []
    for d in diagnoses:
        serious = sum(e.severity != "note" for e in d.events)
        worst = max((e.severity for e in d.events), key=lambda s: RANK[s], default=MISSING)
        scores = d.spike_scores.get("loss", {})
        rows.append(
            [
                plain(d.log.name),
                d.health,
                f"{d.points:,}",
                number(last_loss(d), 3),
                f"{serious} (+{plural(len(d.events) - serious, 'note')})",
                worst,
                f"{d.lost_steps:,} ({1 - d.ettr:.1%})",
                *(f"{scores[kind]:.2f} %" if kind in scores else MISSING for kind in DEFINITIONS),
            ]
        )
    head = [
        "Log",
        "Health",
        "Points",
        "Last loss",
        "Events",
        "Worst",
        "Lost",
        *(f"Score, {n}" for n in _SCORES.values()),
    ]
    page.table(head, rows, wide=["Log"])
    if comparisons:
        page.heading("Is it the data?")
        page.paragraph(
            "Two runs that saw the same batches in the same order have the same noise about their trends, whatever "
            "else differs. Where they do, an event that both have speaks for the data, one that only one has against "
            "it.",
            "soft",
        )
        found = [[plain(c.a), plain(c.b), c.verdict, plain("; ".join(c.evidence))] for c in comparisons]
        page.table(["Log", "and", "Verdict", "Evidence"], found, wide=["Log", "and", "Evidence"])


def _method(page: _Report, diagnoses: Sequence[Diagnosis]) -> None:
    page.heading("How this was found")
    page.paragraph(_METHOD)
    page.paragraph(_CAUSES)
    scores: dict[str, Any] = {
        kind: f"{_SCORES[kind]}: per cent of the values more than {bar:g} standard deviations "
        f"{'away from' if both else 'above'} the mean of the last {window:,} before them"
        for kind, (window, _, bar, both) in DEFINITIONS.items()
    }
    page.paragraph(f"Spike scores. {'; '.join(scores.values())}. Values that are not finite count as standing out.")
    seen = {e.kind for d in diagnoses for e in d.events}
    rows = [[kind.replace("_", " "), text, "yes" if kind in seen else ""] for kind, text in KINDS.items()]
    page.folded_table("What is called what", ["Event", "What it is", "Here"], rows)
