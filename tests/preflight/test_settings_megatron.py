"""Megatron-LM's arguments in scripts, YAML and logs; samples are written here in each form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from poise.core.errors import UserError
from poise.preflight.read import from_mapping, read_settings
from poise.preflight.readers.megatron_steps import steps_for
from poise.preflight.readers.shell import command_lines
from poise.preflight.settings import Settings

SCRIPT = """#!/bin/bash
# a run
WIDTH=1024
NODES=${SLURM_NNODES:-"4"}
LAYERS=24   # blocks
FFN=$(($WIDTH * 4))
OUT=$1
if [ $LAYERS = 24 ]; then STD=0.01; else STD=0.5; fi
MODEL=(
    --num-layers $LAYERS
    --hidden-size ${WIDTH} # --hidden-size 99
    --ffn-hidden-size $FFN
    --num-attention-heads 16
    --init-method-std $STD
    --seq-length 2048
    --max-position-embeddings 2048
)
OPTS=" --lr 3e-4 --min-lr 3e-5 \\
    --lr-decay-style cosine \\
    --adam-beta2 0.95 --fp16 "
torchrun --nproc_per_node 8 --nnodes $NODES pretrain_gpt.py \\
    ${MODEL[@]} $OPTS \\
    --global-batch-size 256 --rampup-batch-size 32 32 7_000 \\
    --train-samples 1_000_000 --lr-warmup-samples 7000 \\
    --save $OUT --save-interval $EVERY
"""


def read(folder: Path, text: str, name: str = "run.sh") -> Settings:
    (folder / name).write_text(text)
    return read_settings([folder / name])


def test_script_with_variables_arrays_and_conditions(tmp_path: Path) -> None:
    s = read(tmp_path, SCRIPT)
    assert (s.format, s.n_layers, s.d_model, s.d_ff, s.n_heads, s.init_std) == ("megatron", 24, 1024, 4096, 16, 0.01)
    assert s.say("init_std") == "--init-method-std 0.01"
    assert (s.lr, s.min_lr, s.schedule, s.beta2, s.dtype, s.loss_scale) == (
        3e-4,
        3e-5,
        "cosine",
        0.95,
        "fp16",
        "dynamic",
    )
    assert s.devices == 32
    assert any("--save-interval is $EVERY" in note for note in s.notes)
    assert s.save_every is None


def test_samples_become_steps_under_the_ramp(tmp_path: Path) -> None:
    s = read(tmp_path, SCRIPT)
    assert s.ramp_from == 32
    # seven stages of 1000 samples each, of 32, 64, ..., 224 sequences a step
    done = stages = 0
    for stage in range(1, 8):
        steps = math.ceil((stage * 1000 - done) / (32 * stage))
        done, stages = done + steps * 32 * stage, stages + steps
    assert s.warmup_steps == stages
    assert s.total_steps == stages + math.ceil((1_000_000 - done) / 256)
    assert steps_for(1_000_000, 256) == 3907


def test_defaults_are_megatrons_and_say_so(tmp_path: Path) -> None:
    s = read(tmp_path, "pretrain --num-layers 2 --hidden-size 768 --num-attention-heads 12 --lr 1e-4 --swiglu")
    assert (s.init_std, s.beta1, s.beta2, s.eps, s.clip, s.weight_decay) == (0.02, 0.9, 0.999, 1e-8, 1.0, 0.01)
    assert (s.residual_init, s.qk_norm, s.norm_kind, s.tied, s.positions) == (
        "scaled",
        False,
        "layernorm",
        True,
        "learned",
    )
    assert s.d_ff == 2048  # 8/3 x 768
    for name in ("init_std", "beta2", "eps", "clip", "weight_decay", "residual_init", "d_ff"):
        assert s.said[name].startswith("default of Megatron-LM"), name


def test_a_model_fragment_says_nothing_of_training(tmp_path: Path) -> None:
    s = read(tmp_path, "MODEL_ARGS=( --num-layers 2 --hidden-size 64 --num-attention-heads 4 --disable-bias-linear )\n")
    assert s.d_model == 64 and s.biases is False
    assert (s.lr, s.beta2, s.clip, s.save_every) == (None, None, None, None)


def test_two_fragments_are_one_run(tmp_path: Path) -> None:
    (tmp_path / "model.sh").write_text("A=(--num-layers 2 --hidden-size 64 --num-attention-heads 4 --bf16)")
    (tmp_path / "train.sh").write_text("B=(--lr 1e-3 --train-iters 500 --lr-warmup-fraction .1 --global-batch-size 8)")
    s = read_settings([tmp_path / "model.sh", tmp_path / "train.sh"])
    assert (s.d_model, s.lr, s.warmup_steps, s.total_steps, s.dtype) == (64, 1e-3, 50, 500, "bf16")
    assert s.source.count("sh") == 2


def dump(**arguments: object) -> str:
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in sorted(arguments.items())]
    return "\n".join(["using world size: 64", "------ arguments ------", *lines, "------ end ------"])


ARGUMENTS: dict[str, object] = {
    "num_layers": 40,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "ffn_hidden_size": 20480,
    "group_query_attention": True,
    "num_query_groups": 8,
    "padded_vocab_size": 50304,
    "vocab_size": 50257,
    "seq_length": 2048,
    "lr": 6e-05,
    "lr_warmup_fraction": None,
    "lr_warmup_iters": 300,
    "train_iters": 1000,
    "global_batch_size": 2048,
    "world_size": 64,
    "rampup_batch_size": ["16", "16", "5_000_000"],
    "fp16": True,
    "bf16": False,
    "loss_scale": None,
    "attention_softmax_in_fp32": False,
    "masked_softmax_fusion": False,
    "apply_query_key_layer_scaling": False,
    "untie_embeddings_and_output_weights": True,
    "check_for_nan_in_loss_and_grad": True,
    "embed_layernorm": True,
    "position_embedding_type": "PositionEmbeddingType.alibi",
    "qk_layernorm": False,
}


def check_dump(s: Settings) -> None:
    assert (s.n_layers, s.d_model, s.n_kv_heads, s.vocab_size, s.tokenizer_vocab) == (40, 5120, 8, 50304, 50257)
    assert (s.lr, s.warmup_steps, s.batch_sequences, s.devices, s.ramp_from) == (6e-5, 300, 2048, 64, 16)
    assert (s.dtype, s.loss_scale, s.softmax_fp32, s.tied, s.nan_check) == ("fp16", "dynamic", False, False, True)
    assert (s.embed_norm, s.positions, s.qk_norm) == (True, "alibi", False)
    assert s.say("lr") == "lr = 6e-05"


def test_argument_dump_in_a_log(tmp_path: Path) -> None:
    log = dump(**ARGUMENTS) + "\n iteration 1/ 1000 | lm loss: 1.1E+01 | grad norm: 3.0 |\n" * 3
    check_dump(read(tmp_path, log, "train.log"))
    ranks = "\n".join(f"[default0]:{line}" for line in log.splitlines())
    check_dump(read(tmp_path, ranks, "ranks.out"))


def test_settings_of_a_log() -> None:
    s = from_mapping({name: str(value) for name, value in ARGUMENTS.items()}, "train.log")
    assert s is not None
    check_dump(s)
    assert from_mapping({"global_batch_size": "64"}, "train.log") is None
    assert from_mapping({}, "train.log") is None


def test_fused_softmax_is_not_judged(tmp_path: Path) -> None:
    s = read(tmp_path, dump(**{**ARGUMENTS, "masked_softmax_fusion": True}), "a.log")
    assert s.softmax_fp32 is None
    s = read(tmp_path, dump(**{**ARGUMENTS, "apply_query_key_layer_scaling": True}), "b.log")
    assert s.softmax_fp32 is True


def test_yaml_flat_and_in_sections(tmp_path: Path) -> None:
    flat = "num_layers: 12\nhidden_size: 768\nnum_attention_heads: 12\nlr: 1e-4\nqk_layernorm: true\nfp8: hybrid\n"
    s = read(tmp_path, flat, "flat.yaml")
    assert (s.format, s.n_layers, s.lr, s.qk_norm, s.dtype) == ("megatron", 12, 1e-4, True, "fp8")
    nested = (
        "model:\n  num_layers: 12\n  hidden_size: 768\noptimizer:\n  lr: 1e-4\n  clip_grad: 0.5\ntrain:\n"
        "  train_iters: 10\n  moe_z_loss_coeff: 1e-3\n  num_moe_experts: 8\n"
    )
    s = read(tmp_path, nested, "nested.yaml")
    assert (s.n_layers, s.lr, s.clip, s.total_steps, s.n_experts, s.router_z_loss) == (12, 1e-4, 0.5, 10, 8, 1e-3)


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--hidden-size -5", ("hidden_size", "'-5'", "at least 1")),
        ("--hidden-size 7.5", ("hidden_size", "'7.5'", "whole number")),
        ("--hidden-size 64 --lr abc", ("lr", "'abc'", "finite number")),
        ("--hidden-size 64 --lr nan", ("lr", "'nan'", "finite number")),
        ("--hidden-size 64 --adam-beta2 1.5", ("adam_beta2", "'1.5'", "from 0 to 1")),
        ("--hidden-size 64 --rampup-batch-size 1 2", ("rampup_batch_size", "three whole numbers")),
    ],
)
def test_bad_values_are_one_line(tmp_path: Path, flag: str, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, f"x --num-layers 2 --num-attention-heads 4 {flag}")
    text = str(error.value)
    assert "run.sh" in text and "\n" not in text and all(name in text for name in names), text


def test_deepspeed_scales_the_loss_by_itself(tmp_path: Path) -> None:
    line = "x --num-layers 2 --hidden-size 64 --num-attention-heads 4 --lr 1e-3 --fp16 --loss-scale 12"
    assert read(tmp_path, line).loss_scale == "12"
    s = read(tmp_path, line + " --deepspeed --deepspeed_config ds.json")
    assert s.loss_scale is None and any("DeepSpeed" in note for note in s.notes)


def test_xavier_start_is_not_judged(tmp_path: Path) -> None:
    s = read(tmp_path, "x --num-layers 2 --hidden-size 64 --num-attention-heads 4 --init-method-xavier-uniform")
    assert s.init_std is None and s.residual_init is None


def best(text: str) -> list[str]:
    return max(command_lines(text), key=lambda words: sum(word.startswith("--") for word in words), default=[])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("x --a 1 \\\n  --b 2\ny --c", ["x", "--a", "1", "--b", "2"]),
        ("A='--a $B'\nx $A --b", ["x", "--a", "$B", "--b"]),  # single quotes keep the dollar
        ('B=7; A="--a $B --c"; x "$A" --b', ["x", "--a", "7", "--c", "--b"]),
        ("A=(--a 1)\nA+=(--b 2)\nx ${A[@]}", ["x", "--a", "1", "--b", "2"]),
        ("x --a ${Q:-5} --b ${R-6} --c $S", ["x", "--a", "5", "--b", "6", "--c", "$S"]),
        ("x --a $((2 * (3 + 4) / 7)) --b $((1/0))", ["x", "--a", "2", "--b", "$((1/0))"]),
        ("if [ 1 -gt 2 ]; then A=1; elif [ a = a ]; then A=2; else A=3; fi\nx --a $A", ["x", "--a", "2"]),
        ("if [ a = a ]; then A=1; elif [ b = b ]; then A=2; fi\nx --a $A", ["x", "--a", "1"]),
        ("if [ $1 = a ]; then A=1; else A=2; fi\nx --a $A", ["x", "--a", "$A"]),  # nobody knows
        ("if [ $1 = a ]; then A=1; fi\nx --a $A", ["x", "--a", "1"]),
        ("case $1 in a) A=1;; b) A=2;; esac\nx --a $A", ["x", "--a", "$A"]),
        ("# x --a 1 --b 2\nx --a 3", ["x", "--a", "3"]),
        ('CMD="x --a 1 --b 2"\nsrun bash -c "$CMD"', ["srun", "bash", "-c", "x", "--a", "1", "--b", "2"]),
        ('x --name "two words" --b', ["x", "--name", "two words", "--b"]),
    ],
)
def test_shell(script: str, words: list[str]) -> None:
    assert best(script) == words


def test_a_variable_that_doubles_itself_stays_small() -> None:
    lines = command_lines("A=xxxxxxxxxx\n" + "A=$A$A\n" * 60 + "x --a $A")
    assert sum(len(word) for words in lines for word in words) < 1_000_000
