"""The coordinate check: slopes and verdicts on made-up numbers, what it records, and that it tells muP from the plain
parametrisation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from poise.core.errors import UserError
from poise.model.build import build
from poise.studies import coord_check
from poise.studies.coord_check import Plan, check, judged, main, trace

SMALL = Plan({"baseline": (), "mup": ("mup:base_width=32",)}, sizes=(32, 128), other=1, steps=2, seeds=3)


def power(*slopes: float) -> dict[int, list[list[float]]]:
    """Values of models of width 32, 64 and 128 that grow with these powers, one a seed, at one step."""
    return {size: [[3.0 * size**slope] for slope in slopes] for size in (32, 64, 128)}


@pytest.mark.parametrize(
    ("slopes", "mean", "verdict"),
    [
        ((0.5,), 0.5, "grows"),
        ((0.0,), 0.0, "even"),
        ((0.19, 0.19, 0.19), 0.19, "even"),
        ((0.21, 0.21, 0.21), 0.21, "grows"),
        ((-0.5, -0.49, -0.51), -0.5, "shrinks"),
        ((0.0, 0.6), 0.3, "unclear"),  # the interval reaches far below 0
        ((-0.1, 0.1), 0.0, "unclear"),  # and here beyond the tolerance
    ],
)
def test_slopes_and_verdicts(slopes: tuple[float, ...], mean: float, verdict: str) -> None:
    interval, found = judged(power(*slopes), -1)
    assert interval is not None and interval.mean == pytest.approx(mean, abs=1e-9) and interval.n == len(slopes)
    assert found == verdict


def test_what_has_no_slope() -> None:
    assert judged({32: [[0.0]], 64: [[1.0]]}, 0) == (None, "zero")
    assert judged({32: [[1.0]], 64: [[math.nan]]}, 0) == (None, "not finite")
    assert judged({32: [[1.0]], 64: [[math.inf]]}, 0) == (None, "not finite")


def test_a_trace_holds_what_the_taps_saw() -> None:
    spec = SMALL.spec((), 32)
    rows = trace(spec, SMALL, seed=0)
    model = build(spec, seed=0)
    assert set(rows) == {*model.taps(), "logits"}
    assert all(len(row) == 3 and row[0][1] == 0 for row in rows.values())
    embed = model.embedding.weight.abs().mean().item()
    assert rows["embed"][0][0] == pytest.approx(embed, rel=0.1)
    # The first step of Adam moves every number of the rows in the batch by the learning rate.
    assert rows["embed"][1][1] == pytest.approx(SMALL.lr, rel=0.05)


def test_rates_of_methods_reach_the_optimizer() -> None:
    """One step of Adam moves matrices by lr / m under muP and the embedding by lr."""
    spec = SMALL.spec(("mup:base_width=8",), 32)
    seen: list[torch.Tensor] = []
    before = build(spec, seed=0)
    original = coord_check.build

    def remember(*args: object, **kwargs: object) -> object:
        model = original(*args, **kwargs)
        seen.extend([model.trunk.blocks[0].mlp.inner.weight, model.embedding.weight])
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coord_check, "build", remember)
        trace(spec, Plan({"baseline": ()}, sizes=(32, 64), steps=1, lr=1e-2), seed=0)
    moved = seen[0].detach() - before.trunk.blocks[0].mlp.inner.weight.detach()
    assert moved.abs().median().item() == pytest.approx(1e-2 / 4, rel=1e-3)
    moved = seen[1].detach() - before.embedding.weight.detach()
    assert moved.abs().median().item() == pytest.approx(1e-2, rel=1e-3)


def test_the_plain_parametrisation_grows_and_mup_does_not() -> None:
    found = check(SMALL)
    plain, mup = found["baseline"], found["mup"]
    for tap in ("block.0.attn_out", "block.0.mlp_out", "block.0.residual", "logits"):
        assert plain[tap].change is not None and plain[tap].change.mean > 0.4, tap
        assert mup[tap].change is not None and mup[tap].change.mean < 0.2, tap
    assert plain["block.0.residual"].change_verdict == "grows"
    assert mup["block.0.residual"].verdict == "even"
    assert mup["logits"].start is not None and mup["logits"].start.mean == pytest.approx(-0.5, abs=0.1)


def test_an_untied_head() -> None:
    plan = Plan({"baseline": ()}, sizes=(32, 64), tied=False)
    assert not plan.spec((), 32).tied and SMALL.spec((), 32).tied


def test_depths_are_compared_by_place() -> None:
    plan = Plan({"a": (), "b": ("depth_mup:base_depth=1",)}, axis="depth", sizes=(1, 8), other=32, steps=1, seeds=1)
    found = check(plan)
    taps = found["a"]
    assert {"embed", "final", "logits", "block.attn_out", "block.last.residual"} < set(taps)
    assert all("block.0" not in name for name in taps)
    ours, plain = found["b"]["block.last.residual"].change, taps["block.last.residual"].change
    assert ours is not None and plain is not None and ours.mean < plain.mean - 0.3


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--methods", "mup:base_width=32", "--widths", "32,64", "--layers", "1", "--steps", "1", "--seeds", "1"]
    assert main([*words, "--out", str(tmp_path / "check")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "check" / "coord_check.txt").read_text()
    assert "\nbaseline\n" in printed and "\nmup:base_width=32\n" in printed and "taps that grow: " in printed
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "check" / "coord_check.json").read_text())
    assert {**told, "seconds": 0} == {**kept, "seconds": 0}, "the same numbers both times"
    logits = told["arms"]["mup:base_width=32"]["logits"]
    assert list(logits["values"]) == ["32", "64"] and len(logits["values"]["64"][0]) == 2
    assert told["sizes"] == [32, 64] and told["lr"] == 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "64"], "widths are 64; give at least two"),
        (["--widths", "128,64"], "ascending"),
        (["--widths", "64,100"], "width 100 is not a multiple of the head width 16"),
        (["--widths", "64,x"], "a size is 'x'"),
        (["--depths", "0,4"], "depth is 0"),
        (["--widths", "64,128", "--depths", "1,2"], "two different checks"),
        (["--steps", "0"], "steps is 0"),
        (["--seeds", "few"], "--seeds is 'few'; give a whole number"),
        (["--lr", "0"], "lr is 0"),
        (["--init", "large"], "init is 'large'"),
        (["--methods", "mup@optim.beta2=0.9"], "sets recipe values"),
        (["--methods", "mop"], "no model method 'mop'"),
        (["--wdths", "1"], "unrecognized arguments: --wdths"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)
