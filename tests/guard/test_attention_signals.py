"""Attention readings against a plain float64 computation, and what the intercept sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.guard.signals import attention
from poise.guard.signals.attention import AttentionTally, Intercept, tally_logits, tally_queries_keys

NAMES = ("attn_logit_max", "attn_entropy", "first_token")


def plain(z_BHTS: np.ndarray, visible_BHTS: np.ndarray) -> dict[str, float]:
    """The definitions, one query at a time, in float64."""
    top, entropies, firsts = -np.inf, [], []
    for z_S, visible_S in zip(z_BHTS.reshape(-1, z_BHTS.shape[-1]), visible_BHTS.reshape(-1, z_BHTS.shape[-1])):  # noqa: B905
        if not visible_S.any():
            continue
        top = max(top, z_S[visible_S].max())
        p_S = np.where(visible_S, np.exp(z_S - z_S[visible_S].max()), 0.0)
        p_S /= p_S.sum()
        n = int(visible_S.sum())
        if n >= 2:
            seen = p_S[p_S > 0]
            entropies.append(-(seen * np.log(seen)).sum() / np.log(n))
            firsts.append(p_S[0])
    return dict(zip(NAMES, (top, np.mean(entropies), np.mean(firsts)), strict=True))


def logits_of(q: Tensor, k: Tensor, scale: float) -> np.ndarray:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return np.einsum("bhtk,bhsk->bhts", q.double().numpy(), k.double().numpy()) * scale


def near(tally: AttentionTally, expected: dict[str, float], tolerance: float = 2e-5) -> None:
    found = tally.readings()
    assert {name: float(found[name]) for name in NAMES} == pytest.approx(expected, rel=tolerance, abs=tolerance)


def pair(B: int = 2, H: int = 4, G: int = 2, T: int = 13, S: int = 13, K: int = 8, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, H, T, K, generator=generator), 2 * torch.randn(B, G, S, K, generator=generator)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.integers(2, 17), st.integers(1, 300))
def test_causal_grouped_attention_matches_float64_for_any_block_size(
    B: int, heads: tuple[int, int], T: int, budget: int
) -> None:
    q, k = pair(B=B, H=heads[0], G=heads[1], T=T, S=T, seed=T)
    tally = AttentionTally()
    tally_queries_keys(tally, q, k, causal=True, budget=budget)
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, heads[0], T, T))
    near(tally, plain(logits_of(q, k, 8**-0.5), visible))


@pytest.mark.parametrize("kind", ["bool", "added", "added_min", "per_key", "per_head"])
@pytest.mark.parametrize("budget", [1 << 20, 200])
def test_masks_scales_and_cross_lengths(kind: str, budget: int) -> None:
    q, k = pair(T=9, S=13)
    shape = {"per_key": (2, 1, 1, 13), "per_head": (2, 4, 9, 13)}.get(kind, (9, 13))
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    hidden = torch.finfo(torch.float32).min if kind == "added_min" else float("-inf")
    mask = visible if kind == "bool" else bias.masked_fill(~visible, hidden)
    tally = AttentionTally()
    tally_queries_keys(tally, q, k, scale=0.7, mask=mask, budget=budget)
    z = logits_of(q, k, 0.7) + (0.0 if kind == "bool" else bias.double().numpy())
    near(tally, plain(z, np.broadcast_to(visible.numpy(), z.shape)))


def test_queries_without_any_visible_key_are_left_out() -> None:
    q, k = pair(H=2, G=2, T=5, S=5)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    visible[2] = False
    tally = AttentionTally()
    tally_queries_keys(tally, q, k, mask=visible)
    near(tally, plain(logits_of(q, k, 8**-0.5), np.broadcast_to(visible.numpy(), (2, 2, 5, 5))))


def test_logits_of_an_eager_model_and_fp16_masks() -> None:
    q, k = pair()
    z = torch.from_numpy(logits_of(q, k, 0.3)).float()
    visible = torch.ones(13, 13, dtype=torch.bool).tril()
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-3)):
        tally = AttentionTally()
        masked = z.to(dtype) + torch.zeros(13, 13, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        tally_logits(tally, masked, budget=100)
        near(tally, plain(z.double().numpy(), np.broadcast_to(visible.numpy(), z.shape)), tolerance)


def test_extremes_uniform_and_one_hot_and_nan() -> None:
    uniform, sharp, broken = AttentionTally(), AttentionTally(), AttentionTally()
    tally_logits(uniform, torch.zeros(1, 2, 3, 5))
    near(uniform, {"attn_logit_max": 0.0, "attn_entropy": 1.0, "first_token": 0.2})
    one_hot = torch.zeros(1, 2, 3, 5)
    one_hot[..., 0] = 1e5
    tally_logits(sharp, one_hot)
    near(sharp, {"attn_logit_max": 1e5, "attn_entropy": 0.0, "first_token": 1.0})
    one_hot[0, 0, 0, 3] = float("nan")
    tally_logits(broken, one_hot)
    assert all(torch.isnan(value) for value in broken.readings().values())


def test_never_holds_all_logits_of_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    add = AttentionTally.add

    def spy(self: AttentionTally, logits: Tensor) -> None:
        sizes.append(logits.numel())
        add(self, logits)

    monkeypatch.setattr(AttentionTally, "add", spy)
    q, k = pair(B=1, H=4, G=4, T=1024, S=1024)
    tally_queries_keys(AttentionTally(), q, k, causal=True)
    assert max(sizes) <= attention.BUDGET["cpu"] < 4 * 1024 * 1024
    # Causal blocks skip the keys that nobody in the block may see, so little more than half is computed.
    assert sum(sizes) < 0.6 * 4 * 1024 * 1024


def test_intercept_sees_arguments_in_every_spelling_and_changes_nothing() -> None:
    q, k = pair(H=2, G=2)
    seen: list[Any] = []
    logits: list[Any] = []
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.5)
    with Intercept(lambda *arguments: seen.append(arguments), logits.append):
        found = F.scaled_dot_product_attention(q, k, value=k, is_causal=True, scale=0.5)
        F.scaled_dot_product_attention(query=q, key=k, value=k, attn_mask=torch.ones(13, 13, dtype=torch.bool))
        F.scaled_dot_product_attention(q, k, k, None, 0.0, True)
        z = q @ k.mT
        for softmax in (torch.softmax, F.softmax):
            softmax(z, -1)
            softmax(z, dim=3, dtype=torch.float64)
        z.softmax(-1)
        torch.nn.Softmax(dim=-1)(z)
        torch.softmax(z, 1)  # over heads: not attention
        torch.softmax(z[0], -1)  # three dimensions: not attention
    assert torch.equal(expected, found)
    assert [(scale, causal) for _, _, scale, causal, _ in seen] == [(0.5, True), (None, False), (None, True)]
    assert seen[1][4] is not None and seen[2][4] is None
    assert len(logits) == 6 and all(value is z for value in logits)
    F.scaled_dot_product_attention(q, k, k)
    assert len(seen) == 3
