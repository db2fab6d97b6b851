"""Attention in blocks and in flex: equal to the formula written out, in little memory, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poise.model.blockwise import BLOCK_BYTES, BLOCK_ROWS, Maps, blockwise_attention
from poise.model.flex import causal_mask, changed_attention, flex_core
from poise.model.methods import apply_methods
from poise.model.paths import attention_path
from poise.model.presets import preset
from poise.model.spec import Part

Core = Callable[..., Tensor]

CHANGES = {
    "plain": (Maps(0.5), False),
    "cap": (Maps(0.5, cap=2.0), False),
    "clip": (Maps(0.5, zeta=1.03, gamma=-0.03), False),
    "sink": (Maps(0.5), True),
    "cap and sink": (Maps(0.5, cap=3.0), True),
    "all": (Maps(0.5, cap=3.0, zeta=1.2, gamma=-0.1), True),
}


def dense(q: Tensor, k: Tensor, v: Tensor, maps: Maps, sink: Tensor | None = None) -> Tensor:
    """The formula, with all scores at once and torch's own gradients."""
    shared, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    z = maps.scale * (q @ k.mT)
    if maps.cap:
        z = maps.cap * torch.tanh(z / maps.cap)
    z = z.masked_fill(torch.ones(T, T, dtype=torch.bool, device=z.device).triu(1), float("-inf"))
    if sink is not None:
        z = torch.cat([z, sink[None, :, None, None].expand(*z.shape[:3], 1)], -1)
    p = z.softmax(-1)[..., :T]
    return (p * (maps.zeta - maps.gamma) + maps.gamma).clamp(0, 1) @ v


def inputs(
    B: int, H: int, G: int, T: int, K: int, sink: bool, seed: int = 0, size: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values and perhaps sinks in float64, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, K), (B, G, T, K), (B, G, T, K)] + [(H,)] * sink
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[0] *= size
    return tensors, torch.randn((B, H, T, K), generator=generator, dtype=torch.float64)


def outcome(core: Core, tensors: list[Tensor], dout: Tensor, maps: Maps, *rest: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = core(*leaves[:3], maps, *(leaves[3:] or [None]), *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def furthest(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest error, relative to the largest element of its tensor."""
    assert len(got) == len(wanted)
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("budget", [None, 30_000, 1])
@pytest.mark.parametrize("name", CHANGES)
def test_equals_the_formula_in_float64(name: str, budget: int | None) -> None:
    maps, sink = CHANGES[name]
    tensors, dout = inputs(2, 4, 2, 2 * BLOCK_ROWS + 7 if budget != 1 else 9, 8, sink)
    wanted = outcome(dense, tensors, dout, maps)
    got = outcome(blockwise_attention, tensors, dout, maps, budget)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(CHANGES)),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(1, 80),
    st.integers(1, 12),
    st.integers(1, 100_000),
)
def test_equals_the_formula_for_any_shape_and_budget(
    name: str, sizes: tuple[int, int, int], T: int, K: int, budget: int
) -> None:
    maps, sink = CHANGES[name]
    B, G, R = sizes
    tensors, dout = inputs(B, G * R, G, T, K, sink, seed=T)
    got, wanted = outcome(blockwise_attention, tensors, dout, maps, budget), outcome(dense, tensors, dout, maps)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_error_in_training_dtypes(name: str, dtype: torch.dtype, bound: float) -> None:
    maps, sink = CHANGES[name]
    tensors, dout = inputs(1, 4, 2, 100, 16, sink)
    low = [*(x.to(dtype) for x in tensors[:3]), *(x.float() for x in tensors[3:])]  # sinks are parameters, in fp32
    wanted = outcome(dense, [x.double() for x in low], dout.to(dtype).double(), maps)
    got = outcome(blockwise_attention, low, dout.to(dtype), maps)
    assert [x.dtype for x in got] == [dtype, *(x.dtype for x in low)]
    assert furthest(got, wanted) < bound


def test_large_logits_are_not_rounded_to_bf16() -> None:
    # Logits of about 30 are multiples of 1/8 in bf16: a tenth of a weight.
    maps = Maps(1.0, cap=50.0)
    tensors, dout = inputs(1, 2, 2, 64, 32, False, size=6.0)
    low = [x.bfloat16() for x in tensors]
    wanted = outcome(dense, [x.double() for x in low], dout.bfloat16().double(), maps)[:1]
    ours = furthest(outcome(blockwise_attention, low, dout.bfloat16(), maps)[:1], wanted)
    rounded = furthest(outcome(dense, low, dout.bfloat16(), maps)[:1], wanted)
    assert ours < 5e-3 < 3e-2 < rounded


class Largest(TorchDispatchMode):
    """Notes the largest tensor, in bytes, that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


@pytest.mark.parametrize("name", ["cap", "clip", "sink"])
def test_scores_of_all_heads_never_exist(name: str) -> None:
    maps, sink = CHANGES[name]
    B, H, T, K = 1, 8, 1024, 16
    tensors, dout = inputs(B, H, 4, T, K, sink)
    low, dlow = [x.float() for x in tensors], dout.float()
    kept: list[Tensor] = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outcome(blockwise_attention, low, dlow, maps)
    queries = 4 * B * H * T * K
    assert largest.bytes == max(BLOCK_BYTES["cpu"], queries) < 4 * B * H * T * T / 16
    # Queries, keys and values (half the heads each), the output, and the sinks.
    assert sum(x.numel() * x.element_size() for x in kept) == 3 * queries + 4 * H * sink
    with Largest() as largest:
        outcome(dense, low, dlow, maps)
    assert largest.bytes >= 4 * B * H * T * T


def test_only_first_gradients() -> None:
    tensors, dout = inputs(1, 2, 1, 5, 4, True)
    leaves = [x.requires_grad_() for x in tensors]
    out = blockwise_attention(*leaves[:3], Maps(0.5, cap=2.0), leaves[3])
    (first,) = torch.autograd.grad(out, leaves[0], dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_compiles_to_one_graph_with_the_same_bits() -> None:
    maps, sink = CHANGES["all"]
    tensors, dout = inputs(1, 4, 2, 70, 8, sink)
    compiled = torch.compile(blockwise_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    eager, got = outcome(blockwise_attention, tensors, dout, maps), outcome(compiled, tensors, dout, maps)
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))


@pytest.mark.parametrize("T", [1, 100, 128, 300, 512])
def test_flex_mask_is_causal(T: int) -> None:
    mask, M = causal_mask(T, torch.device("cpu")), -(-T // 128)
    cut, whole = torch.zeros(M, M, dtype=torch.int), torch.zeros(M, M, dtype=torch.int)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for row in range(M):
        cut[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] += 1
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] += 1
    sees = torch.zeros(M * 128, M * 128, dtype=torch.bool)
    sees[:T, :T] = torch.ones(T, T, dtype=torch.bool).tril()
    tiles = sees.view(M, 128, M, 128).transpose(1, 2).flatten(2)
    # Every block that is seen at all is listed once, and none is called whole that is not.
    assert (cut + whole <= 1).all()
    assert ((cut + whole).bool() | ~tiles.any(-1)).all()
    assert (tiles.all(-1) | ~whole.bool()).all()
    assert (cut + whole).sum() == M * (M + 1) // 2
    assert mask.shape == (1, 1, T, T)


@pytest.mark.parametrize(("cap", "sink"), [(2.0, False), (0.0, True)])
def test_flex_path_equals_the_formula(cap: float, sink: bool) -> None:
    # On a CPU flex has no backward, and eager it warns; its own CPU form goes through the same trace as on a GPU.
    tensors, _ = inputs(1, 4, 2, 150, 16, sink)
    low = [x.float() for x in tensors]
    core = torch.compile(flex_core, backend="eager", fullgraph=True, dynamic=False)
    got = core(*low[:3], 0.5, cap, low[3] if sink else None)
    wanted = dense(*tensors[:3], Maps(0.5, cap=cap), tensors[3] if sink else None)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["cap", "clip", "sink", "cap and sink"])
@pytest.mark.parametrize("T", [256, 300])
def test_gpu_path_equals_the_formula(name: str, T: int) -> None:
    maps, sink = CHANGES[name]
    tensors, dout = (x for x in inputs(2, 4, 2, T, 64, sink))
    low = [*(x.cuda().bfloat16() for x in tensors[:3]), *(x.cuda().float() for x in tensors[3:])]
    maps = replace(maps, scale=0.125)
    wanted = outcome(dense, [x.double() for x in low], dout.cuda().bfloat16().double(), maps)
    assert furthest(outcome(changed_attention, low, dout.cuda().bfloat16(), maps), wanted) < 2e-2


def test_paths_in_words() -> None:
    spec = preset("7m")
    capped, clipped, sunk = (apply_methods(spec, [name]) for name in ("soft_cap", "soft_clip", "attention_sink"))
    bf16 = torch.bfloat16
    assert "SDPA" in attention_path(spec) and "SDPA" in attention_path(spec, "cuda:0", bf16)
    assert "matrix products" in attention_path(spec, "cpu", bf16, 256)
    assert "SDPA" in attention_path(spec, "cpu", bf16, 4096)
    assert attention_path(apply_methods(spec, ["soft_temp"])) == attention_path(spec)
    assert "no cap of logits, and flex_attention has no backward on a CPU" in attention_path(capped)
    assert "flex_attention kernel" in attention_path(capped, "cuda", bf16)
    assert "no sink" in attention_path(sunk, "cuda") and "Blocks" in attention_path(sunk, "cuda", torch.float64)
    assert "no fused kernel can change probabilities" in attention_path(clipped, "cuda", bf16)
    narrow = replace(capped, n_heads=spec.d_model // 8, n_kv_heads=1)
    assert "heads of width 16 or more" in attention_path(narrow, "cuda", bf16)
    assert replace(spec, scores=Part("soft_cap", (("cap", 50.0),))).scores == capped.scores
