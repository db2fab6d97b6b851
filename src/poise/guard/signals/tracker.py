"""The always-on readings of a step, for any model and optimizer: one wait for the device, one collective.

    tracker = Tracker(model, optimizer)
    loss.backward()
    signals = tracker.read([loss], step, lr)   # before clipping, before optimizer.step()

Everything is computed on the device into one row of numbers a rank; the rows are gathered and reduced there, and
what comes back to the host is equal on every rank. ``docs/guard.md`` lists the readings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, distributed
from torch.utils.weak import TensorWeakRef

from poise.core.errors import UserError
from poise.core.types import Signals
from poise.guard.signals.fingerprint import BITS
from poise.guard.signals.gradient import Parts, local_part
from poise.guard.signals.optimizer_state import CHANGES, ClipEstimate, OptimizerState
from poise.guard.signals.places import place_of
from poise.guard.signals.row import SUMS, Found, Row, gathered, is_largest, join, ranks, scalar, value_of

if TYPE_CHECKING:
    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

log = logging.getLogger("poise")

UNCHANGED: Final = 100
"""Readings in a row without any change of a weight before it is said."""


class Tracker:
    """Reads the signals of every step. Changes no weight, no gradient and no state of the optimizer.

    Under ``torch.distributed`` every rank calls ``read`` at every step; the first call also compares the models
    (a second collective, once). Ranks may hold the same model (DDP), parts of it (DTensor, FSDP 1) or different
    layers. Weights and second moments are remembered from one reading to the next, as a sample: the first reading
    after a restart or after the step number went back lacks those of the update, unless ``load_state_dict`` is given
    what ``state_dict`` returned.

    Args:
        model: its trainable parameters are watched.
        optimizer: any.
        norm: returns the whole gradient's L2 norm, 0-dim, if somebody has it anyway
            (``poise.optim.chain.Chain.measure``, whose ``measure_each`` gives that of each tensor).
        scaler: of fp16 training. Gradients that it has not unscaled yet are read as if it had.
        beta2, eps: of the optimizer's second moment, where its groups do not say.

    Attributes:
        norm: the last gradient norm, whole and unscaled, 0-dim on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        norm: Callable[[], Tensor] | None = None,
        scaler: GradScaler | None = None,
        beta2: float | None = None,
        eps: float | None = None,
    ) -> None:
        self._model, self._optimizer, self._measure, self._scaler = model, optimizer, norm, scaler
        self._rates = beta2, eps
        self._last = _Last()
        self._pending: Tensor | None = None
        self._clip = ClipEstimate()
        self._loaded: dict[str, Any] = {}
        self._any_sharded = False
        self._notes: list[str] = []
        self._said: set[str] = set()
        self._build()

    def _build(self) -> None:
        self._parts = Parts(self._model)
        self._state = OptimizerState(self._parts, self._optimizer, *self._rates)
        self.norm = torch.zeros((), device=self._parts.device)
        self._places: tuple[str, ...] = ()
        self._every_name: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """The places of this rank's parameters."""
        return self._parts.places

    def drain_notes(self) -> list[str]:
        """Return what was noticed about how the loop uses the guard since the last call; each is noticed once."""
        notes, self._notes = self._notes, []
        return notes

    def forget(self) -> None:
        """Drop the memory of weights and moments: something else than a step has set them."""
        self._state.forget()
        self._pending, self._last.counted = None, None

    @torch.no_grad()
    def read(
        self,
        losses: Any,
        step: int,
        lr: float,
        tokens: int = 0,
        extra: Mapping[str, Tensor | float] | None = None,
        token: int = 0,
        weights: Sequence[Tensor | None] | None = None,
    ) -> Signals:
        """Return the step's signals. Call it after the last ``backward`` and before anything clips or steps.

        Args:
            losses: of the step's micro-batches on this rank: tensors (the mean counts), numbers, dicts with
                ``"loss"`` or objects with ``.loss``; one alone need not be in a list.
            step: 1-based number of the step; where it does not go up, weights were restored in between.
            lr: learning rate the step would use.
            tokens: tokens consumed up to and including this step.
            extra: further readings, the same names on every rank: the largest over ranks of names with ``_max``,
                a hash over ranks of ``fingerprint`` (an integer below 2**53), the mean of all others.
            token: a number for what was decided at the last step; ranks that bring different ones are stopped.
            weights: of the losses in the mean, where micro-batches count differently; a part with weight 0 has no loss.

        Raises:
            UserError: a loss that is none of these.
            RanksDisagree: different steps or tokens.
        """
        values = [value_of(loss) for loss in (losses if isinstance(losses, list | tuple) else [losses])]
        if not values:
            raise UserError("losses is empty; give the guard the loss of at least one micro-batch")
        extra = dict(extra or {})
        if self._last.step is not None and step <= self._last.step:
            self.forget()
        scale, left = self._loss_scale()
        if scale is not None:
            extra["loss_scale"] = scale
        grads = self._gradients()
        self._agree_on_places()
        each = getattr(self._optimizer, "measure_each", None)
        norms_T = self._parts.norms(grads, known=None if each is None else each())
        if left is not None:
            norms_T = norms_T / left
        row = Row(self._parts.device)
        scalars = [scalar(value, row.device) for value in values]
        row.own = [float(step), float(token % 2**BITS)]
        row.fingerprint = extra.pop("fingerprint", None)
        weighed = scalars
        if weights is not None and any(weight is not None for weight in weights):
            each_weight = [scalar(1.0 if weight is None else weight, row.device) for weight in weights]
            weighed = [value * weight for value, weight in zip(scalars, each_weight, strict=True)]
            scalars = [torch.where(w > 0, value, -math.inf) for value, w in zip(scalars, each_weight, strict=True)]
        row.means = {"loss": torch.stack(weighed).mean()}
        row.means |= {name: value for name, value in extra.items() if not is_largest(name)}
        row.highest = {name: value for name, value in extra.items() if is_largest(name)}
        if len(values) > 1 or ranks() > 1:
            row.highest["loss"] = torch.stack(scalars).amax()
        if self._measure is not None:
            measured = scalar(self._measure(), row.device)
            row.highest["norm"] = measured if left is None else measured / left
        row.sums = self._sums(norms_T, grads, row.highest.get("norm"), 1.0 if left is None else 1.0 / left)
        if self._state.steps is not None:
            row.highest["steps"] = self._state.steps
        found = row.exchange(any(self._parts.sharded) or self._any_sharded)
        self.norm = found.norm.to(torch.float32)
        return self._signals(found, norms_T, step, lr, tokens)

    def state_dict(self, *, together: bool = False) -> dict[str, Any]:
        """Return what a restart needs for its first reading to be the one of an uninterrupted run; JSON-able.

        That is the change of the weights since the last reading, measured now: call it after the optimizer's step.
        One wait for the device.

        Args:
            together: all ranks call this at the same point. Without it the state of sharded weights lacks the
                change, and the first reading after a restart has no ``update_*`` and no ``v_stale``.
        """
        last = self._last
        state: dict[str, Any] = {"bound": self._clip.bound, "norm": last.norm, "step": last.step, "since": None}
        if self._places and (together or not self._any_sharded):
            with torch.no_grad():
                since = self._since()
                if since is not None and together and ranks() > 1:
                    joined = join(gathered(since), len(self._places))
                    since = torch.cat([joined, torch.zeros_like(joined)], dim=1)
            state |= {"since": None if since is None else since.tolist(), "places": list(self._places)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; with other places than this model's, it is left out."""
        self.forget()
        self._clip.bound = state["bound"]
        self._last = _Last(step=state["step"], norm=state["norm"])
        self._loaded = dict(state)

    # -- parts of a reading ------------------------------------------------------------------------------

    def _gradients(self) -> list[Tensor | None]:
        """Return this rank's part of every gradient as it is; look at the model again where there is none."""
        if self._parts.params and all(p.grad is None for p in self._parts.params):
            names, before = self._parts.names, set(map(id, self._parts.params))
            if {id(p) for p in self._model.parameters() if p.requires_grad} != before or not names:
                self._build()  # e.g. sharded after the guard was made
            if all(p.grad is None for p in self._parts.params):
                self._say("no gradient", "no parameter has a gradient: was zero_grad() called before the guard was?")
        grads: list[Tensor | None] = []
        for p in self._parts.params:
            grad = None if p.grad is None else p.grad
            if grad is not None and grad.is_sparse:
                grad = grad.coalesce().values()
            grads.append(None if grad is None else local_part(grad))
        return grads

    def _sums(
        self, norms_T: Tensor, grads: list[Tensor | None], whole: Tensor | None, factor: Tensor | float
    ) -> Tensor:
        """Return this rank's row of sums, (len(SUMS), 2 P) float64, and remember for the next one."""
        since = self._since()
        if whole is None:
            whole = self._norm_here(norms_T)
        dense = [
            None if p.grad is None or p.grad.is_sparse else grad
            for p, grad in zip(self._parts.params, grads, strict=True)
        ]
        ratio = self._state.ratio(dense, factor, self._clip.factor(whole))
        own = self._parts.by_place(torch.cat([norms_T.square()[None], ratio]), self._places)
        self._state.remember()
        self._pending = None
        if since is None:
            since = own.new_zeros(len(CHANGES), own.shape[1])
        return torch.cat([own[:1], since, own[1:]])

    def _since(self) -> Tensor | None:
        """Return the sums of what has changed since the last reading, (len(CHANGES), 2 P); ``None``: not known."""
        changes = self._state.changes()
        if self._pending is not None:
            return self._pending
        return None if changes is None else self._parts.by_place(changes, self._places)

    def _norm_here(self, norms_T: Tensor) -> Tensor:
        """Return the norm of the whole gradient as far as this rank can tell alone: the other parts are like its own.

        It only decides whether clipping is to be expected.
        """
        if not any(self._parts.sharded):
            return norms_T.square().sum().sqrt()
        times_T = torch.tensor(self._parts.times, dtype=torch.float64).to(norms_T.device, non_blocking=True)
        return (norms_T.square() * times_T).sum().sqrt()

    def _agree_on_places(self) -> None:
        """Make the rows of all ranks alike: the places and names of any rank. A collective, once."""
        if self._places or (not self._parts.params and ranks() == 1):
            return
        mine = (self._parts.places, self._parts.names, any(self._parts.sharded))
        every: list[Any] = [mine]
        if ranks() > 1:
            every = [None] * ranks()
            distributed.all_gather_object(every, mine)
        self._places = tuple(dict.fromkeys(place for places, _, _ in every for place in places))
        self._every_name = tuple(dict.fromkeys(name for _, names, _ in every for name in names))
        self._any_sharded = any(sharded for _, _, sharded in every)
        loaded, self._loaded = self._loaded, {}
        if loaded.get("since") is not None and tuple(loaded["places"]) == self._places:
            self._pending = torch.tensor(loaded["since"], dtype=torch.float64).to(self._parts.device)

    def _loss_scale(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the scaler's scale, 0-dim, and what of it is left in the gradients: all, or ``None``."""
        if self._scaler is None or not self._scaler.is_enabled():
            return None, None
        asynchronous = getattr(self._scaler, "_get_scale_async", None)  # get_scale() would wait for the device
        scale = asynchronous() if asynchronous is not None else None
        if scale is None:
            scale = torch.tensor(float(self._scaler.get_scale()))
        states = getattr(self._scaler, "_per_optimizer_states", {})
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)  # what a wrapper wraps
        stage = next((states[key]["stage"] for key in (id(self._optimizer), id(optimizer)) if key in states), None)
        on_device = scalar(scale, self._parts.device)
        return on_device, on_device if getattr(stage, "name", "READY") == "READY" else None

    # -- on the host -------------------------------------------------------------------------------------

    def _signals(self, found: Found, norms_T: Tensor, step: int, lr: float, tokens: int) -> Signals:
        values = found.to_host()
        loss, norm = values.means.pop("loss"), values.norm
        counted = values.highest.pop("steps", None)
        values.highest.pop("norm", None)
        extra: dict[str, float] = {}
        largest = values.highest.pop("loss", math.nan)
        if math.isfinite(largest - loss):
            extra["loss_spread"] = max(0.0, largest - loss)
        extra |= values.means | values.highest
        if values.fingerprint is not None:
            extra["fingerprint"] = float(values.fingerprint)
        extra |= self._readings(values.sums)
        if not math.isfinite(norm):
            extra |= self._nonfinite(norms_T)
        self._notice(values.sums, step, norm, lr, counted)
        self._last = _Last(step, norm, counted, self._last.unchanged, self._marks())
        return Signals(step=step, loss=loss, grad_norm=norm, lr=lr, tokens=tokens, extra=extra)

    def _readings(self, sums: Mapping[str, list[float]]) -> dict[str, float]:
        """Return the readings of every place and of the whole model, from sums over places."""
        extra = {f"grad_norm@{place}": math.sqrt(s) for place, s in zip(self._places, sums["grad"], strict=True)}
        total = {name: math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
                 for name, values in sums.items()}  # fmt: skip
        # No weight and no second moment has changed: no step was taken, so there is nothing to be said about it.
        stepped = total["update"] != 0.0 or (total["moving"] > 0.0 and total["stale"] < total["moving"])
        if stepped and total["measured"]:
            self._clip.learn(total["taken_in"], total["offered"], self._last.norm)
        for suffix, values in [("", total)] + [
            (f"@{place}", {name: sums[name][n] for name in SUMS}) for n, place in enumerate(self._places)
        ]:
            if stepped and values["measured"]:
                extra[f"update_rms{suffix}"] = math.sqrt(values["update"] / values["measured"])
                if suffix and values["weight"]:
                    extra[f"update_ratio{suffix}"] = math.sqrt(values["update"] / values["weight"])
                if suffix and values["moving"]:
                    extra[f"v_stale{suffix}"] = min(1.0, values["stale"] / values["moving"])
            if values["of"]:
                extra[f"adam_ratio{suffix}"] = math.sqrt(values["ratio"] / values["of"])
        return extra

    def _nonfinite(self, norms_T: Tensor) -> dict[str, float]:
        """Count the tensors whose gradient is not finite; a second wait, and with ranks a second collective."""
        index = torch.tensor([self._every_name.index(name) for name in self._parts.names], dtype=torch.int64)
        flags = torch.zeros(len(self._every_name), dtype=torch.float64)
        flags[index] = (~torch.isfinite(norms_T)).to(torch.float64).cpu()
        if ranks() > 1:
            flags = gathered(flags.to(self._parts.device)).amax(0)
        counts: dict[str, float] = {}
        for name, flag in zip(self._every_name, flags.tolist(), strict=True):
            if flag:
                place = f"nonfinite@{place_of(name)}"
                counts[place] = counts.get(place, 0.0) + 1.0
        return {"nonfinite": float(sum(flags.tolist())), **counts}

    # -- how the loop uses the guard ---------------------------------------------------------------------

    def _notice(
        self, sums: Mapping[str, list[float]], step: int, norm: float, lr: float, counted: float | None
    ) -> None:
        last = self._last
        if norm == last.norm != 0.0 and last.marks and self._same_gradients(last.marks):
            self._say(
                "twice", f"step {step}: the gradients are those of the last call: is the guard asked twice a step?"
            )
        unchanged = sum(sums["measured"]) > 0.0 and sum(sums["update"]) == 0.0
        last.unchanged = last.unchanged + 1 if unchanged and lr > 0.0 else 0
        if last.unchanged == UNCHANGED:
            self._say(
                "unchanged",
                f"step {step}: no weight has changed for {UNCHANGED} steps: does optimizer.step() act on this model?",
            )
        if counted is not None and last.counted is not None and last.step is not None and step == last.step + 1:
            missed = counted - last.counted - 1
            if missed > 0:
                self._say(
                    "forgotten", f"step {step}: the optimizer has taken {missed:.0f} steps without asking the guard"
                )

    def _marks(self) -> list[tuple[TensorWeakRef, int]]:
        """Return the first few gradients by identity and version: weakly, so that nothing is kept alive."""
        grads = [p.grad for p in self._parts.params if p.grad is not None]
        return [(TensorWeakRef(grad), local_part(grad)._version) for grad in grads[:3]]

    def _same_gradients(self, marks: list[tuple[TensorWeakRef, int]]) -> bool:
        grads = [p.grad for p in self._parts.params if p.grad is not None][:3]
        return len(grads) == len(marks) and all(
            ref() is grad and version == local_part(grad)._version
            for grad, (ref, version) in zip(grads, marks, strict=True)
        )

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._notes.append(text)
            log.warning("guard: %s", text)


@dataclass
class _Last:
    """What is kept of the last reading, on the host."""

    step: int | None = None
    norm: float = math.nan
    counted: float | None = None
    unchanged: int = 0
    marks: list[tuple[TensorWeakRef, int]] = field(default_factory=list)
