"""Starting a world of processes, and the few things all ranks say to each other outside the model.

Everything here also works in one process without a process group, so that callers need no second path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from poise.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """Who this process is.

    Attributes:
        rank: number of this process, from 0; rank 0 writes the files.
        size: number of processes.
        device: where this process computes.
        local_rank: number of this process on its machine.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int


def init(device: Literal["auto", "cpu", "cuda"] = "auto", timeout_s: float = 1800.0) -> World:
    """Join the world that ``torchrun`` describes in the environment; alone, do nothing.

    The backend is gloo on CPUs; on GPUs nccl, with gloo beside it for small objects.

    Raises:
        UserError: CUDA is asked for and absent, or the environment describes half a world.
    """
    env = _torchrun(os.environ)
    rank, size, local_rank = env or (0, 1, 0)
    place = _device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    return World(rank, size, place, local_rank)


def _torchrun(env: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Read (rank, world size, local rank); None where there is no world."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    try:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", rank))
    except KeyError as error:
        raise UserError(
            f"the environment has only a part of a world: {error.args[0]} is not set; start with torchrun"
        ) from None
    except ValueError:
        raise UserError(
            f"RANK={env['RANK']!r} and WORLD_SIZE={env['WORLD_SIZE']!r} must be whole numbers; start with torchrun"
        ) from None
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank}, but must be from 0 to WORLD_SIZE - 1 = {size - 1}; start with torchrun")
    return rank, size, local_rank


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is '{name}', but must be auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("device is 'cuda', but no CUDA device is available; use device=cpu or auto")
    if name == "cpu" or not there:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(f"local rank {local_rank} has no GPU of its own, there are {count}; start fewer processes")
    return torch.device("cuda", local_rank)


def rank() -> int:
    """Return the number of this process; 0 when alone."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """Return the number of processes; 1 when alone."""
    return dist.get_world_size() if _together() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if _together():
        dist.barrier()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over ranks, equal on all of them; the argument is not changed."""
    if not _together():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_agree(value_hash: int | str) -> bool:
    """Return whether all ranks hold the same value; every rank gets the same answer.

    Ranks that took different decisions would wait for each other forever, or train different models.
    """
    return len(set(gather(value_hash))) == 1


def gather(value: T) -> list[T]:
    """Return the (small, picklable) values of all ranks, by rank, on every rank."""
    if not _together():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return rank 0's (small, picklable) value on every rank."""
    if not _together():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def shutdown() -> None:
    """Leave the world, all ranks together; harmless when alone."""
    if _together():
        dist.barrier()  # nobody takes the store away while another rank still needs it
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End a rank's process with ``code``; return when alone.

    Without the interpreter's teardown: threads of a process group that is gone can abort the process there, and
    the launcher would take a finished run for a crashed one and restart it.
    """
    if _together():
        shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
