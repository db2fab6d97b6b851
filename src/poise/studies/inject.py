"""Real faults, put into a run through the same interfaces that ordinary code uses, and said to be injected.

A fault is keyed to the n-th batch the run is shown, so that it strikes every run at the same data and does
not come again after a rollback that moves on to new data, as with a passing fault of a machine or a schedule.

When a host trains a stretch again on the side to find a cause (``core.host.Rewinder``), the faults behave as
what they are: those of the data are in the data, those of the schedule and of the architecture are in the steps,
and a passing fault is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.core.host import Replayed, Rewinder
from poise.core.types import Batch
from poise.data.feed.loader import PLAIN, Loader, View
from poise.studies.faults import (
    Fault,
    FaultKind,
    flip_bit,
    garbage,
    largest_at,
    one_token,
    parameters_at,
    scale_matrices,
    scale_query_key,
    second_moments,
    shifted,
)
from poise.train.state import Run

_GRADIENTS: dict[FaultKind, float] = {"nan_gradient": torch.nan, "inf_gradient": torch.inf}


class Injector:
    """Attach faults to an assembled run of one process: ``train(recipe, out, before=Injector(faults).attach)``."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        self._batch = 0  # number of the batch shown last
        self._first = -1  # its last micro-batch's first sample
        self._now: frozenset[Fault] = frozenset()  # faults that strike the present step
        self._done: set[tuple[Fault, int]] = set()  # (fault, batch) that has struck
        self._announced: set[Fault] = set()
        self._replaying = False
        self._loudness = 1.0
        self._frozen: dict[Fault, list[tuple[Tensor, Tensor]]] = {}  # parameter and what its second moment is held at

    def attach(self, run: Run) -> None:
        """Wrap what the faults go through: loader, learning-rate setter, gradients, moments. What no fault of this
        injector needs is left alone.

        Raises:
            UserError: a fault's place is not in the model.
        """
        self._run = run
        self._loader = run.loader
        self._set_lr = run.optimizer.set_lr
        run.loader = _Wrapped(self, run.loader)
        run.optimizer.set_lr = self._faulty_lr  # type: ignore[method-assign]
        if isinstance(run.host, Rewinder):
            self._replay: Callable[..., Replayed] = run.host.replay
            run.host.replay = self._on_the_side  # type: ignore[method-assign]
        for fault in self.faults:
            parameters_at(run.model, fault.place)  # raises where there is no such place
            if fault.kind in _GRADIENTS:
                parameter = largest_at(run.model, fault.place)
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(fault))  # type: ignore[no-untyped-call]
        kinds = {fault.kind for fault in self.faults}
        if "loud_batch" in kinds:
            self._backward = run.backward
            run.backward = self._loud_backward  # type: ignore[method-assign]
            run.model.register_forward_hook(self._loud_forward)
        if "stale_v" in kinds:
            run.optimizer.register_step_pre_hook(self._before_update)
            run.optimizer.register_step_post_hook(self._after_update)

    # -- when ------------------------------------------------------------------------------------------

    def _number(self, sample: int) -> int:
        """Return the number of the batch a sample is in, as long as nothing was left out."""
        growing, size = self._run.recipe.train.batch_ramp, self._run.recipe.train.batch_size
        return sample // size + 1 if growing is None else growing.step_of(sample)

    def _first_sample(self, number: int) -> int:
        growing, size = self._run.recipe.train.batch_ramp, self._run.recipe.train.batch_size
        return (number - 1) * size if growing is None else growing.first_sample(number)

    def _active(self, batch: int, *kinds: FaultKind) -> Fault | None:
        """Return the fault of these kinds that belongs to the batch, or in a replay to the step."""
        for fault in self.faults:
            in_steps = self._replaying and fault.what.nature == "mechanism"
            if fault.kind in kinds and fault.strikes(self._run.position.step if in_steps else batch):
                return fault
        return None

    def gather(self, samples: Sequence[int], view: View) -> Batch:
        """Return samples as the faults leave them; a new step's faults strike."""
        first = samples[0]
        number = self._number(first)
        if number != self._batch or first <= self._first:
            self._batch = number
            self._strike(number)
        self._first = first
        clean = self._loader.gather(samples, view)
        if (fault := self._active(number, "repeated_data")) is not None:
            return self._stuck(fault, clean, samples, view)
        vocab_size = self._run.model.spec.vocab_size
        if self._active(number, "garbage_batch") is not None:
            return garbage(clean, vocab_size)
        if self._active(number, "repeated_token_batch") is not None:
            return one_token(clean, vocab_size)
        return shifted(clean) if self._active(number, "label_shift") is not None else clean

    def _strike(self, number: int) -> None:
        """Begin a step: choose the faults that strike it, announce them, change weights and moments.

        Somebody may ask for the batch again to look at it; then nothing is changed a second time.
        """
        striking = [fault for fault in self.faults if self._strikes_now(fault, number)]
        self._now = frozenset(striking)
        for fault in striking:
            if not self._replaying:
                self._done.add((fault, number))
                self._announce(fault)
            self._change(fault)
        if not self._replaying:
            self._frozen = {f: held for f, held in self._frozen.items() if number < f.at + f.length}

    def _strikes_now(self, fault: Fault, number: int) -> bool:
        if self._replaying:
            return fault.what.nature != "passing" and self._active(number, fault.kind) == fault
        return fault.strikes(number) and (fault, number) not in self._done

    # -- what ------------------------------------------------------------------------------------------

    def _change(self, fault: Fault) -> None:
        """Do what happens to weights and moments, before the forward pass of the step."""
        model = self._run.model
        match fault.kind:
            case "scaled_layer":
                scale_matrices(model, fault.place, fault.factor)
            case "qk_growth":
                scale_query_key(model, fault.place, fault.factor)
            case "bit_flip":
                flip_bit(model, fault.place, fault.at)
            case "shrunk_v":
                for v in second_moments(self._run.optimizer, self._parameters(fault)):
                    v.mul_(fault.factor)
            case "stale_v" if self._batch == fault.at:
                held = []
                for p, v in zip(
                    self._parameters(fault),
                    second_moments(self._run.optimizer, self._parameters(fault)),
                    strict=True,
                ):
                    v.mul_(fault.factor)
                    held.append((p, v.clone()))
                self._frozen[fault] = held
            case _:
                pass

    def _parameters(self, fault: Fault) -> list[Tensor]:
        return list(parameters_at(self._run.model, fault.place).values())

    def _stuck(self, fault: Fault, clean: Batch, samples: Sequence[int], view: View) -> Batch:
        """Return the last batch before the fault, under the numbers that were asked for."""
        first = samples[0]
        begin = self._first_sample(max(fault.at - 1, 1)) + first - self._first_sample(self._number(first))
        again = self._loader.gather(range(begin, begin + len(samples)), view)
        return dataclasses.replace(again, samples=clean.samples)

    def _faulty_lr(self, lr: float) -> None:
        fault = self._active(self._number(self._run.position.next_sample), "high_lr", "lr_jump")
        self._set_lr(lr * fault.factor if fault else lr)

    def _gradient_hook(self, fault: Fault) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if fault in self._now:
                parameter.grad.view(-1)[0] = _GRADIENTS[fault.kind]

        return hook

    def _loud_backward(self, batch: Batch) -> None:
        fault = self._active(self._number(batch.samples[0]), "loud_batch")
        self._loudness = fault.factor if fault else 1.0
        try:
            self._backward(batch)
        finally:
            self._loudness = 1.0  # evaluations and probes see the model as it is

    def _loud_forward(self, module: torch.nn.Module, arguments: Any, out: Any) -> Any:
        if self._loudness == 1.0:
            return None
        return out._replace(loss=out.loss * self._loudness, ce=out.ce * self._loudness)

    def _before_update(self, *_: Any) -> None:
        """Let go of moments that somebody has mended: a reset or a rollback brings buffers that are not stuck."""
        if self._replaying:
            return
        for fault, held in list(self._frozen.items()):
            state = self._run.optimizer.state
            if not all("exp_avg_sq" in state.get(p, {}) and torch.equal(state[p]["exp_avg_sq"], v) for p, v in held):
                del self._frozen[fault]

    def _after_update(self, *_: Any) -> None:
        if self._replaying:
            return
        for held in self._frozen.values():
            for p, v in held:
                self._run.optimizer.state[p]["exp_avg_sq"].copy_(v)

    def _on_the_side(self, *arguments: Any, **named: Any) -> Replayed:
        """Stand for the host's ``replay``: passing faults stay away, and the step under way is as it was afterwards."""
        before = self._batch, self._first, self._now
        self._replaying = True
        try:
            return self._replay(*arguments, **named)
        finally:
            self._replaying = False
            self._batch, self._first, self._now = before

    def _announce(self, fault: Fault) -> None:
        run = self._run
        if run.journal is None or fault in self._announced:
            return
        self._announced.add(fault)
        step = run.position.step
        left = max(1, run.recipe.train.steps - step + 1)
        run.journal.write(
            "event",
            step=step,
            kind=fault.kind,
            severity="note",
            signal="",
            value=0.0,
            expected=0.0,
            detector="injector",
            message=f"injected: {fault.text}",
            place=fault.place,
            injected=fault.kind,
            length=left if fault.kind == "lr_jump" else min(fault.length, left),
            causes=list(fault.what.causes),
            recoverable=fault.recoverable,
        )


class _Wrapped(Loader):
    """A loader whose batches pass through the injector; everything else is the real loader's."""

    def __init__(self, injector: Injector, loader: Loader) -> None:
        self.__dict__.update(loader.__dict__)
        self._injector = injector

    def batch(self, first: int, count: int, view: View = PLAIN) -> Batch:
        return self._injector.gather(range(first, first + count), view)

    def gather(self, samples: Sequence[int], view: View = PLAIN) -> Batch:
        return self._injector.gather(samples, view)


__all__ = ["Fault", "Injector"]
