"""Configurations of the Marin community's open runs."""

from __future__ import annotations

from poise.preflight.presets.preset import Fact, Preset, published

_SCRIPTS = "marin-community/marin: experiments/tootsie"
_LEVANTER = "marin-community/levanter: src/levanter/models/llama.py, src/levanter/optim/config.py @ 9263f81e8b45"
_RETRO_32B = "marin-community/marin: docs/reports/marin-32b-retro.md @ 0394c6bc9496"

_FAMILY: tuple[Fact, ...] = (
    ("gated_mlp", True, "activation_function silu, Llama layout"),
    ("tied", False, "tie_word_embeddings = False (default of Levanter)"),
    ("norm", "pre", "hybrid_norm = False (default of Levanter)"),
    ("norm_kind", "rmsnorm", "Llama architecture"),
    ("positions", "rope", "Llama rotary embeddings"),
    ("biases", False, "use_bias = False (default of Levanter)"),
    ("init_std", 0.02, "initializer_range = 0.02 (default of Levanter)"),
    ("tokenizer_vocab", 128_256, "llama3_tokenizer_vocab_size = 128_256"),
    ("vocab_size", 128_256, "llama3_tokenizer_vocab_size = 128_256"),
    ("optimizer", "adamw", "AdamConfig (AdamW)"),
    ("beta1", 0.9, "beta1=0.9"),
    ("beta2", 0.95, "beta2=0.95"),
    ("eps", 1e-8, "epsilon=1e-8"),
    ("weight_decay", 0.05, "weight_decay=0.05"),
    ("schedule", "wsd", "warm-up, hold, decay"),
    ("total_steps", 1_000_000, "num_train_steps=1_000_000"),
    ("seq_len", 4096, "seq_len 4096"),
)

_8B: tuple[Fact, ...] = (
    *_FAMILY,
    ("n_layers", 32, "num_layers=32"),
    ("d_model", 4096, "hidden_dim=4096"),
    ("n_heads", 32, "num_heads=32"),
    ("n_kv_heads", 8, "num_kv_heads=8"),
    ("d_ff", 14_336, "intermediate_dim=14336"),
    ("qk_norm", False, "without QK-norm"),
    ("beta1", 0.9, "beta1 = 0.9 (default of Levanter)"),
    ("beta2", 0.95, "beta2 = 0.95 (default of Levanter)"),
    ("eps", 1e-8, "epsilon = 1e-8 (default of Levanter)"),
    ("clip", 1.0, "max_grad_norm = 1.0 (default of Levanter)"),
    ("lr", 1e-3, "learning_rate=1e-3"),
    ("warmup_steps", 1000, "warmup=1000"),
    ("decay_embeddings", False, "no weight decay on input embeddings or layer norm parameters"),
    ("z_loss", 0.0, "no z-loss"),
    ("batch_sequences", 1024, "train_batch_size=1024"),
    ("dtype", "bf16", "compute in bfloat16 except the final softmax"),
    ("master_weights", True, "parameters and optimizer states in float32"),
    ("state_dtype", "fp32", "parameters and optimizer states in float32"),
)

_32B: tuple[Fact, ...] = (
    *_FAMILY,
    ("n_layers", 64, "num_layers=64"),
    ("d_model", 5120, "hidden_dim=5120"),
    ("n_heads", 40, "num_heads=40"),
    ("n_kv_heads", 8, "num_kv_heads=8"),
    ("d_ff", 27_648, "intermediate_dim=27648"),
    ("qk_norm", False, "Llama layout, without QK-norm"),
    ("lr", 7e-4, "learning_rate=7e-4"),
    ("warmup_steps", 10_000, "warmup=0.01 of num_train_steps"),
    ("clip", 0.2, "max_grad_norm=0.2"),
    ("z_loss", 1e-4, "z_loss_weight=1e-4"),
    ("batch_sequences", 8192, "train_batch_size 8192 (7680 from step 18,500 to 21,010)"),
    ("skip_steps", True, "skip_bad_steps=True"),
)

_32B_QKN: tuple[Fact, ...] = (
    *_32B,
    ("qk_norm", True, "Qwen3 32B: QK-norm"),
    ("warmup_steps", 1000, "rewarmup=1000 after the warm start at step 80,000"),
)

PRESETS = (
    Preset(
        name="marin-8b",
        title="Marin 8B, first phase (Kestrel): Llama 3.1 8B at a high learning rate, without z-loss and QK-norm",
        outcome="stable",
        what=(
            "Very few spikes over 2.7T tokens at 1e-3; 2e-3 diverged. Much later, in deep cool-downs at a low rate, "
            "the training loss crept up: the output matrix grew, and a z-loss of 1e-4 ended it."
        ),
        mark="verified",
        sources=(
            f"{_SCRIPTS}/exp600_tootsie.py @ 04558eff1bf6",
            "marin-community/marin: docs/reports/marin-8b-retro.md @ 021da3e14fc5",
            _LEVANTER,
        ),
        settings=published("marin-8b", _8B),
    ),
    Preset(
        name="marin-32b",
        title="Marin 32B, first phase: the 8B recipe at 32B, with z-loss, low clip, skipped steps, no QK-norm",
        outcome="unstable",
        what=(
            "Spikes from early on, mostly held by clipping update norms; unavoidable from about step 70,000 to 80,000, "
            "about 5 % of a window of 2,500 steps lost. Rebuilt optimizer state, NAdamW and Muon all relapsed."
        ),
        mark="verified",
        sources=(f"{_SCRIPTS}/exp1295_32b.py @ 04558eff1bf6", _RETRO_32B, "marin-community/marin: issue 1368"),
        settings=published(
            "marin-32b",
            _32B,
            (
                "updates are clipped too: norm above mean + 2 deviations of the last 128 steps",
                "the script says of clip 0.2 that the norm is nearly always below it except during spikes",
            ),
        ),
    ),
    Preset(
        name="marin-32b-qkn",
        title="Marin 32B from step 80,000 on: the same run with QK-norm",
        outcome="stable",
        what=(
            "Warm-started from the spiking run at step 80,000 with QK-norm and 1,000 steps of warm-up: a loss penalty "
            "once, then the spikes were largely gone."
        ),
        mark="verified",
        sources=(
            f"{_SCRIPTS}/exp1395_qwen3_32b.py @ 170775047768",
            _RETRO_32B,
            "marin-community/marin: issue 1395",
        ),
        settings=published("marin-32b-qkn", _32B_QKN),
    ),
)
