"""``check_model``: a module in memory before its first step, its own findings and those of the rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.model.build import build
from poise.model.presets import PRESETS
from poise.model.spec import Spec
from poise.preflight import Report, check_model
from poise.preflight.measure_findings import MEASURED
from poise.preflight.own_model import weights

WIDTH, LAYERS = 64, 4


class Block(nn.Module):
    """Attention-shaped and MLP-shaped matrices; nobody runs it."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        for name, matrix in self.named_parameters():
            share = 1 / math.sqrt(2 * LAYERS) if "proj" in name else 1.0
            nn.init.normal_(matrix, 0.0, std * share)


class Net(nn.Module):
    """A language model in somebody's own words."""

    def __init__(self, std: float = 0.05, embed: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(512, WIDTH)
        self.layers = nn.ModuleList(Block(std) for _ in range(LAYERS))
        self.lm_head = nn.Linear(WIDTH, 512, bias=False)
        nn.init.normal_(self.wte.weight, 0.0, embed)
        nn.init.normal_(self.lm_head.weight, 0.0, std)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Config:
    """What a Hugging Face configuration has to have."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 4 * WIDTH,
            "vocab_size": 512,
            "initializer_range": 0.02,
        }


def own(report: Report) -> set[str]:
    return {one.rule for one in report.findings if one.rule in MEASURED}


def test_a_sound_model_has_no_findings_of_its_own() -> None:
    report = check_model(Net())
    assert own(report) == set()
    assert "init-std-width" in report.passed
    assert report.format == "model"


def test_the_start_is_read_from_the_weights_and_judged_by_the_rules() -> None:
    report = check_model(Net(std=1.0))
    found = {one.rule: one for one in report.findings}
    assert "init-std-width" in found
    assert "measured: matrices start with a deviation of 1" in found["init-std-width"].what
    assert "embedding of width 64" in found["init-std-width"].what


def test_kinds_of_matrices() -> None:
    kinds = {w.name: w.kind for w in weights(Net())}
    assert kinds["wte.weight"] == "embedding" and kinds["lm_head.weight"] == "head"
    assert kinds["layers.2.o_proj.weight"] == kinds["layers.2.down_proj.weight"] == "residual"
    assert kinds["layers.2.qkv.weight"] == "matrix"
    places = {w.place for w in weights(Net()) if w.layer == 3}
    assert "layers.*.qkv.weight" in places


@pytest.mark.parametrize(
    ("harm", "rule", "severity"),
    [
        (lambda w: w.fill_(math.nan), "measured-init-nonfinite", "critical"),
        (lambda w: w.fill_(0.02), "measured-init-dead", "warning"),
        (lambda w: w.zero_(), "measured-init-dead", "warning"),
        (lambda w: w.mul_(4.0), "measured-init-uneven", "warning"),
    ],
)
def test_one_harmed_matrix_is_found_and_named(harm: Any, rule: str, severity: str) -> None:
    net = Net()
    with torch.no_grad():
        harm(net.layers[2].qkv.weight)  # type: ignore[union-attr]
    found = [one for one in check_model(net).findings if one.rule in MEASURED]
    assert [(one.rule, one.severity) for one in found] == [(rule, severity)]
    assert "layers.2.qkv.weight" in found[0].what


def test_matrices_that_write_into_the_stream_may_start_at_zero() -> None:
    net = Net()
    with torch.no_grad():
        for block in net.layers:
            block.o_proj.weight.zero_()  # type: ignore[union-attr]
        net.lm_head.weight.zero_()
    assert own(check_model(net)) == set()


def test_a_start_that_goes_by_depth_is_not_uneven() -> None:
    net = Net()
    with torch.no_grad():
        for n, block in enumerate(net.layers, 1):
            block.up.weight.div_(n)  # type: ignore[union-attr]
    assert "measured-init-uneven" not in own(check_model(net))


def test_weights_are_compared_with_what_the_configuration_says() -> None:
    net = Net(std=0.02)
    net.config = Config()  # type: ignore[assignment]
    assert own(check_model(net)) == set()
    for block in net.layers:
        block.up.reset_parameters()  # type: ignore[union-attr]
    found = [one for one in check_model(net).findings if one.rule == "measured-init-std"]
    assert len(found) == 1
    assert "torch's default" in found[0].what and "3 more like it" in found[0].what


def test_the_optimizer_is_read() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.999), weight_decay=0.1)
    told = check_model(net, optimizer=optimizer, warmup_steps=5000, total_steps=1000)
    found = {one.rule: one for one in told.findings}
    assert "warmup-total" in found
    assert "embed-decay" in found and "embed-decay" not in {one.rule for one in check_model(net).findings}
    apart = torch.optim.AdamW(
        [{"params": [net.wte.weight], "weight_decay": 0.0}, {"params": list(net.layers.parameters())}],
        lr=3e-4,
        weight_decay=0.1,
    )
    assert "embed-decay" not in {one.rule for one in check_model(net, optimizer=apart).findings}
    assert "lr = 0.5" in " ".join(one.what for one in check_model(net, lr=0.5, optimizer=optimizer).findings)


def test_our_own_decoder_and_one_without_values() -> None:
    spec = Spec(vocab_size=256, seq_len=32, n_layers=3, d_model=64, n_heads=2, n_kv_heads=2, d_ff=128)
    assert own(check_model(build(spec, seed=0))) == set()
    report = check_model(build(PRESETS["1b"], seed=0, device="meta"))
    assert own(report) == set() and any("meta device" in note for note in report.notes)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"lr": math.nan}, "lr is nan"), ({"seq_len": 0}, "seq_len is 0"), ({"clip": -1.0}, "clip is -1")],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_model(Net(), **values)


def test_something_else_is_no_model() -> None:
    with pytest.raises(UserError, match=r"a str is no torch\.nn\.Module"):
        check_model("gpt2")  # type: ignore[arg-type]
