"""Attention-logit growth: the largest logit of a layer runs away, alone or past 100.

Formula: x = ln attn_logit_max of a layer; its history holds measurements at least 8 steps apart, the last 16 of them.
Let ``rise`` be x minus the larger of the newest value and the median of the history, ``common`` the median rise of
the other layers at this measurement, and ``usual`` the largest change between neighbours in the newer half of the
history. The latest change counts 1/2.5 only: a runaway that began just before the last measurement speeds up in
this one. Critical, from the fifth measurement on, when one holds:

    jump     rise >= max(ln 2.5, 2.5 usual), rise - common >= ln 2, and the logit is at least 5
    climb    the history before its last 15 steps spans at most a factor of 2.5 (settled), the logit is at least
             4 times its median and at least 8, the last two measurements both rose, and others' climb is a third
    hundred  the logit is over 100, the highest yet, and either 1.3 times the median of the history (and 5 sigma over
             it) or the thirds of the last 48 measurements climb, in all by 15 % (and 4 sigma)

Healthy logits settle at some 5 to 50; with QK-norm they are bounded. Below 5 they hardly shape the softmax. In a
young run logits grow from 0.1 to 20 within the first few dozen steps, unevenly: ``usual`` and ``settled`` keep that
apart from a layer that leaves a level it had reached.
Source: Dehghani et al. 2023, arXiv 2302.05442, and Wortsman et al. 2024, arXiv 2309.14322 (logit growth); the mark
of 100: Kimi K2's QK-Clip, arXiv 2507.20534. Differs: those cure or plot; no paper gives a rule for telling.
Acts: at each measurement; again when the logit has doubled since it was told, or after it had halved.
Cost: a few medians over at most 48 floats a layer and measurement. Off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import MAD_TO_SIGMA, finite, others

CARD: Final = Card(
    name="logit_growth",
    kind="detector",
    title="Alarm when the attention logits of a layer run away",
    citation="Dehghani et al. 2023, arXiv 2302.05442; Wortsman et al. 2024, arXiv 2309.14322; Kimi K2 2025, 2507.20534",
    formula="max logit 2.5 times its last value, other layers at rest; 4 times its level and rising; or over 100",
    acts="at each measurement of the logits, from the fifth on",
    cost="medians over at most 48 floats a layer and measurement",
    off="guard.enabled = false",
    differs="a rule for telling; the papers plot or cure",
)

LN2: Final = math.log(2.0)
KEEP: Final = 48
NEAR: Final = 16
APART: Final = 8
FEWEST: Final = 4

Point = tuple[int, float]


class LogitGrowth:
    """Raises ``logit_growth`` (critical) with the layer whose logits grew most; the others are in the message."""

    name = "logit_growth"

    def __init__(
        self, *, jump: float = 2.5, climb: float = 4.0, high: float = 100.0, least: float = 5.0, settle_steps: int = 15
    ) -> None:
        """``jump`` and ``climb`` are factors, ``high`` and ``least`` logits, ``settle_steps`` steps."""
        assert 1.0 < jump < climb and 0.0 < least < high
        self._jump, self._climb = math.log(jump), math.log(climb)
        self._high, self._least = high, least
        self._settle_steps = settle_steps
        self._seen: dict[str, deque[Point]] = {}
        self._held: dict[str, deque[Point]] = {}
        self._told: dict[str, Point] = {}
        self._newest = 0

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if a layer's logits have just run away, or have doubled since."""
        step = signals.step
        self._forget_from(step)
        logs = {p: math.log(v) for p, v in finite(signals.places("attn_logit_max").items()).items() if v > 0.0}
        if not logs:
            return None
        self._newest = step
        rises = {p: self._rise(p, x) for p, x in logs.items() if len(self._seen.get(p, ())) > FEWEST}
        climbs = {p: x - median(v for _, v in self._seen[p]) for p, x in logs.items() if p in rises}
        found: dict[str, tuple[float, str]] = {}
        for place, x in logs.items():
            why = self._why(place, step, x, rises, climbs) if place in rises else ""
            if not why:
                self._learn(place, step, x)
                continue
            self._hold(place, step, x)
            told = self._told.get(place)
            if told is None or x - told[1] >= LN2:
                self._told[place] = (step, x)
                found[place] = (climbs[place], why)
        if not found:
            return None
        worst = max(found, key=lambda place: found[place][0])
        value = math.exp(logs[worst])
        return Alarm(
            kind="logit_growth",
            severity="critical",
            step=step,
            signal="attn_logit_max",
            value=value,
            expected=value / math.exp(found[worst][0]),
            detector=self.name,
            message=f"attention logits of {worst} reach {value:.3g}: {found[worst][1]}"
            f"{others(place for place in found if place != worst)}",
            place=worst,
        )

    def state_dict(self) -> State:
        """Return the histories and what was told, exact."""
        return {
            "seen": {place: [list(point) for point in points] for place, points in self._seen.items()},
            "held": {place: [list(point) for point in points] for place, points in self._held.items()},
            "told": {place: list(point) for place, point in self._told.items()},
            "newest": self._newest,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._seen = {place: deque((int(s), float(x)) for s, x in points) for place, points in state["seen"].items()}
        self._held = {place: deque((int(s), float(x)) for s, x in points) for place, points in state["held"].items()}
        self._told = {place: (int(s), float(x)) for place, (s, x) in state["told"].items()}
        self._newest = int(state["newest"])

    def _rise(self, place: str, x: float) -> float:
        near = [value for _, value in self._seen[place]][-NEAR:]
        return x - max(near[-1], median(near))

    def _why(self, place: str, step: int, x: float, rises: dict[str, float], climbs: dict[str, float]) -> str:
        """Say what is wrong with the value ``x`` of a place, or nothing."""
        seen = list(self._seen[place])
        near = [value for _, value in seen[-NEAR:]]
        held = self._held.get(place)
        last = held[-1][1] if held else near[-1]
        logit, rise = math.exp(x), rises[place]
        if place in self._told and rise >= LN2:
            return "still far above its level"  # an event goes on until the logit has come down
        newer = near[-max(len(near) // 2 + 1, 3) :]
        *changes, latest = [abs(b - a) for a, b in pairwise(newer)]
        usual = max([*changes, latest / 2.5])  # a runaway may have begun just before the last measurement
        alone = rise - median([r for p, r in rises.items() if p != place] or [0.0]) >= LN2
        if rise >= max(self._jump, 2.5 * usual) and alone and logit >= self._least:
            return f"{math.exp(rise):.1f} times the last measurement, while the other layers stay"
        older = [value for s, value in seen[-NEAR:] if s <= step - self._settle_steps]
        if len(older) >= FEWEST and max(older) - min(older) <= math.log(2.5) and logit >= 1.6 * self._least:
            climb = x - median(older)
            rising = x - last > 0.05 and last - near[-2 if not held else -1] > 0.05
            common = median([c for p, c in climbs.items() if p != place] or [0.0])
            if climb >= self._climb and rising and climb - common >= self._climb - math.log(4 / 3):
                return f"{math.exp(climb):.1f} times the level where it had settled, and rising"
        if logit > self._high and x > max(value for _, value in seen):
            values = [value for _, value in seen] + [x]
            third = len(values) // 3
            a, b, c = median(values[:third]), median(values[third : 2 * third]), median(values[-third:])
            noise = MAD_TO_SIGMA / math.sqrt(2) * median(abs(q - p) for p, q in pairwise(values))
            spread = 1.25 * noise * math.sqrt(2 / third)  # of the difference of two medians of `third` values
            climbs_on = a < b < c and c - a > max(math.log(1.15), 4 * spread)
            if climbs_on or x - median(near) > max(math.log(1.3), 5 * noise):
                return f"over {self._high:.0f} and growing on"
        return ""

    def _learn(self, place: str, step: int, x: float) -> None:
        self._held.pop(place, None)
        if place in self._told and x <= self._told[place][1] - LN2:
            del self._told[place]
        seen = self._seen.setdefault(place, deque(maxlen=KEEP))
        if not seen or step - seen[-1][0] >= APART:
            seen.append((step, x))

    def _hold(self, place: str, step: int, x: float) -> None:
        """Put a flagged value aside; a level that has not moved for 16 measurements is the new one."""
        held = self._held.setdefault(place, deque(maxlen=NEAR))
        if not held or step - held[-1][0] >= APART:
            held.append((step, x))
        values = [value for _, value in held]
        if len(values) == NEAR and max(values) - min(values) <= math.log(1.5):
            self._seen[place] = deque(self._held.pop(place), maxlen=KEEP)

    def _forget_from(self, step: int) -> None:
        if step > self._newest:
            return
        self._newest = step - 1
        for series in (self._seen, self._held):
            for place in list(series):
                while series[place] and series[place][-1][0] >= step:
                    series[place].pop()
                if not series[place]:
                    del series[place]
        self._told = {place: point for place, point in self._told.items() if point[0] < step}
