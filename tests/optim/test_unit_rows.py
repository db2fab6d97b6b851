"""Unit rows: lengths after a step, whole and sharded, and what is left alone.

Shapes: O rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from poise.core.errors import UserError
from poise.optim.chain import Chain
from poise.optim.rules.adamw import AdamWRule
from poise.optim.weights.unit_rows import UnitRows


def matrix(rows: int = 5, columns: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype))


def on_sphere(weight: Tensor, dim: int) -> np.ndarray:
    """The formula in NumPy."""
    w = weight.detach().double().numpy()
    return w / np.sqrt((w**2).sum(dim, keepdims=True))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vectors_have_length_one_when_attached_and_after_every_step(dim: int) -> None:
    weight = matrix()
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    expected = on_sphere(weight, dim)
    UnitRows([(weight, dim)]).attach(optimizer)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-14)
    other = nn.Parameter(weight.detach().clone())
    alone = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for step in range(3):
        weight.grad = matrix(seed=step + 1).detach()
        other.grad = weight.grad.clone()
        optimizer.step()
        alone.step()
        with torch.no_grad():
            other.copy_(torch.from_numpy(on_sphere(other, dim)))
        np.testing.assert_allclose(weight.detach().numpy(), other.detach().numpy(), rtol=1e-13)


def test_a_tied_matrix_counts_once_and_the_rest_is_left_alone() -> None:
    tied, rest = matrix(), matrix(seed=1)
    before = rest.detach().clone()
    UnitRows([(tied, 1), (tied, -1)])()
    assert torch.equal(rest, before)
    np.testing.assert_allclose(tied.detach().square().sum(1).numpy(), 1.0, rtol=1e-14)


def test_bf16_is_rounded_once() -> None:
    weight = matrix(dtype=torch.bfloat16)
    expected = torch.from_numpy(on_sphere(weight, 1)).to(torch.bfloat16)
    UnitRows([(weight, 1)])()
    assert torch.equal(weight, expected)


def test_a_zero_vector_stays_zero() -> None:
    weight = matrix()
    with torch.no_grad():
        weight[2] = 0
    UnitRows([(weight, 1)])()
    assert torch.equal(weight[2], torch.zeros(3, dtype=torch.float64))
    assert torch.isfinite(weight).all()


def test_a_chain_that_refuses_a_step_changes_nothing() -> None:
    weight = matrix(dtype=torch.float32)
    chain = Chain([weight], AdamWRule(weight_decay=0.0), lr=0.1)
    handle = UnitRows([(weight, 1)]).attach(chain, now=False)
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, float("nan"))
    chain.step()
    assert torch.equal(weight, before)
    weight.grad = torch.ones_like(weight)
    chain.step()
    np.testing.assert_allclose(weight.detach().square().sum(1).numpy(), 1.0, rtol=1e-6)
    handle.remove()
    chain.step()
    assert (weight.detach().square().sum(1) - 1).abs().max() > 1e-3


def test_attached_to_loaded_weights_it_keeps_their_bits() -> None:
    weight = matrix()
    before = weight.detach().clone()
    UnitRows([(weight, 1)]).attach(torch.optim.SGD([weight], lr=0.1), now=False)
    assert torch.equal(weight, before)


W = matrix()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnitRows([]), "no parameters"),
        (lambda: UnitRows([(torch.zeros(3), 0)]), r"shape \(3,\)"),
        (lambda: UnitRows([(W, 2)]), "dimension 2"),
        (lambda: UnitRows([(W, 0), (W, 1)]), "both dimensions"),
    ],
)
def test_bad_descriptions(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def one_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for rows in (1, 5):  # one row: the second rank has nothing of it
        whole = torch.arange(1.0, rows * 3 + 1).view(rows, 3)
        weights, wanted = [], []
        for placement in (Shard(0), Shard(1), Replicate()):
            for dim in (0, 1):
                weights.append((torch.nn.Parameter(distribute_tensor(whole.clone(), mesh, [placement])), dim))
                wanted.append(whole / whole.norm(dim=dim, keepdim=True))
        optimizer = torch.optim.SGD([weight for weight, _ in weights], lr=0.0)
        UnitRows(weights).attach(optimizer, now=False)
        for weight, _ in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        for (weight, dim), expected in zip(weights, wanted, strict=True):
            assert torch.allclose(weight.full_tensor().detach(), expected, rtol=1e-6), (weight.placements, dim)


@pytest.mark.dist
def test_sharded_rows_and_columns(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)
