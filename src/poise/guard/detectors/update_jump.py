"""Update jump: the weights move about twice as far in a step as the learning rate explains.

Formula: x = ln(update_rms / lr of the step that made it), for the whole model and for each place; level and sigma
robust over 64 steps (see ``places.py``). Alarm when two readings running, or one of twice the height, lie above

    level + max(ln 1.7, k sigma / 2)        (ln 2.5 for a place: fewer elements are sampled there)

k follows from the allowed false alarms, shared among the places. The alarm names a place unless half of the places
or more are out. Dividing by the learning rate takes warm-up and decay out; decoupled weight decay moves weights in
proportion to it as well.
Source: Marin 32B (issue marin-community/marin#1368): the update norm doubled before each loss spike and the
gradient norm rose only afterwards; no paper.
Differs from update-norm clipping (mean + 2 sigma of the last 128 norms): normalised, per place, medians, and it
only tells. Acts: every step at which updates were measured, once 20 are known; once in an event. A step that was
skipped moves nothing and is not judged. Cost: one logarithm a place and step, a median over 64 floats every eighth.
Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Streaks, Tracks, everywhere, named, others, tail_sigmas

CARD: Final = Card(
    name="update_jump",
    kind="detector",
    title="Alarm when weights move about twice as far as the learning rate explains",
    citation="update norms before Marin 32B's spikes, marin-community/marin issue 1368; no paper",
    formula="ln(update_rms / lr) - median_64 > max(ln 1.7, k sigma / 2), twice running (or once at double height)",
    acts="every step once 20 update sizes are known, before the optimizer",
    cost="a logarithm a place and step; a median over 64 floats every eighth step",
    off="guard.enabled = false",
    differs="normalised by the learning rate; per place; medians",
)


class UpdateJump:
    """Raises ``update_jump`` (warning) for the model or for the place that stands out most."""

    name = "update_jump"

    def __init__(
        self,
        *,
        alarms_per_10k: float = 0.5,
        factor: float = 1.7,
        place_factor: float = 2.5,
        window: int = 64,
        min_values: int = 20,
        relearn_after: int = 100,
    ) -> None:
        """Updates below ``factor`` (of one place: ``place_factor``) times their level are normal; windows in steps."""
        assert 1.0 < factor <= place_factor
        self._alarms = alarms_per_10k
        self._floor = math.log(factor)
        self._place_floor = math.log(place_factor)
        self._tracks = Tracks(
            window=window, at_least=window // 2, min_values=min_values, relearn_after=relearn_after, refresh=8
        )
        self._events = Events(quiet_after=50)
        self._streaks = Streaks()
        self._lr: tuple[int, float] | None = None

    def update(self, signals: Signals) -> Alarm | None:
        """Return a warning if an update has just become too large."""
        step = signals.step
        self._forget_from(step)
        before, self._lr = self._lr, (step, signals.lr)
        lr = before[1] if before is not None and before[0] == step - 1 else signals.lr
        if not math.isfinite(lr) or lr <= 0.0:
            return None
        readings = {place: rms for place, rms in everywhere(signals, "update_rms").items() if rms > 0.0}
        if not readings:
            return None
        sigmas = tail_sigmas(self._alarms, len(readings)) / 2
        found: dict[str, tuple[float, float]] = {}
        excess: dict[str, float] = dict.fromkeys(readings, 0.0)
        for place, rms in readings.items():
            x = math.log(rms / lr)
            level = self._tracks.level(place)
            if level is None:
                self._tracks.learn(place, step, x)
                continue
            floor = self._floor if place == "" else self._place_floor
            above, bar = x - level.value, max(floor, sigmas * level.sigma)
            running = self._streaks.count(place, step, above > bar)
            if not running:
                self._tracks.learn(place, step, x)
                continue
            self._tracks.hold(place, step, x)
            excess[place] = above
            if (running >= 2 or above > 2 * bar) and self._events.begins(place, step):
                found[place] = (above, lr * math.exp(level.value))
        if not found:
            return None
        worst = self._worst(found, excess)
        if worst is None:
            return None
        above, usual = found[worst]
        return Alarm(
            kind="update_jump",
            severity="warning",
            step=step,
            signal="update_rms",
            value=readings[worst],
            expected=usual,
            detector=self.name,
            message=f"the last update of {named(worst)} was {math.exp(above):.1f} times what its learning rate "
            f"usually gives ({readings[worst]:.3g} RMS){others(place for place in found if place != worst)}",
            place=worst,
        )

    def expect_change(self, places: Sequence[str] = ()) -> None:
        """Learn ``places`` (all where empty) and the whole anew: moments or weights are set, and updates show it."""
        self._tracks.restart(["", *places] if places else ())

    def state_dict(self) -> State:
        """Return windows, streaks and events, exact."""
        return {
            "tracks": self._tracks.state_dict(),
            "events": self._events.state_dict(),
            "streaks": self._streaks.state_dict(),
            "lr": None if self._lr is None else list(self._lr),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._tracks.load_state_dict(state["tracks"])
        self._events.load_state_dict(state["events"])
        self._streaks.load_state_dict(state["streaks"])
        self._lr = None if state["lr"] is None else (int(state["lr"][0]), float(state["lr"][1]))

    @staticmethod
    def _worst(found: dict[str, tuple[float, float]], excess: dict[str, float]) -> str | None:
        """Return the place that an alarm is about: the whole model where most places are out.

        ``None`` where the whole model is out only because of a place that was told before.
        """
        places = [place for place in excess if place]
        out = [place for place in places if excess[place] > 0.0]
        whole = excess.get("", 0.0)
        local = [place for place in found if place and (whole <= 0.0 or excess[place] - whole >= math.log(1.5))]
        if "" in found and (not out or 2 * len(out) >= len(places)):
            return ""
        return max(local, key=lambda place: found[place][0], default=None)

    def _forget_from(self, step: int) -> None:
        self._tracks.forget_from(step)
        self._events.forget_from(step)
        self._streaks.forget_from(step)
        if self._lr is not None and self._lr[0] >= step:
            self._lr = None
