"""The page of a study: what it says and draws, that nothing in it can be taken for markup, that it needs no network."""

from __future__ import annotations

import json
import math
import re

import pytest

from poise.studies import study_page
from poise.studies.lr_sensitivity import summarise

LRS = (1e-3, 1e-2, 1e-1)
INIT = 6.0


def record(arm, lr, seed, final):
    """A cell's record with a short curve; a final loss that is not finite ends it early."""
    finite = math.isfinite(final)
    steps = 120
    last = final if finite else 8.0
    loss = [INIT + (last - INIT) * min(1.0, t / 60) for t in range(steps if finite else 40)]
    return {
        "format": 1, "key": f"{arm}{lr}{seed}", "arm": arm, "lr": lr, "seed": seed, "recipe": {}, "params": 12_000,
        "params_non_embedding": 9_000, "init_loss": INIT, "final_loss": final, "best_val": 3.0, "steps_done": len(loss),
        "steps": steps, "ended": "finished" if finite else "nonfinite", "loss": loss if finite else [*loss, math.nan],
        "grad_norm": [1.0] * len(loss), "val": [], "max_logit": [[1, 2.0], [steps, 100 * lr * (seed + 1)]],
        "max_logit_block0": None, "seconds_per_step": 0.01, "seconds": 1.2, "threads": 1, "device": "cpu",
        "environment": {"torch": "2.99.0", "python": "3.11.7", "cpu": "a <b>cpu</b>"},
    }  # fmt: skip


def study(labels, **more):
    """Every arm after the first stands one rate more than the first."""
    records = [
        record(label, lr, seed, math.nan if lr > (0.2 if i else 0.05) else 3.0 + abs(math.log10(lr) + 2) + 0.02 * seed)
        for i, label in enumerate(labels)
        for lr in LRS
        for seed in (0, 1, 2)
    ]
    declared = {"name": "lr-sensitivity", "hypothesis": "it helps", "arms": labels, "lrs": LRS, "seeds": (0, 1, 2)}
    return records, declared | more


def page_of(tmp_path, records, declared):
    path = study_page.write(summarise(records, declared), records, declared, tmp_path / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    body = text[text.index("<body>") : text.index("<noscript>")]
    return text, body, figures


def traces(figures, kind="scatter"):
    return [t for f in figures for t in f["data"] if t["type"] == kind]


def test_the_page_says_and_draws_the_result(tmp_path):
    records, declared = study(["baseline", "qk_norm"], size="tiny", arm_texts={"qk_norm": "qk_norm:eps=1e-5"})
    text, body, figures = page_of(tmp_path, records, declared)
    for heading in ("Loss by learning rate", "First diverging learning rate", "Largest attention logit", "Spike scores",
                    "Time per step", "training loss by step", "Beside published orderings", "What is missing",
                    "How to run it again"):  # fmt: skip
        assert re.search(f"<h2>[^<]*{heading}", body), heading
    assert "1 lower" in body and "Hypothesis, written before the first run: it helps" in body
    assert "--methods baseline,qk_norm:eps=1e-5 --lrs 0.001,0.01,0.1 --seeds 3 --size tiny" in body
    assert "2.99.0" in body and '<th scope="col">Sensitivity</th>' in body
    assert not re.search(r"(src|href)=.http", body) and "default-src 'none'" in text
    curves = figures[0]["data"]
    assert [t["name"] for t in curves] == ["baseline", "qk_norm"] and curves[0]["x"] == list(LRS)
    assert curves[0]["y"][2] == INIT and curves[0]["marker"]["symbol"] == ["circle", "circle", "circle-open"]
    assert figures[0]["layout"]["xaxis"]["type"] == "log" and len(figures) == 7
    first = figures[2]["layout"]  # below the axis there is room for its title, and the legend stands below that
    plot = first["height"] - first["margin"]["t"] - first["margin"]["b"]
    assert first["legend"]["y"] * plot == pytest.approx(-56) and first["margin"]["b"] >= 56 + 2 * 22


def test_only_pictures_over_the_rate_share_the_axis_that_moves_together(tmp_path):
    _, _, figures = page_of(tmp_path, *study(["baseline", "qk_norm"]))
    for figure in figures:
        on_x = [t for t in figure["data"] if t.get("xaxis", "x") == "x"]
        axis = figure["layout"]["xaxis"]
        assert bool(on_x) == (axis.get("title", {}).get("text") == "peak learning rate")
        assert on_x or axis == {"visible": False}


def test_names_cannot_become_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    records, declared = study(["baseline", evil], changes_lr={evil: [f"{evil}: {evil}"]}, hypothesis=evil, size=evil)
    text, body, figures = page_of(tmp_path, records, declared)
    assert "<img" not in body and "<b>cpu" not in body
    assert "&lt;img" in body and "a &lt;b&gt;cpu" in body
    assert "<img" not in text[text.rindex('id="figures"') :]

    def strings(value):
        if isinstance(value, dict):
            return [s for v in value.values() for s in strings(v)]
        if isinstance(value, list):
            return [s for v in value for s in strings(v)]
        return [value] if isinstance(value, str) else []

    assert not [s for s in strings(figures) if "<img" in s]


def test_missing_cells_are_said(tmp_path):
    records, declared = study(["baseline", "qk_norm", "never"])
    kept = [r for r in records if r["arm"] != "never" and not (r["arm"] == "qk_norm" and r["lr"] == 1e-1)]
    _, body, figures = page_of(tmp_path, kept, declared)
    assert "Not run yet: 12 cells" in body and "never: not run at all." in body
    assert "no sensitivity for seed 0, 1, 2" in body
    sensitivity, time = traces(figures, "bar")
    assert len(sensitivity["y"]) == 1 and time["x"] == [1.0]  # the baseline's; qk_norm's, over the cells that are there


def test_a_study_of_many_arms_opens_with_a_few(tmp_path):
    labels = ["baseline", *(f"arm_{k}" for k in range(19))]
    _, body, figures = page_of(tmp_path, *study(labels))
    shown = [t["name"] for t in figures[0]["data"] if t["visible"] is True]
    assert len(figures[0]["data"]) == 20 and len(shown) == 6 and "baseline" in shown
    assert "Shown at first: the baseline and the 5 arms" in body
    looks = {(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"][0]) for t in figures[0]["data"]}
    assert len(looks) == 20


def test_nothing_was_run(tmp_path):
    _, declared = study(["baseline", "qk_norm"])
    _, body, _ = page_of(tmp_path, [], declared)
    assert "Not run yet: 18 cells" in body and "No arm has a complete grid yet." in body


def test_slid_windows_and_remarks_are_on_the_page(tmp_path):
    declared = study(["baseline", "wesar"])[1] | {
        "lrs": tuple(10.0**k for k in range(-5, 0)),
        "changes_lr": {"wesar": "gate"},
    }
    records = [record(a, lr, s, 3 + abs(math.log10(lr) + 2) + 0.01 * s) for a in ("baseline", "wesar")
               for lr in declared["lrs"] for s in (0, 1, 2)]  # fmt: skip
    _, body, _ = page_of(tmp_path, records, declared)
    assert "wesar (gate)" in body and "least sensitive" in body and "wesar\u00a0†" in body


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_as_a_journal_writes_them(tmp_path, value):
    records, declared = study(["baseline", "qk_norm"])
    for r in records:
        if not math.isfinite(r["final_loss"]):
            r |= {"final_loss": value, "loss": [*r["loss"][:-1], value]}
    _, _, figures = page_of(tmp_path, records, declared)
    assert figures[0]["data"][0]["y"][2] == INIT
