"""Schedules, parameter groups, and building an optimizer from settings."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.core import config as configs
from poise.core.errors import UserError
from poise.optim.build import OptimConfig, build
from poise.optim.groups import groups, infer_roles
from poise.optim.schedules import ScheduleConfig, lr_at

KINDS = ["cosine", "wsd", "linear", "constant"]


@pytest.mark.parametrize("kind", KINDS)
@given(total=st.integers(2, 400), warmup_share=st.floats(0, 0.75), final=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_schedule_shape(kind: str, total: int, warmup_share: float, final: float) -> None:
    """Up along a line to exactly 1, never up again, within bounds, and at the promised value at the end."""
    warmup = int(warmup_share * total)
    config = ScheduleConfig(kind, warmup, 0.2, final)  # type: ignore[arg-type]
    values = [lr_at(step, total, config) for step in range(1, total + 1)]
    for step in range(1, warmup + 1):
        assert values[step - 1] == step / warmup
    tail = values[max(warmup - 1, 0) :]
    assert all(a >= b for a, b in pairwise(tail))
    assert all(min(final, 1 / max(warmup, 1)) - 1e-12 <= value <= 1 for value in values)
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else final)
    assert lr_at(total + 7, total, config) == values[-1]


def test_schedule_values() -> None:
    cosine = ScheduleConfig("cosine", warmup_steps=10, final_fraction=0.1)
    assert lr_at(60, 110, cosine) == pytest.approx(0.55)
    wsd = ScheduleConfig("wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0)
    assert [lr_at(step, 100, wsd) for step in (10, 80, 90, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig("cosin"), "kind is 'cosin'"),  # type: ignore[arg-type]
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: ScheduleConfig(decay_fraction=0.0), "decay_fraction"),
        (lambda: ScheduleConfig(final_fraction=1.5), "final_fraction"),
        (lambda: lr_at(1, 100, ScheduleConfig(warmup_steps=100)), "warmup_steps is 100.*100 steps"),
        (lambda: lr_at(1, 100, ScheduleConfig("wsd", 90)), "do not fit"),
        (lambda: lr_at(1, 0, ScheduleConfig()), "at least one step"),
    ],
)
def test_bad_schedules(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


class Tiny(nn.Module):
    """A foreign model: embedding, a norm with an unknown name, linear layers, a gain and a tied head."""

    class RootMeanSquareNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False)
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.other_norm = self.RootMeanSquareNorm()
        self.mix = nn.Linear(4, 4)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.head.weight = self.embed.weight


def test_infer_roles() -> None:
    roles = infer_roles(Tiny())
    assert roles == {
        "temperature": "gain",
        "head.weight": "embedding",
        "embed.weight": "embedding",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "other_norm.scale": "norm",
        "mix.weight": "linear",
        "mix.bias": "bias",
    }
    assert infer_roles(Tiny(tied=False))["head.weight"] == "linear"


def names(group: dict[str, object]) -> list[str]:
    return [name for name, _ in group["params"]]  # type: ignore[attr-defined]


def test_groups_by_role() -> None:
    net = Tiny(tied=False)
    decayed, rest = groups(net.named_parameters(), infer_roles(net), 0.1)
    assert names(decayed) == ["head.weight", "mix.weight"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(names(rest)) + 2 == len(list(net.parameters()))


def test_groups_of_tied_and_frozen_parameters() -> None:
    net = Tiny()
    net.mix.weight.requires_grad_(False)
    both = list(net.named_parameters(remove_duplicate=False))
    for roles in (infer_roles(net), {**infer_roles(net), "head.weight": "head"}):
        (rest,) = groups(both, roles, 0.1)
        assert rest["weight_decay"] == 0.0
        assert names(rest).count("head.weight") == 1
        assert "embed.weight" not in names(rest) and "mix.weight" not in names(rest)


def test_groups_without_roles_go_by_dimensions() -> None:
    decayed, rest = groups(Tiny().named_parameters(), None, 0.1)
    assert names(decayed) == ["head.weight", "mix.weight"]
    assert "norm.weight" in names(rest)


def test_groups_refuse() -> None:
    net = Tiny()
    with pytest.raises(UserError, match=r"'mix\.bias' has no role"):
        groups(net.named_parameters(), {k: v for k, v in infer_roles(net).items() if k != "mix.bias"}, 0.1)
    with pytest.raises(UserError, match="weight_decay is nan"):
        groups(net.named_parameters(), None, math.nan)
    with pytest.raises(UserError, match="frozen"):
        groups([], None, 0.1)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"lr": -1e-3},
        {"lr": math.nan},
        {"lr": math.inf},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": -1.0},
        {"weight_decay": math.inf},
        {"clip_norm": -1.0},
        {"clip_norm": math.nan},
        {"name": "adam"},
    ],
)
def test_bad_settings_name_the_field(values: dict[str, float]) -> None:
    (field,) = values
    with pytest.raises(UserError, match=rf"optim\.{field} is"):
        OptimConfig(**values)  # type: ignore[arg-type]


def test_config_comes_from_a_file() -> None:
    config = configs.build(OptimConfig, {"lr": 1e-3, "schedule": {"kind": "wsd", "warmup_steps": 5}})
    assert config == OptimConfig(lr=1e-3, schedule=ScheduleConfig("wsd", 5))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_build_trains_and_decays_only_matrices(clip_norm: float) -> None:
    net = Tiny()
    config = OptimConfig(lr=0.1, weight_decay=0.5, clip_norm=clip_norm)
    optimizer = build(config, net.named_parameters(), infer_roles(net))
    assert [link.name for link in optimizer.links] == ["clip_global_norm"] * bool(clip_norm) + ["adamw"]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # with a zero gradient only decay moves anything
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"mix.weight"}
    assert torch.allclose(net.mix.weight, before["mix.weight"] * (1 - 0.1 * 0.5))
