"""Two processes over gloo, started as torchrun starts them; then one process loads what they saved."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from poise.hardware.checkpoint import CheckpointStore

SCRIPT = Path(__file__).parent / "scripts" / "two_ranks.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.dist
def test_two_ranks_save_and_one_loads(tmp_path):
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        output = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output)

    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    loaded = CheckpointStore(tmp_path / "c").restore(model, optimizer)
    assert loaded.step == 2
    whole = torch.load(tmp_path / "whole.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole["model"][name]), name
    mine = optimizer.state_dict()
    assert mine["param_groups"] == whole["optimizer"]["param_groups"]
    for index, moments in whole["optimizer"]["state"].items():
        for key, tensor in moments.items():
            assert torch.equal(mine["state"][index][key], tensor), (index, key)
