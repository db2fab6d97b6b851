"""The guard: reads a step's signals, decides before the optimizer acts, and remembers exactly.

In a trainer: ``build(config)`` once, ``decide(signals)`` every step, and the host carries out the decision.
In anybody's loop::

    guard = Guard.for_run(model, optimizer)
    for batch in loader:
        loss = model(batch)
        loss.backward()
        if guard.allows(loss):
            optimizer.step()
        optimizer.zero_grad()

With fp16 and a ``GradScaler``, call ``scaler.unscale_(optimizer)`` before ``allows``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.core.errors import UserError
from poise.core.host import Host
from poise.core.types import Clip, Decision, Halt, Proceed, Rollback, Signals, Skip
from poise.guard.detectors.base import Detector
from poise.guard.detectors.fast_spike import FastSpike
from poise.guard.detectors.grad_spike import GradSpike
from poise.guard.detectors.nonfinite import NonFinite
from poise.guard.policy import Policy, PolicyConfig
from poise.guard.responses.dispatch import carry_out
from poise.guard.signals.gradient import agree, gradient_norm

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

log = logging.getLogger("poise")

STATE_FORMAT = 1

Observer = Callable[[Signals, Decision], None]


class TrainingHalted(RuntimeError):  # noqa: N818 - it says what happened; it is not an error of the program
    """Going on would do harm, and there is no host to ask for better. The message is for the user."""


@dataclass(frozen=True)
class GuardConfig:
    """What the guard looks at and how patient it is. Windows and patience are in steps.

    Attributes:
        enabled: false lets every step through.
        window: span of the median that is the loss's level.
        scale_window: span over which the loss's noise is measured.
        sigma: robust standard deviations above the level that make a spike.
        floor: relative rise below which nothing is a spike, 0.05 for 5 %.
        min_values: steps before the spike rule judges at all.
        relearn_after: steps in a row above the bar before a steady new level is accepted.
        grad_sigma, grad_factor: the same for the gradient norm (notes only): deviations, and times its level.
        skip_patience, cool_down, max_rollbacks, max_skips, budget_steps: see ``PolicyConfig``.
    """

    enabled: bool = True
    window: int = 32
    scale_window: int = 128
    sigma: float = 6.0
    floor: float = 0.05
    min_values: int = 20
    relearn_after: int = 50
    grad_sigma: float = 8.0
    grad_factor: float = 2.0
    skip_patience: int = 5
    cool_down: int = 100
    max_rollbacks: int = 3
    max_skips: int = 50
    budget_steps: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("scale_window", 8), ("min_values", 5), ("relearn_after", 10)):
            if getattr(self, name) < least:
                raise UserError(f"guard.{name} is {getattr(self, name)}; use at least {least}")
        for name, above in (("sigma", 0.0), ("floor", 0.0), ("grad_sigma", 0.0), ("grad_factor", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > above):
                raise UserError(f"guard.{name} is {value}; use a finite number above {above:g}")
        _ = self.policy  # its own checks

    @property
    def policy(self) -> PolicyConfig:
        """The policy's share of the settings."""
        return PolicyConfig(
            skip_patience=self.skip_patience,
            cool_down=self.cool_down,
            max_rollbacks=self.max_rollbacks,
            max_skips=self.max_skips,
            budget_steps=self.budget_steps,
        )


class Guard:
    """Detectors and a policy. Not thread-safe; one per run.

    Args:
        detectors: all of them see every step; names must be unique.
        policy: turns their alarms into one decision; ``None`` lets every step through.
        observer: told about every decision after it was made; it cannot change it.
    """

    def __init__(self, detectors: Sequence[Detector], policy: Policy | None, observer: Observer | None = None) -> None:
        names = [detector.name for detector in detectors]
        if len(set(names)) < len(names):
            raise UserError(f"two detectors have the same name in {names}; give each its own")
        self._detectors = tuple(detectors)
        self._policy = policy
        self._observer = observer
        self._loop: _Loop | None = None

    @classmethod
    def for_run(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        config: GuardConfig | None = None,
        host: Host | None = None,
    ) -> Guard:
        """Return a guard for a loop of one's own; ask it with ``allows``.

        Args:
            model: its parameters' gradients are watched.
            optimizer: read for the learning rate only. One with a ``measure()`` method (``poise.optim``)
                lends its gradient norm, so that the norm is computed once.
            config: defaults are sane.
            host: who can go back to a checkpoint. Without one the guard skips bad steps; where skipping is
                not enough it raises ``TrainingHalted`` for NaN and lets a spike through with a warning.
        """
        guard = build(config or GuardConfig(), can_rollback=None if host else lambda at_most: False)
        guard._loop = _Loop(model, optimizer, host)
        return guard

    def decide(self, signals: Signals) -> Decision:
        """Return what to do about this step. Call it once for every step, before the optimizer.

        The alarms that led to the decision, notes included, are in the decision; nothing is recorded here.
        """
        alarms = [alarm for d in self._detectors if (alarm := d.update(signals)) is not None]
        decision: Decision = Proceed() if self._policy is None else self._policy.decide(signals.step, alarms)
        if isinstance(decision, Proceed) and any(alarm.severity == "critical" for alarm in alarms):
            log.warning("guard, step %d: %s", signals.step, decision.reason)  # giving up is loud
        if self._observer is not None:
            self._observer(signals, decision)
        return decision

    def allows(self, loss: Tensor | float) -> bool:
        """Whether to call ``optimizer.step()`` now. Ask once a step, after ``backward`` and before clipping.

        Waits for the device once. Under ``torch.distributed`` every rank asks and all get the same answer.

        Raises:
            TrainingHalted: skipping is not enough and nobody can go back to a checkpoint.
            UserError: the guard was not made by ``for_run``.
        """
        if self._loop is None:
            raise UserError("allows() needs to know the model; make the guard with Guard.for_run(model, optimizer)")
        signals = self._loop.read(loss)
        decision = self.decide(signals)
        match decision:
            case Proceed():
                return True
            case Clip(max_norm=max_norm):
                self._loop.clip(max_norm)
                return True
            case Skip():
                log.warning("guard, step %d: %s", signals.step, decision.reason)
                return False
            case Rollback() | Halt() if self._loop.host is None:
                raise TrainingHalted(decision.reason)
            case other:
                log.warning("guard, step %d: %s: %s", signals.step, other.action, other.reason)
                self._loop.carry_out(other)
                return False

    def state_dict(self) -> dict[str, Any]:
        """Return everything the guard remembers, JSON-able and exact."""
        return {
            "format": STATE_FORMAT,
            "detectors": {detector.name: detector.state_dict() for detector in self._detectors},
            "policy": None if self._policy is None else self._policy.state_dict(),
            "step": None if self._loop is None else self._loop.step,
        }

    def load_state_dict(self, state: dict[str, Any], keep_policy: bool = False) -> None:
        """Take over what ``state_dict`` returned. A detector that the state does not know starts afresh.

        Args:
            state: from ``state_dict``.
            keep_policy: true after a rollback: the detectors' windows go back with the weights, while the
                policy remembers what it has tried, so that a run cannot go round in circles.

        Raises:
            UserError: the state is not one of a guard, or of a later format.
        """
        if state.get("format") != STATE_FORMAT:
            raise UserError(
                f"guard state has format {state.get('format')!r}, this version reads {STATE_FORMAT}; "
                "resume with the version of poise that saved it"
            )
        for detector in self._detectors:
            if detector.name in state["detectors"]:
                detector.load_state_dict(state["detectors"][detector.name])
        if self._policy is not None and state["policy"] is not None and not keep_policy:
            self._policy.load_state_dict(state["policy"])
        if self._loop is not None and state["step"] is not None:
            self._loop.step = state["step"]


def build(
    config: GuardConfig, can_rollback: Callable[[int], bool] | None = None, observer: Observer | None = None
) -> Guard:
    """Return the guard that ``config`` describes.

    Args:
        config: settings; ``enabled = False`` gives a guard that always answers ``Proceed``.
        can_rollback: says whether there is a verified checkpoint with a step of at most its argument; without
            it the host is asked when the time comes.
        observer: told about every decision.
    """
    if not config.enabled:
        return Guard((), None, observer)
    detectors: tuple[Detector, ...] = (
        NonFinite(),
        FastSpike(
            window=config.window,
            scale_window=config.scale_window,
            sigma=config.sigma,
            floor=config.floor,
            min_values=config.min_values,
            relearn_after=config.relearn_after,
        ),
        GradSpike(
            window=config.window,
            scale_window=config.scale_window,
            sigma=config.grad_sigma,
            factor=config.grad_factor,
            min_values=config.min_values,
            relearn_after=config.relearn_after,
        ),
    )
    return Guard(detectors, Policy(config.policy, can_rollback), observer)


class _Loop:
    """What the drop-in guard knows of the loop it sits in."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, host: Host | None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.host = host
        self.step = 0
        self._norm: Tensor | None = None

    def read(self, loss: Tensor | float) -> Signals:
        """Return the signals of the next step."""
        import torch

        self.step += 1
        measure = getattr(self.optimizer, "measure", None)
        self._norm = norm = gradient_norm(self.model.parameters()) if measure is None else measure()
        assert norm is not None
        on_device = loss if isinstance(loss, torch.Tensor) else torch.tensor(float(loss), device=norm.device)
        loss_value, norm_value = agree(on_device, norm)
        lr = float(self.optimizer.param_groups[0]["lr"])
        return Signals(step=self.step, loss=loss_value, grad_norm=norm_value, lr=lr, tokens=0)

    def clip(self, max_norm: float) -> None:
        """Scale the gradients down to a global norm of at most ``max_norm``, in place."""
        import torch

        assert self._norm is not None
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, self._norm)

    def carry_out(self, decision: Decision) -> None:
        """Let the host do it, and count on from the step it went back to."""
        assert self.host is not None
        restored = carry_out(decision, self.host)
        if restored is not None:
            self.step = restored
