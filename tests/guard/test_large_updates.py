"""Large updates: told during warm-up, once; silent for healthy rates and where no block is measured."""

from __future__ import annotations

import json
import math

import pytest

from poise.core.types import Signals
from poise.guard.detectors.large_updates import AGAIN, LargeUpdates


def signals(step: int, ratio: float | None) -> Signals:
    extra = {} if ratio is None else {f"update_ratio@block.{i}": ratio * (1 + 0.1 * i) for i in range(3)}
    return Signals(step, 7.0, 1.0, 0.1, 0, {**extra, "update_ratio@embed": 9.0})


def alarms(ratios: list[float | None]) -> list[int]:
    detector = LargeUpdates()
    return [step for step, ratio in enumerate(ratios, 1) if detector.update(signals(step, ratio)) is not None]


def test_five_steps_in_a_row_are_told_once_and_again_after_a_while() -> None:
    assert alarms([0.2] * (AGAIN + 20)) == [5, 5 + AGAIN]


def test_the_start_of_a_run_does_not_count() -> None:
    assert alarms([5.0, 1.0, 0.3, 0.05, 0.02, *[0.01] * 50]) == []


@pytest.mark.parametrize("ratio", [0.03, 0.08, None, math.nan])
def test_healthy_and_missing_readings_raise_nothing(ratio: float | None) -> None:
    assert alarms([ratio] * 100) == []


def test_a_pause_begins_anew() -> None:
    assert alarms([*[0.2] * 4, 0.01, *[0.2] * 4, 0.01] * 5) == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_the_state_is_exact(cut: int) -> None:
    straight, first = LargeUpdates(), LargeUpdates()
    expected = [straight.update(signals(step, 0.2)) for step in range(1, 15)]
    found = [first.update(signals(step, 0.2)) for step in range(1, cut + 1)]
    again = LargeUpdates()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [again.update(signals(step, 0.2)) for step in range(cut + 1, 15)]
    assert found == expected


def test_the_message_names_the_rate() -> None:
    detector = LargeUpdates()
    found = [detector.update(signals(step, 0.25)) for step in range(1, 6)][-1]
    assert found is not None and found.severity == "critical"
    assert (found.value, found.expected) == (pytest.approx(0.275), 0.01)
    assert "28% of their size" in found.message and "0.1 is far too high" in found.message
