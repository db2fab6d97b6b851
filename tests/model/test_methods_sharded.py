"""Every method over two processes (FSDP2, gloo): loss and gradients are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.model.test_method_pairs import SMALL, WORDS
from tests.ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.hardware import sharding
from poise.hardware.distributed import World
from poise.model.build import build
from poise.model.methods import METHODS, apply_methods

pytestmark = pytest.mark.dist


def step(name: str, rank: int | None) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one training step's forward and backward, as whole tensors.

    ``rank`` ``None`` is one process with both sequences; else each process has one and the model is sharded.
    """
    model = build(apply_methods(SMALL, [WORDS.get(name, name)]), seed=0)
    if rank is not None:
        world = World(rank, 2, torch.device("cpu"), rank)
        sharding.shard(model, list(model.trunk.blocks), world, torch.float32)
    ids_BT = torch.arange(10).view(2, 5) % 13
    mine = slice(None) if rank is None else slice(rank, rank + 1)
    out = model(ids_BT[mine], ((ids_BT * 7 + 1) % 13)[mine])
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in model.state_dict().items() if name not in dict(model.named_parameters())}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in found.items()}


def process(rank: int, folder: str) -> None:
    found = {}
    for name in METHODS:
        try:
            found[name] = step(name, rank)
        except Exception as error:  # said by the test, with the name
            found[name] = {"failed": repr(error)}
            break
    torch.save(found, Path(folder) / f"{rank}.pt")


def test_two_processes_compute_what_one_does(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(process, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in METHODS:
        alone = step(name, None)
        for rank in ranks:
            assert "failed" not in rank[name], f"{name}: {rank[name]}"
            assert rank[name].keys() == alone.keys(), name
            for key, value in alone.items():
                torch.testing.assert_close(
                    rank[name][key], value, rtol=2e-5, atol=2e-6, msg=lambda m, at=(name, key): f"{at}: {m}"
                )
