"""The z-loss in a transformers model: beside whatever loss function the model has, with the same counting.

Shapes: B batch, T positions, V vocabulary, N all positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from poise.core.types import IGNORE
from poise.integrations.hf.layout import wide


class ZLoss:
    """A model's loss function with ``coefficient · mean(log² Z)`` added, log Z = logsumexp of a token's logits.

    The mean is over the tokens that count, or the sum is divided by ``num_items_in_batch`` where the caller gives it:
    as the cross-entropy is, so that accumulated micro-batches give the gradient of the whole batch. Added only where
    a gradient will be taken: an evaluation loss is the cross-entropy alone.

    Args:
        inner: the loss function so far.
        coefficient: 0 adds nothing.

    Attributes:
        total: sum of what was added since ``take``, a tensor on the model's device; ``None`` when nothing was.
        calls: number of times that something was added since ``take``.
        of_batch: whether the last share was divided by the number of tokens of a whole batch.
    """

    def __init__(self, inner: Callable[..., Tensor], coefficient: float) -> None:
        self.inner = inner
        self.coefficient = coefficient
        self.total: Tensor | None = None
        self.calls = 0
        self.of_batch = False

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss; the arguments are those that transformers gives its loss functions."""
        loss = self.inner(
            logits=logits,
            labels=labels,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
        if self.coefficient == 0 or not logits.requires_grad:
            return loss
        if shift_labels is None:
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        counts_N = (shift_labels != ignore_index).reshape(-1).to(logits.device)
        log_z_N = torch.logsumexp(wide(logits), -1).reshape(-1)
        sum_ = log_z_N.square().masked_fill(~counts_N, 0.0).sum()
        tokens = counts_N.sum() if num_items_in_batch is None else num_items_in_batch
        share = self.coefficient * sum_ / (tokens.to(sum_.device) if isinstance(tokens, Tensor) else tokens)
        self.total = share.detach() if self.total is None else self.total + share.detach()
        self.calls += 1
        self.of_batch = num_items_in_batch is not None
        return loss + share.to(loss.dtype)

    def take(self, steps: int = 0) -> float | None:
        """Return the mean z-loss of a step since the last call and begin anew; ``None`` when there was none.

        Args:
            steps: optimizer steps since then, where several micro-batches share a step; else one a call.
        """
        if self.total is None:
            return None
        mean = float(self.total) / (steps if self.of_batch and steps else self.calls)
        self.total, self.calls = None, 0
        return mean


class ReportZLoss(transformers.TrainerCallback):
    """Writes ``z_loss`` beside the ``loss`` in the Trainer's log: the mean over the steps since the last line.

    ``loss`` holds both; the cross-entropy is their difference. On several processes it is this one's tokens' share.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps."""
        self._steps += 1

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """Add the reading to a line that has a training loss."""
        function = getattr(model, "loss_function", None)
        if not isinstance(function, ZLoss) or logs is None or "loss" not in logs:
            return
        reading, self._steps = function.take(self._steps), 0
        if reading is not None:
            logs["z_loss"] = reading
            if state.log_history:
                state.log_history[-1]["z_loss"] = reading
