"""The comparison page of several runs."""

from __future__ import annotations

import json
import re

import pytest

from poise.core.errors import UserError
from poise.dashboard.compare import write_comparison


@pytest.fixture
def runs(made, tmp_path):
    return [
        ("clean", made("healthy").write(tmp_path / "clean")),
        ("bare", made("with_nan", guarded=False).write(tmp_path / "bare")),
        ("guarded", made("spiked").write(tmp_path / "guarded")),
    ]


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_table_and_picture(runs, tmp_path):
    out = write_comparison(runs, tmp_path / "new" / "demo.html", "Title", "A note & more")
    text = out.read_text(encoding="utf-8")
    head, clean, bare, guarded = cells(text)
    assert head == ["Run", "Final loss", "Validation loss", "Outcome", "Skipped steps", "Rollbacks"]
    assert clean[0] == "clean" and re.fullmatch(r"3\.\d{3}", clean[1]) and clean[4:] == ["0", "0"]
    assert bare[1] == "NaN" and bare[3] == "Finished 400 of 400 steps: loss not finite"
    assert guarded[4] == "2"
    assert "A note &amp; more" in text
    (figure,) = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    names = [t["name"] for t in figure["data"]]
    assert {"clean", "bare", "guarded", "injected fault"} <= set(names)
    notes = [a["text"] for a in figure["layout"]["annotations"]]
    assert notes == ["garbage batch", "garbage batch", "bare: loss not finite"]
    assert figure["layout"]["annotations"][-1]["x"] == 200
    assert [s["x0"] < 150 < s["x1"] for s in figure["layout"]["shapes"]] == [True, False]


def test_given_cells_replace_and_add(runs, tmp_path):
    rows = [{"weights_finite": True}, {"weights_finite": False, "Final loss": 7.5}, {"worst_loss": 10.4}]
    text = write_comparison(runs, tmp_path / "d.html", "T", "", rows).read_text(encoding="utf-8")
    _, clean, bare, guarded = (dict(zip(cells(text)[0], row, strict=True)) for row in cells(text))
    assert (clean["Weights finite"], bare["Weights finite"], guarded["Weights finite"]) == ("yes", "no", "–")
    assert bare["Final loss"] == "7.500" and guarded["Worst loss"] == "10.400" and clean["Worst loss"] == "–"


def test_labels_are_escaped(runs, tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    text = write_comparison([(evil, runs[1][1])], tmp_path / "d.html", evil, evil).read_text(encoding="utf-8")
    body = re.sub(r"<script>/\*\*.*?plotly.*?</script>", "", text, flags=re.DOTALL)
    assert evil not in body.replace("\\u0026lt;", "?")


def test_mistakes_are_named(runs, tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        write_comparison([], tmp_path / "d.html", "T", "")
    with pytest.raises(UserError, match="1 rows for 3 runs"):
        write_comparison(runs, tmp_path / "d.html", "T", "", [{}])
    with pytest.raises(UserError, match="for the run 'gone'"):
        write_comparison([("gone", tmp_path / "gone")], tmp_path / "d.html", "T", "")
