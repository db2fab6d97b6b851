"""Underflow and overflow of fp16: gradients die at the small end, or activations near the large end.

Four signs, each a warning, each once in an event:
    scale     the loss scale fell by 4 halvings within 100 steps, or to 1/16 of the largest scale it held for 100 steps
              within the last 2000; or it reached 1. The descent from its first value, before it has held any for 100
              steps, is how scalers start; a doubling undone by a halving is how they go on. Neither is a sign.
    zero      the gradient norm is exactly 0 for 3 steps running, where there was a gradient before
    place     the same at one place of the model for 8 steps running while other gradients live
    range     an output reaches 32 768, one doubling away from fp16's largest number (65 504), where a loss scale
              other than 1 says that fp16 is used
Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740 (loss scaling); a sinking scale preceded
the failures of BigScience's 104B, by 2000 steps, and OPT-175B. Differs: papers describe the cure, not the rule.
Acts: every step. Cost: none to speak of. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Streaks, finite, others

CARD: Final = Card(
    name="underflow",
    kind="detector",
    title="Alarm when the fp16 loss scale sinks, gradients become zero or outputs near 65 504",
    citation="Micikevicius et al. 2018, arXiv 1710.03740",
    formula="4 halvings within 100 steps; scale <= 1/16 of what it held; norm = 0 three times; output >= 32768 in fp16",
    acts="every step, before the optimizer",
    cost="none",
    off="guard.enabled = false",
    differs="a rule for telling; the paper describes the cure",
)

NEAR_TOP: Final = 32768.0
HALVINGS: Final = 4
HALVINGS_WITHIN: Final = 100
REMEMBER: Final = 2000


class Underflow:
    """Raises ``underflow`` (warning)."""

    name = "underflow"

    def __init__(self, *, hold_steps: int = 100, zero_steps: int = 3, zero_place_steps: int = 8) -> None:
        """A scale counts as held after ``hold_steps``; the others say how many zeros running are a sign."""
        assert hold_steps > 0 and zero_steps >= 1 and 1 <= zero_place_steps <= 16
        self._hold_steps = hold_steps
        self._zero_steps = zero_steps
        self._zero_place_steps = zero_place_steps
        self._scales: deque[tuple[int, float]] = deque()
        """The scale's changes: (first step at which it was seen, scale), the last REMEMBER steps of them."""
        self._newest = 0
        self._had: list[str] = []
        self._streaks = Streaks()
        self._events = Events(quiet_after=HALVINGS_WITHIN)

    def update(self, signals: Signals) -> Alarm | None:
        """Return a warning if numbers have begun to leave fp16's range."""
        self._forget_from(signals.step)
        self._newest = signals.step
        return self._judge_scale(signals) or self._judge_zero(signals) or self._judge_range(signals)

    def state_dict(self) -> State:
        """Return scales, streaks and events, exact."""
        return {
            "scales": [list(change) for change in self._scales],
            "newest": self._newest,
            "had": list(self._had),
            "streaks": self._streaks.state_dict(),
            "events": self._events.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._scales = deque((int(step), float(scale)) for step, scale in state["scales"])
        self._newest = int(state["newest"])
        self._had = [str(place) for place in state["had"]]
        self._streaks.load_state_dict(state["streaks"])
        self._events.load_state_dict(state["events"])

    def _judge_scale(self, signals: Signals) -> Alarm | None:
        step, scale = signals.step, signals.extra.get("loss_scale", math.nan)
        if not math.isfinite(scale) or scale <= 0.0:
            return None
        if not self._scales or scale != self._scales[-1][1]:
            self._scales.append((step, scale))
        while len(self._scales) > 1 and self._scales[1][0] <= step - REMEMBER:
            self._scales.popleft()
        ends = [*(s for s, _ in list(self._scales)[1:]), step]
        held = [x for (s, x), end in zip(self._scales, ends, strict=True) if end - s >= self._hold_steps]
        was = [x for s, x in self._scales if s <= step - HALVINGS_WITHIN]
        recent = [x for s, x in self._scales if s > step - HALVINGS_WITHIN]
        sinking = ""
        if held and scale <= max(held) / 16:
            sinking = f"1/{max(held) / scale:.0f} of the {max(held):g} it had held"
        elif held and recent and max(was[-1:] + recent) >= 2**HALVINGS * scale and self._falls(recent, was) >= HALVINGS:
            sinking = f"after {HALVINGS} halvings or more within {HALVINGS_WITHIN} steps"
        elif scale <= 1.0 and len(self._scales) > 1 and self._scales[-2][1] > 1.0:
            sinking = "the least that is of any use"
        if not sinking:
            return None
        new = self._events.begins("loss_scale", step)
        if not new:
            return None
        usual = max(held, default=self._scales[0][1])
        if held:
            self._scales = deque([(step, scale)])  # what it has sunk to is what it may sink from
        return self._alarm(step, "loss_scale", scale, usual, f"the loss scale has sunk to {scale:g}, {sinking}")

    @staticmethod
    def _falls(recent: list[float], was: list[float]) -> float:
        """Return how many halvings there were, doublings aside."""
        series = was[-1:] + recent
        return sum(max(math.log2(a / b), 0.0) for a, b in pairwise(series))

    def _judge_zero(self, signals: Signals) -> Alarm | None:
        step = signals.step
        norms = finite(signals.places("grad_norm").items())
        whole = signals.grad_norm
        had = set(self._had)
        had |= {place for place, norm in norms.items() if norm > 0.0} | ({""} if whole > 0.0 else set())
        if len(had) != len(self._had):
            self._had = sorted(had)
        if self._streaks.count("", step, whole == 0.0 and "" in had) >= self._zero_steps:
            if not self._events.begins("zero", step):
                return None
            return self._alarm(step, "grad_norm", 0.0, math.nan, "the gradient is exactly zero: it has underflowed")
        dead = [
            place
            for place, norm in norms.items()
            if self._streaks.count(place, step, norm == 0.0 and place in had and whole > 0.0) >= self._zero_place_steps
        ]
        new = [place for place in dead if self._events.begins(f"zero@{place}", step)]
        if not new:
            return None
        message = f"the gradient of {new[0]} is exactly zero for {self._zero_place_steps} steps{others(new[1:])}"
        return self._alarm(step, "grad_norm", 0.0, math.nan, message, new[0])

    def _judge_range(self, signals: Signals) -> Alarm | None:
        if not self._scales or (len(self._scales) == 1 and self._scales[0][1] == 1.0):
            return None
        near = {place: x for place, x in signals.places("out_max").items() if x >= NEAR_TOP}  # infinity included
        new = [place for place in near if self._events.begins(f"range@{place}", signals.step)]
        if not new:
            return None
        worst = max(new, key=lambda place: near[place])
        rest = others(place for place in new if place != worst)
        message = f"outputs of {worst} reach {near[worst]:.4g}; fp16 ends at 65504{rest}"
        return self._alarm(signals.step, "out_max", near[worst], NEAR_TOP, message, worst)

    def _alarm(self, step: int, signal: str, value: float, expected: float, message: str, place: str = "") -> Alarm:
        return Alarm("underflow", "warning", step, signal, value, expected, self.name, message, place)

    def _forget_from(self, step: int) -> None:
        if step > self._newest:
            return
        self._newest = step - 1
        while self._scales and self._scales[-1][0] >= step:
            self._scales.pop()
        self._streaks.forget_from(step)
        self._events.forget_from(step)
