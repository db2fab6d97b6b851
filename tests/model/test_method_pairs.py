"""Any two methods go together with finite gradients, or are refused with both names."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from poise.core.errors import Conflict
from poise.model.build import build
from poise.model.init import RESIDUAL_ROLES
from poise.model.methods import METHODS, apply_methods
from poise.model.methods_page import excluded
from poise.model.spec import Spec

SMALL = Spec(vocab_size=13, seq_len=5, n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, d_ff=8, tied=False)

WORDS = {"mup": "mup:base_width=4", "depth_mup": "depth_mup:base_depth=1"}
"""Settings with which a method acts on so small a model; its name alone elsewhere."""


def gradients_are_finite(spec: Spec) -> bool:
    model = build(spec, seed=0)
    ids_BT = torch.arange(10).view(2, 5) % 13
    model(ids_BT, (ids_BT * 7 + 1) % 13).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > len(model.trunk.blocks)
    return bool(torch.stack([g.isfinite().all() for g in grads]).all())


@pytest.mark.parametrize("first", METHODS)
def test_every_pair_composes_or_conflicts_by_name(first: str) -> None:
    names = list(METHODS)
    for second in names[names.index(first) + 1 :]:
        words = [WORDS.get(name, name) for name in (first, second)]
        outcomes = []
        for order in (words, words[::-1]):
            try:
                outcomes.append(apply_methods(SMALL, order))
            except Conflict as error:
                assert f"'{first}'" in str(error) and f"'{second}'" in str(error) and "\n" not in str(error)
                outcomes.append(None)
        one, other = outcomes
        assert (one is None) == (other is None), f"{first} and {second}: whether they conflict depends on the order"
        if one is not None:
            assert gradients_are_finite(one), f"{first} and {second}"
            assert other is not None
            assert replace(one, methods=(), claims=()) == replace(
                other, methods=(), claims=(), loss_terms=one.loss_terms, lr_scales=one.lr_scales
            ), f"{first} and {second} make another model in the other order"


def test_some_pairs_compose_and_some_conflict() -> None:
    composed = 0
    for pair in combinations(METHODS, 2):
        try:
            apply_methods(SMALL, [WORDS.get(name, name) for name in pair])
            composed += 1
        except Conflict:
            pass
    assert 400 < composed < len(METHODS) * (len(METHODS) - 1) // 2 - 100


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("zero_init", "rezero", "stays dead"),
        ("zero_init", "skip_init", "stays dead"),
        ("ngpt", "dyt", "no norms"),
        ("ngpt", "embed_scale", "its size has no effect"),
        ("ngpt", "embed_std", "its size has no effect"),
        ("ngpt", "scaled_init", "size at the start has no effect"),
        ("layer_norm_scaling", "qk_fc_norm", "divide the factor out"),
        ("layer_norm_scaling", "sub_ln", "divides out the factor"),
        ("layer_norm_scaling", "wesar", "plain starting values"),
        ("layer_norm_scaling", "depth_mup", "plain starting values"),
        ("layer_norm_scaling", "zero_init", "plain starting values"),
        ("wesar", "embed_std", "computes its gates for that"),
        ("mup", "embed_scale", "grows with the width"),
        ("u_mup", "embed_scale", "unit variance already"),
        ("embed_std", "embed_scale", "alternatives"),
        ("logit_tap", "sigma_reparam", "one spectral norm"),
        ("logit_tap", "wesar", "one deviation"),
        ("logit_tap", "mlra", "two factors"),
    ],
)
def test_pairs_that_cancel_or_stand_still_are_refused_with_the_reason(one: str, other: str, says: str) -> None:
    for order in ((one, other), (other, one)):
        with pytest.raises(Conflict, match=f"exclude each other: .*{says}"):
            apply_methods(SMALL, order)
    assert says in excluded(one)[other] and excluded(one)[other] == excluded(other)[one]


@pytest.mark.parametrize("first", [name for name, topic in METHODS.items() if topic == "residual"])
def test_no_pair_leaves_a_block_dead(first: str) -> None:
    ids_BT = torch.arange(10).view(2, 5) % 13
    tried = 0
    for second in METHODS:
        try:
            spec = apply_methods(SMALL, [first, WORDS.get(second, second)])
        except Conflict:
            continue
        model = build(spec, seed=0)
        roles = model.roles()
        matrices = {name: p for name, p in model.named_parameters() if roles[name] in RESIDUAL_ROLES}
        before = {name: p.detach().clone() for name, p in matrices.items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids_BT, (ids_BT * 7 + 1) % 13).loss.backward()
            optimizer.step()
        still = [name for name, p in matrices.items() if torch.equal(p, before[name])]
        assert len(matrices) == 2 * SMALL.n_layers and not still, f"{first} and {second}: {still} never moved"
        tried += 1
    assert tried > 10


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stands_gelu_or_says_why_not(name: str) -> None:
    from poise.core.errors import UserError

    try:
        spec = apply_methods(replace(SMALL, mlp="gelu", norm=SMALL.norm), [WORDS.get(name, name)])
    except UserError as error:
        assert "gelu" in str(error)
        return
    assert gradients_are_finite(spec)
