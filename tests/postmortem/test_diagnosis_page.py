"""The page of a diagnosis: one file without network, all that was found, and nothing of a log that is not escaped."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.postmortem import page_figures as figures
from poise.postmortem.compare import Comparison, compare
from poise.postmortem.diagnosis import Diagnosis, diagnose
from poise.postmortem.event import Advice, Cause, Cost, Event, Precursor
from poise.postmortem.log import Log
from poise.postmortem.page import write
from poise.postmortem.page_curve import curve_of

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&%{x}"


def event(start: int = 1000, **more: object) -> Event:
    fields = {"kind": "fast_spike", "severity": "warning", "start": start, "peak": start + 5, "end": start + 30}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 31, "recovery": "returned", "cost": Cost(31, None, 0.01)}
    fields |= {"cause": Cause("too-high LR", "schedule", "likely", ("the rate was high",))}
    fields |= {"precursors": (Precursor("grad_norm", start - 3, 3, "the gradient norm rose"),)}
    fields |= {"advice": Advice("lower_lr", "Lower the rate.", "PaLM (arXiv 2204.02311): back 100 steps")}
    return Event(**(fields | more))  # type: ignore[arg-type]


def log_of(n: int = 3000, name: str = "run", notes: tuple[str, ...] = (), **series: np.ndarray) -> Log:
    steps = np.arange(1, n + 1)
    loss = (2.5 + 6.0 * np.exp(-steps / 250.0)) * np.exp(0.004 * np.random.default_rng(0).standard_normal(n))
    table = {"loss": loss, "grad_norm": 0.3 + 0.01 * np.sin(steps), "lr": np.full(n, 3e-4)} | series
    return Log(Path(f"{name[:9]}.csv"), name, "table", {k: (steps, v.astype(float)) for k, v in table.items()}, notes)


def diagnosis(*events: Event, **more: Any) -> Diagnosis:
    log = log_of(**more)
    return Diagnosis(log, events, "events", "3 spikes.", 93, 93_000, 0.97, {}, "table", len(log.series["loss"][0]), ())


class Tags(HTMLParser):
    """The tags and the visible text of a page, without scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text.append(data)


def page_of(diagnoses: list[Diagnosis], comparisons: list[Comparison], path: Path) -> tuple[str, str, list[Any], Tags]:
    """Write the page; return (its source, its text, its figures, its tags)."""
    assert write(diagnoses, comparisons, path) == path
    source = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', source, re.S)
    drawn = json.loads(found[1]) if found else []
    tags = Tags()
    tags.feed(source)
    return source, " ".join("".join(tags.text).split()), drawn, tags


def test_says_all_that_was_found_in_one_file(tmp_path: Path) -> None:
    d = diagnosis(event(), event(2000, severity="critical", recovery="never", lasting=0.06), notes=("cut off",))
    d = dataclasses.replace(d, notes=("cut off",), spike_scores={"loss": {"olmo2": 0.14}})
    d = dataclasses.replace(d, log=dataclasses.replace(d.log, settings={"beta2": "0.95"}, restarts=(1500,)))
    source, text, drawn, tags = page_of([d], [], tmp_path / "a.html")
    for said in (
        *("3 spikes.", "3,000", "93 (3.0%)", "93k", "0.14 %", "Lower the rate.", "PaLM (arXiv 2204.02311): back 100"),
        *("1000-1030", "too-high LR (likely)", "the rate was high", "the gradient norm rose", "no, +6 %", "cut off"),
        *("beta2", "0.95", "hindsight", "What is called what", "Gradient norm", "Learning rate", "Close-ups"),
    ):
        assert said in text, said
    assert "Content-Security-Policy" in source and "default-src 'none'" in source
    assert not [t for t in tags.tags if t[0] in ("link", "img", "iframe") or t[1].get("src") or t[1].get("href")]
    assert len(drawn) == 3 + 2  # loss, gradient norm, learning rate; two close-ups
    main = drawn[0]
    assert [t["name"] for t in main["data"]] == ["loss", "trend", "off the scale", "warning", "critical", "restart"]
    bands = [s for s in main["layout"]["shapes"] if s["type"] == "rect"]
    assert [(s["x0"], s["x1"], s["fillcolor"]) for s in bands] == [(2000, 2030, "$bad"), (1000, 1030, "$warn")]
    assert [s["x0"] for s in main["layout"]["shapes"] if s["type"] == "line"] == [1500]
    assert [a["text"] for a in main["layout"]["annotations"]] == ["fast spike 1000", "fast spike 2000"]


def test_close_ups_zoom_by_themselves_and_hold_three_times_the_event() -> None:
    d = diagnosis(event())
    ((title, close),) = figures.close_ups(d, curve_of(d))
    assert title == "fast spike at 1000-1030: 4.00 (+33 %)"
    assert {t["xaxis"] for t in close["data"]} == {"x2"} and close["layout"]["xaxis"] == {"visible": False}
    (loss,) = [t for t in close["data"] if t["name"] == "loss"]
    assert (loss["x"][0], loss["x"][-1]) == (970, 1060)
    assert [s["x0"] for s in close["layout"]["shapes"] if s["type"] == "line"] == [997]  # the first sign
    many = diagnosis(*[event(100 + 100 * i, value=4.0 + i) for i in range(20)])
    assert len(figures.close_ups(many, curve_of(many))) == figures.CLOSE_UPS
    notes = diagnosis(*[event(100 + 100 * i, severity="note", kind="data_outlier") for i in range(9)])
    assert len(figures.close_ups(notes, curve_of(notes))) == 2


def test_nothing_of_a_log_becomes_markup(tmp_path: Path) -> None:
    cause, advice = Cause(EVIL, "unknown", "likely", (EVIL,)), Advice("wait", EVIL, EVIL)
    signal = f"{EVIL} max_logit"
    bad = event(signal=signal, cause=cause, advice=advice, precursors=(Precursor(signal, 990, 10, EVIL),))
    d = diagnosis(bad, event(2000, cause=cause, advice=advice), name=EVIL, **{signal: np.arange(3000.0)})
    d = dataclasses.replace(d, headline=EVIL, notes=(EVIL,), spike_scores={EVIL: {"olmo2": 1.0}})
    d = dataclasses.replace(d, log=dataclasses.replace(d.log, settings={EVIL: EVIL}, loss_unit=EVIL, step_unit="steps"))
    both = [d, dataclasses.replace(d, log=dataclasses.replace(d.log, name="$bad"))]
    two = compare(both[0].log, both[1].log, d.events, d.events)
    two = dataclasses.replace(two, a=EVIL, evidence=(EVIL,))
    for diagnoses, comparisons in (([d], []), (both, [two])):
        source, text, drawn, tags = page_of(diagnoses, comparisons, tmp_path / "a.html")
        ours = source[: source.index("<script>")]
        assert "alert(1)" in ours and "<script>alert" not in source and "<img" not in ours
        assert not [t for t in tags.tags if t[0] == "img" or any(name.startswith("on") for name in t[1])]
        assert "<script>alert(1)</script>" in text
        for figure in drawn:
            names = [t["name"] for t in figure["data"]] + [a["text"] for a in figure["layout"].get("annotations", ())]
            names += [x for t in figure["data"] for x in t.get("text", ())]
            templates = [t["hovertemplate"] for t in figure["data"] if "hovertemplate" in t]
            assert all(t == "%{text}<extra></extra>" or t.count("%{") == 2 for t in templates), templates
            names += templates
            names += [figure["layout"]["yaxis"].get("title", {}).get("text", "")]
            for name in names:
                bare = re.sub(r"<br>|</?extra>", "", name)
                assert "<" not in bare, name
                assert not re.fullmatch(r"\$[a-z0-9]+", name), name
    assert html.escape(EVIL) in source


def test_a_log_without_a_finite_loss_and_one_without_points(tmp_path: Path) -> None:
    nan = diagnose(log_of(100, loss=np.full(100, np.nan)))
    _, text, drawn, _ = page_of([nan], [], tmp_path / "a.html")
    assert "Diverged" in text and "NaN" in text
    assert "NaN or infinite" in [t["name"] for t in drawn[0]["data"]]
    for loss in (np.array([2.0]), np.full(50, 3.0), np.full(50, -1.0), np.array([1.0, np.inf, 2.0] * 20)):
        d = diagnose(log_of(len(loss), loss=loss))
        assert page_of([d], [], tmp_path / "b.html")[2]
    empty = dataclasses.replace(nan.log, series={})
    none = dataclasses.replace(nan, log=empty, events=(), points=0)
    assert not page_of([none], [], tmp_path / "c.html")[2]


def test_a_loss_over_decades_is_drawn_on_a_logarithmic_scale(tmp_path: Path) -> None:
    d = diagnose(log_of(500, loss=np.geomspace(300.0, 2.0, 500)))
    assert curve_of(d).log
    low, high = curve_of(d).span
    assert low < np.log10(2.0) and np.log10(300.0) < high < 3.0
    assert page_of([d], [], tmp_path / "a.html")[2][0]["layout"]["yaxis"]["type"] == "log"
    assert not curve_of(diagnosis()).log


def test_several_logs_are_laid_over_each_other_and_compared(tmp_path: Path) -> None:
    a, b = diagnosis(event(), name="a"), diagnosis(name="b")
    b = dataclasses.replace(b, health="healthy", ettr=1.0, lost_steps=0)
    both = compare(a.log, b.log, a.events, b.events)
    _, text, drawn, _ = page_of([a, b], [both], tmp_path / "a.html")
    assert "1 of 2 logs have events that need a look." in text and "Is it the data?" in text
    assert both.verdict in text and both.evidence[0] in text
    assert [t["name"] for t in drawn[0]["data"] if t.get("showlegend", True)] == ["a", "b"]
    assert len(drawn) == 1 + 3 + 1 + 3  # all together, then loss, gradient norm and rate of each; one close-up
    other = dataclasses.replace(b, log=dataclasses.replace(b.log, step_unit="samples"))
    assert "The logs count different things: samples, steps." in page_of([a, other], [], tmp_path / "b.html")[1]


def test_the_highest_value_is_drawn_and_long_logs_stay_small(tmp_path: Path) -> None:
    n = 300_000
    loss = 3.0 + 0.01 * np.sin(np.arange(n))
    loss[123_456] = 3.5
    log = log_of(n, loss=loss)
    d = Diagnosis(
        log, tuple(event(i * 100 + 500) for i in range(2500)), "events", "x", 0, None, 1.0, {}, "table", n, ()
    )
    began = time.process_time()
    drawn = page_of([d], [], tmp_path / "a.html")[2]
    assert time.process_time() - began < 4.0  # 0.6 s on an idle core, with reading it back
    assert 3.5 in drawn[0]["data"][0]["y"] and 123_457 in drawn[0]["data"][0]["x"]
    assert (tmp_path / "a.html").stat().st_size < 8e6


def test_other_series_only_where_something_speaks_of_them() -> None:
    more = {"max_logit": np.arange(3000.0), "idle": np.arange(3000.0), "loss_scale": np.full(3000, 65536.0)}
    d = diagnosis(event(precursors=(Precursor("max_logit", 900, 100, "it grew"),)), **more)
    assert figures.panel_names(d, "loss") == ["grad_norm", "lr", "loss_scale", "max_logit"]


@pytest.mark.parametrize("events", [0, 1])
def test_the_trend_is_not_drawn_where_most_of_the_log_is_off_it(events: int) -> None:
    d = diagnosis(*[event(100, end=2900, points=2801, kind="chaotic")] * events)
    assert bool(len(curve_of(d).trend)) == (not events)
