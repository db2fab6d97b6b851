"""Where in a model a parameter or a linear layer is, told by its name alone. No torch.

Places are ``embed``, ``block.<0-based number>``, ``final`` (the last norm) and ``head``; inside encoders the blocks
are ``encoder.block.<number>``. A name that fits nothing has its module as its place, cut to two parts. The names
of poise's decoder, of the models in ``transformers`` (Llama, Mistral, Qwen, GPT-2, GPT-NeoX, OPT, BERT, T5),
of nanoGPT, torchtitan, OLMo-core and timm are known; wrappers (DDP, FSDP, ``torch.compile``, activation
checkpointing) are looked through.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal

Role = Literal["qkv", "proj", "fc1", "fc2"]

WRAPPERS: Final = frozenset({"module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})

_CONTAINERS: Final = frozenset({"layers", "layer", "h", "blocks", "block", "decoder_layers", "transformer_blocks"})
_EMBEDDINGS: Final = frozenset({"wte", "wpe", "shared", "pos_emb", "tok_emb"})
_HEADS: Final = frozenset({"lm_head", "head", "output", "unembed", "output_layer", "w_out", "cls", "score"})
_FINALS: Final = frozenset({"norm", "ln_f", "norm_f", "final_norm", "final_layer_norm", "final_layernorm", "ln_final"})
_LEAVES: Final = frozenset({"weight", "bias", "gain"})

_ATTENTION: Final = frozenset({"attn", "attention", "self_attn", "self_attention", "selfattention", "attn1", "mixer"})
_MLP: Final = frozenset({"mlp", "feed_forward", "ffn", "ff", "densereludense", "moe", "block_sparse_moe", "experts"})
_ROLES: Final[dict[str, Role]] = {
    **dict.fromkeys(("qkv", "qkv_proj", "q_proj", "k_proj", "v_proj", "query_key_value", "wqkv", "c_attn"), "qkv"),
    **dict.fromkeys(("wq", "wk", "wv", "w_q", "w_k", "w_v", "query", "key", "value", "to_q", "to_k", "to_v"), "qkv"),
    **dict.fromkeys(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "in_proj", "linear_qkv"), "qkv"),
    **dict.fromkeys(("o_proj", "out_proj", "wo", "w_out", "to_out", "linear_proj"), "proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "w1", "w3", "wi"), "fc1"),
    **dict.fromkeys(("wi_0", "wi_1", "dense_h_to_4h", "inner", "linear_fc1", "fc_1"), "fc1"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h", "linear_fc2"), "fc2"),
}
_ROLES_IN_ATTENTION: Final[dict[str, Role]] = {
    **dict.fromkeys(("out", "c_proj", "dense", "proj", "o"), "proj"),
    **dict.fromkeys(("q", "k", "v", "attn", "q_lin", "k_lin", "v_lin"), "qkv"),
    "out_lin": "proj",
}
_ROLES_IN_MLP: Final[dict[str, Role]] = {
    **dict.fromkeys(("fc", "lin1", "dense_in"), "fc1"),
    **dict.fromkeys(("out", "c_proj", "proj", "wo", "w_out", "lin2", "dense_out"), "fc2"),
}


def place_of(name: str) -> str:
    """Return the place of a parameter; never an error.

    >>> place_of("module.model.layers.3._checkpoint_wrapped_module.self_attn.q_proj.weight")
    'block.3'
    >>> place_of("transformer.wte.weight"), place_of("lm_head.weight"), place_of("encoder.conv.0.weight")
    ('embed', 'head', 'encoder.conv')
    """
    parts = _parts(name)
    block = _block(parts)
    if block is not None:
        return block
    inner = [part.lower() for part in parts]
    if inner and (len(inner) == 1 or inner[-1] in _LEAVES):
        inner = inner[:-1] or inner
    if inner == ["embed_out"] and parts[-1] == "weight":  # what GPT-NeoX calls its head
        return "head"
    if any("embed" in part or part in _EMBEDDINGS for part in inner):
        return "embed"
    if any(part in _HEADS for part in inner):
        return "head"
    if any(part in _FINALS for part in inner):
        return "final"
    module = parts[:-1] or parts
    return ".".join(module[:2]) or "model"


def output_role(name: str) -> Role | None:
    """Return which of a block's four products a linear module makes; ``None`` for every other module.

    A gated MLP's gate and up projections are both ``fc1``; queries, keys and values are all ``qkv``.

    >>> output_role("transformer.h.0.attn.c_proj"), output_role("transformer.h.0.mlp.c_proj")
    ('proj', 'fc2')
    >>> output_role("model.layers.0.self_attn.q_proj"), output_role("lm_head")
    ('qkv', None)
    """
    parts = _parts(name)
    if _block(parts) is None or "taps" in parts:  # poise's taps are called after what goes through them
        return None
    *above, own = [part.lower() for part in parts]
    if own == "dense" and above:  # BERT: attention.output.dense, intermediate.dense, output.dense
        if above[-1] == "intermediate":
            return "fc1"
        if above[-1] == "output" and "attention" not in above:
            return "fc2"
    branch = next((part for part in reversed(above) if part in _ATTENTION or part in _MLP), "")
    special = _ROLES_IN_ATTENTION if branch in _ATTENTION else _ROLES_IN_MLP if branch in _MLP else {}
    return special.get(own, _ROLES.get(own))


def output_place(name: str) -> str | None:
    """Return the place of a linear module's output, such as ``block.3.fc1``; ``None`` where it has no role.

    >>> output_place("_orig_mod.trunk.blocks.1.mlp.inner")
    'block.1.fc1'
    """
    role = output_role(name)
    return None if role is None else f"{_block(_parts(name))}.{role}"


def _parts(name: str) -> list[str]:
    """Return the parts of a dotted name without those that wrappers put in."""
    parts = [part for part in name.split(".") if part]
    return [part for part in parts if part not in WRAPPERS] or parts


def _block(parts: list[str]) -> str | None:
    """Return ``block.N`` where the name leads through a numbered list of blocks."""
    for position, (before, part) in enumerate(pairwise(parts), start=1):
        if part.isdecimal() and before.lower() in _CONTAINERS:
            inside = "encoder." if "encoder" in parts[:position] and "decoder" not in parts[:position] else ""
            return f"{inside}block.{int(part)}"
    return None
