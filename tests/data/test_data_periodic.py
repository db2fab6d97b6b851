"""The repeated-n-gram rule against its definition, spelled out."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from poise.data.tokens import periodic
from poise.data.tokens.tokenizer import Tokenizer, train


def by_definition(ids: list[int], ends: list[int], max_period: int, min_count: int) -> list[tuple[int, int, int]]:
    """Return (start, length, period) of all maximal runs, those inside another one left out."""
    found: dict[tuple[int, int], int] = {}
    for low, high in itertools.pairwise([0, *ends]):
        for period in range(max_period, 0, -1):
            at = low
            while at + period <= high:
                stop = at + period
                while stop < high and ids[stop] == ids[stop - period]:
                    stop += 1
                if (stop - at) // period >= min_count:
                    found[at, stop] = period  # a smaller period comes later and replaces it
                at = max(at + 1, stop - period + 1)
    outer = {
        (a, b): p for (a, b), p in found.items() if not any(c <= a and b <= d and (a, b) != (c, d) for c, d in found)
    }
    return [(a, b - a, p) for (a, b), p in sorted(outer.items())]


def spans(repeats: NDArray[np.void]) -> list[tuple[int, int, int]]:
    return [(int(r["start"]), int(r["length"]), int(r["period"])) for r in repeats]


grams = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 14), st.booleans())


@given(st.lists(grams, max_size=6), st.integers(2, 6), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_runs_are_those_of_the_definition(parts: list[tuple[list[int], int, bool]], count: int, period: int) -> None:
    ids: list[int] = []
    ends: list[int] = []
    for gram, times, last in parts:
        ids += gram * times
        if last:
            ends += [len(ids)] * (1 + times % 2)  # now and then an empty document
    ends.append(len(ids))
    repeats = periodic.find(np.array(ids, np.uint16), np.array(ends), max_period=period, min_count=count)
    assert spans(repeats) == by_definition(ids, ends, period, count)
    assert (repeats["count"] == repeats["length"] // repeats["period"]).all()
    # Strictly increasing starts and ends are what binary search in them relies on.
    assert (np.diff(repeats["start"]) > 0).all()
    assert (np.diff(repeats["start"] + repeats["length"]) > 0).all()


@pytest.mark.parametrize("period", range(1, 14))
def test_every_period_is_found_at_every_place(period: int) -> None:
    rng = np.random.default_rng(period)
    for place in range(0, 40, 3):
        ids = rng.permutation(2000)[:400].astype(np.uint32)
        ids[place : place + period * 8] = np.resize(np.arange(5000, 5000 + period), period * 8)
        assert spans(periodic.find(ids, np.array([400]))) == [(place, period * 8, period)]
        ids[place + period * 8 - 1] = 9999  # one token short of eight
        assert not len(periodic.find(ids, np.array([400])))


def test_a_repeat_does_not_reach_over_the_end_of_a_document() -> None:
    ids = np.zeros(20, np.uint16)
    assert spans(periodic.find(ids, np.array([20]))) == [(0, 20, 1)]
    assert spans(periodic.find(ids, np.array([9, 20]))) == [(0, 9, 1), (9, 11, 1)]
    assert spans(periodic.find(ids, np.array([7, 12, 20]))) == [(12, 8, 1)]
    # Short documents with an end of text each: period 2 over the whole, but in no document.
    assert not len(periodic.find(np.tile(np.array([5, 0], np.uint16), 50), np.arange(2, 101, 2)))


def test_the_smallest_period_is_told() -> None:
    (repeat,) = periodic.find(np.tile(np.array([1, 2, 1, 2], np.uint16), 30), np.array([120]))
    assert (repeat["period"], repeat["count"], repeat["length"]) == (2, 60, 120)


def test_nothing_in_nothing() -> None:
    for ends in ([], [0], [0, 0]):
        repeats = periodic.find(np.zeros(0, np.uint16), np.array(ends, np.int64))
        assert len(repeats) == 0 and repeats.dtype == periodic.REPEAT
    assert periodic.REPEAT.itemsize == 19


def test_most_tokens_repeating_is_no_other_answer_than_few() -> None:
    # Where much of the text repeats, another path is taken.
    ids = np.concatenate([np.arange(100, 200), np.zeros(1000), np.arange(300, 310), np.tile([1, 2, 3], 300)])
    ids = ids.astype(np.uint16)
    assert spans(periodic.find(ids, np.array([len(ids)]))) == [(100, 1000, 1), (1110, 900, 3)]


def test_blank_means_every_token_of_the_ngram() -> None:
    ids = np.concatenate([np.tile([7, 8], 10), np.arange(50, 90), np.tile([7, 9], 10)]).astype(np.uint16)
    repeats = periodic.find(ids, np.array([len(ids)]), blank_ids=np.array([7, 8]))
    assert repeats["blank"].tolist() == [True, False]


def test_threshold_and_what_counts() -> None:
    assert [periodic.threshold(t) for t in (16, 104, 128, 256, 415, 416, 4096)] == [8, 8, 9, 19, 31, 32, 32]
    repeats = np.zeros(4, periodic.REPEAT)
    repeats["count"], repeats["blank"] = [8, 31, 32, 99], [False, False, False, True]
    assert periodic.counted(repeats, 104).tolist() == [True, True, True, False]
    assert periodic.counted(repeats, 2048).tolist() == [False, False, True, False]


def test_mask_and_tokens_per_document() -> None:
    ids = np.concatenate([np.arange(10), np.full(20, 3), np.arange(20, 30), np.tile([4, 5], 10)]).astype(np.uint16)
    ends = np.array([12, 40, 40, 60])
    repeats = periodic.find(ids, ends)
    assert spans(repeats) == [(12, 18, 1), (40, 20, 2)]
    truth = np.zeros(80, bool)
    truth[12:30] = truth[40:60] = True
    for start in range(60):
        for length in (1, 7, 20):
            assert (periodic.mask(repeats, start, length) == truth[start : start + length]).all()
    count, tokens = periodic.per_document(repeats, ends)
    assert (count.tolist(), tokens.tolist()) == ([0, 18, 0, 10], [0, 18, 0, 20])
    count, tokens = periodic.per_document(repeats, ends, repeats["count"] > 10)
    assert (count.tolist(), tokens.tolist()) == ([0, 18, 0, 0], [0, 18, 0, 0])


def test_tokens_of_two_spans_are_counted_once() -> None:
    # ababab...abbbbbb: the last b of the first run begins the second.
    ids = np.array([1, 2] * 8 + [2] * 9, np.uint16)
    repeats = periodic.find(ids, np.array([len(ids)]))
    assert spans(repeats) == [(0, 16, 2), (15, 10, 1)]
    assert periodic.covered(repeats).tolist() == [16, 9]


@pytest.fixture(scope="module")
def spaces() -> Tokenizer:
    """A vocabulary of bytes: each blank of an indentation is a token."""
    return train(["ab"], 257)


def corpus(tokenizer: Tokenizer, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    parts = tokenizer.encode(texts)
    return np.concatenate(parts), np.cumsum([len(p) for p in parts])


def test_report_blames_the_vocabulary_for_indentation(spaces: Tokenizer) -> None:
    texts = [f"def f{i}():\n" + " " * 40 + f"return {i}\n" for i in range(8)] + ["plain text.\n", "=-" * 40 + "\n"]
    ids, ends = corpus(spaces, texts)
    repeats = periodic.find(ids, ends, blank_ids=spaces.blank_ids)
    report = periodic.report(repeats, spaces, ids, ends)
    assert (report["spans"], report["tokens"], report["blank_spans"]) == (9, 8 * 40 + 80, 8)
    assert (report["flagged"], report["flagged_with_blank"]) == (0.1, 0.9)
    assert [(n["text"], n["spans"], n["tokens"], n["blank"]) for n in report["ngrams"]] == [
        (" ", 8, 320, True),
        (spaces.decode(sorted(spaces.encode(["=-"])[0])), 1, 80, False),
    ]
    assert len(report["warnings"]) == 2
    assert "the tokenizer causes it" in report["warnings"][0] and "90.0% of documents" in report["warnings"][0]
    assert "1 spans repeat" in report["warnings"][1]


def test_report_joins_rotations_and_blames_nothing_else(spaces: Tokenizer) -> None:
    ids, ends = corpus(spaces, ["xyz" * 40, "yzx" * 40, "quiet"])
    repeats = periodic.find(ids, ends, blank_ids=spaces.blank_ids)
    report = periodic.report(repeats, spaces, ids)
    assert [(n["spans"], n["tokens"]) for n in report["ngrams"]] == [(2, 240)]
    assert not any("tokenizer causes" in line for line in report["warnings"])
    assert "documents" not in report
    assert periodic.report(repeats[:0], spaces, ids, ends)["warnings"] == []
    # A window of 104 tokens counts what repeats eight times.
    few_ids, few_ends = corpus(spaces, ["xyz" * 9])
    few = periodic.find(few_ids, few_ends)
    assert periodic.report(few, spaces, few_ids)["spans"] == 0
    assert periodic.report(few, spaces, few_ids, seq_len=104)["spans"] == 1


def test_thirteen_periods_are_fast() -> None:
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.3, 500_000) % 8000).astype(np.uint16)
    start = time.process_time()
    periodic.find(ids, np.array([len(ids)]))
    assert time.process_time() - start < 0.5  # the goal is 0.033 s, measured are 0.002 s
