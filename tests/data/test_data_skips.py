"""Which samples come next when some are not to be shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data.feed.skips import after, merged, samples_of, spans

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


def listed(ranges: list[tuple[int, int]]) -> set[int]:
    return {sample for first, last in ranges for sample in range(first, last + 1)}


@given(first=st.integers(0, 70), count=st.integers(1, 30), skips=RANGES)
@settings(max_examples=150, deadline=None)
def test_after_by_definition(first: int, count: int, skips: list[tuple[int, int]]) -> None:
    gone = listed(skips)
    expected = [sample for sample in range(first, first + count + 200) if sample not in gone][:count]
    found = after(first, count, skips)
    assert list(found) == expected
    assert isinstance(found, range) == (expected[-1] - expected[0] == count - 1)


@given(first=st.integers(0, 40), skips=RANGES)
@settings(max_examples=50, deadline=None)
def test_steps_follow_each_other(first: int, skips: list[tuple[int, int]]) -> None:
    """Twelve samples are twelve samples, in however many steps."""
    at, shown = first, []
    for count in (1, 4, 2, 5):
        step = list(after(at, count, skips))
        shown += step
        at = step[-1] + 1
    assert shown == list(after(first, 12, skips))


@given(RANGES)
@settings(max_examples=100, deadline=None)
def test_merged_ranges_are_the_same_samples(ranges: list[tuple[int, int]]) -> None:
    found = merged(ranges)
    assert listed(found) == listed(ranges)
    assert all(a[1] + 1 < b[0] for a, b in pairwise(found))
    assert spans(sorted(listed(ranges))) == found


def test_a_journal_says_which_samples_it_showed() -> None:
    assert samples_of({"sample": 16}, 8) == range(16, 24)
    assert samples_of({"sample": 16, "rows": 2}, 8) == range(16, 18)
    shown = after(6, 5, [(7, 9)])
    assert list(samples_of({"sample": 6, "spans": [list(span) for span in spans(shown)]}, 5)) == list(shown)
