"""The page: what it says, that it loads nothing, that it survives every kind of journal."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from poise.core.errors import UserError
from poise.dashboard.page import Page
from poise.dashboard.report import write_report


class Links(HTMLParser):
    """Collects everything that a browser would fetch, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden += tag in ("script", "style")
        self.loads += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def page(run_dir: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """Write the report; return its HTML, its visible text and its figures."""
    text = write_report(run_dir).read_text(encoding="utf-8")
    parser = Links()
    parser.feed(text)
    found = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    return text, " ".join(" ".join(parser.text).split()), json.loads(found[1]) if found else []


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in figure["data"] if t["name"] == name)


def test_page_loads_nothing(made, tmp_path):
    text, _, _ = page(made("spiked").write(tmp_path / "run"))
    parser = Links()
    parser.feed(text)
    assert parser.loads == []
    assert not {"link", "iframe", "img", "object"} & set(parser.tags)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "default-src 'none'" in text and "plotly.js v" in text


def test_page_says_what_happened(made, tmp_path):
    _, seen, figures = page(made("spiked").write(tmp_path / "run"))
    assert re.search(r"Finished 400 of 400 steps; loss 8\.\d\d → 3\.\d\d; 2 events, 2 skipped steps, 0 rollbacks", seen)
    for part in (
        "10.6M",
        "1.64M",
        "12.8k",
        "2 min 10 s",
        "98%",
        "skipped the update",
        "garbage batch",
        "10.40",
    ):
        assert part in seen
    for part in ("poise train tiny --optim.lr 0.003", "[optim] lr = 0.003", "cpu.model", "3.11.9", "2.13.0"):
        assert part in seen
    skipped = trace(figures[0], "skipped")
    assert skipped["x"] == [150, 263] and skipped["y"] == [10.4, 10.4]
    assert "would undo many" in skipped["text"][0] and "injected on purpose" in skipped["text"][0]
    assert [len(f["layout"]["shapes"]) for f in figures] == [2, 2, 2, 2]
    assert trace(figures[0], "validation")["x"] == [100, 200, 300, 400]


def test_healthy_page_has_no_false_alarm(made, tmp_path):
    _, seen, figures = page(made("healthy").write(tmp_path / "run"))
    assert "no event and no intervention" in seen and "0 events" in seen
    assert "injected" not in seen and "end record" not in seen
    assert [t["name"] for t in figures[0]["data"]] == ["loss", "smoothed", "validation"]
    assert len(figures) == 4


def test_nonfinite_steps_are_marks_and_not_gaps(made, tmp_path):
    _, seen, figures = page(made("with_nan").write(tmp_path / "run"))
    assert "1 step had a loss that is not a finite number" in seen and "loss NaN" in seen
    mark = trace(figures[0], "NaN or infinite")
    assert (mark["x"], mark["y"], mark["yaxis"]) == ([200], [1.0], "y2")
    assert 200 not in trace(figures[0], "loss")["x"]
    assert None not in trace(figures[0], "loss")["y"]
    assert trace(figures[1], "NaN or infinite")["x"] == [200]


def test_abandoned_branch_is_drawn_and_banded(made, tmp_path):
    _, seen, figures = page(made("rolled_back").write(tmp_path / "run"))
    assert "1 rollback" in seen and "Steps lost 50" in seen
    branch = trace(figures[0], "abandoned, does not count")
    assert branch["x"] == [*range(201, 251), None]
    assert branch["y"][49] == pytest.approx(8.1)
    assert trace(figures[0], "loss")["x"] == list(range(1, 401))
    assert (trace(figures[0], "rolled back")["x"], trace(figures[0], "rolled back")["y"]) == ([250], [8.1])
    bands = [(s["x0"], s["x1"]) for s in figures[0]["layout"]["shapes"]]
    assert (200, 250) in bands
    assert "1,600 to 2,007" in trace(figures[0], "went back to here")["text"][0]


def test_torn_and_crashed_journal_is_said_to_be(made, tmp_path):
    run_dir = made("crashed").write(tmp_path / "run")
    with (run_dir / "journal.jsonl").open("a") as file:
        file.write('{"type":"step","step":218,"lo')
    _, seen, figures = page(run_dir)
    assert "No end recorded after 217 of 400 steps" in seen
    assert "still going, or it died after step 217" in seen
    assert "torn" in seen
    assert trace(figures[0], "loss")["x"][-1] == 217


def test_journal_without_steps_gives_a_page(made, tmp_path):
    maker = made("healthy")
    maker.records = maker.records[:1]
    _, seen, _ = page(maker.write(tmp_path / "run", recipe=False))
    assert "No step was recorded" in seen and '"lr": 0.003' in seen
    (tmp_path / "run" / "journal.jsonl").write_text("")
    _, seen, _ = page(tmp_path / "run")
    assert "holds no training step" in seen and "no recipe.toml" in seen


def test_missing_optional_fields_are_tolerated(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    records = [{"type": "step", "step": 1, "loss": 2.5}, {"type": "step", "step": 2, "loss": None}]
    records += [
        {"type": "event", "step": 2},
        {"type": "decision", "step": 2, "action": "skip"},
        {"type": "end"},
    ]
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    _, seen, figures = page(run_dir)
    assert "loss 2.50 → 2.50; 1 event, 1 skipped step" in seen
    assert len(figures) == 1


def test_everything_from_the_journal_is_escaped(made, tmp_path):
    evil = '</script><script>alert(1)</script><img src="http://x/y">'
    maker = made("healthy")
    maker.records = maker.records[:50]
    maker.records[0] |= {"command": evil, "environment": {evil: evil}}
    maker.alarm(49, "skip", kind=evil, injected=evil)
    maker.records[-1]["reason"] = evil
    maker.end(49, "halted", evil)
    run_dir = maker.write(tmp_path / "run")
    (run_dir / "recipe.toml").write_text(evil)
    text, seen, figures = page(run_dir)
    parser = Links()
    parser.feed(text)
    assert parser.tags.count("script") == 3 and "img" not in parser.tags and parser.loads == []
    assert evil in seen
    everything = json.dumps(figures)
    assert "<script>" not in everything and "&lt;/script&gt;" in everything


def test_a_figure_cannot_end_its_script():
    page = Page("t")
    page.figure({"data": [{"name": "</script><b>"}], "layout": {"height": 1}}, "label")
    text = page.html()
    assert "</script><b>" not in text and "\\u003c/script" in text


def test_long_run_makes_a_small_page(made, tmp_path):
    from plotly.offline import get_plotlyjs

    maker = made("healthy", total=20_000)
    maker.records[15_555]["loss"] = 7.77
    spike = maker.records[15_555]["step"]
    text, _, figures = page(maker.write(tmp_path / "run"))
    assert len(text) - len(get_plotlyjs()) < 700_000
    for figure in figures:
        assert all(len(t["x"]) <= 4000 for t in figure["data"])
    loss = trace(figures[0], "loss")
    assert loss["y"][loss["x"].index(spike)] == 7.77


def test_a_divergence_does_not_flatten_the_rest(made, tmp_path):
    maker = made("healthy")
    maker.records[300]["loss"] = 4e6
    step = maker.records[300]["step"]
    _, _, figures = page(maker.write(tmp_path / "run"))
    low, high = figures[0]["layout"]["yaxis"]["range"]
    assert 2 < low < 3.3 and 9 < high < 20
    assert trace(figures[0], "off the scale")["x"] == [step]


def test_missing_journal_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no journal .*give the folder of a run"):
        write_report(tmp_path)


def test_a_failed_write_leaves_the_old_page(made, tmp_path, monkeypatch):
    run_dir = made("crashed").write(tmp_path / "run")
    old = write_report(run_dir).read_text()

    def full(path, text, **kwargs):
        path.write_bytes(text[:1000].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(run_dir)
    monkeypatch.undo()
    assert (run_dir / "report.html").read_text() == old
    assert sorted(p.name for p in run_dir.iterdir()) == ["journal.jsonl", "recipe.toml", "report.html"]


def test_json_in_the_page_has_no_nan(made, tmp_path):
    maker = made("with_nan")
    maker.records[5]["grad_norm"] = math.inf
    maker.records[6]["lr"] = math.nan
    text, _, _ = page(maker.write(tmp_path / "run"))
    figures = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    assert figures and not re.search(r"[:,\[](NaN|Infinity|-Infinity)", figures[1])


def test_the_loss_of_each_source_is_drawn(made, tmp_path):
    maker = made("healthy", total=20)
    for number, record in enumerate(r for r in maker.records if r["type"] == "step"):
        record["source_losses"] = {"web": 5.0 - number / 10, "<b>ooks": 3.0} if number % 2 else {"web": 5.0}
    _, text, figures = page(maker.write(tmp_path / "run"))
    assert "Loss by source" in text
    drawn = next(f for f in figures if any(t.get("name") == "web" for t in f["data"]))
    assert len(trace(drawn, "web")["x"]) == 20
    assert next(t for t in drawn["data"] if "ooks" in t.get("name", ""))["y"][-1] == 3.0
