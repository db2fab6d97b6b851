"""All ranks give the same answer although one of them sees the bad value: DDP and FSDP2 over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "guarded_ranks.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


EVERY_KIND, EVERY_FAULT = "ddp,fsdp", "bad_gradient,bad_loss,spoilt"


def run_ranks(world: int, kinds: str = EVERY_KIND, faults: str = EVERY_FAULT) -> None:
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kinds, faults],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        output = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(output)


@pytest.mark.dist
def test_two_ranks_agree() -> None:
    run_ranks(2)


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_agree_on_a_bad_value_of_one() -> None:
    run_ranks(4, "ddp", "bad_gradient,bad_loss")


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_agree() -> None:
    run_ranks(4)
