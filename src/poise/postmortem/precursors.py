"""What moved in a log before an event. Windows are in steps, whatever the logging interval.

    run-up   grad norm, update norm: values above the level of the 600 steps before by six robust deviations of the
             logarithm and by a factor, in a row that ends at the event's start (or up to ten steps before)
    growth   update norm, attention logits, log Z, norms of parameters and activations, grad norm: the median of the
             last 50 steps against that of 500 to 2500 steps before, by a factor; norms that grow in every run only
             where they grow faster than they did
    scale    the loss scale of fp16: at most a quarter of its highest within 2000 steps, or skipped steps
    events   a jump of the learning rate, the end of a warm-up, a new batch size or sequence length, a restart, a gap
             in the log, a validation loss that was up already; up to ``Known.blur`` steps after the start, too,
             because starts are not known to the step

A log that lacks a series says nothing of it. A single high value among the last is told, with its lead; whether it
means something is for ``cause.py``: gradient norms have single outliers of 14 times with no effect at all.

Source: the run-up is BLOOM-176B's (0.24, 0.95, 2.4, 16 before the loss; bigscience chronicles), the update norm Marin
32B's (marin issue 1368), the sinking loss scale BigScience's 104B (chronicles), robust deviations Hampel 1974.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from poise.dashboard.text import plural
from poise.postmortem.event import Event, Precursor
from poise.postmortem.known import Known
from poise.postmortem.log import Log
from poise.postmortem.readers.names import words
from poise.postmortem.steps import at_or_after, between, number, rise_text
from poise.postmortem.trend import Floats, Ints

LOOK: Final = 50
"""Steps before an event in which a run-up can begin; at least three points."""

AT_ONCE: Final = 10
"""A run-up's last high value lies at most this many steps before the start; at least one point."""

LEVEL: Final = 600
"""Steps that give the level of a run-up; at least forty points."""

MAD_TO_SIGMA: Final = 1.4826
SIGMAS: Final = 6.0
SIGMA_FLOOR: Final = 0.05

GROWN: Final = 50
OLD: Final = (2500, 500)
SCALE: Final = 2000
SCALE_FALL: Final = 2.0
"""Halvings of the loss scale, counted from its highest, that are a sign."""

SKIPS: Final = 500
LR_STEPS: Final = 200
SEAM: Final = 100
MAX_SERIES: Final = 64
"""Series of one family that are looked at."""


@dataclass(frozen=True, slots=True)
class Family:
    """Series that mean the same.

    Attributes:
        name: what it is called in sentences.
        pattern: found in the words of the series' name, joined by blanks.
        burst: factor of a run-up; 0 where single values mean nothing.
        growth: factor of a growth; for logarithms (log Z) a difference of ``ln growth``.
        least: readings below it are no sign.
        always_grows: whether healthy runs have it growing too.
        logarithm: whether the values are logarithms already.
    """

    name: str
    pattern: str
    burst: float = 0.0
    growth: float = 2.0
    least: float = 0.0
    always_grows: bool = False
    logarithm: bool = False


FAMILIES: Final = (
    Family("gradient norm", r"^(train |optim |total |global )*(grad|gradient) norm\b", burst=2.0, growth=2.0),
    Family("update norm", r"\bupdates? (norm|rms|ratio)\b|\bstep norm\b|\bupdate\b.*\bnorm\b", burst=1.5, growth=1.5),
    Family(
        "largest attention logit",
        r"(?=.*\blogits?\b)(?=.*\bmax)(?=.*\b(attn|attention|qk)\b)|\bmax logits?\b",
        least=30.0,
    ),
    Family("output log Z", r"\blog ?z\b|\blogsumexp\b|\blse\b", growth=2.72, logarithm=True),
    Family("z-loss", r"\bz loss\b", growth=3.0, always_grows=True),
    Family(
        "parameter norm", r"\b(params?|parameters?|weights?)\b.*\b(norm|rms|max)\b", growth=1.3, always_grows=True
    ),
    Family(
        "activation norm",
        r"\b(activations?|act|hidden|residual|out)\b.*\b(norm|rms|max)\b",
        growth=1.5,
        always_grows=True,
    ),
)  # fmt: skip


def precursors(log: Log, event: Event, known: Known | None = None) -> tuple[Precursor, ...]:
    """Return what moved before an event, the earliest first; nothing for a gradient norm alone: it led to nothing.

    Args:
        log: the log that it is in.
        event: one of its events.
        known: ``Known(log)``, where there are several events.
    """
    if event.kind == "grad_spike":
        return ()
    known = Known(log) if known is None else known
    rules = (_moved, _scale, _skipped, _rate, _sizes, _seams, _validation)
    found = [precursor for rule in rules for precursor in rule(known, event)]
    return tuple(sorted(found, key=lambda p: (p.step, p.signal)))


def family_of(name: str) -> Family | None:
    """Return what a series is, by its name.

    >>> [f.name for f in map(family_of, ("grad_norm", "attn_logit_max@block.3")) if f]
    ['gradient norm', 'largest attention logit']
    >>> family_of("elapsed time") is None
    True
    """
    return _family(" ".join(words(name)))


@lru_cache(maxsize=4096)  # the same few names are asked for at every event; it changes nothing
def _family(spoken: str) -> Family | None:
    return next((family for family in FAMILIES if re.search(family.pattern, spoken)), None)


# -- norms, logits -------------------------------------------------------------------------------------


def _moved(known: Known, event: Event) -> Iterator[Precursor]:
    """The first series of each family that moved, and how many others did."""
    unit, gap, log = known.unit, known.interval, known.log
    by_family: dict[str, list[tuple[Family, str]]] = {}
    for name, spoken in known.spoken.items():
        family = _family(spoken)
        if family is not None and name != event.signal:
            by_family.setdefault(family.name, []).append((family, name))
    for members in by_family.values():
        hits = []
        for family, name in members[:MAX_SERIES]:
            hit = None
            if family.burst:
                hit = _burst(log.series[name], event.start, unit, gap, family)
            if hit is None:
                hit = _growth(log.series[name], event.start, unit, family)
            if hit is not None:
                hits.append((hit[0], name, hit[1]))
        if hits:
            step, name, text = min(hits)
            kin = members[0][0].name
            called = kin if "@" not in name else f"{kin} of {name.partition('@')[2]}"
            more = f"; so did {len(hits) - 1} more series of this kind" if len(hits) > 1 else ""
            yield Precursor(name, step, event.start - step, f"the {called} {text}{more}")


def _burst(series: tuple[Ints, Floats], start: int, unit: float, gap: int, family: Family) -> tuple[int, str] | None:
    """Return (first step, sentence's end) of a row of high values that ends at ``start``."""
    look = max(LOOK * unit, 3 * gap)
    steps, values = between(series, start - look - max(LEVEL * unit, 40 * gap), start)
    old = steps < start - look
    if old.sum() < 8:
        old = np.arange(len(steps)) < len(steps) // 2
    level = _level(values[old])
    if level is None:
        return None
    middle, sigma = level
    with np.errstate(divide="ignore", invalid="ignore"):
        height = np.log(np.abs(values)) - middle
    high = ~np.isfinite(values) | (height > max(SIGMAS * sigma, np.log(family.burst)))
    places = np.flatnonzero(high & ~old)
    if not len(places) or start - steps[places[-1]] > max(AT_ONCE * unit, gap):
        return None
    parted = np.flatnonzero(np.diff(places) > 3)
    places = places[parted[-1] + 1 :] if len(parted) else places
    first, usual = int(steps[places[0]]), float(np.exp(middle))
    row = values[places]
    if len(row) == 1:
        return first, f"was {number(float(row[0]))} at step {first}, usually {number(usual)}"
    shown = ", ".join(number(float(v)) for v in row[:: max(1, len(row) // 5)][:6])
    return first, f"rose from {number(usual)} to {number(float(np.max(row)))} from step {first} on ({shown})"


def _growth(series: tuple[Ints, Floats], start: int, unit: float, family: Family) -> tuple[int, str] | None:
    """Return (first step, sentence's end) of a growth against 500 to 2500 steps before."""
    _, old = _positive(*between(series, start - OLD[0] * unit, start - OLD[1] * unit), family)
    steps, values = _positive(*between(series, start - OLD[1] * unit, start), family)
    recent = values[steps >= start - GROWN * unit]
    if len(recent) < 3:
        recent = values[-3:]
    if len(old) < 5 or len(recent) < 3:
        return None
    before, now = float(np.median(old)), float(np.median(recent))
    if now - before < np.log(family.growth) or now <= np.quantile(old, 0.95):
        return None
    if family.least and np.exp(now) < family.least:
        return None
    if family.always_grows:
        oldest = _positive(*between(series, start - 2 * OLD[0] * unit, start - OLD[0] * unit), family)[1]
        if len(oldest) < 5 or now - before < 2 * max(before - float(np.median(oldest)), 0.0):
            return None
    halfway = np.flatnonzero(values > (before + now) / 2)
    first = int(steps[halfway[0]])
    low, high = (before, now) if family.logarithm else (float(np.exp(before)), float(np.exp(now)))
    return first, f"grew from {number(low)} to {number(high)} in the {OLD[1]} to {OLD[0]} steps before"


def _positive(steps: Ints, values: Floats, family: Family) -> tuple[Ints, Floats]:
    """Return the usable points, on a logarithmic scale."""
    good = np.isfinite(values) if family.logarithm else np.isfinite(values) & (values > 0)
    return steps[good], values[good] if family.logarithm else np.log(values[good])


def _level(values: Floats) -> tuple[float, float] | None:
    """Return (median, robust deviation) of the logarithm."""
    good = values[np.isfinite(values) & (values > 0)]
    if len(good) < 4:
        return None
    x = np.log(good)
    middle = float(np.median(x))
    return middle, max(MAD_TO_SIGMA * float(np.median(np.abs(x - middle))), SIGMA_FLOOR)


# -- fp16 ----------------------------------------------------------------------------------------------


def _scale(known: Known, event: Event) -> Iterator[Precursor]:
    if known.scale is None:
        return
    name, steps, exponent = known.scale
    steps, exponent = between((steps, exponent), event.start - SCALE * known.unit, event.start)
    if len(steps) < 2:
        return
    top = int(len(exponent) - 1 - np.argmax(exponent[::-1]))
    fall = float(exponent[top] - exponent[-1])
    if fall < SCALE_FALL:
        return
    first = int(steps[min(top + 1, len(steps) - 1)])
    low, high = number(2.0 ** float(exponent[-1])), number(2.0 ** float(exponent[top]))
    text = f"the loss scale sank from {high} at step {int(steps[top])} to {low}: {plural(round(fall), 'halving')}"
    yield Precursor(name, first, event.start - first, text)


def _skipped(known: Known, event: Event) -> Iterator[Precursor]:
    if known.skipped is None:
        return
    unit = known.unit
    name, steps, counts = known.skipped
    steps, counts = between((steps, counts), event.start - SKIPS * unit, event.start)
    near = counts[steps >= event.start - max(5 * unit, 2 * known.interval)].sum()
    hits = steps[counts > 0]
    if counts.sum() >= 3 or near >= 1:
        count = round(float(counts.sum()))
        was = "was" if count == 1 else "were"
        text = f"{plural(count, 'step')} {was} skipped in the {SKIPS} before ('{name}')"
        yield Precursor(name, int(hits[0]), event.start - int(hits[0]), text)


# -- events --------------------------------------------------------------------------------------------


def _rate(known: Known, event: Event) -> Iterator[Precursor]:
    rates = known.rates
    if rates is None:
        return
    reach, blur = max(LR_STEPS * known.unit, 5 * known.interval), known.blur(event)
    first, end = np.searchsorted(rates.jump_steps, [event.start - reach, event.start + blur + 1])
    for jump in rates.jumps[first:end]:
        change = rise_text(jump.after / jump.before - 1) if jump.before > 0 else "from 0"
        text = f"the learning rate went from {number(jump.before)} to {number(jump.after)} ({change})"
        yield _at(event, "lr", jump.step, f"{text} at step {jump.step}")
    for rise in rates.rises:
        if -blur <= event.start - rise.end <= max(reach, 0.25 * (rise.end - rise.start)):
            what = "the warm-up" if rise.first else "warming up again"
            text = f"{what} of {plural(rise.end - rise.start, 'step')} ended at step {rise.end}"
            yield _at(event, "lr", rise.end, f"{text}, learning rate {number(rise.high)}")


def _sizes(known: Known, event: Event) -> Iterator[Precursor]:
    reach = max(LR_STEPS * known.unit, 5 * known.interval)
    for name, what, steps, values in known.sizes:
        first, end = np.searchsorted(steps, [event.start - reach, event.start + known.blur(event) + 1])
        for i in range(first, end)[-1:]:
            text = f"the {what} went from {number(float(values[i, 0]))} to {number(float(values[i, 1]))}"
            yield _at(event, name, int(steps[i]), f"{text} at step {int(steps[i])}")


def _seams(known: Known, event: Event) -> Iterator[Precursor]:
    reach, blur = max(SEAM * known.unit, 2 * known.interval), known.blur(event)
    for step in known.log.restarts:
        if -blur <= event.start - step <= reach:
            yield _at(event, "restart", step, f"the run was started again at step {step}")
    series = known.log.series.get(event.signal, (np.empty(0, np.int64), np.empty(0)))
    first = max(at_or_after(series[0], event.start - reach) - 2, 0)
    steps = series[0][first : at_or_after(series[0], event.start + blur + 1)]
    if len(steps) > 1:
        gaps = np.diff(steps)
        for i in np.flatnonzero((gaps > 5 * known.interval) & (event.start - steps[1:] <= reach))[-1:]:
            text = f"the log has no steps between {int(steps[i])} and {int(steps[i + 1])}"
            yield _at(event, "gap", int(steps[i + 1]), text)


def _at(event: Event, signal: str, step: int, text: str) -> Precursor:
    """Return what may also lie a little after the start that was found, because that is not known to the step."""
    return Precursor(signal, step, max(event.start - step, 0), text)


def _validation(known: Known, event: Event) -> Iterator[Precursor]:
    if event.signal == "val_loss":
        return
    steps, values = between(known.held_out, -np.inf, event.start)
    if len(values) < 4 or event.start - steps[-1] > 1000 * known.unit:
        return
    ups = np.diff(values[-12:-1])
    usual = float(np.median(ups[ups > 0])) if (ups > 0).any() else 0.0
    best = float(values[-4:-1].min())
    rise = float(values[-1]) - best
    if rise > max(3 * usual, 0.01 * best):
        text = f"the validation loss was up already at step {int(steps[-1])}: {values[-1]:.4g} after {best:.4g}"
        yield Precursor("val_loss", int(steps[-1]), event.start - int(steps[-1]), text)
