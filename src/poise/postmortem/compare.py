"""Two runs side by side: did they see the same data in the same order, and do their events fall on the same steps?

The noise of a loss curve about its trend is mostly that of its batches: two runs on the same batches in the same order
have the same noise, whatever their optimizers. So the correlation of the noise at equal steps tells whether they share
the order; a shift of some steps (data skipped by one) is looked for too. Its interval is Fisher's, with the number of
independent values that the autocorrelations leave.

    data               same order, and most of what one run has at a step the other has too (``_mostly``)
    not (only) data    same order, and most of it is in one run only; or other data, and it coincides all the same
    cannot tell        other data and other steps; nothing to compare; too few common steps; two copies of one run

Odd batches are looked up in the other run's noise, where they may be too small for an event. Spikes coincide within
``CLOSE`` steps; chance is what all circular shifts of the other run's starts give, which keeps their clustering.
Spikes that come from the schedule or a restart are left out: two runs may share that as well.

Source: the comparison is PaLM's (arXiv 2204.02311, section 5.1): the same batches from another state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from poise.dashboard.text import plural
from poise.postmortem.event import Cause, Event
from poise.postmortem.log import Log
from poise.postmortem.noise import FEWEST, Noise, Order, fitted, noise_of, parted
from poise.postmortem.steps import SPIKE_KINDS, interval
from poise.postmortem.trend import Ints, Trend

Verdict = Literal["data", "not (only) data", "cannot tell"]
SEEN: Final = 3.0
"""Deviations above its trend that the other run needs at the step of an odd batch."""

CLOSE: Final = 10
CHANCE: Final = 0.05
UNLIKELY: Final = 0.01
MOST: Final = 0.8
"""Share of at least ``SEVERAL`` events that both runs have, from which on it is the data's doing."""

SEVERAL: Final = 3
MAX_SHIFTS: Final = 2000


@dataclass(frozen=True, slots=True)
class Seen:
    """Whether the other run has an event, too.

    Attributes:
        start: of the event.
        also: whether the other run has it.
        text: one sentence with the numbers.
    """

    start: int
    also: bool
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two logs show together.

    Attributes:
        a, b: names of the logs.
        order: whether they share the data order.
        correlation, low, high: of the noise at equal steps, with its 95 % interval; NaN where there are too few.
        steps: common steps that were compared.
        shift: steps by which ``b`` is behind, where the order is ``shifted``.
        seen: for each odd batch and spike of ``a`` on shared data, whether ``b`` has it.
        coincide, of, chance: spikes of ``a`` near one of ``b``, out of how many, and how many would be by chance.
        p: share of the shifts with as many.
        verdict: see above.
        evidence: sentences.
    """

    a: str
    b: str
    order: Order
    correlation: float
    low: float
    high: float
    steps: int
    shift: int
    seen: tuple[Seen, ...]
    coincide: int
    of: int
    chance: float
    p: float
    verdict: Verdict
    evidence: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the fields by name for JSON."""
        return dataclasses.asdict(self)


def compare(a: Log, b: Log, events_a: Sequence[Event], events_b: Sequence[Event]) -> Comparison:
    """Compare two runs.

    Args:
        a, b: their logs.
        events_a, events_b: what was found in them (``Diagnosis.events``).
    """
    fits = fitted(a), fitted(b)
    if fits[0] is None or fits[1] is None:
        return _nothing(a, b, 0, "one of the logs has too few losses to compare")
    both = np.intersect1d(fits[0].steps, fits[1].steps)
    common = len(both)
    if common < FEWEST:
        return _nothing(
            a,
            b,
            common,
            f"{plural(common, 'common step')} {'is' if common == 1 else 'are'} too few to compare (at least {FEWEST})",
        )
    since = parted(fits[0], fits[1])
    if since is None:
        return _nothing(a, b, common, "the losses are the same at equal steps: two copies of one run")
    noise = noise_of(fits[0], fits[1], since)
    if len(noise.steps) < FEWEST:
        return _nothing(a, b, common, f"the losses are the same up to step {since}, and too few steps follow")
    events_a, events_b = ([e for e in events if e.start >= since] for events in (events_a, events_b))
    width = max(CLOSE, 2 * interval(a), 2 * interval(b))
    own, other = _spikes(events_a), _spikes(events_b)
    seen = _seen(noise, events_a, events_b, fits, (a.name, b.name), width)
    coincide, chance, p = _coincide([e.start + noise.shift for e in own], [e.start for e in other], noise.steps, width)
    counts = _Counts(coincide, len(own), len(other), chance, p)
    odd = [s for s, e in _paired(seen, events_a) if e.kind == "data_outlier"]
    by_chance = (1 + float((noise.y > SEEN).sum())) / (1 + len(noise.y))
    verdict, reasons = _verdict(noise, counts, odd, by_chance)
    if since > both[0]:
        reasons = (
            *reasons,
            f"the losses are the same before step {since}: one run continued twice; compared from there",
        )
    intervals = interval(a), interval(b)
    if intervals[0] != intervals[1]:
        reasons = (
            *reasons,
            f"the logs have every {intervals[0]} and every {intervals[1]} steps; compared at common ones",
        )
    return Comparison(
        a=a.name,
        b=b.name,
        order=noise.order,
        correlation=noise.r,
        low=noise.low,
        high=noise.high,
        steps=len(noise.steps),
        shift=noise.shift,
        seen=seen,
        coincide=coincide,
        of=len(own),
        chance=chance,
        p=p,
        verdict=verdict,
        evidence=(_order_text(noise), *reasons),
    )


def explain_with(event: Event, comparison: Comparison) -> Event:
    """Return an event of the comparison's first run with what the second run says of its cause.

    An odd batch that the other run has too, on the same data, is a ``data outlier``, likely; one that it has not is
    none. For a spike it is one more sentence: a batch can be what triggers it without being all of its cause.
    """
    seen = next((s for s in comparison.seen if s.start == event.start), None)
    if seen is None:
        return event
    cause = event.cause
    evidence = (seen.text, *cause.evidence)
    if event.kind == "data_outlier":
        if seen.also:
            return dataclasses.replace(event, cause=Cause("data outlier", "data", "likely", evidence))
        return dataclasses.replace(event, cause=Cause(evidence=evidence))
    if seen.also and cause.name == "unknown":
        return dataclasses.replace(event, cause=Cause("data", "data", "possible", evidence))
    return dataclasses.replace(event, cause=dataclasses.replace(cause, evidence=(*cause.evidence, seen.text)))


# -- events --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Counts:
    coincide: int
    a: int
    b: int
    chance: float
    p: float


def _spikes(events: Sequence[Event]) -> list[Event]:
    """Spikes that the data could have made."""
    return [
        e
        for e in events
        if e.kind in SPIKE_KINDS
        and e.signal == "loss"
        and e.severity != "note"
        and e.cause.name not in ("schedule", "restart seam", "set-up")
    ]


def _seen(
    noise: Noise,
    events_a: Sequence[Event],
    events_b: Sequence[Event],
    fits: tuple[Trend | None, Trend | None],
    names: tuple[str, str],
    width: int,
) -> tuple[Seen, ...]:
    """Look up the first run's odd batches and spikes in the second, where they share their data."""
    _, b = fits
    assert b is not None
    starts = np.array([e.start for e in _spikes(events_b)])
    spikes = {id(e) for e in _spikes(events_a)}
    out = []
    for event in events_a:
        there = event.peak + noise.shift
        place = int(np.searchsorted(b.steps, there))
        if not noise.shares(there) or place >= len(b.steps):
            continue
        if event.kind == "data_outlier" and b.steps[place] == there:
            z = float(b.residual[place] / b.sigma[place])
            also = z > SEEN
            side = "above" if z >= 0 else "below"
            said = f"{names[1]} is {abs(z):.1f} deviations {side} its trend at step {there}, on the same data"
            out.append(Seen(event.start, also, said if also else f"{said}: this batch is not odd by itself"))
        elif id(event) in spikes:
            near = starts[np.abs(starts - event.start - noise.shift) <= width] if len(starts) else starts
            also = bool(len(near))
            said = f"{names[1]} saw the same data and "
            said += f"left its trend at step {near[0]} too" if also else "did not leave its trend there"
            out.append(Seen(event.start, also, said))
    return tuple(out)


def _paired(seen: Sequence[Seen], events: Sequence[Event]) -> list[tuple[Seen, Event]]:
    by_start = {event.start: event for event in events}
    return [(s, by_start[s.start]) for s in seen]


def _coincide(a: Sequence[int], b: Sequence[int], steps: Ints, width: int) -> tuple[int, float, float]:
    """Return (how many of ``a`` have one of ``b`` near, how many by chance, share of shifts with as many)."""
    own = np.array([s for s in a if steps[0] <= s <= steps[-1]], dtype=np.int64)
    other = np.array([s for s in b if steps[0] <= s <= steps[-1]], dtype=np.int64)
    if not len(own) or not len(other):
        return 0, 0.0, 1.0
    span = int(steps[-1] - steps[0]) + 1
    shifts = np.unique(np.linspace(width + 1, span - width - 1, MAX_SHIFTS).astype(np.int64))
    if span <= 4 * width:
        return 0, 0.0, 1.0

    def count(moved: Ints) -> int:
        ordered = np.sort(moved)
        place = np.searchsorted(ordered, own)
        right = ordered[np.minimum(place, len(ordered) - 1)]
        left = ordered[np.maximum(place - 1, 0)]
        return int((np.minimum(np.abs(right - own), np.abs(left - own)) <= width).sum())

    observed = count(other)
    counts = np.array([count((other - steps[0] + shift) % span + steps[0]) for shift in shifts])
    return observed, float(counts.mean()), float((1 + (counts >= observed).sum()) / (1 + len(counts)))


# -- verdict -------------------------------------------------------------------------------------------


def _verdict(noise: Noise, spikes: _Counts, odd: Sequence[Seen], by_chance: float) -> tuple[Verdict, tuple[str, ...]]:
    reasons = []
    if spikes.a or spikes.b:
        by_luck = f"(by chance {spikes.chance:.1f}, p = {spikes.p:.2g})" if spikes.a and spikes.b else ""
        verb = "coincides" if spikes.coincide == 1 else "coincide"
        own = f"{spikes.coincide} of {plural(spikes.a, 'spike')} {verb}"
        reasons.append(f"{own} with one of the other's {spikes.b} {by_luck}".rstrip())
    same = noise.order in ("same", "shifted", "partly")
    if odd:
        also = sum(s.also for s in odd)
        are = f"{also} of {len(odd)} odd batches {'is' if also == 1 else 'are'} odd"
        if len(odd) == 1:
            are = f"the one odd batch is {'odd' if also else 'not odd'}"
        reasons.append(f"{are} in the other run{' too' * bool(also)} (by chance {by_chance * len(odd):.1f})")
    if not same:
        if noise.order == "other" and spikes.coincide >= 2 and spikes.p <= CHANCE:
            return "not (only) data", (
                *reasons,
                "the data differ and the spikes coincide: what the runs share is something else",
            )
        if not reasons:
            reasons.append("no odd batch or spike to compare")
        return "cannot tell", tuple(reasons)
    if spikes.a or spikes.b:
        larger = max(spikes.a, spikes.b)
        if 2 * spikes.coincide < larger:
            return "not (only) data", tuple(reasons)
        return ("data" if _mostly(spikes.coincide, larger, spikes.p) else "cannot tell"), tuple(reasons)
    if odd:
        also = sum(s.also for s in odd)
        if 2 * also < len(odd):
            return "not (only) data", tuple(reasons)
        p = _binomial(also, len(odd), by_chance)
        return ("data" if _mostly(also, len(odd), p) else "cannot tell"), tuple(reasons)
    return "cannot tell", (*reasons, "no odd batch or spike to compare")


def _mostly(also: int, of: int, p: float) -> bool:
    """Return whether so many events of both runs, out of ``of``, with this probability by chance, are the data's."""
    return 2 * also > of and (p < UNLIKELY or (of >= SEVERAL and also >= MOST * of and p <= CHANCE))


def _binomial(least: int, of: int, share: float) -> float:
    """Return the probability of at least so many out of ``of``."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(least, of + 1))


def _order_text(noise: Noise) -> str:
    common = plural(len(noise.steps), "common step")
    size = f"correlation {noise.r:.3f}, 95 % interval {noise.low:.3f} to {noise.high:.3f}, {common}"
    when = "later" if noise.shift > 0 else "earlier"
    what = {
        "same": "same data order",
        "shifted": f"same data order, {plural(abs(noise.shift), 'step')} {when} in the second run",
        "partly": f"same data order for {noise.shared.mean():.0%} of the steps",
        "other": "different data order",
        "unclear": "whether the data order is the same cannot be told",
    }[noise.order]
    remark = f"; {noise.remark}" if noise.remark else ""
    return f"{what} (noise: {size}{remark})"


def _nothing(a: Log, b: Log, steps: int, reason: str) -> Comparison:
    nan = math.nan
    return Comparison(a.name, b.name, "unclear", nan, nan, nan, steps, 0, (), 0, 0, nan, nan, "cannot tell", (reason,))
