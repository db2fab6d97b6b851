"""Values that are written and cannot be read, defaults that say little, and what a source calls its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from poise.core.errors import UserError
from poise.preflight.read import read_settings
from poise.preflight.readers.draft import merge
from poise.preflight.readers.hf_models import TIED
from poise.preflight.readers.plain_yaml import parse_yaml
from poise.preflight.readers.shell import command_lines
from poise.preflight.settings import Said, Settings

LINE = "python pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --lr 1e-3 --train-iters 100 "
SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip
TITAN = '[model]\nname = "qwen3"\nflavor = "{}"\n[training]\nsteps = 5\nlocal_batch_size = 1\n'
TRAINER = "learning_rate: 1e-4\nper_device_train_batch_size: 1\nmax_steps: 10\n"


def of(folder: Path, text: str, name: str) -> Settings:
    (folder / name).write_text(text)
    return read_settings([folder / name])


@pytest.mark.parametrize(
    ("argument", "field", "default"),
    [
        ("--init-method-std", "init_std", 0.02),
        ("--adam-beta2", "beta2", 0.999),
        ("--clip-grad", "clip", 1.0),
        ("--weight-decay", "weight_decay", 0.01),
        ("--optimizer", "optimizer", "adamw"),
        ("--lr-decay-style", "schedule", "linear"),
        ("--ffn-hidden-size", "d_ff", 256),
        ("--position-embedding-type", "positions", "learned"),
        ("--lr-warmup-iters", "warmup_steps", 0),
        ("--lr-warmup-fraction", "warmup_steps", 0),
        ("--hidden-dropout", "dropout", 0.1),
        ("--fp8-format", "dtype", "fp32"),
        ("--glu-activation", "gated_mlp", False),
    ],
)
def test_megatron_keeps_no_default_for_what_it_cannot_read(
    tmp_path: Path, argument: str, field: str, default: object
) -> None:
    assert getattr(of(tmp_path, LINE, "plain.sh"), field) == default
    for value in ("$UNKNOWN", "${UNKNOWN}", "$(cat value)", '"$(python -c "print(1)")"', "`echo 1 2`", "$((A * 2))"):
        s = of(tmp_path, f"{LINE} {argument} {value} --bf16\n", "a.sh")
        assert getattr(s, field) is None and field not in s.said, value
        assert s.n_layers == 2 and (s.dtype == "bf16" or field == "dtype")
        assert any(note.startswith(f"{argument} is $") for note in s.notes), (value, s.notes)


def test_commands_are_one_word_and_never_run(tmp_path: Path) -> None:
    script = (
        f'LR=$(touch {tmp_path}/ran; echo ")" | head -1)\nx --lr $LR --num-layers `cat a b` --b "it\'s $(date -u)"\n'
    )
    words = command_lines(script)[0]
    assert words[:2] == ["x", "--lr"] and words[2].endswith("head -1)") and words[3:5] == ["--num-layers", "$(cat a b)"]
    assert words[5:] == ["--b", "it's $(date -u)"]
    s = of(tmp_path, script + LINE.replace("--lr 1e-3", "--lr $LR"), "a.sh")
    assert s.lr is None and s.n_layers == 2 and not (tmp_path / "ran").exists()


def test_arguments_that_may_hold_anything_leave_no_defaults(tmp_path: Path) -> None:
    s = of(tmp_path, f"{LINE} $MORE --bf16\n", "a.sh")
    assert (s.lr, s.dtype, s.beta2, s.init_std) == (1e-3, "bf16", None, None)
    assert any("$MORE may hold more arguments" in note for note in s.notes)
    assert of(tmp_path, f'{LINE} --bf16 "$@" > $LOG 2>&1\n', "b.sh").beta2 == 0.999
    assert of(tmp_path, f"torchrun $WHERE {LINE}\n", "c.sh").beta2 == 0.999  # the launcher's


def test_another_files_default_does_not_take_the_place() -> None:
    one = Settings(source="a", format="hf", said=Said({}, {"clip": "--clip-grad"}, {"clip"}))
    default = Settings(source="b", format="hf", clip=1.0, said={"clip": "default of X"})
    for parts in ([one, default], [default, one]):
        both = merge(parts)
        assert both.clip is None and "clip" not in both.said and both.name_of("clip") == "--clip-grad"
    said = Settings(source="c", format="hf", clip=0.5, said=Said({"clip": "clip: 0.5"}, {"clip": "clip"}))
    for parts in ([one, said], [said, one]):
        both = merge(parts)
        assert both.clip == 0.5 and both.name_of("clip") == "clip"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("adam_beta2: ${beta}", "beta2"),
        ("adam_epsilon: {{ eps }}", "eps"),
        ("max_grad_norm: auto", "clip"),
        ("optim: !name x", "optimizer"),
        ("warmup_steps: $W", "warmup_steps"),
        ("warmup_ratio: $W", "warmup_steps"),
        ("save_steps: ???", "save_every"),
        ("weight_decay: *nobody", "weight_decay"),
    ],
)
def test_trainer_keeps_no_default_for_what_it_cannot_read(tmp_path: Path, line: str, field: str) -> None:
    assert getattr(of(tmp_path, TRAINER, "plain.yaml"), field) is not None
    s = of(tmp_path, TRAINER + line + "\n", "a.yaml")
    assert getattr(s, field) is None and s.lr == 1e-4
    assert any(note.startswith(line.partition(":")[0]) for note in s.notes)


def test_torchtitan_keeps_no_default_for_what_it_cannot_read(tmp_path: Path) -> None:
    text = TITAN.format("0.6B") + 'max_norm = "$CLIP"\n[optimizer]\nlr = "${LR}"\n'
    s = of(tmp_path, text, "a.toml")
    assert (s.clip, s.lr, s.min_lr, s.beta2) == (None, None, None, 0.95)
    assert "[optimizer] lr is ${LR}, whose value the file does not say" in s.notes
    assert of(tmp_path, TITAN.format("$SIZE"), "b.toml").d_model is None


def test_yaml_anchors_and_aliases() -> None:
    text = "a: &x 1e-2\nb: *x\nc: &m\n  d: 1\ne: *m\nf: *none\n"
    assert parse_yaml(text, "a.yaml")[0]["a"] == parse_yaml(text, "a.yaml")[0]["b"] == 0.01
    assert set(parse_yaml(text, "a.yaml")[1]) == {"c", "e", "f"}


def test_a_yaml_key_with_two_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        of(tmp_path, TRAINER + "learning_rate: 3e-4\n", "a.yaml")
    text = str(error.value)
    assert all(part in text for part in ("line 1 has 'learning_rate: 1e-4'", "line 4", "3e-4")) and "\n" not in text
    assert of(tmp_path, TRAINER + "learning_rate: 1e-4\n", "b.yaml").lr == 1e-4  # the same twice
    assert parse_yaml("a:\n  k: 1\nb:\n  k: 2\n", "c.yaml")[0] == {"a": {"k": 1}, "b": {"k": 2}}


def test_misspelt_settings_are_named(tmp_path: Path) -> None:
    s = of(tmp_path, TRAINER + "adam_betta2: 0.95\nzzzz: 1\ndo_train: true\n", "a.yaml")
    assert "adam_betta2 is not read, did you mean 'adam_beta2'?" in s.notes and "1 setting not read: zzzz" in s.notes
    assert not any("do_train" in note for note in s.notes)
    s = of(tmp_path, TITAN.format("0.6B") + "max_nrm = 1.0\n", "a.toml")
    assert "[training] max_nrm is not read, did you mean 'max_norm'?" in s.notes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", TRAINER + "bf16: true\nfp16: true\n"),
        ("b.yaml", TRAINER + "pure_bf16: true\nfp16: true\n"),
        ("c.sh", LINE + "--bf16 --fp16"),
    ],
)
def test_two_precisions_at_once_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=r"both .*bf16.* and .*fp16.* are set") as error:
        of(tmp_path, text, name)
    assert "\n" not in str(error.value)


# -- what config.json does not say of training ----------------------------------------------------------------------


def test_stored_weights_are_no_training_precision(tmp_path: Path) -> None:
    note = "stored as float16; training precision is not said"
    s = of(tmp_path, json.dumps({**SMALL, "torch_dtype": "float16"}), "config.json")
    assert s.dtype is None and note in s.notes
    (tmp_path / "args.yaml").write_text(TRAINER + "bf16: true\n")
    both = read_settings([tmp_path / "config.json", tmp_path / "args.yaml"])
    assert both.dtype == "bf16" and note not in both.notes


def test_the_classes_own_start_is_called_a_default(tmp_path: Path) -> None:
    s = of(tmp_path, json.dumps({**SMALL, "initializer_range": 0.02}), "config.json")
    assert (
        s.init_std == 0.02 and s.said["init_std"].startswith("default of") and "initializer_range" in s.say("init_std")
    )
    s = of(tmp_path, json.dumps({**SMALL, "initializer_range": 0.006}), "config.json")
    assert s.say("init_std") == '"initializer_range": 0.006'
    s = of(tmp_path, json.dumps({**SMALL, "model_type": "starcoder2", "initializer_range": 0.018042}), "config.json")
    assert s.said["init_std"].startswith("default of")


@pytest.mark.parametrize(
    ("kind", "keys", "judged"),
    [
        ("minicpm", {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}, False),
        ("granite", {"residual_multiplier": 0.22, "logits_scaling": 8.0, "attention_multiplier": 0.015}, False),
        ("granite", {"embedding_multiplier": 12.0}, False),
        ("granite", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}, True),
    ],
)
def test_models_with_their_own_scaling(tmp_path: Path, kind: str, keys: dict[str, float], judged: bool) -> None:
    s = of(tmp_path, json.dumps({**SMALL, "model_type": kind, "initializer_range": 0.1, **keys}), "config.json")
    assert (s.init_std == 0.1) is judged and s.embed_std is None
    assert any("activations are scaled" in note for note in s.notes) is not judged


def test_tied_as_the_class_is_and_unknown_types_have_no_defaults(tmp_path: Path) -> None:
    for kind, tied in (("llama", False), ("qwen2", False), ("gpt2", True), ("gemma", True), ("opt", True)):
        s = of(tmp_path, json.dumps({**SMALL, "model_type": kind}), "config.json")
        assert s.tied is tied and s.said["tied"].startswith("default of"), kind
    s = of(tmp_path, json.dumps({**SMALL, "model_type": "brand_new"}), "config.json")
    assert (s.tied, s.n_kv_heads, s.n_experts, s.d_ff) == (None, None, None, None)
    assert not any(words.startswith("default of") for words in s.said.values())
    assert of(tmp_path, json.dumps({**SMALL, "model_type": "mixtral"}), "config.json").n_experts is None
    assert of(tmp_path, json.dumps({**SMALL, "model_type": "mistral"}), "config.json").n_kv_heads == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ties_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for kind, tied in TIED.items():
        if kind in transformers.CONFIG_MAPPING:
            assert transformers.AutoConfig.for_model(kind).tie_word_embeddings is tied, kind


def test_keys_of_dbrx_chatglm_and_bloom(tmp_path: Path) -> None:
    parts = {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 16}}
    dbrx = {"model_type": "dbrx", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "max_seq_len": 128}
    s = of(tmp_path, json.dumps(dbrx | parts), "config.json")
    assert (s.n_kv_heads, s.d_ff, s.n_experts, s.max_positions, s.tied) == (2, 48, 16, 128, False)
    glm = {"model_type": "chatglm", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "seq_length": 32}
    glm |= {"multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 96, "kv_channels": 16}
    s = of(tmp_path, json.dumps(glm | {"padded_vocab_size": 128}), "config.json")
    assert (s.n_kv_heads, s.d_ff, s.head_dim, s.vocab_size, s.max_positions) == (2, 96, 16, 128, 32)
    bloom = {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    s = of(tmp_path, json.dumps(bloom), "config.json")
    assert (s.d_model, s.d_ff, s.n_kv_heads, s.tied) == (64, 256, 4, True)


# -- more of what files say -----------------------------------------------------------------------------------------


def test_tied_flavors_of_torchtitan_start_the_embedding_as_the_output(tmp_path: Path) -> None:
    assert of(tmp_path, TITAN.format("0.6B"), "a.toml").embed_std == pytest.approx(1024**-0.5)
    assert of(tmp_path, TITAN.format("8B"), "a.toml").embed_std == 1.0


@pytest.mark.parametrize(
    ("head", "devices"),
    [
        ("GPUS_PER_NODE=8\nNNODES=16\n", 128),
        ("WORLD_SIZE=64\n", 64),
        ("GPUS_PER_NODE=8\nNNODES=2\nWORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))\n", 16),
        ("#SBATCH --nodes=48\nN_GPUS_PER_NODE=4\nNNODES=$SLURM_NNODES\n", 192),
        ("GPUS_PER_NODE=8\nNNODES=$SLURM_NNODES\n", None),
        ("GPUS_PER_NODE=$1\nNNODES=4\nWORLD_SIZE=$WORLD\n", None),
        ("", None),
    ],
)
def test_devices_of_scripts(tmp_path: Path, head: str, devices: int | None) -> None:
    assert of(tmp_path, head + LINE, "a.sh").devices == devices


def test_unclear_degrees_leave_the_devices_unknown(tmp_path: Path) -> None:
    text = TITAN.format("0.6B") + "[parallelism]\ndata_parallel_shard_degree = 8\ntensor_parallel_degree = {}\n"
    assert of(tmp_path, text.format(2), "a.toml").devices == 16
    assert of(tmp_path, text.format('"$TP"'), "b.toml").devices is None


def test_bigsciences_gated_units(tmp_path: Path) -> None:
    s = of(tmp_path, LINE + "--glu-activation swiglu", "a.sh")
    assert (s.gated_mlp, s.d_ff) == (True, 256) and "4 x hidden size" in s.said["d_ff"]


def test_paths_may_be_text_and_one(tmp_path: Path) -> None:
    of(tmp_path, LINE, "a.sh")
    for paths in (str(tmp_path / "a.sh"), tmp_path / "a.sh", [str(tmp_path / "a.sh")], (tmp_path / "a.sh",)):
        assert read_settings(paths).n_layers == 2
    assert read_settings("100m").d_model == 768


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words", "said"),
    [
        ("d_model", 16384, "torchtitan's llama3 405B", "d_model = 16384 (torchtitan's llama3 405B)"),
        ("d_model", 16384, "width 16,384", "width 16,384"),
        ("lr", 3e-4, "--lr 3.0e-4", "--lr 3.0e-4"),
        ("lr", 3e-4, "--lr 3e-5", "lr = 0.0003 (--lr 3e-5)"),
        ("total_steps", 7000, "7_000 steps", "7_000 steps"),
        ("n_layers", 4, "Llama-4 and 24 layers", "n_layers = 4 (Llama-4 and 24 layers)"),
        ("gated_mlp", True, "--swiglu", "gated_mlp = True (--swiglu)"),
        ("tied", False, "untie = True", "tied = False (untie = True)"),
        ("biases", False, "bias: false", "bias: false"),
        ("dtype", "bf16", "--bf16", "--bf16"),
        ("norm", "pre", "Megatron", "norm = pre (Megatron)"),
        ("clip", 1.0, "default of X: 1.0", "clip = 1.0 (default of X: 1.0)"),
        ("clip", 1.0, "", "clip = 1.0"),
    ],
)
def test_what_is_said_holds_the_value(field: str, value: Any, words: str, said: str) -> None:
    assert Settings(source="a", format="hf", said={field: words}, **{field: value}).say(field) == said


def test_names_are_the_sources_own(tmp_path: Path) -> None:
    script = of(tmp_path, LINE + "--clip-grad 0.5", "a.sh")
    assert script.name_of("clip") == "--clip-grad" and script.name_of("save_every") == "--save-interval"
    flat = of(tmp_path, "num_layers: 2\nhidden_size: 8\nlr: 1e-4\nclip_grad: 1\ntrain_iters: 9\n", "a.yaml")
    assert flat.name_of("clip") == "clip_grad" and flat.name_of("skip_steps") == "skip_steps"
    titan = of(tmp_path, TITAN.format("0.6B"), "a.toml")
    assert (titan.name_of("save_every"), titan.name_of("clip")) == ("[checkpoint] interval", "[training] max_norm")
    axolotl = of(
        tmp_path, "optimizer: adamw_torch\nlearning_rate: 1e-4\nmicro_batch_size: 1\nsave_steps: 5\n", "b.yaml"
    )
    assert (axolotl.name_of("optimizer"), axolotl.name_of("clip")) == ("optimizer", "max_grad_norm")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    both = read_settings([tmp_path / "config.json", tmp_path / "b.yaml"])
    assert (both.name_of("init_std"), both.name_of("clip")) == ("initializer_range", "max_grad_norm")
    assert read_settings("100m").name_of("lr") == "optim.lr"
    # a length in samples is not the steps that the field counts
    samples = of(tmp_path, LINE.replace("--train-iters", "--train-samples") + "--global-batch-size 2", "c.sh")
    assert samples.total_steps == 50 and samples.name_of("total_steps") == "--train-iters"
