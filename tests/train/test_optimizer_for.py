"""What the methods of a model ask of its optimizer is done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from poise.core.errors import Conflict, UserError
from poise.model.build import apply, build
from poise.model.methods import METHODS
from poise.model.spec import Part, Spec
from poise.optim.build import SCALABLE, OptimConfig
from poise.train.optimizer import optimizer_for

SMALL = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24, tied=False)
IDS_BT = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(0))


def step(*words: str, config: OptimConfig | None = None, spec: Spec = SMALL, boost: float = 1.0) -> tuple[Any, Any]:
    model = build(apply(spec, *words), seed=0)
    with torch.no_grad():
        for block in model.trunk.blocks:
            block.attn.qkv.weight.mul_(boost)  # type: ignore[union-attr, operator]
    optimizer = optimizer_for(config or OptimConfig(lr=1e-3), model)
    model(IDS_BT[:, :-1], IDS_BT[:, 1:]).loss.backward()
    optimizer.step()
    return model, optimizer


def test_mup_shares_reach_the_groups_and_decay_keeps_its_product() -> None:
    _, optimizer = step("mup:base_width=4")
    shares = {group["lr_scale"]: group["weight_decay"] for group in optimizer.param_groups}
    assert set(shares) == {0.25, 1.0}
    assert shares[0.25] == pytest.approx(0.4)  # 0.1 / 0.25: rate times decay is what it was
    assert {group["lr_scale"] for group in step()[1].param_groups} == {1.0}


@pytest.mark.parametrize("rule", ["muon", "normuon", "adafactor", "frankenstein"])
def test_others_have_no_use_for_adams_shares(rule: str) -> None:
    with pytest.raises(UserError, match=r"are Adam's; use adamw, .*mup, depth_mup and u_mup") as caught:
        step("mup:base_width=4", config=OptimConfig(name=rule, lr=1e-3))
    assert "\n" not in str(caught.value)
    step(config=OptimConfig(name=rule, lr=1e-3))


@pytest.mark.parametrize("rule", sorted(SCALABLE))
def test_rules_like_adam_take_its_shares(rule: str) -> None:
    _, optimizer = step("mup:base_width=4", config=OptimConfig(name=rule, lr=1e-3))
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.25, 1.0}


def test_ngpt_weights_stay_on_the_sphere() -> None:
    model, _ = step("ngpt")
    roles = model.roles()
    for name, p in model.named_parameters():
        if roles[name] in ("qkv", "mlp_in", "embedding", "head"):
            assert (p.norm(dim=1) - 1).abs().max() < 1e-5, name
        if roles[name] in ("attn_out", "mlp_out"):
            assert (p.norm(dim=0) - 1).abs().max() < 1e-5, name


def test_the_logit_tap_clips_queries_and_keys_after_the_step() -> None:
    def largest(model: Any) -> float:
        with torch.no_grad():
            model.train()(IDS_BT[:, :-1], IDS_BT[:, 1:])
        return max(float(block.attn.qk_tap.largest_H.max()) for block in model.trunk.blocks)

    free, _ = step("logit_tap:threshold=1e9", boost=60.0)
    clipped, optimizer = step("logit_tap:threshold=5.0", boost=60.0)
    assert largest(free) > 40
    assert largest(clipped) < 6  # 5, but for the learning step itself
    # A second step without a new forward pass has no reading and clips nothing.
    before = clipped.trunk.blocks[0].attn.qkv.weight.detach().clone()
    clipped.trunk.blocks[0].attn.qk_tap.fill_buffers()
    optimizer.zero_grad()
    for p in clipped.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.set_lr(0.0)
    optimizer.step()
    assert torch.equal(before, clipped.trunk.blocks[0].attn.qkv.weight)


def test_a_tap_on_a_product_that_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(UserError, match="cannot scale"):
        step("logit_tap", spec=replace(SMALL, n_layers=1, linear=Part("sigma_reparam")))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "logit_tap"])
def test_what_composes_with_the_tap_can_be_clipped(name: str) -> None:
    try:
        spec = apply(SMALL, "logit_tap", name)
    except Conflict:
        return
    optimizer_for(OptimConfig(lr=1e-3), build(spec, seed=0))
