"""Name the likely cause of an event, from the log alone. Never a guess dressed as a verdict.

Each rule looks for one thing and says it with numbers. The first that holds names the cause; what the others saw is
told as evidence too. ``likely`` is a signature of its own, ``possible`` fits, and so would others: most causes of a
finished log are only possible, because nothing can be measured any more. What a guard in the run can tell beyond that
(the last good batch shown again) is in ``poise.guard.cause``.

By kind of event:

    data_outlier      data outlier: one step and nothing after it; possible where not every step is in the log
    collapse          epoch boundary where a new epoch begins there; else collapse: broken or repeated data make a loss
                      that is too good
    plateau           too-high LR, possible: a set-up that cannot learn looks alike
    logit_growth      attention logits
    nonfinite         set-up where no loss of the log is finite; start-up where only the first ones are not; periodic
                      where every k-th is not; else the rules below, then precision
    chaotic           too-high LR; likely where the loss calmed down only as the rate had fallen
    early_transient   schedule where the log shows a short warm-up; else unknown
    grad_spike        unknown: the loss did not follow, so nothing tells what it was

Rules for losses that left their trend, in this order:

    restart seam      starts within ``SEAM`` steps after a restart, or after a gap in the log (a start is known to
                      ``Known.blur`` steps only: for these two rules that much before counts as well)
    precision         the loss scale sank, or steps were skipped, before it
    schedule          the learning rate rose at once, a warm-up had just ended, batch size or sequence length changed
    attention logits  logits (or log Z, or norms of weights or activations) had grown before
    optimizer         gradient norm or update norm rose first
    too-high LR       another trouble went before; or one of several spikes, most at more than half the peak rate
    unknown           otherwise, with what was looked at

Source: case studies in docs/case-studies.md; the order follows ``poise.guard.cause``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from poise.core.types import Certainty
from poise.dashboard.text import plural
from poise.postmortem import nonfinite
from poise.postmortem.event import Cause, Event, Precursor
from poise.postmortem.known import BATCH_SIZE, HIGH_LR, LOSS_SCALE, SEQUENCE, SKIPPED, Known
from poise.postmortem.log import Log
from poise.postmortem.nonfinite import NEAR, Hint
from poise.postmortem.precursors import family_of
from poise.postmortem.rates import Rates
from poise.postmortem.readers.names import words
from poise.postmortem.steps import KNOWN_KINDS, LOSSES, SHIFT_BLUR, SPIKE_KINDS, between, nth, number

SEAM: Final = 50
SEVERAL: Final = 3


def name_cause(
    log: Log, event: Event, found: Sequence[Event], precursors: Sequence[Precursor], known: Known | None = None
) -> Cause:
    """Return the likely cause of an event.

    Args:
        log: the log that it is in.
        event: without its cause.
        found: all events of the log.
        precursors: what moved before this one (``precursors.precursors``).
        known: ``Known(log, found)``, where there are several events.
    """
    known = Known(log, found) if known is None else known
    hints = [hint for hint in _hints(known, event, precursors) if hint is not None]
    if not hints:
        return Cause(evidence=(_looked_at(log, event, precursors), *_company(known, event)))
    name, kind, certainty, evidence = hints[0]
    others = [f"also: {sentence}" for hint in hints[1:] for sentence in hint[3] if sentence not in evidence]
    if certainty == "likely" and any(other[2] == "likely" and other[0] != name for other in hints[1:]):
        certainty = "possible"  # two signatures: neither is alone
    return Cause(name, kind, certainty, (*evidence, *dict.fromkeys(others)))


def _hints(known: Known, event: Event, precursors: Sequence[Precursor]) -> Iterator[Hint | None]:
    match event.kind:
        case "data_outlier":
            yield _outlier(known, event)
        case "collapse":
            yield _epoch(known, event)
            yield _collapse(event)
        case "plateau":
            yield _plateau(event, known.rates)
        case "logit_growth":
            yield _logit_event(event)
        case "early_transient":
            yield _early(event, known.rates)
        case "chaotic":
            yield _chaotic(known, event)
        case "nonfinite":
            yield nonfinite.set_up(known, event)
            yield nonfinite.periodic(known, event)
    if event.kind not in KNOWN_KINDS:
        yield _epoch(known, event)
        return
    if event.kind in ("grad_spike", "early_transient", "plateau"):
        return
    yield _seam(known, event, precursors)
    yield _precision(known, event, precursors)
    if event.kind == "nonfinite":
        yield nonfinite.after_rise(known, event)
    if event.kind in ("data_outlier", "collapse"):  # no rise of the loss that the rules below could be for
        return
    yield _schedule(known, event, precursors)
    yield _growth(precursors)
    yield _runup(precursors)
    if event.kind in SPIKE_KINDS and event.kind not in ("chaotic", "nonfinite"):
        yield _after_trouble(known, event)
        yield _repeated(known, event)
    if event.kind == "nonfinite":
        yield nonfinite.bare_nan(known, event)


# -- by kind -------------------------------------------------------------------------------------------


def _outlier(known: Known, event: Event) -> Hint:
    size = f"the loss was {number(event.value)} instead of {number(event.baseline)} at step {event.peak}"
    every = known.interval
    if every == 1 and event.points <= 1:
        return "data outlier", "data", "likely", (f"{size}, for one step, and back on its trend at the next",)
    doubt = f"the log has every {nth(every)} step only, so that it may have lasted up to {2 * every - 1} steps"
    if every == 1:
        doubt = f"it lasted {plural(event.points, 'step')}, and one odd batch lasts one"
    return "data outlier", "data", "possible", (f"{size} and left nothing behind", doubt)


def _collapse(event: Event) -> Hint:
    fall = f"the loss fell to {number(event.value)} where its trend was {number(event.baseline)}"
    reason = "a loss that is too good comes from data: broken, repeated, or with the answer in it"
    return "collapse", "data", "possible", (f"{fall} (from step {event.start} on)", reason)


def _epoch(known: Known, event: Event) -> Hint | None:
    """A loss that falls where the data begin again: the model has learnt them by heart, as far as it can."""
    starts, numbers = known.epochs
    if not len(starts):
        return None
    near = int(np.argmin(np.abs(starts - event.start)))
    if abs(int(starts[near]) - event.start) > max(SHIFT_BLUR * known.unit, 2 * known.interval):
        return None
    text = f"epoch {int(numbers[near])} begins at step {int(starts[near])}, and the loss falls at step {event.start}"
    reason = "the model has seen these data before: it may know them by heart"
    return "epoch boundary", "data", "possible", (text, reason)


def _plateau(event: Event, rates: Rates | None) -> Hint:
    share = f"{1.0 + event.rise:.0%} of where it began"
    stays = f"the loss is at {number(event.value)} from step {event.start} on, {share}"
    rate = f"; the learning rate is up to {number(rates.peak)}" if rates is not None else ""
    reason = f"a learning rate far too high or far too low does that, and so do frozen weights or shuffled labels{rate}"
    return "too-high LR", "schedule", "possible", (stays, reason)


def _logit_event(event: Event) -> Hint:
    size = f"{event.signal} reached {number(event.value)} at step {event.peak}, before {number(event.baseline)}"
    return "attention logits", "architecture", "likely", (size,)


def _early(event: Event, rates: Rates | None) -> Hint | None:
    if rates is None or rates.at(event.start) < 0.1 * rates.peak:
        return None
    share = rates.at(event.end) / rates.peak
    text = f"at step {event.end} the learning rate was {share:.0%} of its peak already: the warm-up is short"
    return "schedule", "schedule", "possible", (text,)


def _chaotic(known: Known, event: Event) -> Hint:
    rates = known.rates
    begin = event.start if known.first is None else known.first
    evidence = [f"the loss was erratic from step {event.start} to {event.end}, up to {number(event.value)}"]
    early = event.start - begin <= max(0.1 * known.length, NEAR * known.unit)
    if early:
        evidence.append(f"it began {plural(event.start - begin, 'step')} into the log")
    certainty: Certainty = "possible"
    if rates is not None:
        _, inside = between((rates.steps, rates.values), event.start, event.end)
        highest = float(inside.max()) if len(inside) else rates.at(event.start)
        evidence.append(f"learning rate there: up to {number(highest)}")
        if event.recovery in ("returned", "partly") and 0 < rates.at(event.end) <= HIGH_LR * highest:
            evidence.append(f"it calmed down as the rate had fallen to {number(rates.at(event.end))}")
            certainty = "likely"
    return "too-high LR", "schedule", certainty, tuple(evidence)


# -- rules ---------------------------------------------------------------------------------------------


def _seam(known: Known, event: Event, precursors: Sequence[Precursor]) -> Hint | None:
    reach = max(SEAM * known.unit, 2 * known.interval)
    near = [p for p in precursors if p.signal in ("restart", "gap") and p.lead <= reach]
    if not near:
        return None
    at_once = max(2 * known.unit, known.blur(event))
    sure = any(p.signal == "restart" and abs(event.start - p.step) <= at_once for p in near)
    texts = tuple(f"{p.text}, {_lead(p, event)}" for p in near)
    return "restart seam", "software", "likely" if sure else "possible", texts


def _precision(known: Known, event: Event, precursors: Sequence[Precursor]) -> Hint | None:
    near = [p for p in precursors if _is(LOSS_SCALE, p.signal) or _is(SKIPPED, p.signal)]
    texts = tuple(f"{p.text}, {_lead(p, event)}" for p in near)
    if any(_is(LOSS_SCALE, p.signal) and p.lead > 0 for p in near):
        return "precision", "precision", "likely", texts
    if not near and event.kind != "nonfinite":
        return None
    inside = _sank_inside(known, event)
    if near or inside:
        return "precision", "precision", "possible", texts + inside
    return None


def _sank_inside(known: Known, event: Event) -> tuple[str, ...]:
    """What the loss scale and the count of skipped steps did during the event: as much its effect as its cause."""
    texts = []
    if known.scale is not None:
        steps, exponent = between(known.scale[1:], event.start - 2 * known.interval, event.end)
        if len(steps) > 1 and exponent[0] - exponent[-1] >= 1:
            low, high = number(2.0 ** float(exponent[-1])), number(2.0 ** float(exponent[0]))
            texts.append(f"the loss scale fell from {high} to {low} during the event")
    if known.skipped is not None:
        count = round(float(between(known.skipped[1:], event.start, event.end)[1].sum()))
        if count:
            texts.append(f"{plural(count, 'step')} {'was' if count == 1 else 'were'} skipped during the event")
    return tuple(texts)


def _schedule(known: Known, event: Event, precursors: Sequence[Precursor]) -> Hint | None:
    """What the schedule changed. Only a rate that was raised raises the loss: one that was lowered does not."""
    raised = [p for p in precursors if p.signal == "lr" and p.step in known.raised]
    moved = [p for p in precursors if _is(BATCH_SIZE, p.signal) or _is(SEQUENCE, p.signal)]
    texts = [f"{p.text}, {_lead(p, event)}" for p in (*raised, *moved)]
    texts += [
        f"{p.text}: smaller batches are noisier" for p in moved if _shrank(known, p) and _is(BATCH_SIZE, p.signal)
    ]
    rates = known.rates
    if rates is not None:
        for rise in rates.rises:
            before = rise.end - event.start
            if rise.start < event.start and known.blur(event) < before <= 0.1 * (rise.end - rise.start):
                share = rates.at(event.start) / rise.high
                ends = f"{plural(before, 'step')} before the end of the warm-up"
                texts.append(f"it began {ends}, at {share:.0%} of its rate")
    if not texts:
        return None
    jumped = {j.step for j in rates.jumps} if rates is not None and raised else set()
    likely = any(p.step in jumped for p in raised)
    return "schedule", "schedule", "likely" if likely else "possible", tuple(texts)


def _shrank(known: Known, precursor: Precursor) -> bool:
    for name, _, steps, values in known.sizes:
        if name == precursor.signal:
            place = int(np.searchsorted(steps, precursor.step))
            return place < len(steps) and bool(values[place, 1] < values[place, 0])
    return False


def _growth(precursors: Sequence[Precursor]) -> Hint | None:
    near = [(f.name, p) for p in precursors if (f := family_of(p.signal)) is not None]
    near = [(name, p) for name, p in near if name not in ("gradient norm", "update norm")]
    if not near:
        return None
    texts = tuple(f"{p.text}, {_lead(p)}" for _, p in near)
    if any(name == "largest attention logit" for name, _ in near):
        return "attention logits", "architecture", "likely", texts
    return "growing norms", "architecture", "possible", texts


def _runup(precursors: Sequence[Precursor]) -> Hint | None:
    near = [p for p in precursors if (f := family_of(p.signal)) and f.name in ("gradient norm", "update norm")]
    texts = tuple(f"{p.text}, {_lead(p)}" for p in near)
    return ("optimizer", "optimizer", "possible", texts) if any(p.lead > 0 for p in near) else None


def _after_trouble(known: Known, event: Event) -> Hint | None:
    """A loss that was erratic before, and leaves its trend now, has the same reason."""
    before = [e for e in known.chaotic if e.start < event.start <= e.end + NEAR]
    if not before:
        return None
    text = f"the loss was erratic from step {before[-1].start} to {before[-1].end} before that"
    return "too-high LR", "schedule", "possible", (text,)


def _repeated(known: Known, event: Event) -> Hint | None:
    rates = known.rates
    spikes, high, share = known.at_high_rate
    if rates is None or spikes < SEVERAL or high < 0.75 * spikes or rates.at(event.start) < HIGH_LR * rates.peak:
        return None
    text = (
        f"one of {spikes} spikes, {high} of them at more than half the peak rate of {number(rates.peak)}, "
        f"which holds for {share:.0%} of the log"
    )
    return "too-high LR", "schedule", "possible", (text,)


# -- words ---------------------------------------------------------------------------------------------


def _is(pattern: object, signal: str) -> bool:
    return bool(pattern.search(" ".join(words(signal))))  # type: ignore[attr-defined]


def _lead(precursor: Precursor, event: Event | None = None) -> str:
    if event is not None and precursor.step > event.start:
        return f"{plural(precursor.step - event.start, 'step')} after its start, which is not known to the step"
    return f"{plural(precursor.lead, 'step')} before" if precursor.lead else "at the same step"


def _looked_at(log: Log, event: Event, precursors: Sequence[Precursor]) -> str:
    """What an unknown cause rests on."""
    if event.kind == "grad_spike":
        return (
            f"{event.signal} was {number(event.value)} instead of {number(event.baseline)}, and the loss did not move"
        )
    if precursors:
        return "; ".join(f"{p.text}, {_lead(p, event)}" for p in precursors)
    others = [name for name in log.series if name not in LOSSES and (family_of(name) or _tells(name))]
    if not others:
        has = "the loss and the learning rate" if "lr" in log.series else "the loss"
        return f"the log has {has} only, so that nothing can be said of what led to it"
    shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
    return f"nothing stood out before it in {shown}"


def _tells(name: str) -> bool:
    return any(_is(pattern, name) for pattern in (LOSS_SCALE, SKIPPED, BATCH_SIZE, SEQUENCE))


def _company(known: Known, event: Event) -> Iterator[str]:
    """What else is known of a spike without a cause: how many there are, and when; how coarse the log is."""
    if event.kind != "fast_spike":
        return
    if len(known.fast) >= SEVERAL and known.first is not None:
        early = int(np.searchsorted(known.fast, known.first + 0.25 * known.length))
        yield f"it is one of {len(known.fast)} spikes, {early} of them in the first quarter of the log"
    if event.points == 1 and known.interval > 1:
        yield f"with every {nth(known.interval)} step in the log, one odd batch and a short spike look alike"
