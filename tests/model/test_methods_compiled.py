"""Every method traces as one graph and computes the same then, and the same when blocks are computed twice."""

from __future__ import annotations

import pytest
import torch
from tests.model.test_method_pairs import SMALL, WORDS
from torch import Tensor

from poise.model.build import build
from poise.model.decoder import Decoder
from poise.model.methods import METHODS, apply_methods

IDS_BT = torch.arange(10).view(2, 5) % 13


def two_steps(model: Decoder) -> dict[str, Tensor]:
    """Loss and gradients of two steps, and the buffers after them."""
    found: dict[str, Tensor] = {}
    for step in (1, 2):
        model.zero_grad()
        out = model(IDS_BT, (IDS_BT * 7 + step) % 13)
        out.loss.backward()
        found |= {f"{step} {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"{step} {name}": b.clone() for name, b in model.named_buffers()} | {
            f"{step} loss": out.loss.detach()
        }
    return found


def model_of(name: str) -> Decoder:
    return build(apply_methods(SMALL, [WORDS.get(name, name)]), seed=0).train()


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_blocks_give_the_same_gradients_and_the_same_state(name: str) -> None:
    plain, again = model_of(name), model_of(name)
    again.recompute_blocks()
    before, after = two_steps(plain), two_steps(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def compiled_equals_eager(name: str, backend: str) -> None:
    torch.compiler.reset()
    eager, compiled = model_of(name), model_of(name)
    if str(eager.trunk) == str(build(SMALL, seed=0).trunk) and eager.spec.attn_scale == SMALL.attn_scale:
        pytest.skip("its trunk is the plain one")
    compiled.trunk.compile(backend=backend, fullgraph=True, dynamic=False)
    before, after = two_steps(eager), two_steps(compiled)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, at=key: f"{name} {at}: {m}")


@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own
@pytest.mark.parametrize("name", METHODS)
def test_every_method_traces_as_one_graph(name: str) -> None:
    compiled_equals_eager(name, "eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_compiles(name: str) -> None:
    compiled_equals_eager(name, "inductor")
