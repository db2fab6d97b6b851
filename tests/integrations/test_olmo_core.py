"""The guard in OLMo-core's own trainer and transformer, on a CPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("olmo_core")

with warnings.catch_warnings():  # what its dependencies warn about when imported
    warnings.simplefilter("ignore")
    from olmo_core.data import TextDataLoaderBase
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig, CosWithWarmup
    from olmo_core.train import Duration, TrainerConfig
    from olmo_core.train.callbacks import Callback, CheckpointerCallback
    from olmo_core.train.train_module import TransformerTrainModuleConfig

from poise.core.errors import UserError
from poise.guard.guard import TrainingHalted
from poise.integrations.olmo_core import GuardCallback

pytestmark = pytest.mark.filterwarnings("default")  # what the library warns about is not ours

VOCAB, LENGTH, ROWS = 32, 16, 4


class Counting(TextDataLoaderBase):
    """Token i is followed by token i + 1; a batch is a function of its number."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            collator=None, work_dir=folder, global_batch_size=ROWS * LENGTH,
            dp_world_size=1, dp_rank=0, fs_local_rank=0,
        )  # fmt: skip

    @property
    def total_batches(self) -> int:
        return 1000

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches_processed = state_dict["batches"]
        self._epoch = 1

    def reshuffle(self, epoch: int | None = None, **kwargs: Any) -> None:
        self._epoch = epoch or 1

    def get_mock_batch(self) -> dict[str, Any]:
        return self.batch(0)

    def batch(self, number: int) -> dict[str, Any]:
        rows = torch.arange(ROWS)[:, None] * 5 + torch.arange(LENGTH) + number * 7
        return {"input_ids": rows % VOCAB}

    def _iter_batches(self) -> Iterator[dict[str, Any]]:
        for number in range(self.batches_processed, self.total_batches):
            yield self.batch(number)


class Poison(Callback):
    """Spoils one gradient element at chosen steps (1-based), and keeps the weights before each update."""

    priority = 10  # before the guard

    def __init__(self, at: frozenset[int] = frozenset(), value: float = math.nan) -> None:
        self.at, self.value = at, value
        self.updates: list[list[torch.Tensor]] = []

    def pre_optim_step(self) -> None:
        model = self.trainer.train_module.model
        self.updates.append([p.detach().clone() for p in model.parameters()])
        if self.step in self.at:
            model.blocks["1"].feed_forward.w1.weight.grad[0, 0] = self.value


def train(folder: Path, steps: int = 20, resume: bool = False, save: int = 1000, **callbacks: Callback) -> Any:
    torch.manual_seed(0)
    model = TransformerConfig.llama_like(d_model=32, vocab_size=VOCAB, n_layers=2, n_heads=2).build()
    model.init_weights(device=torch.device("cpu"), max_seq_len=LENGTH)
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=2 * LENGTH,
        max_sequence_length=LENGTH,
        optim=AdamWConfig(lr=1e-2, fused=False),
        scheduler=CosWithWarmup(warmup=2),
        max_grad_norm=1.0,
    ).build(model, device=torch.device("cpu"))
    checkpointer = CheckpointerCallback(save_interval=save, save_async=False, pre_train_checkpoint=False)
    config = TrainerConfig(
        save_folder=str(folder),
        save_overwrite=True,
        max_duration=Duration.steps(steps),
        metrics_collect_interval=5,
        no_evals=True,
        load_strategy="always" if resume else "never",
    ).with_callback("checkpointer", checkpointer)
    trainer = config.build(module, Counting(folder))
    for name, callback in callbacks.items():
        trainer.add_callback(name, callback)
    if resume:
        trainer.load_checkpoint(str(folder / "step10"))
    trainer.fit()
    return trainer


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.train_module.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing(tmp_path: Path, value: float) -> None:
    guard, poison = GuardCallback(), Poison(frozenset({7}), value)
    trainer = train(tmp_path, guard=guard, poison=poison)
    after = [*poison.updates[1:], weights(trainer)]
    assert [same(a, b) for a, b in zip(poison.updates, after, strict=True)] == [step == 7 for step in range(1, 21)]
    assert guard.skipped == 1
    assert all(torch.isfinite(p).all() for p in weights(trainer))


@pytest.mark.parametrize("mode", ["act", "observe"])
def test_off_equals_absent(tmp_path: Path, mode: str) -> None:
    absent = train(tmp_path / "a")
    present = train(tmp_path / "b", guard=GuardCallback({"mode": mode}))
    assert same(weights(absent), weights(present))


def test_the_guard_sees_the_loss_and_the_raw_norm(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Spy(GuardCallback):
        def pre_train(self) -> None:
            super().pre_train()
            assert self._guard is not None
            self._guard._observer = lambda signals, decision: seen.append((signals.loss, signals.grad_norm))

    class Losses(Callback):
        def pre_optim_step(self) -> None:
            losses.append(float(self.trainer.get_metric("train/CE loss")))

    losses: list[float] = []
    train(tmp_path, guard=Spy(), losses=Losses(), steps=6)
    assert [loss for loss, _ in seen] == pytest.approx(losses)
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.2)


def test_resume_equals_a_straight_run(tmp_path: Path) -> None:
    guard = GuardCallback()
    straight = train(tmp_path, guard=guard, poison=Poison(frozenset({7})), save=10)
    again = GuardCallback()
    resumed = train(tmp_path, guard=again, resume=True)
    assert same(weights(straight), weights(resumed))
    assert repr(again.state_dict()) == repr(guard.state_dict())  # NaN is in it


def test_halting(tmp_path: Path) -> None:
    with pytest.raises((TrainingHalted, RuntimeError), match="halted at step"):
        train(tmp_path, guard=GuardCallback(), poison=Poison(frozenset(range(5, 99))), steps=80)


def test_settings_are_checked_when_given() -> None:
    with pytest.raises(UserError, match=r"guard\.mode is 'hlat'"):
        GuardCallback({"mode": "hlat"})
