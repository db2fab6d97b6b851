"""The run: everything a step needs, and all of its state in one place.

``Run.save`` and ``Run.restore`` are the whole truth: 20 steps, save, load and 20 more equal 40 straight
steps bit for bit. A batch is a pure function of (seed, sample number), so the data's state is one number and what is
left out (``position``).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from poise.core.host import Host, Rewinder
from poise.core.journal import Journal, Record, timeline
from poise.core.types import IGNORE, Batch, Decision, Rollback, Signals, Verdict, Watch
from poise.data.feed.loader import Loader, View
from poise.data.feed.skips import listed, samples_of, spans
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
from poise.train.evaluate import arguments_of
from poise.train.history import records_of
from poise.train.host import rewarmed
from poise.train.observers import Observer, StepReport
from poise.train.position import (
    Position,
    Sound,
    batches,
    fetch,
    micro_batches,
    upcoming,
    view_at,
    view_of,
    weighed,
)
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
    shown: Sequence[int] = (0,)
    _rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _weight: torch.Tensor | None = None
    _part: float = 1.0
    _parts: Sequence[Sequence[int]] = ()
    _micro: int = 1
    _verdict: tuple[str, str, int] | None = None
    _began: float = 0.0
    _recorded: float = 0.0
    _carry: float = 0.0
    _history: list[Record] | None = None

    # -- the parts of a step ---------------------------------------------------------------------------

    def next_batches(self, samples: Sequence[int] | None = None, view: View | None = None) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the next step and move the data position past the step.

        ``samples`` are shown instead of the next ones in a replay, as ``view`` has it.
        """
        self._began = time.perf_counter()
        position = self.position
        self._rows.clear()
        view = view or view_at(self.recipe, position)
        shown = upcoming(self.recipe, position) if samples is None else samples
        position.step += 1
        self.set_lr()
        self.shown = shown
        position.next_sample = shown[-1] + 1
        position.tokens += self.step_tokens
        parts = micro_batches(self.recipe, shown, self.world.rank, self.world.size)
        self._parts = parts
        self._micro, self._part = len(parts[0]), 1 / len(parts)
        with nullcontext() if self.linears is None else self.linears.step(position.step):
            for batch, weight in batches(self.loader, parts, view, self.world.device):
                self._weight = weight
                yield batch

    @property
    def step_tokens(self) -> int:
        """Tokens of the step being done."""
        return len(self.shown) * self.recipe.train.seq_len

    @property
    def first_sample(self) -> int:
        """First sample of the step being done."""
        return self.shown[0]

    def sound(self, loss: float) -> Sound:
        """Return the step just done as one to compare others with; ``loss`` is that of its first micro-batch."""
        return Sound(self.position.step, spans(self.shown), self.position.tokens - self.step_tokens, loss)

    def first_batch(self, of: Sound) -> Batch:
        """Return this rank's first micro-batch of a sound step again, as that step showed it."""
        samples = listed(of.spans)
        view = view_of(self.recipe, self.position, of.step, of.seen)
        return fetch(self.loader, micro_batches(self.recipe, samples, self.world.rank, self.world.size)[0], view)

    def used_up(self) -> str:
        """Return why the next step cannot be: the mixture has an end, and it is reached; else an empty text."""
        end = None if self.loader.mix is None else self.loader.mix.total
        if end is None or upcoming(self.recipe, self.position)[-1] < end:
            return ""
        return (
            f"the mixture ends after {end:,} samples, by its limits of epochs, and what rollbacks and drops left out "
            f"was taken from them; the last state is saved. Call it finished with train.steps {self.position.step}, or "
            f"start anew with more"
        )

    def records(self) -> list[Record]:
        """Return the journal, without the losses of single rows; empty on every rank but 0, where there is none."""
        if self._history is not None:
            return self._history
        return [] if self.journal is None else records_of(self.journal.path)

    def set_lr(self) -> None:
        """Set the learning rate of the current step: base rate x schedule x what a growing batch and the guard make of
        it."""
        optim, position, growing = self.recipe.optim, self.position, self.recipe.train.batch_ramp
        factor = lr_at(position.step, self.recipe.train.steps, optim.schedule)
        if growing is not None:
            factor *= growing.lr_factor(position.tokens)
        self.optimizer.set_lr(optim.lr * factor * position.lr_scale * rewarmed(position, position.step))

    def backward(self, batch: Batch) -> None:
        """Add the micro-batch's share of the gradient: every target that counts weighs the same in the step."""
        inputs, targets, named = arguments_of(batch, self.world.device)
        out = self.model(inputs, targets, token_loss=True, **named)
        (weighed(out.loss, self._weight) * self._part).backward()
        self.senses.saw(batch, out, self._weight)
        if out.token_loss is not None:
            self._rows.append((out.token_loss.sum(-1), (batch.targets != IGNORE).sum(-1)))

    def empty(self, signals: Signals) -> bool:
        """Whether no target of the step counts, on any rank: its loss is then exactly 0, as hardly another's is."""
        if signals.loss != 0.0:  # equal on all ranks, so that all of them ask, or none
            return False
        own = sum(int(counts.sum()) for _, counts in self._rows)
        return float(mean_over_ranks(torch.tensor(float(own), device=self.world.device))) == 0.0

    def sample_losses(self) -> list[float]:
        """Return the mean loss of each sample of the step, NaN where nothing of it counts; all ranks call together."""
        own = list[float]()
        for sums, counts in self._rows:
            each = len(sums) // self._micro  # rows that one sample was cut into
            total, of = sums.view(-1, each).sum(1).double(), counts.view(-1, each).sum(1).to(sums.device)
            own += (total / of).tolist()
        return [value for rank in distributed.gather(own) for value in rank]

    def source_losses(self) -> dict[str, float]:
        """Return the mean loss over targets of each source of the mixture that the step showed; one collective."""
        own = [sample for part in self._parts for sample in part]
        sums, counts = (torch.cat(column).double() for column in zip(*self._rows, strict=True))
        each = len(sums) // len(own)  # rows that one sample was cut into
        number = torch.from_numpy(np.repeat(self.loader.source_of(own), each)).to(sums.device)
        found = torch.zeros(2, len(self.loader.sources), dtype=torch.float64, device=sums.device)
        found.index_add_(1, number, torch.stack([sums, counts.to(sums.device)]))
        totals, numbers = mean_over_ranks(found).tolist()
        return {
            name: round(total / count, 4)
            for name, total, count in zip(self.loader.sources, totals, numbers, strict=True)
            if count
        }

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
        losses = self.sample_losses() if self._wants_losses(decision) else []
        by_source = self.source_losses() if self.loader.mix is not None else {}
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
            **self._what_was_shown(decision, losses, by_source),
            action=decision.action,
            seconds=round(seconds, 4),
            tokens_per_s=round(self.step_tokens / seconds, 1),
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

    def _wants_losses(self, decision: Decision) -> bool:
        return bool(decision.alarms) or self.recipe.train.row_losses

    def _what_was_shown(
        self, decision: Decision, losses: list[float], by_source: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return what a step's record says of its samples beyond the first: only what is not plain."""
        config, facts = self.recipe.train, dict[str, Any]()
        if len(self.shown) != config.batch_size:
            facts["rows"] = len(self.shown)
        if not isinstance(self.shown, range):
            facts["spans"] = spans(self.shown)
        if config.row_losses or decision.alarms:
            facts["row_losses"] = [round(value, 4) for value in losses]
        return facts | ({"source_losses": by_source} if self.loader.mix is not None else {})

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
            fields["samples"] = (self.shown[0], self.shown[-1])
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
        self._history = self.records()  # the replays need it as well; nothing is written meanwhile
        try:
            verdict = self._investigated(event_step, level, self._history)
        finally:
            self._history = None
        if self.journal is not None:
            self.journal.write("verdict", step=event_step, **asdict(verdict), investigated=True)
        return verdict

    def _investigated(self, event_step: int, level: float, records: list[Record]) -> Verdict:
        size = self.recipe.train.batch_size
        done = [
            (r["step"], r["loss"], r["grad_norm"], r["sample"], samples_of(r, size)[-1])
            for r in timeline(records)
            if r["type"] == "step"
        ]
        steps = distributed.broadcast(done)
        samples = [(first, last) for step, _, _, first, last in steps if step == event_step]
        assert isinstance(self.host, Rewinder)
        return self.guard.investigate(
            event_step,
            self.host,
            observed=[(step, loss) for step, loss, _, _, _ in steps],
            grad_norms=[(step, norm) for step, _, norm, _, _ in steps],
            level=level,
            samples=samples[-1] if samples else None,
            deterministic=self.world.device.type == "cpu",
        )

    def report(self, signals: Signals, decision: Decision) -> StepReport:
        """Return what observers are told about the step just done."""
        now = time.perf_counter()
        seconds, self._carry = now - self._began, now - self._recorded
        return StepReport(
            signals=signals,
            decision=decision,
            seconds=seconds,
            tokens_per_s=self.step_tokens / seconds,
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
        self.position = Position.of(loaded.meta["position"])
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
