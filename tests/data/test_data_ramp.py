from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import Conflict, UserError
from poise.data.feed.ramp import BatchRamp, LengthRamp, check, parse_tokens

LENGTH_RAMPS = st.builds(
    lambda start, doublings, tokens: LengthRamp(start, start << doublings, tokens),
    st.integers(1, 100),
    st.integers(0, 8),
    st.integers(0, 10**7),
)
LINES = st.builds(
    lambda start, times, tokens, seq_len: BatchRamp(start, start * times, tokens, seq_len=seq_len),
    st.integers(1, 50),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.integers(1, 300),
)


@st.composite
def stages(draw: st.DrawFn) -> BatchRamp:
    count = draw(st.integers(1, 6))
    tokens = sorted(draw(st.sets(st.integers(1, 10**5), min_size=count - 1, max_size=count - 1)))
    samples = sorted(draw(st.sets(st.integers(1, 300), min_size=count, max_size=count)))
    text = " ".join(f"{t}:{b}" for t, b in zip([0, *tokens], samples, strict=True))
    return BatchRamp.parse(text, seq_len=draw(st.integers(1, 64)))


@given(ramp=LENGTH_RAMPS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_length_is_the_largest_of_the_ladder_under_the_line(ramp: LengthRamp, data: st.DataObject) -> None:
    seen = data.draw(st.integers(0, 2 * ramp.tokens))
    ladder = [ramp.start << k for k in range(9) if ramp.start << k <= ramp.full]
    if seen >= ramp.tokens:
        assert ramp.at(seen) == ramp.full
    else:
        # length <= start + (full - start) * seen / tokens, in whole numbers
        under = [n for n in ladder if (n - ramp.start) * ramp.tokens <= (ramp.full - ramp.start) * seen]
        assert ramp.at(seen) == max(under)
    assert ramp.full % ramp.at(seen) == 0


@given(ramp=LENGTH_RAMPS)
@settings(max_examples=50, deadline=None)
def test_length_changes_where_it_says(ramp: LengthRamp) -> None:
    for seen, length in ramp.changes:
        here = [n for at, n in ramp.changes if at == seen]
        assert ramp.at(seen) == max(here)
        if seen:
            assert ramp.at(seen - 1) < length
    assert ramp.changes[0] == (0, ramp.start)
    assert ramp.changes[-1][1] == ramp.full


def test_no_length_ramp_is_the_full_length() -> None:
    assert LengthRamp(8, 64, tokens=0).at(0) == 64
    assert LengthRamp(64, 64, tokens=1000).at(0) == 64


@pytest.mark.parametrize(
    ("start", "full", "tokens", "message"),
    [
        (0, 64, 10, "starts at 0"),
        (16, 100, 10, "from 16 to 100 cannot double its way there; start at one of 100, 50, 25"),
        (16, 48, 10, "start at one of 48, 24, 12, 6, 3"),
        (64, 32, 10, "cannot double"),
        (8, 0, 10, "give a positive length"),
        (8, 64, -1, "takes -1 tokens"),
    ],
)
def test_bad_length_ramps(start: int, full: int, tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LengthRamp(start, full, tokens)


def walk(ramp: BatchRamp, steps: int) -> list[tuple[int, int]]:
    """(first sample, samples) of every step, by walking from step to step."""
    sample, out = 0, []
    for _ in range(steps):
        size = ramp.at(sample * ramp.seq_len)
        out.append((sample, size))
        sample += size
    return out


@given(ramp=st.one_of(LINES, stages()))
@settings(max_examples=120, deadline=None)
def test_steps_and_samples_by_walking(ramp: BatchRamp) -> None:
    walked = walk(ramp, 150)
    for step, (first, size) in enumerate(walked, 1):
        assert ramp.first_sample(step) == first
        assert ramp.size(step) == size
        assert ramp.step_of(first) == ramp.step_of(first + size - 1) == step


@given(ramp=LINES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_batch_is_a_multiple_of_its_start_under_the_line(ramp: BatchRamp, data: st.DataObject) -> None:
    seen = data.draw(st.integers(0, 2 * ramp.tokens))
    batch = ramp.at(seen)
    if seen >= ramp.tokens:
        assert batch == ramp.full
        return
    assert batch % ramp.start == 0
    line = ramp.start * ramp.tokens + (ramp.full - ramp.start) * seen  # times tokens
    assert batch * ramp.tokens <= line < (batch + ramp.start) * ramp.tokens


@given(ramp=st.one_of(LINES, stages()))
@settings(max_examples=50, deadline=None)
def test_batch_changes_where_it_says(ramp: BatchRamp) -> None:
    assert ramp.changes[0][0] == 0
    for seen, batch in ramp.changes:
        assert ramp.at(seen) >= batch
        if seen:
            assert ramp.at(seen - 1) < batch
    assert ramp.changes[-1][1] == ramp.full


def test_far_steps_cost_nothing() -> None:
    ramp = BatchRamp(256, 4096, 10**12, seq_len=4096)
    assert ramp.step_of(ramp.first_sample(10**12)) == 10**12


def test_stages_of_merrill() -> None:
    ramp = BatchRamp.parse("0:1024 168B:2048, 503B:4096", seq_len=4096)
    assert [ramp.at(n) for n in (0, 168 * 10**9 - 1, 168 * 10**9, 503 * 10**9)] == [1024, 1024, 2048, 4096]
    assert (ramp.start, ramp.full, ramp.tokens) == (1024, 4096, 503 * 10**9)
    # the rate is multiplied with sqrt(2) at each doubling
    factors = [ramp.lr_factor(n) for n in (0, 168 * 10**9, 503 * 10**9)]
    assert factors[1] / factors[0] == pytest.approx(math.sqrt(2))
    assert factors[2] == 1.0


def test_lr_rules() -> None:
    early = [BatchRamp(8, 32, 1000, lr, seq_len=4).lr_factor(0) for lr in ("sqrt", "linear", "none")]
    assert early == [0.5, 0.25, 1.0]
    assert BatchRamp(8, 32, 1000, seq_len=4).lr_factor(1000) == 1.0


def test_a_stage_too_short_for_a_step_is_passed_over() -> None:
    ramp = BatchRamp.parse("0:8 10:16 20:32", seq_len=100)
    assert [ramp.size(step) for step in (1, 2)] == [8, 32]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first batch stage must begin at 0"),
        ("1B:256", "first batch stage must begin at 0"),
        ("0:256 1B", "'1B' is no batch stage"),
        ("0:256 1B:many", "'1B:many' is no batch stage"),
        ("0:256 1X:512", "'1X' is no number of tokens"),
        ("0:0", "has no samples"),
        ("0:256 1B:128", "'1000000000:128' follows '0:256'; tokens and samples must grow"),
        ("0:256 1B:512 1B:1024", "must grow"),
    ],
)
def test_bad_stages(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchRamp.parse(text, seq_len=8)


def test_bad_batch_ramps() -> None:
    with pytest.raises(UserError, match="starts at 0 samples"):
        BatchRamp(0, 8, 10, seq_len=4)
    with pytest.raises(UserError, match=r"from 8 to 20 samples.*use e.g. 16"):
        BatchRamp(8, 20, 10, seq_len=4)
    with pytest.raises(UserError, match="takes -1 tokens"):
        BatchRamp(8, 16, -1, seq_len=4)
    with pytest.raises(UserError, match="the sequence length is 0"):
        BatchRamp(8, 16, 10, seq_len=0)
    with pytest.raises(UserError, match="no learning-rate rule 'sqr', did you mean 'sqrt'"):
        BatchRamp(8, 16, 10, "sqr", seq_len=4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"disagree.*BatchRamp.parse"):
        BatchRamp(8, 16, 10, seq_len=4, stages=((0, 8), (10, 32)))


def test_both_ramps_only_when_asked() -> None:
    length, batch = LengthRamp(8, 64, 1000), BatchRamp(8, 32, 1000, seq_len=64)
    with pytest.raises(Conflict, match="advised against"):
        check(length, batch)
    check(length, batch, both=True)
    for one, other in [(length, None), (None, batch), (None, None), (LengthRamp(64, 64, 1000), batch)]:
        check(one, other)
    check(length, BatchRamp(8, 8, 1000, seq_len=64))
    with pytest.raises(UserError, match="ends at 64 and the batch ramp counts sequences of 32"):
        check(length, BatchRamp(8, 32, 1000, seq_len=32), both=True)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("0", 0), ("12", 12), ("500k", 500_000), ("2.5M", 2_500_000), ("1b", 10**9), ("1_000", 1000), ("1.5e3", 1500)],
)
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "-1", "1.5", "B", "1BB", "1.2.3k", "nan", "0.0001k"])
def test_no_numbers_of_tokens(text: str) -> None:
    with pytest.raises(UserError, match="number of tokens"):
        parse_tokens(text)
