"""Name the cause of a trouble from what was seen before and at it. Never a guess dressed as a verdict.

The evidence is the alarms of the last ``WINDOW`` steps, whose statistics were judged by their detectors, and what
was measured on alarm. The rules are tried in this order, and the first that holds gives the verdict:

    schedule      the learning rate jumped tenfold (and the last good batch does not say otherwise)
    software      the batch is one that was just trained on (the loader repeats itself)
    hardware      weights of a place changed by more than the optimizer's steps can have done
    data          the last good batch still has its loss under the present weights, so this batch is odd: measured
    precision     a gradient or activation left its range: not finite, or the loss scale sinks
    schedule      the learning rate jumped before; every step replaces the weights; the loss is chaotic from the start
    architecture  attention logits ran away, or attention collapsed, in a layer before the loss moved
    optimizer     the second moment does not fit the gradients, or the update grew first
    data          one odd step with nothing after it
    software      within ``SEAM`` steps after a resume
    optimizer     the last good batch has a higher loss now: the weights are in a bad place, by their own steps
    unknown       otherwise

``measured`` says that an experiment tells it from the others: here the probe (the last accepted batch again).
``likely`` is a signature of its own; ``possible`` fits, and so would others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from poise.core.types import Alarm, Certainty, Signals, Verdict
from poise.guard.rate import WILD

WINDOW = 64
"""Steps before a trouble in which an alarm can be its forerunner."""

SEAM = 30
PROBE_SHARE = 0.25
"""The weights are sound if the last good batch's loss has risen by less than this share of the odd batch's rise."""

TROUBLE = frozenset({"nonfinite", "fast_spike", "slow_divergence", "chaotic", "level_shift", "collapse"})
"""Kinds that are what has to be explained; every other kind is evidence."""

EXPLAINED = TROUBLE | {"data_outlier", "lr_jump"}

State = dict[str, Any]


class Causes:
    """Remembers recent alarms and names causes. Exact state, no torch."""

    def __init__(self) -> None:
        self._recent: list[Alarm] = []
        self._resumed_at: int | None = None

    def see(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Take in a step's alarms; what lies ahead of ``step`` (the run went back) is forgotten."""
        kept = [a for a in self._recent if step - WINDOW <= a.step < step]
        self._recent = [*kept, *alarms]

    def resumed(self, step: int) -> None:
        """A run was resumed: ``step`` steps are done."""
        self._resumed_at = step

    def name(self, signals: Signals, measured: Mapping[str, float]) -> Verdict | None:
        """Return the verdict on the trouble that this step's alarms show; ``None`` when they show none.

        Args:
            signals: the step's readings.
            measured: what was measured on alarm.
        """
        now = [a for a in self._recent if a.step == signals.step]
        trouble = next((a for a in now if a.severity == "critical" or a.kind in EXPLAINED), None)
        if trouble is None:
            return None
        probe = Probe.of(signals, measured, trouble)
        verdict = self._verdict(signals, now, trouble, probe)
        bend, limit = measured.get("curvature", math.nan), measured.get("curvature_limit", math.nan)
        if bend > limit:
            steep = f"the curvature along the step is {bend:.3g}, above the {limit:.3g} that the step size can bear"
            verdict = dataclasses.replace(verdict, evidence=(*verdict.evidence, steep))
        return dataclasses.replace(verdict, weights="unknown" if probe is None else probe.weights)

    def _verdict(self, signals: Signals, now: Sequence[Alarm], trouble: Alarm, probe: Probe | None) -> Verdict:
        wild = [a for a in self._all("lr_jump") if a.value >= WILD * a.expected]
        if wild and not (probe is not None and probe.weights == "sound"):
            return Verdict("schedule", "likely", _say(wild))
        for rule in (self._repeated, self._damaged):
            if (verdict := rule(signals, now)) is not None:
                return verdict
        if probe is not None and probe.weights == "sound":
            return Verdict("data", "measured", (trouble.message, *probe.evidence))
        for rule in (self._range, self._rate, self._layer, self._moments, self._outlier, self._seam):
            if (verdict := rule(signals, now)) is not None:
                return verdict
        if probe is not None:
            return Verdict("optimizer", "possible", (trouble.message, *probe.evidence))
        return Verdict("unknown", "possible", (trouble.message, "no forerunner was seen"))

    def state_dict(self) -> State:
        """Return the recent alarms, JSON-able and exact; a resume is news only to the process that did it."""
        fields = Alarm.__dataclass_fields__
        return {"recent": [{f: getattr(a, f) for f in fields} for a in self._recent]}

    def load_state_dict(self, state: State) -> None:
        """Take over what ``state_dict`` returned."""
        self._recent = [Alarm(**fields) for fields in state["recent"]]

    # -- rules -----------------------------------------------------------------------------------------

    def _all(self, *kinds: str) -> list[Alarm]:
        return [a for a in self._recent if a.kind in kinds]

    def _repeated(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        found = [a for a in self._all("repeated_data") if a.severity != "note"]
        return Verdict("software", "likely", _say(found)) if found else None

    def _damaged(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        found = self._all("weight_jump")
        logits = {a.place for a in self._all("logit_growth")}
        trouble = any(a.kind in TROUBLE for a in self._recent)
        if not found or (not trouble and found[0].place in logits):
            return None  # with a sound loss, what grows queries and keys shows as logits first
        evidence = (*_say(found), "a fault of a device or of code that writes weights does that; a step does not")
        large = not 0.5 < found[0].value / max(found[0].expected, 1e-30) < 2.0
        # a small change under a sound loss may have other reasons
        return Verdict("hardware", "likely" if trouble or large else "possible", evidence, place=found[0].place)

    def _range(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        broken = [a for a in now if a.kind == "nonfinite"]
        sinking = self._all("underflow")
        if not broken:
            return Verdict("precision", "likely", _say(sinking), place=sinking[0].place) if sinking else None
        places = signals.places("nonfinite")
        evidence = [broken[0].message]
        if places:
            tensors = ", ".join(f"{place} ({count:g})" for place, count in places.items())
            evidence.append(f"tensors with a non-finite gradient: {tensors}")
        if math.isfinite(signals.loss):
            evidence.append(f"the loss itself was finite ({signals.loss:.4g})")
        first = next((a for a in self._recent if a.kind in ("logit_growth", "lr_jump", "fast_spike")), None)
        if first is not None and first.step < signals.step:
            evidence.append(f"step {first.step}: {first.message}")
            return None if first.kind != "fast_spike" else Verdict("precision", "possible", tuple(evidence))
        place = next(iter(places), "") if len(places) == 1 else ""
        return Verdict("precision", "likely" if sinking or place else "possible", tuple(evidence), place=place)

    def _rate(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        jumps = self._all("lr_jump")
        if jumps:
            return Verdict("schedule", "likely", _say(jumps))
        large = self._all("large_updates")
        if large:
            return Verdict("schedule", "likely", _say(large))
        chaotic = [a for a in now if a.kind == "chaotic"]
        if chaotic:
            evidence = (chaotic[0].message, f"learning rate {signals.lr:.3g}: too high, or the warm-up is too short")
            return Verdict("schedule", "possible", evidence)
        return None

    def _layer(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        found = sorted(
            self._all("logit_growth", "entropy_collapse", "weight_jump"), key=lambda a: a.kind == "weight_jump"
        )
        if not found or found[0].kind == "weight_jump":
            return None
        certainty: Certainty = "likely" if found[0].kind == "logit_growth" else "possible"
        return Verdict("architecture", certainty, _say(found), place=found[0].place)

    def _moments(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        stale = self._all("stale_moment")
        if stale:
            return Verdict("optimizer", "likely", _say(stale), place=stale[0].place)
        grown = self._all("update_jump", "moment_lag", "grad_runup")
        if not grown:
            return None
        return Verdict("optimizer", "possible", _say(grown), place=grown[0].place)

    def _outlier(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        found = [a for a in now if a.kind == "data_outlier"]
        return Verdict("data", "likely", _say(found)) if found else None

    def _seam(self, signals: Signals, now: Sequence[Alarm]) -> Verdict | None:
        if self._resumed_at is None or not 0 < signals.step - self._resumed_at <= SEAM:
            return None
        evidence = (now[0].message, f"the run was resumed {signals.step - self._resumed_at} steps before")
        return Verdict("software", "possible", evidence)


@dataclass(frozen=True)
class Probe:
    """The last good batch shown again: are the weights sound, or is the batch?"""

    weights: Literal["sound", "damaged"]
    evidence: tuple[str, ...]

    @classmethod
    def of(cls, signals: Signals, measured: Mapping[str, float], trouble: Alarm) -> Probe | None:
        """Return what the probe says of a trouble of the loss; ``None`` where there was none."""
        expected, again = measured.get("probe_expected", math.nan), measured.get("probe_loss", math.nan)
        if trouble.signal != "loss" or not math.isfinite(expected) or "probe_loss" not in measured:
            return None
        rise = signals.loss - trouble.expected
        limit = PROBE_SHARE * (min(rise, expected) if math.isfinite(rise) else expected)
        losses = f"has loss {again:.4g} ({expected:.4g} when it was trained on)"
        if not (math.isfinite(again) and again - expected <= max(limit, 0.0)):
            return cls("damaged", (f"the last good batch, shown again, {losses}: the weights are the trouble",))
        evidence = [f"the last good batch, shown again, {losses}: the weights are sound"]
        most, usual = measured.get("sequence_loss_max", math.nan), measured.get("sequence_loss_median", math.nan)
        if math.isfinite(most) and math.isfinite(usual):
            evidence.append(f"the odd batch's sequences: median {usual:.4g}, largest {most:.4g}")
        return cls("sound", tuple(evidence))


def _say(alarms: Sequence[Alarm]) -> tuple[str, ...]:
    """The first few alarms as sentences."""
    return tuple(f"step {alarm.step}: {alarm.message}" for alarm in alarms[:4])
