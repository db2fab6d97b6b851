"""The PaLM experiment, automated: train the stretch around an event again, and see what brings it back.

Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, section 5.1) restarted from checkpoints before a spike and showed the
same batches again to earlier weights: no spike, so it was not the data alone but the data in a certain state. This
file asks a host that can rewind for four replays and reads the answer from a table:

    A, A'  the same steps again, twice       B  other data over the same steps
    C      the batches of the event shown at once to the earlier weights (only hosts with ``transplant``)

    A and A' differ                          hardware, measured: the same work gave two results
    A spikes, B does not, C does             data, measured: those batches, whatever the weights
    A spikes, B does not, C does not         data, likely: those batches in that state (what PaLM found)
    A spikes, B does not, no C               data, measured, given that state
    A spikes, B spikes                       optimizer, likely: the state or the schedule, not the samples
    A does not, B does not, not the record   hardware, likely: something outside data and state (machine or software)
    A does not, B spikes                     optimizer, possible: fragile with or without those samples

Differs from the paper in: A passes through the very states of the run, because a replay is deterministic here; the
paper's restart is C. Where replays are not bit-equal by design (``deterministic = False``), differences within
``tolerance`` blame nobody, and a spike that does not come back is chance: unknown.

Cost: a load, and three to four times the steps from the checkpoint to the end of the event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Protocol, runtime_checkable

from poise.core.errors import UserError
from poise.core.host import Replayed, Rewinder
from poise.core.types import Cause, Certainty, Verdict

LEAD_IN: Final = 3
"""Steps before the event whose batches a transplant shows first: an update may do harm before a loss shows it."""

NORMAL: Final = 5
"""Steps whose median is the normal loss at an end of the replay."""


@runtime_checkable
class Transplanter(Rewinder, Protocol):
    """A rewinder that can also show data to weights that never met it."""

    def transplant(self, at_most: int, step: int, steps: int) -> Replayed:
        """Like ``replay`` with ``same``, but the first step shows the samples of ``step``, and so on from there.

        Raises:
            UserError: there is no such checkpoint.
        """
        ...


def investigate(
    event_step: int,
    host: Rewinder,
    *,
    observed: Sequence[tuple[int, float]],
    level: float,
    back: int = 20,
    ahead: int = 5,
    grad_norms: Sequence[tuple[int, float]] = (),
    samples: tuple[int, int] | None = None,
    deterministic: bool = True,
    tolerance: float = 1e-3,
) -> Verdict:
    """Find by experiment what caused the trouble at ``event_step``. All ranks call it together.

    The event comes back where a replayed loss from ``event_step`` to ``ahead`` steps later is above ``level``, or a
    loss or gradient norm is not finite.

    Args:
        event_step: the step at which the trouble showed.
        host: who trains again. It is as before afterwards.
        observed: (step, loss in nats) as the journal has them; more than the replayed steps does no harm.
        level: the loss above which a step counts as a spike, in nats.
        back: the checkpoint is at least so many steps before the event (or at step 0).
        ahead: how long after the event a spike still counts as the same.
        grad_norms: (step, gradient norm) as the journal has them; they tell that a gradient was not finite.
        samples: first and last sample of the event's step, for the verdict.
        deterministic: whether a replay on sound hardware is bit-equal; false on a GPU with atomic additions.
        tolerance: difference of losses, in nats, that counts as one.

    Returns:
        The verdict, with one sentence for each experiment. ``unknown`` where there is no checkpoint to start from.

    Raises:
        UserError: ``back``, ``ahead`` or ``tolerance`` is out of range.
    """
    if event_step < 1 or back < 1 or ahead < 0 or not tolerance >= 0:
        raise UserError(
            f"investigate got event_step {event_step}, back {back}, ahead {ahead} and tolerance {tolerance}; use at "
            "least 1, 1, 0 and 0"
        )
    record = _Record(dict(observed), dict(grad_norms))
    case = _Case(event_step, host, record, level, max(event_step - back, 0), ahead, deterministic, tolerance)
    try:
        cause, certainty, evidence = case.solve()
    except UserError as error:
        return Verdict("unknown", "possible", (f"no experiment was possible: {error}",))
    return Verdict(cause, certainty, tuple(evidence), samples=samples if cause == "data" else None)


@dataclass(frozen=True)
class _Record:
    losses: Mapping[int, float]
    grad_norms: Mapping[int, float]


@dataclass(frozen=True)
class _Case:
    event: int
    host: Rewinder
    record: _Record
    level: float
    at_most: int
    ahead: int
    deterministic: bool
    tolerance: float

    def solve(self) -> tuple[Cause, Certainty, list[str]]:
        """Do the experiments in order of their power to decide, and stop where one has decided."""
        start = self.host.replay(self.at_most, 0, "same").from_step
        steps = self.event + self.ahead - start
        same = self.host.replay(self.at_most, steps, "same")
        again = self.host.replay(self.at_most, steps, "same")
        equal, said = self._compare(same, again)
        evidence = [said]
        if not equal:
            return "hardware", "measured", evidence
        departed, said = self._against_record(same)
        evidence.append(said)
        other = self.host.replay(self.at_most, steps, "other")
        comes_back, said = self._spike(same, self.event, f"the same steps again from step {start}")
        evidence.append(said)
        first = max(self.event - self.ahead, start + 1)
        spikes_too, said = self._spike(other, first, "other data over the same steps")
        evidence.append(said)
        if comes_back and not spikes_too:
            return self._data(same, departed, evidence)
        if comes_back:
            evidence.append(
                "it comes with other samples as well: the state, the optimizer or the schedule, not the data"
            )
            return "optimizer", "likely", evidence
        return self._gone(departed, spikes_too, evidence)

    def _compare(self, same: Replayed, again: Replayed) -> tuple[bool, str]:
        """Return whether the two replays count as one, and in words."""
        if same.digest == again.digest and all(_equal(a, b) for a, b in zip(same.losses, again.losses, strict=True)):
            return True, f"two replays of the same {len(same.losses)} steps are bit-equal (weights {same.digest[:8]})"
        differ = [(n, a, b) for n, (a, b) in enumerate(zip(same.losses, again.losses, strict=True)) if not _equal(a, b)]
        where = "the losses are equal and the weights afterwards are not"
        if differ:
            n, a, b = differ[0]
            where = f"loss {a:.6g} and {b:.6g} at step {same.from_step + 1 + n}"
        said = f"two replays of the same {len(same.losses)} steps differ: {where}"
        if self.deterministic or any(_apart(a, b) > self.tolerance for _, a, b in differ):
            return False, said
        return True, f"{said}; within {self.tolerance:g}, as rounding does where replays are not bit-equal by design"

    def _against_record(self, same: Replayed) -> tuple[int | None, str]:
        """Return the first step where the replay is not what was recorded, and in words."""
        record, norms = self.record, dict(_numbered(same, same.grad_norms))
        known = [(step, record.losses[step], loss) for step, loss in _numbered(same) if step in record.losses]
        if not known:
            return None, "no recorded losses to compare the replay with"
        for step, recorded, loss in known:
            before = f"agrees with the record until step {step - 1}" if step > known[0][0] else "starts there"
            if _apart(recorded, loss) > self.tolerance:
                return step, f"the replay {before} and not at step {step}: {recorded:.6g} recorded, {loss:.6g} again"
            norm = record.grad_norms.get(step, norms[step])
            if math.isfinite(norm) != math.isfinite(norms[step]):
                return (
                    step,
                    f"the replay {before} and not at step {step}: gradient norm {norm:.4g}, {norms[step]:.4g} again",
                )
        worst = max(_apart(recorded, loss) for _, recorded, loss in known)
        how = "exactly" if worst == 0 else f"within {worst:.2g} nats"
        return None, f"the replay gives the recorded losses of steps {known[0][0]} to {known[-1][0]} {how}"

    def _spike(
        self, replayed: Replayed, first: int, what: str, bars: Mapping[int, float] | None = None
    ) -> tuple[bool, str]:
        """Return whether the replay has a spike from step ``first`` on, and in words; ``bars`` are higher levels."""
        bars = bars or {}
        norms = dict(_numbered(replayed, replayed.grad_norms))
        window = [(step, loss, bars.get(step, self.level)) for step, loss in _numbered(replayed) if step >= first]
        for step, loss, _ in window:
            if not math.isfinite(loss) or not math.isfinite(norms[step]):
                what_is = "loss" if not math.isfinite(loss) else "gradient norm"
                return True, f"{what}: the {what_is} is not finite at step {step}"
        step, loss, level = max(window, key=lambda item: item[1] - item[2])
        if loss > level:
            return True, f"{what}: loss {loss:.4g} at step {step}, above {level:.4g}"
        return False, f"{what}: no loss above {level:.4g}; the nearest is {loss:.4g} at step {step}"

    def _data(self, same: Replayed, departed: int | None, evidence: list[str]) -> tuple[Cause, Certainty, list[str]]:
        certainty: Certainty = "measured" if departed is None else "likely"
        first = self.event - LEAD_IN
        if not isinstance(self.host, Transplanter) or first - 1 - same.from_step < NORMAL:
            evidence.append("so it is the data, given the state that met it; another state was not tried")
            return "data", certainty, evidence
        shown = self.host.transplant(self.at_most, first, LEAD_IN + 1 + self.ahead)
        # Younger weights have a higher loss on any data: the bar is as far above what the same replay had there.
        losses = dict(_numbered(same))
        margin = max(self.level - _normal([losses[step] for step in range(self.event - NORMAL, self.event)]), 0.0)
        bars = {step: max(self.level, loss + margin) for step, loss in losses.items() if math.isfinite(loss)}
        what = f"the batches of steps {first} on, shown at once to the weights of step {shown.from_step}"
        spikes, said = self._spike(shown, shown.from_step + 1, what, bars)
        evidence.append(said)
        if spikes:
            evidence.append("so it is the data alone, whatever the weights")
            return "data", certainty, evidence
        evidence.append("so it is not the data alone but the data in that state; leaving either out prevents it")
        return "data", "likely", evidence

    def _gone(self, departed: int | None, spikes_too: bool, evidence: list[str]) -> tuple[Cause, Certainty, list[str]]:
        """Return the verdict where the same steps bring nothing back."""
        if spikes_too:
            evidence.append("other samples spike and the same do not: the state is fragile, whatever the samples")
            return "optimizer", "possible", evidence
        if departed is None:
            evidence.append("the replay does what was recorded, and that is no spike by this level: nothing to explain")
            return "unknown", "possible", evidence
        if not self.deterministic:
            evidence.append("neither the data nor the saved state brings it back; replays round differently: chance")
            return "unknown", "possible", evidence
        evidence.append(
            f"what happened between the steps before {departed} and step {self.event} was neither in the data nor in "
            "the saved state: a passing fault of the machine, or software that changed something from outside"
        )
        return "hardware", "likely", evidence


def _numbered(replayed: Replayed, values: Sequence[float] | None = None) -> list[tuple[int, float]]:
    return list(enumerate(replayed.losses if values is None else values, replayed.from_step + 1))


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _apart(a: float, b: float) -> float:
    """Return the distance of two losses; 0 where neither is finite, infinite where one is."""
    if not math.isfinite(a) or not math.isfinite(b):
        return 0.0 if not math.isfinite(a) and not math.isfinite(b) else math.inf
    return abs(a - b)


def _normal(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return median(finite) if finite else 0.0
