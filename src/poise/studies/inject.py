"""Real faults, put into a run through the same interfaces that ordinary code uses, and said to be injected.

A fault is keyed to the n-th batch the run is shown, so that it strikes every run at the same data and does
not come again after a rollback that moves on to new data, as with a passing fault of a machine or a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from poise.core.errors import UserError
from poise.core.rng import derive
from poise.core.types import Batch
from poise.data.loader import Loader
from poise.train.state import Run

FaultKind = Literal["garbage_batch", "nan_gradient", "inf_gradient", "high_lr"]

_SAYS: dict[FaultKind, str] = {
    "garbage_batch": "a batch of uniformly random tokens",
    "nan_gradient": "one NaN in one gradient element",
    "inf_gradient": "one inf in one gradient element",
    "high_lr": "learning rate multiplied by {factor:g} for {length} steps",
}


@dataclass(frozen=True)
class Fault:
    """One fault: what, at which batch (1-based), for how many batches, and how strong (``high_lr`` only)."""

    kind: FaultKind
    at: int
    length: int = 1
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.at < 1 or self.length < 1:
            raise UserError(f"a fault's at and length must be at least 1, not {self.at} and {self.length}")

    @property
    def text(self) -> str:
        return _SAYS[self.kind].format(factor=self.factor, length=self.length)

    def strikes(self, batch: int) -> bool:
        return self.at <= batch < self.at + self.length


class Injector:
    """Attach faults to an assembled run: ``train(recipe, out, before=Injector(faults).attach)``."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        self._batch = 0

    def attach(self, run: Run) -> None:
        """Wrap the run's loader and learning-rate setter and hook one parameter's gradient."""
        self._run = run
        self._loader = run.loader
        self._set_lr = run.optimizer.set_lr
        run.loader = _Wrapped(self, run.loader)
        run.optimizer.set_lr = self._faulty_lr  # type: ignore[method-assign]
        parameter = max(run.model.parameters(), key=torch.numel)
        parameter.register_post_accumulate_grad_hook(self._faulty_gradient)

    def _active(self, kind: FaultKind, batch: int) -> Fault | None:
        return next((f for f in self.faults if f.kind == kind and f.strikes(batch)), None)

    def batch(self, first: int, count: int) -> Batch:
        batch_size = self._run.recipe.train.batch_size
        number = first // batch_size + 1
        if number != self._batch:
            self._batch = number
            self._announce(number)
        clean = self._loader.batch(first, count)
        if self._active("garbage_batch", number) is None:
            return clean
        generator = torch.Generator().manual_seed(derive(first, "garbage"))
        vocab = self._run.model.spec.vocab_size
        tokens = torch.randint(vocab, (count, clean.inputs.shape[1] + 1), generator=generator)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), clean.samples)

    def _faulty_lr(self, value: float) -> None:
        run = self._run
        fault = self._active("high_lr", run.position.next_sample // run.recipe.train.batch_size + 1)
        self._set_lr(value * fault.factor if fault else value)

    def _faulty_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        for kind, value in (("nan_gradient", torch.nan), ("inf_gradient", torch.inf)):
            if self._active(kind, self._batch) is not None:  # type: ignore[arg-type]
                parameter.grad.view(-1)[0] = value

    def _announce(self, number: int) -> None:
        journal = self._run.journal
        for fault in self.faults:
            if fault.at == number and journal is not None:
                journal.write(
                    "event",
                    step=self._run.position.step,
                    kind=fault.kind,
                    severity="note",
                    signal="",
                    value=0.0,
                    expected=0.0,
                    detector="injector",
                    message=f"injected: {fault.text}",
                    injected=fault.kind,
                    length=fault.length,
                )


class _Wrapped(Loader):
    """A loader whose batches pass through the injector; everything else is the real loader's."""

    def __init__(self, injector: Injector, loader: Loader) -> None:
        self.__dict__.update(loader.__dict__)
        self._injector = injector

    def batch(self, first: int, count: int) -> Batch:
        return self._injector.batch(first, count)
