"""QK-Clip: what the largest logit is afterwards, computed from queries and keys, and what is left alone.

Shapes: B batch, T positions, D model width, H heads, G key heads, K head width, C compressed width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.ranks import Ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from poise.core.errors import UserError
from poise.optim.chain import Chain
from poise.optim.rules.adamw import AdamWRule
from poise.optim.weights.qk_clip import HeadRows, MaxLogits, QKClip, QKLayer, gammas, largest_logits, scale_heads

B, T, D, H, K = 2, 9, 16, 4, 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_logits(q_BTHK: Tensor, k_BTGK: Tensor, scale: float) -> Tensor:
    """The largest causal logit of every head, one head at a time: (H,)."""
    out = []
    for head in range(q_BTHK.shape[2]):
        key = head // (q_BTHK.shape[2] // k_BTGK.shape[2])
        logit_BTT = torch.einsum("btk,bsk->bts", q_BTHK[:, :, head], k_BTGK[:, :, key]) * scale
        visible_TT = torch.ones(logit_BTT.shape[1:], dtype=torch.bool).tril()
        out.append(logit_BTT[:, visible_TT].max())
    return torch.stack(out)


class Layout:
    """Attention weights in one layout, its description, and its largest logits."""

    def __init__(self, weights: list[Tensor], layer: QKLayer, logits: Callable[[], Tensor]) -> None:
        self.weights, self.layer, self.logits = weights, layer, logits


X = random(B, T, D, seed=1)


def separate(G: int) -> Layout:
    wq, wk = nn.Parameter(random(H * K, D, seed=2)), nn.Parameter(random(G * K, D, seed=3))
    bq, bk = nn.Parameter(random(H * K, seed=4)), nn.Parameter(random(G * K, seed=5))
    with torch.no_grad():
        wq[:K] *= 8.0  # one head is large
    layer = QKLayer(
        "a",
        (HeadRows.even(wq, H, K), HeadRows.even(bq, H, K)),
        (HeadRows.even(wk, G, K), HeadRows.even(bk, G, K)),
    )

    def logits() -> Tensor:
        q, k = X @ wq.T + bq, X @ wk.T + bk
        return naive_logits(q.view(B, T, H, K), k.view(B, T, G, K), K**-0.5)

    return Layout([wq, wk, bq, bk], layer, logits)


def fused(G: int) -> Layout:
    w = nn.Parameter(random((H + 2 * G) * K, D, seed=2))
    with torch.no_grad():
        w[: 2 * K] *= 8.0
    layer = QKLayer("a", (HeadRows.even(w, H, K),), (HeadRows.even(w, G, K, first=H * K),))

    def logits() -> Tensor:
        q, k, _ = (X @ w.T).split((H * K, G * K, G * K), -1)
        return naive_logits(q.view(B, T, H, K), k.view(B, T, G, K), K**-0.5)

    return Layout([w], layer, logits)


def interleaved() -> Layout:
    w = nn.Parameter(random(H * 3 * K, D, seed=2))
    with torch.no_grad():
        w[:K] *= 8.0
    layer = QKLayer("a", (HeadRows.even(w, H, K, stride=3 * K),), (HeadRows.even(w, H, K, first=K, stride=3 * K),))

    def logits() -> Tensor:
        q, k, _ = (X @ w.T).view(B, T, H, 3 * K).chunk(3, -1)
        return naive_logits(q, k, K**-0.5)

    return Layout([w], layer, logits)


def mla() -> Layout:
    """Per head K of content and R of rotation, one rotary key for all heads."""
    R = 2
    wq = nn.Parameter(random(H * (K + R), D, seed=2))
    wkv, wkr = nn.Parameter(random(H * 2 * K, D, seed=3)), nn.Parameter(random(R, D, seed=4))
    with torch.no_grad():
        wq[: K + R] *= 8.0
    layer = QKLayer(
        "a",
        (HeadRows.even(wq, H, K, stride=K + R),),
        (HeadRows.even(wkv, H, K, stride=2 * K),),
        (HeadRows.even(wq, H, R, first=K, stride=K + R),),
    )

    def logits() -> Tensor:
        q = (X @ wq.T).view(B, T, H, K + R)
        k = (X @ wkv.T).view(B, T, H, 2 * K)[..., :K]
        k = torch.cat((k, (X @ wkr.T)[:, :, None].expand(B, T, H, R)), -1)
        return naive_logits(q, k, (K + R) ** -0.5)

    return Layout([wq, wkv, wkr], layer, logits)


def normed(gain_heads: int) -> Layout:
    """Queries and keys normalised, with one gain for all heads or one a head."""
    gq, gk = (
        nn.Parameter(1 + random(gain_heads, K, seed=2).abs()),
        nn.Parameter(1 + random(gain_heads, K, seed=3).abs()),
    )
    flat_q, flat_k = nn.Parameter(gq.detach().flatten()), nn.Parameter(gk.detach().flatten())
    q, k = (nn.functional.normalize(random(B, T, H, K, seed=seed), dim=-1) for seed in (4, 5))
    layer = QKLayer("a", (HeadRows.even(flat_q, gain_heads, K),), (HeadRows.even(flat_k, gain_heads, K),))

    def logits() -> Tensor:
        return naive_logits(q * flat_q.view(-1, K), k * flat_k.view(-1, K), K**0.5)

    return Layout([flat_q, flat_k], layer, logits)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "separate": lambda: separate(H),
    "grouped": lambda: separate(2),
    "one key head": lambda: separate(1),
    "fused": lambda: fused(H),
    "fused grouped": lambda: fused(2),
    "interleaved": interleaved,
    "mla": mla,
    "gain a head": lambda: normed(H),
}


@pytest.mark.parametrize("share", [0.3, 0.9], ids=["all heads", "one head"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_head_is_scaled_by_its_gamma(name: str, share: float) -> None:
    """After the clip the batch's largest logit is tau where it was above, and what it was elsewhere."""
    layout = LAYOUTS[name]()
    before = layout.logits().detach()
    tau = share * float(before.max() if share == 0.9 else before.min())
    assert (before > tau).any() and ((before <= tau).any() or share == 0.3)
    QKClip([layout.layer], lambda: {"a": before}, tau)()
    after = layout.logits().detach()
    expected = np.minimum(before.numpy(), tau)
    np.testing.assert_allclose(after.numpy(), expected, rtol=1e-12)
    assert float(after.max()) <= tau * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "gain a head"])
def test_heads_below_the_threshold_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    """Only rows of heads above tau change; values, shared rotary keys and shared keys of a calm head do not."""
    layout = LAYOUTS[name]()
    for p in layout.weights:
        p.data = p.data.to(dtype)
    before = [p.detach().clone() for p in layout.weights]
    logits = torch.tensor([250.0, 99.0, 3.0, -5.0])
    QKClip([layout.layer], lambda: {"a": logits}, 100.0)()
    changed = {
        id(p): (p != old).flatten(1).any(1) if p.ndim > 1 else p != old
        for p, old in zip(layout.weights, before, strict=True)
    }
    allowed = {id(p): torch.zeros(p.shape[0], dtype=torch.bool) for p in layout.weights}
    keys = len(layout.layer.key[0].starts)
    for part in (*layout.layer.query, *layout.layer.rotary_query, *(layout.layer.key if keys == H else ())):
        allowed[id(part.parameter)][part.starts[0] : part.starts[0] + part.size] = True
    for p in layout.weights:
        assert torch.equal(changed[id(p)], allowed[id(p)])


def test_the_papers_rule_in_numbers() -> None:
    """Parity in NumPy: sqrt(gamma) on both; MLA: the rotary query gamma, the shared rotary key as it is."""
    gamma = np.array([100 / 250, 1.0, 100 / 400, 1.0])
    logits = torch.tensor([250.0, 99.0, 400.0, -5.0], dtype=torch.float64)
    plain, latent = separate(H), mla()
    before = [p.detach().numpy().copy() for p in plain.weights + latent.weights]
    QKClip([plain.layer], lambda: {"a": logits})()
    QKClip([latent.layer], lambda: {"a": logits})()
    wq, wk, bq, bk, mq, mkv, mkr = (p.detach().numpy() for p in plain.weights + latent.weights)
    each = np.repeat(np.sqrt(gamma), K)
    for after, old in zip((wq, wk), before[:2], strict=True):
        np.testing.assert_allclose(after, old * each[:, None], rtol=1e-14)
    for after, old in zip((bq, bk), before[2:4], strict=True):
        np.testing.assert_allclose(after, old * each, rtol=1e-14)
    scale_q = np.concatenate([[math.sqrt(g)] * K + [g] * 2 for g in gamma])
    scale_kv = np.concatenate([[math.sqrt(g)] * K + [1.0] * K for g in gamma])
    np.testing.assert_allclose(mq, before[4] * scale_q[:, None], rtol=1e-14)
    np.testing.assert_allclose(mkv, before[5] * scale_kv[:, None], rtol=1e-14)
    assert np.array_equal(mkr, before[6])


def test_a_shared_key_takes_the_mildest_gamma_of_its_group() -> None:
    """Group 0 holds gammas 1/4 and 1: the query takes all. Group 1 holds 1/4 and 1/16: the key takes sqrt(1/4)."""
    layout = separate(2)
    wq, wk = layout.weights[:2]
    before_q, before_k = wq.detach().clone(), wk.detach().clone()
    QKClip([layout.layer], lambda: {"a": torch.tensor([400.0, 50.0, 400.0, 1600.0])})()
    scale_q = torch.tensor([1 / 4, 1.0, 1 / 2, 1 / 8], dtype=torch.float64).repeat_interleave(K)
    assert torch.equal(wq, before_q * scale_q[:, None])
    assert torch.equal(wk[:K], before_k[:K])
    assert torch.equal(wk[K:], before_k[K:] * 0.5)


def test_one_gain_for_all_heads_and_one_reading_for_all_heads() -> None:
    """A shared gain goes by the largest logit of all heads; a reading of the whole layer scales all heads alike."""
    layout = normed(1)
    before = layout.logits().detach()
    tau = float(before.max()) / 3
    QKClip([layout.layer], lambda: {"a": before}, tau)()
    np.testing.assert_allclose(layout.logits().detach().numpy(), before.numpy() / 3, rtol=1e-12)
    whole = fused(2)
    before = whole.logits().detach()
    QKClip([whole.layer], lambda: {"a": before.max()}, float(before.max()) / 3)()
    np.testing.assert_allclose(whole.logits().detach().numpy(), before.numpy() / 3, rtol=1e-12)


def test_without_a_large_logit_the_optimizer_is_as_without_the_clip() -> None:
    """Off equals absent, bit for bit; and above the threshold it is not."""
    outcomes = {}
    for tau in (None, 1e6, 20.0):
        layout, seen = fused(2), MaxLogits()
        optimizer = torch.optim.AdamW(layout.weights, lr=0.01)
        if tau is not None:
            QKClip([layout.layer], seen.take, tau).attach(optimizer)
        for _ in range(5):
            logits = layout.logits()
            seen.add("a", logits)
            optimizer.zero_grad()
            (-logits.sum()).backward()  # the loss wants large logits
            optimizer.step()
        outcomes[tau] = (layout.weights[0].detach(), float(layout.logits().detach().max()))
    assert torch.equal(outcomes[None][0], outcomes[1e6][0])
    assert outcomes[20.0][1] < 30.0 < outcomes[None][1]


def test_a_reading_is_used_once() -> None:
    """Readings that are not renewed clip nothing: the weights are below the threshold by then."""
    layout = fused(H)
    stale = torch.full((H,), 400.0)
    clip = QKClip([layout.layer], lambda: {"a": stale})
    clip()
    once = layout.weights[0].detach().clone()
    assert torch.equal(clip.gammas["a"], torch.full((H,), 0.25))
    clip()
    assert torch.equal(layout.weights[0], once) and clip.gammas == {}
    stale.fill_(200.0)  # written to: a new reading
    clip()
    assert not torch.equal(layout.weights[0], once)


class Refuses(torch.optim.SGD):
    """An optimizer that says on the device whether it refused the step, as Chain does."""

    skipped: Tensor | None = None

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        p = self.param_groups[0]["params"][0]
        self.skipped = ~torch.isfinite(p.grad.sum())
        with torch.no_grad():
            p.copy_(torch.where(self.skipped, p, p - p.grad))


def test_a_refused_step_leaves_the_bits_and_drops_the_reading() -> None:
    layout, seen = fused(H), MaxLogits()
    w = layout.weights[0]
    before = w.detach().clone()
    optimizer = Refuses([w], lr=1.0)
    QKClip([layout.layer], seen.take).attach(optimizer)
    w.grad = torch.full_like(w, math.nan)
    seen.add("a", torch.full((H,), 400.0))
    optimizer.step()
    assert torch.equal(w, before)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w, before), "the reading of the refused step is not used later"
    seen.add("a", torch.full((H,), 400.0))
    optimizer.step()
    assert torch.equal(w[: 2 * H * K], before[: 2 * H * K] * 0.5)


def test_a_chain_that_refuses_a_step_changes_nothing() -> None:
    layout, seen = fused(2), MaxLogits()
    w = layout.weights[0]
    chain = Chain([w], AdamWRule(weight_decay=0.0), lr=0.01)
    QKClip([layout.layer], seen.take, 20.0).attach(chain)
    before = w.detach().clone()
    for value, refused in ((math.nan, True), (0.0, False)):
        seen.add("a", layout.logits())
        w.grad = torch.full_like(w, value)
        chain.step()
        assert torch.equal(w, before) == refused
    assert float(layout.logits().detach().max()) == pytest.approx(20.0, rel=1e-6)


def test_readings_wait_where_step_is_not_called() -> None:
    """A skipped batch was seen by the same weights, so the larger of both counts, once."""
    seen = MaxLogits()
    seen.add("a", torch.tensor([5.0, 300.0]))
    seen.add("a", torch.tensor([7.0, math.nan]))
    seen.add("a", torch.tensor([math.inf, 200.0]))
    assert seen.take()["a"].tolist() == [7.0, 300.0]
    assert seen.take() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e30])
def test_what_is_not_a_large_logit_clips_nothing(value: float) -> None:
    layer = fused(H).layer
    assert torch.equal(gammas(layer, torch.full((H,), value), 100.0), torch.ones(H))


def test_the_hook_can_be_taken_off() -> None:
    layout, seen = fused(H), MaxLogits()
    optimizer = torch.optim.SGD(layout.weights, lr=0.0)
    handle = QKClip([layout.layer], seen.take).attach(optimizer)
    handle.remove()
    before = layout.weights[0].detach().clone()
    layout.weights[0].grad = torch.zeros_like(before)
    seen.add("a", torch.full((H,), 400.0))
    optimizer.step()
    assert torch.equal(layout.weights[0], before)


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_largest_logits(G: int, rows: int) -> None:
    q, k = random(B, T, H, K, seed=1), random(B, T, G, K, seed=2)
    found = largest_logits(q.transpose(1, 2), k.transpose(1, 2), rows=rows)
    np.testing.assert_allclose(found.numpy(), naive_logits(q, k, K**-0.5).numpy(), rtol=1e-6)
    twice = largest_logits(q.transpose(1, 2), k.transpose(1, 2), scale=2 * K**-0.5, rows=rows)
    np.testing.assert_allclose(twice.numpy(), 2 * found.numpy(), rtol=1e-6)


W = torch.zeros(16, 4)
ONE = (HeadRows.even(W, 4, 2),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadRows.even(W, 5, 4), "start at 0 to 16 do not lie in a parameter of 16 rows"),
        (lambda: HeadRows.even(W, 2, 4, first=-1), "start at -1"),
        (lambda: HeadRows.even(W, 0, 4), "0 heads of 4 rows"),
        (lambda: HeadRows.even(W, 2, 0), "2 heads of 0 rows"),
        (lambda: HeadRows.even(W, 2, 4, stride=3), r"start at \[0, 3\] overlap"),
        (lambda: HeadRows.even(W, 2, 4, stride=0), r"start at \[0, 0\] overlap"),
        (lambda: QKLayer("a", (), ONE), "'a' has query pieces with"),
        (lambda: QKLayer("a", ONE, (HeadRows.even(W, 3, 2),)), "4 query and 3 key heads"),
        (lambda: QKLayer("a", (*ONE, HeadRows.even(W, 2, 2)), ONE), r"query pieces with \[2, 4\] heads"),
        (lambda: QKLayer("a", ONE, ONE, (HeadRows.even(W, 2, 2),)), "4 query heads, but 2 rotary"),
        (lambda: QKClip([QKLayer("a", ONE, ONE)], dict, 0.0), "threshold of qk_clip is 0.0"),
        (lambda: QKClip([QKLayer("a", ONE, ONE)], dict, math.nan), "threshold of qk_clip is nan"),
        (lambda: QKClip([], dict), r"called \[\]"),
        (lambda: QKClip([QKLayer("a", ONE, ONE)] * 2, dict), "'a', 'a'"),
        (lambda: QKClip([QKLayer("a", ONE, ONE)], lambda: {"b": torch.ones(4)})(), "reading of 'b'.*layers are a"),
        (lambda: QKClip([QKLayer("a", ONE, ONE)], lambda: {"a": torch.ones(3)})(), "4 query heads, but 3 readings"),
    ],
)
def test_bad_descriptions(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def one_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(1.0, 12 * 3 + 1).view(12, 3)
    for placement in (Shard(0), Shard(1), Replicate()):
        weight = nn.Parameter(distribute_tensor(whole.clone(), mesh, [placement]))
        layer = QKLayer("a", (HeadRows.even(weight, 2, 2),), (HeadRows.even(weight, 1, 2, first=4),))
        seen = MaxLogits(distributed.group.WORLD)
        seen.add("a", torch.tensor([400.0, 50.0] if rank else [10.0, 200.0]))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        QKClip([layer], seen.take).attach(optimizer)
        optimizer.step()
        factor = torch.ones(12)
        factor[0:2], factor[2:4], factor[4:6] = 0.25 / 0.5**0.5, 0.5**0.5, 0.5**0.5
        got = weight.full_tensor().detach()
        assert torch.allclose(got, whole * factor[:, None], rtol=1e-6), (placement, got)
        assert torch.equal(got[6:], whole[6:])
        assert list(weight.placements) == [placement]


@pytest.mark.dist
def test_sharded_weights_and_the_largest_logit_of_all_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)


def test_scale_heads_stands_alone() -> None:
    """What a repair calls: gammas of its own choice, no optimizer, no reading."""
    layout = fused(2)
    before = layout.logits().detach()
    scale_heads(layout.layer, torch.full((H,), 0.5))
    np.testing.assert_allclose(layout.logits().detach().numpy(), before.numpy() / 2, rtol=1e-7)
