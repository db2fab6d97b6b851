"""Attention-entropy collapse: a layer's attention has become almost one-hot.

Formula: e = attn_entropy of a layer (mean over queries of entropy / ln(visible keys), 0 to 1), level = median of its
measurements over the last 640 steps. Alarm when e < 0.15 and e < 0.4 level, or e < 0.03 and e < 0.75 level.
Source: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv
2303.06296, which shows that low entropy goes with instability; the numbers are ours: healthy small models of our
own stay above 0.25.
Acts: at each measurement once 4 are known; once in an event. Cost: a median over at most 64 floats a layer and
measurement. Switch off: leave it out of the guard's detectors.
"""

from __future__ import annotations

from typing import Final

from poise.core.registry import Card
from poise.core.types import Alarm, Signals
from poise.guard.detectors.base import State
from poise.guard.detectors.places import Events, Tracks, finite, others

CARD: Final = Card(
    name="entropy_collapse",
    kind="detector",
    title="Alarm when the attention of a layer becomes almost one-hot",
    citation="Zhai et al. 2023, arXiv 2303.06296",
    formula="entropy < 0.15 and < 0.4 of its level, or < 0.03 and < 0.75 of its level",
    acts="at each measurement of the entropy once 4 are known",
    cost="a median over at most 64 floats a layer and measurement",
    off="guard.enabled = false",
    differs="a rule for telling; the paper plots the entropy and reparametrises the weights",
)


class EntropyCollapse:
    """Raises ``entropy_collapse`` (warning) with the layer whose attention is narrowest."""

    name = "entropy_collapse"

    def __init__(
        self, *, low: float = 0.15, share: float = 0.4, one_hot: float = 0.03, window: int = 640, min_values: int = 4
    ) -> None:
        """``low`` and ``one_hot`` are entropies, ``share`` is relative to the level, ``window`` is in steps."""
        assert 0.0 < one_hot < low < 1.0 and 0.0 < share < 1.0
        self._low, self._share, self._one_hot = low, share, one_hot
        self._tracks = Tracks(window=window, at_least=16, min_values=min_values, relearn_after=window, refresh=1)
        self._events = Events(quiet_after=window)

    def update(self, signals: Signals) -> Alarm | None:
        """Return a warning if a layer's attention has just collapsed."""
        step = signals.step
        self._tracks.forget_from(step)
        self._events.forget_from(step)
        entropies = finite(signals.places("attn_entropy").items())
        found: dict[str, float] = {}
        for place, entropy in entropies.items():
            level = self._tracks.level(place)
            if level is None:
                self._tracks.learn(place, step, entropy)
                continue
            fell = entropy < self._low and entropy < self._share * level.value
            if fell or (entropy < self._one_hot and entropy < 0.75 * level.value):
                self._tracks.hold(place, step, entropy)
                if self._events.begins(place, step):
                    found[place] = level.value
            else:
                self._tracks.learn(place, step, entropy)
        if not found:
            return None
        worst = min(found, key=lambda place: entropies[place])
        return Alarm(
            kind="entropy_collapse",
            severity="warning",
            step=step,
            signal="attn_entropy",
            value=entropies[worst],
            expected=found[worst],
            detector=self.name,
            message=f"attention of {worst} has become almost one-hot: entropy {entropies[worst]:.3g} of the possible, "
            f"usually {found[worst]:.2g}{others(place for place in found if place != worst)}",
            place=worst,
        )

    def state_dict(self) -> State:
        """Return windows and events, exact."""
        return {"tracks": self._tracks.state_dict(), "events": self._events.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._tracks.load_state_dict(state["tracks"])
        self._events.load_state_dict(state["events"])
