"""A chain's state goes through FSDP2 on 2, 1 and 4 processes and ends where one process would have ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.ranks import Ranks
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from poise.optim.chain import Chain
from poise.optim.rules.adamw import AdamWRule
from poise.optim.rules.spam import SpamRule
from poise.optim.rules.stable_adamw import StableAdamWRule
from poise.optim.rules.stable_spam import StableSpamRule
from poise.optim.shape.adaclip import AdaClip
from poise.optim.shape.adagc import AdaGC
from poise.optim.shape.adagn import AdaGN
from poise.optim.shape.zclip import ZClip
from poise.optim.transform import Link
from poise.optim.weights.stochastic_rounding import StochasticRounding
from poise.optim.wrap.moment_reset import MomentReset

pytestmark = pytest.mark.dist

CHAINS: dict[str, tuple[Link, ...]] = {
    "zclip": (ZClip(warmup=3), AdaGC(warmup=3), AdamWRule()),
    "spam": (SpamRule(reset_every=5, warmup=2, grace=1),),
    "stable_spam": (AdaClip(), AdaGN(), MomentReset(StableSpamRule(), every=4, warmup=1)),
    "stable_adamw": (StableAdamWRule(),),
    "reset": (MomentReset(AdamWRule(), every=4, warmup=2),),
    "rounded": (AdamWRule(), StochasticRounding(seed=3)),
}
WORLDS = (2, 1, 4)
STEPS = 3


class Net(nn.Module):
    """Two matrices of which one does not divide by 4, a vector, and a tied one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10, dtype=dtype)
        self.second = nn.Linear(10, 6, bias=False, dtype=dtype)
        self.tied = self.second


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    scale = 40.0 if step == 5 else 1.0
    return scale * torch.randn(shape, generator=generator)


def steps(net: Net, chain: Chain, begin: int) -> None:
    for step in range(begin, begin + STEPS):
        for name, p in net.named_parameters():
            grad = gradient(name, p.shape, step).to(p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        chain.step()
        chain.zero_grad()


def make(kind: str) -> tuple[Net, Chain]:
    net = Net(torch.bfloat16 if kind == "rounded" else torch.float32)
    return net, Chain(net.named_parameters(), *CHAINS[kind], lr=0.01)


def one_rank(rank: int, world: int, part: int, folder: str) -> None:
    for kind in CHAINS:
        net, _ = make(kind)
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        chain = Chain(net.named_parameters(), *CHAINS[kind], lr=0.01)
        if part:
            state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, chain)}
            checkpoint.load(state, checkpoint_id=f"{folder}/{kind}-{part - 1}")
            set_model_state_dict(net, state["model"])
            set_optimizer_state_dict(net, chain, state["optimizer"])
        steps(net, chain, 1 + part * STEPS)
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, chain)}
        checkpoint.save(state, checkpoint_id=f"{folder}/{kind}-{part}")
        if part == len(WORLDS) - 1:
            whole = {name: p.full_tensor() for name, p in net.named_parameters()}
            if rank == 0:
                torch.save(whole, f"{folder}/{kind}.pt")


@pytest.mark.slow
def test_two_one_four(tmp_path: Path) -> None:
    for part, world in enumerate(WORLDS):
        with Ranks(world) as ranks:
            ranks.run(one_rank, world, part, str(tmp_path))
    for kind in CHAINS:
        net, chain = make(kind)
        for part in range(len(WORLDS)):
            steps(net, chain, 1 + part * STEPS)
        found = torch.load(tmp_path / f"{kind}.pt")
        for name, p in net.named_parameters():
            error = (found[name].float() - p.detach().float()).abs().max() / p.detach().float().abs().max()
            assert error <= (0.0 if kind == "rounded" else 1e-6), (kind, name, float(error))
