"""What is special about soft_temp, soft_cap, soft_clip, attention_sink and final_soft_cap."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.core.errors import Conflict, UserError
from poise.model.attention import fused_attention
from poise.model.build import build
from poise.model.methods import apply_methods
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

TINY = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)
LARGE = Part.of("default", {"std": 0.3, "embedding_std": 0.5})
"""A start at which attention logits are of ordinary size."""

SCORES = ("soft_cap", "soft_clip", "attention_sink")


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, TINY.vocab_size, (rows, TINY.seq_len + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def spec_with(*words: str) -> Spec:
    return apply_methods(Spec.from_dict(TINY.to_dict() | {"init": LARGE.to_dict()}), words)


def outcome(spec: Spec) -> dict[str, Tensor]:
    model = build(spec, seed=1)
    out = model(*batch())
    out.loss.backward()
    return {"loss": out.loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def core(*words: str, scale: float = 1.0) -> nn.Module:
    """The ``scores`` module of a model with one head of width 8, filled."""
    spec = Spec(31, 12, 1, 8, 1, 1, 8)
    module: nn.Module = make("scores", Place(apply_methods(spec, words), 1, "attn"), scale).double()
    for name, value in getattr(module, "param_fill", {}).items():
        nn.init.constant_(module.get_parameter(name), value)
    fill = getattr(module, "fill_buffers", None)
    if fill is not None:
        fill()
    return module


def weights(module: nn.Module, logits_T: Tensor) -> Tensor:
    """Attention weights of the last row of a core whose logits there are ``logits_T``: at most 7 of them."""
    T = len(logits_T)
    k_TK = F.pad(torch.eye(T, dtype=torch.float64), (0, 8 - T))
    q_TK = torch.cat([torch.zeros(T - 1, 8, dtype=torch.float64), F.pad(logits_T, (0, 8 - T))[None]])
    out: Tensor = module(q_TK[None, None], k_TK[None, None], k_TK[None, None])
    return out[0, 0, -1, :T]


@pytest.mark.parametrize(
    "words",
    [
        "soft_temp:beta=1",
        "soft_cap:cap=1e5",
        "soft_clip:zeta=1,gamma=0",
        "attention_sink:init=-1e4",
        "final_soft_cap:cap=1e5",
    ],
)
def test_towards_the_identity_setting_nothing_changes(words: str) -> None:
    plain, treated = outcome(spec_with()), outcome(spec_with(words))
    for name, value in plain.items():
        torch.testing.assert_close(treated[name], value, rtol=2e-4, atol=2e-6)
    assert words.startswith(("soft_temp", "soft_clip")) or not torch.equal(
        outcome(spec_with(words.partition(":")[0]))["loss"], plain["loss"]
    )


def test_temperature_is_a_factor_of_the_queries() -> None:
    spec = spec_with("soft_temp:beta=0.25")
    scale = make("attn_scale", Place(spec, 1, "attn"))
    assert scale == 0.25 / math.sqrt(TINY.head_dim)
    q, k, v = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
    out = make("scores", Place(spec, 1, "attn"), scale)(q, k, v)
    torch.testing.assert_close(out, fused_attention(0.25 * q, k, v, TINY.head_dim**-0.5))


@pytest.mark.parametrize(("logit", "slope"), [(10.0, 0.961), (50.0, 0.420), (100.0, 0.071), (150.0, 0.0099)])
def test_slopes_of_a_cap_of_50(logit: float, slope: float) -> None:
    # Two equal logits: their weights are one half each, and the slope of a softmax there is a quarter.
    logits = torch.full((2,), logit, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(weights(core("soft_cap"), logits)[0], logits)
    assert 4 * gradient[0].item() == pytest.approx(slope, abs=5e-4)
    assert gradient[0] == pytest.approx(-gradient[1])
    raw = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    capped = make("logits", Place(apply_methods(TINY, ["final_soft_cap:cap=50"])))(raw)
    assert torch.autograd.grad(capped, raw)[0].item() == pytest.approx(slope, abs=5e-4)


def test_no_logit_passes_the_cap() -> None:
    # The odds of two keys are exp of the difference of their capped logits, at most 2 c.
    odds = weights(core("soft_cap:cap=2"), torch.tensor([900.0, -900.0, 0.0], dtype=torch.float64))
    assert (odds[0] / odds[1]).log().item() == pytest.approx(4, rel=1e-12)
    assert (odds[0] / odds[2]).log().item() == pytest.approx(2, rel=1e-12)


def test_clip_on_a_row_by_hand() -> None:
    p = torch.tensor([0.0282, 0.0284, 0.4434, 0.5], dtype=torch.float64)
    logits = p.log().requires_grad_()
    w = weights(core("soft_clip"), logits)
    torch.testing.assert_close(w.detach(), torch.tensor([0.0, 0.000104, 0.440004, 0.5], dtype=torch.float64))
    assert w[0] == 0 < w[1]  # the threshold is 0.03 / 1.06 = 0.028302
    assert not torch.autograd.grad(w[0], logits, retain_graph=True)[0].any()
    jacobian = 1.06 * p[1] * (torch.eye(4, dtype=torch.float64)[1] - p)
    torch.testing.assert_close(torch.autograd.grad(w[1], logits)[0], jacobian)
    high, low = (
        weights(core("soft_clip"), torch.tensor([x, 1 - x], dtype=torch.float64).log()) for x in (0.9718, 0.9716)
    )
    assert high[0] == 1 > low[0]  # and the other is 1.03 / 1.06 - ... = 0.971698
    assert high[1] == 0 < low[1]


def test_sink_takes_its_share() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    softmax1 = logits.exp() / (1 + logits.exp().sum())
    for words in ("attention_sink", "attention_sink:learned=false"):
        torch.testing.assert_close(weights(core(words), logits), softmax1)
    learned = core("attention_sink:init=1.5")
    row = torch.cat([logits, torch.tensor([1.5], dtype=torch.float64)]).softmax(0)
    torch.testing.assert_close(weights(learned, logits).detach(), row[:3])
    # The share of the sink is what is missing, and more sink takes from every key alike.
    (gradient,) = torch.autograd.grad(weights(learned, logits).sum(), learned.get_parameter("sink"))
    assert gradient.item() == pytest.approx(-(row[3] * (1 - row[3])).item(), rel=1e-12)
    assert weights(core("attention_sink:init=3"), torch.full((3,), -50.0, dtype=torch.float64)).sum() < 1e-20


def test_a_sink_per_head_without_decay() -> None:
    model = build(spec_with("attention_sink:init=0.5"), seed=0)
    names = [name for name in model.roles() if name.endswith("sink")]
    assert names == [f"trunk.blocks.{n}.attn.scores.sink" for n in range(2)]
    assert {model.roles()[name] for name in names} == {"gain"}
    assert all(torch.equal(model.get_parameter(name), torch.full((4,), 0.5)) for name in names)
    fixed = build(spec_with("attention_sink:init=0.5,learned=false"), seed=0)
    assert not [name for name in fixed.state_dict() if "sink" in name]
    assert torch.equal(fixed(*batch()).loss, model(*batch()).loss)


def test_final_cap_goes_before_cross_entropy_and_z_loss() -> None:
    # Capped a second time, or only for one of the two, the loss would be another.
    spec = spec_with("final_soft_cap:cap=1", "z_loss:coefficient=0.01")
    inputs, targets = batch()
    model, other = build(spec, seed=1), build(spec, seed=1)
    out = model(inputs, targets)
    out.loss.backward()
    hidden = other.hidden(inputs)
    z = torch.tanh(hidden @ other.head_weight.T)
    ce, log_z = F.cross_entropy(z.flatten(0, 1), targets.flatten()), z.logsumexp(-1)
    (ce + 0.01 * log_z.square().mean()).backward()
    torch.testing.assert_close(out.ce, ce.detach())
    torch.testing.assert_close(out.log_z, log_z.detach().mean())
    torch.testing.assert_close(out.parts["z_loss"], 0.01 * log_z.detach().square().mean())
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(model.logits(inputs), z)
    assert model.logits(inputs).abs().max() <= 1 < (hidden @ other.head_weight.T).abs().max()


def test_one_takes_the_scores_and_the_others_go_beside_it() -> None:
    for first, second in itertools.permutations(SCORES, 2):
        with pytest.raises(Conflict, match=f"'{first}' and '{second}' both claim the slot 'scores'"):
            spec_with(first, second)
    for name in SCORES:
        grads = outcome(spec_with(name, "soft_temp", "final_soft_cap", "qk_norm", "z_loss"))
        assert all(torch.isfinite(value).all() for value in grads.values())


def test_recomputed_blocks_give_the_same_gradients() -> None:
    for name in SCORES:
        grads = []
        for again in (False, True):
            model = build(spec_with(name), seed=1)
            model.recompute_blocks(again)
            model(*batch()).loss.backward()
            grads.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("soft_temp:beta=0", "beta is 0"),
        ("soft_cap:cap=0", "cap is 0"),
        ("soft_cap:cap=inf", "cap is inf"),
        ("soft_clip:zeta=0.9", "zeta is 0.9"),
        ("soft_clip:gamma=0.1", "gamma is 0.1"),
        ("attention_sink:init=nan", "init is nan"),
        ("final_soft_cap:cap=-1", "cap is -1"),
    ],
)
def test_bad_settings_name_the_value(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        spec_with(words)
    assert "give a finite" in str(error.value) and "\n" not in str(error.value)
