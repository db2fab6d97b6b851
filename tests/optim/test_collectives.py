"""Every optimizer over two processes: as few collectives a step as are promised, and what one process computes.

Weights are sharded evenly and unevenly, replicated, whole, and on a mesh of two dimensions, side by side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.optim.test_every_optimizer import EVERY, set_gradients
from tests.ranks import Ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import poise.optim as po
from poise.optim.chain import Chain

pytestmark = pytest.mark.dist

STEPS = 8
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (6, 4),
    "hidden.weight": (5, 7),
    "bias": (7,),
    "scale": (),
    "columns.weight": (3, 4),
}

PROMISED: dict[str, tuple[Any, int, int]] = {
    "AdaGC": (lambda p: po.AdamW(p, links=(po.AdaGC(),)), 1, 1),
    "ZClip": (lambda p: po.AdamW(p, links=(po.ZClip(),)), 1, 1),
    "SPAM": (po.SPAM, 1, 1),
    "StableAdamW": (po.StableAdamW, 1, 2),
    "StableSPAM": (po.StableSPAM, 2, 2),
    "AdamW": (po.AdamW, 1, 1),
    "Lion, clipped": (lambda p: po.Lion(p, links=(po.ClipGlobalNorm(1.0),)), 1, 1),
}
"""Most collectives in a step, and in a step and the ``measure`` before it."""


VARIANTS = frozenset({"AdamW coupled", "AdamW independent", "SPAM without resets"})
"""Settings of what is compared anyway, which differ in arithmetic on single elements only."""


def whole() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """Return all ranks in a line and in a plane."""
    return init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))


def part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Return this rank's part of what every rank has; nothing is sent."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def spread(params: dict[str, nn.Parameter], line: DeviceMesh, plane: DeviceMesh) -> dict[str, nn.Parameter]:
    """Return the same weights, each in its own way of being spread."""
    where: dict[str, tuple[DeviceMesh, list[Placement]]] = {
        "embed.weight": (line, [Shard(0)]),
        "hidden.weight": (line, [Shard(0)]),  # 3 and 2 rows
        "bias": (line, [Replicate()]),
        "columns.weight": (plane, [Replicate(), Shard(1)]),
    }
    return {
        name: nn.Parameter(part(p.detach().clone(), *where[name]) if name in where else p.detach().clone())
        for name, p in params.items()
    }


def spread_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Give sharded weights their part of the gradients that whole ones get."""
    alone = whole()
    set_gradients(alone, step)
    for name, p in params.items():
        grad = alone[name].grad
        assert grad is not None
        p.grad = part(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def full(p: Any) -> Tensor:
    value: Tensor = p.full_tensor() if isinstance(p, DTensor) else p
    return value.detach()


def local(value: Any) -> Any:
    return value.to_local().detach().clone() if isinstance(value, DTensor) else copy.deepcopy(value)


def bits(params: dict[str, nn.Parameter], optimizer: Chain) -> list[Any]:
    """Return this rank's weights and states."""
    states = [value for p in params.values() for value in optimizer.state[p].values()]
    return [local(value) for value in (*(p.detach() for p in params.values()), *states)]


def count_collectives() -> None:
    mesh = init_device_mesh("cpu", (2,))
    with CommDebugMode() as comm:
        distributed.all_reduce(torch.zeros(2))
    assert comm.get_total_counts() == 1, "the counter counts nothing"
    for name, (make, alone, together) in PROMISED.items():
        params = {key: nn.Parameter(part(p.detach(), mesh, [Shard(0)])) for key, p in whole().items() if p.dim()}
        params["scale"] = whole()["scale"]
        optimizer = make(params.items())
        for step in range(1, 5):
            spread_gradients(params, step)
            measured = step % 2 == 0
            with CommDebugMode() as comm:
                if measured:
                    optimizer.measure()
                optimizer.step()
            assert 1 <= comm.get_total_counts() <= (together if measured else alone), (name, comm.get_comm_counts())


def compare_all() -> None:
    rank = distributed.get_rank()
    line, plane = meshes()
    for name in [name for name in EVERY if name not in VARIANTS]:
        make = EVERY[name]
        alone = whole()
        params = spread(alone, line, plane)
        one, both = make(alone.items(), "auto"), make(params.items(), "auto")
        start = {key: p.detach().clone() for key, p in alone.items()}
        for step in range(1, STEPS + 1):
            spread_gradients(params, step)
            if step == 5:  # in one rank's part only
                before = bits(params, both)
                if rank == 1:
                    grad = params["hidden.weight"].grad
                    assert isinstance(grad, DTensor)
                    grad.to_local()[0, 0] = math.nan
                both.step()
                assert bool(both.skipped), name
                after = bits(params, both)
                assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True)), name
                spread_gradients(params, step)
            set_gradients(alone, step)
            if step % 4 == 2:
                torch.testing.assert_close(both.measure(), one.measure(), rtol=1e-6, atol=0.0)
            both.step()
            one.step()
        for key, p in params.items():
            found, wanted = full(p), alone[key].detach()
            size = max(float(x.abs().max()) for x in (wanted, start[key], wanted - start[key]))
            error = float((found - wanted).abs().max()) / size
            assert error <= 1e-6, (name, key, error)
            assert not torch.equal(found, start[key]), (name, key)


def one_rank(rank: int) -> None:
    count_collectives()
    compare_all()


def test_two_processes(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)
