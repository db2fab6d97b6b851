"""The guard for loops written with Hugging Face Accelerate: one line after ``prepare``.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    guard = poise.integrations.accelerate.guard(accelerator, model, optimizer)

The loop stays as it is: ``accelerator.backward(loss)``, ``accelerator.clip_grad_norm_`` and ``optimizer.step()``,
with ``accelerator.accumulate(model)`` or without. The guard is asked once per update, only where
``accelerator.sync_gradients`` is true, and before clipping where the loop clips. Its state is saved and restored
by ``accelerator.save_state`` and ``load_state``.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from poise.core.errors import UserError
from poise.core.host import Host
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard
from poise.integrations.gate import StepGate, innermost
from poise.integrations.plain import OptimizerHost


def guard(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    config: GuardConfig | None = None,
    host: Host | None = None,
) -> AccelerateGuard:
    """Guard the updates of a prepared optimizer.

    Args:
        accelerator: the accelerator that prepared both.
        model: the prepared model.
        optimizer: the prepared optimizer.
        config: the guard's settings.
        host: ``OptimizerHost`` unless given.

    Raises:
        UserError: not prepared, or stepped by DeepSpeed's own engine.
    """
    if optimizer not in accelerator._optimizers:
        raise UserError("the optimizer is not prepared; call guard() after accelerator.prepare(model, optimizer)")
    if accelerator.distributed_type == "DEEPSPEED":
        raise UserError("DeepSpeed steps inside its own engine, where no guard can skip; use FSDP or DDP")
    return AccelerateGuard(accelerator, model, optimizer, config, host)


class AccelerateGuard:
    """Made by ``guard``. Register nothing: the accelerator saves and loads it with everything else.

    Attributes:
        guard: the guard.
        host: whom it asks.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        config: GuardConfig | None,
        host: Host | None,
    ) -> None:
        inner = innermost(optimizer)
        self.host = OptimizerHost(inner, model) if host is None else host
        self.guard = Guard.for_run(model, inner, config, host=self.host)
        self._gate = gate = watch(self.guard, accelerator)
        gate.install(optimizer, when=lambda: bool(accelerator.sync_gradients))
        accelerator.register_for_checkpointing(self)

    @property
    def skipped(self) -> int:
        """Updates that the guard did not allow."""
        return self._gate.skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's and the host's state."""
        host = self.host.state_dict() if isinstance(self.host, OptimizerHost) else None
        return {"guard": self.guard.state_dict(), "host": host}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.guard.load_state_dict(state["guard"])
        if isinstance(self.host, OptimizerHost) and state["host"] is not None:
            self.host.load_state_dict(state["host"])

    def remove(self) -> None:
        """Take the guard off; the accelerator is as it was but for the saved state's place."""
        self._gate.remove()
        if isinstance(self.host, OptimizerHost):
            self.host.remove()


def watch(guard: Guard, accelerator: Accelerator) -> StepGate:
    """Return a gate that hears the losses of ``accelerator.backward`` and asks before ``clip_grad_norm_`` acts."""
    gate = StepGate(guard)
    inner_backward = accelerator.backward

    def backward(loss: Any, **kwargs: Any) -> None:
        gate.add_loss(loss, 1.0 / accelerator.gradient_accumulation_steps)  # as backward divides it
        inner_backward(loss, **kwargs)

    gate.replace(accelerator, "backward", backward)
    if accelerator.scaler is None:
        gate.ask_before(accelerator, "clip_grad_norm_")
    else:
        gate.ask_after(accelerator, "unscale_gradients")  # clipping unscales first
    return gate
