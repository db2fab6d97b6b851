"""Run a forward pass again on the side: no gradient, nothing left behind, readings of every layer.

``probe`` runs any call; ``LastBatch`` remembers what a loop fed its model, so that a guard can ask "are the weights
damaged, or was the batch odd?" without knowing the loop: the loss of the last accepted batch with the present weights
(``probe_loss``) against the loss it had when it was trained on (``probe_expected``).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.core.types import IGNORE
from poise.guard.signals.listen import Once, Sites, floats, inner_of, listening

LossOf = Callable[[Any], Tensor]

AGE: Final = 8
"""Accepted steps between one batch that is kept and the next."""

NEXT_ROWS: Final = 2
"""Sequences that are kept where the model's forward gives no loss."""

KEEP_UP_TO: Final = 1 << 24
"""Elements of a batch that ``LastBatch`` copies; a larger one is not remembered."""

_ASIDE: Final = "_poise_aside"


@dataclass(frozen=True)
class Probe:
    """What a probe gave.

    Attributes:
        output: what the call returned, without a graph.
        loss: 0-dim loss found in it (``extract_loss``), or ``None``.
        readings: as of ``listening``.
    """

    output: Any
    loss: Tensor | None
    readings: dict[str, Tensor]


def probe(
    model: nn.Module,
    call: Callable[[], Any],
    rows: int = 2,
    *,
    loss_of: LossOf | None = None,
    sites: Sites | None = None,
    once: Once | None = None,
) -> Probe:
    """Run ``call`` (a forward of ``model``) without gradient and listen to every layer.

    Compiled code runs uncompiled, so that it can be heard. Random generators and the model's buffers are as before
    afterwards, training or evaluation mode is left as it is (so dropout acts, with numbers of its own). Call the
    module inside DDP (``inner_of``), not DDP itself, or other ranks would wait; with sharded weights (FSDP) all ranks
    have to probe together.

    Raises:
        Exception: whatever ``call`` raises.
    """
    with aside(model), torch.no_grad(), listening(model, rows, sites=sites, once=once) as heard:
        output = call()
    return Probe(output, extract_loss(output, loss_of), heard.readings())


@contextlib.contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Leave no trace: random generators and buffers are restored, and compiled code runs uncompiled.

    ``LastBatch`` and ``Watch`` take no notice of a forward that is made in here.
    """
    inner = inner_of(model)
    was_aside = is_aside(model)
    devices = {tensor.device for tensor in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with contextlib.ExitStack() as stack:
        for kind in {device.type for device in devices} & {"cuda", "xpu"}:
            numbers = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(numbers, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        if "torch._dynamo" in sys.modules:  # else nothing was ever compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            object.__setattr__(inner, _ASIDE, True)  # told by the module itself: all who listen to it can see it
            yield
        finally:
            object.__setattr__(inner, _ASIDE, was_aside)
            for buffer, before in buffers:
                # Through .data, so that a graph which keeps the buffer for its backward pass takes no offence.
                buffer.data.copy_(before)


def is_aside(model: nn.Module) -> bool:
    """Whether a forward of ``model`` is made on the side, not as a part of training."""
    return bool(getattr(inner_of(model), _ASIDE, False))


def extract_loss(output: Any, loss_of: LossOf | None = None) -> Tensor | None:
    """Return the scalar loss in a model's output, or ``None``.

    ``loss_of(output)`` where given; else the output itself, its ``["loss"]``, its ``.loss``, or the first member of a
    tuple that is a 0-dim floating-point tensor.
    """
    if loss_of is not None:
        return loss_of(output)
    candidates = [output]
    if isinstance(output, Mapping):
        candidates = [output.get("loss")]
    elif hasattr(output, "loss"):
        candidates = [output.loss]
    elif isinstance(output, tuple | list):
        candidates = list(output)
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
            return value
    return None


def per_sequence_loss(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss_of: LossOf | None = None,
) -> Tensor | None:
    """Return the loss of each sequence of a batch, (B,) fp32 nats per token, or ``None`` where it cannot be told.

    A model whose ``forward`` takes ``token_loss`` (poise's decoder) is asked for it. Any other is called once for each
    sequence, so its own convention of targets holds; without a loss in the output, logits (1, T, V) are judged by
    the next of the (1, T) ids that went in. Runs aside, without gradient. A sequence without targets gives NaN. With
    sharded weights (FSDP) all ranks have to call together, with equally many sequences.
    """
    inner, named = inner_of(model), dict(kwargs or {})
    with aside(model), torch.no_grad():
        if "token_loss" in inspect.signature(inner.forward).parameters and loss_of is None:
            losses_BT = inner(*args, **(named | {"token_loss": True})).token_loss
            targets = args[1] if len(args) > 1 else named["targets_BT"]
            return losses_BT.sum(-1).float() / (targets != IGNORE).sum(-1)  # type: ignore[no-any-return]
        B = batch_size(args, named)
        losses: list[Tensor] = []
        for row in range(B):
            some_args, some_named = take_rows((list(args), named), row, row + 1, B)
            output = inner(*some_args, **some_named)
            loss = extract_loss(output, loss_of)
            if loss is None:
                loss = _next_token_loss(output, (some_args, some_named))
            if loss is None:
                return None
            losses.append(loss.float())
    return torch.stack(losses) if losses else None


class LastBatch:
    """Remembers what the model was last fed and what it was fed at an accepted step some steps ago.

    Not at the last one: a trouble is seen a few steps after it began, and the batch must have met sound weights.

    It hooks the model's forward; training forwards only. With gradient accumulation the last micro-batch stands for
    its step. Nothing here raises: what cannot be done gives an empty answer. A language model whose output holds no
    loss (it returns logits, and the loop makes the loss) is judged by the next tokens of two sequences, which costs a
    forward of them at each batch that is kept; other models cannot be probed without ``loss_of``. Costs a copy of the
    inputs at each batch that is kept.

    Args:
        model: any module; DDP and ``torch.compile`` wrappers are looked through.
        loss_of: finds the loss in the model's output; by default ``extract_loss`` looks for it.
        age: the kept batch is so many accepted steps old, up to twice as many; 0 for the last one.
    """

    def __init__(
        self, model: nn.Module, loss_of: LossOf | None = None, once: Once | None = None, *, age: int = AGE
    ) -> None:
        self._model, self._loss_of, self._once, self._age = model, loss_of, once or Once(), age
        self._seen: tuple[Any, Tensor | None] | None = None
        self._accepted: tuple[Any, Tensor] | None = None
        self._candidate: tuple[Any, Tensor] | None = None
        self._accepts = 0
        self._next_token = True
        self._handle = hook_point(model).register_forward_hook(self._on_forward, with_kwargs=True)

    def accept(self) -> None:
        """The last forward's step is sound: keep its batch and the loss it had. To be called before the update."""
        self._accepts += 1
        if self._seen is None or (self._accepts - 1) % max(self._age, 1):
            return
        (args, kwargs), loss = self._seen
        if (
            loss is None and self._loss_of is None
        ):  # the loop makes the loss: a few sequences are judged by their own next tokens
            B = batch_size(args, kwargs)
            args, kwargs = take_rows((list(args), dict(kwargs)), 0, min(NEXT_ROWS, B), B)
            loss = self._loss_of_run((args, kwargs), self._run((args, kwargs), 1)) if self._next_token else None
            self._next_token = loss is not None
        batch = _copy((args, kwargs))
        kept = None if batch is None or loss is None else (batch, loss.float())
        self._accepted = self._candidate if self._age else kept
        self._candidate = kept

    def probe(self, rows: int = 2) -> Probe | None:
        """Run the good batch again with the present weights; ``None`` where that is impossible."""
        return None if self._accepted is None else self._run(self._accepted[0], rows)

    def readings(self) -> dict[str, float]:
        """Return ``probe_expected`` and ``probe_loss`` (nats), or nothing. Waits for the device."""
        if self._accepted is None:
            return {}
        loss = self._loss_of_run(self._accepted[0], self.probe())
        if loss is None:
            return {}
        return floats({"probe_expected": self._accepted[1], "probe_loss": loss.detach().float()})

    def sequence_losses(self) -> dict[str, float]:
        """Return ``sequence_loss_max`` and ``sequence_loss_median`` of the batch last fed, or nothing."""
        if self._seen is None:
            return {}
        args, kwargs = self._seen[0]
        try:
            losses_B = per_sequence_loss(self._model, args, kwargs, loss_of=self._loss_of)
        except Exception as error:
            self._once.warn("probe", f"no loss of single sequences: {type(error).__name__}: {error}")
            return {}
        if losses_B is None:
            return {}
        return floats({"sequence_loss_max": losses_B.amax(), "sequence_loss_median": losses_B.nanmedian()})

    def call(self) -> Callable[[], Tensor] | None:
        """Return a function that computes the loss of the batch last fed again; ``None`` where no loss is found."""
        if self._seen is None or self._seen[1] is None:
            return None
        (args, kwargs), inner = self._seen[0], inner_of(self._model)

        def loss() -> Tensor:
            found = extract_loss(inner(*args, **kwargs), self._loss_of)
            assert found is not None
            return found

        return loss

    def remove(self) -> None:
        """Stop listening and forget the batches."""
        self._handle.remove()
        self._seen = self._accepted = None

    def _loss_of_run(self, batch: Any, found: Probe | None) -> Tensor | None:
        """Return the loss of a run: the model's own, or that of the next tokens; ``None`` where there is neither."""
        if found is None or found.loss is not None or self._loss_of is not None:
            return None if found is None else found.loss
        return _next_token_loss(found.output, batch)

    def _run(self, batch: Any, rows: int) -> Probe | None:
        args, kwargs = batch
        try:
            inner = inner_of(self._model)
            return probe(inner, lambda: inner(*args, **kwargs), rows, loss_of=self._loss_of, once=self._once)
        except Exception as error:
            self._once.warn("probe", f"the last good batch cannot be run again: {type(error).__name__}: {error}")
            return None

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or is_aside(module) or not (module.training and torch.is_grad_enabled()):
            return
        try:
            loss = extract_loss(output, self._loss_of)
        except Exception as error:
            self._once.warn("loss", f"no loss found in the model's output: {type(error).__name__}: {error}")
            loss = None
        self._seen = ((args, kwargs), None if loss is None else loss.detach())


def hook_point(model: nn.Module) -> nn.Module:
    """Return the module whose hooks run outside compiled code and inside DDP."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return hook_point(model.module)
    return model


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the first dimension of the first tensor among the arguments, 0 if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 0


def take_rows(value: Any, first: int, last: int, B: int) -> Any:
    """Cut sequences ``first`` .. ``last`` - 1 out of every tensor of a nest whose first dimension is B."""
    if isinstance(value, Tensor):
        return value[first:last] if value.dim() and value.shape[0] == B else value
    if isinstance(value, dict):
        return {key: take_rows(part, first, last, B) for key, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(take_rows(part, first, last, B) for part in value)
    return value


def _next_token_loss(output: Any, inputs: Any) -> Tensor | None:
    """Return the mean cross-entropy of logits (B, T, V) about the next of the ids (B, T) that went in."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    some_args, some_named = inputs
    ids = next((v for v in (*some_args, *some_named.values()) if isinstance(v, Tensor)), None)
    if not (isinstance(logits, Tensor) and isinstance(ids, Tensor)) or ids.is_floating_point():
        return None
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        return None
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _copy(value: Any) -> Any:
    """Return a nest with its tensors copied, for loops that refill their buffers; ``None`` if it is too large."""
    left = [KEEP_UP_TO]

    def copied(part: Any) -> Any:
        if isinstance(part, Tensor):
            left[0] -= part.numel()
            return part.detach().clone() if left[0] >= 0 else None
        if isinstance(part, dict):
            return {key: copied(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple) and not hasattr(part, "_fields"):
            return type(part)(copied(inner) for inner in part)
        return part

    out = copied(value)
    return out if left[0] >= 0 else None
