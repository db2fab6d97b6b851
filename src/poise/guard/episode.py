"""One trouble of the loss, from its first flagged step until the loss is back: what it was, what was tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

SMOOTH = 8
"""Losses in the median that says where the loss is; also how many calm steps in a row end a trouble."""

KEEP = 4 * SMOOTH
MINUTE_RISE = 0.01
"""A loss that rises by less than this share over ``SMOOTH`` points is not climbing."""


@dataclass
class Episode:
    """What is known of a trouble.

    Attributes:
        onset: the first step that was flagged.
        level: the loss that a healthy run would have had then.
        flagged: flagged points in a row up to now.
        points: points seen since the onset.
        calm: points in a row that were not flagged.
        check_at: the step at which the last action is judged; ``None`` when nothing was done.
        acted: what was done, in order; an action that did not help is not done again.
        odd: the loss of the last batch that was left out although the weights were sound; 0 if none was.
        losses: the last ``KEEP`` finite losses with their steps.
    """

    onset: int
    level: float
    flagged: int = 0
    points: int = 0
    calm: int = 0
    check_at: int | None = None
    odd: float = 0.0
    acted: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)

    def see(self, step: int, loss: float, flagged: bool) -> None:
        """Take in a step."""
        self.points += 1
        self.flagged = self.flagged + 1 if flagged else 0
        self.calm = 0 if flagged else self.calm + 1
        if loss == loss and abs(loss) != float("inf"):
            self.losses = [*self.losses[1 - KEEP :], (step, loss)]

    @property
    def smooth(self) -> float:
        """Median of the last losses."""
        return median(loss for _, loss in self.losses[-SMOOTH:]) if self.losses else self.level

    @property
    def excess(self) -> float:
        """How far the loss is above its level, relative to it."""
        return self.smooth / self.level - 1.0 if self.level > 0 else 0.0

    @property
    def per_step(self) -> float:
        """Change of the loss per step, from the medians of the last and the last but one stretch of points."""
        before, after = self.losses[-2 * SMOOTH : -SMOOTH], self.losses[-SMOOTH:]
        if len(before) < SMOOTH // 2:
            return 0.0
        steps = median(step for step, _ in after) - median(step for step, _ in before)
        return (median(loss for _, loss in after) - median(loss for _, loss in before)) / max(steps, 1)

    def falling(self) -> bool:
        """Whether the loss is on its way down."""
        return self.per_step < 0.0 and len(self.losses) >= 2 * SMOOTH

    def steps_to_level(self) -> float:
        """Steps until the loss is back on its level at the present rate; infinite when it is not falling."""
        missing = self.smooth - self.level
        if missing <= 0:
            return 0.0
        return missing / -self.per_step if self.falling() else float("inf")

    def over(self, lasting: float) -> bool:
        """Whether the loss is back: calm for a while, or an outlier of one or two points that is gone."""
        if self.calm >= SMOOTH:
            return self.excess <= lasting
        gone = self.points - self.calm <= 2 and self.calm >= 2
        return gone and bool(self.losses) and self.losses[-1][1] <= self.level * (1 + lasting)

    def state(self) -> dict[str, Any]:
        """Return everything, JSON-able and exact."""
        return {**asdict(self), "losses": [list(point) for point in self.losses]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Episode:
        """Return what ``state`` was made from."""
        return cls(**{**state, "losses": [(int(s), float(x)) for s, x in state["losses"]]})
