"""Mixtures of experts: DeepSeek-V3, Kimi K2, Megatron's Mixtral-shaped test run."""

from __future__ import annotations

from poise.preflight.presets.preset import Fact, Preset, published

_DEEPSEEK_V3: tuple[Fact, ...] = (
    ("n_layers", 61, "61 layers"),
    ("d_model", 7168, "hidden dimension 7168"),
    ("n_heads", 128, "128 attention heads"),
    ("head_dim", 128, "per-head dimension 128"),
    ("vocab_size", 129_280, '"vocab_size": 129280'),
    ("n_experts", 256, "256 routed experts and 1 shared"),
    ("init_std", 0.006, "all learnable parameters with a standard deviation of 0.006"),
    ("residual_init", "none", "all learnable parameters with a standard deviation of 0.006"),
    ("optimizer", "adamw", "AdamW"),
    ("lr", 2.2e-4, "2.2e-4, constant until 10T tokens"),
    ("min_lr", 7.3e-6, "2.2e-5, in the last 167B tokens 7.3e-6"),
    ("schedule", "wsd", "warm-up, constant, cosine over 4.3T tokens, two constants"),
    ("warmup_steps", 2000, "during the first 2K steps"),
    ("beta1", 0.9, "beta1 = 0.9"),
    ("beta2", 0.95, "beta2 = 0.95"),
    ("weight_decay", 0.1, "weight_decay = 0.1"),
    ("clip", 1.0, "gradient clipping norm is set to 1.0"),
    ("batch_sequences", 15_360, "from 3072 to 15360 in the first 469B tokens"),
    ("ramp_from", 3072, "from 3072 to 15360 in the first 469B tokens"),
    ("seq_len", 4096, "maximum sequence length 4K"),
    ("dtype", "fp8", "FP8 mixed precision training"),
    ("params", 671e9, "671B total parameters"),
)

_KIMI_K2: tuple[Fact, ...] = (
    ("n_layers", 61, "61 layers"),
    ("d_model", 7168, "attention hidden dimension 7168"),
    ("n_heads", 64, "64 attention heads"),
    ("vocab_size", 160_000, "vocabulary size 160K"),
    ("gated_mlp", True, "SwiGLU"),
    ("n_experts", 384, "384 experts and 1 shared"),
    ("qk_clip", 100.0, "QK-Clip with tau = 100"),
    ("optimizer", "muon", "MuonClip"),
    ("lr", 2e-4, "constant learning rate of 2e-4 for 10T tokens"),
    ("min_lr", 2e-5, "cosine decay from 2e-4 to 2e-5 over 5.5T tokens"),
    ("schedule", "wsd", "WSD learning rate schedule"),
    ("warmup_steps", 500, "after a 500-step warm-up"),
    ("weight_decay", 0.1, "weight decay 0.1 throughout"),
    ("batch_sequences", 16_384, "global batch size 67M tokens"),
    ("seq_len", 4096, "4,096-token context window"),
    ("params", 1.04e12, "1.04T total parameters"),
)

_MIXTRAL: tuple[Fact, ...] = (
    ("n_layers", 32, "--num-layers: 32"),
    ("d_model", 4096, "--hidden-size: 4096"),
    ("n_heads", 32, "--num-attention-heads: 32"),
    ("n_kv_heads", 8, "--num-query-groups: 8"),
    ("d_ff", 14_336, "--ffn-hidden-size: 14336"),
    ("max_positions", 4096, "--max-position-embeddings: 4096"),
    ("gated_mlp", True, "--swiglu: true"),
    ("tied", False, "--untie-embeddings-and-output-weights: true"),
    ("norm", "pre", "default of Megatron-LM: Pre-LN"),
    ("norm_kind", "rmsnorm", "--normalization: RMSNorm"),
    ("positions", "rope", "--position-embedding-type: rope"),
    ("biases", False, "--disable-bias-linear: true"),
    ("qk_norm", False, "no --qk-layernorm"),
    ("n_experts", 8, "--num-experts: 8"),
    ("init_std", 0.010, "--init-method-std: 0.010"),
    ("residual_init", "scaled", "default of Megatron-LM: output layers at std / sqrt(2 num_layers)"),
    ("optimizer", "adamw", "default of Megatron-LM: --optimizer adam, decoupled weight decay"),
    ("lr", 3e-4, "--lr: 3.0e-4"),
    ("min_lr", 3e-5, "--min-lr: 3.0e-5"),
    ("schedule", "cosine", "--lr-decay-style: cosine"),
    ("warmup_steps", 3815, "--lr-warmup-samples: 3906252 at 1024 a step"),
    ("total_steps", 23_842, "--train-samples: 24414063 at 1024 a step"),
    ("beta1", 0.9, "--adam-beta1: 0.9"),
    ("beta2", 0.95, "--adam-beta2: 0.95"),
    ("eps", 1e-8, "default of Megatron-LM: --adam-eps 1e-08"),
    ("weight_decay", 0.1, "--weight-decay: 0.1"),
    ("clip", 1.0, "--clip-grad: 1.0"),
    ("batch_sequences", 1024, "--global-batch-size: 1024"),
    ("seq_len", 4096, "--seq-length: 4096"),
    ("dtype", "bf16", "--bf16: true"),
    ("attention_kernel", "flash", "--use-flash-attn: true"),
    ("dropout", 0.0, "--hidden-dropout: 0.0"),
    ("save_every", 5000, "--save-interval: 5000"),
)

_CASE = "tests/functional_tests/test_cases/mixtral/mixtral_8x7b_alltoall_tp2pp4ep4_release"

PRESETS = (
    Preset(
        name="deepseek-v3",
        title="DeepSeek-V3, 671B mixture of experts in FP8, small initialisation",
        outcome="stable",
        what="No irrecoverable loss spike and no rollback in 14.8T tokens.",
        mark="verified",
        sources=(
            "arXiv 2412.19437, abstract and section 4.2",
            "deepseek-ai/DeepSeek-V3: README.md, inference/configs/config_671B.json @ 9b4e9788e4a3",
        ),
        settings=published("deepseek-v3", _DEEPSEEK_V3),
    ),
    Preset(
        name="kimi-k2",
        title="Kimi K2, 1T mixture of experts with Muon and QK-Clip",
        outcome="stable",
        what=(
            "No loss spike in 15.5T tokens. With plain Muon a 53B model's attention logits had passed 1,000; with "
            "QK-Clip they stood at the bound of 100 at first and fell by themselves after about 30 % of the run."
        ),
        mark="verified",
        sources=("arXiv 2507.20534, sections 2.1, 2.3 and 2.5", "MoonshotAI/Kimi-K2: README.md @ c6157be8531e"),
        settings=published("kimi-k2", _KIMI_K2, ("some copies of the report's first version say 300 warm-up steps",)),
    ),
    Preset(
        name="megatron-mixtral-8x7b",
        title="Megatron-LM's release test with a Mixtral 8x7B shape: a mixture that spikes while it warms up",
        outcome="spiked",
        what=(
            "Counting stored losses above 1.05 x the median of the 40 points before, and points at most 12 apart as "
            "one: 9 rises (H100) and 10 (A100), all between steps 1,495 and 5,875, by up to 39 % (H100, step 3,850: "
            "3.41 over 2.46) and 109 % (A100, step 4,055: 5.11 over 2.45), and they come back by themselves."
        ),
        mark="verified",
        sources=(f"NVIDIA/Megatron-LM: {_CASE}/model_config.yaml and golden_values_*.json @ d98e8a64ddf3",),
        settings=published(
            "megatron-mixtral-8x7b",
            _MIXTRAL,
            (
                "a test of the software: the stored values are every fifth step of one run each, up to step 22,685 "
                "(H100) and 13,550 (A100)",
            ),
        ),
    ),
)
