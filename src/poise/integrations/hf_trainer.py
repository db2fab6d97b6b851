"""The guard for Hugging Face ``Trainer`` (transformers 5): one line.

    trainer.add_callback(poise.integrations.hf_trainer.GuardCallback())

A callback is told about a step but cannot prevent it, is called after clipping, and is not given the loss. So the
callback looks up its trainer and puts itself at three places of that one object, for the time of ``train()``:
``accelerator.backward`` (the loss, with the trainer's own weights for accumulation), ``accelerator.clip_grad_norm_``
(ask while the gradient is unscaled and not clipped) and ``optimizer.step`` (skipping is not calling it).

A skipped step counts in ``global_step`` and moves the learning rate schedule on. ``logging_nan_inf_filter`` (on by
default) hides NaN in the logged loss; the guard reads the loss before that filter, so it sees every NaN. The guard's
state is part of ``trainer_state.json`` and comes back with ``resume_from_checkpoint``. DeepSpeed, which steps inside
its own engine, is refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import transformers
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_callback import ExportableState

from poise.core.errors import UserError
from poise.core.host import Host
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard
from poise.integrations.gate import StepGate, innermost
from poise.integrations.plain import OptimizerHost

HostMaker = Callable[[nn.Module, Optimizer], Host]


class GuardCallback(transformers.TrainerCallback, ExportableState):
    """Puts a guard before every optimizer step of the trainer it is added to.

    Args:
        config: the guard's settings, or a mapping of them.
        host: makes the host from model and optimizer; ``OptimizerHost`` unless given. With
            ``lambda model, optimizer: SnapshotHost(model, optimizer, every=500)`` the guard can also go back.
        trainer: only where the callback is driven by hand; otherwise it finds its trainer.

    Attributes:
        guard: the guard, while and after training.
    """

    def __init__(
        self,
        config: GuardConfig | Mapping[str, Any] | None = None,
        host: HostMaker | None = None,
        trainer: transformers.Trainer | None = None,
    ) -> None:
        if config is not None and not isinstance(config, GuardConfig):
            config = GuardConfig(**config)
        self.config = config or GuardConfig()
        self.guard: Guard | None = None
        self._make_host = host
        self._host: Host | None = None
        self._trainer = trainer
        self._gate: StepGate | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def skipped(self) -> int:
        """Steps that the guard did not allow."""
        return 0 if self._gate is None else self._gate.skipped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the gate and take over the state that came with the checkpoint."""
        trainer = self._trainer or _calling_trainer(self)
        if trainer.accelerator.distributed_type == "DEEPSPEED":
            raise UserError("DeepSpeed steps inside its own engine, where no guard can skip; use FSDP or DDP")
        if self._gate is not None:
            self._gate.remove()
        optimizer = innermost(trainer.optimizer)
        self._host = self._host_for(trainer.model, optimizer)
        self.guard = Guard.for_run(trainer.model, optimizer, self.config, host=self._host)
        self._gate = _install(self.guard, trainer)
        # The trainer indexes this by name when it saves, also where the checkpoint knew nothing of a guard.
        known = state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved = self._saved or (known.get("attributes") or {}).get("_saved")
        self._saved = None
        if saved and state.global_step > 0:  # resumed; a second train() begins anew, and so does its guard
            self.guard.load_state_dict(saved["guard"])
            if isinstance(self._host, OptimizerHost) and saved["host"] is not None:
                self._host.load_state_dict(saved["host"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gate off; the trainer is as it was."""
        if self._gate is not None:
            self._gate.remove()
        if isinstance(self._host, OptimizerHost):
            self._host.remove()

    def state(self) -> dict[str, Any]:
        """What the trainer writes into ``trainer_state.json``."""
        saved = None
        if self.guard is not None:
            host = self._host.state_dict() if isinstance(self._host, OptimizerHost) else None
            saved = {"guard": self.guard.state_dict(), "host": host}
        return {"args": {"config": dataclasses.asdict(self.config)}, "attributes": {"_saved": saved}}

    def _host_for(self, model: nn.Module, optimizer: Optimizer) -> Host:
        if isinstance(self._host, OptimizerHost):
            self._host.remove()
        return OptimizerHost(optimizer, model) if self._make_host is None else self._make_host(model, optimizer)


def _install(guard: Guard, trainer: transformers.Trainer) -> StepGate:
    gate = StepGate(guard)
    accelerator = trainer.accelerator
    inner_backward = accelerator.backward

    def backward(loss: Any, **kwargs: Any) -> None:
        # What the trainer hands over is the micro-batch's share of the step's mean loss.
        gate.add_loss(loss, 1.0 / accelerator.gradient_accumulation_steps)
        inner_backward(loss, **kwargs)

    gate.replace(accelerator, "backward", backward)
    if accelerator.scaler is None:
        gate.ask_before(accelerator, "clip_grad_norm_")
    else:
        gate.ask_after(accelerator, "unscale_gradients")  # clipping unscales first
    gate.install(trainer.optimizer)
    return gate


def _calling_trainer(callback: GuardCallback) -> transformers.Trainer:
    """Return the trainer that is calling this callback: callbacks are not given it, but it is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    raise UserError("GuardCallback found no Trainer that calls it; give it one: GuardCallback(trainer=trainer)")
