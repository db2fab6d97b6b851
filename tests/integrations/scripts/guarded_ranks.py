"""One of several ranks: DDP or FSDP2, one rank sees a bad value, all ranks have to give the same answer.

``bad_gradient``: NaN in one element of the last rank's shard of a gradient. ``bad_loss``: that rank's loss is NaN.
``spoilt``: a weight becomes NaN between two steps, so that all ranks have to go back to a copy in memory.
"""

import math

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from poise.guard.guard import Guard
from poise.integrations.plain import SnapshotHost

STEPS, BAD = 20, 8


def build(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 1))  # shards of unequal size, some empty
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def spoil(model, rank, world):
    """Put NaN into one element of one weight's gradient on the last rank only."""
    grad = local(next(iter(model.parameters())).grad)
    if rank == world - 1 and grad.numel():
        grad[0, 0] = math.nan


def values(model, optimizer):
    moments = [v for state in optimizer.state.values() for v in state.values()]
    return [local(t.detach()).clone() for t in [*model.parameters(), *moments]]


def finite_everywhere(tensors):
    flag = torch.tensor(int(all(bool(torch.isfinite(t).all()) for t in tensors)))
    distributed.all_reduce(flag, distributed.ReduceOp.MIN)
    return bool(flag)


def check(kind, fault):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    host = SnapshotHost(model, optimizer, every=4) if fault == "spoilt" else None
    guard = host.guard() if host else Guard.for_run(model, optimizer)
    answers, stayed = [], []
    for step in range(STEPS if host is None else 3 * STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        before = values(model, optimizer)
        seen = loss.detach()
        if step == BAD and fault == "bad_gradient":
            spoil(model, rank, world)
        if step == BAD and fault == "bad_loss" and rank == world - 1:
            seen = seen * math.nan
        answers.append(guard.allows(seen))
        if answers[-1]:
            optimizer.step()
        optimizer.zero_grad()
        stayed.append(all(torch.equal(a, b) for a, b in zip(before, values(model, optimizer), strict=False)))
        if step == BAD and host:
            weight = local(next(iter(model.parameters())).detach())
            if (rank == world - 1 or kind == "ddp") and weight.numel():
                weight[0, 0] = math.nan

    every = [None] * world
    distributed.all_gather_object(every, answers)
    assert all(other == answers for other in every), every
    assert finite_everywhere(values(model, optimizer))
    if host is None:
        assert answers == [step != BAD for step in range(STEPS)], answers
        assert stayed == [step == BAD for step in range(STEPS)], stayed
    else:
        assert answers[-10:] == [True] * 10, answers
        assert not all(answers)
        steps = [None] * world
        distributed.all_gather_object(steps, host.steps)
        assert all(other == host.steps for other in steps), steps


def one_rank(rank, kinds, faults):
    for kind in kinds:
        for fault in faults:
            check(kind, fault)
