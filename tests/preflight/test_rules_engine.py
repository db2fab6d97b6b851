"""The report, what the rules transcribe from other rooms, and that no settings make a rule fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.core.types import Severity
from poise.model import bound as model_bound
from poise.model import methods as model_methods
from poise.model.build import apply
from poise.model.spec import Part, Spec
from poise.optim import doctor
from poise.preflight.check import RULES, check
from poise.preflight.rules import base, init, methods, precision, reliability
from poise.preflight.rules.base import RANK, usual_lr
from poise.preflight.rules.optimizer import gradient_rms, overshoot
from poise.preflight.rules.values import cleaned
from poise.preflight.settings import Settings

NAN, INF = math.nan, math.inf
BY_ID = {rule.id: rule for rule in RULES}


def settings(**values: Any) -> Settings:
    return Settings(source="mine", format="preset", **values)


# -- the report --------------------------------------------------------------------------------------------------


def test_the_report_orders_counts_and_accounts_for_every_rule() -> None:
    case = settings(
        vocab_size=50257, warmup_steps=20, total_steps=10, clip=2.5, params=1e10, notes=("guessed",), d_model=11600
    )
    report = check(case)
    order = [RANK[found.severity] for found in report.findings]
    assert order == sorted(order) and len(set(order)) == 3
    assert report.worst == "critical" and report.at_least("warning") and report.at_least("note")
    assert report.counts == {"critical": 1, "warning": 1, "note": 2}
    judged = [found.rule for found in report.findings] + list(report.passed)
    assert sorted(judged + [rule for rule, _ in report.not_judged]) == sorted(BY_ID)
    record = json.loads(json.dumps(report.record()))
    assert record["findings"][0]["rule"] == "warmup-total" and record["notes"] == ["guessed"]
    assert record["source"] == "mine" and record["counts"]["note"] == 2


def test_an_empty_configuration_has_no_findings() -> None:
    report = check(settings())
    assert not report.findings and report.worst is None and not report.at_least("note")


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from poise.preflight.check import check\n"
        "from poise.preflight.settings import Settings\n"
        "check(Settings(source='', format='', methods=('qk_norm', 'soft_cap', 'soft_clip', 'x')))\n"
        "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- transcriptions against the originals ------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("method", ["", "embed_norm", "embed_scale"])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_bound_is_the_models(mlp: str, method: str, scaled: bool) -> None:
    start = Part.of("default", {"std": 0.01, "embedding_std": 0.03, "scale_residual": scaled})
    spec = Spec(100, 128, 6, 256, 4, 4, 640, mlp=mlp, init=start)
    spec = apply(spec, method) if method else spec
    attention, first = model_bound.bound(spec).sublayers[:2]
    case = settings(
        d_model=256,
        d_ff=640,
        n_layers=6,
        init_std=0.01,
        embed_std=0.03,
        norm="pre",
        residual_init="scaled" if scaled else "none",
        gated_mlp=mlp == "swiglu",
        embed_norm=method == "embed_norm",
        embed_scale=16.0 if method == "embed_scale" else None,
    )
    stream, out = init.stream_std(case), init.residual_std(case)
    assert math.isclose(stream, first.stream_std, rel_tol=1e-3)
    assert math.isclose(init.mlp_factor(256, 640, 0.01, out, stream, mlp == "swiglu"), first.factor, rel_tol=1e-3)
    assert math.isclose(init.attention_condition(256, out, stream), attention.condition, rel_tol=1e-3)
    broken = "embed-std" in {found.rule for found in check(case).findings}
    assert broken == (max(first.condition, attention.condition) > init.LIMIT)


def test_the_limit_of_the_bound_is_the_models() -> None:
    assert init.LIMIT == model_bound.LIMIT


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.99, 0.995, 0.996, 0.9965, 0.997, 0.998, 0.999, 0.9999])
def test_rounding_is_the_doctors(beta: float) -> None:
    assert precision.stuck_share(beta) == doctor.stuck_share(torch.bfloat16, beta)


@pytest.mark.parametrize("beta2", [0.95, 0.98, 0.999])
def test_the_overshoot_is_what_adam_does(beta2: float) -> None:
    first, second, steps = 0.0, 1e-24, []  # long after the start: no bias correction, gradients next to nothing
    for _ in range(60):
        first, second = 0.9 * first + 0.1, beta2 * second + (1 - beta2)
        steps.append(first / math.sqrt(second))
    peak, at = overshoot(0.9, beta2)
    assert steps.index(max(steps)) + 1 == at and math.isclose(max(steps), peak, rel_tol=1e-9)


def test_a_clipped_gradient_is_no_larger_than_said() -> None:
    gradient = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 5
    clipped = gradient / gradient.norm() * 0.3
    assert math.isclose(float(clipped.square().mean().sqrt()), gradient_rms(10_000, 0.3), rel_tol=1e-5)


def test_the_table_of_conflicts_is_the_methods() -> None:
    known = set(model_methods.METHODS)
    spec = Spec(64, 24, 2, 64, 4, 4, 160, tied=False)
    wrong = []
    for one, other in combinations(model_methods.METHODS, 2):
        clash = False
        for order in ((one, other), (other, one)):
            try:
                model_methods.apply_methods(spec, order)
            except UserError:
                clash = True
        if clash != bool(methods.conflict(one, other)):
            wrong.append((one, other))
    assert not wrong
    table = {name for takers in methods.SHARED_SLOTS.values() for name in takers}
    assert table | set(methods.EXCLUDED) <= known


def test_methods_that_change_the_rate_are_the_methods() -> None:
    said = {name for name in model_methods.METHODS if hasattr(model_methods.load(name), "CHANGES_LR")}
    assert set(base.OTHER_LR) == said - {"embed_scale"}  # which changes it for the embedding alone
    assert set(base.BOUNDED_LOGITS) <= set(model_methods.METHODS)


def test_the_failure_rate_is_the_published_one() -> None:
    assert math.isclose(54 * 24 / reliability.mttf_hours(16384), 419)


# -- any settings ------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.none(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 64, 128, 4096, 10**9, 10**17, 10**40, -(10**40), True]),
    st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1e-300, 5e-324, 1e300, 1.0, 0.5, 0.9, 0.999, 0.9999999999, 2.5, 1e-8]),
    st.integers(0, 10**6),
    st.floats(0, 2),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = {
    "norm": ["pre", "post", "sandwich", "reordered"],
    "positions": ["rope", "learned", "sinusoidal", "alibi", "none"],
    "residual_init": ["none", "scaled", "depth"],
    "dtype": ["fp32", "bf16", "fp16", "fp8", "fp4"],
    "state_dtype": ["fp32", "bf16", "8bit", "4bit"],
    "optimizer": ["adamw", "lion", "muon", "AdamW", ""],
    "loss_scale": ["dynamic", "none", "12", "nan", "inf", "1e999", "-1", "x", ""],
    "schedule": ["cosine", "constant", ""],
    "attention_kernel": ["sdpa", "flash_attention_2", "eager", ""],
    "norm_kind": ["rmsnorm"],
}
FLAGS = "gated_mlp tied biases qk_norm embed_norm decay_embeddings master_weights softmax_fp32 skip_steps nan_check"


def field_values(name: str) -> st.SearchStrategy[Any]:
    if name in TEXTS:
        return st.one_of(st.none(), st.sampled_from(TEXTS[name]))
    if name in FLAGS.split():
        return st.sampled_from([None, True, False])
    if name == "methods":
        return st.lists(st.sampled_from([*model_methods.METHODS, "", ":", "nothing"]), max_size=6).map(tuple)
    if name == "said":
        return st.just({})
    return st.just(()) if name == "notes" else NUMBERS


ANY = st.fixed_dictionaries(
    {f.name: field_values(f.name) for f in fields(Settings) if f.name not in ("source", "format")}
)


@hypothesis_settings(max_examples=100, deadline=None)
@given(ANY)
def test_no_settings_make_a_rule_fail(values: dict[str, Any]) -> None:
    report = check(settings(**values))
    json.dumps(report.record(), allow_nan=False)
    for found in report.findings:
        assert RANK[found.severity] >= RANK[BY_ID[found.rule].severity]
        assert found.severity in get_args(Severity)
        assert len(found.what) < 3000
    assert len(report.findings) + len(report.passed) + len(report.not_judged) == len(RULES)


@hypothesis_settings(max_examples=50, deadline=None)
@given(ANY)
def test_cleaning_leaves_nothing_to_report(values: dict[str, Any]) -> None:
    once = cleaned(settings(**values))
    assert cleaned(once) == once
    assert not any(isinstance(getattr(once, name), float) for name in ("d_model", "n_heads", "save_every"))
    assert "unusable-value" in check(once).passed


@given(st.floats(1e3, 1e15), st.floats(1.0, 10.0))
def test_the_usual_rate_falls_with_size(size: float, factor: float) -> None:
    assert 8e-5 <= usual_lr(size * factor) <= usual_lr(size) * (1 + 1e-12) <= 3e-3 * (1 + 1e-12)


@given(st.floats(1e-3, 0.1), st.floats(1.0, 3.0))
def test_a_larger_deviation_is_never_judged_more_mildly(std: float, factor: float) -> None:
    def rank(value: float) -> int:
        findings = check(settings(init_std=value, d_model=8192, dtype="bf16")).findings
        return min((RANK[found.severity] for found in findings), default=3)

    assert rank(std * factor) <= rank(std)


def test_our_own_recipes_have_no_critical_finding() -> None:
    recipes = Path(base.__file__).parents[2] / "train" / "recipes"
    seen = 0
    for path in sorted(recipes.glob("*.toml")):
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        model, optim, train = recipe["model"], recipe["optim"], recipe["train"]
        case = Settings(
            source=path.name,
            format="recipe",
            optimizer="adamw",
            norm="pre",
            positions="rope",
            init_std=0.02,
            residual_init="scaled",
            qk_norm="qk_norm" in model["methods"],
            gated_mlp=True,
            tied=model["tied"],
            n_layers=model["n_layers"],
            d_model=model["d_model"],
            n_heads=model["n_heads"],
            n_kv_heads=model.get("n_kv_heads"),
            d_ff=model.get("d_ff"),
            methods=tuple(model["methods"]),
            vocab_size=recipe["data"]["vocab_size"],
            lr=optim["lr"],
            warmup_steps=optim["schedule"]["warmup_steps"],
            total_steps=train.get("steps"),
            batch_sequences=train["batch_size"],
            seq_len=train["seq_len"],
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            clip=1.0,
        )
        assert [found for found in check(case).findings if found.severity != "note"] == [], path.name
        seen += 1
    assert seen >= 4
