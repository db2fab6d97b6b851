"""``guarded(optimizer)``: the guard for somebody who has nothing but an optimizer.

    optimizer = poise.optim.guarded(torch.optim.AdamW(model.parameters()))

The loop stays as it is. ``optimizer.step()`` asks the guard first and does nothing where it says no. Say the loss
with ``optimizer.step(loss=loss)`` or ``optimizer.observe(loss)``; without it only the gradient norm is judged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.guard.config import GuardConfig
from poise.guard.guard import Guard
from poise.integrations.gate import StepGate, refuse_lbfgs, run_closure
from poise.integrations.plain import OptimizerHost

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE_KEY = "poise_guard"
"""Where ``state_dict`` keeps the guard. Torch's own optimizers ignore the key, so uninstalling keeps checkpoints."""


def guarded(
    optimizer: torch.optim.Optimizer, model: nn.Module | None = None, config: GuardConfig | None = None
) -> GuardedOptimizer:
    """Return ``optimizer`` behind a guard; groups, state, hooks and schedulers are the optimizer's own.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that steps once per gradient (all of torch's but LBFGS).
        model: lets the guard name layers; without it the optimizer's parameters are watched.
        config: the guard's settings.

    Raises:
        UserError: the optimizer cannot be guarded, or is guarded already.
    """
    if isinstance(optimizer, GuardedOptimizer):
        raise UserError("this optimizer is guarded already; call guarded() once")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"guarded() takes a torch.optim.Optimizer, not {type(optimizer).__name__}")
    refuse_lbfgs(optimizer)
    return GuardedOptimizer(optimizer, model, config)


class GuardedOptimizer(torch.optim.Optimizer):
    """Made by ``guarded``. Attributes it does not have itself are the inner optimizer's.

    Clip before ``step`` as before: the guard then sees the clipped norm, in which NaN and infinity still show (they
    come out of clipping as NaN) but a growing norm does not. Unscale before clipping with a ``GradScaler``;
    ``scaler.step(optimizer)`` works and skips an overflow itself, so the guard never sees one.

    Attributes:
        optimizer: the optimizer inside.
        host: whom the guard asks for more than skipping.
    """

    # The scaler must unscale before it calls step(): inside a fused step the guard could not look.
    _step_supports_amp_scaling = False

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None, config: GuardConfig | None = None
    ) -> None:
        # Not Optimizer.__init__: groups and state belong to the inner optimizer, and to it alone.
        self.optimizer = optimizer
        self.host = OptimizerHost(optimizer, model)
        self._model, self._config = model, config or GuardConfig()
        self._gate = StepGate(self._new_guard())

    def _new_guard(self) -> Guard:
        if self._model is not None:
            return Guard.for_run(self._model, self.optimizer, self._config, host=self.host)
        without_layers = dataclasses.replace(self._config, every=0)
        return Guard.for_run(_Parameters(self.optimizer), self.optimizer, without_layers, host=self.host)

    @property
    def guard(self) -> Guard:
        """The guard that is asked."""
        return self._gate.guard

    @property
    def skipped(self) -> int:
        """Steps that the guard did not allow."""
        return self._gate.skipped

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the step that comes next; over micro-batches the shares are added up."""
        self._gate.add_loss(loss)

    def step(
        self, closure: Callable[[], Any] | Tensor | float | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Take a step if the guard allows it.

        Args:
            closure: evaluated once, before the guard decides; its value is the loss. A loss may stand here instead.
            loss: mean loss of the step, in nats.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            TrainingHalted: skipping is not enough.
        """
        if closure is not None and not callable(closure):
            closure, loss = None, closure
        result = run_closure(closure)
        if loss is None and isinstance(result, (Tensor, float)):
            loss = result
        if loss is not None:
            self._gate.add_loss(loss)
        if self._gate.take():
            self.optimizer.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state with the guard's under ``poise_guard``."""
        mine = {"guard": self.guard.state_dict(), "host": self.host.state_dict()}
        return {**self.optimizer.state_dict(), STATE_KEY: copy.deepcopy(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both; a state saved without a guard restores the optimizer and starts the guard afresh."""
        state = dict(state_dict)
        mine = state.pop(STATE_KEY, None)
        self.optimizer.load_state_dict(state)
        if mine is not None:
            self.guard.load_state_dict(mine["guard"])
            self.host.load_state_dict(mine["host"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; the guard watches it from then on."""
        self.optimizer.add_param_group(param_group)
        if self._model is None:  # its parameters were all that the guard knew
            state = self.guard.state_dict()
            self._gate.guard = self._new_guard()
            self.guard.load_state_dict(state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call ``hook`` before each step that is taken."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Call ``hook`` after each step that was taken."""
        return self.optimizer.register_step_post_hook(hook)

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "_gate", "_model", "_config"):  # not set yet: unpickling, copying
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"guarded({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise UserError("a guarded optimizer cannot be pickled or copied; save its state_dict()")


class _Parameters(nn.Module):
    """Stands for the model where only the optimizer is known: its parameters, without names of layers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.__dict__["_owner"] = optimizer

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of all groups, those added later included."""
        every = [p for group in self.__dict__["_owner"].param_groups for p in group["params"]]
        yield from ((f"{prefix}{index}", parameter) for index, parameter in enumerate(every))
