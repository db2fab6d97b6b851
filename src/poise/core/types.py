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
        samples: the B global sample numbers: with the seed they name the documents of each row.
    """

    inputs: Tensor
    targets: Tensor
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known about a step before its update is applied, equal on all ranks.

    Attributes:
        step: 1-based number of the step that is about to be taken.
        loss: mean cross-entropy over the step's tokens, in nats (without auxiliary terms).
        grad_norm: L2 norm of the whole gradient before clipping.
        lr: learning rate the step would use.
        tokens: tokens consumed up to and including this step.
        extra: further named readings (log_z, update_rms, ...), only floats.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    extra: Mapping[str, float] = field(default_factory=dict)


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
    """

    kind: str
    severity: Severity
    step: int
    signal: str
    value: float
    expected: float
    detector: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the guard wants done about a step. Frozen: the host carries it out, nobody edits it."""

    reason: str = ""
    alarms: tuple[Alarm, ...] = ()

    @property
    def action(self) -> str:
        """Name in journals and tables, e.g. ``lower_lr``."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proceed(Decision):
    """Take the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Decision):
    """Do not call the optimizer: weights, moments and step count of the optimizer stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Decision):
    """Take the step with the gradient scaled down to a global norm of at most ``max_norm``."""

    max_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerLr(Decision):
    """Multiply the learning rate by ``factor`` from here on, and do not take this step."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetMoments(Decision):
    """Zero the optimizer's moments, and do not take this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback(Decision):
    """Restore the newest verified checkpoint whose step is at most ``at_most``; go on with new data.

    The samples consumed since that checkpoint are dropped unless ``drop_data`` is false.
    """

    at_most: int
    drop_data: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DropData(Decision):
    """Never show samples ``first`` to ``last`` (inclusive) again, and do not take this step."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt(Decision):
    """Stop the run: going on would do harm. The reason is shown to the user."""
