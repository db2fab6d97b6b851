"""Weight jump: weights of a place changed by more than training can have done.

Formula: between two measurements of a place let c = |ln(weight_rms / before)|, or ln(weight_max / before), and let
``usual`` be the largest c per unit of learning rate travelled (sum of lr over the steps) among the last 8
measurements, times the travel since. Critical when

    c > max(ln 1.04, 4 usual)  for the RMS,        c > max(ln 2, 4 usual)  for the maximum,

once 3 changes are known, and where ``update_rms`` of the place is known, only if the RMS also changed by more than
3 (median update_rms) (steps) + 5 %, the maximum by more than 50 (median update_rms) (steps) + 5 %: by the triangle
inequality no series of updates of that size goes further (a single element may go further than the RMS). Before 3
changes are known the second condition alone decides, for the RMS. A value that is not finite where there was a
finite one is always an alarm.
Source: own; weights are sums of small updates and drift smoothly (triangle inequality). A flipped exponent bit
multiplies one weight by a power of two of up to 2^128; a scaled or half-loaded layer moves the RMS.
Differs: nothing published. Limits: a change hidden below a larger weight of the same place (a norm's gain of 1)
shows in neither reading.
Acts: at each measurement, each jump once: the new value is the next one's starting point, its change is not learned.
Whoever changes weights on purpose (QK-clip, a restored checkpoint) calls ``expect_change``.
Cost: a logarithm a place and measurement. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Final, NamedTuple

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import finite, others

CARD: Final = Card(
    name="weight_jump",
    kind="detector",
    title="Alarm when the weights of a place change by more than training can have done",
    citation="own; triangle inequality on the optimizer's updates",
    formula="|ln(rms / before)| > max(ln 1.04, 4 usual), or ln(max / before) > max(ln 2, 4 usual)",
    acts="at each measurement of the weights",
    cost="a logarithm a place and measurement",
    off="guard.enabled = false",
)

KEEP: Final = 8
FEWEST_CHANGES: Final = 3
TIMES: Final = 4.0
BOUND: Final = 3.0
MAX_BOUND: Final = 50.0


class Point(NamedTuple):
    """A measurement: value, learning rate travelled until then, change per travel (``None`` where not learned)."""

    step: int
    value: float
    travel: float
    rate: float | None


class Jump(NamedTuple):
    """A change beyond its bar."""

    excess: float
    place: str
    reading: str
    before: float
    now: float


class WeightJump:
    """Raises ``weight_jump`` (critical) with the place whose weights changed most beyond what is usual."""

    name = "weight_jump"

    def __init__(self, *, rms_change: float = 0.04, max_factor: float = 2.0) -> None:
        """Relative changes of the RMS below ``rms_change`` and of the maximum below ``max_factor`` are normal."""
        assert rms_change > 0.0 and max_factor > 1.0
        self._floors = {"weight_rms": math.log1p(rms_change), "weight_max": math.log(max_factor)}
        self._points: dict[str, dict[str, deque[Point]]] = {"weight_rms": {}, "weight_max": {}}
        self._updates: dict[str, deque[tuple[int, float]]] = {}
        self._broken: dict[str, int] = {}
        self._expected: list[str] = []
        self._expect_all = False
        self._travel = 0.0
        self._last: tuple[int, float] | None = None

    def expect_change(self, places: Sequence[str] = ()) -> None:
        """Take the next measurement of ``places`` (of all where empty) as it is: somebody changes the weights."""
        self._expect_all = self._expect_all or not places
        self._expected = sorted({*self._expected, *places})

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if the weights of a place have jumped since the last measurement."""
        step = signals.step
        self._forget_from(step)
        self._advance(step, signals.lr)
        for place, rms in finite(signals.places("update_rms").items()).items():
            self._updates.setdefault(place, deque(maxlen=64)).append((step, rms))
        measured = {reading: signals.places(reading) for reading in self._points}
        if not any(measured.values()):
            return None
        jumps = [jump for reading in measured for jump in self._judge(reading, step, measured[reading])]
        seen = {place for values in measured.values() for place in values}
        self._expect_all = False
        self._expected = [place for place in self._expected if place not in seen]
        if not jumps:
            return None
        worst = max(jumps, key=lambda jump: jump.excess)
        reading = "RMS" if worst.reading == "weight_rms" else "largest"
        rest = sorted({jump.place for jump in jumps if jump.place != worst.place})
        return Alarm(
            kind="weight_jump",
            severity="critical",
            step=step,
            signal=worst.reading,
            value=worst.now,
            expected=worst.before,
            detector=self.name,
            message=f"{reading} weight of {worst.place} went from {worst.before:.4g} to {worst.now:.4g} since the last "
            f"measurement: more than the optimizer can have done{others(rest)}",
            place=worst.place,
        )

    def state_dict(self) -> State:
        """Return measurements, updates and travel, exact."""
        return {
            "points": {
                reading: {place: [list(point) for point in points] for place, points in by_place.items()}
                for reading, by_place in self._points.items()
            },
            "updates": {place: [list(point) for point in points] for place, points in self._updates.items()},
            "broken": dict(self._broken),
            "expected": list(self._expected),
            "expect_all": self._expect_all,
            "travel": self._travel,
            "last": None if self._last is None else list(self._last),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._points = {
            reading: {
                place: deque((Point(int(p[0]), float(p[1]), float(p[2]), p[3]) for p in points), maxlen=KEEP)
                for place, points in by_place.items()
            }
            for reading, by_place in state["points"].items()
        }
        self._updates = {
            place: deque(((int(s), float(x)) for s, x in points), maxlen=64)
            for place, points in state["updates"].items()
        }
        self._broken = {place: int(step) for place, step in state["broken"].items()}
        self._expected = [str(place) for place in state["expected"]]
        self._expect_all = bool(state["expect_all"])
        self._travel = float(state["travel"])
        self._last = None if state["last"] is None else (int(state["last"][0]), float(state["last"][1]))

    def _judge(self, reading: str, step: int, values: dict[str, float]) -> list[Jump]:
        found: list[Jump] = []
        for place, value in values.items():
            points = self._points[reading].get(place)
            key = f"{reading}@{place}"
            if not math.isfinite(value):
                if points and key not in self._broken:
                    self._broken[key] = step
                    found.append(Jump(math.inf, place, reading, points[-1].value, value))
                continue
            self._broken.pop(key, None)
            if value <= 0.0:
                self._points[reading].pop(place, None)  # all zero: nothing to compare the next value with
                continue
            if not points:
                self._points[reading][place] = deque([Point(step, value, self._travel, None)], maxlen=KEEP)
                continue
            before = points[-1]
            change = math.log(value / before.value)
            travel = self._travel - before.travel
            excess = 0.0
            if not (self._expect_all or place in self._expected):
                excess = self._excess(reading, place, step, value, change, travel)
            learn = excess <= 1.0 and travel > 0.0 and not (self._expect_all or place in self._expected)
            points.append(Point(step, value, self._travel, abs(change) / travel if learn else None))
            if excess > 1.0:
                found.append(Jump(excess, place, reading, before.value, value))
        return found

    def _excess(self, reading: str, place: str, step: int, value: float, change: float, travel: float) -> float:
        """Return the change over its bar; 0 where it cannot be judged."""
        points = self._points[reading][place]
        size = abs(change) if reading == "weight_rms" else max(change, 0.0)
        rates = [point.rate for point in points if point.rate is not None]
        updates = [rms for s, rms in self._updates.get(place, ()) if s > points[-1].step]
        beyond = math.inf
        if updates:
            times = BOUND if reading == "weight_rms" else MAX_BOUND
            allowed = times * median(updates) * (step - points[-1].step)
            beyond = abs(value - points[-1].value) / (allowed + 0.05 * points[-1].value)
        if len(rates) >= FEWEST_CHANGES:
            return min(size / max(self._floors[reading], TIMES * max(rates) * travel), beyond)
        return beyond if updates and reading == "weight_rms" else 0.0

    def _advance(self, step: int, lr: float) -> None:
        """Add the learning rates of the steps since the last call; without any, steps count as equal."""
        last = self._last
        if last is not None:
            self._travel += last[1] * (step - last[0])
        usable = math.isfinite(lr) and lr > 0.0
        self._last = (step, lr if usable else (last[1] if last is not None else 1.0))

    def _forget_from(self, step: int) -> None:
        if self._last is None or self._last[0] < step:
            return
        for by_place in self._points.values():
            for place in list(by_place):
                while by_place[place] and by_place[place][-1].step >= step:
                    by_place[place].pop()
                if not by_place[place]:
                    del by_place[place]
        for updates in self._updates.values():
            while updates and updates[-1][0] >= step:
                updates.pop()
        self._broken = {key: at for key, at in self._broken.items() if at < step}
        newest = max((p[-1] for by_place in self._points.values() for p in by_place.values()), default=None)
        lr = self._last[1]
        self._travel = 0.0 if newest is None else newest.travel
        self._last = None if newest is None else (newest.step, lr)
