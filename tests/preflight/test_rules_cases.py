"""Published runs against the rules: good ones pass, known failures are named for the reason that was found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.preflight.check import Report, check
from poise.preflight.settings import Settings

ADAM = {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def settings(name: str, **values: object) -> Settings:
    return Settings(source=name, format="preset", **values)  # type: ignore[arg-type]


OLMO = {
    **ADAM,
    "norm": "reordered",
    "norm_kind": "rmsnorm",
    "positions": "rope",
    "qk_norm": True,
    "gated_mlp": True,
    "tied": False,
    "init_std": 0.02,
    "residual_init": "none",
    "z_loss": 1e-5,
    "decay_embeddings": False,
    "warmup_steps": 2000,
    "schedule": "cosine",
    "dtype": "bf16",
    "state_dtype": "fp32",
    "vocab_size": 100352,
    "tokenizer_vocab": 100278,
    "skip_steps": True,
}
OLMO_32B = {"n_layers": 64, "d_model": 5120, "n_heads": 40, "n_kv_heads": 8, "d_ff": 27648}
BLOOM = {
    **ADAM,
    "n_layers": 70,
    "d_model": 14336,
    "n_heads": 112,
    "d_ff": 57344,
    "gated_mlp": False,
    "vocab_size": 250880,
    "tied": True,
    "norm": "pre",
    "norm_kind": "layernorm",
    "positions": "alibi",
    "embed_norm": True,
    "qk_norm": False,
    "init_std": 0.0048,
    "residual_init": "scaled",
    "lr": 6e-5,
    "min_lr": 6e-6,
    "schedule": "cosine",
    "batch_sequences": 2048,
    "seq_len": 2048,
    "max_positions": 2048,
    "ramp_from": 16,
    "dtype": "bf16",
    "softmax_fp32": True,
    "z_loss": 0.0,
    "save_every": 100,
}
LLAMA_8B = {
    "n_layers": 32,
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_ff": 14336,
    "gated_mlp": True,
    "tied": False,
    "vocab_size": 128256,
    "tokenizer_vocab": 128256,
    "norm": "pre",
    "positions": "rope",
    "qk_norm": False,
    "z_loss": 0.0,
    "dtype": "bf16",
    "seq_len": 8192,
    "max_positions": 8192,
}
LLAMA_405B = {**LLAMA_8B, "n_layers": 126, "d_model": 16384, "n_heads": 128, "d_ff": 53248}
MARIN = {
    **ADAM,
    **OLMO_32B,
    "gated_mlp": True,
    "tied": False,
    "vocab_size": 128256,
    "norm": "pre",
    "positions": "rope",
    "init_std": 0.02,
    "residual_init": "none",
    "decay_embeddings": False,
    "weight_decay": 0.05,
    "clip": 0.2,
    "z_loss": 1e-4,
    "lr": 7e-4,
    "schedule": "wsd",
    "warmup_steps": 2000,
    "dtype": "bf16",
}
MOE = {"d_model": 7168, "n_layers": 61, "vocab_size": 129280, "norm": "pre", "positions": "rope", "gated_mlp": True}

GOOD = {
    "olmo2-32b": settings("olmo2-32b", **OLMO, **OLMO_32B, lr=6e-4, batch_sequences=2048, seq_len=4096),
    "olmo3-7b": settings(
        *("olmo3-7b",),
        **{**OLMO, "n_layers": 32, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "d_ff": 11008},
        lr=3e-4,
        batch_sequences=512,
        seq_len=8192,
    ),
    "olmo3-32b": settings("olmo3-32b", **OLMO, **OLMO_32B, lr=6e-4, batch_sequences=1024, seq_len=8192),
    "bloom-176b": settings("bloom-176b", **BLOOM, warmup_steps=7800),
    "bloom-176b, warm-up counted in full batches": settings("bloom", **BLOOM, warmup_steps=89),
    "marin-32b with QK-norm": settings("marin-32b-qkn", **MARIN, qk_norm=True),
    "llama3-405b": settings(
        *("llama3-405b",),
        **{**LLAMA_405B, **ADAM, "lr": 8e-5, "min_lr": 8e-7, "warmup_steps": 8000, "batch_sequences": 2048},
        devices=16384,
        step_seconds=40.0,
        save_every=20,
    ),
    "llama3-405b, 0.02 from its config file": settings(
        "config.json", **LLAMA_405B, init_std=0.02, residual_init="none", attention_kernel="sdpa"
    ),
    "kimi-k2": settings(
        *("kimi-k2",),
        **{**MOE, "n_heads": 64, "n_experts": 384, "d_ff": 2048},
        params=1.04e12,
        optimizer="muonclip",
        lr=2e-4,
        qk_norm=False,
        qk_clip=100.0,
        weight_decay=0.1,
        warmup_steps=500,
        dtype="bf16",
    ),
    "deepseek-v3": settings(
        *("deepseek-v3",),
        **{**MOE, **ADAM, "n_heads": 128, "d_ff": 18432, "n_experts": 256},
        params=6.71e11,
        lr=2.2e-4,
        warmup_steps=2000,
        init_std=0.006,
        residual_init="none",
        qk_norm=False,
        z_loss=0.0,
        batch_sequences=15360,
        seq_len=4096,
        ramp_from=3072,
        dtype="fp8",
        state_dtype="bf16",
    ),
    "llama-3.1-8b in MLPerf, cool": settings(
        *("mlperf",),
        **{**LLAMA_8B, **ADAM, "eps": 1e-5},
        lr=4e-4,
        warmup_steps=16,
        total_steps=1_200_000,
        batch_sequences=16,
    ),
}

B104 = {
    **ADAM,
    "optimizer": "adam",
    "n_layers": 64,
    "d_model": 11600,
    "n_heads": 80,
    "d_ff": 46400,
    "gated_mlp": False,
    "vocab_size": 50257,
    "tied": True,
    "norm": "pre",
    "norm_kind": "layernorm",
    "positions": "learned",
    "embed_norm": False,
    "qk_norm": False,
    "init_std": 0.02,
    "residual_init": "scaled",
    "beta2": 0.999,
    "lr": 6e-5,
    "min_lr": 6e-6,
    "batch_sequences": 2048,
    "ramp_from": 16,
    "seq_len": 2048,
    "max_positions": 2048,
    "dtype": "fp16",
    "loss_scale": "12",
    "softmax_fp32": False,
    "warmup_steps": 5000,
}
B52 = {**B104, "d_model": 8192, "d_ff": 32768, "n_heads": 64, "lr": 1.5e-4, "min_lr": 1e-5, "batch_sequences": 1024}
OPT = {
    **ADAM,
    "n_layers": 96,
    "d_model": 12288,
    "n_heads": 96,
    "d_ff": 49152,
    "gated_mlp": False,
    "vocab_size": 50272,
    "norm": "pre",
    "qk_norm": False,
    "lr": 3e-4,
    "beta2": 0.98,
    "clip": 2.5,
    "weight_decay": 0.05,
    "dtype": "fp16",
    "loss_scale": "dynamic",
    "warmup_steps": 2000,
    "batch_sequences": 1024,
    "seq_len": 2048,
}
HOT = {**LLAMA_8B, **ADAM, "eps": 1e-5, "lr": 8e-4, "min_lr": 8e-5, "batch_sequences": 64}

FAILED: dict[str, tuple[Settings, dict[str, str]]] = {
    "bigscience-104b": (
        settings("104b", **B104),
        {"init-std-width": "critical", "beta2-batch": "warning", "fp16-size": "warning", "fp16-softmax": "warning"},
    ),
    "bigscience-104b, first shape": (
        settings("104b", **{**B104, "n_layers": 32, "d_model": 16384, "n_heads": 128, "d_ff": 20480}),
        {"init-std-width": "critical", "ffn-width": "warning"},
    ),
    "bigscience-52b": (
        settings("52b", **{**B52, "ramp_from": None, "seq_len": 1024, "warmup_steps": 10, "total_steps": 1000}),
        {"init-std-width": "critical", "fp16-size": "warning", "fp16-loss-scale": "warning"},
    ),
    "mlperf hot, 192 samples": (settings("hot", **HOT, warmup_steps=3), {"warmup": "warning"}),
    "mlperf hot, 192 steps": (settings("hot", **HOT, warmup_steps=192), {"warmup": "warning", "qk-norm-lr": "warning"}),
    "opt-175b 11.x": (
        settings("opt", **OPT),
        {"lr-size": "critical", "clip": "warning", "beta2-batch": "warning", "fp16-size": "warning"},
    ),
    "marin-32b before QK-norm": (settings("marin", **MARIN, qk_norm=False), {"qk-norm-lr": "critical"}),
}


def severities(report: Report) -> dict[str, str]:
    return {found.rule: found.severity for found in report.findings}


@pytest.mark.parametrize("name", GOOD)
def test_good_runs_have_nothing_critical(name: str) -> None:
    report = check(GOOD[name])
    assert not [found for found in report.findings if found.severity == "critical"]


@pytest.mark.parametrize("name", ["olmo2-32b", "olmo3-7b", "olmo3-32b", "bloom-176b", "llama3-405b", "kimi-k2"])
def test_the_best_runs_have_not_even_a_warning(name: str) -> None:
    assert not [found for found in check(GOOD[name]).findings if found.severity != "note"]


@pytest.mark.parametrize("name", FAILED)
def test_failures_are_named_for_the_right_reason(name: str) -> None:
    case, expected = FAILED[name]
    assert expected.items() <= severities(check(case)).items()


def test_the_forgotten_ffn_width_is_traced_to_the_model_it_came_from() -> None:
    report = check(FAILED["bigscience-104b, first shape"][0])
    (found,) = (found for found in report.findings if found.rule == "ffn-width")
    assert "20480" in found.what and "5120" in found.what and "65536" in found.mend


@pytest.mark.parametrize(
    ("name", "mends", "rule"),
    [
        ("bigscience-104b", {"init_std": 0.006, "embed_norm": True}, "init-std-width"),
        ("bigscience-104b", {"beta2": 0.95}, "beta2-batch"),
        ("bigscience-104b, first shape", {"d_ff": 65536}, "ffn-width"),
        ("bigscience-52b", {"dtype": "bf16"}, "fp16-size"),
        ("bigscience-52b", {"loss_scale": "dynamic"}, "fp16-loss-scale"),
        ("mlperf hot, 192 steps", {"warmup_steps": 2000}, "warmup"),
        ("mlperf hot, 192 steps", {"lr": 4e-4}, "warmup"),
        ("opt-175b 11.x", {"lr": 6e-5}, "lr-size"),
        ("opt-175b 11.x", {"clip": 1.0}, "clip"),
        ("marin-32b before QK-norm", {"qk_norm": True}, "qk-norm-lr"),
    ],
)
def test_what_they_changed_silences_the_rule(name: str, mends: dict[str, object], rule: str) -> None:
    case = FAILED[name][0]
    gravity = severities(check(case))[rule]
    assert gravity in ("critical", "warning")
    after = severities(check(replace(case, **mends))).get(rule)
    assert after in (None, "note")


def test_findings_carry_the_values_as_the_source_says_them() -> None:
    case = replace(FAILED["bigscience-104b"][0], said={"init_std": "--init-method-std 0.02"})
    (found,) = (found for found in check(case).findings if found.rule == "init-std-width")
    assert "--init-method-std 0.02" in found.what and "0.0059" in found.mend and "chronicles" in found.source
