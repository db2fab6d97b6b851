"""What events cost: steps and tokens until the loss is back on its trend.

    steps       end - start + one logging interval; to the log's end where the loss never came back
    tokens      from the log's own count of tokens there, or steps x tokens a step
    spike-ETTR  1 - lost steps / all steps, each lost step counted once

Events that need no reaction (one odd batch, the first steps' transient, a gradient norm alone) cost nothing, and so
does an event of another signal than the loss: training goes on. Steps that were done again after a rollback are not in
the log any more and not counted.
Source: ETTR is Meta's effective training time ratio (arXiv 2410.21680), here in steps instead of hours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from poise.postmortem.event import Cost, Event
from poise.postmortem.log import Log
from poise.postmortem.steps import BENIGN_KINDS, interval, length, lost_until


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


def cost(log: Log, event: Event, tokens_per_step: int | None) -> Cost:
    """Return what one event cost.

    Args:
        log: the log that it is in.
        event: with start, end and recovery.
        tokens_per_step: where it is known; else the log's own count of tokens is looked at.
    """
    if not _counts(event):
        return Cost(0, _tokens(log, [], tokens_per_step), 0.0)
    span = _span(log, event)
    steps = span[1] - span[0]
    return Cost(steps, _tokens(log, [span], tokens_per_step), _share(steps, log))


def total_cost(events: Iterable[Event], log: Log, tokens_per_step: int | None = None) -> Total:
    """Return what all events cost; steps that belong to several are counted once."""
    spans = sorted(_span(log, event) for event in events if _counts(event))
    merged: list[tuple[int, int]] = []
    for first, end in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((first, end))
    steps = sum(end - first for first, end in merged)
    share = _share(steps, log)
    return Total(steps, _tokens(log, merged, tokens_per_step), share, 1.0 - share)


def counts_tokens(log: Log) -> bool:
    """Return whether the log has a running count of tokens: that is right even where the batch grows."""
    if "tokens" not in log.series:
        return False
    tokens = log.series["tokens"][1]
    return len(tokens) > 1 and bool(np.isfinite(tokens).all() and (np.diff(tokens) > 0).all())


def _counts(event: Event) -> bool:
    return event.kind not in BENIGN_KINDS and event.severity != "note" and event.signal in ("loss", "val_loss")


def _span(log: Log, event: Event) -> tuple[int, int]:
    """Return (first, end) of the lost steps, the end not included."""
    return event.start, max(lost_until(log, event), event.start) + interval(log)


def _share(steps: int, log: Log) -> float:
    return min(steps / length(log), 1.0) if length(log) else 0.0


def _tokens(log: Log, spans: Iterable[tuple[int, int]], tokens_per_step: int | None) -> int | None:
    spans = list(spans)
    if log.step_unit == "tokens":
        return sum(end - first for first, end in spans)
    if tokens_per_step is not None:
        return tokens_per_step * sum(end - first for first, end in spans)
    if not counts_tokens(log):
        return None
    steps, tokens = log.series["tokens"]
    a_step = (tokens[-1] - tokens[0]) / (steps[-1] - steps[0])
    edges = np.array(spans, dtype=np.float64).reshape(-1, 2)
    inside = np.interp(edges, steps, tokens) + a_step * (
        np.maximum(edges - steps[-1], 0) + np.minimum(edges - steps[0], 0)
    )
    return round(float((inside[:, 1] - inside[:, 0]).sum()))
