"""Readings of every layer every k steps, in anybody's training loop.

    watching = watch(model, every=10)
    ... train as ever ...
    print(watching.step, watching.readings)

A hook on the model's forward listens (``guard/signals/listen.py``) during the first training forward of every k-th
step. A step begins with the first forward after the weights changed, after the gradients were freed, or after ``take``;
so the further micro-batches of a step are not measured. Recomputation inside the backward pass is not a forward.

Compiled code cannot be heard. If parts of the model are compiled, the same batch's first ``rows`` sequences are run
once more beforehand, uncompiled and without gradient (``guard/signals/probe.py``); the step itself stays as it is.
If the whole model was compiled in place (``model.compile()``) even the model's own hooks are not called; the watch
then has no readings and says so once.

With ``linears=True`` the readings include those of ``guard/signals/linears.py`` for the measured micro-batch, of this
rank alone; the gradients with respect to inputs are there after the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.guard.signals.linears import LinearNorms, in_backward
from poise.guard.signals.listen import Heard, Once, find_sites, floats, has_compiled_parts, inner_of, listening
from poise.guard.signals.probe import batch_size, extract_loss, hook_point, is_aside, probe, take_rows

_SILENT_FOR = 3
"""Steps told by ``take`` without a forward heard, after which the watch says that it hears nothing."""


class Watch:
    """Measures every layer of a model every ``every`` steps. Make one with ``watch``; a context manager as well.

    Attributes:
        seen: training steps seen so far.
        step: the step, counted from 1, to which ``readings`` belong; 0 before the first.
    """

    def __init__(
        self, model: nn.Module, every: int, loss: Callable[[Any], Tensor] | None, rows: int, linears: bool = False
    ) -> None:
        self.seen = self.step = 0
        self._model, self._every, self._loss_of, self._rows = model, every, loss, rows
        self._once, self._sites = Once(), find_sites(model)
        self._newest: dict[str, Tensor] = {}
        self._unread = False
        self._open: contextlib.ExitStack | None = None
        self._heard: Heard | None = None
        self._probed: dict[str, Tensor] = {}
        self._signs: tuple[int, ...] | None = None
        self._witnesses = _witnesses(model)
        self._takes = 0
        self._linears = LinearNorms(model) if linears else None
        self._linears_heard = False
        point = hook_point(model)
        self._handles = [
            point.register_forward_pre_hook(self._before, with_kwargs=True),
            point.register_forward_hook(self._after, always_call=True),
        ]
        others = self._linears is not None and self._linears.places
        if not (self._sites.linears or self._sites.blocks or others):
            self._once.warn("sites", "watch: no layer of this model has a known name, so there is nothing to measure")

    @property
    def readings(self) -> dict[str, float]:
        """The last measurement by name; empty before the first. Waits for the device."""
        return floats(self._newest | self._linear_readings())

    def take(self) -> dict[str, Tensor] | None:
        """Return the newest measurement if it was not taken before; call once per step: it marks the step's end."""
        self._signs = None
        self._takes += 1
        self._close_linears()
        if self._takes == _SILENT_FOR and not self.seen:
            self._deaf()
        if not self._unread:
            return None
        self._unread = False
        return self._newest

    def remove(self) -> None:
        """Stop watching; the last readings stay."""
        self._close()
        self._close_linears()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    # -- hooks ------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or is_aside(module):
            return
        self._close()  # the last forward was left by something that is not an Exception
        if in_backward():
            return
        self._close_linears()
        if not (module.training and torch.is_grad_enabled()) or not self._begins_step():
            return
        self.seen += 1
        if (self.seen - 1) % self._every:
            return
        try:
            if has_compiled_parts(self._model):
                self._probed = self._aside(args, kwargs)
                return
            self._open = contextlib.ExitStack()
            self._heard = self._open.enter_context(
                listening(self._model, self._rows, sites=self._sites, once=self._once)
            )
            if self._linears is not None:
                self._linears.open()
        except Exception as error:
            self._close()
            self._once.warn("watch", f"watch: step {self.seen} was not measured: {type(error).__name__}: {error}")

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or is_aside(module) or not (self._heard or self._probed):
            return
        heard, readings = self._heard, self._probed
        self._close()
        if output is None:  # the forward raised
            self._close_linears()
            return
        if heard is not None:
            readings = heard.readings()
            if not heard.anything:
                self._deaf()
        try:
            loss = extract_loss(output, self._loss_of)
        except Exception as error:
            self._once.warn("loss", f"watch: no loss found in the output: {type(error).__name__}: {error}")
            loss = None
        if loss is not None:
            readings["loss"] = loss.detach().float()
        self._newest, self._unread, self.step = readings, True, self.seen
        if self._linears is not None and heard is not None:
            self._linears.read_weights()  # the optimizer's step may come before the hooks go
            self._linears_heard = True

    def _aside(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Measure a model with compiled parts on the first sequences of the batch."""
        B, inner = batch_size(args, kwargs), inner_of(self._model)
        some_args, some_kwargs = take_rows((list(args), dict(kwargs)), 0, min(B, self._rows), B)
        call = lambda: inner(*some_args, **some_kwargs)  # noqa: E731
        return probe(inner, call, self._rows, sites=self._sites, once=self._once).readings

    def _begins_step(self) -> bool:
        signs = tuple(parameter._version for parameter in self._witnesses)
        begins = signs != self._signs or all(parameter.grad is None for parameter in self._witnesses)
        self._signs = signs
        return begins

    def _close(self) -> None:
        stack, self._open, self._heard, self._probed = self._open, None, None, {}
        if stack is not None:
            stack.close()

    def _linear_readings(self) -> dict[str, Tensor]:
        return self._linears.tensors() if self._linears is not None and self._linears_heard else {}

    def _close_linears(self) -> None:
        """The backward pass of the measured forward is over: take its readings and the hooks off."""
        if self._linears is not None:
            self._newest |= self._linear_readings()
            self._linears_heard = False
            self._linears.close()

    def _deaf(self) -> None:
        if not (self._sites.linears or self._sites.blocks):
            return  # no layer has a known name: there is nothing to hear, and that is no fault
        self._once.warn(
            "deaf",
            "watch: the model's layers were not heard, so there are no readings of layers; compile with"
            " torch.compile(model) and not model.compile(), and watch the model that is called",
        )


def watch(
    model: nn.Module,
    every: int = 10,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    rows: int = 2,
    linears: bool = False,
) -> Watch:
    """Measure every layer of ``model`` every ``every`` training steps; signals only, nothing is changed.

    Args:
        model: the module the loop calls; DDP and ``torch.compile`` wrappers are looked through.
        every: steps from one measurement to the next; the first step is measured.
        loss: finds the loss in the model's output; by default it is looked for (``extract_loss``). The readings then
            include ``loss``, of the measured micro-batch.
        rows: sequences of a batch whose attention is measured.
        linears: also measure the norms of every linear layer's output, input, input gradient and weight.

    Raises:
        UserError: ``every`` or ``rows`` below 1, or something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"poise.watch takes a torch module, not a {type(model).__name__}; give the model that is called"
        )
    if every < 1 or rows < 1:
        raise UserError(f"every is {every} and rows is {rows}; give whole numbers of at least 1")
    return Watch(model, every, loss, rows, linears)


def _witnesses(model: nn.Module) -> list[nn.Parameter]:
    """Return a few trainable parameters, spread over the model; some of them change at every step."""
    params = [p for p in model.parameters() if p.requires_grad]
    return params[:: max(1, len(params) // 4)]
