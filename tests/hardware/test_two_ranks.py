"""Two processes over gloo, started as torchrun starts them; then one process loads what they saved."""

import pytest
import torch
from tests.hardware.scripts.two_ranks import one_rank
from tests.ranks import launch
from torch import nn

from poise.hardware.checkpoint import CheckpointStore


@pytest.mark.dist
def test_two_ranks_save_and_one_loads(tmp_path):
    launch(one_rank, tmp_path)

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
