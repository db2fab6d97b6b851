"""What a Hugging Face model type is by itself, where ``config.json`` does not say it.

Facts of ``transformers`` (``models/*/modeling_*.py``); a slow test builds a small model of each type and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_LLAMA: Final[Mapping[str, Any]] = {
    "norm": "pre",
    "norm_kind": "rmsnorm",
    "positions": "rope",
    "gated_mlp": True,
    "qk_norm": False,
    "biases": False,
    "embed_norm": False,
    "residual_init": "none",
    "attn_soft_cap": 0.0,
    "logit_soft_cap": 0.0,
}

_GPT: Final[Mapping[str, Any]] = {
    **_LLAMA,
    "norm_kind": "layernorm",
    "positions": "learned",
    "gated_mlp": False,
    "biases": True,
}

_QWEN3: Final = {**_LLAMA, "qk_norm": True}
_OLMO2: Final = {**_LLAMA, "qk_norm": True, "norm": "reordered"}
_GEMMA2: Final = {**_LLAMA, "norm": "sandwich"}

TYPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "granite": _LLAMA,
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
    "gemma": _LLAMA,
    "arcee": {**_LLAMA, "gated_mlp": False},
    "qwen2": {**_LLAMA, "biases": True},
    "qwen2_moe": {**_LLAMA, "biases": True},
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "olmo": {**_LLAMA, "norm_kind": "nonparametric"},
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3": {**_GEMMA2, "qk_norm": True},
    "gemma3_text": {**_GEMMA2, "qk_norm": True},
    "glm4": _GEMMA2,
    "gpt_oss": {**_LLAMA, "biases": True},
    "gpt2": {**_GPT, "residual_init": "scaled"},
    "gpt_bigcode": {**_GPT, "residual_init": "scaled"},
    "gpt_neo": _GPT,
    "gpt_neox": {**_GPT, "positions": "rope"},
    "gptj": {**_GPT, "positions": "rope"},
    "opt": _GPT,
    "bloom": {**_GPT, "positions": "alibi", "embed_norm": True},
    "falcon": {**_GPT, "positions": "rope", "biases": False},
    "mpt": {**_GPT, "positions": "alibi", "biases": False},
    "phi": {**_GPT, "positions": "rope"},
    "stablelm": {**_LLAMA, "norm_kind": "layernorm"},
    "starcoder2": {**_GPT, "positions": "rope"},
}
"""``model_type`` -> fields of ``Settings``; what a key of the file says goes before."""

TIED: Final[Mapping[str, bool]] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "mixtral", "phi3", "granite", "granitemoe", "deepseek_v2", "deepseek_v3",
         "arcee", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo", "olmo2", "olmo3", "olmoe", "glm", "glm4",
         "gpt_oss", "gpt_neox", "gptj", "phi", "stablelm", "dbrx", "nemotron", "persimmon", "codegen", "llama4_text",
         "seed_oss", "exaone4", "apertus", "helium", "jamba"),
        False,
    ),
    **dict.fromkeys(
        ("smollm3", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "bloom",
         "falcon", "mpt", "starcoder2", "cohere", "cohere2", "minicpm3", "ernie4_5", "lfm2", "xglm"),
        True,
    ),
}  # fmt: skip
"""``tie_word_embeddings`` where ``config.json`` does not say it."""

KV_HEADS: Final[Mapping[str, int]] = {
    "mistral": 8, "ministral": 8, "mixtral": 8, "smollm3": 4, "deepseek_v3": 128, "gemma": 16, "qwen2": 32,
    "qwen2_moe": 16, "qwen3": 32, "qwen3_moe": 4, "gemma2": 4, "gemma3_text": 4, "glm4": 2, "gpt_oss": 8,
    "gpt_bigcode": 1, "stablelm": 32, "starcoder2": 2,
}  # fmt: skip
"""``num_key_value_heads`` of types that do not take as many as there are heads, where it is not said."""

EXPERTS: Final = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"})
"""Types that are mixtures of experts by themselves."""

INIT: Final[Mapping[str, float]] = {"starcoder2": 0.018042, "nemotron": 0.0134, "minicpm3": 0.1, "mamba": 0.1}
"""``initializer_range`` of the classes that have another default than 0.02."""

NEUTRAL: Final[Mapping[str, float | None]] = {
    "scale_emb": 1.0, "scale_depth": None, "dim_model_base": None, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip
"""Keys of models that scale activations themselves (MiniCPM, Granite), with the value that changes nothing."""
