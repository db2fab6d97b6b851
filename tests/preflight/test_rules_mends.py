"""What a finding says to write removes it, creates nothing critical, and speaks in the source's own names."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from poise.preflight.check import Report, check
from poise.preflight.presets import PRESETS
from poise.preflight.rules.base import put, usual_lr
from poise.preflight.rules.reliability import FLOPS, estimated_seconds
from poise.preflight.rules.schedule import usual_warmup
from poise.preflight.rules.shape import divisors, fitting_heads
from poise.preflight.settings import Finding, Said, Settings

FIELDS = {f.name for f in fields(Settings)}
WRITTEN = re.compile(r"\b([a-z_0-9]+) = (-?[0-9][0-9.]*(?:e[+-]?[0-9]+)?)")
OTHERWISE = {"embed-decay": {"decay_embeddings": False}, "fp16-loss-scale": {"loss_scale": "dynamic"}}
"""Mends that are no number."""


def settings(**values: Any) -> Settings:
    return Settings(source="mine", format="preset", **values)


def values_of(mend: str) -> dict[str, float]:
    """Return the numbers that a mend says to write; of several ways the first."""
    first = re.split(r"[,;]? or ", mend)[0]
    return {
        name: float(text) if re.search(r"[.e]", text) else int(text)
        for name, text in WRITTEN.findall(first)
        if name in FIELDS
    }


def one(report: Report, rule: str) -> Finding:
    (found,) = (found for found in report.findings if found.rule == rule)
    return found


def mend_and_check(case: Settings, rule: str | None = None) -> int:
    """Apply every mend by itself; return how many there were."""
    report = check(case)
    before = {found.rule for found in report.findings if found.severity == "critical"}
    done = 0
    for found in report.findings:
        if rule not in (None, found.rule):
            continue
        written = values_of(found.mend) or OTHERWISE.get(found.rule, {})
        if not written:
            continue
        after = check(replace(case, **written))  # type: ignore[arg-type]
        assert found.rule not in {left.rule for left in after.findings}, (found.rule, found.mend)
        critical = {left.rule for left in after.findings if left.severity == "critical"}
        assert critical <= before, (found.rule, found.mend, critical)
        done += 1
    return done


def some(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *values])


RUNS = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(["adamw", "adam", "lion", "muon"]),
        "lr": st.sampled_from([1e-9, 5e-8, 1e-5, 3e-4, 8e-4, 3e-3, 0.1, 2.0]),
        "min_lr": some(0.0, 1e-6, 3e-5, 1e-3, 3.0),
        "schedule": some("cosine", "constant"),
        "warmup_steps": some(0, 1, 3, 50, 400, 2000, 10_000),
        "total_steps": some(1, 9, 15, 100, 777, 5000, 19_999, 1_000_000),
        "beta1": some(0.0, 0.5, 0.9, 0.95, 0.99, 1.0),
        "beta2": some(0.8, 0.95, 0.98, 0.999, 0.9999),
        "eps": some(0.0, 1e-8, 1e-5, 1e-3, 1.0),
        "clip": some(0.0, 0.3, 1.0, 2.5, 100.0),
        "weight_decay": some(0.0, 0.1, 1.0),
        "decay_embeddings": some(True, False),
        "params": some(1e7, 1e8, 1.5e9, 8e9, 3.2e10, 4e11),
        "batch_sequences": some(8, 64, 2048),
        "ramp_from": some(16, 512),
        "seq_len": some(1024, 8192),
        "max_positions": some(2048, 8192),
        "positions": some("rope", "learned"),
        "qk_norm": some(True, False),
        "z_loss": some(0.0, 1e-4),
        "norm": some("pre", "post"),
        "dtype": some("fp16", "bf16"),
        "devices": some(8, 999, 1000, 16_384),
        "step_seconds": some(0.1, 10.0),
        "save_every": some(0, 1, 1000, 10**7),
        "n_experts": some(8),
        "router_z_loss": some(0.0),
    }
)
SHAPES = st.fixed_dictionaries(
    {
        "d_model": st.one_of(st.sampled_from([768, 1024, 4096, 5120, 6656, 8192, 11_600]), st.integers(1, 20_000)),
        "n_heads": st.integers(1, 160),
        "n_kv_heads": st.one_of(st.none(), st.integers(1, 160)),
        "head_dim": some(64, 100, 128, 256),
        "d_ff": some(1376, 4096, 11_007, 11_008, 14_336, 20_480, 28_672, 65_536),
        "gated_mlp": some(True, False),
        "n_layers": some(2, 24, 80),
        "init_std": some(0.0, 1e-5, 0.006, 0.02, 1.0),
        "embed_std": some(0.02, 1.0),
        "tied": some(True, False),
        "vocab_size": some(100, 32_000, 50_257),
        "tokenizer_vocab": some(90, 32_001),
        "norm": some("pre", "post"),
        "qk_norm": some(True, False),
        "dtype": some("fp16", "bf16"),
    }
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(RUNS)
def test_what_is_said_of_a_run_to_write_removes_the_finding(values: dict[str, Any]) -> None:
    mend_and_check(settings(**values))


@hypothesis_settings(max_examples=150, deadline=None)
@given(SHAPES)
def test_what_is_said_of_a_shape_to_write_removes_the_finding(values: dict[str, Any]) -> None:
    case = settings(**values)
    if case.positions is None and case.d_model is not None and case.d_model % 2 == 0:
        mend_and_check(replace(case, positions="rope"))
    mend_and_check(case)


ADAM = {"optimizer": "adamw", "lr": 3e-4, "params": 8e9}


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("warmup", {**ADAM, "warmup_steps": 0, "total_steps": 1000}),
        ("warmup", {**ADAM, "lr": 8e-4, "warmup_steps": 0, "total_steps": 3000}),
        ("warmup-total", {"warmup_steps": 2000, "total_steps": 1000}),
        ("post-norm-warmup", {"norm": "post", "warmup_steps": 0, "n_layers": 12, "total_steps": 1000}),
        ("min-lr", {"lr": 1e-4, "min_lr": 1e-3}),
        ("min-lr", {"optimizer": "adamw", "lr": 3e-9, "min_lr": 3e-5}),
        ("lr-low", {"optimizer": "adamw", "lr": 3e-9, "min_lr": 3e-9}),
        ("lr-size", {**ADAM, "lr": 1e-2, "min_lr": 1e-3}),
        ("heads-width", {"d_model": 4096, "n_heads": 30, "n_kv_heads": 7}),
        ("kv-heads", {"d_model": 4096, "n_heads": 30, "n_kv_heads": 7}),
        ("beta2-batch", {"optimizer": "adamw", "beta1": 0.99, "beta2": 0.9999}),
        ("clip", {"clip": 0.0}),
        ("init-std-width", {"init_std": 0.02, "d_model": 11_600}),
        ("tied-embed-std", {"tied": True, "d_model": 4096, "embed_std": 1.0}),
        ("embed-decay", {"decay_embeddings": True, "weight_decay": 0.1}),
        ("eps-gradient", {"optimizer": "adamw", "eps": 0.0, "params": 1e16}),
        ("ffn-width", {"d_ff": 28_672, "d_model": 4096, "gated_mlp": True}),
        ("size-multiples", {"d_model": 4000, "n_heads": 32}),
        ("save-interval", {"save_every": 2000, "devices": 16_384, "step_seconds": 10.0}),
        (
            "save-interval-estimated",
            {"save_every": 2000, "devices": 16_384, "params": 4e11, "batch_sequences": 2048, "seq_len": 8192},
        ),
        ("no-checkpoints", {"save_every": 0, "total_steps": 10**6, "devices": 16_384, "step_seconds": 10.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_of_these_rules_says_what_to_write(rule: str, values: dict[str, Any]) -> None:
    assert mend_and_check(settings(**values), rule) == 1


@pytest.mark.parametrize("total", [10, 99, 1000, 15_000])
@pytest.mark.parametrize("params", [1e7, 8e9])
def test_no_warm_up_that_is_advised_is_longer_than_a_tenth(total: int, params: float) -> None:
    for values in ({"warmup_steps": 0}, {"warmup_steps": total * 2}, {"warmup_steps": 0, "norm": "post"}):
        case = settings(optimizer="adamw", lr=3e-4, params=params, total_steps=total, beta2=0.999, **values)
        said = [values_of(f.mend)["warmup_steps"] for f in check(case).findings if "warmup_steps" in f.mend]
        assert said and max(said) <= total / 10
    assert usual_warmup(settings(params=8e9)) == 2000


# -- heads ---------------------------------------------------------------------------------------------------------


def test_heads_are_mended_to_the_nearest_and_key_value_heads_to_those() -> None:
    case = settings(d_model=4096, n_heads=30, n_kv_heads=8)
    assert one(check(case), "heads-width").mend == "n_heads = 32"
    assert one(check(case), "kv-heads").mend == "n_heads = 32"  # 8 fit 32
    odd = check(replace(case, n_kv_heads=7))
    assert one(odd, "heads-width").mend == one(odd, "kv-heads").mend == "n_heads = 32, n_kv_heads = 8"
    assert one(check(settings(n_heads=32, n_kv_heads=7)), "kv-heads").mend == "n_kv_heads = 8"
    assert fitting_heads(settings(d_model=768, n_heads=10)) == 12  # 64 wide, not 96
    assert fitting_heads(settings(d_model=11_600, n_heads=30)) == 50  # 232 wide; 29 would be 400 wide
    assert fitting_heads(settings(d_model=1024, n_heads=60)) == 32  # 64 would be 16 wide
    assert fitting_heads(settings(d_model=6, n_heads=5, positions="rope")) == 3


@given(st.integers(1, 10_000))
def test_divisors_are_all_and_in_order(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


@pytest.mark.parametrize("shape", [(1024, 16, 128), (5120, 64, 128), (3072, 16, 256), (7168, 128, 128)])
def test_chosen_head_widths_are_left_alone(shape: tuple[int, int, int]) -> None:
    """Qwen3 0.6B and 32B, Gemma 7B, DeepSeek-V3."""
    found = check(settings(**dict(zip(("d_model", "n_heads", "head_dim"), shape, strict=True)))).findings
    assert [(f.rule, f.severity) for f in found] == [("heads-inner", "note")]
    assert not values_of(found[0].mend)


# -- guesses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["default of GPT-2", "guessed from torch_dtype = float16"])
def test_a_guess_raises_nothing_above_a_note(words: str) -> None:
    values = {"init_std": 0.02, "d_model": 11_600, "dtype": "bf16", "tied": True, "n_layers": 64}
    assert one(check(settings(**values)), "init-std-width").severity == "warning"
    assert one(check(settings(**values, said={"init_std": words})), "init-std-width").severity == "note"
    zero = settings(init_std=0.0, d_model=64, said={"init_std": words})
    assert check(zero).worst == "note"
    tied = settings(tied=True, d_model=4096, embed_std=1.0, said={"embed_std": words})
    assert check(tied).worst == "note"


@pytest.mark.parametrize("words", ["default of GPT-2", "guessed from torch_dtype = float16"])
def test_fp16_that_nobody_wrote_is_judged_by_no_rule(words: str) -> None:
    values = {**ADAM, "params": 1e11, "lr": 3.5e-4, "dtype": "fp16", "loss_scale": "none", "softmax_fp32": False}
    values |= {"qk_norm": False, "nan_check": False, "clip": 0.0}
    written, guessed = (check(settings(**values, said=said)) for said in ({}, {"dtype": words}))
    fp16 = {"fp16-loss-scale", "fp16-size", "fp16-softmax", "fp16-attention"}
    assert fp16 <= {f.rule for f in written.findings}
    assert not any("fp16" in f.what for f in guessed.findings)
    assert fp16 <= {rule for rule, missing in guessed.not_judged if "dtype" in missing}
    assert one(written, "lr-size").severity == "critical"
    assert one(guessed, "lr-size").severity == "warning"  # as in bf16; the guess did not make it so
    assert one(guessed, "nan-check").severity == "note"
    assert one(guessed, "clip").severity == "warning"


def test_a_guessed_dtype_raises_no_note_to_a_warning() -> None:
    values = {**ADAM, "dtype": "bf16", "master_weights": False, "min_lr": 3e-5}
    assert one(check(settings(**values)), "bf16-weights").severity == "warning"
    guessed = settings(**values, said={"dtype": "guessed from torch_dtype"})
    assert one(check(guessed), "bf16-weights").severity == "note"


def test_an_unknown_start_is_not_judged() -> None:
    """Readers say no init_std of models that scale their start themselves."""
    report = check(settings(d_model=16_384, tied=True, n_layers=64, norm="pre", residual_init="none"))
    unjudged = dict(report.not_judged)
    assert unjudged["init-std-width"] == unjudged["embed-std"] == ("init_std",)
    assert not {"init-std-width", "embed-std", "tied-embed-std"} & {f.rule for f in report.findings}


# -- names, rates, checkpoints -------------------------------------------------------------------------------------


def test_mends_are_in_the_names_of_the_source() -> None:
    said = Said({}, {"warmup_steps": "--lr-warmup-iters", "clip": "--clip-grad", "d_ff": "intermediate_size"})
    case = settings(**ADAM, warmup_steps=0, clip=0.0, d_model=4096, d_ff=28_672, gated_mlp=True, said=said)
    report = check(case)
    assert one(report, "warmup").mend.startswith("--lr-warmup-iters 2000")
    assert one(report, "clip").mend == "--clip-grad 1"
    assert one(report, "ffn-width").mend.startswith("intermediate_size = 11008 ")
    assert put(case, "lr", 3e-4) == "lr = 0.0003"


def test_the_allowance_for_qk_norm_contradicts_no_stable_run() -> None:
    seen = 0
    for found in PRESETS.values():
        s = found.settings
        if found.outcome != "stable" or not s.qk_norm or s.lr is None or s.n_params is None:
            continue
        hot = replace(s, qk_norm=False, z_loss=0.0, lr=3e-3, params=s.n_params)
        said = re.search(r"with up to ([0-9.e-]+)", one(check(hot), "lr-size").mend)
        assert said is not None and float(said[1]) >= s.lr
        seen += 1
    assert seen >= 3
    large = one(check(settings(optimizer="adamw", lr=3e-3, params=1.75e11)), "lr-size").mend
    assert "not published" in large and "up to" not in large


def test_a_slow_beta2_says_what_the_mend_gives() -> None:
    case = settings(**ADAM, beta1=0.9, beta2=0.999)
    assert one(check(case), "beta2-batch").mend == "beta2 = 0.95 (overshoot 1.1 x)"


def test_a_peak_that_is_far_too_low_is_the_mistake_not_the_minimum() -> None:
    found = one(check(settings(optimizer="adamw", lr=3e-9, min_lr=3e-5, params=8e9)), "min-lr")
    assert values_of(found.mend) == {"lr": pytest.approx(usual_lr(8e9), rel=0.05)}


def test_the_time_of_a_step_is_estimated_and_said() -> None:
    case = settings(devices=16_384, params=4.05e11, batch_sequences=2048, seq_len=8192, save_every=1000)
    ends = estimated_seconds(case)
    assert ends == pytest.approx([6 * 4.05e11 * 2048 * 8192 / 16_384 / rate for rate in reversed(FLOPS)])
    found = one(check(case), "save-interval-estimated")
    assert "assumed: 6 x 405B weights x 16.8M tokens" in found.why and "69.1 minutes or more" in found.what
    # 41 s a step would already be bad at 100, 7 s are not: nothing is said.
    assert "save-interval-estimated" in check(replace(case, save_every=100)).passed
