"""The words of Megatron-LM's command lines and the argument dumps of its logs, and the names among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

SHAPE = frozenset({"num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "init_method_std"})
TRAINING = frozenset(
    {"lr", "min_lr", "train_iters", "train_samples", "global_batch_size", "lr_warmup_iters", "lr_warmup_samples",
     "lr_warmup_fraction", "lr_decay_style", "clip_grad", "adam_beta2", "weight_decay"}
)  # fmt: skip
_OTHERS = frozenset(
    {"seq_length", "max_position_embeddings", "micro_batch_size", "tensor_model_parallel_size", "lr_decay_iters",
     "attention_dropout", "adam_eps", "swiglu", "kv_channels"}
)  # fmt: skip
KNOWN = SHAPE | TRAINING | _OTHERS

_FLAGS = frozenset(
    {"deepspeed", "fp16", "bf16", "swiglu", "qk_layernorm", "qk_clip", "group_query_attention", "disable_bias_linear",
     "untie_embeddings_and_output_weights", "use_flash_attn", "embed_layernorm", "attention_softmax_in_fp32",
     "no_position_embedding", "use_rotary_position_embeddings", "no_masked_softmax_fusion", "apply_layernorm_1p",
     "no_check_for_nan_in_loss_and_grad", "use_precision_aware_optimizer", "init_method_xavier_uniform"}
)  # fmt: skip
"""Arguments that take no value, whatever word stands behind them."""

_LISTS = frozenset({"rampup_batch_size", "data_path", "betas"})
"""Arguments of several values."""

PER_NODE = ("GPUS_PER_NODE", "N_GPUS_PER_NODE", "NUM_GPUS_PER_NODE", "NPROC_PER_NODE")
NODES = ("NNODES", "NUM_NODES", "N_NODES")
MACHINES = frozenset({*PER_NODE, *NODES, "WORLD_SIZE"})
"""Variables of scripts that say how many accelerators there are."""

_POSITIONAL = frozenset({"$@", "$*", "${@}", "${@:1}", "$1", "$2", "$3"})
"""What whoever starts the script may add."""

_REDIRECTION = re.compile(r"\d?[<>]")

CALLED: Final[Mapping[str, str]] = {
    "n_layers": "num_layers", "d_model": "hidden_size", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_query_groups", "head_dim": "kv_channels", "d_ff": "ffn_hidden_size",
    "vocab_size": "vocab_size", "max_positions": "max_position_embeddings", "gated_mlp": "swiglu",
    "tied": "untie_embeddings_and_output_weights", "norm_kind": "normalization",
    "positions": "position_embedding_type", "biases": "disable_bias_linear", "qk_norm": "qk_layernorm",
    "qk_clip": "qk_clip_threshold", "attention_kernel": "attention_backend", "n_experts": "num_experts",
    "router_z_loss": "moe_z_loss_coeff", "init_std": "init_method_std", "embed_std": "embedding_init_method_std",
    "optimizer": "optimizer", "lr": "lr", "min_lr": "min_lr", "schedule": "lr_decay_style",
    "warmup_steps": "lr_warmup_iters", "total_steps": "train_iters", "beta1": "adam_beta1", "beta2": "adam_beta2",
    "eps": "adam_eps", "weight_decay": "weight_decay", "clip": "clip_grad", "batch_sequences": "global_batch_size",
    "seq_len": "seq_length", "ramp_from": "rampup_batch_size", "loss_scale": "loss_scale",
    "softmax_fp32": "attention_softmax_in_fp32", "dropout": "hidden_dropout",
    "nan_check": "check_for_nan_in_loss_and_grad", "save_every": "save_interval",
}  # fmt: skip
"""Field -> Megatron-LM's name for it."""

_DUMP = re.compile(r"(?:^|\s)([A-Za-z_]\w{1,60}) \.{2,60} (.{0,2000})$")


def dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").lower()


def as_flag(key: str) -> str:
    return key if key in MACHINES else "--" + key.replace("_", "-")


def as_argument(key: str, value: Any) -> str:
    flag = as_flag(key)
    if key in MACHINES:
        return f"{key}={value}"
    if value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def dump_of(text: str) -> dict[str, Any]:
    """Return ``name ..... value`` lines; of several with one name (ranks, restarts) the first counts."""
    out: dict[str, Any] = {}
    for line in text.splitlines():
        if " .." in line and (found := _DUMP.search(line[:4000])):
            value = found[2].strip()
            out.setdefault(found[1], value)
    return out


def best_line(lines: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of the command, or of the variable, that has most of the names we know.

    Beside them stand its words that hold nobody knows what, such as ``$MORE_ARGUMENTS``.
    """
    best: tuple[dict[str, Any], list[str]] = {}, []
    score = 0
    for words in lines:
        line = _arguments(words)
        if len(KNOWN & line[0].keys()) > score:
            best, score = line, len(KNOWN & line[0].keys())
    return best


def _arguments(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return ``--name value`` words as name -> value, list of values, or true; and words of unknown content."""
    out: dict[str, Any] = {}
    more: list[str] = []
    ours = False  # behind the program's name, or the first argument that is Megatron-LM's
    at = 0
    words = words[: next((i for i, word in enumerate(words) if _REDIRECTION.match(word)), len(words))]
    while at < len(words):
        word = words[at]
        at += 1
        ours = ours or word.endswith(".py")
        if not word.startswith("--") or len(word) < 3 or word.startswith("--$"):
            more.extend([word] if ours and word.removeprefix("--").startswith("$") and word not in _POSITIONAL else [])
            continue
        flag, equals, value = word.partition("=")
        key, values = dest(flag), [value] if equals else []
        while not equals and at < len(words) and not words[at].startswith("--") and not words[at].endswith(".py"):
            values.append(words[at])
            at += 1
        ours = ours or key in KNOWN
        while len(values) > (0 if key in _FLAGS else 1) and values[-1].startswith("$") and key not in _LISTS:
            word = values.pop()
            more.extend([word] if ours and word not in _POSITIONAL else [])
        plain = not values or (key in _FLAGS and not equals)
        out[key] = True if plain else values[0] if len(values) == 1 else values
    return out, more
