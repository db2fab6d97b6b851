"""The values that rooms pass to each other. No behaviour, no torch at run time.

Shape letters: B sequences in a micro-batch, T positions in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""Target value of a position that does not count in the loss (the convention of ``cross_entropy``)."""

Severity = Literal["note", "warning", "critical"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of next-token prediction.

    Attributes:
        inputs: token ids, (B, T) int64.
        targets: the next token at each position, (B, T) int64; ``IGNORE`` where it does not count.
        samples: the B global sample numbers: with the seed they name the documents of each row. Where samples are cut
            into shorter sequences a number comes several times, once for each.
        documents: which document of its row each position is in, (B, T) int32, rising from 0; ``None`` where
            attention is not kept inside documents.
    """

    inputs: Tensor
    targets: Tensor
    samples: tuple[int, ...]
    documents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known about a step before its update is applied, equal on all ranks.

    Attributes:
        step: 1-based number of the step that is about to be taken.
        loss: mean cross-entropy over the step's tokens, in nats (without auxiliary terms).
        grad_norm: L2 norm of the whole gradient before clipping.
        lr: learning rate the step would use.
        tokens: tokens consumed up to and including this step.
        extra: further readings by name, only floats: ``update_rms`` of the whole model, ``update_rms@block.3`` of
            one place in it. A reading that was not taken at this step is absent. ``docs/guard.md`` lists the names.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    extra: Mapping[str, float] = field(default_factory=dict)

    def places(self, reading: str) -> dict[str, float]:
        """Return a reading's value at every place where it was taken.

        >>> Signals(1, 2.0, 1.0, 1e-3, 0, {"grad_norm@head": 0.5, "log_z": 3.0}).places("grad_norm")
        {'head': 0.5}
        """
        start = reading + "@"
        return {name[len(start) :]: value for name, value in self.extra.items() if name.startswith(start)}


@dataclass(frozen=True, slots=True)
class Alarm:
    """A detector's finding.

    Attributes:
        kind: ``fast_spike``, ``nonfinite``, ``level_shift``, ...
        severity: ``note`` needs no reaction, ``warning`` may, ``critical`` must.
        step: the step whose signals raised it.
        signal: the name of the reading, e.g. ``loss``.
        value: the reading.
        expected: what a healthy run would have shown.
        detector: the name of the detector.
        message: one sentence for a person.
        place: where in the model, e.g. ``block.3``; empty when it concerns all of it or none.
    """

    kind: str
    severity: Severity
    step: int
    signal: str
    value: float
    expected: float
    detector: str
    message: str
    place: str = ""


Cause = Literal["data", "optimizer", "schedule", "architecture", "precision", "hardware", "software", "unknown"]
Certainty = Literal["measured", "likely", "possible"]
"""``measured``: an experiment told it from the others; ``likely``: its own signature; ``possible``: it fits."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What caused a trouble, as far as the evidence goes.

    Attributes:
        cause: ``unknown`` where nothing tells the causes apart.
        certainty: how much the evidence is worth.
        evidence: one sentence with its numbers for each thing that was seen.
        place: where in the model it began; empty when it has no place.
        samples: first and last global sample number of the data concerned; ``None`` when data are not the cause.
        weights: what showing the last good batch again said of them: ``sound`` if its loss had not changed.
    """

    cause: Cause
    certainty: Certainty
    evidence: tuple[str, ...]
    place: str = ""
    samples: tuple[int, int] | None = None
    weights: Literal["sound", "damaged", "unknown"] = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the guard wants done about a step. Frozen: the host carries it out, nobody edits it."""

    reason: str = ""
    alarms: tuple[Alarm, ...] = ()
    verdict: Verdict | None = None

    @property
    def action(self) -> str:
        """Name in journals and tables, e.g. ``lower_lr``."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proceed(Decision):
    """Take the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(Proceed):
    """Take the step and keep an eye on it: something is wrong, and waiting is the best that can be done.

    ``would`` is what a guard that only observes would have done instead.
    """

    would: Decision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Decision):
    """Do not call the optimizer: weights, moments and step count of the optimizer stay as they are.

    ``again`` says that only the batch is to blame: a loop that can do so takes the step again with the next batch.
    """

    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Decision):
    """Take the step with the gradient scaled down to a global norm of at most ``max_norm``."""

    max_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerLr(Decision):
    """Multiply the learning rate by ``factor``, and do not take this step.

    With ``rewarm`` > 0 the factor then climbs back to 1 over that many steps; with 0 it stays.
    """

    factor: float
    rewarm: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetMoments(Decision):
    """Zero the optimizer's moments (of ``places``, of all where empty) and warm up again; do not take this step."""

    places: tuple[str, ...] = ()
    rewarm: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QkClip(Decision):
    """Scale the query and key weights of ``places`` so that no attention logit exceeds ``threshold``.

    The gradient belongs to the weights before the change, so this step is not taken.
    """

    places: tuple[str, ...]
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RaisePrecision(Decision):
    """Compute ``places`` in fp32 from here on, and do not take this step."""

    places: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback(Decision):
    """Restore the newest verified checkpoint whose step is at most ``at_most``; go on with new data.

    The samples consumed since that checkpoint are dropped unless ``drop_data`` is false. The learning rate is
    multiplied by ``lr_factor`` from there on.
    """

    at_most: int
    drop_data: bool = True
    lr_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DropData(Decision):
    """Never show samples ``first`` to ``last`` (inclusive) again, and do not take this step.

    ``documents`` are left out of the loss, by their numbers in the training text, wherever they come; with a ``last``
    below ``first`` only they are.
    """

    first: int
    last: int
    documents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt(Decision):
    """Stop the run: going on would do harm. The reason is shown to the user."""
