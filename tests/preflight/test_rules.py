"""Every rule has configurations that break it, with the severity that it gives, and some that pass."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from poise.core.types import Severity
from poise.preflight.check import RULES, check
from poise.preflight.rules import base
from poise.preflight.rules.base import RANK
from poise.preflight.settings import Settings

NAN = math.nan


def settings(**values: Any) -> Settings:
    return Settings(source="mine", format="preset", **values)


ADAM = {"optimizer": "adamw", "lr": 3e-4, "params": 8e9}
SHAPE = {"d_model": 4096, "n_heads": 32}
BIG = {"devices": 16384, "params": 4e11, "batch_sequences": 2048, "seq_len": 8192}  # 7 to 41 s a step
SMALL = {"d_model": 1024, "init_std": 0.02, "n_layers": 24, "norm": "pre"}

# rule -> ((breaks, severity), ...), (passes, ...)
CASES: dict[str, tuple[tuple[tuple[dict[str, Any], Severity], ...], tuple[dict[str, Any], ...]]] = {
    "unusable-value": (
        (
            ({"lr": NAN}, "critical"),
            ({"n_layers": -1}, "critical"),
            ({"d_model": 10**30}, "critical"),
            ({"n_layers": 100_001}, "critical"),
            ({"d_model": 10_000_001}, "critical"),
            ({"vocab_size": 10**9}, "critical"),
        ),
        ({}, {"lr": 1e-3, "clip": 0.0}, {"n_layers": 1000, "d_model": 53248, "save_every": 10**15}),
    ),
    "init-std-width": (
        (
            ({"init_std": 0.02, "d_model": 11600, "dtype": "fp16"}, "critical"),
            ({"init_std": 0.02, "d_model": 8192, "dtype": "bf16"}, "warning"),
            ({"init_std": 0.02, "d_model": 5120}, "note"),
            ({"init_std": 0.02, "d_model": 11600, "dtype": "fp16", "embed_norm": True}, "note"),
            ({"init_std": 0.0, "d_model": 64}, "critical"),
            ({"init_std": 1e-5, "d_model": 1920}, "note"),
        ),
        (
            {"init_std": 0.02, "d_model": 4096},
            {"init_std": 0.02, "d_model": 64},
            {"init_std": 0.02, "d_model": 5120, "qk_norm": True},
            {"init_std": 1.0, "d_model": 8192, "methods": ("u_mup",)},
        ),
    ),
    "init-depth": (
        (
            ({"n_layers": 24, "norm": "pre", "residual_init": "none"}, "note"),
            ({"n_layers": 80, "norm": "pre", "residual_init": "none", "d_model": 8192, "init_std": 0.02}, "warning"),
        ),
        (
            {"n_layers": 24, "norm": "pre", "residual_init": "scaled"},
            {"n_layers": 24, "norm": "reordered", "residual_init": "none"},
            {"n_layers": 24, "norm": "pre", "residual_init": "none", "methods": ("layer_norm_scaling",)},
        ),
    ),
    "embed-std": (
        (
            ({**SMALL, "residual_init": "scaled"}, "note"),
            ({**SMALL, "dtype": "fp16"}, "warning"),
        ),
        (
            {**SMALL, "residual_init": "scaled", "embed_scale": 32.0},
            {**SMALL, "residual_init": "scaled", "embed_norm": True},
            {"d_model": 1024, "init_std": 0.02, "n_layers": 24, "norm": "reordered"},
        ),
    ),
    "tied-embed-std": (
        (
            ({"tied": True, "d_model": 768, "embed_std": 1.0}, "warning"),
            ({"tied": True, "d_model": 4096, "embed_std": 1.0}, "critical"),
        ),
        (
            {"tied": True, "d_model": 768, "init_std": 0.02},
            {"tied": False, "d_model": 4096, "embed_std": 1.0},
            {"tied": True, "d_model": 768, "init_std": 0.02, "embed_scale": 30.0},
        ),
    ),
    "embed-decay": (
        (
            ({"decay_embeddings": True, "weight_decay": 0.1}, "note"),
            ({**ADAM, "lr": 8e-4, "decay_embeddings": True, "weight_decay": 0.1}, "warning"),
        ),
        ({"decay_embeddings": False, "weight_decay": 0.1}, {"decay_embeddings": True, "weight_decay": 0.0}),
    ),
    "qk-norm-lr": (
        (
            ({**ADAM, "lr": 7e-4, "params": 3.2e10, "qk_norm": False}, "critical"),
            ({**ADAM, "lr": 8e-4, "qk_norm": False}, "warning"),
            ({**ADAM, "lr": 4e-4, "qk_norm": False}, "note"),
            ({**ADAM, "lr": 0.1, "params": 1e7, "qk_norm": False}, "warning"),
        ),
        (
            {**ADAM, "lr": 7e-4, "params": 3.2e10, "qk_norm": True},
            {**ADAM, "lr": 7e-4, "params": 3.2e10, "qk_norm": False, "qk_clip": 100.0},
            {**ADAM, "lr": 7e-4, "params": 3.2e10, "qk_norm": False, "methods": ("soft_cap:cap=50",)},
            {**ADAM, "qk_norm": False},
            {**ADAM, "lr": 0.1, "qk_norm": False, "methods": ("mup",)},
            {**ADAM, "lr": 3e-3, "params": 1e7, "qk_norm": False},
        ),
    ),
    "muon-logits": (
        (({"optimizer": "muon", "params": 1e10, "qk_norm": False}, "warning"),),
        (
            {"optimizer": "muon", "params": 1e10, "qk_norm": False, "qk_clip": 100.0},
            {"optimizer": "adamw", "params": 1e10, "qk_norm": False},
            {"optimizer": "muon", "params": 1e8, "qk_norm": False},
        ),
    ),
    "z-loss-lr": (
        (
            ({**ADAM, "lr": 8e-4, "z_loss": 0.0}, "note"),
            ({**ADAM, "lr": 1e-3, "z_loss": 0.0}, "warning"),
        ),
        ({**ADAM, "lr": 1e-3, "z_loss": 1e-4}, {**ADAM, "z_loss": 0.0}),
    ),
    "cap-kernel": (
        (
            ({"attn_soft_cap": 50.0, "attention_kernel": "sdpa"}, "critical"),
            ({"attn_soft_cap": 50.0, "attention_kernel": "flash_attention_2"}, "note"),
        ),
        (
            {"attn_soft_cap": 50.0, "attention_kernel": "eager"},
            {"attn_soft_cap": 50.0, "attention_kernel": "flex_attention"},
            {"attn_soft_cap": 50.0, "attention_kernel": "flash_attention_3"},
            {"attn_soft_cap": 0.0, "attention_kernel": "sdpa"},
        ),
    ),
    "lns-scaled-init": (
        (
            ({"methods": ("layer_norm_scaling",), "residual_init": "scaled"}, "warning"),
            ({"methods": ("layer_norm_scaling", "small_init")}, "warning"),
        ),
        ({"methods": ("layer_norm_scaling",), "residual_init": "none"}, {"methods": ("scaled_init",)}),
    ),
    "post-norm-deep": (
        (({"norm": "post", "n_layers": 24}, "warning"),),
        (
            {"norm": "post", "n_layers": 6},
            {"norm": "post", "n_layers": 24, "methods": ("deep_norm",)},
            {"norm": "post", "n_layers": 70, "said": {"norm": "--layernorm-order post (DeepNorm)"}},
        ),
    ),
    "router-z-loss": (
        (({"n_experts": 8, "router_z_loss": 0.0}, "note"),),
        ({"n_experts": 8, "router_z_loss": 1e-3}, {"n_experts": 0, "router_z_loss": 0.0}),
    ),
    "fp16-attention": (
        (({"dtype": "fp16", "qk_norm": False, "softmax_fp32": False, "params": 1e11}, "warning"),),
        (
            {"dtype": "fp16", "qk_norm": False, "softmax_fp32": True, "params": 1e11},
            {"dtype": "bf16", "qk_norm": False, "softmax_fp32": False, "params": 1e11},
        ),
    ),
    "betas": (
        (({"beta1": 1.0, "beta2": 0.95}, "critical"), ({"optimizer": "adam", "beta1": 0.95, "beta2": 0.8}, "warning")),
        ({"beta1": 0.9, "beta2": 0.95}, {"optimizer": "lion", "beta1": 0.95, "beta2": 0.8}),
    ),
    "beta2-batch": (
        (
            ({"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999}, "note"),
            (
                {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "batch_sequences": 2048, "seq_len": 2048},
                "note",
            ),
            (
                {**ADAM, "beta1": 0.9, "beta2": 0.999, "batch_sequences": 2048, "seq_len": 2048},
                "warning",
            ),
        ),
        (
            {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95},
            {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "batch_sequences": 8, "seq_len": 512},
        ),
    ),
    "eps-gradient": (
        (
            ({"optimizer": "adamw", "eps": 1e-5, "params": 8e9}, "note"),
            ({"optimizer": "adamw", "eps": 1e-5, "params": 4e11}, "warning"),
            ({"optimizer": "adamw", "eps": 1e-2, "params": 8e9}, "critical"),
            ({"optimizer": "adamw", "eps": 3.1e-4, "params": 1e10}, "critical"),  # 31 times
            ({"optimizer": "adamw", "eps": 2.9e-4, "params": 1e10}, "warning"),
            ({"optimizer": "adamw", "eps": 0.0}, "warning"),
        ),
        (
            {"optimizer": "adamw", "eps": 1e-8, "params": 8e9},
            {"optimizer": "adamw", "eps": 1e-6, "params": 1e6},
            {"optimizer": "muon", "eps": 1e-2, "params": 8e9},
        ),
    ),
    "clip": (
        (
            ({"clip": 0.0}, "note"),
            ({"clip": 0.0, "params": 1e9}, "warning"),
            ({"clip": 2.5, "params": 1.75e11}, "warning"),
            ({"clip": 5.0}, "note"),
        ),
        ({"clip": 1.0, "params": 1e9}, {"clip": 0.1}),
    ),
    "weight-decay": (
        (({"weight_decay": 0.0, "dtype": "bf16"}, "note"), ({"weight_decay": 1.0, **ADAM}, "note")),
        ({"weight_decay": 0.1, "dtype": "bf16"}, {"weight_decay": 0.0, "dtype": "fp32"}),
    ),
    "lion-lr": (
        (({"optimizer": "lion", "lr": 3e-4, "params": 8e9}, "warning"),),
        ({"optimizer": "lion", "lr": 6e-5, "params": 8e9}, ADAM),
    ),
    "low-bit-states": (
        (({"state_dtype": "8bit"}, "note"), ({"state_dtype": "4bit"}, "note")),
        ({"state_dtype": "fp32"},),
    ),
    "lr-size": (
        (
            ({**ADAM, "lr": 8e-4}, "warning"),
            ({**ADAM, "lr": 3e-4, "params": 1.75e11, "dtype": "fp16"}, "critical"),
            ({**ADAM, "lr": 1e-2}, "critical"),
            ({**ADAM, "lr": 3.0, "params": 1e7}, "critical"),
            ({**ADAM, "lr": 0.1, "params": 1.7e7}, "warning"),
            ({**ADAM, "lr": 1e-2, "params": 1.7e7}, "note"),
            ({**ADAM, "lr": 1e-2, "qk_norm": True}, "warning"),
        ),
        (
            ADAM,
            {**ADAM, "lr": 1e-3, "qk_norm": True},
            {**ADAM, "lr": 3e-3, "params": 1.7e7},
            {**ADAM, "lr": 2.4e-4, "params": 1.75e11, "dtype": "bf16"},
            {**ADAM, "optimizer": "sgd", "lr": 1.0},
            {**ADAM, "lr": 3e-4, "params": 6.7e11, "n_experts": 256, **SHAPE, "n_layers": 32},
        ),
    ),
    "lr-low": (
        (({**ADAM, "lr": 3e-9}, "warning"), ({"optimizer": "adamw", "lr": 9.9e-8}, "warning")),
        (ADAM, {**ADAM, "lr": 1e-6}, {**ADAM, "optimizer": "sgd", "lr": 1e-9}),
    ),
    "warmup": (
        (
            ({**ADAM, "lr": 8e-4, "warmup_steps": 3, "batch_sequences": 64, "seq_len": 8192}, "warning"),
            ({**ADAM, "lr": 8e-4, "warmup_steps": 3, "batch_sequences": 16, "seq_len": 8192}, "note"),
            ({**ADAM, "warmup_steps": 0}, "warning"),
            ({**ADAM, "warmup_steps": 200}, "note"),
            ({**ADAM, "params": 1e8, "warmup_steps": 100, "beta2": 0.999}, "note"),
        ),
        (
            {**ADAM, "lr": 8e-4, "warmup_steps": 2000, "batch_sequences": 64, "seq_len": 8192},
            {**ADAM, "params": 1e7, "warmup_steps": 40, "beta2": 0.95},
            {**ADAM, "params": 1e7, "warmup_steps": 20, "beta2": 0.95, "total_steps": 200},
            {**ADAM, "warmup_steps": 89, "beta2": 0.95, "ramp_from": 16, "batch_sequences": 2048},
            {**ADAM, "optimizer": "sgd", "warmup_steps": 0},
            {**ADAM, "lr": 8e-4, "warmup_steps": 100, "total_steps": 1000},
            {**ADAM, "warmup_steps": 0, "total_steps": 5},
        ),
    ),
    "warmup-total": (
        (
            ({"warmup_steps": 2000, "total_steps": 1000}, "critical"),
            ({"warmup_steps": 600, "total_steps": 1000}, "warning"),
        ),
        ({"warmup_steps": 100, "total_steps": 1000}, {"warmup_steps": 0, "total_steps": 1}),
    ),
    "min-lr": (
        (
            ({"lr": 1e-4, "min_lr": 1e-3}, "critical"),
            ({"lr": 1e-4, "min_lr": 1e-4, "schedule": "cosine"}, "note"),
        ),
        ({"lr": 1e-4, "min_lr": 1e-5}, {"lr": 1e-4, "min_lr": 1e-4, "schedule": "constant"}),
    ),
    "post-norm-warmup": (
        (
            ({"norm": "post", "warmup_steps": 0, "n_layers": 12}, "critical"),
            ({"norm": "post", "warmup_steps": 100, "n_layers": 6}, "warning"),
        ),
        (
            {"norm": "post", "warmup_steps": 4000},
            {"norm": "pre", "warmup_steps": 0},
            {"norm": "post", "warmup_steps": 60, "total_steps": 600},
        ),
    ),
    "batch-ramp": (
        (({"ramp_from": 512, "batch_sequences": 16}, "warning"),),
        ({"ramp_from": 16, "batch_sequences": 2048},),
    ),
    "fp16-loss-scale": (
        (
            ({"dtype": "fp16", "loss_scale": "none"}, "critical"),
            ({"dtype": "fp16", "loss_scale": "1.0"}, "critical"),
            ({"dtype": "fp16", "loss_scale": "12.0"}, "warning"),
        ),
        (
            {"dtype": "fp16", "loss_scale": "dynamic"},
            {"dtype": "fp16", "loss_scale": "65536"},
            {"dtype": "bf16", "loss_scale": "none"},
        ),
    ),
    "fp16-size": (
        (({"dtype": "fp16", "params": 1e11}, "warning"), ({"dtype": "fp16", "params": 2e9}, "note")),
        ({"dtype": "bf16", "params": 1e11}, {"dtype": "fp16", "params": 1e8}),
    ),
    "fp16-softmax": (
        (({"dtype": "fp16", "softmax_fp32": False}, "warning"),),
        (
            {"dtype": "fp16", "softmax_fp32": True},
            {"dtype": "fp16", "softmax_fp32": False, "attention_kernel": "flash_attention_2"},
        ),
    ),
    "bf16-states": (
        (
            ({"state_dtype": "bf16", "beta2": 0.999, "optimizer": "adamw"}, "critical"),
            ({"state_dtype": "bf16", "beta2": 0.997, "optimizer": "adamw"}, "warning"),
        ),
        (
            {"state_dtype": "bf16", "beta2": 0.95, "optimizer": "adamw"},
            {"state_dtype": "fp32", "beta2": 0.999, "optimizer": "adamw"},
        ),
    ),
    "bf16-weights": (
        (
            ({**ADAM, "dtype": "bf16", "master_weights": False}, "note"),
            ({**ADAM, "dtype": "bf16", "master_weights": False, "min_lr": 3e-5}, "warning"),
        ),
        ({**ADAM, "dtype": "bf16", "master_weights": True}, {**ADAM, "dtype": "fp32", "master_weights": False}),
    ),
    "nan-check": (
        (({"nan_check": False}, "note"), ({"nan_check": False, "dtype": "fp16"}, "warning")),
        ({"nan_check": True},),
    ),
    "seq-positions": (
        (
            ({"seq_len": 4096, "max_positions": 2048, "positions": "learned"}, "critical"),
            ({"seq_len": 4096, "max_positions": 2048, "positions": "rope"}, "warning"),
        ),
        (
            {"seq_len": 2048, "max_positions": 2048},
            {"seq_len": 4096, "max_positions": 2048, "positions": "alibi"},
        ),
    ),
    "vocab-tokenizer": (
        (
            ({"vocab_size": 32000, "tokenizer_vocab": 32001}, "critical"),
            ({"vocab_size": 128256, "tokenizer_vocab": 32000}, "note"),
        ),
        ({"vocab_size": 50304, "tokenizer_vocab": 50257}, {"vocab_size": 100, "tokenizer_vocab": 100}),
    ),
    "epochs": (
        (
            ({"batch_sequences": 100, "seq_len": 100, "total_steps": 1000, "dataset_tokens": 1e6}, "note"),
            ({"batch_sequences": 100, "seq_len": 100, "total_steps": 1000, "dataset_tokens": 1e5}, "warning"),
        ),
        ({"batch_sequences": 100, "seq_len": 100, "total_steps": 1000, "dataset_tokens": 2.5e6},),
    ),
    "epochs-said": (
        (({"epochs": 10.0}, "note"), ({"epochs": 40.0}, "warning")),
        ({"epochs": 4.0},),
    ),
    "save-interval": (
        (
            ({"save_every": 180, "devices": 16384, "step_seconds": 10.0}, "warning"),
            ({"save_every": 1000, "devices": 1024, "step_seconds": 10.0}, "note"),
            ({"save_every": 2000, "devices": 16384, "step_seconds": 10.0}, "critical"),
        ),
        (
            {"save_every": 1000, "devices": 8, "step_seconds": 10.0},
            {"save_every": 0, "devices": 16384, "step_seconds": 10.0},
            {"save_every": 115, "devices": 16384, "step_seconds": 10.0},  # Young's interval itself
            {"save_every": 900, "devices": 16384, "step_seconds": 1.0, "total_steps": 1000},
        ),
    ),
    "save-interval-estimated": (
        (({**BIG, "save_every": 1000}, "warning"), ({**BIG, "save_every": 10**6, "n_experts": 0}, "warning")),
        (
            {**BIG, "save_every": 100},
            {**BIG, "save_every": 1000, "step_seconds": 10.0},
            {**BIG, "save_every": 100, "devices": 8, "params": 8e9},
            {**BIG, "save_every": 1000, "params": None},
            {**BIG, "save_every": 1000, "total_steps": 100},
            {**BIG, "save_every": 0},
        ),
    ),
    "no-checkpoints": (
        (
            ({"save_every": 0, "total_steps": 10000, "devices": 999}, "warning"),
            ({"save_every": 0, "total_steps": 10000, "devices": 1000}, "critical"),
            ({"save_every": 0, "total_steps": 10000}, "warning"),
            ({"save_every": 20000, "total_steps": 10000, "step_seconds": 10.0, "devices": 256}, "critical"),
        ),
        ({"save_every": 100, "total_steps": 10000}, {"save_every": 0, "total_steps": 50}),
    ),
    "ffn-width": (
        (
            ({"d_ff": 20480, "d_model": 16384}, "warning"),
            ({"d_ff": 65536, "d_model": 5120, "gated_mlp": True}, "warning"),
            ({"d_ff": 10240, "d_model": 4096, "gated_mlp": False}, "note"),
            ({"d_ff": 28672, "d_model": 4096, "gated_mlp": True}, "warning"),
            ({"d_ff": 11008, "d_model": 5120, "gated_mlp": True}, "warning"),
            ({"d_ff": 13824, "d_model": 6656, "gated_mlp": True}, "warning"),
            ({"d_ff": 14336, "d_model": 8192, "gated_mlp": True}, "warning"),
            ({"d_ff": 20480, "d_model": 6144, "gated_mlp": False}, "warning"),
        ),
        (
            {"d_ff": 16384, "d_model": 4096, "gated_mlp": False},
            {"d_ff": 53248, "d_model": 16384, "gated_mlp": True},
            {"d_ff": 14336, "d_model": 4096, "gated_mlp": True},
            {"d_ff": 28672, "d_model": 12288, "gated_mlp": True},  # Mistral Large 2
            {"d_ff": 14336, "d_model": 3584},
            {"d_ff": 12288, "d_model": 4096, "gated_mlp": True},
            {"d_ff": 2048, "d_model": 7168, "n_experts": 256},
        ),
    ),
    "heads-width": (
        (
            ({"d_model": 768, "n_heads": 10}, "critical"),
            ({"d_model": 4096, "n_heads": 30}, "critical"),
        ),
        (SHAPE, {**SHAPE, "head_dim": 128}, {"d_model": 4096, "n_heads": 30, "head_dim": 128}),
    ),
    "heads-inner": (
        (
            ({"d_model": 4096, "n_heads": 32, "head_dim": 80}, "note"),
            ({"d_model": 4096, "n_heads": 256, "head_dim": 128}, "note"),
            ({"d_model": 1024, "n_heads": 16, "head_dim": 128}, "note"),  # Qwen3 0.6B
        ),
        ({**SHAPE, "head_dim": 128},),
    ),
    "kv-heads": (
        (({"n_heads": 32, "n_kv_heads": 5}, "critical"), ({"n_heads": 8, "n_kv_heads": 16}, "critical")),
        ({"n_heads": 32, "n_kv_heads": 8}, {"n_heads": 32, "n_kv_heads": 1}),
    ),
    "head-dim": (
        (
            ({"d_model": 96, "n_heads": 32, "positions": "rope"}, "critical"),
            ({"d_model": 1024, "n_heads": 64}, "note"),
            ({**SHAPE, "head_dim": 512}, "note"),
        ),
        (SHAPE, {"d_model": 128, "n_heads": 8, "positions": "rope"}),
    ),
    "size-multiples": (
        (({"d_model": 11600}, "note"), ({"d_model": 4096, "d_ff": 11007}, "note")),
        ({"d_model": 4096, "d_ff": 11008}, {"d_model": 100}),
    ),
    "vocab-padding": (
        (({"vocab_size": 50257}, "note"),),
        ({"vocab_size": 50304}, {"vocab_size": 100}),
    ),
    "width-depth": (
        (({"d_model": 16384, "n_layers": 32}, "note"),),
        ({"d_model": 14336, "n_layers": 70}, {"d_model": 1024, "n_layers": 2}),
    ),
    "method-conflict": (
        (
            ({"methods": ("soft_cap", "soft_clip")}, "critical"),
            ({"methods": ("qk_norm", "qk_norm")}, "critical"),
            ({"methods": ("zero_init", "peri_ln")}, "critical"),
        ),
        ({"methods": ("qk_norm", "z_loss:coefficient=1e-5")}, {}),
    ),
    "method-unknown": (
        (({"methods": ("qk_nrom",)}, "warning"),),
        ({"methods": ("qk_norm",)}, {}),
    ),
}

BREAKING = [(rule, values, severity) for rule, (broken, _) in CASES.items() for values, severity in broken]
PASSING = [(rule, values) for rule, (_, passes) in CASES.items() for values in passes]
BY_ID = {rule.id: rule for rule in RULES}


def test_every_rule_has_examples_of_both_kinds() -> None:
    assert len(BY_ID) == len(RULES)
    assert set(CASES) == set(BY_ID)
    assert all(broken and passes for broken, passes in CASES.values())


@pytest.mark.parametrize(("rule", "values", "severity"), BREAKING, ids=lambda value: str(value)[:60])
def test_what_a_rule_finds(rule: str, values: dict[str, Any], severity: str) -> None:
    report = check(settings(**values))
    (found,) = (found for found in report.findings if found.rule == rule)
    assert found.severity == severity
    assert all(text.strip() == text and text for text in (found.what, found.why, found.mend, found.source))
    assert "None" not in found.what + found.mend and "nan" not in found.mend
    assert all(name in {f.name for f in fields(Settings)} for name in found.fields)
    assert rule not in report.passed


@pytest.mark.parametrize(("rule", "values"), PASSING, ids=lambda value: str(value)[:60])
def test_what_a_rule_lets_pass(rule: str, values: dict[str, Any]) -> None:
    report = check(settings(**values))
    assert rule in report.passed
    assert rule not in {found.rule for found in report.findings}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_the_stated_severity_is_reached_by_an_example(rule: base.Rule) -> None:
    assert rule.severity == min((severity for _, severity in CASES[rule.id][0]), key=RANK.__getitem__)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.needs != ("methods",)], ids=lambda rule: rule.id)
def test_a_rule_does_not_judge_what_is_not_said(rule: base.Rule) -> None:
    known = {field.name for field in fields(Settings)}
    assert set(rule.needs) <= known
    for values, _ in CASES[rule.id][0]:
        for name in rule.needs:
            report = check(replace(settings(**values), **{name: None}))
            (missing,) = (missing for one, missing in report.not_judged if one == rule.id)
            assert name in missing


def test_mending_values_said_in_the_finding_silence_it() -> None:
    case = settings(d_ff=20480, d_model=16384, gated_mlp=False)
    assert "65536" in check(case).findings[0].mend
    assert not check(replace(case, d_ff=65536)).findings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "fp16", "loss_scale": "12"}, "2^12 = 4096"),
        ({"d_model": 768, "n_heads": 10}, "n_heads = 12"),
        ({"n_heads": 32, "n_kv_heads": 5}, "n_kv_heads = 4"),
        ({"methods": ("soft_cap", "soft_clip", "attention_sink", "soft_cap")}, "and 3 more pairs"),
        ({"methods": ("qk_nrom",)}, "did you mean 'qk_norm'"),
        ({"init_std": 0.02, "d_model": 8192, "dtype": "fp16"}, "in fp16"),
        ({"seq_len": 9, "max_positions": 8, "positions": "learned"}, "no vector"),
        ({"save_every": 2000, "devices": 16384, "step_seconds": 10.0}, "interruption expected every 3.09 hours"),
        ({"optimizer": "adamw", "eps": 1e-5, "params": 4e11}, "at most 1.6e-06"),
        ({"lr": NAN, "said": {"lr": "--lr nan"}}, "--lr nan is not finite"),
    ],
)
def test_the_words_have_the_numbers(values: dict[str, Any], words: str) -> None:
    (found,) = check(settings(**values)).findings
    assert words in f"{found.what} {found.mend} {found.why}"
