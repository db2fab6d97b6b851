"""Sharding a model over ranks with FSDP2: each rank holds a part of every parameter, moment and gradient.

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277;
``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from poise.hardware.distributed import World


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World, param_dtype: torch.dtype) -> nn.Module:
    """Shard each block and then the rest of the model, in place, and return it; alone, do nothing.

    Parameters are gathered block by block in ``param_dtype`` for the computation; the sharded originals
    keep their dtype. Gradients are summed over ranks in float32, since a sum of many bfloat16 terms
    loses the small ones. Make the optimizer afterwards: parameters become DTensors.
    """
    if world.size == 1:
        return model
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
