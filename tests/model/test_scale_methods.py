"""What is special about methods of scale: muP, depth-muP, u-muP, nGPT and dynamic tanh.

Shapes: B batch, T positions, D width, H heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from poise.core.errors import Conflict, UserError
from poise.model.build import apply, build
from poise.model.methods import dyt, ngpt
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec
from poise.model.starts import stds
from poise.optim.groups import groups, mup_multipliers
from poise.optim.weights.unit_rows import UnitRows

TINY = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)


def wide(width: int, **changes: object) -> Spec:
    sizes = {"d_model": width, "n_heads": width // 4, "n_kv_heads": width // 8, "d_ff": 3 * width // 2}
    return replace(TINY, **{**sizes, **changes})


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, TINY.vocab_size, (3, 13), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# -- muP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_mup_rates_are_those_of_the_optimizer_room(tied: bool) -> None:
    """The model's own table and `optim.groups.mup_multipliers` say the same for every role."""
    model = build(apply(wide(32, tied=tied), "mup:base_width=8", "depth_mup:base_depth=1"), seed=0, device="meta")
    rule = mup_multipliers(32, 8, 2, 1, divided_logits=True)
    rule |= dict.fromkeys(set(model.roles().values()) - set(rule), rule["hidden"])
    ours = model.lr_multipliers()
    assert ours == pytest.approx({role: rule[role] for role in ours}, rel=1e-12)
    assert ours["qkv"] == pytest.approx(1 / 4 / math.sqrt(2)) and ours["embedding"] == 1.0
    found = groups(model.named_parameters(), model.roles(), 0.1, multipliers=ours, fixed_decay=True)
    for group in found:
        assert group["lr_scale"] * group["weight_decay"] in (0.0, pytest.approx(0.1))


def test_mup_starts() -> None:
    """Hidden variance falls with the width, embedding and head stay; measured on the matrices themselves."""
    for tied in (True, False):
        narrow, broad = wide(8, tied=tied), apply(wide(128, tied=tied), "mup:base_width=8")
        base, ours = stds(narrow), stds(broad)
        for role in ours:
            assert ours[role] == pytest.approx(base[role] * (1 if role in ("embedding", "head") else 0.25)), role
        weight = build(broad, seed=0).trunk.blocks[0].mlp.inner.weight
        assert weight.std().item() == pytest.approx(0.02 / 4 * 0.987, rel=0.03)  # cut off at three deviations


def test_mup_takes_the_initialisation_that_is_there() -> None:
    """`small` at the base's width, and then by width: sqrt(2 / (5 D)) for hidden matrices."""
    small = replace(wide(32), init=Part("small"))
    ours = stds(apply(small, "mup:base_width=8"))
    assert ours["q"] == pytest.approx(math.sqrt(2 / (5 * 32)))
    assert ours["embedding"] == pytest.approx(math.sqrt(2 / (5 * 8)))
    assert stds(apply(small, "mup:base_width=32")) == stds(small)
    other = replace(wide(32), init=Part.of("default", {"std": 0.1, "scale_residual": False}))
    assert stds(apply(other, "mup:base_width=8"))["attn_out"] == pytest.approx(0.05)


def test_mup_attention_scale() -> None:
    assert make("attn_scale", Place(apply(TINY, "mup:base_width=8"))) == 4**-0.5
    assert make("attn_scale", Place(apply(TINY, "mup:base_width=8,base_head_dim=1"))) == pytest.approx(1 / 4)


def test_mup_logits_are_divided_tied_and_untied() -> None:
    for tied in (True, False):
        plain = build(wide(32, tied=tied), seed=0)
        mup = build(apply(wide(32, tied=tied), "mup:base_width=8"), seed=0)
        mup.load_state_dict(plain.state_dict())
        torch.testing.assert_close(mup.logits(batch()[0]), plain.logits(batch()[0]) / 4)


# -- depth-muP -------------------------------------------------------------------------------------------------


def test_depth_mup_keeps_the_stream_and_the_start_of_the_base() -> None:
    """The deviation of residual outputs does not depend on the depth, and the stream grows no more in a deep model."""
    sizes = {}
    for layers in (2, 32):
        spec = apply(replace(TINY, n_layers=layers, init=Part("small")), "depth_mup:base_depth=2")
        assert stds(spec)["attn_out"] == pytest.approx(stds(replace(TINY, init=Part("small")))["attn_out"])
        model = build(spec, seed=0)
        seen: list[torch.Tensor] = []
        tap = model.taps()[f"block.{layers - 1}.residual"]
        tap.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.detach().square().mean().sqrt()))
        model.hidden(batch()[0])
        sizes[layers] = float(seen[0])
    assert sizes[32] == pytest.approx(sizes[2], rel=0.1)


@pytest.mark.parametrize("other", ["scaled_init", "small_init"])
def test_depth_mup_refuses_a_second_division_by_the_depth(other: str) -> None:
    for words in ((other, "depth_mup"), ("depth_mup", other)):
        with pytest.raises(Conflict, match=r"exclude each other|both claim"):
            apply(TINY, *words)


# -- u-muP -----------------------------------------------------------------------------------------------------


def test_u_mup_starts_with_unit_matrices_and_unit_products() -> None:
    spec = apply(wide(64, n_layers=3), "u_mup")
    assert set(stds(spec).values()) == {1.0}
    linear = build(spec, seed=0).trunk.blocks[0].mlp.inner
    x_ND = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert linear(x_ND).std().item() == pytest.approx(1.0, rel=0.03)
    torch.testing.assert_close(x_ND @ linear.effective_weight().T, linear(x_ND))


def test_u_mup_keeps_the_variance_of_the_stream() -> None:
    """The factors of stream and branch make a variance of one from two of one, and every branch counts the same."""
    for residual_mult, ratio in ((1.0, 1.0), (0.5, 2.0)):
        spec = apply(replace(TINY, n_layers=3), f"u_mup:residual_mult={residual_mult},attn_ratio={ratio}")
        share = []  # what is left of the embedding and of every branch in the end, as variances
        for layer in (1, 2, 3):
            for branch in ("attn", "mlp"):
                add = make("residual", Place(spec, layer, branch))
                assert add.stream**2 + add.branch**2 == pytest.approx(1.0)
                share = [part * add.stream**2 for part in share or [1.0]] + [add.branch**2]
        embedding, attn, mlp = share[0], share[1::2], share[2::2]
        assert attn == pytest.approx([attn[0]] * 3) and mlp == pytest.approx([mlp[0]] * 3)
        assert math.sqrt(attn[0] / mlp[0]) == pytest.approx(ratio)
        assert (sum(attn) + sum(mlp)) / embedding == pytest.approx(2 * residual_mult**2)


def test_u_mup_rates() -> None:
    rates = build(apply(wide(16, tied=False), "u_mup"), seed=0, device="meta").lr_multipliers()
    wanted = {"embedding": 1 / 4, "head": 1.0, "norm": 2**-0.5, "qkv": 1 / 4 * 2**-0.5, "mlp_out": (24 * 2) ** -0.5}
    assert {role: rates[role] for role in wanted} == pytest.approx(wanted)


# -- nGPT ------------------------------------------------------------------------------------------------------


def sphere(model) -> UnitRows:
    roles = model.roles()
    return UnitRows([(p, ngpt.UNIT[roles[name]]) for name, p in model.named_parameters() if roles[name] in ngpt.UNIT])


def test_ngpt_stays_on_the_sphere() -> None:
    """With the hook every vector and every hidden state has length one, after a step too, and the loss falls."""
    model = build(apply(replace(TINY, tied=False), "ngpt"), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    sphere(model).attach(optimizer)
    losses = []
    for _ in range(8):
        losses.append(model(*batch()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    roles = model.roles()
    for name, p in model.named_parameters():
        if roles[name] in ngpt.UNIT:
            lengths = p.detach().norm(dim=ngpt.UNIT[roles[name]])
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
    hidden_BTD = model.hidden(batch()[0])
    torch.testing.assert_close(hidden_BTD.norm(dim=-1), torch.ones(3, 12))


def test_ngpt_scales_start_at_their_values_and_matrices_all_lie_on_the_sphere() -> None:
    model = build(apply(TINY, "ngpt"), seed=0)
    block = model.trunk.blocks[0]
    torch.testing.assert_close(block.attn_add.alpha(), torch.full((16,), 0.05))
    torch.testing.assert_close(block.attn.qk.scale(), torch.ones(2, 4))
    torch.testing.assert_close(block.mlp.activation.scale(), torch.full((48,), 4.0))
    torch.testing.assert_close(model.head_map.scale(), torch.ones(31))
    assert set(model.roles().values()) == {*ngpt.UNIT, "gain"} - {"head"}
    assert not [name for name in model.roles() if "norm" in name]
    readers, writers = {"qkv": 1, "mlp_in": 1, "embedding": 1, "head": 1}, {"attn_out": 0, "mlp_out": 0}
    assert readers | writers == ngpt.UNIT, "vectors lie along the residual stream"


def test_ngpt_logits_do_not_see_the_size_of_queries_and_keys() -> None:
    model = build(apply(TINY, "ngpt"), seed=0, compute_dtype=torch.float64)
    before = model.logits(batch()[0])
    with torch.no_grad():
        model.trunk.blocks[0].attn.qkv.weight[:24] *= 7
    torch.testing.assert_close(model.logits(batch()[0]), before)


# -- dynamic tanh ----------------------------------------------------------------------------------------------


def test_dyt_starts_by_place_and_width() -> None:
    spec = apply(wide(4096, n_layers=1, vocab_size=8), "dyt:mlp=0.7")
    alphas = {branch: make("norm", Place(spec, 1, branch), 4).param_fill["alpha"] for branch in ("attn", "mlp", "")}
    assert alphas == {"attn": 0.8, "mlp": 0.7, "": 0.2}
    assert make("norm", Place(apply(TINY, "dyt"), 1, "mlp"), 16).param_fill["alpha"] == 1.0


def test_dyt_is_a_scaled_identity_near_zero_and_bounded_far_out() -> None:
    model = build(apply(TINY, "dyt:attn=0.5"), seed=0)
    norm = model.trunk.blocks[0].attn_in
    assert isinstance(norm, dyt.DyT)
    x_D = torch.linspace(-1e-3, 1e-3, 16)
    torch.testing.assert_close(norm(x_D), 0.5 * x_D, rtol=1e-5, atol=0)
    assert norm(torch.full((16,), 1e30)).tolist() == [1.0] * 16
    assert norm(x_D.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("other", ["qk_norm"])
def test_dyt_excludes_norms_of_queries_and_keys(other: str) -> None:
    with pytest.raises(Conflict, match="a tanh does not fix a length"):
        apply(TINY, "dyt", other)


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mup:base_width=0", "mup base_width is 0"),
        ("mup:base_head_dim=-1", "mup base_head_dim is -1"),
        ("depth_mup:base_depth=0", "depth_mup base_depth is 0"),
        ("u_mup:residual_mult=0", "u_mup residual_mult is 0"),
        ("u_mup:attn_ratio=-1", "u_mup attn_ratio is -1"),
        ("ngpt:alpha=0", "ngpt alpha is 0"),
        ("dyt:attn=0", "dyt attn is 0"),
    ],
)
def test_bad_settings(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(TINY, words)


@pytest.mark.parametrize(
    "words",
    [("mup", "depth_mup"), ("mup", "value_residual", "gated_attention"), ("u_mup", "gated_attention:position=g4"),
     ("ngpt", "value_residual", "gated_attention:score=headwise"), ("dyt", "mup", "swiglu_clamp")],
)  # fmt: skip
def test_they_compose(words: tuple[str, ...]) -> None:
    model = build(apply(TINY, *words), seed=0)
    model(*batch()).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
