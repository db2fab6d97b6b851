"""The guard in a real Lightning trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

from poise.core.errors import UserError  # noqa: E402
from poise.guard.config import GuardConfig  # noqa: E402
from poise.guard.guard import TrainingHalted  # noqa: E402
from poise.integrations.lightning import GuardCallback  # noqa: E402
from poise.integrations.plain import SnapshotHost  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # what the library warns about is not ours


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A small regression; spoils one gradient element of chosen optimizer steps."""

    def __init__(self, bad: frozenset[int] = frozenset(), value: float = math.nan, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.bad, self.value = bad, value
        self.automatic_optimization = not manual
        self.updates: list[list[torch.Tensor]] = []
        self.losses: list[float] = []
        self.asked = 0

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (x,) = batch
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss

    def on_after_backward(self) -> None:
        if self.asked in self.bad:
            self.net[2].weight.grad[0, 3] = self.value

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.asked += 1
        self.updates.append([p.detach().clone() for p in self.net.parameters()])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"},
        }


def fit(tmp_path: Path, module: Module, *callbacks: Any, resume: str | None = None, steps: int = 30, **kw: Any) -> Any:
    data = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **kw,
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def final(module: Module) -> list[torch.Tensor]:
    return [p.detach() for p in module.net.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_a_bad_gradient_changes_nothing(tmp_path: Path, settings: dict[str, Any], value: float) -> None:
    module, guard = Module(frozenset({7}), value), GuardCallback()
    trainer = fit(tmp_path, module, guard, **settings)
    after = [*module.updates[1:], final(module)]
    assert [same(a, b) for a, b in zip(module.updates, after, strict=True)] == [step == 7 for step in range(30)]
    assert guard.skipped == 1
    assert trainer.global_step == 30
    assert all(torch.isfinite(p).all() for p in final(module))
    assert sum(module.losses[-5:]) < sum(module.losses[:5])


def test_manual_optimization(tmp_path: Path) -> None:
    module, guard = Module(frozenset({7}), manual=True), GuardCallback()
    fit(tmp_path, module, guard)
    after = [*module.updates[1:], final(module)]
    assert [same(a, b) for a, b in zip(module.updates, after, strict=True)] == [step == 7 for step in range(30)]


@pytest.mark.parametrize("mode", ["act", "observe"])
def test_off_equals_absent(tmp_path: Path, mode: Any) -> None:
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    absent, present = Module(), Module()
    fit(tmp_path, absent, **settings)
    fit(tmp_path, present, GuardCallback(GuardConfig(mode=mode)), **settings)
    assert same(final(absent), final(present))
    assert absent.losses == present.losses


def test_the_guard_sees_the_mean_loss_and_the_raw_norm(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Spy(GuardCallback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            assert self.guard is not None
            self.guard._observer = lambda signals, decision: seen.append((signals.loss, signals.grad_norm))

    module = Module()
    fit(tmp_path, module, Spy(), steps=6, accumulate_grad_batches=2, gradient_clip_val=1e-4)
    pairs = [(a + b) / 2 for a, b in zip(module.losses[::2], module.losses[1::2], strict=True)]
    assert [loss for loss, _ in seen] == pytest.approx(pairs, rel=1e-5)
    assert min(norm for _, norm in seen) > 1e-3


class ByStep(Module):
    """Its data are a function of the step's number: Lightning does not put an ordinary loader back in its place."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(self.trainer.global_step))
        return super().training_step((x,), index)


def test_resume_equals_a_straight_run(tmp_path: Path) -> None:
    straight, guard = ByStep(frozenset({3})), GuardCallback()
    fit(tmp_path, straight, guard, steps=20)
    fit(tmp_path, ByStep(frozenset({3})), GuardCallback(), steps=10).save_checkpoint(tmp_path / "c.ckpt")
    second, again = ByStep(), GuardCallback()
    fit(tmp_path, second, again, steps=20, resume=str(tmp_path / "c.ckpt"))
    assert same(final(straight), final(second))
    assert again.guard is not None and guard.guard is not None
    assert repr(again.guard.state_dict()) == repr(guard.guard.state_dict())  # NaN is in it
    fit(tmp_path, Module(), steps=12, resume=str(tmp_path / "c.ckpt"))  # uninstalled: the checkpoint still loads


def test_halting_and_going_back(tmp_path: Path) -> None:
    with pytest.raises(TrainingHalted, match="halted at step"):
        fit(tmp_path, Module(frozenset(range(5, 99))), GuardCallback(), steps=90)

    class Spoil(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 20:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = math.nan

    module = Module()
    guard = GuardCallback(host=lambda model, optimizer: SnapshotHost(model, optimizer, every=6))
    fit(tmp_path, module, guard, Spoil(), steps=50)
    assert all(torch.isfinite(p).all() for p in final(module))
    assert math.isfinite(module.losses[-1])


def test_two_optimizers_are_refused_in_one_line(tmp_path: Path) -> None:
    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    with pytest.raises(UserError, match="guards one optimizer; this module has 2"):
        fit(tmp_path, Two(manual=True), GuardCallback())


def test_the_optimizer_is_as_it_was_afterwards(tmp_path: Path) -> None:
    guard = GuardCallback()
    trainer = fit(tmp_path, Module(), guard, steps=3)
    trainer.optimizers[0].step()
    assert guard.guard is not None and guard.guard.step == 3
