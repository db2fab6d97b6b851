"""Configurations of the OLMo team's official pre-training scripts."""

from __future__ import annotations

from poise.preflight.presets.preset import Fact, Preset, published

_REPOSITORY = "allenai/OLMo-core"
_COMMIT = "fa6c5014c9f6"

_FAMILY: tuple[Fact, ...] = (
    ("vocab_size", 100_352, "dolma2 tokenizer, 100278 padded to a multiple of 128"),
    ("tokenizer_vocab", 100_278, "TokenizerConfig.dolma2(): vocab_size=100278"),
    ("gated_mlp", True, "FeedForward with w1, w2, w3 and silu"),
    ("tied", False, "LMHead has its own w_out"),
    ("norm", "reordered", "block_name=TransformerBlockType.reordered_norm"),
    ("norm_kind", "rmsnorm", "LayerNormType.rms"),
    ("positions", "rope", "rope_theta=500_000"),
    ("biases", False, "bias=False"),
    ("qk_norm", True, "qk_norm=True"),
    ("init_std", 0.02, "default init_std: 0.02, InitMethod.normal (truncated at three deviations)"),
    ("embed_std", 0.02, "default embedding_init_std: None, so init_std"),
    ("residual_init", "none", "default InitMethod.normal: all linear layers alike"),
    ("optimizer", "adamw", "SkipStepAdamWConfig"),
    ("schedule", "cosine", "CosWithWarmup"),
    ("warmup_steps", 2000, "CosWithWarmup(warmup_steps=2000)"),
    ("beta1", 0.9, "betas=(0.9, 0.95)"),
    ("beta2", 0.95, "betas=(0.9, 0.95)"),
    ("eps", 1e-8, "default of SkipStepAdamWConfig: eps = 1e-8"),
    ("weight_decay", 0.1, "weight_decay=0.1"),
    ("decay_embeddings", False, 'OptimGroupOverride(["embeddings.weight"], weight_decay=0.0)'),
    ("clip", 1.0, "max_grad_norm=1.0"),
    ("z_loss", 1e-5, "z_loss_multiplier=1e-5"),
    ("dtype", "bf16", "param_dtype=DType.bfloat16"),
    ("master_weights", True, "parameters are created in float32; reduce_dtype=DType.float32"),
    ("skip_steps", True, "SkipStepAdamW: loss or gradient norm above mean + 6 deviations of the last 128"),
)

_SHAPE_32B: tuple[Fact, ...] = (
    ("n_layers", 64, "n_layers=64"),
    ("d_model", 5120, "d_model = 5120"),
    ("n_heads", 40, "n_heads=40"),
    ("n_kv_heads", 8, "n_kv_heads=8"),
    ("d_ff", 27_648, "hidden_size_multiplier 27648 / (8 d_model / 3)"),
)

_OLMO2_32B: tuple[Fact, ...] = (
    *_FAMILY,
    *_SHAPE_32B,
    ("lr", 6e-4, "lr=6e-4"),
    ("min_lr", 6e-5, "default of CosWithWarmup: alpha_f = 0.1"),
    ("total_steps", 774_860, "Duration.tokens(6.5e12) at 2048 x 4096 tokens; published up to step 721901"),
    ("batch_sequences", 2048, "global_batch_size=2048 * 4096"),
    ("seq_len", 4096, "DEFAULT_SEQUENCE_LENGTH = 4096"),
    ("save_every", 200, "ephemeral_save_interval=200 (kept: every 1000)"),
)

_OLMO3_7B: tuple[Fact, ...] = (
    *_FAMILY,
    ("n_layers", 32, "n_layers=32"),
    ("d_model", 4096, "d_model=4096"),
    ("n_heads", 32, "n_heads=32"),
    ("n_kv_heads", 32, "default n_kv_heads: None"),
    ("d_ff", 11_008, "8 d_model / 3 rounded up to a multiple of 256"),
    ("attention_kernel", "flash_attention_2", "AttentionBackendName.flash_2"),
    ("lr", 3e-4, "LR = 3e-4"),
    ("min_lr", 3e-5, "default of CosWithWarmup: alpha_f = 0.1"),
    ("total_steps", 1_192_092, "Duration.tokens(5e12) at 512 x 8192 tokens, later 7e12"),
    ("batch_sequences", 512, "GLOBAL_BATCH_SIZE = 8192 * 512"),
    ("seq_len", 8192, "DEFAULT_SEQUENCE_LENGTH = 8192"),
    ("save_every", 1000, "save_interval=1000"),
)

_OLMO3_32B: tuple[Fact, ...] = (
    *_FAMILY,
    *_SHAPE_32B,
    ("attention_kernel", "flash_attention_2", "AttentionBackendName.flash_2"),
    ("lr", 6e-4, "LR = 6e-4"),
    ("min_lr", 6e-5, "default of CosWithWarmup: alpha_f = 0.1"),
    ("batch_sequences", 1024, "GLOBAL_BATCH_SIZE = 8 * 1024 * 1024 tokens"),
    ("seq_len", 8192, "DEFAULT_SEQUENCE_LENGTH = 8192"),
    ("save_every", 1000, "save_interval=1000"),
)

_WINDOW = "three of four layers attend to a sliding window of 4096 tokens, which Settings does not hold"


def _sources(script: str) -> tuple[str, ...]:
    """Name the script and the two files that its defaults were read in."""
    return (
        f"{_REPOSITORY}: src/scripts/official/{script} @ {_COMMIT}",
        f"{_REPOSITORY}: src/olmo_core/nn/transformer/config.py @ {_COMMIT}",
        f"{_REPOSITORY}: src/olmo_core/optim/adamw.py, scheduler.py, skip_step_optimizer.py @ {_COMMIT}",
    )


PRESETS = (
    Preset(
        name="olmo2-32b",
        title="OLMo 2 32B, first stage: QK-norm, norms on the outputs of branches, z-loss, skipped outliers",
        outcome="stable",
        what=(
            "Trained to its end and published with all checkpoints. The paper presents this recipe as the cure for the "
            "spikes and growing gradient norms of OLMo-0424; no intervention is on record in the sources read."
        ),
        mark="verified",
        sources=(*_sources("OLMo2/OLMo-2-0325-32B-train.py"), "arXiv 2501.00656, section 3"),
        settings=published(
            "olmo2-32b",
            _OLMO2_32B,
            (
                "OLMo-core's changelog (2.2.0) fixes a bug in SkipStepAdamW: the step was not counted, so there was no "
                "bias correction and an effective lr about 2.2 times as high. This run is older than the fix.",
                "the paper's text gives the z-loss as 1e-4, the official script 1e-5",
            ),
        ),
    ),
    Preset(
        name="olmo3-7b",
        title="OLMo 3 7B, first part of pre-training",
        outcome="stable",
        what="Trained to its end, with the schedule extended from 5T to 7T tokens; no intervention is on record.",
        mark="verified",
        sources=_sources("OLMo3/OLMo-3-1025-7B-pretrain-1.py"),
        settings=published("olmo3-7b", _OLMO3_7B, (_WINDOW,)),
    ),
    Preset(
        name="olmo3-32b",
        title="OLMo 3 32B, pre-training, with repeated n-grams filtered out while loading",
        outcome="stable",
        what="Trained to its end and published with all checkpoints; no intervention is on record.",
        mark="verified",
        sources=_sources("OLMo3/OLMo-3-1025-32B-pretrain.py"),
        settings=published(
            "olmo3-32b",
            _OLMO3_32B,
            (_WINDOW, "instances with 32 or more repeats of a span of 1 to 13 tokens are filtered out"),
        ),
    ),
)
