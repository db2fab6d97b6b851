"""BigScience's runs: BLOOM, the 104B model that failed before it, and a throughput benchmark that diverged."""

from __future__ import annotations

from poise.preflight.presets.preset import Fact, Preset, published

_REPOSITORY = "bigscience-workshop/bigscience"
_COMMIT = "9e64edec2ad1"

_MEGATRON: tuple[Fact, ...] = (
    ("gated_mlp", False, "Megatron's GPT: GELU"),
    ("tied", True, "Megatron's GPT: the parameter count has one v * h"),
    ("norm", "pre", "Megatron's GPT: Pre-LN"),
    ("norm_kind", "layernorm", "Megatron's GPT: LayerNorm"),
    ("biases", True, "Megatron's GPT: the parameter count has 13 h a layer"),
    ("residual_init", "scaled", "lessons-learned: output layers at std / sqrt(2 num_layers)"),
    ("qk_norm", False, "the script has no such option"),
    ("optimizer", "adamw", "--optimizer adam with --weight-decay, decoupled in Megatron"),
    ("schedule", "cosine", "--lr-decay-style cosine"),
    ("beta1", 0.9, "--adam-beta1 0.9"),
    ("eps", 1e-8, "--adam-eps 1e-8"),
    ("clip", 1.0, "--clip-grad 1.0"),
)

_BLOOM: tuple[Fact, ...] = (
    *_MEGATRON,
    ("n_layers", 70, "NLAYERS=70"),
    ("d_model", 14_336, "NHIDDEN=14336"),
    ("n_heads", 112, "NHEADS=112"),
    ("d_ff", 57_344, "default of Megatron: 4 x hidden size"),
    ("vocab_size", 250_880, "--pad-vocab-size-to 250880"),
    ("tokenizer_vocab", 250_680, "vocabulary size is 250,680 tokens"),
    ("positions", "alibi", "--position-embedding-type alibi"),
    ("embed_norm", True, "--embed-layernorm"),
    ("init_std", 0.0048, "--init-method-std 0.0048"),
    ("lr", 6e-5, "--lr 6e-5"),
    ("min_lr", 6e-6, "--min-lr 6e-6"),
    ("warmup_steps", 910, "--lr-warmup-samples 183_105 along --rampup-batch-size 192 16 9_765_625"),
    ("total_steps", 115_311, "log: iteration 12695/ 115311"),
    ("beta2", 0.95, "--adam-beta2 0.95"),
    ("weight_decay", 0.1, "--weight-decay 1e-1"),
    ("batch_sequences", 2048, "--global-batch-size 2048"),
    ("ramp_from", 192, "--rampup-batch-size 192 16 9_765_625"),
    ("seq_len", 2048, "--seq-length 2048"),
    ("dtype", "bf16", "--bf16"),
    ("dataset_tokens", 350e9, "350B unique tokens"),
    ("devices", 384, "384 GPUs (48 nodes of 8)"),
    ("step_seconds", 105.0, "a single train iteration is about 105 secs"),
    ("save_every", 100, "SAVE_INTERVAL=100"),
    ("params", 176e9, "model size: 176B"),
)

_104B: tuple[Fact, ...] = (
    *_MEGATRON,
    ("n_layers", 32, "NLAYERS=32"),
    ("d_model", 16_384, "NHIDDEN=16384"),
    ("n_heads", 32, "NHEADS=32"),
    ("d_ff", 20_480, "FFN_HIDDEN_SIZE=20480"),
    ("vocab_size", 50_257, "VOCAB_SIZE=50257"),
    ("positions", "learned", "Megatron's GPT: learned positions"),
    ("embed_norm", False, "--embed-layernorm came later"),
    ("init_std", 0.02, "--init-method-std 0.02 (default, until experiment 11)"),
    ("lr", 6e-5, "--lr 6e-5"),
    ("min_lr", 6e-6, "--min-lr 6e-6"),
    ("warmup_steps", 6494, "--lr-warmup-samples 216_320 along a batch ramp from 16"),
    ("total_steps", 159_576, "log: iteration 7000/ 159576"),
    ("beta2", 0.999, "--adam-beta2 0.999"),
    ("weight_decay", 0.1, "--weight-decay 1e-1"),
    ("batch_sequences", 2048, "--global-batch-size 2048"),
    ("ramp_from", 16, "--rampup-batch-size 16 16 6_000_000"),
    ("seq_len", 2048, "SEQ_LEN=2048"),
    ("dtype", "fp16", "--fp16"),
    ("loss_scale", "dynamic", "the log's loss scale moves: 2048.0, 4096.0"),
    ("params", 58e9, "a very lopsided 58B model instead of 104B"),
)

_52B: tuple[Fact, ...] = (
    *_MEGATRON,
    ("n_layers", 64, "NLAYERS=64"),
    ("d_model", 8192, "NHIDDEN=8192"),
    ("n_heads", 32, "NHEADS=32"),
    ("d_ff", 32_768, "ffn_hidden_size 32768"),
    ("vocab_size", 50_688, "padded vocab (size: 50257) with 431 dummy tokens (new size: 50688)"),
    ("tokenizer_vocab", 50_257, "VOCAB_SIZE=50257"),
    ("positions", "learned", "Megatron's GPT: learned positions"),
    ("max_positions", 1024, "--max-position-embeddings 1024"),
    ("embed_norm", False, "the script has no such option"),
    ("init_std", 0.02, "init_method_std 0.02 (default)"),
    ("beta1", 0.9, "adam_beta1 0.9"),
    ("eps", 1e-8, "adam_eps 1e-08"),
    ("lr", 1.5e-4, "--lr 1.5e-4"),
    ("min_lr", 1e-5, "--min-lr 1.0e-5"),
    ("warmup_steps", 8, "--lr-warmup-fraction .01 of --lr-decay-iters 800"),
    ("total_steps", 1000, "--train-iters 1000"),
    ("beta2", 0.999, "adam_beta2 0.999"),
    ("weight_decay", 0.01, "--weight-decay 1e-2"),
    ("batch_sequences", 1024, "global_batch_size 1024"),
    ("seq_len", 1024, "--seq-length 1024"),
    ("dtype", "fp16", "--fp16"),
    ("loss_scale", "12.0", "--loss-scale 12"),
    ("dropout", 0.1, "hidden_dropout 0.1"),
    ("devices", 64, "world size: 64"),
    ("save_every", 500, "--save-interval 500"),
    ("params", 52e9, "MSIZE=52"),
)

PRESETS = (
    Preset(
        name="bloom-176b",
        title="BLOOM 176B: bf16, normalised embedding, small initialisation, batch ramp, ALiBi",
        outcome="stable",
        what=(
            "One loss spike in the whole run, at step 31,219: the gradient norm went 0.24, 0.95, 2.4, 16, 145, 960 in "
            "six steps, the loss jumped to 5.1 at the last of them and was back in about 30 steps without intervention."
        ),
        mark="verified",
        sources=(
            f"{_REPOSITORY}: train/tr11-176B-ml/tr11-176B-ml.slurm, README.md, chronicles.md @ {_COMMIT}",
            f"{_REPOSITORY}: train/lessons-learned.md @ {_COMMIT}",
        ),
        settings=published(
            "bloom-176b",
            _BLOOM,
            ("warm-up steps computed from the ramp; the same arithmetic gives the log's samples at step 12,695",),
        ),
    ),
    Preset(
        name="bigscience-104b",
        title="BigScience 104B, experiment 1 of 12: the large model before BLOOM that could not be trained",
        outcome="unstable",
        what=(
            "Loss 6.4 to 14 near step 7,000, just after warm-up; with a new seed again at 6,900, then NaN. New data "
            "order, scaled attention, beta2 0.95, another shape, half the lr and longer warm-up did not save it."
        ),
        mark="verified",
        sources=(
            f"{_REPOSITORY}: train/tr8-104B-wide/README.md, chronicles.md @ {_COMMIT}",
            f"{_REPOSITORY}: train/lessons-learned.md @ {_COMMIT}",
        ),
        settings=published(
            "bigscience-104b",
            _104B,
            (
                "the FFN width was left over from the 13B model",
                "warm-up steps computed from the ramp; the same arithmetic gives the log's samples at step 7,000",
            ),
        ),
    ),
    Preset(
        name="bigscience-52b-throughput",
        title="BigScience's 52B throughput benchmark in fp16: never meant to learn, and a textbook divergence",
        outcome="unstable",
        what=(
            "Loss 12.4, 12.4, 44, 48 in the first four steps, down to 11.6 at step 31, then up to 20 at step 62, where "
            "the log ends. A 20-minute speed test whose settings nobody tuned."
        ),
        mark="verified",
        sources=(
            f"{_REPOSITORY}: experiments/gpt2-meg-ds-3d/meg_ds_3d_gpt2_perf_n16.slurm @ {_COMMIT}",
            f"{_REPOSITORY}: experiments/gpt2-meg-ds-3d/meg_ds_3d_gpt2_perf_n16-ds-off.out @ {_COMMIT}",
        ),
        settings=published("bigscience-52b-throughput", _52B),
    ),
)
