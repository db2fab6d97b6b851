"""Name the likely cause of an event, from the log alone. Never a guess dressed as a verdict.

Each rule looks for one thing and says it with numbers. The first that holds names the cause; what the others saw is
told as evidence too. ``likely`` is a signature of its own, ``possible`` fits, and so would others: most causes of a
finished log are only possible, because nothing can be measured any more. What a guard in the run can tell beyond that
(the last good batch shown again) is in ``poise.guard.cause``.

By kind of event:

    data_outlier      data outlier: one step and nothing after it; possible where not every step is in the log
    collapse          collapse: broken or repeated data make a loss that is too good
    plateau           too-high LR, possible: a set-up that cannot learn looks alike
    logit_growth      attention logits
    nonfinite         set-up where the first logged loss is not finite; else the rules below, then precision
    chaotic           too-high LR; likely where the loss calmed down only as the rate had fallen
    early_transient   schedule where the log shows a short warm-up; else unknown
    grad_spike        unknown: the loss did not follow, so nothing tells what it was

Rules for losses that left their trend, in this order:

    restart seam      starts within ``SEAM`` steps after a restart, or after a gap in the log
    precision         the loss scale sank, or steps were skipped, before it
    schedule          the learning rate rose at once, a warm-up had just ended, the batch size changed
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

from poise.core.types import Cause as CauseKind
from poise.core.types import Certainty
from poise.postmortem.event import Cause, Event, Precursor
from poise.postmortem.log import Log
from poise.postmortem.precursors import BATCH_SIZE, LOSS_SCALE, SKIPPED, family_of, loss_scale, skipped_steps
from poise.postmortem.rates import Rates, read_rates
from poise.postmortem.readers.names import words
from poise.postmortem.steps import SPIKE_KINDS, between, curve, interval, length, number, step_size

SEAM: Final = 50
HIGH_LR: Final = 0.5
"""Share of the peak learning rate that is called high."""

SEVERAL: Final = 3
NEAR: Final = 50
"""Steps within which one trouble leads to the next."""

Hint = tuple[str, CauseKind, Certainty, tuple[str, ...]]


def name_cause(
    log: Log, event: Event, found: Sequence[Event], precursors: Sequence[Precursor], rates: Rates | None = None
) -> Cause:
    """Return the likely cause of an event.

    Args:
        log: the log that it is in.
        event: without its cause.
        found: all events of the log.
        precursors: what moved before this one (``precursors.precursors``).
        rates: ``read_rates(log)``, where somebody has read them already.
    """
    rates = read_rates(log) if rates is None else rates
    hints = [hint for hint in _hints(log, event, found, precursors, rates) if hint is not None]
    if not hints:
        return Cause(evidence=(_looked_at(log, event, precursors), *_company(log, event, found)))
    name, kind, certainty, evidence = hints[0]
    others = [f"also: {sentence}" for hint in hints[1:] for sentence in hint[3] if sentence not in evidence]
    if certainty == "likely" and any(other[2] == "likely" and other[0] != name for other in hints[1:]):
        certainty = "possible"  # two signatures: neither is alone
    return Cause(name, kind, certainty, (*evidence, *dict.fromkeys(others)))


def _hints(
    log: Log, event: Event, found: Sequence[Event], precursors: Sequence[Precursor], rates: Rates | None
) -> Iterator[Hint | None]:
    match event.kind:
        case "data_outlier":
            yield _outlier(log, event)
        case "collapse":
            yield _collapse(event)
        case "plateau":
            yield _plateau(event, rates)
        case "logit_growth":
            yield _logit_event(event)
        case "early_transient":
            yield _early(event, rates)
        case "chaotic":
            yield _chaotic(log, event, rates)
        case "nonfinite":
            yield _set_up(log, event)
    if event.kind in ("grad_spike", "early_transient", "plateau"):
        return
    yield _seam(log, event, precursors)
    yield _precision(log, event, precursors)
    if event.kind == "nonfinite":
        yield _after_rise(log, event, found)
    if event.kind == "data_outlier":
        return
    yield _schedule(log, event, precursors, rates)
    yield _growth(precursors)
    yield _runup(precursors)
    if event.kind in SPIKE_KINDS and event.kind not in ("chaotic", "nonfinite"):
        yield _after_trouble(event, found)
        yield _repeated(log, event, found, rates)
    if event.kind == "nonfinite":
        yield _bare_nan(log, event)


# -- by kind -------------------------------------------------------------------------------------------


def _outlier(log: Log, event: Event) -> Hint:
    size = f"the loss was {number(event.value)} instead of {number(event.baseline)} at step {event.peak}"
    every = interval(log)
    if every == 1 and event.points <= 1:
        return "data outlier", "data", "likely", (f"{size}, for one step, and back on its trend at the next",)
    doubt = f"the log has every {every}th step only, so that it may have lasted up to {2 * every - 1} steps"
    if every == 1:
        doubt = f"it lasted {event.points} steps, and one odd batch lasts one"
    return "data outlier", "data", "possible", (f"{size} and left nothing behind", doubt)


def _collapse(event: Event) -> Hint:
    fall = f"the loss fell to {number(event.value)} where its trend was {number(event.baseline)}"
    reason = "a loss that is too good comes from data: broken, repeated, or with the answer in it"
    return "collapse", "data", "possible", (f"{fall} (from step {event.start} on)", reason)


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


def _chaotic(log: Log, event: Event, rates: Rates | None) -> Hint:
    steps, _ = curve(log)
    begin = int(steps[0]) if len(steps) else event.start
    evidence = [f"the loss was erratic from step {event.start} to {event.end}, up to {number(event.value)}"]
    early = event.start - begin <= max(0.1 * length(log), NEAR * step_size(log))
    if early:
        evidence.append(f"it began {event.start - begin} steps into the log")
    certainty: Certainty = "possible"
    if rates is not None:
        _, inside = between((rates.steps, rates.values), event.start, event.end)
        highest = float(inside.max()) if len(inside) else rates.at(event.start)
        evidence.append(f"learning rate there: up to {number(highest)}")
        if event.recovery in ("returned", "partly") and 0 < rates.at(event.end) <= HIGH_LR * highest:
            evidence.append(f"it calmed down as the rate had fallen to {number(rates.at(event.end))}")
            certainty = "likely"
    return "too-high LR", "schedule", certainty, tuple(evidence)


def _set_up(log: Log, event: Event) -> Hint | None:
    steps, _ = curve(log)
    if not len(steps) or event.start > steps[0] or event.signal != "loss":
        return None
    evidence = [f"the first loss of the log (step {event.start}) is {number(event.value)} already"]
    if "grad_norm" in log.series:
        _, norms = between(log.series["grad_norm"], event.start, event.end)
        bad = int((~np.isfinite(norms)).sum())
        evidence.append(f"{bad} of {len(norms)} gradient norms there are not finite either")
    if event.start > 10 * step_size(log) and event.start > interval(log):
        evidence.append(f"the log begins at step {event.start}, so that what went before is not known")
        return "set-up", "unknown", "possible", tuple(evidence)
    evidence.append("training has done nothing yet: weights, data, number format or the program are at fault")
    return "set-up", "software", "likely", tuple(evidence)


# -- rules ---------------------------------------------------------------------------------------------


def _seam(log: Log, event: Event, precursors: Sequence[Precursor]) -> Hint | None:
    reach = max(SEAM * step_size(log), 2 * interval(log))
    near = [p for p in precursors if p.signal in ("restart", "gap") and p.lead <= reach]
    if not near:
        return None
    restarts = [p for p in near if p.signal == "restart"]
    at_once = restarts and restarts[-1].lead <= 2 * max(step_size(log), interval(log))
    texts = tuple(f"{p.text}, {_lead(p)}" for p in near)
    return "restart seam", "software", "likely" if at_once else "possible", texts


def _precision(log: Log, event: Event, precursors: Sequence[Precursor]) -> Hint | None:
    near = [p for p in precursors if _is(LOSS_SCALE, p.signal) or _is(SKIPPED, p.signal)]
    texts = tuple(f"{p.text}, {_lead(p)}" for p in near)
    if any(_is(LOSS_SCALE, p.signal) and p.lead > 0 for p in near):
        return "precision", "precision", "likely", texts
    inside = _sank_inside(log, event)
    if near or (inside and event.kind == "nonfinite"):
        return "precision", "precision", "possible", texts + inside
    return None


def _sank_inside(log: Log, event: Event) -> tuple[str, ...]:
    """What the loss scale and the count of skipped steps did during the event: as much its effect as its cause."""
    texts = []
    scale = loss_scale(log)
    if scale is not None:
        steps, exponent = between(scale[1:], event.start - 2 * interval(log), event.end)
        if len(steps) > 1 and exponent[0] - exponent[-1] >= 1:
            low, high = number(2.0 ** float(exponent[-1])), number(2.0 ** float(exponent[0]))
            texts.append(f"the loss scale fell from {high} to {low} during the event")
    skipped = skipped_steps(log)
    if skipped is not None:
        count = between(skipped[1:], event.start, event.end)[1].sum()
        if count:
            texts.append(f"{count:.0f} steps were skipped during the event")
    return tuple(texts)


def _schedule(log: Log, event: Event, precursors: Sequence[Precursor], rates: Rates | None) -> Hint | None:
    moved = [p for p in precursors if p.signal == "lr" or _is(BATCH_SIZE, p.signal)]
    texts = [f"{p.text}, {_lead(p)}" for p in moved]
    raised = {j.step for j in rates.jumps if j.after > j.before} if rates is not None else set()
    if rates is not None:
        for rise in rates.rises:
            before = rise.end - event.start
            if rise.start < event.start and 0 < before <= 0.1 * (rise.end - rise.start):
                share = rates.at(event.start) / rise.high
                texts.append(f"it began {before} steps before the end of the warm-up, at {share:.0%} of its rate")
    if not texts:
        return None
    likely = any(p.signal == "lr" and p.step in raised for p in moved)
    return "schedule", "schedule", "likely" if likely else "possible", tuple(texts)


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


def _after_trouble(event: Event, found: Sequence[Event]) -> Hint | None:
    """A loss that was erratic before, and leaves its trend now, has the same reason."""
    before = [e for e in found if e.kind == "chaotic" and e.start < event.start <= e.end + NEAR]
    if not before:
        return None
    text = f"the loss was erratic from step {before[-1].start} to {before[-1].end} before that"
    return "too-high LR", "schedule", "possible", (text,)


def _repeated(log: Log, event: Event, found: Sequence[Event], rates: Rates | None) -> Hint | None:
    spikes = [e for e in found if e.kind in SPIKE_KINDS and e.kind != "nonfinite" and e.severity != "note"]
    if rates is None or len(spikes) < SEVERAL or rates.at(event.start) < HIGH_LR * rates.peak:
        return None
    high = [e for e in spikes if rates.at(e.start) >= HIGH_LR * rates.peak]
    covered = np.diff(rates.steps, append=rates.steps[-1] + 1)[rates.values >= HIGH_LR * rates.peak].sum()
    share = covered / max(length(log), 1)
    if len(high) < 0.75 * len(spikes):
        return None
    text = (
        f"one of {len(spikes)} spikes, {len(high)} of them at more than half the peak rate of {number(rates.peak)}, "
        f"which holds for {share:.0%} of the log"
    )
    return "too-high LR", "schedule", "possible", (text,)


def _after_rise(log: Log, event: Event, found: Sequence[Event]) -> Hint | None:
    """A loss that rose until it was no number."""
    reach = max(NEAR * step_size(log), 3 * interval(log))
    before = [e for e in found if e.kind in SPIKE_KINDS - {"nonfinite"} and e.start < event.start <= e.end + reach]
    if before:
        last = before[-1]
        text = f"the loss had left its trend at step {last.start} already (up to {number(last.value)})"
        return "too-high LR", "schedule", "possible", (text,)
    steps, values = curve(log)
    steps, values = between((steps, values), event.start - 20 * reach, event.start - 1)
    values = values[np.isfinite(values)]
    if len(values) < 10:
        return None
    usual, last3 = float(np.median(values[:-3])), values[-3:]
    spread = 1.4826 * float(np.median(np.abs(values[:-3] - usual)))
    if float(np.min(last3)) < usual + max(4 * spread, 0.05 * abs(usual)):
        return None
    text = f"the loss rose from {number(usual)} to {number(float(last3[-1]))} before it was no number"
    return "too-high LR", "schedule", "possible", (text,)


def _bare_nan(log: Log, event: Event) -> Hint | None:
    steps, values = log.series.get(event.signal, curve(log))
    before = values[(steps < event.start) & np.isfinite(values)]
    if not len(before):
        return None
    text = (
        f"{event.signal} was {number(float(before[-1]))} at the last step before and is {number(event.value)} at once"
    )
    doubt = "an overflow does that; so do a broken batch and a faulty device"
    return "precision", "precision", "possible", (text, doubt)


# -- words ---------------------------------------------------------------------------------------------


def _is(pattern: object, signal: str) -> bool:
    return bool(pattern.search(" ".join(words(signal))))  # type: ignore[attr-defined]


def _lead(precursor: Precursor) -> str:
    return f"{precursor.lead} steps before" if precursor.lead else "at the same step"


def _looked_at(log: Log, event: Event, precursors: Sequence[Precursor]) -> str:
    """What an unknown cause rests on."""
    if event.kind == "grad_spike":
        return (
            f"{event.signal} was {number(event.value)} instead of {number(event.baseline)}, and the loss did not move"
        )
    others = [name for name in log.series if name not in ("loss", "val_loss", "tokens")]
    if precursors:
        return "; ".join(f"{p.text}, {_lead(p)}" for p in precursors)
    if not others:
        return "the log has the loss only, so that nothing can be said of what led to it"
    shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
    return f"nothing stood out before it in {shown}"


def _company(log: Log, event: Event, found: Sequence[Event]) -> Iterator[str]:
    """What else is known of a spike without a cause: how many there are, and when; how coarse the log is."""
    if event.kind != "fast_spike":
        return
    spikes = [e for e in found if e.kind == "fast_spike"]
    steps, _ = curve(log)
    if len(spikes) >= SEVERAL:
        quarter = steps[0] + 0.25 * length(log)
        early = sum(e.start < quarter for e in spikes)
        yield f"it is one of {len(spikes)} spikes, {early} of them in the first quarter of the log"
    if event.points == 1 and interval(log) > 1:
        yield f"with every {interval(log)}th step in the log, one odd batch and a short spike look alike"
