"""What events cost, each step counted once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.postmortem.cost import cost, total_cost
from poise.postmortem.event import Cause, Event
from poise.postmortem.known import counts_tokens
from poise.postmortem.log import Log


def log_of(steps: np.ndarray, unit: str = "steps", **series: np.ndarray) -> Log:
    table = {"loss": np.full(len(steps), 3.0)} | series
    return Log(Path("a"), "a", "table", {k: (steps, v.astype(float)) for k, v in table.items()}, step_unit=unit)


def event(start: int, end: int, kind: str = "fast_spike", **more: object) -> Event:
    fields = {"kind": kind, "severity": "warning", "start": start, "peak": start, "end": end}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 3, "recovery": "returned"}
    return Event(**(fields | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, 5])
def test_steps_tokens_and_share(every: int) -> None:
    log = log_of(np.arange(0, 1000, every))
    found = cost(log, event(100, 100 + 9 * every), 64)
    assert (found.steps, found.tokens, found.share) == (10 * every, 640 * every, 10 * every / 1000)
    assert cost(log, event(100, 120), None).tokens is None


def test_what_never_came_back_costs_all_that_follows() -> None:
    log = log_of(np.arange(1, 1001))
    assert cost(log, event(901, 920, recovery="never"), None).steps == 100
    assert cost(log, event(901, 920, recovery="partly"), None).steps == 20


@pytest.mark.parametrize("kind", ["data_outlier", "early_transient", "grad_spike"])
def test_harmless_events_cost_nothing(kind: str) -> None:
    log = log_of(np.arange(1, 1001))
    assert cost(log, event(10, 40, kind), 64).steps == 0
    assert cost(log, event(10, 40, kind), 64).tokens == 0
    assert total_cost([event(10, 40, kind)], log).ettr == 1.0
    assert cost(log, event(10, 40, "logit_growth", signal="max logit"), 64).steps == 0


def test_the_logs_own_count_of_tokens_follows_a_growing_batch() -> None:
    steps = np.arange(1, 1001)
    tokens = np.cumsum(np.where(steps <= 500, 100, 300))
    log = log_of(steps, tokens=tokens)
    assert counts_tokens(log)
    assert cost(log, event(101, 110), None).tokens == pytest.approx(10 * 100, abs=1)
    assert cost(log, event(801, 810), None).tokens == pytest.approx(10 * 300, abs=1)
    assert cost(log, event(801, 810), 7).tokens == 70, "what was said counts"
    assert not counts_tokens(log_of(steps, tokens=np.full(1000, 100)))
    assert cost(log_of(steps * 4096, "tokens"), event(4096, 8192), None).tokens == 2 * 4096


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 80)), max_size=8), st.sampled_from([1, 5]))
def test_overlapping_events_are_counted_once(spans: list[tuple[int, int]], every: int) -> None:
    log = log_of(np.arange(0, 601, every))
    events = [event(first, first + size) for first, size in spans]
    lost = {step for first, size in spans for step in range(first, first + size + every)}
    total = total_cost(events, log, 3)
    assert total.steps == len(lost) and total.tokens == 3 * len(lost)
    assert total.ettr == pytest.approx(1 - len(lost) / (600 + every))


@pytest.mark.parametrize("every", [1, 5])
def test_of_nan_only_the_rows_without_a_loss_are_lost(every: int) -> None:
    steps = np.arange(0, 1000, every)
    loss = np.full(len(steps), 3.0)
    bad = [20, 40, 41, 60]
    loss[bad] = np.nan
    log = log_of(steps, loss=loss)
    nan = event(20 * every, 60 * every, "nonfinite", value=np.nan)
    assert cost(log, nan, 10).steps == 4 * every and cost(log, nan, 10).tokens == 40 * every
    assert total_cost([nan, event(40 * every, 44 * every)], log).steps == (2 + 5) * every
    loss[-7:] = np.inf
    last = event(int(steps[-7]), int(steps[-1]), "nonfinite", recovery="never")
    assert cost(log_of(steps, loss=loss), last, None).steps == 7 * every


def test_a_gradient_norm_and_an_epoch_cost_nothing() -> None:
    log = log_of(np.arange(1, 1001), grad_norm=np.full(1000, np.nan))
    assert cost(log, event(1, 1000, "nonfinite", signal="grad_norm", recovery="never"), None).steps == 0
    epoch = event(500, 600, "collapse", recovery="never", cause=Cause("epoch boundary"))
    assert cost(log, epoch, None).steps == 0
    assert cost(log, event(500, 600, "collapse", recovery="never"), None).steps == 501
    assert cost(log, event(500, 600, "level_drop", severity="note", recovery="never"), None).steps == 0
