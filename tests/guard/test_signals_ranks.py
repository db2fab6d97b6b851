"""The readings over 2 and 4 gloo processes: equal on all ranks, sharded tensors whole, ranks that disagree stopped."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.ranks import Ranks
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from poise.core.types import Signals
from poise.guard.signals.fingerprint import combine_ints, fingerprint
from poise.guard.signals.row import RanksDisagree
from poise.guard.signals.tracker import Tracker
from poise.guard.signals.weights import weight_readings

pytestmark = pytest.mark.dist

STEPS = 4


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"embed": nn.Embedding(9, 6), "layers": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner["embed"](ids)
        for layer in self.inner["layers"]:
            x = x + layer(x).tanh()
        return x.square().mean()


def ids_of(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 9, (4,), generator=torch.Generator().manual_seed(100 * step + rank))


def run(model: nn.Module, net: nn.Module, ranks: list[int], steps: int = STEPS) -> tuple[Tracker, list[Signals]]:
    """Train; ``ranks`` are those whose data this process sees."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95))
    tracker, seen = Tracker(net, optimizer), []
    for step in range(1, steps + 1):
        losses = [model(ids_of(step, rank)) for rank in ranks]
        torch.stack(losses).mean().backward()
        marks = [fingerprint(ids_of(step, rank)) for rank in ranks]
        extra: dict[str, Any] = {"fingerprint": marks[0]} if len(ranks) == 1 else {}
        seen.append(tracker.read(losses, step, 1e-2, extra=extra, token=5))
        optimizer.step()
        optimizer.zero_grad()
    return tracker, seen


def close(a: Signals, b: Signals) -> bool:
    assert a.extra.keys() - {"fingerprint"} == b.extra.keys() - {"fingerprint"}
    pairs = [(a.loss, b.loss), (a.grad_norm, b.grad_norm)]
    pairs += [(a.extra[name], b.extra[name]) for name in b.extra if name != "fingerprint"]
    return all(math.isclose(x, y, rel_tol=2e-3, abs_tol=1e-7) for x, y in pairs)


def fails(tracker: Tracker, text: str, step: int, token: int) -> None:
    try:
        tracker.read([1.0], step, 1e-2, token=token)
    except RanksDisagree as error:
        assert text in str(error), error
    else:
        raise AssertionError("ranks that disagree went on")


def one_rank(rank: int, size: int, alone: list[Signals], expected: dict[str, float]) -> list[str]:
    net = Net()
    with pytest.MonkeyPatch.context() as patch:
        counted = count_collectives(patch)
        data_parallel, whole = run(DistributedDataParallel(net), net, [rank])
    assert counted == {"all_gather": STEPS, "all_gather_object": 1}, counted
    sharded_net = Net()
    if size == 2:
        mesh = init_device_mesh("cpu", (2,))
    else:  # each part is held by two ranks
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in sharded_net.inner["layers"]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded_net, mesh=mesh)
    sharded, parts = run(sharded_net, sharded_net, [rank])
    for one, two, reference in zip(whole, parts, alone, strict=True):
        assert close(one, reference), (one, reference)
        assert close(two, reference), (two, reference)
        step = reference.step
        prints = [int(fingerprint(ids_of(step, other))) for other in range(size)]
        assert one.extra["fingerprint"] == two.extra["fingerprint"] == combine_ints(prints)
    for model in (net, sharded_net):
        found = {name: float(value) for name, value in weight_readings(model).items()}
        assert all(math.isclose(found[name], expected[name], rel_tol=1e-3) for name in expected), (found, expected)

    # NaN in one rank's part only: all know it, and where.
    torch.stack([sharded_net(ids_of(9, rank))]).mean().backward()
    if rank == size - 1:
        grad = sharded_net.inner["layers"][1].weight.grad
        assert grad is not None
        grad.to_local()[0, 0] = math.nan
    bad = sharded.read([1.0], STEPS + 1, 1e-2, token=5)
    assert math.isnan(bad.grad_norm) and bad.extra["nonfinite"] == 1.0
    assert bad.places("nonfinite") == {"block.1": 1.0} and math.isfinite(bad.extra["grad_norm@block.0"])
    lost = data_parallel.read([math.nan if rank == 0 else 1.0], STEPS + 1, 1e-2, token=5)
    assert math.isnan(lost.loss) and "loss_spread" not in lost.extra

    # What is saved together gives the next reading after a restart; saved alone, sharded weights lack it.
    together, single = sharded.state_dict(together=True), sharded.state_dict()
    assert single["since"] is None and together["since"] is not None
    assert data_parallel.state_dict()["since"] is not None

    fails(data_parallel, f"step {STEPS + 2}: the ranks decided differently", STEPS + 2, 5 + (rank == 0))
    fails(data_parallel, "the ranks are at different steps (rank 0: 9, rank 1: 10", 9 + rank, 5)
    return [repr((one.loss, one.grad_norm, sorted(one.extra.items()))) for one in (*whole, *parts, bad, lost)]


def count_collectives(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count what the readings say to other ranks. (What DDP and FSDP say goes other ways.)"""
    counted: dict[str, int] = {}
    for name in ("all_gather", "all_gather_object"):
        original = getattr(distributed, name)

        def call(*arguments: Any, name: str = name, original: Any = original) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return original(*arguments)

        patch.setattr(distributed, name, call)
    return counted


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_read_the_same(size: int, two_ranks: Ranks) -> None:
    whole_net = Net()
    _, alone = run(whole_net, whole_net, list(range(size)))
    expected = {name: float(value) for name, value in weight_readings(whole_net).items()}
    with nullcontext(two_ranks) if size == 2 else Ranks(size) as ranks:
        records = ranks.run(one_rank, size, alone, expected)
    assert all(record == records[0] for record in records) and len(records[0]) == 2 * STEPS + 2
