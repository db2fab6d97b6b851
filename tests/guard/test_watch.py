"""Every k-th step measured in any loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from poise.core.errors import UserError
from poise.guard.signals.curvature import gradient_curvature
from poise.guard.signals.listen import floats
from poise.guard.signals.probe import LastBatch
from poise.guard.signals.watch import Watch, watch
from poise.model.build import build
from poise.model.spec import Spec

SPEC = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


class Net(nn.Module):
    """Two blocks of linear layers with nanoGPT's names, dropout between them."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(nn.ModuleDict({"mlp": Mlp()}) for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = checkpoint(layer["mlp"], x, use_reentrant=False) if self.recompute else layer["mlp"](x)
        return x.square().mean()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


def train(model: Any, watching: Watch | None, steps: int, optimizer: Any = None, accumulate: int = 1) -> list[int]:
    """Train; return the steps at which a new measurement was there."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    measured = []
    for step in range(1, steps + 1):
        for part in range(accumulate):
            before = 0 if watching is None else watching.step
            x = torch.full((3, 4), float(step + part))
            model(x).backward()
            if watching is not None and watching.step != before:
                assert part == 0, "only the first micro-batch of a step is measured"
                measured.append(step)
        optimizer.step()
        optimizer.zero_grad()
    return measured


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_third_step_is_measured_and_nothing_changes(accumulate: int, recompute: bool) -> None:
    finals = []
    for watched in (False, True):
        model = Net(recompute)
        torch.manual_seed(1)
        watching = watch(model, every=3) if watched else None
        measured = train(model, watching, 8, accumulate=accumulate)
        finals.append((torch.cat([p.detach().flatten() for p in model.parameters()]), torch.get_rng_state()))
        if watching is not None:
            assert measured == [1, 4, 7] and watching.step == 7 and watching.seen == 8
            assert {"loss", "out_rms@block.0.fc1", "out_max@block.1.fc2"} <= set(watching.readings)
            watching.remove()
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            assert "loss" in watching.readings
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_recomputing_the_whole_model_is_not_another_step() -> None:
    model = Net()
    watching = watch(model, every=1)
    for _ in range(3):
        checkpoint(model, torch.ones(3, 4), use_reentrant=False).backward()
        model.zero_grad()
    assert watching.seen == watching.step == 3


class OldStyle(torch.optim.Optimizer):
    """Writes through ``.data``, so that no version counter of a parameter moves."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.sub_(0.01 * p.grad)


def test_steps_are_told_apart_under_any_optimizer() -> None:
    model = Net()
    watching = watch(model, every=2)
    assert train(model, watching, 4, OldStyle(model.parameters()), accumulate=2) == [1, 3]
    keeping = torch.optim.SGD(model.parameters(), lr=0.1)
    keeping.zero_grad = lambda: [p.grad.zero_() for p in model.parameters()]  # type: ignore[method-assign, assignment, func-returns-value]
    assert train(model, watching, 4, keeping, accumulate=2) == [1, 3]


def test_evaluation_is_not_a_step_and_reading_waits_until_asked() -> None:
    model = Net()
    with watch(model, every=1) as watching:
        assert watching.readings == {} and watching.take() is None
        model.eval()
        model(torch.ones(3, 4))
        model.train()
        with torch.no_grad():
            model(torch.ones(3, 4))
        assert watching.seen == 0
        model(torch.ones(3, 4)).backward()
        taken = watching.take()
        assert taken is not None and all(isinstance(value, Tensor) and value.dim() == 0 for value in taken.values())
        assert floats(taken) == watching.readings and watching.take() is None
        model(torch.ones(3, 4))  # the guard's call ended the step: this is the next one, whatever the gradients are
        assert watching.seen == 2
    assert not model._forward_hooks


def test_a_forward_that_raises_leaves_the_watch_working() -> None:
    model = Net()
    watching = watch(model, every=1)
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 5))
    assert not any(module._forward_hooks for module in model.modules() if module is not model)
    assert watching.step == 0
    model(torch.ones(3, 4)).backward()
    assert watching.step == 2 and "out_rms@block.1.fc2" in watching.readings


def test_the_loss_function_of_the_user() -> None:
    model = Net()
    watching = watch(model, every=1, loss=lambda out: 3 * out)
    value = model(torch.ones(3, 4)).detach()
    assert watching.readings["loss"] == pytest.approx(3 * float(value))
    for wrong in ({"every": 0}, {"rows": 0}):
        with pytest.raises(UserError, match="at least 1"):
            watch(model, **wrong)


def test_what_is_made_aside_is_no_step() -> None:
    """Curvature and probes call the model with the watch and the last batch on it."""
    model = Net()
    watching, last = watch(model, every=1), LastBatch(model, age=0)
    model(torch.ones(3, 4)).backward()
    last.accept()
    before = watching.readings
    gradient_curvature(model, lambda: model(torch.zeros(3, 4) + 5), lr=0.1)
    assert last.readings()["probe_expected"] == pytest.approx(before["loss"])
    assert watching.seen == 1 and watching.readings == before
    last.accept()
    assert last.readings()["probe_expected"] == pytest.approx(before["loss"])


def test_a_model_without_known_layers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "poise"):
        watching = watch(nn.Linear(2, 2), every=1)
    assert len(caplog.records) == 1 and "nothing to measure" in caplog.text
    watching.remove()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_model_inside_ddp_is_heard_and_its_reducer_left_alone() -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    watching, last = watch(model, every=1), LastBatch(model, age=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss = model(torch.full((3, 4), step + 1.0))
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        last.accept()
        assert last.readings()["probe_expected"] == pytest.approx(float(loss.detach()))
        assert gradient_curvature(model.module, lambda: model.module(torch.ones(3, 4)), lr=0.1)
        assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
        optimizer.step()
        optimizer.zero_grad()
        assert watching.step == step + 1 and "out_rms@block.1.fc2" in watching.readings


@pytest.mark.usefixtures("group")
def test_a_sharded_model_is_heard() -> None:
    model = Net()
    for layer in model.h:
        fully_shard(layer["mlp"], mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    expected = watch(plain := Net(), every=1)
    watching, last = watch(model, every=1), LastBatch(model, age=0)
    torch.manual_seed(0)
    plain(torch.ones(3, 4)).backward()
    torch.manual_seed(0)
    model(torch.ones(3, 4)).backward()
    last.accept()
    assert watching.readings == pytest.approx(expected.readings)
    assert last.readings()["probe_expected"] == watching.readings["loss"]
    assert gradient_curvature(model, lambda: model(torch.ones(3, 4)), lr=0.1) == {}  # not reached: no reading


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
def test_compiled_models(caplog: pytest.LogCaptureFixture) -> None:
    """Wrapped, compiled in parts, and compiled in place: readings, readings, one warning; no compilation again."""
    inputs = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = inputs[:, :-1].contiguous(), inputs[:, 1:].contiguous()
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for how in ("wrapped", "parts"):
        model: Any = build(SPEC, seed=0)
        expected = build(SPEC, seed=0)(*batch).loss.detach()
        if how == "wrapped":
            model = torch.compile(model.trunk, backend=backend)
            batch_of = (torch.zeros(4, 16, 32),)
        else:
            model.trunk.compile(backend=backend)
            batch_of = batch
        watching, last = watch(model, every=2), LastBatch(model, age=0)
        before = made = len(graphs)
        for number in range(3):
            out = model(*batch_of)
            last.accept()
            watching.take()
            made = len(graphs) if number == 0 else made
        assert len(graphs) == made > before, f"{how}: measuring made the compiler start again"
        assert watching.step == 3 and "attn_entropy@block.1" in watching.readings
        if how == "parts":
            assert torch.allclose(out.loss, expected, rtol=1e-5)
            assert last.readings()["probe_loss"] == pytest.approx(float(expected), rel=1e-5)
    with caplog.at_level(logging.WARNING, "poise"):
        whole = Net()
        whole.compile(backend=backend)
        watching = watch(whole, every=1)
        for _ in range(5):
            whole(torch.ones(3, 4)).backward()
            assert watching.take() is None
    said = [record.getMessage() for record in caplog.records if record.name == "poise"]
    assert len(said) == 1 and "torch.compile(model)" in said[0]
