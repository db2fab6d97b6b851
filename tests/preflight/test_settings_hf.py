"""Hugging Face configurations, Trainer arguments and checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from poise.core.errors import UserError
from poise.preflight.read import from_mapping, read_settings
from poise.preflight.readers.hf_models import TYPES
from poise.preflight.settings import Settings

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}

ARGUMENTS: dict[str, Any] = {
    "output_dir": "out",
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "max_steps": 1000,
    "warmup_ratio": 0.015,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "save_steps": 0.1,
}


def write(folder: Path, name: str, data: dict[str, Any] | str) -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def of(folder: Path, data: dict[str, Any], name: str = "config.json") -> Settings:
    return read_settings([write(folder, name, data)])


def test_llama(tmp_path: Path) -> None:
    s = of(tmp_path, LLAMA)
    assert (s.format, s.n_layers, s.d_model, s.d_ff, s.n_kv_heads) == ("hf", 32, 4096, 14336, 8)
    assert (s.norm, s.norm_kind, s.gated_mlp, s.qk_norm, s.biases, s.tied) == ("pre", "rmsnorm", True, False, False, 0)
    assert '"initializer_range": 0.02' in s.say("init_std")
    assert s.residual_init == "none"
    assert s.lr is None and s.dtype is None and s.notes == ("stored as bfloat16; training precision is not said",)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen3", {"qk_norm": True, "norm": "pre"}),
        ("olmo2", {"qk_norm": True, "norm": "reordered"}),
        ("gemma2", {"qk_norm": False, "norm": "sandwich", "embed_scale": 64.0}),
        ("gemma3_text", {"qk_norm": True, "norm": "sandwich"}),
        ("qwen2", {"biases": True}),
        ("olmo", {"norm_kind": "nonparametric"}),
    ],
)
def test_what_a_type_is_by_itself(tmp_path: Path, kind: str, expected: dict[str, Any]) -> None:
    s = of(tmp_path, {**LLAMA, "model_type": kind, "final_logit_softcapping": 30.0, "attn_logit_softcapping": None})
    assert {name: getattr(s, name) for name in expected} == expected
    assert (s.logit_soft_cap, s.attn_soft_cap) == (30.0, 0.0)


def test_other_names_of_sizes(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    s = of(tmp_path, {**gpt2, "n_inner": None, "resid_pdrop": 0.1})
    assert (s.d_model, s.n_layers, s.n_heads, s.d_ff, s.max_positions) == (768, 12, 12, 3072, 1024)
    assert (s.residual_init, s.positions, s.gated_mlp, s.tied, s.dropout) == ("scaled", "learned", False, True, 0.1)
    opt = {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
    s = of(tmp_path, {**opt, "init_std": 0.006, "do_layer_norm_before": False, "vocab_size": 10})
    assert (s.d_ff, s.init_std, s.norm) == (256, 0.006, "post")
    moe = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768}
    s = of(tmp_path, {**moe, "router_z_loss_coef": 0.001})
    assert (s.n_experts, s.d_ff, s.router_z_loss) == (128, 768, 0.001)
    s = of(tmp_path, {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}})
    assert s.d_model == 4096 and s.qk_norm is True


def test_unknown_type_is_not_guessed_at(tmp_path: Path) -> None:
    s = of(tmp_path, {**LLAMA, "model_type": "brand_new", "strange_key": 1, "other_key": 2})
    assert s.d_model == 4096 and s.qk_norm is None and s.norm is None
    assert any("brand_new" in note for note in s.notes)
    assert "2 settings not read: strange_key, other_key" in s.notes


def test_arguments(tmp_path: Path) -> None:
    s = of(tmp_path, ARGUMENTS, "training_args.json")
    assert (s.lr, s.beta2, s.weight_decay, s.schedule, s.dtype) == (3e-4, 0.95, 0.1, "cosine", "bf16")
    assert (s.total_steps, s.warmup_steps, s.save_every) == (1000, 15, 100)
    assert s.batch_sequences is None and any("number of devices is not said" in note for note in s.notes)
    for name, value in (("eps", 1e-8), ("clip", 1.0), ("beta1", 0.9), ("decay_embeddings", True)):
        assert getattr(s, name) == value and s.said[name] == "default of the Hugging Face Trainer", name
    assert of(tmp_path, {**ARGUMENTS, "world_size": 16}, "a.json").batch_sequences == 512
    epochs = of(tmp_path, {**ARGUMENTS, "max_steps": -1, "num_train_epochs": 2}, "b.json")
    assert (epochs.total_steps, epochs.epochs, epochs.warmup_steps) == (None, 2.0, None)


def test_optimizer_states_and_save_strategy(tmp_path: Path) -> None:
    s = of(tmp_path, {**ARGUMENTS, "optim": "OptimizerNames.PAGED_ADAMW_8BIT", "save_strategy": "no"}, "a.json")
    assert (s.optimizer, s.state_dtype, s.save_every) == ("adamw", "8bit", 0)
    s = of(tmp_path, {**ARGUMENTS, "pure_bf16": True, "save_strategy": "epoch"}, "b.json")
    assert (s.state_dtype, s.master_weights, s.save_every) == ("bf16", False, None)
    s = of(tmp_path, {**ARGUMENTS, "bf16": False, "fp16": True}, "c.json")
    assert (s.dtype, s.loss_scale) == ("fp16", "dynamic")


FACTORY = """### model
model_name_or_path: some/model
### method
stage: pt
finetuning_type: lora
flash_attn: fa2
cutoff_len: 2048
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4   # peak
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_steps: 20
bf16: true
fsdp_config:
  - wrap: 1
    other: 2
"""


def test_llama_factory_yaml(tmp_path: Path) -> None:
    s = read_settings([write(tmp_path, "pretrain.yaml", FACTORY)])
    assert (s.format, s.lr, s.seq_len, s.warmup_steps, s.epochs) == ("hf", 1e-4, 2048, 20, 3.0)
    assert (s.attention_kernel, s.say("lr")) == ("flash_attention_2", "learning_rate: 0.0001")
    assert any("finetuning_type: lora" in note for note in s.notes)
    assert any("fsdp_config" in note for note in s.notes)


def test_axolotl_yaml(tmp_path: Path) -> None:
    text = (
        "base_model: x\nsequence_len: 4096\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\nnum_epochs: 1\n"
        "optimizer: adamw_bnb_8bit\nlr_scheduler: cosine\nlearning_rate: 0.0002\nbf16: auto\nflash_attention: true\n"
    )
    s = read_settings([write(tmp_path, "axolotl.yml", text)])
    assert (s.seq_len, s.lr, s.state_dtype, s.schedule, s.epochs) == (4096, 2e-4, "8bit", "cosine", 1.0)
    assert s.dtype is None and any("bf16: auto" in note for note in s.notes)


def test_folder_launcher_and_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, "config.json", LLAMA)
    write(tmp_path, "training_args.json", ARGUMENTS)
    vocab = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 130000, "content": "<x>"}]}
    write(tmp_path, "tokenizer.json", vocab)
    (tmp_path / "training_args.bin").write_bytes(b"PK\x03\x04")
    s = read_settings([tmp_path])
    assert (s.d_model, s.lr, s.tokenizer_vocab, s.dtype) == (4096, 3e-4, 130001, "bf16")
    assert s.say("dtype") == '"bf16": True'
    assert read_settings([tmp_path / "config.json"]).tokenizer_vocab == 130001
    launcher = write(
        tmp_path,
        "accelerate.yaml",
        "distributed_type: FSDP\nmixed_precision: bf16\nnum_machines: 2\nnum_processes: 16\n",
    )
    s = read_settings([tmp_path, launcher])
    assert (s.devices, s.batch_sequences) == (16, 512)


def test_disagreement_names_both(tmp_path: Path) -> None:
    one = write(tmp_path, "a.json", ARGUMENTS)
    two = write(tmp_path, "b.json", {**ARGUMENTS, "learning_rate": 1e-4})
    with pytest.raises(UserError) as error:
        read_settings([one, two])
    text = str(error.value)
    assert "a.json" in text and "b.json" in text and "0.0003" in text and "0.0001" in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", {**LLAMA, "hidden_size": -1}, ("hidden_size", "-1", "at least 1")),
        ("config.json", {**LLAMA, "initializer_range": "abc"}, ("initializer_range", "'abc'", "number")),
        ("config.json", {**LLAMA, "vocab_size": [1]}, ("vocab_size", "[1]")),
        ("config.json", {**LLAMA, "tie_word_embeddings": "maybe"}, ("tie_word_embeddings", "true or false")),
        ("a.json", {**ARGUMENTS, "learning_rate": "abc"}, ("learning_rate", "'abc'")),
        ("a.json", {**ARGUMENTS, "adam_beta2": 2}, ("adam_beta2", "from 0 to 1")),
        ("a.json", {**ARGUMENTS, "max_steps": True}, ("max_steps", "True")),
        ("a.json", '{"learning_rate": 1e-4,', ("valid JSON",)),
        ("a.json", '{"learning_rate": NaN, "max_steps": 3}', ("learning_rate", "finite")),
        ("a.json", "[1, 2]", ("no object",)),
        ("a.json", "  \n", ("empty",)),
        ("a.yaml", "learning_rate 3\n", ("key: value", "line 1")),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, name: str, data: dict[str, Any] | str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        read_settings([write(tmp_path, name, data)])
    text = str(error.value)
    assert name in text and "\n" not in text and all(word in text for word in words), text


def test_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "training_args.bin"
    path.write_bytes(b"\x80\x04anything")
    with pytest.raises(UserError, match="pickle, which is not opened"):
        read_settings([path])
    with pytest.raises(UserError, match="pickle and is not opened"):
        read_settings([tmp_path])


def test_a_trackers_copy() -> None:
    s = from_mapping({**LLAMA, **{key: str(value) for key, value in ARGUMENTS.items()}}, "wandb")
    assert s is not None and (s.d_model, s.lr, s.dtype) == (4096, 3e-4, "bf16")
    assert from_mapping({"a": 1}, "wandb") is None


def test_mlperf_keys() -> None:
    keys = {
        "opt_base_learning_rate": "0.0008",
        "opt_end_learning_rate": "8e-05",
        "opt_adamw_beta_2": "0.95",
        "opt_adamw_epsilon": "1e-05",
        "opt_gradient_clip_norm": "1.0",
        "opt_learning_rate_warmup_steps": "192",
        "global_batch_size": "64",
        "max_sequence_length": "8192",
    }
    s = from_mapping(keys, "run.log")
    assert s is not None and (s.lr, s.eps, s.batch_tokens, s.warmup_steps) == (8e-4, 1e-5, 524288, None)
    assert any("192" in note for note in s.notes)


SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 96,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "eos_token_id": 2,
    "layer_types": None,
    "n_inner": None,
    "attention_types": [[["global"], 2]],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_table_agrees_with_what_transformers_builds(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from poise.preflight.readers.model import read

    if kind == "gemma3":
        pytest.skip("its text model is gemma3_text")
    base = transformers.AutoConfig.for_model(kind)
    four_times = kind in ("gpt2", "gptj", "gpt_bigcode", "bloom", "falcon", "gpt_neo", "mpt")
    left_out = {"head_dim", "intermediate_size"} if four_times else set()
    sizes = {key: value for key, value in SMALL.items() if hasattr(base, key) and key not in left_out}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    s = read(model)
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    weights = dict(model.named_parameters())
    biases = [n for n in weights if n.endswith("bias") and "norm" not in n.lower() and "ln_" not in n]
    gated = "gate_proj" in leaves or any("gate_up_proj" in n or ".w1." in n for n in weights)
    assert s.qk_norm == bool(leaves & {"q_norm", "q_layernorm", "query_layernorm"})
    assert s.gated_mlp == gated
    assert s.biases == bool(biases)
    assert (s.positions == "learned") == bool(leaves & {"wpe", "embed_positions"})
    assert s.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    before = bool(leaves & {"input_layernorm", "ln_1", "norm_1", "self_attn_layer_norm"})
    after = bool(leaves & {"post_feedforward_layernorm", "post_mlp_layernorm"})
    placed = {(True, False): "pre", (False, True): "reordered", (True, True): "sandwich"}[before, after]
    assert s.norm == placed
    outputs = [w for n, w in weights.items() if n.endswith(("c_proj.weight", "o_proj.weight", "out_proj.weight"))]
    share = (2 * SMALL["n_layer"]) ** -0.5 if s.residual_init == "scaled" else 1.0
    assert s.init_std is not None
    assert all(0.7 < float(w.std()) / (s.init_std * share) < 1.3 for w in outputs)
