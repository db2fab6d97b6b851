"""The chain over two processes: sharded weights (DTensor) give the norm and the update of whole ones."""

from __future__ import annotations

import math

import pytest
import torch
from tests.ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from poise.optim.chain import Chain
from poise.optim.rules.adamw import AdamWRule
from poise.optim.shape.clip_global_norm import ClipGlobalNorm

pytestmark = pytest.mark.dist

SHAPES = [(6, 4), (5,), (3, 2)]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def whole_run() -> list[torch.Tensor]:
    params = [nn.Parameter(t) for t in tensors(0)]
    optimizer = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 4):
        for p, grad in zip(params, tensors(step), strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
    return [p.detach() for p in params]


def one_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for path in ("auto", "plain", "fused"):
        # the last tensor stays whole: a model may have both kinds
        spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors(0)[:2]] + tensors(0)[2:]
        params = [nn.Parameter(t) for t in spread]
        optimizer = Chain(params, ClipGlobalNorm(0.5), AdamWRule(), lr=0.01, path=path)
        for step in range(1, 5):
            for p, grad in zip(params, tensors(step), strict=True):
                p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(p, DTensor) else grad
            if step == 4:  # NaN in one rank's shard only: no rank may move
                before = [full(p).clone() for p in params]
                if rank == 1:
                    params[0].grad.to_local()[0, 0] = math.nan
            norm = optimizer.measure()
            expected = torch.cat([grad.flatten() for grad in tensors(step)]).norm()
            assert not isinstance(norm, DTensor)
            assert norm.isnan() if step == 4 else torch.allclose(norm, expected)
            optimizer.step()
        assert bool(optimizer.skipped)
        for p, old, reference in zip(params, before, whole_run(), strict=True):
            assert torch.equal(full(p), old)
            assert torch.allclose(full(p), reference, rtol=1e-5, atol=1e-7)


def full(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def test_sharded_equals_whole(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)
