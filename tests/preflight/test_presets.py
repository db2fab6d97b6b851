"""Published configurations: their facts have sources, add up, and are judged as the runs went."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from poise.core.errors import UserError
from poise.preflight.check import check
from poise.preflight.presets import PRESETS, preset
from poise.preflight.presets.preset import Preset, published
from poise.preflight.presets.table import BEGIN, END, table_markdown, with_table
from poise.preflight.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "case-studies.md"

EXPECTED = {
    "marin-32b": {"qk-norm-lr"},
    "bigscience-104b": {"init-std-width", "ffn-width", "beta2-batch", "fp16-size"},
    "bigscience-52b-throughput": {"init-std-width", "fp16-loss-scale", "beta2-batch"},
    "opt-175b-11x": {"lr-size", "clip", "fp16-size"},
    "opt-175b-final": {"fp16-size"},
    "glm-130b": {"fp16-size"},
    "llama31-8b-mlperf-hot": {"qk-norm-lr", "lr-size", "warmup"},
}
"""Runs that went wrong -> rules that must say so, as a warning or worse."""

NOT_FORESEEN = {"palm-540b", "megatron-mixtral-8x7b", "spam-llama60m", "gpt2-nanogpt"}
"""Runs that went wrong and of which the rules know no more than notes; the page says so."""


def grave(found: Preset) -> set[str]:
    return {one.rule for one in check(found.settings).findings if one.severity != "note"}


def critical(settings: Settings) -> set[str]:
    return {one.rule for one in check(settings).findings if one.severity == "critical"}


def of_outcome(*outcomes: str) -> list[str]:
    return [name for name, found in PRESETS.items() if found.outcome in outcomes]


@pytest.mark.parametrize("found", PRESETS.values(), ids=list(PRESETS))
def test_each_fact_has_the_words_of_a_source(found: Preset) -> None:
    plain = {"source", "format", "said", "notes"}
    filled = {
        field.name
        for field in fields(Settings)
        if field.name not in plain and getattr(found.settings, field.name) not in (None, ())
    }
    assert filled == set(found.settings.said)
    assert len(filled) >= 12
    assert found.settings.source == found.name
    assert found.settings.format == "preset"
    assert all(" @ " in source or source.startswith("arXiv ") or ": issue" in source for source in found.sources)
    assert found.sources
    assert found.title
    assert found.what.endswith(".")


def test_presets_are_found_by_name() -> None:
    assert all(preset(name).name == name for name in PRESETS)
    with pytest.raises(UserError, match=r"no published configuration is called 'bloom-176'.*did you mean 'bloom-176b'"):
        preset("bloom-176")


def test_a_fact_of_an_unknown_field_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="warmup"):
        published("mine", (("warmup", 10, "warmup = 10"),))


def test_presets_and_their_judgement_cost_no_torch() -> None:
    code = (
        "import sys\nfrom poise.preflight.presets import preset\nfrom poise.preflight.check import check\n"
        "check(preset('bloom-176b').settings)\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("olmo2-32b", 32e9),
        ("olmo3-7b", 7.3e9),
        ("olmo3-32b", 32e9),
        ("marin-8b", 8.03e9),
        ("bloom-176b", 176e9),
        ("bigscience-104b", 58e9),
        ("bigscience-52b-throughput", 52e9),
        ("opt-175b-final", 175e9),
        ("glm-130b", 130e9),
        ("llama3-405b", 405e9),
        ("spam-llama60m", 58e6),
        ("gpt2-nanogpt", 124e6),
    ],
)
def test_the_shape_gives_the_size_in_the_name(name: str, weights: float) -> None:
    from_shape = replace(preset(name).settings, params=None).n_params
    assert from_shape == pytest.approx(weights, rel=0.04)


def ramp(first: int, step: int, samples: int, full: int, *, until_samples: int = 0, steps: int = 0) -> int:
    """Follow ``--rampup-batch-size``: steps until a number of samples, or samples after a number of steps."""
    each = samples / ((full - first) // step)
    seen = taken = 0
    while (seen < until_samples) if until_samples else (taken < steps):
        seen += first + int(seen // each) * step if seen < samples else full
        taken += 1
    return taken if until_samples else seen


def test_warm_up_along_a_batch_ramp_is_what_the_logs_say() -> None:
    bloom = (192, 16, 9_765_625, 2048)
    assert ramp(*bloom, steps=12_695) == 9_841_584  # "iteration 12695 | consumed samples: 9841584"
    assert ramp(*bloom, until_samples=183_105) == preset("bloom-176b").settings.warmup_steps
    large = (16, 16, 6_000_000, 2048)
    assert ramp(*large, steps=7000) == 260_912  # "iteration 7000/ 159576 | consumed samples: 260912"
    assert ramp(*large, until_samples=216_320) == preset("bigscience-104b").settings.warmup_steps


@pytest.mark.parametrize("name", of_outcome("stable"))
def test_a_stable_run_breaks_no_critical_rule(name: str) -> None:
    assert critical(preset(name).settings) == set()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_failure_is_foreseen_for_its_reason(name: str) -> None:
    assert EXPECTED[name] <= grave(preset(name))


@pytest.mark.parametrize("name", sorted(NOT_FORESEEN))
def test_what_is_not_foreseen_is_not_claimed(name: str) -> None:
    assert grave(preset(name)) == set()


def test_every_run_that_went_wrong_is_in_one_of_the_two_lists() -> None:
    assert set(EXPECTED) | NOT_FORESEEN == set(of_outcome("spiked", "unstable"))
    assert not set(EXPECTED) & NOT_FORESEEN


def test_what_mended_the_run_mends_the_verdict() -> None:
    marin = preset("marin-32b").settings
    assert "qk-norm-lr" in critical(marin)
    assert critical(replace(marin, qk_norm=True)) == set()

    # Experiments 6, 11 and the series after it: FFN width, initial deviation, beta2, normalised embedding.
    large = preset("bigscience-104b").settings
    mended = replace(large, d_ff=65_536, params=104e9, init_std=0.006, beta2=0.95, embed_norm=True)
    assert {one.rule for one in check(mended).findings if one.severity != "note"} <= {"fp16-size", "embed-std"}


def test_the_page_holds_the_current_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python -m poise.preflight.presets docs/case-studies.md"
    assert table_markdown() in page
    assert all(f"| `{name}` |" in page for name in PRESETS)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(AssertionError, match="has no line"):
        with_table("# Cases\n")
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb\n").count("| preset |") == 1


def test_the_page_names_what_is_not_foreseen() -> None:
    said = PAGE.read_text(encoding="utf-8").partition(END)[2].partition("\n## ")[0]
    assert all(f"`{name}`" in said for name in NOT_FORESEEN)


def test_the_page_prints_nothing_that_was_not_read() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    assert len(rows) >= 20
    assert all(row.split(" | ")[-2] in ("verified", "secondary", "computed") for row in rows)


def test_what_the_page_says_of_marin_is_what_the_table_says() -> None:
    counts = check(preset("marin-8b").settings).counts
    assert (counts["warning"], counts["note"]) == (3, 1)
    assert "`marin-8b` has three warnings and a note" in PAGE.read_text(encoding="utf-8")


def test_palm_has_the_size_of_the_paper() -> None:
    """Multi-query attention with heads 256 wide, a gated MLP of 4 x width, a shared embedding: 540.35B."""
    s = preset("palm-540b").settings
    assert s.d_model and s.n_layers and s.n_heads and s.head_dim and s.d_ff and s.vocab_size
    attention = 2 * s.d_model * s.head_dim * (s.n_heads + 1)
    weights = s.n_layers * (attention + 3 * s.d_model * s.d_ff) + s.vocab_size * s.d_model
    assert weights / 1e9 == pytest.approx(540.35, abs=0.01)
    assert "head-dim" not in {one.rule for one in check(s).findings}
