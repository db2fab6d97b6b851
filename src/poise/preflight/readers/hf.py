"""Hugging Face: a model's ``config.json``, Trainer arguments as JSON or YAML, the tokenizer, a checkpoint folder.

Trainer arguments are also understood as LLaMA-Factory and axolotl write them. Where a batch depends on the number of
devices it is taken from an accelerate configuration or a launcher's ``world_size``; nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from poise.preflight.readers.document import Document
from poise.preflight.readers.draft import Draft, Found, Keys, flattened, merge, not_read
from poise.preflight.readers.hf_models import EXPERTS, INIT, KV_HEADS, NEUTRAL, TIED, TYPES
from poise.preflight.readers.hf_names import MODEL_CALLED
from poise.preflight.readers.hf_trainer import ARGUMENTS, IGNORED, add_batch, read_arguments
from poise.preflight.settings import Settings

FORMAT = "hf"
LOOKS_FOR = "Hugging Face config.json, training arguments (JSON or YAML), tokenizer.json"

FOLDER = (
    "config.json",
    "training_args.json",
    "training_args.yaml",
    "training_args.yml",
    "trainer_args.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
"""Files of a checkpoint folder that say something."""

_WIDTH = ("hidden_size", "n_embd", "n_embed", "d_model")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
STORED = "stored as "
"""How the note on the weights' type begins."""

_LAUNCHER = frozenset({"num_processes", "num_machines", "distributed_type", "mixed_precision"})
_OTHER_KEYS: Final = frozenset(
    {"_name_or_path", "activation_function", "add_cross_attention", "architectures", "auto_map", "bos_token_id",
     "cache_implementation", "chunk_size_feed_forward", "cross_attention_hidden_size", "eos_token_id",
     "hidden_act", "hidden_activation", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "label_names",
     "layer_norm_eps", "layer_norm_epsilon", "layer_types", "mlp_bias", "model_type", "name_or_path",
     "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
     "return_dict", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
     "task_specific_params", "tokenizer_class", "torchscript", "transformers_version", "unk_token_id",
     "use_bfloat16", "use_cache", "vocab_file"}
)  # fmt: skip
"""Of config.json: what no rule asks for."""


def sniff(document: Document) -> float:
    """Return how sure it is that this is a file of Hugging Face's."""
    return 0.95 if kind_of(document) else 0.0


def kind_of(document: Document) -> str:
    """Return ``model``, ``arguments``, ``launcher``, ``tokenizer`` or, where it is none of these, nothing."""
    data = _inner(document.data)
    if document.kind not in ("json", "yaml") or not data:
        return ""
    if document.kind == "json" and _any(data, _WIDTH) and _any(data, _DEPTH) and _is_model(data):
        return "model"
    if document.kind == "json" and (_tokenizer_size(data) is not None or "added_tokens_decoder" in data):
        return "tokenizer"
    flat = flattened(data)[0]
    if "distributed_type" in flat and len(_LAUNCHER & flat.keys()) >= 2:
        return "launcher"
    return "arguments" if len(ARGUMENTS & flat.keys()) >= 2 else ""


def read(documents: Sequence[Document]) -> Settings:
    """Read all files of one model and run.

    Raises:
        UserError: a value that cannot be, or files that disagree.
    """
    parts: list[Settings] = []
    batches: list[tuple[int, str]] = []
    for document in documents:
        kind, data = kind_of(document), _inner(document.data)
        if kind == "model":
            parts.append(read_model_config(data, document.name))
        elif kind == "tokenizer":
            parts.append(_tokenizer(data, document.name))
        elif kind == "launcher":
            parts.append(_launcher(data, document.name))
        else:
            part, batch = read_arguments(data, document.name, document.unread)
            parts.append(part)
            batches.extend([batch] if batch else [])
    return add_batch(_without_stored(merge(parts)), batches)


def read_model_config(data: Mapping[str, Any], source: str, form: str = FORMAT) -> Settings:
    """Return what a ``config.json`` says of the model."""
    draft = Draft(source, form, MODEL_CALLED)
    keys = Keys(data, source, lambda key, value: f'"{key}": {value}')
    own = keys.word("model_type")
    kind = own.value if own and own.value else ""
    _shape(keys, draft, kind)
    _kinds(keys, draft, kind)
    _start(keys, draft, kind)
    cap = keys.number("attn_logit_softcapping", low=0)
    draft.put("attn_soft_cap", cap)
    draft.put("logit_soft_cap", keys.number("final_logit_softcapping", low=0))
    kernel = keys.word("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
    draft.put("attention_kernel", kernel)
    if kind == "mpt" and isinstance(data.get("attn_config"), Mapping):
        _mpt(Keys(data["attn_config"], source, keys.form), draft)
    if kind == "dbrx":
        _nested(keys, draft)
    if (weights := keys.word("dtype", "torch_dtype")) is not None and weights.value is not None:
        draft.notes.append(f"{STORED}{weights.value.rpartition('.')[2]}; training precision is not said")
    for name, value in TYPES.get(kind, {}).items():
        if name not in draft.values:
            draft.put(name, Found(value, f"{kind} models have {name.replace('_', ' ')} {value}"))
    if kind not in TYPES:
        draft.notes.append(f"model type {kind or 'is not said'}: only what config.json says is known")
    _embed_scale(keys, draft, kind)
    draft.notes.extend([*keys.notes(), *not_read(keys.unread(_OTHER_KEYS))])
    return draft.settings()


def _shape(keys: Keys, draft: Draft, kind: str) -> None:
    draft.put("n_layers", keys.size(*_DEPTH))
    draft.put("d_model", keys.size(*_WIDTH))
    draft.put("n_heads", keys.size("num_attention_heads", "n_head", "n_heads", "num_heads"))
    _groups(keys, draft, kind)
    draft.put("head_dim", keys.size("head_dim", *(["kv_channels"] if kind == "chatglm" else [])))
    rope, other = keys.size("qk_rope_head_dim"), keys.size("qk_nope_head_dim")
    if rope and other:  # latent attention: the projections do not go from heads x head_dim to the width
        draft.notes.append("latent attention: head sizes are not judged")
        draft.unknown("head_dim", "n_kv_heads")
    draft.put("n_experts", keys.whole("num_local_experts", "n_routed_experts", "num_experts"))
    if draft.get("n_experts"):
        draft.put("d_ff", keys.size("moe_intermediate_size"))
    elif kind in TYPES and kind not in EXPERTS:
        draft.default("n_experts", 0, f"transformers: {kind} models are dense")
    if "d_ff" not in draft.values:
        draft.put("d_ff", keys.size("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"))
    width = draft.get("d_model")
    ratio = keys.whole("expansion_ratio")
    if kind in ("gpt2", "gpt_bigcode", "gptj", "gpt_neo", "bloom", "falcon", "mpt") and width:
        draft.default("d_ff", (ratio.value if ratio else 4) * width, f"transformers: 4 x width in {kind}")
    draft.put("vocab_size", keys.size("padded_vocab_size", "vocab_size"))
    longest = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    draft.put("max_positions", keys.size(*longest, *(["seq_length"] if kind == "chatglm" else [])))
    tied = keys.flag("tie_word_embeddings")
    draft.put("tied", tied)
    if kind in TIED:
        draft.default("tied", TIED[kind], f"transformers' {kind} models")
    draft.put("router_z_loss", keys.number("router_z_loss_coef", low=0))
    draft.put("dropout", keys.number("hidden_dropout", "resid_pdrop", "dropout", "resid_pdrop_prob", low=0, high=1))


def _groups(keys: Keys, draft: Draft, kind: str) -> None:
    draft.put("n_kv_heads", keys.size("num_key_value_heads", "num_kv_heads", "n_head_kv"))
    if keys.is_on("multi_query") and not keys.is_on("new_decoder_architecture"):
        draft.put("n_kv_heads", Found(1, keys.form("multi_query", True)))
    elif keys.is_on("multi_query_attention"):
        draft.put("n_kv_heads", keys.size("multi_query_group_num"))
    elif kind in KV_HEADS:
        draft.default("n_kv_heads", KV_HEADS[kind], f"transformers' {kind} models")
    elif kind in TYPES and (heads := draft.get("n_heads")):
        draft.default("n_kv_heads", heads, f"transformers: as many as heads in {kind}")


def _start(keys: Keys, draft: Draft, kind: str) -> None:
    """The start of matrices; the class's default says little of how a released model was trained."""
    start = keys.number("initializer_range", "init_std", low=0)
    scaling = {key: keys.find(key) for key in NEUTRAL}
    own = [keys.form(*found) for key, found in scaling.items() if found and found[1] != NEUTRAL[key]]
    if own:
        draft.notes.append(f"{', '.join(own)}: activations are scaled by the model, so its start is not judged")
        draft.unknown("init_std", "embed_std")
    elif start is not None and start.value == INIT.get(kind, 0.02):
        draft.put(
            "init_std", start._replace(said=f"default of transformers: {start.said}, not necessarily what was used")
        )
    else:
        draft.put("init_std", start)


def _nested(keys: Keys, draft: Draft) -> None:
    """What DBRX keeps in ``attn_config`` and ``ffn_config``."""
    attention, inner = keys.find("attn_config"), keys.find("ffn_config")
    if attention and isinstance(attention[1], Mapping):
        part = Keys(attention[1], keys.where, lambda key, value: f'"attn_config"."{key}": {value}')
        draft.put("n_kv_heads", part.size("kv_n_heads"))
        draft.notes.extend(part.notes())
    if inner and isinstance(inner[1], Mapping):
        part = Keys(inner[1], keys.where, lambda key, value: f'"ffn_config"."{key}": {value}')
        draft.put("n_experts", part.size("moe_num_experts"))
        draft.put("d_ff", part.size("ffn_hidden_size"))
        draft.notes.extend(part.notes())


def _kinds(keys: Keys, draft: Draft, kind: str) -> None:
    if kind == "opt":
        before = keys.flag("do_layer_norm_before")
        if before is not None:
            draft.put("norm", before.then(lambda first: "pre" if first else "post"))
    bias = keys.flag("attention_bias", "enable_bias", "bias", "use_bias")
    if bias is not None and kind != "qwen2":
        draft.put("biases", bias)
    draft.put("qk_norm", keys.flag("use_qk_norm", "qk_layernorm", "qk_norm"))
    if keys.is_on("alibi"):
        draft.put("positions", Found("alibi", keys.form("alibi", True)))


def _mpt(keys: Keys, draft: Draft) -> None:
    draft.put("qk_norm", keys.flag("qk_ln"))
    if (alibi := keys.flag("alibi")) is not None:
        draft.put("positions", alibi.then(lambda on: "alibi" if on else "learned"))


def _embed_scale(keys: Keys, draft: Draft, kind: str) -> None:
    if kind.startswith("gemma") and draft.get("d_model"):
        draft.put("embed_scale", Found(draft.get("d_model") ** 0.5, f"{kind} models multiply by sqrt(hidden_size)"))
    else:
        draft.put("embed_scale", keys.number("embedding_multiplier", "scale_emb", low=0))


def _tokenizer(data: Mapping[str, Any], source: str) -> Settings:
    draft = Draft(source, FORMAT)
    size = _tokenizer_size(data)
    if size is not None:
        draft.put("tokenizer_vocab", Found(size, f"{size} ids in the tokenizer"))
    return draft.settings()


def _tokenizer_size(data: Mapping[str, Any]) -> int | None:
    """Return one more than the largest id of a ``tokenizer.json``."""
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping | list) or not vocab:
        return None
    ids = [i for i in vocab.values() if type(i) is int] if isinstance(vocab, Mapping) else [len(vocab) - 1]
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, Mapping) and type(token.get("id")) is int:
            ids.append(token["id"])
    return max(ids) + 1 if ids else None


def _launcher(data: Mapping[str, Any], source: str) -> Settings:
    draft = Draft(source, FORMAT)
    keys = Keys(data, source, lambda key, value: f"{key}: {value}")
    draft.put("devices", keys.size("num_processes"))
    draft.notes.extend(keys.notes())
    precision = keys.word("mixed_precision")
    if precision is not None and precision.value in ("bf16", "fp16", "fp8", None):
        draft.put("dtype", precision)
    return draft.settings()


def _inner(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's configuration of one that has several."""
    text = data.get("text_config")
    return text if isinstance(text, Mapping) and not _any(data, _WIDTH) else data


def _is_model(data: Mapping[str, Any]) -> bool:
    return any(key in data for key in ("model_type", "architectures", "vocab_size", "transformers_version"))


def _any(data: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(name in data for name in names)


def from_config(raw: Mapping[str, Any], source: str) -> Settings | None:
    """Return what a flat mapping of model and Trainer settings says, as trackers keep it; ``None`` for another's.

    Raises:
        UserError: a value that cannot be.
    """
    parts = []
    if _any(raw, _WIDTH) and _any(raw, _DEPTH) and "model_type" in raw:
        parts.append(read_model_config({k: v for k, v in raw.items() if k not in ARGUMENTS | IGNORED}, source))
    batch = None
    if len(ARGUMENTS & raw.keys()) >= 3:
        part, batch = read_arguments(raw, source, (), is_tracked=True)
        parts.append(part)
    return add_batch(_without_stored(merge(parts)), [batch] if batch else []) if parts else None


def _without_stored(settings: Settings) -> Settings:
    """Return settings without the note on stored weights where the precision of training is said."""
    if settings.dtype is None:
        return settings
    return replace(settings, notes=tuple(note for note in settings.notes if not note.startswith(STORED)))
