"""What is asked of a log for each of its events, computed once: distances, learning rate, loss scale, spikes.

A long log may have thousands of events, and a search through all its points for each of them takes minutes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Final

import numpy as np

from poise.postmortem import steps
from poise.postmortem.event import Event
from poise.postmortem.log import Log
from poise.postmortem.rates import Rates, read_rates
from poise.postmortem.readers.names import words
from poise.postmortem.trend import Floats, Ints

LOSS_SCALE: Final = re.compile(r"\b(loss|grad) scale\b|\blossscale\b|\bscaler scale\b")
SKIPPED: Final = re.compile(r"\bskipped\b|\bsteps? skip|\bnan iterations\b|\boverflows?\b")
BATCH_SIZE: Final = re.compile(r"^((global|total) )?batch size\b")
SEQUENCE: Final = re.compile(r"^(curriculum )?(seq(uence)? ?len(gth)?|context length)\b")

HIGH_LR: Final = 0.5
"""Share of the peak learning rate that is called high."""

REGULAR: Final = 0.8
"""Share of equal distances from which on non-finite values are called periodic."""

FEWEST_PERIODS: Final = 4
EPOCH: Final = 100
"""Steps below which epochs are too short for the coincidence with one to mean anything."""


class Known:
    """What is known of a log as a whole; each thing is computed when it is asked for first.

    Args:
        log: the log.
        found: its events.
    """

    def __init__(self, log: Log, found: Sequence[Event] = ()) -> None:
        self.log = log
        self.found = tuple(sorted(found, key=lambda event: (event.start, event.end)))

    def explained(self, found: Sequence[Event]) -> Known:
        """Return the same with the events' causes known."""
        other = Known(self.log, found)
        for name in ("curve", "interval", "unit", "length", "rates", "raised"):
            other.__dict__[name] = getattr(self, name)  # has been computed already
        return other

    # -- distances

    @cached_property
    def curve(self) -> tuple[Ints, Floats]:
        """The series that the log is about."""
        return steps.curve(self.log)

    @cached_property
    def interval(self) -> int:
        """The usual distance of two logged points."""
        return steps.interval(self.log)

    @cached_property
    def unit(self) -> float:
        """One optimizer step in the log's own count."""
        return steps.step_size(self.log)

    @cached_property
    def length(self) -> int:
        """How many steps the log covers."""
        return steps.length(self.log)

    @property
    def first(self) -> int | None:
        """The first logged step."""
        return int(self.curve[0][0]) if len(self.curve[0]) else None

    @property
    def last(self) -> int | None:
        """The last logged step."""
        return int(self.curve[0][-1]) if len(self.curve[0]) else None

    def blur(self, event: Event) -> int:
        """Return to how many steps an event's start is known: ten for a level shift, else two logged points."""
        return round(max(steps.SHIFT_BLUR * self.unit if event.kind == "level_shift" else 0, 2 * self.interval))

    # -- series

    @cached_property
    def spoken(self) -> dict[str, str]:
        """The words of each series' name."""
        return {name: " ".join(words(name)) for name in self.log.series}

    @cached_property
    def rates(self) -> Rates | None:
        """What the learning rate did."""
        return read_rates(self.log)

    @cached_property
    def raised(self) -> frozenset[int]:
        """The steps at which the learning rate was raised."""
        return frozenset() if self.rates is None else frozenset(self.rates.raised())

    @cached_property
    def scale(self) -> tuple[str, Ints, Floats] | None:
        """See ``loss_scale``."""
        return loss_scale(self.log)

    @cached_property
    def counts_tokens(self) -> bool:
        """See ``counts_tokens``."""
        return counts_tokens(self.log)

    @cached_property
    def skipped(self) -> tuple[str, Ints, Floats] | None:
        """See ``skipped_steps``."""
        return skipped_steps(self.log)

    @cached_property
    def sizes(self) -> tuple[tuple[str, str, Ints, Floats], ...]:
        """Changes of the batch size and the sequence length: (series, what it is, steps, values before and after)."""
        out = []
        for pattern, what in ((BATCH_SIZE, "batch size"), (SEQUENCE, "sequence length")):
            name = next((name for name, said in self.spoken.items() if pattern.search(said)), None)
            if name is None:
                continue
            at, values = self.log.series[name]
            changed = np.flatnonzero(values[1:] != values[:-1]) + 1
            changed = changed[np.isfinite(values[changed]) & np.isfinite(values[changed - 1])]
            out.append((name, what, at[changed], np.stack([values[changed - 1], values[changed]], axis=1)))
        return tuple(out)

    @cached_property
    def epochs(self) -> tuple[Ints, Ints]:
        """(steps, numbers) of the first points of epochs; empty where they are not logged, or too short to tell."""
        none = np.empty(0, np.int64), np.empty(0, np.int64)
        name = next((name for name in self.log.series if name.rpartition("/")[2].lower() == "epoch"), None)
        if name is None:
            return none
        at, values = self.log.series[name]
        good = np.isfinite(values) & (np.abs(values) < 2.0**53)
        at, whole = at[good], np.floor(values[good] + 1e-6).astype(np.int64)
        changed = np.flatnonzero(np.diff(whole) > 0) + 1
        least = EPOCH * self.unit
        if not len(changed) or float(np.median(np.diff(at[changed], prepend=at[0]))) < max(least, 10 * self.interval):
            return none
        return at[changed], whole[changed]

    @cached_property
    def held_out(self) -> tuple[Ints, Floats]:
        """The finite validation losses."""
        at, values = self.log.series.get("val_loss", (np.empty(0, np.int64), np.empty(0)))
        good = np.isfinite(values)
        return at[good], values[good]

    # -- events

    @cached_property
    def bad(self) -> dict[str, Ints]:
        """The steps without a finite value, of each signal that has an event of them."""
        signals = {event.signal for event in self.found if event.kind == "nonfinite"}
        return {s: at[~np.isfinite(values)] for s in signals for at, values in [self.log.series.get(s, self.curve)]}

    @cached_property
    def periods(self) -> dict[str, int]:
        """Signal -> the distance at which its non-finite values come, where they come regularly."""
        return {signal: p for signal, at in self.bad.items() if (p := self.period(at))}

    def period(self, at: Ints) -> int:
        """Return the distance at which steps come regularly, some finite ones between them; 0 where they do not."""
        if len(at) < FEWEST_PERIODS:
            return 0
        gaps = np.diff(at)
        usual = int(np.median(gaps))
        return usual if usual > self.interval and (gaps == usual).mean() >= REGULAR else 0

    @cached_property
    def troubles(self) -> tuple[Event, ...]:
        """Events in which the loss left its trend upwards, or was lost, notes left out."""
        return tuple(e for e in self.found if e.kind in steps.SPIKE_KINDS and e.severity != "note")

    @cached_property
    def starts(self) -> Ints:
        """Their starts, in order."""
        return np.array([e.start for e in self.troubles], dtype=np.int64)

    @cached_property
    def nonfinite(self) -> tuple[Event, ...]:
        """Stretches without a finite loss, notes left out."""
        return tuple(e for e in self.troubles if e.kind == "nonfinite" and steps.of_loss(e))

    @cached_property
    def chaotic(self) -> tuple[Event, ...]:
        """Stretches of an erratic loss."""
        return tuple(e for e in self.found if e.kind == "chaotic")

    @cached_property
    def finite(self) -> tuple[Event, ...]:
        """Events in which the loss left its trend and was a number."""
        return tuple(e for e in self.found if e.kind in steps.SPIKE_KINDS and e.kind != "nonfinite")

    @cached_property
    def fast(self) -> Ints:
        """Starts of the fast spikes."""
        return np.array([e.start for e in self.found if e.kind == "fast_spike"], dtype=np.int64)

    @cached_property
    def at_high_rate(self) -> tuple[int, int, float]:
        """(spikes, those of them at a high learning rate, share of the log with such a rate)."""
        spikes = [e for e in self.finite if e.severity != "note"]
        rates = self.rates
        if rates is None:
            return len(spikes), 0, 0.0
        bar = HIGH_LR * rates.peak
        covered = np.diff(rates.steps, append=rates.steps[-1] + 1)[rates.values >= bar].sum()
        return len(spikes), sum(rates.at(e.start) >= bar for e in spikes), float(covered) / max(self.length, 1)


def counts_tokens(log: Log) -> bool:
    """Return whether the log has a running count of tokens: that is right even where the batch grows."""
    if "tokens" not in log.series:
        return False
    tokens = log.series["tokens"][1]
    return len(tokens) > 1 and bool(np.isfinite(tokens).all() and (np.diff(tokens) > 0).all())


def loss_scale(log: Log) -> tuple[str, Ints, Floats] | None:
    """Return (name, steps, log2 of the loss scale) without its first search for a value; ``None`` where it has none.

    Some programs print the exponent itself: whole numbers up to 64 that change by one.
    """
    name = next((name for name in log.series if LOSS_SCALE.search(" ".join(words(name)))), None)
    if name is None:
        return None
    at, values = log.series[name]
    good = np.isfinite(values) & (values > 0)
    at, values = at[good], values[good]
    if len(at) < 2:
        return None
    changes = np.unique(np.abs(np.diff(values)))
    is_exponent = values.max() <= 64 and (values == np.round(values)).all() and changes.tolist() == [0.0, 1.0]
    exponent = values if is_exponent else np.log2(values)
    rises = np.flatnonzero(np.diff(exponent) >= 0)
    begin = int(rises[0]) if len(rises) and at[rises[0]] - at[0] <= 50 * steps.step_size(log) else 0
    return name, at[begin:], exponent[begin:]


def skipped_steps(log: Log) -> tuple[str, Ints, Floats] | None:
    """Return (name, steps, skipped since the point before); ``None`` where the log does not count them."""
    for name, (at, values) in log.series.items():
        if not SKIPPED.search(" ".join(words(name))):
            continue
        counts = np.where(np.isfinite(values), values, 0.0)
        if len(counts) > 1 and counts[-1] > counts[0] and (np.diff(counts) >= 0).all():  # a running total
            counts = np.diff(counts, prepend=counts[0])
        if (counts > 0).any():
            return name, at, counts
    return None
