"""What events cost: steps and tokens until the loss is back on its trend.

    steps       end - start + one logging interval; to the log's end where the loss never came back. Of a stretch
                with non-finite losses these alone, one logging interval each
    tokens      from the log's own count of tokens there, or steps x tokens a step
    spike-ETTR  1 - lost steps / all steps, each lost step counted once

Events that need no reaction (one odd batch, the first steps' transient, a gradient norm alone) cost nothing, and so do
an event of another signal than the loss and a loss that falls at an epoch's boundary: training goes on. Steps that were
done again after a rollback are not in the log any more and not counted.
Source: ETTR is Meta's effective training time ratio (arXiv 2410.21680), here in steps instead of hours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from poise.postmortem.event import Cost, Event
from poise.postmortem.known import Known
from poise.postmortem.log import Log
from poise.postmortem.steps import at_or_after, benign, between, of_loss
from poise.postmortem.trend import Floats, Ints


@dataclass(frozen=True, slots=True)
class Total:
    """What all events of a log cost together.

    Attributes:
        steps: lost, each counted once.
        tokens: of those steps; ``None`` where the log does not say.
        share: of all steps, 0 to 1.
        ettr: 1 - share.
    """

    steps: int
    tokens: int | None
    share: float
    ettr: float


def cost(log: Log, event: Event, tokens_per_step: int | None, known: Known | None = None) -> Cost:
    """Return what one event cost.

    Args:
        log: the log that it is in.
        event: with start, end and recovery.
        tokens_per_step: where it is known; else the log's own count of tokens is looked at.
        known: ``Known(log)``, where there are several events.
    """
    known = Known(log) if known is None else known
    spans = _merged(_spans(known, event)) if _counts(event) else np.empty((0, 2), np.int64)
    steps = int((spans[:, 1] - spans[:, 0]).sum())
    return Cost(steps, _tokens(known, spans, tokens_per_step), _share(steps, known))


def total_cost(
    events: Iterable[Event], log: Log, tokens_per_step: int | None = None, known: Known | None = None
) -> Total:
    """Return what all events cost; steps that belong to several are counted once."""
    known = Known(log) if known is None else known
    spans = [_spans(known, event) for event in events if _counts(event)]
    merged = _merged(np.concatenate(spans) if spans else np.empty((0, 2), np.int64))
    steps = int((merged[:, 1] - merged[:, 0]).sum())
    share = _share(steps, known)
    return Total(steps, _tokens(known, merged, tokens_per_step), share, 1.0 - share)


def _counts(event: Event) -> bool:
    harmless = benign(event) or event.severity == "note" or event.cause.name == "epoch boundary"
    return of_loss(event) and not harmless


def _spans(known: Known, event: Event) -> Ints:
    """Return (first, end) of the lost steps, the end not included, (N, 2)."""
    until = max(known.last or 0, event.end) if event.recovery == "never" else event.end
    if event.kind != "nonfinite":
        return np.array([[event.start, max(until, event.start) + known.interval]], dtype=np.int64)
    steps, values = between(known.log.series.get(event.signal, known.curve), event.start, until)
    bad = steps[~np.isfinite(values)]
    return np.stack([bad, bad + known.interval], axis=1)


def _merged(spans: Ints) -> Ints:
    """Return the same steps as spans that do not overlap, in order."""
    if not len(spans):
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    ends = np.maximum.accumulate(spans[:, 1])
    new = np.append(True, spans[1:, 0] > ends[:-1])
    return np.stack([spans[new, 0], ends[np.append(np.flatnonzero(new)[1:] - 1, len(ends) - 1)]], axis=1)


def _share(steps: int, known: Known) -> float:
    return min(steps / known.length, 1.0) if known.length else 0.0


def _tokens(known: Known, spans: Ints, tokens_per_step: int | None) -> int | None:
    count = int((spans[:, 1] - spans[:, 0]).sum())
    if known.log.step_unit == "tokens":
        return count
    if tokens_per_step is not None:
        return tokens_per_step * count
    if not known.counts_tokens:
        return None
    steps, tokens = known.log.series["tokens"]
    a_step = (tokens[-1] - tokens[0]) / (steps[-1] - steps[0])
    edges = spans.astype(np.float64)
    inside = _at(steps, tokens, edges) + a_step * (np.maximum(edges - steps[-1], 0) + np.minimum(edges - steps[0], 0))
    return round(float((inside[:, 1] - inside[:, 0]).sum()))


def _at(steps: Ints, tokens: Floats, edges: Floats) -> Floats:
    """Return the tokens at these steps; of a long log only the part that they lie in is looked at."""
    if not len(edges):
        return edges
    first = max(at_or_after(steps, float(edges.min())) - 1, 0)
    last = at_or_after(steps, float(edges.max())) + 1
    inside: Floats = np.interp(edges, steps[first:last], tokens[first:last])
    return inside
