"""What the papers say of the placement methods: equalities, invariances, growth with depth, starting values.

Shapes: B batch, T positions, D width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.model.twins import placement
from torch import Tensor

from poise.core.errors import Conflict, UserError
from poise.model.attention import Rope
from poise.model.blocks import Block, Carry
from poise.model.build import build
from poise.model.counts import count
from poise.model.layers import Linear, Same
from poise.model.methods import apply_methods, load
from poise.model.methods.deep_norm import alpha, beta
from poise.model.methods.post_ln import PostNorm
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec
from poise.model.starts import initialise, stds

TINY = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)
DEEP = replace(TINY, vocab_size=64, seq_len=32, n_layers=12, d_model=64, d_ff=128)
LIVELY = Part.of("default", {"std": 0.125, "embedding_std": 1.0, "scale_residual": False})
"""Branches and stream of about size one, so that depth can act."""

METHODS = {
    "pre_ln": "pre_ln",
    "post_ln": "post_ln",
    "peri_ln": "peri_ln",
    "sandwich_ln": "sandwich_ln",
    "olmo2_norm": "olmo2_norm",
    "mix_ln": "mix_ln",
    "hybrid_norm": "hybrid_norm",
    "hybrid_norm*": "hybrid_norm:star=true",
    "deep_norm": "deep_norm",
    "sub_ln": "sub_ln",
    "layer_norm_scaling": "layer_norm_scaling",
    "qkv_norm": "qkv_norm",
    "qk_fc_norm": "qk_fc_norm",
    "qk_norm over width": "qk_norm:over=width",
}


def batch(spec: Spec, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, spec.vocab_size, (rows, spec.seq_len + 1), generator=generator)
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(*batch(model.spec)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def shake(module: Any, size: float = 0.3) -> Any:
    """Move parameters away from their start, where gains are 1 and branches small."""
    with torch.no_grad():
        for seed, param in enumerate(module.parameters()):
            param += size * noise(*param.shape, seed=seed)
    return module


class OneBlock:
    """A block of float64 by itself, with nearly no eps: (B, T, D) -> (B, T, D)."""

    def __init__(self, *wanted: str, changes: dict[str, Any] | None = None) -> None:
        self.spec = replace(apply_methods(replace(TINY, **(changes or {})), wanted), norm_eps=1e-14)
        self.block = Block(Place(self.spec, 2)).double()
        self.rope = Rope(Place(self.spec)).double()
        for module in (self.block, self.rope):
            initialise(module, self.spec, seed=1)
        shake(self.block)
        self.x_BTD = noise(2, TINY.seq_len, TINY.d_model, seed=99)

    def attention(self, x_BTD: Tensor) -> Tensor:
        """What attention adds to the stream."""
        return self.block.attn_branch(self.block.attn(self.block.attn_in(x_BTD), self.rope, Carry())[0])

    def mlp(self, x_BTD: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        return self.block.mlp_branch(self.block.mlp(self.block.mlp_in(x_BTD)))

    def scale(self, weight: Tensor, factor: float, rows: slice = slice(None)) -> None:
        with torch.no_grad():
            weight[rows] *= factor


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


# --- every method, on every kind of model ---


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": False},
        {"mlp": "gelu"},
        {"n_kv_heads": 1, "norm": Part("layernorm")},
        {"n_kv_heads": 4},
    ],
    ids=["untied", "gelu", "one key head, layernorm", "no groups"],
)
@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_gradients_are_finite_and_reach_every_parameter(words, changes):
    spec = apply_methods(replace(TINY, **changes), [words])
    for dtype in (torch.float32, torch.bfloat16):
        model = build(spec, seed=0, compute_dtype=dtype)
        result = outcome(model)
        assert all(value.isfinite().all() for value in result.values())
        assert all(result[name].any() for name, _ in model.named_parameters())


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_bf16_is_near_fp32_and_recomputed_blocks_give_the_same_gradients(words):
    spec = apply_methods(TINY, [words])
    wide, narrow = outcome(build(spec, seed=0)), outcome(build(spec, seed=0, compute_dtype=torch.bfloat16))
    assert narrow["loss"] == pytest.approx(wide["loss"].item(), rel=2e-2)
    model = build(spec, seed=0)
    model.recompute_blocks()
    again = outcome(model)
    assert all(torch.equal(wide[key], again[key]) for key in wide)


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_gains_are_norms_and_matrices_stay_as_many(words):
    spec = apply_methods(TINY, [words])
    roles = build(spec, seed=0, device="meta").roles()
    plain = build(TINY, seed=0, device="meta").roles()
    assert {n: r for n, r in roles.items() if r != "norm"} == {n: r for n, r in plain.items() if r != "norm"}


@pytest.mark.parametrize(
    ("words", "gains_a_block", "outside"),
    [
        ("pre_ln", 2 * 16, 16),
        ("post_ln", 2 * 16, 16),
        ("post_ln:final_norm=false", 2 * 16, 0),
        ("peri_ln", 4 * 16, 32),
        ("peri_ln:embed=false", 4 * 16, 16),
        ("sandwich_ln", 4 * 16, 16),
        ("olmo2_norm", 2 * 16, 16),
        ("mix_ln", 2 * 16, 16),
        ("hybrid_norm", 16 + 3 * 4, 16),
        ("deep_norm", 2 * 16, 16),
        ("deep_norm:final_norm=false", 2 * 16, 0),
        ("sub_ln", 3 * 16 + 24, 16),
        ("layer_norm_scaling", 2 * 16, 16),
        ("qkv_norm", 16 + 3 * 4, 16),
        ("qk_fc_norm", 4 * 16 + 2 * 4, 16),
        ("qk_norm", 2 * 16 + 2 * 4, 16),
        ("qk_norm:over=width", 2 * 16 + 16 + 8, 16),
    ],
)
def test_the_number_of_gains_is_the_one_the_cards_give(words, gains_a_block, outside):
    roles = dict(count(apply_methods(TINY, [words])).by_role)
    assert roles.get("norm", 0) == 2 * gains_a_block + outside


# --- settings that have no twin: parity with their transcription ---


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        ("hybrid_norm:star=true", "HybridNormStar"),
        ("post_ln:final_norm=false", "PostLN"),
        ("deep_norm:final_norm=false", "DeepNorm"),
        ("peri_ln:embed=false", "SandwichLN"),
        ("qk_norm:over=width", "WidthQKNorm"),
    ],
)
def test_settings_equal_their_transcription(words, reference):
    model = shake(build(apply_methods(TINY, [words]), seed=3, compute_dtype=torch.float64))
    inputs_BT, targets_BT = batch(TINY, rows=1)
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    wanted = getattr(placement, reference)(weights, model.spec).loss(inputs_BT[0].numpy(), targets_BT[0].numpy())
    assert model(inputs_BT, targets_BT).loss.item() == pytest.approx(wanted, rel=1e-11)


# --- claims and conflicts ---


@pytest.mark.parametrize("words", ["post_ln", "peri_ln", "olmo2_norm", "mix_ln:a=1", "hybrid_norm", "deep_norm"])
@pytest.mark.parametrize("other", ["pre_ln", "layer_norm_scaling", "qkv_norm", "sandwich_ln"])
def test_two_placements_conflict_by_name(words, other):
    with pytest.raises(Conflict, match=other) as caught:
        apply_methods(TINY, [words, other])
    assert words.partition(":")[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wanted",
    [
        ["olmo2_norm", "qk_norm:over=width", "z_loss"],
        ["qk_norm", "layer_norm_scaling"],
        ["sub_ln", "qkv_norm"],
        ["peri_ln", "qk_norm"],
        ["mix_ln", "qk_fc_norm"],
        ["post_ln", "sub_ln", "embed_scale"],
    ],
    ids=lambda wanted: " + ".join(wanted),
)
def test_what_does_not_collide_composes(wanted):
    result = outcome(build(apply_methods(TINY, wanted), seed=0))
    assert all(value.isfinite().all() for value in result.values())


def test_layer_norm_scaling_names_the_reason_against_scaled_starts():
    every = load("layer_norm_scaling").EXCLUDES
    excludes = {name: every[name] for name in ("scaled_init", "small_init", "wesar")}
    assert all("2502.05795" in reason and "\n" not in reason for reason in excludes.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("mix_ln:a=1.5", "mix_ln a is 1.5; give a share"),
        ("mix_ln:a=-0.1", "mix_ln a is -0.1; give a share"),
        ("qk_norm:over=heads", "over is 'heads', did you mean 'head'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        apply_methods(TINY, [words])
    assert "\n" not in str(caught.value)


# --- Pre-LN, Post-LN, Mix-LN ---


def same_outcome(one: Spec, two: Spec, seed: int = 0) -> bool:
    a, b = outcome(build(one, seed=seed)), outcome(build(two, seed=seed))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_pre_ln_is_the_default():
    assert same_outcome(TINY, apply_methods(TINY, ["pre_ln"]))


def test_mix_ln_is_pre_ln_at_0_and_post_ln_with_a_final_norm_at_1():
    assert same_outcome(apply_methods(TINY, ["mix_ln:a=0"]), apply_methods(TINY, ["pre_ln"]))
    assert same_outcome(apply_methods(TINY, ["mix_ln:a=1"]), apply_methods(TINY, ["post_ln"]))
    assert not same_outcome(apply_methods(TINY, ["mix_ln:a=0.5"]), apply_methods(TINY, ["post_ln"]))
    params = [count(apply_methods(TINY, [words])).params for words in ("mix_ln:a=0", "mix_ln:a=0.5", "mix_ln:a=1")]
    assert params == [count(TINY).params] * 3


@pytest.mark.parametrize(("n_layers", "post"), [(2, 1), (7, 1), (8, 2), (12, 3), (24, 6)])
def test_mix_ln_makes_the_first_quarter_of_the_blocks_post_ln(n_layers, post):
    model = build(apply_methods(replace(TINY, n_layers=n_layers), ["mix_ln"]), seed=0, device="meta")
    kinds = [(isinstance(b.attn_in, Same), isinstance(b.attn_add, PostNorm)) for b in model.trunk.blocks]
    assert kinds == [(True, True)] * post + [(False, False)] * (n_layers - post)
    assert [(isinstance(b.mlp_in, Same), isinstance(b.mlp_add, PostNorm)) for b in model.trunk.blocks] == kinds


def test_a_final_norm_behind_post_ln_changes_gains_only():
    """norm(g u) of a row u that is normalised already: with unit gains the same, but for eps."""
    with_norm, without = (apply_methods(TINY, [f"post_ln:final_norm={on}"]) for on in ("true", "false"))
    losses = [build(s, seed=0, compute_dtype=torch.float64)(*batch(TINY)).loss.item() for s in (with_norm, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != losses[1]


# --- output norms: Peri-LN, Sandwich-LN, OLMo 2, QK-FC-norm ---


OUTPUT_NORMS = ("peri_ln", "sandwich_ln", "olmo2_norm", "qk_fc_norm")


@pytest.mark.parametrize(("words", "same"), [*((words, True) for words in OUTPUT_NORMS), ("pre_ln", False)])
def test_behind_an_output_norm_the_size_of_the_output_matrices_does_not_matter(words, same):
    one = OneBlock(words)
    before = one.block(one.x_BTD, one.rope, Carry())[0].detach()
    one.scale(one.block.attn.out.weight, 7.0)
    one.scale(one.block.mlp.out.weight, 0.1)
    assert close(one.block(one.x_BTD, one.rope, Carry())[0], before) is same


@pytest.mark.parametrize(("words", "growth"), [("peri_ln", 1.0), ("pre_ln", 10.0)])
def test_peri_ln_keeps_large_hidden_activations_out_of_the_gradient(words, growth):
    """The gradient of W_out goes with |h| / |W_out h|: constant in |h|. Pre-LN's goes with |h|."""
    gradients = []
    for factor in (1.0, 10.0):
        one = OneBlock(words)
        one.scale(
            one.block.mlp.inner.weight, factor, slice(TINY.d_ff, None)
        )  # the rows of `up`: hidden is linear in it
        (one.mlp(one.x_BTD) * noise(*one.x_BTD.shape, seed=5)).sum().backward()
        gradients.append(one.block.mlp.out.weight.grad)
    assert close(gradients[1], growth * gradients[0], 1e-8)


def mean_squares(spec: Spec, ending: str) -> list[float]:
    """Mean square of a fresh model's taps whose name has this ending, in order."""
    model, found = build(spec, seed=0), {}
    for name, tap in model.taps().items():
        if name.endswith(ending):
            tap.register_forward_hook(
                lambda module, given, out, name=name: found.__setitem__(name, out.square().mean().item())
            )
    with torch.no_grad():
        model(*batch(spec, rows=4))
    return list(found.values())


def test_peri_ln_adds_one_to_the_variance_with_every_branch():
    spec = apply_methods(replace(DEEP, init=LIVELY), ["peri_ln"])
    assert mean_squares(spec, "embed") == pytest.approx([1], rel=1e-2)
    assert mean_squares(spec, "_out") == pytest.approx([1] * 24, rel=1e-2)
    stream = mean_squares(spec, "residual")
    assert stream == pytest.approx([1 + 2 * layer for layer in range(1, 13)], rel=0.1)


@pytest.mark.parametrize("words", OUTPUT_NORMS)
def test_output_norms_exclude_zero_starts_because_their_gradient_explodes(words):
    assert "1 / sqrt(norm_eps)" in load(words).EXCLUDES["zero_init"]
    spec = replace(apply_methods(TINY, [words]), residual_init=Part("zero"))
    with_norm, without = (outcome(build(s, seed=0)) for s in (spec, replace(spec, branch_out=Part("none"))))
    for name in ("trunk.blocks.0.mlp.out.weight", "trunk.blocks.1.attn.out.weight"):
        assert close(with_norm[name], TINY.norm_eps**-0.5 * without[name], 1e-3)


# --- QKV-norm, QK-norm ---


def test_a_larger_stream_changes_neither_pre_ln_nor_qkv_norm_but_a_block_without_norm():
    for words, same in (("pre_ln", True), ("qkv_norm", True), ("hybrid_norm", True), ("olmo2_norm", False)):
        one = OneBlock(words)
        large, usual = (one.block.attn(one.block.attn_in(f * one.x_BTD), one.rope, Carry())[0] for f in (10, 1))
        assert close(large, usual) is same


def test_qkv_norm_takes_away_the_norm_before_attention_and_keeps_the_mlps():
    one = OneBlock("qkv_norm")
    assert torch.equal(one.block.attn_in(one.x_BTD), one.x_BTD)
    assert close(one.mlp(10 * one.x_BTD), one.mlp(one.x_BTD))


def test_larger_qkv_matrices_change_nothing_with_qkv_norm_values_with_qk_norm_and_all_without():
    outputs = {}
    for words in ("pre_ln", "qk_norm", "qkv_norm", "hybrid_norm"):
        one = OneBlock(words)
        before = one.attention(one.x_BTD).detach()
        one.scale(one.block.attn.qkv.weight, 10.0)
        outputs[words] = (before, one.attention(one.x_BTD).detach())
    assert close(outputs["qkv_norm"][1], outputs["qkv_norm"][0])
    assert close(outputs["hybrid_norm"][1], outputs["hybrid_norm"][0])
    assert close(outputs["qk_norm"][1], 10 * outputs["qk_norm"][0])
    assert not close(outputs["pre_ln"][1], 10 * outputs["pre_ln"][0], 0.1)


@pytest.mark.parametrize("words", ["qk_norm", "qk_norm:over=width", "qkv_norm", "qk_fc_norm"])
def test_a_thousand_times_larger_query_matrix_changes_nothing(words):
    one = OneBlock(words)
    before = one.attention(one.x_BTD).detach()
    one.scale(one.block.attn.qkv.weight, 1e3, slice(0, TINY.d_model))
    assert close(one.attention(one.x_BTD), before)


def test_qk_norm_over_the_width_lets_one_head_grow_and_over_heads_does_not():
    q_BHTK, k_BGTK = noise(2, 4, 5, 4), noise(2, 2, 5, 4, seed=1)
    loud_BHTK = q_BHTK.clone()
    loud_BHTK[:, 0] *= 100
    for words, same in (("qk_norm", True), ("qk_norm:over=width", False)):
        spec = replace(apply_methods(TINY, [words]), norm_eps=1e-14)
        module = make("qk", Place(spec, 1, "attn")).double()
        initialise(module, spec, seed=0)
        assert close(module(loud_BHTK, k_BGTK)[0], module(q_BHTK, k_BGTK)[0]) is same
        total_BT = module(q_BHTK, k_BGTK)[0].square().sum((1, 3))
        torch.testing.assert_close(total_BT, torch.full_like(total_BT, 16.0))  # H K in both: heads alike or shared
    assert module(loud_BHTK, k_BGTK)[0][:, 0].square().sum(-1).max() > 15.9  # nearly all of it in the loud head


def test_the_default_of_qk_norm_is_what_it_was():
    assert apply_methods(TINY, ["qk_norm"]).qk == Part("qk_norm") == apply_methods(TINY, ["qk_norm:over=head"]).qk


# --- HybridNorm ---


def test_hybrid_norm_normalises_the_residual_path_too():
    """z = norm(y) + MLP(norm(y)): the stream after the block does not grow with the stream before it."""
    for words, same in (("hybrid_norm", True), ("qkv_norm", False)):
        one = OneBlock(words)
        with torch.no_grad():
            one.block.attn.out.weight.zero_()  # y = x
        large, usual = (one.block(factor * one.x_BTD, one.rope, Carry())[0] for factor in (1e3, 1.0))
        assert close(large, usual) is same


# --- DeepNorm and sub-LN: starts ---


@pytest.mark.parametrize(
    ("n_layers", "stream", "gain"), [(12, "2.213", "0.319"), (24, "2.632", "0.269"), (32, "2.828", "0.250")]
)
def test_deep_norm_constants(n_layers, stream, gain):
    assert (f"{alpha(n_layers):.3f}", f"{beta(n_layers):.3f}") == (stream, gain)
    spec = apply_methods(replace(TINY, n_layers=n_layers), ["deep_norm"])
    block = build(spec, seed=0, device="meta").trunk.blocks[-1]
    assert f"{block.attn_add.alpha:.3f}" == f"{block.mlp_add.alpha:.3f}" == stream


def xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


@pytest.mark.parametrize("words", ["deep_norm", "sub_ln"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_xavier_gains_are_on_values_outputs_and_mlp(words, mlp):
    N = 12
    gain = {"deep_norm": (8 * N) ** -0.25, "sub_ln": math.sqrt(math.log(2 * N))}[words]
    table = stds(apply_methods(replace(TINY, n_layers=N, mlp=mlp, tied=False), [words]))
    wanted = {
        "embedding": 0.25,
        "head": 0.25,
        "q": xavier(16, 16),
        "k": xavier(16, 8),
        "v": gain * xavier(16, 8),
        "attn_out": gain * xavier(16, 16),
        "mlp_out": gain * xavier(24, 16),
    }
    inner = {"gelu": {"mlp_in": gain}, "swiglu": {"mlp_gate": gain, "mlp_up": 1.0}}[mlp]
    assert table == pytest.approx(wanted | {role: factor * xavier(16, 24) for role, factor in inner.items()})


def test_deep_norm_matrices_have_the_deviation_that_was_asked_for():
    spec = apply_methods(replace(DEEP, d_model=128, d_ff=256), ["deep_norm"])
    attn = build(spec, seed=0).trunk.blocks[3].attn
    q_DD, k_ED, v_ED = attn.qkv.weight.detach().split([128, 64, 64])
    cut = 0.9867  # of a normal cut off at three deviations
    gain = beta(12)
    for weight, std in ((q_DD, 1 / 128**0.5), (k_ED, xavier(128, 64)), (v_ED, gain * xavier(128, 64))):
        assert weight.std().item() == pytest.approx(cut * std, rel=0.03)
    assert attn.out.weight.std().item() == pytest.approx(cut * gain / 128**0.5, rel=0.03)


def test_alpha_is_not_rounded_to_bf16():
    module = PostNorm(Place(TINY), alpha(12))
    module.norm = Same(Place(TINY))
    x_BTD, branch_BTD = (noise(4, 9, 16, seed=seed).bfloat16() for seed in (0, 1))
    wanted = (x_BTD.float() * alpha(12)).bfloat16() + branch_BTD
    assert torch.equal(module(x_BTD, branch_BTD), wanted)
    assert not torch.equal((x_BTD.float() * float(torch.tensor(alpha(12)).bfloat16())).bfloat16() + branch_BTD, wanted)


def test_sub_ln_makes_each_branch_blind_to_the_size_of_values_and_hidden_activations():
    for words, same in (("sub_ln", True), ("pre_ln", False)):
        one = OneBlock(words)
        before = one.attention(one.x_BTD).detach(), one.mlp(one.x_BTD).detach()
        one.scale(one.block.attn.qkv.weight, 10.0, slice(-8, None))
        one.scale(one.block.mlp.inner.weight, 10.0, slice(TINY.d_ff, None))
        assert close(one.attention(one.x_BTD), before[0]) is same
        assert close(one.mlp(one.x_BTD), before[1]) is same


# --- LayerNorm Scaling ---


def test_layer_norm_scaling_is_pre_ln_with_gains_divided_by_the_root_of_the_depth():
    five = replace(TINY, n_layers=5)
    scaled = shake(build(apply_methods(five, ["layer_norm_scaling"]), seed=0, compute_dtype=torch.float64))
    plain = build(replace(five, residual_init=Part("plain")), seed=0, compute_dtype=torch.float64)
    factors = {}
    with torch.no_grad():
        old = {name.replace("_in.norm.", "_in."): value for name, value in scaled.named_parameters()}
        for name, param in plain.named_parameters():
            layer = int(name.split(".")[2]) + 1 if "_in.weight" in name else 1
            factors[name] = layer**-0.5
            param.copy_(old[name] * factors[name])
    one, two = outcome(scaled), outcome(plain)
    assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-12)
    for name, factor in factors.items():  # the gradient of a gain is that of the divided gain, divided
        gradient = one.get(name, one.get(name.replace("_in.", "_in.norm.")))
        assert close(gradient, factor * two[name], 1e-8), name
    assert len(set(factors.values())) == 5


def test_layer_norm_scaling_leaves_the_first_block_and_the_final_norm_alone():
    one = apply_methods(replace(TINY, n_layers=1), ["layer_norm_scaling"])
    a, b = outcome(build(one, seed=0)), outcome(build(replace(TINY, n_layers=1, residual_init=Part("plain")), seed=0))
    assert all(torch.equal(a[key], b[key.replace("_in.norm.", "_in.")]) for key in a)


def test_layer_norm_scaling_rounds_once_in_bf16():
    x_BTD = noise(2, 3, 16).bfloat16()
    spec = apply_methods(TINY, ["layer_norm_scaling"])
    module = make("branch_in", Place(spec, 7, "mlp"))
    initialise(module, spec, seed=0)
    normed_BTD = module.norm(x_BTD)
    assert torch.equal(module(x_BTD), (normed_BTD.float() / math.sqrt(7)).bfloat16())


def test_layer_norm_scaling_starts_residual_outputs_unscaled():
    table = stds(apply_methods(TINY, ["layer_norm_scaling"]))
    assert table["attn_out"] == table["mlp_out"] == table["q"] == 0.02
    assert stds(TINY)["mlp_out"] == 0.01


def test_the_stream_grows_far_less_with_layer_norm_scaling_than_with_pre_ln():
    """On random starts; the paper's first figure is of trained models."""
    grown = {}
    for words in ("pre_ln", "layer_norm_scaling"):
        stream = mean_squares(apply_methods(replace(DEEP, init=LIVELY), [words]), "residual")
        grown[words] = stream[-1] - stream[0]
    assert grown["layer_norm_scaling"] < 0.1 * grown["pre_ln"]


def test_the_stream_of_post_ln_does_not_grow():
    for words in ("post_ln", "deep_norm"):
        stream = mean_squares(apply_methods(replace(DEEP, init=Part("default")), [words]), "residual")
        assert stream == pytest.approx([1] * 12, rel=1e-2)


def test_branches_are_built_of_the_models_norm():
    """A method never chooses the kind of norm: that is a slot of its own."""
    for words in METHODS.values():
        model = build(apply_methods(replace(TINY, norm=Part("layernorm")), [words]), seed=0, device="meta")
        owners = {type(m).__name__ for m in model.modules() if getattr(m, "weight", None) is not None}
        assert owners - {Linear.__name__, "Embedding"} == {"LayerNorm"}
