"""What is special about gates, value residuals, the logit tap, gradients of the embedding, and bounds on outputs.

Shapes: B batch, T positions, D width, H heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import Conflict, UserError
from poise.model.build import apply, build
from poise.model.methods import logit_tap
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Spec

TINY = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, TINY.vocab_size, (3, 13), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(spec: Spec, dtype: torch.dtype = torch.float64) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(spec, seed=1, compute_dtype=dtype)
    loss = model(*batch()).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- gated attention -------------------------------------------------------------------------------------------

POSITIONS = [("g1", s) for s in ("elementwise", "headwise", "shared")]
POSITIONS += [(g, s) for g in ("g2", "g3", "g4") for s in ("elementwise", "headwise", "shared")] + [
    ("g5", "elementwise")
]


def gated(position: str, score: str, **more: object) -> Spec:
    extra = "".join(f",{key}={value}" for key, value in more.items())
    return apply(TINY, f"gated_attention:position={position},score={score}{extra}")


def gate_of(attention):
    slot = {"g1": attention.gate, "g5": attention.out_gate}
    return next(found for found in (*slot.values(), attention.qkv_gate) if hasattr(found, "gate"))


@pytest.mark.parametrize(("position", "score"), POSITIONS)
def test_open_gates_are_the_baseline(position: str, score: str) -> None:
    """The branch's inputs are made to be all ones, and the gates' matrices large: every gate is 1."""
    plain, model = build(TINY, seed=0), build(gated(position, score), seed=0)
    for either in (plain, model):
        for block in either.trunk.blocks:
            block.attn_in.register_forward_hook(lambda module, args, out: out.abs() + 1)
    wanted = plain.logits(batch()[0])
    assert not torch.allclose(model.logits(batch()[0]), wanted, rtol=1e-3)
    for block in model.trunk.blocks:
        torch.nn.init.constant_(gate_of(block.attn).gate.linear.weight, 100.0)
    assert torch.equal(model.logits(batch()[0]), wanted)
    for block in model.trunk.blocks:
        torch.nn.init.constant_(gate_of(block.attn).gate.linear.weight, -100.0)
    assert not torch.allclose(model.logits(batch()[0]), wanted, rtol=1e-3)


@pytest.mark.parametrize("position", ["g1", "g2", "g3", "g4"])
def test_scores_are_elementwise_with_tied_rows(position: str) -> None:
    """Headwise repeats a row over its head, shared repeats K rows over the heads; keys and values have G heads."""
    heads = 2 if position in ("g2", "g3") else 4
    for score, rows in (("headwise", heads), ("shared", 4)):
        model, full = build(gated(position, score), seed=0), build(gated(position, "elementwise"), seed=0)
        for block, wide in zip(model.trunk.blocks, full.trunk.blocks, strict=True):
            weight = gate_of(block.attn).gate.linear.weight.detach()
            assert weight.shape == (rows, 16)
            tied = weight.repeat_interleave(4, 0) if score == "headwise" else weight.repeat(heads, 1)
            gate_of(wide.attn).gate.linear.weight.data.copy_(tied)
        torch.testing.assert_close(model.logits(batch()[0]), full.logits(batch()[0]))


@pytest.mark.parametrize(("position", "which"), [("g2", 2), ("g3", 1), ("g4", 0)])
def test_gates_of_projections_follow_the_formula(position: str, which: int) -> None:
    gate = make("qkv_gate", Place(gated(position, "headwise", ns="true"), 1, "attn"))
    torch.nn.init.normal_(gate.gate.linear.weight, generator=torch.Generator().manual_seed(0))
    given = normal(3, 4, 5, 4), normal(3, 2, 5, 4, seed=1), normal(3, 2, 5, 4, seed=2)
    x = normal(3, 5, 16, seed=3)
    out = gate(*given, x)
    assert all(out[n] is given[n] for n in range(3) if n != which)
    factor_BTH = 0.5 + 0.5 * torch.sigmoid(x @ gate.gate.linear.weight.T)
    torch.testing.assert_close(out[which], given[which] * factor_BTH.transpose(1, 2)[..., None])


def test_gates_are_decayed_matrices_and_start_near_a_half() -> None:
    model = build(gated("g1", "elementwise"), seed=0)
    assert model.roles()["trunk.blocks.0.attn.gate.gate.linear.weight"] == "attn_gate"
    gates = model.trunk.blocks[0].attn.gate.gate(normal(3, 5, 16).bfloat16())
    assert gates.dtype == torch.bfloat16 and gates.shape == (3, 5, 4, 4)
    assert (gates.float() - 0.5).abs().max() < 0.1


# -- value residual --------------------------------------------------------------------------------------------


def test_every_block_may_attend_to_the_first_values() -> None:
    """With share = 1 the values of later blocks have no say; the first block's have."""
    model = build(apply(replace(TINY, n_layers=3), "value_residual:share=1"), seed=0)
    before = model.logits(batch()[0])
    with torch.no_grad():
        for block in model.trunk.blocks[1:]:
            block.attn.qkv.weight[24:] *= 5  # the rows of values
    assert torch.equal(model.logits(batch()[0]), before)
    with torch.no_grad():
        model.trunk.blocks[0].attn.qkv.weight[24:] *= 5
    assert not torch.equal(model.logits(batch()[0]), before)


def test_the_first_values_go_through_all_blocks() -> None:
    """A later block mixes in what it is given and passes on just that; the first passes its own."""
    mixture = make("values", Place(apply(TINY, "value_residual:share=0.25"), 3, "attn"))
    own, first = normal(1, 2, 3, 4), normal(1, 2, 3, 4, seed=1)
    out, passed = mixture(own, first)
    assert passed is first
    torch.testing.assert_close(out, 0.75 * own + 0.25 * first)
    out, passed = make("values", Place(apply(TINY, "value_residual"), 1, "attn"))(own, None)
    assert out is own and passed is own


def test_learned_shares_start_as_the_fixed_ones_and_learn() -> None:
    fixed, learned = (build(apply(TINY, f"value_residual:learnable={x}"), seed=0) for x in ("false", "true"))
    torch.testing.assert_close(learned.logits(batch()[0]), fixed.logits(batch()[0]))
    own = {name: p for name, p in learned.named_parameters() if ".values." in name}
    assert sorted(own) == ["trunk.blocks.1.attn.values.from_first", "trunk.blocks.1.attn.values.own"]
    learned(*batch()).loss.backward()
    assert all(p.grad.abs() > 0 for p in own.values())


# -- logit tap -------------------------------------------------------------------------------------------------


def naive(model, inputs_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The largest visible logit of every head from the taps, one head and pair of positions at a time."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        tap.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out.detach()))
        for name, tap in model.taps().items()
    ]
    model.eval().hidden(inputs_BT)
    model.train()
    for handle in handles:
        handle.remove()
    found = {}
    for number in range(model.spec.n_layers):
        q, k = seen[f"block.{number}.q"], seen[f"block.{number}.k"]
        logits = [
            [float(q[b, h, i] @ k[b, h // 2, j]) / 2 for b in range(len(q)) for i in range(12) for j in range(i + 1)]
            for h in range(4)
        ]
        found[f"block.{number}"] = torch.tensor([max(per_head) for per_head in logits])
    return found


def test_the_tap_reads_the_largest_visible_logit_and_changes_nothing() -> None:
    plain, model = build(TINY, seed=0), build(apply(TINY, "logit_tap"), seed=0)
    assert all((reading == -math.inf).all() for reading in logit_tap.readings(model).values())
    assert plain.state_dict().keys() == model.state_dict().keys(), "readings are not saved"
    for seed in (0, 1):
        torch.testing.assert_close(model(*batch(seed)).loss, plain(*batch(seed)).loss, rtol=0, atol=0)
    wanted = [naive(model, batch(seed)[0]) for seed in (0, 1)]
    readings = logit_tap.readings(model)
    assert list(readings) == ["block.0", "block.1"]
    for name, reading in readings.items():
        torch.testing.assert_close(reading, torch.maximum(wanted[0][name], wanted[1][name]), rtol=1e-5, atol=1e-7)
    logit_tap.reset(model)
    model(*batch(1))
    torch.testing.assert_close(logit_tap.readings(model)["block.1"], wanted[1]["block.1"], rtol=1e-5, atol=1e-7)
    assert logit_tap.readings(plain) == {}


def test_evaluation_is_not_read_and_recomputation_reads_the_same() -> None:
    straight, again = (build(apply(TINY, "logit_tap"), seed=0) for _ in range(2))
    again.recompute_blocks()
    for model in (straight, again):
        model(*batch()).loss.backward()
    before = logit_tap.readings(straight)
    assert all(torch.equal(before[name], reading) for name, reading in logit_tap.readings(again).items())
    with torch.no_grad():
        straight.trunk.blocks[0].attn.qkv.weight.mul_(10)
    straight.eval()(*batch())
    assert all(torch.equal(before[name], reading) for name, reading in logit_tap.readings(straight).items())


@given(st.sampled_from([1, 300, 2000, 1 << 20]), st.sampled_from([1, 2, 4]), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_pieces_make_the_whole(budget: int, G: int, T: int) -> None:
    q, k = normal(2, 4, T, 6, seed=1), normal(2, G, T, 6, seed=2)
    logits_BHTT = 0.3 * q @ k.repeat_interleave(4 // G, 1).mT
    logits_BHTT.masked_fill_(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(logit_tap.largest(q, k, 0.3, budget), logits_BHTT.amax((0, 2, 3)))


def test_the_tap_takes_the_models_own_scale() -> None:
    model = build(apply(TINY, "mup:base_width=8,base_head_dim=1", "logit_tap:threshold=50"), seed=0)
    tap = model.trunk.blocks[0].attn.qk_tap
    assert (tap.scale, tap.threshold) == (0.25, 50.0)


@pytest.mark.parametrize("other", ["qk_norm", "ngpt"])
def test_the_tap_refuses_normalised_queries_and_keys(other: str) -> None:
    for words in ((other, "logit_tap"), ("logit_tap", other)):
        with pytest.raises(Conflict, match=r"W_q|size of their matrices"):
            apply(TINY, *words)


# -- the ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
def test_embed_detach_shrinks_the_gradient_of_the_embedding_and_nothing_else(gamma: float) -> None:
    untied = replace(TINY, tied=False)
    loss, plain = gradients(untied)
    ours, shrunk = gradients(apply(untied, f"embed_detach:gamma={gamma}"))
    assert ours == loss
    for name in plain:
        factor = gamma if name == "embedding.weight" else 1.0
        assert torch.equal(shrunk[name], plain[name] * factor) or name == "embedding.weight"
        torch.testing.assert_close(shrunk[name], plain[name] * factor, rtol=1e-12, atol=0)


def test_embed_detach_with_a_tied_head_leaves_the_heads_part() -> None:
    """Tied gradient = lookup's part + head's part; only the first is shrunk. With gamma = 0 the head's part is left."""
    _, whole = gradients(TINY)
    _, head = gradients(apply(TINY, "embed_detach:gamma=0"))
    _, shrunk = gradients(apply(TINY, "embed_detach:gamma=0.1"))
    part = {name: grads["embedding.weight"] for name, grads in (("all", whole), ("head", head), ("ours", shrunk))}
    assert part["head"].norm() > 0.01 * part["all"].norm()
    torch.testing.assert_close(part["ours"], part["head"] + 0.1 * (part["all"] - part["head"]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("tied", [True, False])
def test_centred_logits_have_mean_zero_and_the_same_cross_entropy(tied: bool) -> None:
    spec = replace(TINY, tied=tied)
    plain = build(spec, seed=0, compute_dtype=torch.float64)
    with torch.no_grad():  # all rows drift the same way
        head = plain.embedding if plain.head is None else plain.head
        head.weight += 0.5 * normal(16, seed=3, dtype=torch.float64)
    centred = build(apply(spec, "output_centering"), seed=0, compute_dtype=torch.float64)
    centred.load_state_dict(plain.state_dict())
    drifted_BTV, logits_BTV = plain.logits(batch()[0]), centred.logits(batch()[0])
    assert drifted_BTV.mean(-1).abs().max() > 0.1
    torch.testing.assert_close(logits_BTV.mean(-1), torch.zeros(3, 12, dtype=torch.float64), rtol=0, atol=1e-14)
    here, there = plain(*batch()), centred(*batch())
    torch.testing.assert_close(there.ce, here.ce, rtol=1e-12, atol=0)
    assert abs(there.log_z - here.log_z) > 0.01, "what z-loss sees does change"
    for model, out in ((plain, here), (centred, there)):
        model.zero_grad()
        out.loss.backward()
    for (name, a), b in zip(plain.named_parameters(), centred.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-14, msg=name)


def test_centring_keeps_the_lookup_of_a_tied_head() -> None:
    model = build(apply(TINY, "output_centering"), seed=0)
    assert model.head_weight.mean(0).abs().max() < 1e-8
    assert torch.equal(model.embedding(torch.tensor([[3]]))[0, 0], model.embedding.weight[3])


def test_the_clamp_bounds_both_halves() -> None:
    clamp = make("activation", Place(apply(TINY, "swiglu_clamp:limit=2")))
    gate, up = torch.tensor([-9.0, -1.0, 1.0, 9.0]), torch.tensor([9.0, -9.0, 1.0, -9.0])
    inner = torch.cat([gate, up]).requires_grad_()
    silu = torch.nn.functional.silu
    wanted = [silu(gate[0]) * 2, silu(gate[1]) * -2, silu(gate[2]), silu(torch.tensor(2.0)) * -2]
    out = clamp(inner)
    torch.testing.assert_close(out.detach(), torch.stack(wanted))
    out.sum().backward()
    assert (inner.grad == 0).tolist() == [False, False, False, True, True, True, False, True]


def test_a_large_limit_changes_nothing() -> None:
    plain = build(TINY, seed=0)
    clamped = build(apply(TINY, "swiglu_clamp:limit=1e30"), seed=0)
    torch.testing.assert_close(clamped(*batch()).loss, plain(*batch()).loss, rtol=1e-6, atol=0)


# -- mistakes, and together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gated_attention:position=g6", "position is 'g6'; use one of g1, g2"),
        ("gated_attention:score=headwide", "score is 'headwide'.*headwise"),
        ("gated_attention:position=g5,score=shared", "'shared' at g5"),
        ("value_residual:share=1.5", "share is 1.5"),
        ("logit_tap:threshold=0", "threshold is 0"),
        ("embed_detach:gamma=-1", "gamma is -1"),
        ("swiglu_clamp:limit=0", "limit is 0"),
    ],
)
def test_bad_settings(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(TINY, words)


def test_the_clamp_needs_a_gate() -> None:
    with pytest.raises(UserError, match="swiglu_clamp needs mlp = swiglu, but mlp is 'gelu'"):
        apply(replace(TINY, mlp="gelu"), "swiglu_clamp")


ALL = ("gated_attention", "value_residual", "logit_tap", "embed_detach", "output_centering", "swiglu_clamp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_all_together_with_recomputation(dtype: torch.dtype) -> None:
    model = build(apply(TINY, *ALL, "z_loss"), seed=0, compute_dtype=dtype)
    again = copy.deepcopy(model)
    again.recompute_blocks()
    for either in (model, again):
        either(*batch()).loss.backward()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.grad is not None and torch.isfinite(p.grad).all() and torch.equal(p.grad, q.grad)
