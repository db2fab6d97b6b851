"""The run: everything a step needs, and all of its state in one place.

``Run.save`` and ``Run.restore`` are the whole truth: 20 steps, save, load and 20 more equal 40 straight
steps bit for bit. A batch is a pure function of (seed, sample number), so the data's state is one number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from poise.core.host import Host
from poise.core.journal import Journal
from poise.core.types import Batch, Decision, Signals
from poise.data.loader import Loader
from poise.guard.guard import Guard
from poise.hardware.checkpoint import CheckpointStore, Loaded, Saved
from poise.hardware.distributed import World, mean_over_ranks
from poise.hardware.state import pack
from poise.model.decoder import Decoder
from poise.optim.chain import Chain
from poise.optim.schedules import lr_at
from poise.train.observers import Observer, StepReport
from poise.train.recipe import Recipe

log = logging.getLogger("poise")

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss that is shown to people; nothing decides by it."""


@dataclass
class Position:
    """Where the run is. ``step`` steps are done; ``next_sample`` is the next one that has not been shown."""

    step: int = 0
    next_sample: int = 0
    tokens: int = 0
    lr_scale: float = 1.0
    smooth: float | None = None
    val_loss: float | None = None
    val_step: int = -1


@dataclass
class Run:
    """A run in memory. Built by ``poise.train.run.assemble``; advanced by ``train_step``.

    ``fingerprint`` is what a checkpoint must share to be this run's (model, data, seed); ``text`` is what a
    person should know about the text; ``journal`` is ``None`` on every rank but 0.
    """

    recipe: Recipe
    model: Decoder
    optimizer: Chain
    guard: Guard
    loader: Loader
    validation: Loader | None
    world: World
    store: CheckpointStore
    journal: Journal | None
    fingerprint: dict[str, Any]
    text: dict[str, Any]
    observers: list[Observer] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    host: Host = field(init=False)
    halted: str | None = None
    _readings: list[torch.Tensor] = field(default_factory=list)
    _first_sample: int = 0
    _began: float = 0.0
    _recorded: float = 0.0
    _carry: float = 0.0

    # -- the parts of a step ---------------------------------------------------------------------------

    @property
    def micro_batch(self) -> int:
        """Sequences of this rank that go through the model at once."""
        return min(self.recipe.train.micro_batch or self._per_rank, self._per_rank)

    @property
    def _per_rank(self) -> int:
        return self.recipe.train.batch_size // self.world.size

    def next_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the next step and move the data position past the step."""
        self._began = time.perf_counter()
        position, config = self.position, self.recipe.train
        position.step += 1
        self.set_lr()
        first = self._first_sample = position.next_sample
        position.next_sample += config.batch_size
        position.tokens += self.recipe.tokens_per_step
        first += self.world.rank * self._per_rank
        for start in range(first, first + self._per_rank, self.micro_batch):
            yield self.loader.batch(start, self.micro_batch)

    def set_lr(self) -> None:
        """Set the learning rate of the current step: base rate x schedule x what the guard made of it."""
        optim, position = self.recipe.optim, self.position
        factor = lr_at(position.step, self.recipe.train.steps, optim.schedule)
        self.optimizer.set_lr(optim.lr * factor * position.lr_scale)

    def backward(self, batch: Batch) -> None:
        """Add the micro-batch's share of the gradient."""
        device = self.world.device
        out = self.model(batch.inputs.to(device), batch.targets.to(device))
        (out.loss * (self.micro_batch / self._per_rank)).backward()
        self._readings.append(out.ce.detach())

    def read_signals(self) -> Signals:
        """Return what the guard decides by, equal on all ranks. The step's only wait for the device."""
        loss = mean_over_ranks(torch.stack(self._readings).mean())
        self._readings.clear()
        loss_value, norm_value = torch.stack([loss, self.optimizer.measure().to(loss)]).tolist()
        position = self.position
        return Signals(
            step=position.step,
            loss=loss_value,
            grad_norm=norm_value,
            lr=self.optimizer.lr,
            tokens=position.tokens,
        )

    def record(self, signals: Signals, decision: Decision) -> None:
        """Write the step, its alarms and, where it is not simply to go on, the decision to the journal."""
        position = self.position
        if decision.action == "proceed" and math.isfinite(signals.loss):
            before = signals.loss if position.smooth is None else position.smooth
            position.smooth = SMOOTHING * before + (1 - SMOOTHING) * signals.loss
        self._recorded = time.perf_counter()
        if self.journal is None:
            return
        # What the step before did after its record (the optimizer) counts here, so that the sum is right.
        seconds = time.perf_counter() - self._began + self._carry
        self.journal.write(
            "step",
            step=signals.step,
            loss=signals.loss,
            grad_norm=signals.grad_norm,
            lr=signals.lr,
            tokens=signals.tokens,
            sample=self._first_sample,
            action=decision.action,
            seconds=round(seconds, 4),
            tokens_per_s=round(self.recipe.tokens_per_step / seconds, 1),
            **signals.extra,
        )
        for alarm in decision.alarms:
            self.journal.write("event", **asdict(alarm))
        if decision.action != "proceed":
            fields = {k: v for k, v in asdict(decision).items() if k not in ("alarms", "reason")}
            self.journal.write(
                "decision",
                step=signals.step,
                action=decision.action,
                reason=decision.reason,
                alarms=[alarm.kind for alarm in decision.alarms],
                **fields,
            )

    def report(self, signals: Signals, decision: Decision) -> StepReport:
        """Return what observers are told about the step just done."""
        now = time.perf_counter()
        seconds, self._carry = now - self._began, now - self._recorded
        return StepReport(
            signals=signals,
            decision=decision,
            seconds=seconds,
            tokens_per_s=self.recipe.tokens_per_step / seconds,
            smooth=math.nan if self.position.smooth is None else self.position.smooth,
            total_steps=self.recipe.train.steps,
            guard_state=self._guard_state(signals.step, decision),
        )

    def _guard_state(self, step: int, decision: Decision) -> str:
        config = self.recipe.guard
        if not config.enabled:
            return "off"
        if decision.action != "proceed":
            return decision.action.replace("_", " ")
        return f"learning {step}/{config.min_values}" if step < config.min_values else "watching"

    def stop_agreed(self, asked: bool) -> bool:
        """Whether any rank was asked to stop, so that all of them stop after the same step."""
        if self.world.size == 1:
            return asked
        return bool(mean_over_ranks(torch.tensor(float(asked), device=self.world.device)) > 0)

    # -- all of the state ------------------------------------------------------------------------------

    def save(self) -> Saved:
        """Commit a checkpoint of everything that a resumed run needs.

        Raises:
            NonFiniteState, SaveFailed: nothing was committed; older checkpoints are untouched.
        """
        meta = {
            **self.fingerprint,
            "position": asdict(self.position),
            "guard": self.guard.state_dict(),
        }
        tensors = pack(self.model, self.optimizer)
        position = self.position
        measured = position.val_loss if position.val_step == position.step else None
        return self.store.save(position.step, tensors, meta, metric=measured)

    def restore(self, at_most: int | None, *, after_rollback: bool = False) -> Loaded:
        """Load the newest verified checkpoint at or before ``at_most`` and be there again.

        After a rollback the guard keeps its budget (its policy's state), so that it cannot go round in circles.

        Raises:
            UserError: there is none, or it is from another recipe.
        """
        loaded = self.store.restore(self.model, self.optimizer, at_most=at_most, expect=self.fingerprint)
        self.position = Position(**loaded.meta["position"])
        self.guard.load_state_dict(loaded.meta["guard"], keep_policy=after_rollback)
        return loaded

    def tell(self, hook: str, *arguments: Any) -> None:
        """Call one hook of every observer; a failing observer is logged, never fatal."""
        for observer in self.observers:
            try:
                getattr(observer, hook)(*arguments)
            except Exception:
                log.exception("observer %s failed in %s; the run goes on", type(observer).__name__, hook)
