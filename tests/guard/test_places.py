"""Places and roles by name: the names of real models, with the prefixes of real wrappers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.guard.signals.places import output_place, output_role, place_of

PLACES = {
    # poise
    "embedding.weight": "embed",
    "embed_out.gain": "embed",
    "trunk.blocks.11.attn.qkv.weight": "block.11",
    "trunk.blocks.0.attn_in.gain": "block.0",
    "trunk.norm.gain": "final",
    "head.weight": "head",
    # Llama, Mistral, Qwen
    "model.embed_tokens.weight": "embed",
    "model.layers.3.self_attn.q_proj.bias": "block.3",
    "model.layers.3.mlp.experts.7.down_proj.weight": "block.3",
    "model.norm.weight": "final",
    "lm_head.weight": "head",
    # GPT-2, nanoGPT
    "transformer.wte.weight": "embed",
    "transformer.wpe.weight": "embed",
    "transformer.h.0.attn.c_attn.weight": "block.0",
    "transformer.h.10.ln_1.weight": "block.10",
    "transformer.ln_f.bias": "final",
    # GPT-NeoX
    "gpt_neox.embed_in.weight": "embed",
    "gpt_neox.layers.2.attention.query_key_value.weight": "block.2",
    "gpt_neox.final_layer_norm.weight": "final",
    "embed_out.weight": "head",
    # torchtitan
    "tok_embeddings.weight": "embed",
    "layers.0.attention.wq.weight": "block.0",
    "norm.weight": "final",
    "output.weight": "head",
    # two stacks
    "model.encoder.layers.1.fc1.weight": "encoder.block.1",
    "model.decoder.layers.1.fc1.weight": "block.1",
    # unknown: the module, cut to two parts
    "0.weight": "0",
    "weight": "weight",
    "tower.conv1.weight": "tower.conv1",
    "tower.deep.er.conv.weight": "tower.deep",
}

ROLES = {
    "trunk.blocks.0.attn.qkv": "qkv",
    "trunk.blocks.0.attn.out": "proj",
    "trunk.blocks.0.mlp.inner": "fc1",
    "trunk.blocks.0.mlp.out": "fc2",
    **{f"model.layers.1.self_attn.{name}_proj": "qkv" for name in "qkv"},
    "model.layers.1.self_attn.o_proj": "proj",
    "model.layers.1.mlp.gate_proj": "fc1",
    "model.layers.1.mlp.up_proj": "fc1",
    "model.layers.1.mlp.down_proj": "fc2",
    "model.layers.1.block_sparse_moe.experts.3.w1": "fc1",
    "model.layers.1.block_sparse_moe.experts.3.w2": "fc2",
    "model.layers.1.block_sparse_moe.gate": None,
    "transformer.h.0.attn.c_attn": "qkv",
    "transformer.h.0.attn.c_proj": "proj",
    "transformer.h.0.mlp.c_fc": "fc1",
    "transformer.h.0.mlp.c_proj": "fc2",
    "gpt_neox.layers.0.attention.query_key_value": "qkv",
    "gpt_neox.layers.0.attention.dense": "proj",
    "gpt_neox.layers.0.mlp.dense_h_to_4h": "fc1",
    "gpt_neox.layers.0.mlp.dense_4h_to_h": "fc2",
    "layers.0.attention.wq": "qkv",
    "layers.0.attention.wo": "proj",
    "layers.0.feed_forward.w1": "fc1",
    "layers.0.feed_forward.w3": "fc1",
    "layers.0.feed_forward.w2": "fc2",
    "bert.encoder.layer.0.attention.self.query": "qkv",
    "bert.encoder.layer.0.attention.output.dense": "proj",
    "bert.encoder.layer.0.intermediate.dense": "fc1",
    "bert.encoder.layer.0.output.dense": "fc2",
    "trunk.blocks.0.attn_in": None,
    "model.layers.0.input_layernorm": None,
    "lm_head": None,
    "head": None,
}

WRAPPED = ["module.", "_fsdp_wrapped_module.", "_orig_mod.", "module._orig_mod."]


@pytest.mark.parametrize(("name", "place"), PLACES.items(), ids=str)
def test_places(name: str, place: str) -> None:
    assert place_of(name) == place
    for prefix in WRAPPED:
        assert place_of(prefix + name) == place
    inner, _, leaf = name.rpartition(".")
    if inner:
        assert place_of(f"{inner}._checkpoint_wrapped_module.{leaf}") == place


@pytest.mark.parametrize(("name", "role"), ROLES.items(), ids=str)
def test_roles(name: str, role: str | None) -> None:
    assert output_role(name) == role
    head, _, tail = name.partition(".")
    inside = f"{head}._fsdp_wrapped_module.{tail}" if tail else name
    assert output_role(f"_orig_mod.{inside}") == role
    expected = None if role is None else f"{place_of(name + '.weight')}.{role}"
    assert output_place(name) == expected


def test_poises_own_names() -> None:
    """Every parameter of our decoder has a place of the contract, and each block its four products."""
    from poise.model.build import build
    from poise.model.spec import Spec

    for tied in (True, False):
        model = build(
            Spec(vocab_size=32, n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32, seq_len=8, tied=tied), seed=0
        )
        places = {place_of(name) for name, _ in model.named_parameters()}
        assert places == {"embed", "block.0", "block.1", "final"} | (set() if tied else {"head"})
        outputs = [place for name, _ in model.named_modules() if (place := output_place(name)) is not None]
        assert sorted(outputs) == [f"block.{n}.{role}" for n in (0, 1) for role in ("fc1", "fc2", "proj", "qkv")]


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="abh01._", max_size=20))
def test_any_name_has_a_place(name: str) -> None:
    assert isinstance(place_of(name), str) and place_of(name)
    assert output_role(name) in ("qkv", "proj", "fc1", "fc2", None)
