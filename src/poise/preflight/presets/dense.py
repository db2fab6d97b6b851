"""Large dense models of 2021 to 2024: OPT, GLM, PaLM, Llama 3."""

from __future__ import annotations

from poise.preflight.presets.preset import Fact, Preset, published

_METASEQ = "facebookresearch/metaseq"
_METASEQ_COMMIT = "f7ffa5fd61cf"
_GLM = "THUDM/GLM-130B"
_GLM_COMMIT = "212215c54f8a"

_OPT: tuple[Fact, ...] = (
    ("n_layers", 96, "175B: 96 layers"),
    ("d_model", 12_288, "175B: embedding size 12288"),
    ("n_heads", 96, "175B: 96 heads"),
    ("d_ff", 49_152, "ffn_size: 4 * emb_size"),
    ("gated_mlp", False, "two matrices in the MLP"),
    ("batch_sequences", 1024, "batch size of 2M tokens"),
    ("seq_len", 2048, "sequence length of 2048"),
    ("dtype", "fp16", "weights in FP16"),
    ("loss_scale", "dynamic", "dynamic loss scaling"),
    ("state_dtype", "fp32", "Adam state in FP32"),
    ("dataset_tokens", 180e9, "roughly 180B tokens, trained for 300B"),
    ("params", 175e9, "175B"),
)

_OPT_11X: tuple[Fact, ...] = (
    *_OPT,
    ("positions", "learned", "learned positions with sinusoidal initialisation"),
    ("optimizer", "adamw", "FP32 Adam"),
    ("lr", 3e-4, "LR of 3e-4"),
    ("min_lr", 1e-5, "end LR of 1e-5"),
    ("beta2", 0.98, "Adam beta2 of 0.98"),
    ("weight_decay", 0.05, "weight decay of 0.05"),
    ("clip", 2.5, "clipping of 2.5"),
)

_OPT_FINAL: tuple[Fact, ...] = (
    *_OPT,
    ("positions", "learned", "standard embedding init for the learned positions"),
    ("biases", True, "all bias terms are initialised as 0"),
    ("init_std", 0.006, "normal with standard deviation 0.006"),
    ("residual_init", "scaled", "output layers scaled by 1 / sqrt(2 L)"),
    ("optimizer", "adamw", "AdamW"),
    ("lr", 1.2e-4, "LR 1.2e-4"),
    ("min_lr", 1.2e-5, "down to 10 % of the maximum"),
    ("schedule", "linear", "linear learning rate schedule"),
    ("warmup_steps", 2000, "over the first 2000 steps"),
    ("beta1", 0.9, "(0.9, 0.95)"),
    ("beta2", 0.95, "(0.9, 0.95)"),
    ("weight_decay", 0.1, "weight decay of 0.1"),
    ("clip", 1.0, "gradient norms clipped at 1.0, mid-flight 0.3"),
    ("dropout", 0.1, "dropout of 0.1, none on embeddings"),
    ("devices", 992, "992 80GB A100 GPUs"),
)

_GLM_130B: tuple[Fact, ...] = (
    ("n_layers", 70, "70 layers"),
    ("d_model", 12_288, "12288 hidden size"),
    ("n_heads", 96, "--num-attention-heads 96"),
    ("d_ff", 32_768, "32768 ffn hidden size"),
    ("vocab_size", 150_528, "--vocab-size 150528"),
    ("gated_mlp", True, "GeGLU"),
    ("norm", "post", "--layernorm-order post (DeepNorm)"),
    ("norm_kind", "layernorm", "DeepNorm based Post-LN"),
    ("positions", "rope", "Rotary Positional Embedding"),
    ("optimizer", "adamw", "AdamW"),
    ("lr", 8e-5, "warm-up from 1e-7 to 8e-5"),
    ("min_lr", 8e-6, "10x cosine schedule; min lr 8e-6"),
    ("schedule", "cosine", "10x cosine schedule"),
    ("beta1", 0.9, "0.9 and 0.95"),
    ("beta2", 0.95, "0.9 and 0.95"),
    ("weight_decay", 0.1, "weight decay value of 0.1"),
    ("clip", 1.0, "clipping value of 1.0"),
    ("dropout", 0.1, "dropout rate of 0.1"),
    ("batch_sequences", 4224, "global batch size: 4224"),
    ("ramp_from", 192, "batch size from 192 to 4224 over the first 2.5 % of samples"),
    ("seq_len", 2048, "fixed sequence length of 2,048"),
    ("dtype", "fp16", "FP16 for forwards and backwards"),
    ("master_weights", True, "FP32 for optimizer states and master weights"),
    ("state_dtype", "fp32", "FP32 for optimizer states and master weights"),
    ("softmax_fp32", True, "FP32 softmax with QKV scaling"),
    ("devices", 768, "96 nodes of 8"),
    ("step_seconds", 88.5, "96 nodes, BSZ 4224: 88.5 s/iter"),
    ("save_every", 100, "saving interval 100 (500 until step 4000)"),
    ("params", 130e9, "130B"),
)

_PALM: tuple[Fact, ...] = (
    ("n_layers", 118, "118 layers"),
    ("d_model", 18_432, "d_model 18432"),
    ("n_heads", 48, "48 heads"),
    ("n_kv_heads", 1, "multi-query attention"),
    ("head_dim", 256, "attention head size 256"),
    ("d_ff", 73_728, "feed-forward size 4 x d_model"),
    ("vocab_size", 256_000, "SentencePiece vocabulary with 256k tokens"),
    ("gated_mlp", True, "SwiGLU"),
    ("tied", True, "shared input-output embeddings"),
    ("norm", "pre", "y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x))"),
    ("norm_kind", "layernorm", "LayerNorm without biases"),
    ("positions", "rope", "RoPE"),
    ("biases", False, "no biases in any of the dense kernels or layer norms"),
    ("optimizer", "adafactor", "Adafactor without factorization, with parameter scaling"),
    ("lr", 1e-2, "1e-2 relative to the root mean square of each matrix, for 10,000 steps"),
    ("schedule", "inverse_sqrt", "then 1 / sqrt(k)"),
    ("total_steps", 255_000, "until training is complete at step 255k"),
    ("beta1", 0.9, "momentum of 0.9"),
    ("clip", 1.0, "global norm clipping with 1.0"),
    ("z_loss", 1e-4, "z-loss 1e-4 log^2 Z"),
    ("batch_sequences", 2048, "512, 1024 from step 50k, 2048 from step 115k"),
    ("ramp_from", 512, "512, 1024 from step 50k, 2048 from step 115k"),
    ("seq_len", 2048, "sequence length of 2048"),
    ("dropout", 0.0, "trained without dropout"),
    ("dataset_tokens", 780e9, "780 billion tokens, one epoch"),
    ("devices", 6144, "6144 TPU v4 chips"),
    ("params", 540.35e9, "540.35 billion"),
)

_LLAMA3_405B: tuple[Fact, ...] = (
    ("n_layers", 126, "126 layers"),
    ("d_model", 16_384, "model dimension 16,384"),
    ("n_heads", 128, "128 attention heads"),
    ("n_kv_heads", 8, "8 key/value heads"),
    ("d_ff", 53_248, "FFN dimension 53,248"),
    ("vocab_size", 128_000, "vocabulary size 128,000"),
    ("gated_mlp", True, "SwiGLU"),
    ("positions", "rope", "RoPE (theta = 500,000)"),
    ("optimizer", "adamw", "AdamW"),
    ("lr", 8e-5, "peak learning rate of 8e-5"),
    ("min_lr", 8e-7, "decaying to 8e-7"),
    ("schedule", "cosine", "cosine over 1,200,000 steps"),
    ("warmup_steps", 8000, "linear warm up of 8,000 steps"),
    ("total_steps", 1_200_000, "cosine over 1,200,000 steps"),
    ("batch_sequences", 2048, "16M tokens of 8,192 after 2.87T tokens"),
    ("ramp_from", 1024, "4M tokens of 4,096 at first, 8M of 8,192 after 252M tokens"),
    ("seq_len", 8192, "sequences of 8,192 tokens"),
    ("params", 405e9, "405B parameters"),
)

PRESETS = (
    Preset(
        name="opt-175b-11x",
        title="OPT-175B, the first lineage (11.x): high learning rate, loose clip, fp16",
        outcome="unstable",
        what=(
            "Loss exploded in the first runs; from 11.4 on within a few hundred updates of each restart, with NaN and "
            "a sinking loss scale. Given up after six days for Megatron's and GPT-3's settings."
        ),
        mark="verified",
        sources=(
            f"{_METASEQ}: projects/OPT/chronicles/10_percent_update.md @ {_METASEQ_COMMIT}",
            f"{_METASEQ}: metaseq/launcher/opt_job_constants.py @ {_METASEQ_COMMIT}",
            "arXiv 2205.01068, section 2 (shape, precision)",
        ),
        settings=published(
            "opt-175b-11x",
            _OPT_11X,
            ("NormFormer's extra norms, which Settings does not hold; warm-up and initial deviation are not said",),
        ),
    ),
    Preset(
        name="opt-175b-final",
        title="OPT-175B, the lineage that was published (12.x): Megatron's initialisation, GPT-3's settings",
        outcome="spiked",
        what=(
            "Finished, after several divergences with the loss scale falling to 0 and activation norms growing; each "
            "time a lower learning rate and an earlier checkpoint helped. About 90 restarts, most of them hardware."
        ),
        mark="verified",
        sources=(
            "arXiv 2205.01068, sections 2.2 to 2.5",
            f"{_METASEQ}: projects/OPT/chronicles/27_percent_update.md, 56_percent_update.md, final_update.md @ "
            f"{_METASEQ_COMMIT}",
        ),
        settings=published("opt-175b-final", _OPT_FINAL, ("the learning rate was lowered by hand several times",)),
    ),
    Preset(
        name="glm-130b",
        title="GLM-130B: Post-LN with DeepNorm in fp16, gradient of the embedding shrunk",
        outcome="spiked",
        what=(
            "Loss exploded at steps 33,740, 35,250 and about 40,800, gradients spiked near 42,500 and 42,700, NaN at "
            "22,900 after a change of data. Restarted 50 to 140 steps back with less gradient for the embedding, 200 "
            "steps of data skipped, a lower learning rate."
        ),
        mark="verified",
        sources=(
            f"{_GLM}: logs/main-log-en.md, configs/model_glm_130b.sh @ {_GLM_COMMIT}",
            "arXiv 2210.02414, sections 2.3 and 3",
        ),
        settings=published(
            "glm-130b",
            _GLM_130B,
            ("the embedding's gradient is multiplied by 0.1, raised to 1 by step 6,500, lowered from 33,600 on",),
        ),
    ),
    Preset(
        name="palm-540b",
        title="PaLM 540B: Adafactor with parameter scaling, z-loss, no biases",
        outcome="spiked",
        what=(
            "About 20 spikes in spite of clipping, at irregular steps, none in the smaller models. Each time back "
            "about 100 steps and 200 to 500 batches left out. The same batches from another checkpoint gave no spike."
        ),
        mark="verified",
        sources=("arXiv 2204.02311, sections 2 and 5",),
        settings=published(
            "palm-540b",
            _PALM,
            (
                "the learning rate is relative to the size of each matrix and cannot be compared with Adam's",
                "beta2 is 1 - k^-0.8 at step k; weight decay is lr^2",
                "embeddings start from N(0, 1) with output logits divided by the root of the width",
            ),
        ),
    ),
    Preset(
        name="llama3-405b",
        title="Llama 3 405B: low learning rate, long warm-up, batch doubled twice",
        outcome="stable",
        what="Few loss spikes, and no interventions to correct divergence.",
        mark="verified",
        sources=("arXiv 2407.21783, table 3 and section 3.4.1",),
        settings=published("llama3-405b", _LLAMA3_405B),
    ),
)
