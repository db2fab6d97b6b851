"""What a run reads of itself for the guard: every step, every k steps, and when something looks wrong."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

from poise.core.types import Batch, Decision, Proceed, QkClip, ResetMoments, Signals
from poise.guard.signals.curvature import gradient_curvature
from poise.guard.signals.fingerprint import combine_ints
from poise.guard.signals.listen import find_sites, floats
from poise.guard.signals.probe import AGE, per_sequence_loss, probe
from poise.guard.signals.together import over_ranks
from poise.guard.signals.tracker import Tracker
from poise.guard.signals.weights import moment_readings, weight_readings
from poise.hardware.distributed import mean_over_ranks
from poise.model.losses import LossOutput
from poise.train.evaluate import arguments_of
from poise.train.position import weighed

if TYPE_CHECKING:
    from poise.train.state import Run

ROWS = 1
"""Sequences of a micro-batch that are measured layer by layer."""

BEND_EVERY = 20
"""Steps between two measurements of the curvature in one trouble: each costs three gradients of ``ROWS`` sequences."""


class Senses:
    """The run's readings. Nothing here changes a weight, a gradient or a random number.

    Args:
        every: steps between two measurements of the layers; 0 never takes them.
    """

    def __init__(self, run: Run, every: int) -> None:
        self._run = run
        self._every = every
        self._tracker = Tracker(run.model, run.optimizer, norm=run.optimizer.measure)
        self._sites = find_sites(run.model)
        self._losses: list[torch.Tensor] = []
        self._weights: list[torch.Tensor | None] = []
        self._first: torch.Tensor | None = None
        self._log_z: list[torch.Tensor] = []
        self._prints: list[int] = []
        self._batch: Batch | None = None
        self._bent = -BEND_EVERY

    def measures(self, step: int) -> bool:
        """Whether the layers are measured at ``step``."""
        return bool(self._every) and step % self._every == 0

    def saw(self, batch: Batch, out: LossOutput, weight: torch.Tensor | None) -> None:
        """Take in a micro-batch that was just trained on, and its weight in the mean of the step (``None``: 1)."""
        if not self._losses:
            self._batch, self._first = batch, out.ce.detach()
        self._losses.append(out.ce.detach())
        self._weights.append(weight)
        self._log_z.append(weighed(out.log_z.detach(), weight))
        self._prints.append(zlib.crc32(memoryview(batch.inputs.contiguous().numpy()).cast("B")))

    def read(self) -> Signals:
        """Return the step's signals, equal on all ranks. One collective, one wait for the device."""
        run, step = self._run, self._run.position.step
        assert self._first is not None
        extra: dict[str, torch.Tensor | float] = {
            "first_loss": self._first,
            "log_z": torch.stack(self._log_z).mean(),
            "fingerprint": float(combine_ints(self._prints)),
        }
        if self.measures(step):
            extra |= self._layers() | weight_readings(run.model)
        losses, weights = list(self._losses), list(self._weights)
        for gathered in (self._losses, self._weights, self._log_z, self._prints):
            gathered.clear()
        return self._tracker.read(
            losses,
            step,
            run.optimizer.lr,
            tokens=run.position.tokens,
            extra=extra,
            token=run.guard.token,
            weights=weights,
        )

    def settle(self, signals: Signals, decision: Decision) -> None:
        """Remember the batch of a sound step: it is what an odd one is compared with."""
        for name, value in signals.extra.items():
            if name.startswith("attn_logit_max@"):
                self._run.last_layers[name] = value
        if isinstance(decision, Proceed) and not any(alarm.severity == "critical" for alarm in decision.alarms):
            position = self._run.position
            if signals.step % AGE == 0:  # an older one is kept: a trouble is seen a few steps after it began
                position.good, position.next_good = position.next_good, self._run.sound(signals.extra["first_loss"])
        self._batch = None

    def changed(self, decision: Decision) -> None:
        """Something else than a step has set the weights or the moments."""
        if isinstance(decision, QkClip | ResetMoments):
            self._tracker.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next reading needs; all ranks call this together, between two steps."""
        return self._tracker.state_dict(together=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned; nothing where the guard had been off."""
        if state:
            self._tracker.load_state_dict(state)

    def examine(self, signals: Signals) -> dict[str, float]:
        """Take more readings of a step that raised an alarm: last good batch again, single sequences, all weights."""
        run = self._run
        found = floats({} if "weight_rms@embed" in signals.extra else weight_readings(run.model))
        found |= self._again()
        assert self._batch is not None
        inputs, targets, named = self._on_device(self._batch)
        losses_B = per_sequence_loss(run.model, (inputs, targets), named)
        if losses_B is not None:
            found |= floats({"sequence_loss_max": losses_B.amax(), "sequence_loss_median": losses_B.nanmedian()})
        found |= floats(moment_readings(run.model, run.optimizer))
        if signals.step - self._bent >= BEND_EVERY or signals.step < self._bent:
            self._bent = signals.step
            some, of_them, few = self._on_device(self._batch, ROWS)
            found |= gradient_curvature(
                run.model, lambda: run.model(some, of_them, **few).loss, max(signals.lr, 1e-12), optimizer=run.optimizer
            )
        return over_ranks(found)

    def _again(self) -> dict[str, float]:
        """The last good micro-batch with the present weights, and the layers it sees."""
        run, good = self._run, self._run.position.good
        if good is None:
            return {}
        inputs, targets, named = self._on_device(run.first_batch(good))
        found = probe(run.model, lambda: run.model(inputs, targets, **named).ce, ROWS, sites=self._sites)
        assert found.loss is not None
        expected = {"probe_expected": good.loss}
        return floats({"probe_loss": found.loss.detach().float(), **found.readings}) | expected

    def _layers(self) -> dict[str, torch.Tensor]:
        assert self._batch is not None
        inputs, targets, named = self._on_device(self._batch, ROWS)
        model = self._run.model
        return probe(model, lambda: model(inputs, targets, **named).ce, ROWS, sites=self._sites).readings

    def _on_device(self, batch: Batch, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return arguments_of(batch, self._run.world.device, rows)


class Blind(Senses):
    """Loss and gradient norm only: for a run whose guard is switched off."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._every = 0
        self._losses: list[torch.Tensor] = []

    def saw(self, batch: Batch, out: LossOutput, weight: torch.Tensor | None) -> None:
        """Take in a micro-batch's loss."""
        self._losses.append(weighed(out.ce.detach(), weight))

    def read(self) -> Signals:
        """Return loss and norm, equal on all ranks. One wait for the device."""
        run = self._run
        loss = mean_over_ranks(torch.stack(self._losses).mean())
        self._losses.clear()
        loss_value, norm = torch.stack([loss, run.optimizer.measure().to(loss)]).tolist()
        return Signals(run.position.step, loss_value, norm, run.optimizer.lr, run.position.tokens)

    def settle(self, signals: Signals, decision: Decision) -> None:
        """Nothing to remember."""

    def changed(self, decision: Decision) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""
