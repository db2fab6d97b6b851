"""One of several ranks of a small world: shard, train, save, damage, restore; started as torchrun would.

Rank 0 leaves ``whole.pt``, the full state after saving, for the test to compare with a load in one process.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from poise.hardware import distributed, files
from poise.hardware.checkpoint import CheckpointStore, NonFiniteState, SaveFailed
from poise.hardware.sharding import shard
from poise.hardware.state import pack


def build(world):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))
    shard(model, [model[0]], world, torch.float32)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(model, optimizer, world, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        model(torch.randn(6, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def full(tree):
    if isinstance(tree, DTensor):
        return tree.full_tensor().clone()
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def raises(kind, work):
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} on rank {distributed.rank()}")


def check_world(world):
    assert (world.rank, world.size) == (distributed.rank(), 2)
    mean = distributed.mean_over_ranks(torch.tensor([1.0, world.rank]))
    assert mean.tolist() == [1.0, 0.5]
    assert distributed.all_agree("same")
    assert not distributed.all_agree(f"rank {world.rank}")
    assert distributed.broadcast(world.rank) == 0
    assert distributed.gather(world.rank) == [0, 1]


def check_checkpoints(world, folder):
    model, optimizer = build(world)
    assert isinstance(model[0].weight, DTensor)
    store = CheckpointStore(folder / "c")
    train(model, optimizer, world, range(1, 3))
    store.save(2, pack(model, optimizer), {"rank0": world.rank == 0})
    saved = full(pack(model, optimizer))
    if world.rank == 0:
        torch.save(saved, folder / "whole.pt")
    train(model, optimizer, world, range(3, 5))
    store.save(4, pack(model, optimizer), {})
    straight = full(pack(model, optimizer))

    # A part of one rank is damaged: both fall back to step 2, and continue bit for bit.
    if world.rank == 0:
        part = folder / "c" / "step-00000004" / "__1_0.distcp"
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 4
        part.write_bytes(data)
    distributed.barrier()
    fresh, second = build(world)
    loaded = store.restore(fresh, second)
    assert loaded.step == 2
    assert loaded.meta == {"rank0": True}
    assert "__1_0.distcp is damaged" in loaded.rejected[0]
    assert equal(full(pack(fresh, second)), saved)
    train(fresh, second, world, range(3, 5))
    assert equal(full(pack(fresh, second)), straight), "the continuation differs"

    # What goes wrong on one rank is the same exception on all, and nothing is left.
    poisoned = {"x": torch.tensor([1.0, float("nan") if world.rank == 1 else 2.0])}
    assert "'x'" in raises(NonFiniteState, lambda: store.save(5, poisoned, {}))
    if world.rank == 1:
        files.manifest.hash_file = broken_disk
    message = raises(SaveFailed, lambda: store.save(6, pack(fresh, second), {}))
    assert message.endswith("Input/output error (rank 1)"), message
    assert store.steps() == [2]
    assert not list(store.folder.glob("*partial*"))


def broken_disk(path, sync=False):
    raise OSError(5, "Input/output error")


def one_rank(rank, folder):
    world = distributed.init("cpu", timeout_s=60)
    assert world.rank == rank
    check_world(world)
    check_checkpoints(world, folder)
    distributed.leave(0)
