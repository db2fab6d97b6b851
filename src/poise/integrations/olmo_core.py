"""The guard for OLMo-core 3: one line.

    trainer_config.with_callback("guard", poise.integrations.olmo_core.GuardCallback())

The trainer calls ``pre_optim_step`` when the gradients are complete and not clipped yet: there the callback asks. The
update is left out by standing before ``train_module.optim.step`` and not calling it. OLMo-core's own SkipStep
optimizers multiply the update by zero instead, which turns an infinite gradient into NaN weights; with the guard
they are not needed. The loss is ``train/CE loss`` of the step, as each rank recorded it.

The guard's state is part of the trainer's checkpoint. What a mixture of experts does in ``post_optim_step`` (its
router bias) still happens after a skipped step. Not for pipeline parallelism, whose module has several optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from olmo_core.train.callbacks import Callback
from olmo_core.train.common import TRAIN_CE_LOSS_METRIC

from poise.core.errors import UserError
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard
from poise.integrations.gate import StepGate
from poise.integrations.plain import OptimizerHost


@dataclass
class GuardCallback(Callback):
    """Puts a guard before every optimizer step of the trainer it belongs to.

    Args:
        guard: the guard's settings by the names of ``GuardConfig``; a plain dict, so that OLMo-core can print and
            store its configuration.
    """

    guard: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._config = GuardConfig(**self.guard)
        self._guard: Guard | None = None
        self._host: OptimizerHost | None = None
        self._gate: StepGate | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def skipped(self) -> int:
        """Steps that the guard did not allow."""
        return 0 if self._gate is None else self._gate.skipped

    def pre_train(self) -> None:
        """Install the gate and take over the state that came with the checkpoint."""
        module = self.trainer.train_module
        model, optimizer = getattr(module, "model", None), getattr(module, "optim", None)
        if model is None or optimizer is None:
            raise UserError(
                f"GuardCallback needs a train module with one model and one optim, not {type(module).__name__}"
            )
        self.close()
        self._host = OptimizerHost(optimizer, model)
        self._guard = Guard.for_run(model, optimizer, self._config, host=self._host)
        self._gate = StepGate(self._guard)
        self._gate.install(optimizer)
        if self._saved is not None:
            self._guard.load_state_dict(self._saved["guard"])
            self._host.load_state_dict(self._saved["host"])
            self._saved = None

    def pre_optim_step(self) -> None:
        """Ask now: the gradient is complete and clipping comes next."""
        assert self._gate is not None
        loss = self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)
        if loss is not None:
            self._gate.add_loss(loss)
        self._gate.ask()

    def close(self) -> None:
        """Take the gate off; called at the end of a run, also after an error."""
        if self._gate is not None:
            self._gate.remove()
        if self._host is not None:
            self._host.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's and the host's state."""
        if self._guard is None or self._host is None:
            return self._saved or {}
        return {"guard": self._guard.state_dict(), "host": self._host.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the guard exists."""
        self._saved = state_dict or None
