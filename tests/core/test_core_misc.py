"""Types, cards, host protocol and named random streams."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.core import rng, types
from poise.core.host import Host
from poise.core.registry import Card
from poise.core.types import (
    Alarm,
    Clip,
    Decision,
    DropData,
    Halt,
    LowerLr,
    Proceed,
    QkClip,
    RaisePrecision,
    ResetMoments,
    Rollback,
    Signals,
    Skip,
)

DECISIONS = [
    (Proceed(), "proceed"),
    (Skip(), "skip"),
    (Clip(max_norm=1.0), "clip"),
    (LowerLr(factor=0.5), "lower_lr"),
    (ResetMoments(), "reset_moments"),
    (Rollback(at_most=7), "rollback"),
    (DropData(first=1, last=3), "drop_data"),
    (Halt(reason="x"), "halt"),
    (QkClip(places=("block.0",), threshold=100.0), "qk_clip"),
    (RaisePrecision(places=("block.0",)), "raise_precision"),
]


@pytest.mark.parametrize(("decision", "action"), DECISIONS)
def test_decisions_have_names_and_are_frozen(decision, action):
    assert isinstance(decision, Decision)
    assert decision.action == action
    assert decision.alarms == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.reason = "changed"
    assert dataclasses.replace(decision, reason="r").reason == "r"


def test_every_decision_is_in_the_table_above():
    names = {kind.__name__ for kind in Decision.__subclasses__()}
    assert {type(decision).__name__ for decision, _ in DECISIONS} == names


def test_decisions_that_need_a_value_insist_on_it():
    for kind in (Clip, LowerLr, Rollback, DropData):
        with pytest.raises(TypeError):
            kind()
    assert Rollback(at_most=3).drop_data is True


def test_signals_are_frozen_and_do_not_share_their_extras():
    a, b = (Signals(step=1, loss=2.0, grad_norm=1.0, lr=0.1, tokens=8) for _ in range(2))
    assert a == b
    assert a.extra == {}
    assert a.extra is not b.extra
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.loss = 0.0
    with pytest.raises((AttributeError, TypeError)):
        a.new_reading = 1.0  # slots: a misspelt name is an error


def test_alarm_travels_with_a_decision():
    alarm = Alarm("fast_spike", "critical", 5, "loss", 9.0, 2.0, "cusum", "The loss jumped.")
    assert Skip(alarms=(alarm,), reason=alarm.message).alarms[0].kind == "fast_spike"


def test_ignored_targets_follow_torch():
    from torch.nn import CrossEntropyLoss

    assert CrossEntropyLoss().ignore_index == types.IGNORE


def test_a_host_is_known_by_what_it_can_do():
    class Whole:
        def rollback(self, at_most, drop_data):
            return 0

        def drop_data(self, first, last): ...

        def scale_lr(self, factor): ...

        def reset_moments(self): ...

        def halt(self, reason): ...

    class Half:
        def halt(self, reason): ...

    assert isinstance(Whole(), Host)
    assert not isinstance(Half(), Host)


def test_card_has_a_line_for_every_question():
    card = Card("z", "clipping", "t", "c", "f", "a", "c", "o")
    assert card.differs == "nothing known"
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.name = "y"


class TestRng:
    def test_is_the_same_everywhere(self):
        """Numbers written down: another machine or Python version must give these, or old runs change."""
        assert rng.derive(0, "init") == 6767970929478544064
        assert rng.derive(7, "data", 3) == 3075797879885513195

    @given(st.integers(), st.text(), st.integers(0, 2**40))
    def test_fits_every_generator(self, seed, name, counter):
        assert 0 <= rng.derive(seed, name, counter) < 2**63

    def test_depends_on_every_part_and_their_order(self):
        seeds = [
            rng.derive(0, "a", "b"),
            rng.derive(0, "b", "a"),
            rng.derive(1, "a", "b"),
            rng.derive(0, "ab"),
            rng.derive(0, "a"),
            rng.derive(0, "a", 1),
            rng.derive(0, "a", 11),
            rng.derive(0, "a", 1, 1),
            rng.derive(0),
        ]
        assert len(set(seeds)) == len(seeds)


def test_the_core_imports_no_torch():
    program = "import sys, poise.core.types, poise.core.journal, poise.core.host, poise.core.registry, poise.core.rng\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "sys.exit('torch' in sys.modules)"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
