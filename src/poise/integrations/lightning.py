"""The guard for Lightning 2: one line.

    Trainer(callbacks=[poise.integrations.lightning.GuardCallback()])

No hook of Lightning can prevent an update: returning ``None`` from ``training_step`` comes before the gradients, and
zeroing gradients still moves the weights by momentum and weight decay. So the callback listens to three hooks
(``on_before_backward`` for the loss, ``on_before_optimizer_step`` to ask: unscaled and not clipped yet) and stands
before the torch optimizer's own ``step``, which it does not call where the guard says no. With ``16-mixed`` an
overflow is the scaler's to skip; what the guard skips besides does not change the scale.

The guard's state is part of the checkpoint. One optimizer; automatic and manual optimization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
from torch import Tensor, nn
from torch.optim import Optimizer

from poise.core.errors import UserError
from poise.core.host import Host
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard
from poise.integrations.gate import StepGate, innermost
from poise.integrations.plain import OptimizerHost


class GuardCallback(lightning.Callback):
    """Puts a guard before every optimizer step.

    Args:
        config: the guard's settings.
        host: makes the host from model and optimizer; ``OptimizerHost`` unless given.

    Attributes:
        guard: the guard, while and after training.
    """

    def __init__(
        self, config: GuardConfig | None = None, host: Callable[[nn.Module, Optimizer], Host] | None = None
    ) -> None:
        self.config = config
        self.guard: Guard | None = None
        self._make_host = host
        self._host: Host | None = None
        self._gate: StepGate | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def skipped(self) -> int:
        """Steps that the guard did not allow."""
        return 0 if self._gate is None else self._gate.skipped

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the gate and take over the state that came with the checkpoint."""
        if len(trainer.optimizers) != 1:
            raise UserError(f"GuardCallback guards one optimizer; this module has {len(trainer.optimizers)}")
        self._leave()
        model: nn.Module = trainer.strategy.model or pl_module
        optimizer: Optimizer = innermost(trainer.optimizers[0])
        self._host = OptimizerHost(optimizer, model) if self._make_host is None else self._make_host(model, optimizer)
        self.guard = Guard.for_run(model, optimizer, self.config, host=self._host)
        self._gate = StepGate(self.guard)
        self._gate.install(optimizer)
        if self._saved is not None:
            self.guard.load_state_dict(self._saved["guard"])
            if isinstance(self._host, OptimizerHost) and self._saved["host"] is not None:
                self._host.load_state_dict(self._saved["host"])
            self._saved = None

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Hear the loss: already divided by the number of micro-batches, and scaled where there is a scaler."""
        if self._gate is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._gate.add_loss(loss, 1.0 if scaler is None else 1.0 / scaler.get_scale())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Ask now: the gradient is complete and unscaled, and clipping comes next."""
        if self._gate is not None:
            self._gate.ask()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the gate off."""
        self._leave()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Take the gate off."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's and the host's state for the checkpoint."""
        if self.guard is None:
            return self._saved or {}
        host = self._host.state_dict() if isinstance(self._host, OptimizerHost) else None
        return {"guard": self.guard.state_dict(), "host": host}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the guard exists."""
        self._saved = state_dict or None

    def _leave(self) -> None:
        if self._gate is not None:
            self._gate.remove()
        if isinstance(self._host, OptimizerHost):
            self._host.remove()
