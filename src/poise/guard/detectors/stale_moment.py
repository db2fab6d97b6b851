"""Stale second moment: v no longer describes the gradients of a place.

Two signs, each critical:

1. Frozen. ``v_stale`` (share of second-moment elements that did not change by a bit although their gradient did)
   is at least 0.9 for 8 steps running. In bf16 an element needs a relative change of 1/256 to move at all, and at
   beta2 = 0.999 it moves by (1 - beta2)(g^2/v - 1): almost none does.
2. Lost. v of a place has become too small for its gradients. Let r be ln adam_ratio and g be ln grad_norm of the
   place, each minus its median over the places (which takes out what all share: batch, clipping). Both

       z = r - level(r)   and   y = (r - g) - level(r - g)

   stand up: the ratio has risen, and the gradient has not. A growing gradient raises z alone; an exponential
   average cannot raise y fast, because sqrt(v) shrinks by at most sqrt(beta2) a step. Alarm when min(z, y) is over
   ln 1.75 and both over 5 sigma for two steps running, or over ln 3 and both over 9 sigma at once.

With v including this gradient the ratio cannot exceed 1 / sqrt(1 - beta2), which is 4.5 at beta2 = 0.95: that is why
the bars are low and carried by robust statistics (see ``places.py``). Without gradient norms by place, or with fewer
than three places, only a tenfold rise of the ratio within two steps, at one place, counts.
Source: bf16 states: common knowledge of number formats; lagging moments: Wortsman et al. 2023, arXiv 2304.13013.
No paper tests v against the gradient like this.
Acts: sign 1 from step 8 on, once in an event; sign 2 every bad step once 24 readings are known (a step may be
skipped, and the moments are still wrong). A skipped step leaves v untouched; it is not judged by sign 1. Whoever
resets moments on purpose calls ``expect_change``.
Cost: some logarithms a place and step, a median over 48 floats every eighth. Switch off: leave it out of the
guard's detectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Streaks, Tracks, finite, others

CARD: Final = Card(
    name="stale_moment",
    kind="detector",
    title="Alarm when a place's second moments are frozen or far too small for its gradients",
    citation="after Wortsman et al. 2023, arXiv 2304.13013; bf16 rounding",
    formula="v_stale >= 0.9 for 8 steps; or ln ratio up and ln(ratio / gradient norm) up, both against other places",
    acts="every step once 24 readings are known, before the optimizer",
    cost="logarithms a place and step; medians over 48 floats every eighth step",
    off="guard.enabled = false",
    differs="compares the ratio with the gradient norm, so that a growing gradient is not taken for a stale moment",
)

FEWEST_PLACES: Final = 3
TENFOLD: Final = math.log(10.0)


class StaleMoment:
    """Raises ``stale_moment`` (critical) with the place whose second moments are wrong."""

    name = "stale_moment"

    def __init__(
        self,
        *,
        share: float = 0.9,
        frozen_steps: int = 8,
        factor: float = 1.75,
        sigma: float = 5.0,
        window: int = 48,
        min_values: int = 24,
        relearn_after: int = 200,
    ) -> None:
        """``share`` and ``frozen_steps`` belong to sign 1, the others to sign 2; windows are in steps."""
        assert 0.0 < share <= 1.0 and factor > 1.0 and frozen_steps <= 16
        self._share = share
        self._frozen_steps = frozen_steps
        self._bar = math.log(factor)
        self._sigma = sigma
        common = {"window": window, "at_least": min_values, "min_values": min_values, "relearn_after": relearn_after}
        self._ratio = Tracks(**common)
        self._rest = Tracks(**common)
        self._frozen = Streaks()
        self._lost = Streaks()
        self._events = Events(quiet_after=50)

    def update(self, signals: Signals) -> Alarm | None:
        """Return an alarm if the second moments of a place are frozen, or lost."""
        for memory in (self._ratio, self._rest, self._frozen, self._lost, self._events):
            memory.forget_from(signals.step)
        lost = self._judge_lost(signals)  # both look at every step, whatever the other says
        return self._judge_frozen(signals) or lost

    def expect_change(self, places: Sequence[str] = ()) -> None:
        """Learn ``places`` (all where empty) anew: somebody resets their moments."""
        self._ratio.restart(places)
        self._rest.restart(places)

    def state_dict(self) -> State:
        """Return windows, streaks and events, exact."""
        return {
            "ratio": self._ratio.state_dict(),
            "rest": self._rest.state_dict(),
            "frozen": self._frozen.state_dict(),
            "lost": self._lost.state_dict(),
            "events": self._events.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._ratio.load_state_dict(state["ratio"])
        self._rest.load_state_dict(state["rest"])
        self._frozen.load_state_dict(state["frozen"])
        self._lost.load_state_dict(state["lost"])
        self._events.load_state_dict(state["events"])

    def _judge_frozen(self, signals: Signals) -> Alarm | None:
        moved = {place: rms > 0.0 for place, rms in finite(signals.places("update_rms").items()).items()}
        shares = finite(signals.places("v_stale").items())
        found: dict[str, float] = {}
        for place, share in shares.items():
            if not moved.get(place, True):
                continue  # the last step was skipped: nothing could change
            running = self._frozen.count(place, signals.step, share >= self._share)
            if running >= self._frozen_steps and self._events.begins(place, signals.step):
                found[place] = share
        if not found:
            return None
        worst = max(found, key=lambda place: found[place])
        return Alarm(
            kind="stale_moment",
            severity="critical",
            step=signals.step,
            signal="v_stale",
            value=found[worst],
            expected=0.0,
            detector=self.name,
            message=f"{found[worst]:.0%} of the second moments of {worst} have not moved by a bit for "
            f"{self._frozen_steps} steps; keep them in fp32 or lower beta2{others(p for p in found if p != worst)}",
            place=worst,
        )

    def _judge_lost(self, signals: Signals) -> Alarm | None:
        step = signals.step
        logs = {place: math.log(v) for place, v in finite(signals.places("adam_ratio").items()).items() if v > 0.0}
        norms = {place: math.log(v) for place, v in finite(signals.places("grad_norm").items()).items() if v > 0.0}
        compared = len(logs) >= FEWEST_PLACES and all(place in norms for place in logs)
        found: dict[str, tuple[float, float]] = {}
        common = median(logs.values()) if compared else 0.0
        common_norm = median(norms[place] for place in logs) if compared else 0.0
        for place, ratio in logs.items():
            r = ratio - common
            rest = r - (norms[place] - common_norm) if compared else r
            usual, usual_rest = self._ratio.level(place), self._rest.level(place)
            if usual is None or usual_rest is None:
                self._learn(place, step, r, rest)
                continue
            z, y = r - usual.value, rest - usual_rest.value
            size, height = min(z, y), min(z / usual.sigma, y / usual_rest.sigma)
            if not compared:
                out, at_once = size >= TENFOLD, size >= TENFOLD
            else:
                out = size >= self._bar and height >= self._sigma
                at_once = out and size >= math.log(3.0) and height >= 9.0
            running = self._lost.count(place, step, out)
            if not out:
                self._learn(place, step, r, rest)
                continue
            self._ratio.hold(place, step, r)
            self._rest.hold(place, step, rest)
            if at_once or running >= 2:
                found[place] = (size, math.exp(logs[place] - z))
        if not found or (not compared and len(found) > 1):
            return None
        worst = max(found, key=lambda place: found[place][0])
        return Alarm(
            kind="stale_moment",
            severity="critical",
            step=step,
            signal="adam_ratio",
            value=math.exp(logs[worst]),
            expected=found[worst][1],
            detector=self.name,
            message=f"the second moments of {worst} no longer match its gradients: their ratio is "
            f"{math.exp(logs[worst]):.3g}, {math.exp(found[worst][0]):.1f} times what the gradient explains"
            f"{others(place for place in found if place != worst)}",
            place=worst,
        )

    def _learn(self, place: str, step: int, r: float, rest: float) -> None:
        self._ratio.learn(place, step, r)
        self._rest.learn(place, step, rest)
