"""The guard in a real ``transformers.Trainer`` with a tiny Llama: what is skipped, what is left alone, what resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from poise.core.errors import UserError  # noqa: E402
from poise.guard.config import GuardConfig  # noqa: E402
from poise.guard.guard import TrainingHalted  # noqa: E402
from poise.integrations.hf_trainer import GuardCallback  # noqa: E402
from poise.integrations.plain import SnapshotHost  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # what libraries warn about is not ours

VOCAB, LENGTH = 32, 16


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return transformers.LlamaForCausalLM(config)


class Counting(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Token i is followed by token i + 1: easily learnt."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(LENGTH) + index * 7) % VOCAB
        return {"input_ids": ids, "labels": ids}


class Poison(transformers.TrainerCallback):
    """Spoils one gradient element of one step, and keeps the weights before and after each step."""

    def __init__(self, at: int | None = None, value: float = math.nan, every_after: bool = False) -> None:
        self.at, self.value, self.every_after = at, value, every_after
        self.weights: list[list[torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.weights.append([p.detach().clone() for p in model.parameters()])
        bad = self.at is not None and (
            state.global_step == self.at or (self.every_after and state.global_step > self.at)
        )
        if bad:
            p = model.model.layers[1].mlp.up_proj.weight
            self.handle = p.register_post_accumulate_grad_hook(self.spoil)

    def spoil(self, p: torch.Tensor) -> None:
        assert p.grad is not None
        p.grad[0, 0] = self.value

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()


def train(tmp_path: Path, *callbacks: Any, model: Any = None, resume: str | None = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 1.0,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    args = transformers.TrainingArguments(output_dir=str(tmp_path), **{**defaults, **settings})
    trainer = transformers.Trainer(model or tiny_llama(), args, train_dataset=Counting(), eval_dataset=Counting())
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
    ],
    ids=["plain", "accumulation", "no clipping", "bf16", "label smoothing"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing_and_training_goes_on(
    tmp_path: Path, settings: dict[str, Any], value: float
) -> None:
    guard, poison = GuardCallback(), Poison(at=8, value=value)
    trainer = train(tmp_path, guard, poison, **settings)
    unchanged = [same(a, b) for a, b in zip(poison.weights, [*poison.weights[1:], weights(trainer)], strict=True)]
    # the warm-up's step 0 has learning rate 0
    assert unchanged == [step in (0, 8) for step in range(30)]
    assert guard.skipped == 1
    assert trainer.state.global_step == 30
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_final_loss_is_that_of_the_clean_run(tmp_path: Path) -> None:
    settings = {"max_steps": 100, "learning_rate": 1e-2}
    clean = train(tmp_path, **settings)
    guarded = train(tmp_path, GuardCallback(), Poison(at=8), **settings)
    a, b = (t.evaluate()["eval_loss"] for t in (clean, guarded))
    assert a < 0.5
    assert b == pytest.approx(a, rel=0.1)


HEALTHY = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 10, "max_steps": 20}


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A healthy run without a guard."""
    return train(tmp_path_factory.mktemp("absent"), **HEALTHY)


@pytest.mark.parametrize("config", [None, {"mode": "observe"}, {"enabled": False}], ids=["act", "observe", "off"])
def test_off_equals_absent(tmp_path: Path, absent: Any, config: dict[str, Any] | None) -> None:
    """On a healthy run nothing differs, bit for bit, evaluation and accumulation included."""
    present = train(tmp_path, GuardCallback(config), **HEALTHY)
    assert same(weights(absent), weights(present))
    losses = [[log.get("loss"), log.get("eval_loss"), log.get("grad_norm")] for log in absent.state.log_history]
    assert losses == [
        [log.get("loss"), log.get("eval_loss"), log.get("grad_norm")] for log in present.state.log_history
    ]


def test_the_guard_sees_the_steps_mean_loss_and_the_raw_norm(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Spy(GuardCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            assert self.guard is not None
            self.guard._observer = lambda signals, decision: seen.append((signals.loss, signals.grad_norm))

    trainer = train(tmp_path, Spy(), max_steps=6, logging_steps=1, gradient_accumulation_steps=2, max_grad_norm=1e-3)
    logged = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    assert len(seen) == 6
    for (loss, norm), (logged_loss, logged_norm) in zip(seen, logged, strict=True):
        assert loss == pytest.approx(logged_loss, abs=1e-3)
        assert norm == pytest.approx(logged_norm, rel=1e-3)
        assert norm > 0.01  # not the clipped one


def test_a_nan_loss_that_the_trainer_hides_is_seen(tmp_path: Path) -> None:
    """``logging_nan_inf_filter`` replaces NaN in what is logged; the guard reads the loss before it."""

    class SpoilLoss(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 5 else loss

    guard = GuardCallback()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SpoilLoss(tiny_llama(), args, train_dataset=Counting(), callbacks=[guard])
    trainer.train()
    assert guard.skipped == 1
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert all(torch.isfinite(p).all() for p in weights(trainer))


@pytest.mark.parametrize("restore", [False, True])
def test_resume_equals_a_straight_run(tmp_path: Path, restore: bool) -> None:
    guard = GuardCallback()
    settings = {"max_steps": 16, "save_strategy": "steps", "save_steps": 8, "save_total_limit": 3}
    straight = train(tmp_path, guard, Poison(at=5), **settings)
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["GuardCallback"]["attributes"]["_saved"]["guard"]["loop"]["step"] == 8

    again = GuardCallback()
    resumed = train(
        tmp_path,
        again,
        resume=str(tmp_path / "checkpoint-8"),
        restore_callback_states_from_checkpoint=restore,
        **settings,
    )
    assert same(weights(straight), weights(resumed))
    used = next(c for c in resumed.callback_handler.callbacks if isinstance(c, GuardCallback))
    assert (used is again) != restore  # the trainer makes a new one where it restores callbacks itself
    assert used.guard is not None and guard.guard is not None
    states = [json.dumps(c.guard.state_dict(), sort_keys=True) for c in (used, guard)]  # the trainer sorts keys
    assert states[0] == states[1]


def test_installing_in_the_middle_of_a_run(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    train(tmp_path, **settings)
    guard = GuardCallback()
    train(tmp_path, guard, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert guard.guard is not None and guard.guard.step == 4
    train(tmp_path, resume=str(tmp_path / "checkpoint-8"), **{**settings, "max_steps": 12})  # and uninstalled again


def test_halting_ends_the_training_with_its_story(tmp_path: Path) -> None:
    with pytest.raises(TrainingHalted, match=r"halted at step"):
        train(tmp_path, GuardCallback(), Poison(at=4, every_after=True), max_steps=100)


def test_a_host_that_goes_back(tmp_path: Path) -> None:
    """Weights spoilt between two steps: the guard goes back to a copy in memory, and the trainer goes on."""

    class Spoil(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 20:
                with torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan

    guard = GuardCallback(host=lambda model, optimizer: SnapshotHost(model, optimizer, every=6))
    trainer = train(tmp_path, guard, Spoil(), max_steps=40)
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_the_trainer_is_as_it_was_afterwards(tmp_path: Path) -> None:
    guard = GuardCallback()
    trainer = train(tmp_path, guard, max_steps=2)
    for owner, name in ((trainer.accelerator, "backward"), (trainer.accelerator, "clip_grad_norm_")):
        assert name not in vars(owner)
    trainer.optimizer.step()
    assert guard.guard is not None and guard.guard.step == 2
    trainer.train()
    assert guard.guard is not None and guard.guard.step == 2


def test_no_trainer_no_guess(tmp_path: Path) -> None:
    args, state = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), transformers.TrainerState()
    with pytest.raises(UserError, match="found no Trainer"):
        GuardCallback().on_train_begin(args, state, transformers.TrainerControl())
    assert GuardCallback({"mode": "halt"}).config == GuardConfig(mode="halt")
