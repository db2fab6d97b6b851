"""What a diagnosis is made of: plain values, filled in by the other files of this room. No behaviour but ``record``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from poise.core.types import Cause as CauseKind
from poise.core.types import Certainty, Severity

Kind = Literal[
    "fast_spike",
    "slow_divergence",
    "level_shift",
    "nonfinite",
    "chaotic",
    "collapse",
    "plateau",
    "level_drop",
    "data_outlier",
    "early_transient",
    "grad_spike",
    "logit_growth",
]
"""``level_drop``, ``data_outlier``, ``early_transient`` and ``grad_spike`` are notes: nothing has to be done there."""

Recovery = Literal["returned", "partly", "never", "open"]
"""``returned``: the loss is on its old trend again; ``partly``: it stays somewhat above; ``never``: it stays up or the
run ends with it up; ``open``: the log ends too soon after to tell."""


@dataclass(frozen=True, slots=True)
class Precursor:
    """Something in the log that moved before an event.

    Attributes:
        signal: the series, e.g. ``grad_norm``.
        step: when it first stood out.
        lead: steps from there to the event's start; 0 at the same step.
        text: one sentence with the numbers.
    """

    signal: str
    step: int
    lead: int
    text: str


@dataclass(frozen=True, slots=True)
class Cause:
    """The likely cause of an event.

    Attributes:
        name: ``data outlier``, ``schedule``, ``restart seam``, ``precision``, ``too-high LR``, ``collapse``, ... or
            ``unknown``.
        kind: which family that is, in the guard's words.
        certainty: ``likely`` is a signature of its own; ``possible`` fits, and so would others.
        evidence: one sentence with its numbers for each thing that was seen.
    """

    name: str = "unknown"
    kind: CauseKind = "unknown"
    certainty: Certainty = "possible"
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """What an event cost.

    Attributes:
        steps: from its start until the loss is on its trend again; to the end of the log where it never is.
        tokens: that many steps' tokens; ``None`` where the log does not say how many a step has.
        share: of all steps of the log, 0 to 1.
    """

    steps: int = 0
    tokens: int | None = None
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about an event.

    Attributes:
        action: ``nothing``, ``wait``, ``skip_data``, ``roll_back``, ``lower_lr``, ``longer_warmup``, ``qk_norm``,
            ``filter_data``, ``check_restart``, ``raise_precision``, ``stop``.
        text: one or two sentences, with how far back and how much to skip.
        source: whose practice that is.
    """

    action: str = "nothing"
    text: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a run.

    Attributes:
        kind: see ``Kind``.
        severity: ``note`` needs no reaction; ``warning`` may; ``critical`` does.
        start, peak, end: steps; ``end`` is the last one off the trend.
        baseline: the loss that the trend has at the peak; of another signal where ``signal`` says so.
        value: the reading at the peak; NaN or infinity for a non-finite one.
        rise: value / baseline - 1; NaN where there is none.
        points: logged points from start to end.
        recovery: see ``Recovery``.
        lasting: how far the level after it lies above the trend from before it, relative; NaN where unknown.
        signal: the series that it is an event of.
        precursors: what moved before it, the earliest first.
        cause, cost, advice: see there.
    """

    kind: Kind
    severity: Severity
    start: int
    peak: int
    end: int
    baseline: float
    value: float
    points: int
    recovery: Recovery
    lasting: float = math.nan
    signal: str = "loss"
    precursors: tuple[Precursor, ...] = ()
    cause: Cause = field(default_factory=Cause)
    cost: Cost = field(default_factory=Cost)
    advice: Advice = field(default_factory=Advice)

    @property
    def rise(self) -> float:
        """How far the peak lies above the baseline, relative."""
        return self.value / self.baseline - 1.0 if self.baseline else math.nan

    def record(self) -> dict[str, Any]:
        """Return the fields by name for JSON; the advice is called ``recommendation`` there."""
        out = dataclasses.asdict(self)
        out["rise"] = self.rise
        out["recommendation"] = out.pop("advice")
        return out
