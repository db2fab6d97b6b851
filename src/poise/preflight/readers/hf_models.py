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
