"""What the drop-in guard knows of the loop it sits in: its readings, its last good batch, its host."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from poise.core.errors import UserError
from poise.core.host import Host
from poise.core.types import Decision, Signals
from poise.guard.responses.dispatch import carry_out
from poise.guard.signals.curvature import gradient_curvature
from poise.guard.signals.listen import floats, inner_of
from poise.guard.signals.probe import LastBatch
from poise.guard.signals.together import over_ranks
from poise.guard.signals.tracker import Tracker
from poise.guard.signals.watch import Watch, watch
from poise.guard.signals.weights import moment_readings, weight_readings

if TYPE_CHECKING:
    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer


log = logging.getLogger("poise")

BEND_EVERY = 20
"""Steps between two measurements of the curvature in one trouble: each costs three gradients."""

NO_LOSS = 0.0
"""Stands for a loss that nobody knows; no detector judges a loss of zero."""


def check_arguments(model: object, optimizer: object) -> None:
    """Refuse what is no model or no optimizer, and warn where they do not belong together.

    Raises:
        UserError: with what was given instead.
    """
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"Guard.for_run wants the model first, a torch.nn.Module, not a {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"Guard.for_run wants a torch.optim.Optimizer second, not a {type(optimizer).__name__}")
    mine = {id(p) for p in model.parameters()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        log.warning("guard: the optimizer holds no parameter of this model; is it another model's?")


def unscale(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Unscale the gradients unless that has been done in this step; then ``scaler.update()`` works after a skip too."""
    if not scaler.is_enabled():
        return
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


class Loop:
    """A model, its optimizer, and perhaps a host; counts the steps.

    Args:
        every: steps between two measurements of the layers; 0 leaves the model without hooks.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, host: Host | None, scaler: GradScaler | None, *, every: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.host = host
        self.step = 0
        self._every = every
        self._bent = -BEND_EVERY
        self._told_zero = False
        self._scaler = scaler
        self._tracker = Tracker(model, optimizer, norm=getattr(optimizer, "measure", None), scaler=scaler)
        self._watch: Watch | None = watch(model, every) if every else None
        self._last: LastBatch | None = LastBatch(model) if every else None

    def read(self, loss: Any, token: int) -> Signals:
        """Return the signals of the next step."""
        self.step += 1
        if self._scaler is not None:
            unscale(self._scaler, self.optimizer)
        lr = float(self.optimizer.param_groups[0]["lr"])
        extra: dict[str, torch.Tensor | float] = {}
        if self._watch is not None:
            layers = self._watch.take() or {}
            extra |= {name: value for name, value in layers.items() if name != "loss"}
            if self.step % self._every == 1 % self._every:
                extra |= weight_readings(self.model)
        signals = self._tracker.read([NO_LOSS if loss is None else loss], self.step, lr, extra=extra, token=token)
        if signals.grad_norm == 0.0 and not self._told_zero:
            self._told_zero = True
            log.warning("guard, step %d: every gradient is zero: was zero_grad() called before the guard?", self.step)
        return signals

    def examine(self, signals: Signals) -> Mapping[str, float]:
        """Take more readings of a step that raised an alarm."""
        found: dict[str, float] = {}
        if self._last is None:
            return found
        again = self._last.readings()
        if again:
            found |= again | self._last.sequence_losses()
        model = inner_of(self.model)
        found |= floats(weight_readings(model) | moment_readings(model, self.optimizer))
        if self.step - self._bent >= BEND_EVERY or self.step < self._bent:
            self._bent = self.step
            found |= self._curvature(signals.lr)
        return over_ranks(found)

    def _curvature(self, lr: float) -> dict[str, float]:
        """The curvature along the step on the flagged batch; nothing where the loop's loss cannot be computed again."""
        call = None if self._last is None else self._last.call()
        if call is None or lr <= 0:
            return {}
        try:
            return gradient_curvature(inner_of(self.model), call, lr, optimizer=self.optimizer)
        except Exception as error:
            log.warning("guard: no curvature: %s: %s", type(error).__name__, error)
            return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and what the next reading compares with; JSON-able."""
        seen = 0 if self._watch is None else self._watch.seen
        return {"step": self.step, "seen": seen, "tracker": self._tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.step = state["step"]
        self._tracker.load_state_dict(state["tracker"])
        if self._watch is not None:
            self._watch.seen = state["seen"]

    def close(self) -> None:
        """Take the hooks off the model."""
        for part in (self._watch, self._last):
            if part is not None:
                part.remove()
        self._watch = self._last = None

    def accept(self) -> None:
        """The step was sound: its batch is what the next odd one is compared with."""
        if self._last is not None:
            self._last.accept()

    def clip(self, max_norm: float) -> None:
        """Scale the gradients down to a global norm of at most ``max_norm``, in place."""
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, self._tracker.norm)

    def carry_out(self, decision: Decision) -> None:
        """Let the host do it, and count on from the step it went back to."""
        assert self.host is not None
        restored = carry_out(decision, self.host)
        if restored is not None:
            self.step = restored
