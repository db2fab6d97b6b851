"""Runs that one machine can repeat, and MLPerf's Llama 3.1 8B."""

from __future__ import annotations

from poise.preflight.presets.preset import Fact, Preset, published

_RESULTS = "mlcommons/training_results_v5.1"
_RESULTS_COMMIT = "441d65f4445c"

_MLPERF: tuple[Fact, ...] = (
    ("n_layers", 32, "Llama 3.1 8B"),
    ("d_model", 4096, "Llama 3.1 8B"),
    ("n_heads", 32, "Llama 3.1 8B"),
    ("n_kv_heads", 8, "Llama 3.1 8B"),
    ("d_ff", 14_336, "Llama 3.1 8B"),
    ("gated_mlp", True, "Llama 3.1 8B"),
    ("norm", "pre", "Llama 3.1 8B"),
    ("norm_kind", "rmsnorm", "Llama 3.1 8B"),
    ("positions", "rope", "Llama 3.1 8B"),
    ("biases", False, "Llama 3.1 8B"),
    ("qk_norm", False, "Llama 3.1 8B"),
    ("params", 8e9, "Llama 3.1 8B"),
    ("optimizer", "adamw", '"opt_name": adamw'),
    ("schedule", "cosine", '"opt_learning_rate_decay_schedule": cosine with linear warmup'),
    ("total_steps", 1_200_000, '"max_steps": 1200000 (of the schedule; runs end at the target loss)'),
    ("beta1", 0.9, '"opt_adamw_beta_1": 0.9'),
    ("beta2", 0.95, '"opt_adamw_beta_2": 0.95'),
    ("eps", 1e-5, '"opt_adamw_epsilon": 1e-05'),
    ("weight_decay", 0.1, '"opt_adamw_weight_decay": 0.1'),
    ("clip", 1.0, '"opt_gradient_clip_norm": 1.0'),
    ("seq_len", 8192, '"max_sequence_length": 8192'),
)

_HOT: tuple[Fact, ...] = (
    *_MLPERF,
    ("lr", 8e-4, '"opt_base_learning_rate": 0.0008'),
    ("min_lr", 8e-5, '"opt_end_learning_rate": 8e-05'),
    ("warmup_steps", 192, '"opt_learning_rate_warmup_steps": 192'),
    ("batch_sequences", 64, '"global_batch_size": 64'),
    ("dtype", "fp8", "export FP8=True"),
    ("devices", 128, "16 nodes of 8"),
)

_COOL: tuple[Fact, ...] = (
    *_MLPERF,
    ("lr", 4e-4, '"opt_base_learning_rate": 0.0004'),
    ("min_lr", 4e-5, '"opt_end_learning_rate": 4e-05'),
    ("warmup_steps", 16, '"opt_learning_rate_warmup_steps": 16'),
    ("batch_sequences", 16, '"global_batch_size": 16'),
    ("dtype", "fp4", "config_GB200_2x4x2xtp1pp1cp1_8b_fp4.sh"),
    ("devices", 8, "2 nodes of 4"),
)

_SPAM: tuple[Fact, ...] = (
    ("n_layers", 8, '"num_hidden_layers": 8'),
    ("d_model", 512, '"hidden_size": 512'),
    ("n_heads", 8, '"num_attention_heads": 8'),
    ("d_ff", 1376, '"intermediate_size": 1376'),
    ("vocab_size", 32_000, '"vocab_size": 32000'),
    ("max_positions", 1024, '"max_sequence_length": 1024'),
    ("gated_mlp", True, "LLaMAForCausalLM"),
    ("norm", "pre", "LLaMAForCausalLM"),
    ("norm_kind", "rmsnorm", "LLaMAForCausalLM"),
    ("positions", "rope", "LLaMAForCausalLM"),
    ("biases", False, "LLaMAForCausalLM"),
    ("qk_norm", False, "LLaMAForCausalLM"),
    ("init_std", 0.02, '"initializer_range": 0.02'),
    ("optimizer", "spam", "optimizer SPAM, threshold 5000.0, reset every 500 steps, warmup_epoch 150"),
    ("lr", 4e-3, "lr 0.004"),
    ("min_lr", 4e-4, "min_lr_ratio 0.1"),
    ("schedule", "cosine", "scheduler cosine"),
    ("warmup_steps", 1000, "warmup_steps 1000"),
    ("total_steps", 20_000, "num_training_steps 20000"),
    ("beta1", 0.9, "default of SPAM: betas = (0.9, 0.999)"),
    ("beta2", 0.999, "default of SPAM: betas = (0.9, 0.999)"),
    ("weight_decay", 0.0, "weight_decay 0.0"),
    ("clip", 0.0, "grad_clipping 0.0"),
    ("batch_sequences", 512, "total_batch_size 512"),
    ("seq_len", 256, "max_length 256"),
    ("dtype", "bf16", "dtype bfloat16"),
    ("save_every", 2000, "save_every 2000"),
)

_NANOGPT: tuple[Fact, ...] = (
    ("n_layers", 12, "n_layer = 12"),
    ("d_model", 768, "n_embd = 768"),
    ("n_heads", 12, "n_head = 12"),
    ("d_ff", 3072, "4 * config.n_embd"),
    ("vocab_size", 50_304, "50304 (50257 rounded up for efficiency)"),
    ("tokenizer_vocab", 50_257, "50304 (50257 rounded up for efficiency)"),
    ("max_positions", 1024, "block_size = 1024"),
    ("gated_mlp", False, "c_fc, GELU, c_proj"),
    ("tied", True, "transformer.wte.weight = lm_head.weight"),
    ("norm", "pre", "x + attn(ln_1(x)), x + mlp(ln_2(x))"),
    ("norm_kind", "layernorm", "LayerNorm"),
    ("positions", "learned", "wpe = nn.Embedding(block_size, n_embd)"),
    ("biases", False, "bias = False"),
    ("qk_norm", False, "model.py has none"),
    ("attention_kernel", "sdpa", "torch.nn.functional.scaled_dot_product_attention"),
    ("init_std", 0.02, "normal_(weight, std=0.02)"),
    ("residual_init", "scaled", "c_proj.weight with std 0.02 / sqrt(2 n_layer)"),
    ("optimizer", "adamw", "torch.optim.AdamW"),
    ("lr", 6e-4, "learning_rate = 6e-4"),
    ("min_lr", 6e-5, "min_lr = 6e-5"),
    ("schedule", "cosine", "cosine decay"),
    ("warmup_steps", 2000, "warmup_iters = 2000"),
    ("total_steps", 600_000, "max_iters = 600000"),
    ("beta1", 0.9, "beta1 = 0.9"),
    ("beta2", 0.95, "beta2 = 0.95"),
    ("eps", 1e-8, "default of torch.optim.AdamW: eps = 1e-8"),
    ("weight_decay", 0.1, "weight_decay 1e-1"),
    ("decay_embeddings", True, "all weight tensors in matmuls + embeddings decay"),
    ("clip", 1.0, "grad_clip = 1.0"),
    ("batch_sequences", 480, "batch_size 12 * gradient_accumulation_steps 5 * 8"),
    ("seq_len", 1024, "block_size = 1024"),
    ("dtype", "bf16", "dtype = 'bfloat16'"),
    ("master_weights", True, "autocast over float32 weights"),
    ("dropout", 0.0, "dropout = 0.0"),
    ("devices", 8, "8X A100 40GB"),
    ("save_every", 1000, "eval_interval = 1000, a checkpoint after each evaluation"),
)

_SPAM_RUNS = "wandb/run-20241225_064707-blhva00u, run-20241225_204909-06rvu4is, run-20241225_211606-j4c3wv1h"

PRESETS = (
    Preset(
        name="llama31-8b-mlperf-hot",
        title="Llama 3.1 8B in MLPerf Training v5.1, an entry at 8e-4 and batch 64",
        outcome="spiked",
        what=(
            "Of the 60 published runs at 8e-4 and batch 64 or 128, 33 show the evaluation loss rising by more than "
            "0.02 between two evaluations; all clip at 1.0, and the rises went away by themselves."
        ),
        mark="verified",
        sources=(
            f"{_RESULTS}: Cisco/results/hpf_n16/llama31_8b/result_*.txt @ {_RESULTS_COMMIT}",
            f"{_RESULTS}: Cisco/benchmarks/llama31_8b/implementations/nemo/config_DGXH100_16x8x1xtp2pp1cp1.sh @ "
            f"{_RESULTS_COMMIT}",
        ),
        settings=published("llama31-8b-mlperf-hot", _HOT, ("train_samples = 64 max_steps: warm-up is in steps",)),
    ),
    Preset(
        name="llama31-8b-mlperf-cool",
        title="Llama 3.1 8B in MLPerf Training v5.1, an entry at 4e-4 and batch 16",
        outcome="stable",
        what=(
            "Of the 170 published runs at 4e-4 and batch 16 or 32, none shows the evaluation loss rising by more than "
            "0.02. Entries differ in hardware and precision too, so this is no controlled experiment."
        ),
        mark="verified",
        sources=(
            f"{_RESULTS}: NVIDIA/results/theia_ngpu8_ngc25.09_nemo/llama31_8b/result_*.txt @ {_RESULTS_COMMIT}",
            f"{_RESULTS}: NVIDIA/benchmarks/llama31_8b/implementations/nemo/config_GB200_2x4x2xtp1pp1cp1_8b_fp4.sh @ "
            f"{_RESULTS_COMMIT}",
        ),
        settings=published("llama31-8b-mlperf-cool", _COOL, ("the run is over after about 12,000 steps",)),
    ),
    Preset(
        name="spam-llama60m",
        title="LLaMA 60M with the SPAM optimizer at 4e-3, from the authors' own logs",
        outcome="unstable",
        what=(
            "Evaluation loss 5.0 at step 1,000, 7.1 at 4,000, 6.89 at the end. A second log repeats the first four "
            "evaluations digit for digit; a third, hours later with the same printed arguments, ends at 3.39: "
            "something that the arguments do not show had changed."
        ),
        mark="verified",
        sources=(
            f"TianjinYellow/SPAM-Optimizer: {_SPAM_RUNS} (files/output.log) @ e8185fbe695f",
            "TianjinYellow/SPAM-Optimizer: configs/llama_60m.json, galore_torch/SPAM.py @ e8185fbe695f",
        ),
        settings=published("spam-llama60m", _SPAM),
    ),
    Preset(
        name="gpt2-nanogpt",
        title="GPT-2 124M with nanoGPT's default settings on OpenWebText",
        outcome="spiked",
        what=(
            "The author's run reached a loss of about 2.85. Users report explosions between 30,000 and 100,000 steps "
            "with unchanged settings and bf16; some mended them by another attention kernel, eps 1e-5, or float32."
        ),
        mark="verified",
        sources=(
            "karpathy/nanoGPT: train.py, model.py, config/train_gpt2.py @ 3adf61e154c3",
            "karpathy/nanoGPT: issues 137, 524, 554",
        ),
        settings=published("gpt2-nanogpt", _NANOGPT),
    ),
)
