"""The run: everything a step needs, and all of its state in one place.

``Run.save`` and ``Run.restore`` are the whole truth: 20 steps, save, load and 20 more equal 40 straight
steps bit for bit. A batch is a pure function of (seed, sample number), so the data's state is one number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from poise.core.host import Host, Rewinder
from poise.core.journal import Journal, read, timeline
from poise.core.types import Batch, Decision, Rollback, Signals, Verdict, Watch
from poise.data.loader import Loader
from poise.guard.guard import Guard
from poise.guard.signals.linears import LinearNorms
from poise.hardware import distributed
from poise.hardware.checkpoint import CheckpointStore, Loaded, Saved
from poise.hardware.distributed import World, mean_over_ranks
from poise.hardware.state import pack
from poise.model.decoder import Decoder
from poise.optim.chain import Chain
from poise.optim.schedules import lr_at
from poise.train import mend
from poise.train.host import rewarmed
from poise.train.observers import Observer, StepReport
from poise.train.recipe import Recipe
from poise.train.senses import Senses

log = logging.getLogger("poise")

LEARNING = 20
"""Steps before the loss rules judge at all."""

CLEARLY = 1.2
NOT_JOURNALLED = frozenset({"first_loss"})
SAME_TROUBLE = 20
"""Steps within which the same verdict is about the same trouble."""

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss that is shown to people; nothing decides by it."""


@dataclass
class Position:
    """Where the run is. ``step`` steps are done; ``next_sample`` is the next one that has not been shown.

    ``lr_scale`` and ``rewarm_*`` are what the guard made of the learning rate, ``fp32_places`` what it computes in
    fp32; ``good_sample`` is the first sample of a sound step some steps ago, ``good_loss`` its first micro-batch's
    loss; ``next_good_*`` will follow them.
    """

    step: int = 0
    next_sample: int = 0
    tokens: int = 0
    lr_scale: float = 1.0
    rewarm_factor: float = 1.0
    rewarm_start: int = 0
    rewarm_steps: int = 0
    fp32_places: list[str] = field(default_factory=list)
    good_sample: int = -1
    good_loss: float = 0.0
    next_good_sample: int = -1
    next_good_loss: float = 0.0
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
    senses: Senses = field(init=False)
    linears: LinearNorms | None = None
    linear_norms: dict[str, float] = field(default_factory=dict)
    halted: str | None = None
    last_layers: dict[str, float] = field(default_factory=dict)
    first_sample: int = 0
    _verdict: tuple[str, str, int] | None = None
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
        self.first_sample = position.next_sample
        position.next_sample += config.batch_size
        position.tokens += self.recipe.tokens_per_step
        first = self.own_first(self.first_sample)
        with nullcontext() if self.linears is None else self.linears.step(position.step):
            for start in range(first, first + self._per_rank, self.micro_batch):
                yield self.loader.batch(start, self.micro_batch)

    def own_first(self, sample: int) -> int:
        """This rank's first sample of the step that begins with ``sample``."""
        return sample + self.world.rank * self._per_rank

    def set_lr(self) -> None:
        """Set the learning rate of the current step: base rate x schedule x what the guard made of it."""
        optim, position = self.recipe.optim, self.position
        factor = lr_at(position.step, self.recipe.train.steps, optim.schedule)
        self.optimizer.set_lr(optim.lr * factor * position.lr_scale * rewarmed(position, position.step))

    def backward(self, batch: Batch) -> None:
        """Add the micro-batch's share of the gradient."""
        device = self.world.device
        out = self.model(batch.inputs.to(device), batch.targets.to(device))
        (out.loss * (self.micro_batch / self._per_rank)).backward()
        self.senses.saw(batch, out)

    def read_signals(self) -> Signals:
        """Return what the guard decides by, equal on all ranks. The step's only wait for the device, but for norms of
        linear layers where they are asked for."""
        measured = self.linears is not None and self.linears.measured == self.position.step
        self.linear_norms = self.linears.readings() if self.linears is not None and measured else {}
        return self.senses.read()

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
            sample=self.first_sample,
            action=decision.action,
            seconds=round(seconds, 4),
            tokens_per_s=round(self.recipe.tokens_per_step / seconds, 1),
            **{name: value for name, value in signals.extra.items() if "@" not in name and name not in NOT_JOURNALLED},
        )
        critical = any(alarm.severity == "critical" for alarm in decision.alarms)
        places = {name: value for name, value in signals.extra.items() if "@" in name} | self.guard.measured
        if places and (critical or self.senses.measures(signals.step)):
            self.journal.write("layers", step=signals.step, readings=places)
        if self.linear_norms:
            self.journal.write("linears", step=signals.step, readings=self.linear_norms)
        for alarm in decision.alarms:
            self.journal.write("event", **asdict(alarm))
        self._record_verdict(signals.step, decision.verdict)
        if decision.action != "proceed":
            fields = {k: v for k, v in asdict(decision).items() if k not in ("alarms", "reason", "verdict", "would")}
            if isinstance(decision, Watch) and decision.would is not None:
                fields["would"] = decision.would.action
            self.journal.write(
                "decision",
                step=signals.step,
                action=decision.action,
                reason=decision.reason,
                alarms=[alarm.kind for alarm in decision.alarms],
                **fields,
            )

    def _record_verdict(self, step: int, verdict: Verdict | None) -> None:
        """Write a verdict once for a trouble, and again when it changes."""
        if verdict is None or self.journal is None:
            return
        said = self._verdict
        self._verdict = (verdict.cause, verdict.place, step)
        if said is not None and said[:2] == self._verdict[:2] and 0 <= step - said[2] <= SAME_TROUBLE:
            return
        fields = asdict(verdict)
        if verdict.cause == "data":
            fields["samples"] = (self.first_sample, self.first_sample + self.recipe.train.batch_size - 1)
        self.journal.write("verdict", step=step, **fields)

    def investigate_first(self, signals: Signals, decision: Decision) -> None:
        """Find the cause of a trouble before the run goes back, where the recipe asks for it."""
        if self.recipe.guard.investigate and isinstance(decision, Rollback):
            jumped = any(alarm.kind == "weight_jump" for alarm in decision.alarms)
            onset = signals.step if jumped else decision.at_most + 1
            alarm = next((a for a in decision.alarms if a.signal == "loss" and math.isfinite(a.expected)), None)
            usual = self.position.smooth if self.position.smooth is not None else signals.loss
            # Where the loss itself raised no alarm, only a loss clearly above the usual counts as its spike.
            self.investigate(onset, alarm.expected if alarm is not None else CLEARLY * usual)

    def investigate(self, event_step: int, level: float) -> Verdict:
        """Find by experiment what caused the trouble at ``event_step``; the verdict goes into the journal.

        Costs a few dozen steps; the present is as before afterwards, bit for bit. All ranks call it together.

        Args:
            event_step: the step at which the trouble showed.
            level: the loss that a healthy step would have had, in nats.
        """
        records = [] if self.journal is None else read(self.journal.path)
        keys = ("step", "loss", "grad_norm", "sample")
        done = [tuple(r[key] for key in keys) for r in timeline(records) if r["type"] == "step"]
        steps = distributed.broadcast(done)
        samples = [
            (first, first + self.recipe.train.batch_size - 1) for step, _, _, first in steps if step == event_step
        ]
        assert isinstance(self.host, Rewinder)
        verdict = self.guard.investigate(
            event_step,
            self.host,
            observed=[(step, loss) for step, loss, _, _ in steps],
            grad_norms=[(step, norm) for step, _, norm, _ in steps],
            level=level,
            samples=samples[-1] if samples else None,
            deterministic=self.world.device.type == "cpu",
        )
        if self.journal is not None:
            self.journal.write("verdict", step=event_step, **asdict(verdict), investigated=True)
        return verdict

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
        return f"learning {step}/{LEARNING}" if step < LEARNING else "watching"

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
            "senses": self.senses.state_dict(),
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
        mend.set_precision(self.model, self.position.fp32_places)
        self.guard.load_state_dict(loaded.meta["guard"], keep_policy=after_rollback)
        self.senses.load_state_dict(loaded.meta["senses"])
        if not after_rollback:
            self.guard.resumed(loaded.step)
        return loaded

    def tell(self, hook: str, *arguments: Any) -> None:
        """Call one hook of every observer; a failing observer is logged, never fatal."""
        for observer in self.observers:
            try:
                getattr(observer, hook)(*arguments)
            except Exception:
                log.exception("observer %s failed in %s; the run goes on", type(observer).__name__, hook)
