"""Recognising, merging, torchtitan, recipes, models, and files that are none of these."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.model.methods import apply_methods
from poise.model.presets import preset
from poise.preflight.read import read_settings
from poise.preflight.readers.document import Document
from poise.preflight.readers.draft import merge
from poise.preflight.readers.model import read, read_spec
from poise.preflight.readers.plain_yaml import parse_yaml
from poise.preflight.readers.recipe import names
from poise.preflight.settings import Settings

TITAN = """
[job]
description = "mine"
[model]
name = "llama3"
flavor = "8B"
[optimizer]
name = "AdamW"
lr = 3e-4
[lr_scheduler]
warmup_steps = 100
decay_ratio = 0.2
min_lr_factor = 0.1
[training]
local_batch_size = 2
seq_len = 8192
max_norm = 0.5
steps = 1000
[parallelism]
data_parallel_replicate_degree = 2
data_parallel_shard_degree = 8
tensor_parallel_degree = 4
[checkpoint]
enable = true
interval = 250
"""


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_torchtitan(tmp_path: Path) -> None:
    s = read_settings([write(tmp_path, "run.toml", TITAN)])
    assert (s.format, s.n_layers, s.d_model, s.d_ff, s.n_kv_heads, s.vocab_size) == (
        "torchtitan",
        32,
        4096,
        14336,
        8,
        128256,
    )
    assert s.say("d_model") == "d_model = 4096 (torchtitan's llama3 8B)" and s.say("lr") == "[optimizer] lr = 0.0003"
    assert (s.residual_init, s.embed_std, s.qk_norm) == ("depth", 1.0, False)
    assert (s.schedule, s.clip, s.save_every, s.total_steps, s.warmup_steps) == ("wsd", 0.5, 250, 1000, 100)
    assert s.min_lr == pytest.approx(3e-5) and (s.batch_sequences, s.devices) == (32, 64)
    assert (s.beta2, s.said["beta2"]) == (0.95, "default of torchtitan")
    assert s.n_params == pytest.approx(8.03e9, rel=0.01)


def test_torchtitan_without_ranks_and_with_an_unknown_flavor(tmp_path: Path) -> None:
    text = TITAN.replace("data_parallel_shard_degree = 8", "data_parallel_shard_degree = -1").replace('"8B"', '"9B"')
    s = read_settings([write(tmp_path, "run.toml", text.replace("enable = true", "enable = false"))])
    assert s.batch_sequences is None and s.d_model is None and s.save_every == 0
    assert any("llama3 9B is not known" in note for note in s.notes)
    assert any("ranks is not said" in note for note in s.notes)


def test_torchtitan_in_python_is_refused(tmp_path: Path) -> None:
    text = "from torchtitan.trainer import Trainer\n\ndef mine():\n    return Trainer.Config(steps=3)\n"
    with pytest.raises(UserError, match="Python configuration of torchtitan"):
        read_settings([write(tmp_path, "config_registry.py", text)])


def test_recipes_by_name_and_file(tmp_path: Path) -> None:
    s = read_settings([Path("100m")])
    assert (s.format, s.n_layers, s.d_model, s.n_kv_heads, s.d_ff) == ("recipe", 12, 768, 4, 2048)
    assert (s.qk_norm, s.z_loss, s.schedule, s.lr, s.batch_tokens) == (True, 1e-4, "wsd", 1e-3, 256 * 1024)
    assert s.init_std == pytest.approx(math.sqrt(2 / (5 * 768))) and s.residual_init == "scaled"
    assert s.methods == ("qk_norm", "z_loss") and s.skip_steps is True
    text = '[model]\nn_layers = 2\nd_model = 64\nn_heads = 2\nmethods = []\n[train]\nsteps = 50\ndtype = "fp32"\n'
    own = read_settings([write(tmp_path, "mine.toml", text + "[optim.schedule]\nwarmup_steps = 5\n")])
    assert (own.qk_norm, own.z_loss, own.norm, own.warmup_steps, own.dtype) == (False, 0.0, "pre", 5, "fp32")
    assert own.say("warmup_steps") == "optim.schedule.warmup_steps = 5"
    assert own.beta2 == 0.95  # the dataclass's default


def test_recipe_mistakes_are_the_trainers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'optim\.lrr'"):
        read_settings([write(tmp_path, "mine.toml", "[optim]\nlrr = 1\n[train]\nsteps = 3\n")])


def test_names_of_recipes_are_those_that_load() -> None:
    from poise.train.recipe import shipped

    assert names() == sorted(shipped())


def test_spec_slots() -> None:
    plain = preset("nano")
    s = read_spec(plain)
    assert (s.norm, s.qk_norm, s.init_std, s.residual_init, s.attn_soft_cap) == ("pre", False, 0.02, "scaled", 0.0)
    for methods, expected in (
        (["peri_ln"], {"norm": "sandwich", "embed_norm": True}),
        (["olmo2_norm", "qk_norm"], {"norm": "reordered", "qk_norm": True}),
        (["post_ln"], {"norm": "post"}),
        (["soft_cap:cap=20.0"], {"attn_soft_cap": 20.0}),
        (["final_soft_cap", "z_loss:coefficient=1e-5"], {"logit_soft_cap": 30.0, "z_loss": 1e-5}),
        (["layer_norm_scaling"], {"norm": "pre", "residual_init": "none"}),
        (["wesar"], {"init_std": None, "residual_init": None}),
        (["embed_scale"], {"embed_scale": 16.0}),
        (["small_init"], {"init_std": math.sqrt(2 / (5 * 256)), "residual_init": "scaled"}),
    ):
        got = read_spec(apply_methods(plain, methods))
        assert {name: getattr(got, name) for name in expected} == expected, methods
        assert got.methods == tuple(method.partition(":")[0] for method in methods)


def test_models_in_memory() -> None:
    import torch

    from poise.model.build import build

    model = build(preset("nano"), seed=0)
    s = read(model)
    assert (s.d_model, s.params) == (256, float(sum(p.numel() for p in model.parameters())))
    assert s.n_params == s.params
    assert read(torch.nn.Linear(3, 2)).params == 8.0
    with pytest.raises(UserError, match="a str is no model"):
        read("llama")


def test_merge_prefers_what_is_said() -> None:
    one = Settings(source="a", format="hf", clip=1.0, said={"clip": "default of X"}, d_model=8, notes=("n",))
    two = Settings(source="b", format="hf", clip=0.5, said={"clip": "clip: 0.5"}, lr=1.0, notes=("m",))
    for parts in ([one, two], [two, one]):
        both = merge(parts)
        assert (both.clip, both.say("clip"), both.d_model, both.lr) == (0.5, "clip: 0.5", 8, 1.0)
        assert sorted(both.notes) == ["m", "n"]
    with pytest.raises(UserError, match="'a' and 'b' disagree about d_model: d_model = 8 and d_model = 9"):
        merge([one, Settings(source="b", format="hf", d_model=9)])


def test_nothing_recognised_says_what_was_looked_for(tmp_path: Path) -> None:
    for name, text in (
        ("notes.txt", "dear diary, --lr is a flag\n"),
        ("x.json", '{"a": 1}'),
        ("x.toml", "a = 1\n"),
        ("x.yaml", "a: 1\n"),
        ("loss.csv", "step,loss\n1,2.0\n2,1.9\n"),
    ):
        with pytest.raises(UserError) as error:
            read_settings([write(tmp_path, name, text)])
        for word in (name, "config.json", "torchtitan", "recipe", "Megatron-LM"):
            assert word in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'small'"):
        read_settings([Path("smal")])
    with pytest.raises(UserError, match=r"has none of config\.json"):
        read_settings([tmp_path])
    with pytest.raises(UserError, match="no configuration is named"):
        read_settings([])
    (tmp_path / "weights").write_bytes(b"ab\x00cd")
    with pytest.raises(UserError, match="binary file"):
        read_settings([tmp_path / "weights"])


def test_files_are_read_without_torch(tmp_path: Path) -> None:
    write(tmp_path, "run.toml", TITAN)
    write(tmp_path, "run.sh", "x --num-layers 2 --hidden-size 64 --num-attention-heads 4 --lr 1e-3")
    write(tmp_path, "config.json", '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}')
    code = (
        "import sys\nfrom pathlib import Path\nfrom poise.preflight.read import read_settings\n"
        "for name in ('run.toml', 'run.sh', 'config.json'):\n    read_settings([Path(sys.argv[1]) / name])\n"
        "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: 1\nb: 1e-5\nc: 'x: y'\nd: true\n", {"a": 1, "b": 1e-5, "c": "x: y", "d": True}),
        ("a:\nb: ~\n", {"a": None, "b": None}),
        ("a:\n  b:\n    c: 1\n  d: 2\ne: 3\n", {"a": {"b": {"c": 1}, "d": 2}, "e": 3}),
        ("a:\n- 1\n- x\nb: [1, 'y']\n", {"a": [1, "x"], "b": [1, "y"]}),
        ("# c\na: x#y # z\nurl: http://h/p\n", {"a": "x#y", "url": "http://h/p"}),
        ('"a": 1\r\nb: "#"\r\n', {"a": 1, "b": "#"}),
    ],
)  # fmt: skip
def test_yaml(text: str, data: dict[str, object]) -> None:
    assert parse_yaml(text, "x.yaml") == (data, ())


def test_yaml_beyond_what_is_read_is_named() -> None:
    text = "a: 1\nb: |\n  lots: of\n  text\nc: &x 3\nd:\n  - k: 1\n    l: 2\n  - k: 3\ne: {x: 1}\nf: 2\n"
    assert parse_yaml(text, "x.yaml") == ({"a": 1, "c": 3, "d": None, "f": 2}, ("b", "d", "e"))
    with pytest.raises(UserError, match="line 2 begins with a tab"):
        parse_yaml("a:\n\tb: 1\n", "x.yaml")


DUMPED = (("lr", 1), ("hidden_size", 8), ("clip_grad", 1), ("num_layers", 2), ("train_iters", 9))
SEEDS = (
    ("run.toml", TITAN),
    ("a.sh", 'A=1\nB=(--lr "$A" --num-layers $((A*2)))\nif [ $A = 1 ]; then x "${B[@]}" --hidden-size 64 --bf16; fi\n'),
    ("a.yaml", "learning_rate: 1e-4\nbf16: true\nlist:\n  - 1\nmax_steps: 10\nwarmup_ratio: 0.1\nsub:\n  k: [1, 2]\n"),
    ("config.json", '{"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 10, "x": null}'),
    ("a.log", "\n".join(f"  {k} {'.' * (48 - len(k))} {v}" for k, v in DUMPED)),
)  # fmt: skip
BITS = (
    "$",
    "${",
    "$((",
    '"',
    "'",
    "`",
    "\\",
    "\n",
    "#",
    "(",
    ")",
    "nan",
    "-1",
    "1e999",
    "[",
    "{",
    ": ",
    "\t",
    "é",
    "\x00",
)


@given(st.integers(0, 2**32), st.sampled_from(SEEDS))
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_one_line(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sample: tuple[str, str]
) -> None:
    rng = random.Random(seed)
    name, text = sample
    for _ in range(rng.choice((1, 3, 10))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(BITS) + text[at + rng.randrange(4) :]
    path = tmp_path_factory.getbasetemp() / name
    path.write_text(text, encoding="utf-8")
    try:
        found = read_settings([path])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(getattr(found, field) is not None for field in found.said)


def test_document_is_what_readers_get(tmp_path: Path) -> None:
    document = Document(tmp_path / "x.sh", "text", "text")
    assert document.data == {} and document.name.endswith("x.sh")
