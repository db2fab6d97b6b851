"""Between a loop that somebody else owns and its optimizer: ask the guard once, and skip by not calling.

Trainers call ``optimizer.step()`` themselves. The gate replaces that method on the one optimizer object, asks the
guard when the gradients are complete and not yet clipped, and calls the real ``step`` only where it may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from poise.core.errors import UserError
from poise.guard.guard import Guard

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class StepGate:
    """Gathers a step's loss, asks the guard once, and remembers the answer until the optimizer is called.

    Args:
        guard: from ``Guard.for_run``.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.skipped = 0
        self._loss: Tensor | float | None = None
        self._answer: bool | None = None
        self._remove: list[Callable[[], None]] = []

    def add_loss(self, loss: Tensor | float, weight: float = 1.0) -> None:
        """Add a micro-batch's share of the step's mean loss. Does not wait for the device."""
        share = (loss.detach().float().mean() if hasattr(loss, "detach") else float(loss)) * weight
        self._loss = share if self._loss is None else self._loss + share

    def ask(self) -> bool:
        """Ask the guard, once a step however often it is called. Gradients are complete, unscaled, not clipped."""
        if self._answer is None:
            loss, self._loss = self._loss, None
            self._answer = self.guard.allows(loss)
            self.skipped += not self._answer
        return self._answer

    def take(self) -> bool:
        """Return the step's answer and be ready for the next step."""
        answer, self._answer = self.ask(), None
        return answer

    def install(self, optimizer: Optimizer, when: Callable[[], bool] = lambda: True) -> None:
        """Put the gate before ``optimizer.step``, on this object only; where ``when()`` is false it lets through."""
        refuse_lbfgs(optimizer)
        inner = optimizer.step
        own = "step" in vars(optimizer)
        active = True

        @functools.wraps(inner)  # with its attributes: schedulers look for their mark on it
        def step(closure: Callable[[], Any] | None = None) -> Any:
            if not active or not when():
                return inner(closure)
            result = run_closure(closure)
            if not self.take():
                return result
            returned = inner()
            return returned if closure is None else result

        def remove() -> None:
            nonlocal active
            active = False
            if vars(optimizer).get("step") is not step:
                return  # somebody wrapped it again: it lets everything through
            if own:
                optimizer.step = inner  # type: ignore[method-assign]
            else:
                del optimizer.step

        optimizer.step = step  # type: ignore[method-assign]
        self._remove.append(remove)

    def replace(self, owner: Any, method: str, new: Callable[..., Any]) -> None:
        """Put ``new`` in the place of ``owner.method``, on this object only."""
        inner = getattr(owner, method)
        own = method in vars(owner)
        setattr(owner, method, functools.wraps(inner)(new))
        self._remove.append(lambda: setattr(owner, method, inner) if own else delattr(owner, method))

    def ask_before(self, owner: Any, method: str) -> None:
        """Ask whenever ``owner.method`` is called, before it acts."""
        inner = getattr(owner, method)

        def first_ask(*args: Any, **kwargs: Any) -> Any:
            self.ask()
            return inner(*args, **kwargs)

        self.replace(owner, method, first_ask)

    def ask_after(self, owner: Any, method: str) -> None:
        """Ask whenever ``owner.method`` has been called."""
        inner = getattr(owner, method)

        def then_ask(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self.ask()
            return result

        self.replace(owner, method, then_ask)

    def remove(self) -> None:
        """Take everything off again."""
        while self._remove:
            self._remove.pop()()
        self.guard.close()


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Evaluate a closure the way an optimizer would."""
    if closure is None:
        return None
    import torch

    with torch.enable_grad():
        return closure()


def refuse_lbfgs(optimizer: Optimizer) -> None:
    """Raise ``UserError`` for the one optimizer that evaluates the loss several times in a step."""
    if any(base.__name__ == "LBFGS" for base in type(optimizer).__mro__):
        raise UserError("the guard decides once per gradient, but LBFGS takes several in a step; use another optimizer")


def innermost(optimizer: Any) -> Any:
    """Return the torch optimizer inside a trainer's wrappers (Accelerate, Lightning)."""
    while hasattr(optimizer, "optimizer") and optimizer.optimizer is not None:
        optimizer = optimizer.optimizer
    return optimizer
