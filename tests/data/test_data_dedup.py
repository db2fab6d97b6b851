from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.dedup import clusters, exact
from poise.data.writer import content_hash

BANDS, ROWS = 3, 2
small_signatures = st.lists(st.lists(st.integers(0, 2), min_size=BANDS * ROWS, max_size=BANDS * ROWS), max_size=14)
groups = st.lists(st.integers(0, 6), min_size=1, max_size=40)


def partition(labels: NDArray[np.int64]) -> set[frozenset[int]]:
    found = defaultdict(set)
    for row, label in enumerate(labels.tolist()):
        found[label].add(row)
    assert all(label == min(rows) for label, rows in found.items())
    return {frozenset(rows) for rows in found.values()}


def connected(count: int, edges: list[tuple[int, int]]) -> set[frozenset[int]]:
    sets = {row: {row} for row in range(count)}
    for a, b in edges:
        union = sets[a] | sets[b]
        for row in union:
            sets[row] = union
    return {frozenset(each) for each in sets.values()}


def slow_near(signatures: NDArray[np.uint32], threshold: float) -> set[frozenset[int]]:
    edges = []
    for a in range(len(signatures)):
        for b in range(a):
            same = signatures[a] == signatures[b]
            if same.reshape(BANDS, ROWS).all(1).any() and same.mean() >= threshold:
                edges.append((a, b))
    return connected(len(signatures), edges)


def test_hashes_are_the_writers() -> None:
    texts = ["", "a", "日本語", "x" * 10_000, "a"]
    column = pa.array(["cut off", *texts, None], pa.string())
    got = exact.hashes(column[1:])
    assert [row.tobytes() for row in got] == [content_hash(text) for text in [*texts, ""]]
    assert np.array_equal(exact.hashes(column.cast(pa.large_string())[1:]), got)
    assert exact.hashes(pa.array([], pa.string())).shape == (0, 2)
    binary = exact.to_binary(got)
    assert binary.to_pylist()[:5] == [content_hash(text) for text in texts]
    assert np.array_equal(exact.from_binary(binary[2:]), got[2:])
    assert exact.from_binary(binary[:0]).shape == (0, 2)


@given(numbers=groups)
@settings(max_examples=50, deadline=None)
def test_exact_groups_equal_hashes_only(numbers: list[int]) -> None:
    hashes = np.array([[7, n] if n % 2 else [n, 7] for n in numbers], np.uint64)  # one half of the hash may be shared
    want = connected(len(numbers), [(a, b) for a in range(len(numbers)) for b in range(a) if numbers[a] == numbers[b]])
    assert partition(clusters.exact(hashes)) == want


@given(rows=small_signatures, threshold=st.sampled_from([0.0, 0.5, 0.8, 1.0]))
@settings(max_examples=80, deadline=None)
def test_near_joins_what_every_pair_would_join(rows: list[list[int]], threshold: float) -> None:
    signatures = np.array(rows, np.uint32).reshape(-1, BANDS * ROWS)
    labels = clusters.near(signatures, bands=BANDS, rows=ROWS, threshold=threshold)
    assert labels.dtype == np.int64
    assert partition(labels) == slow_near(signatures, threshold)


def test_near_works_on_a_memory_map_and_across_reading_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 8, (60, BANDS * ROWS), dtype=np.uint32)
    want = clusters.near(signatures, bands=BANDS, rows=ROWS, threshold=0.5)
    monkeypatch.setattr(clusters, "_READ", 7)
    monkeypatch.setattr(clusters, "_PAIRS", 3)
    path = tmp_path / "signatures"
    signatures.tofile(path)
    mapped = np.memmap(path, np.uint32, "r").reshape(-1, BANDS * ROWS)
    assert np.array_equal(clusters.near(mapped, bands=BANDS, rows=ROWS, threshold=0.5), want)
    assert 1 < len(partition(want)) < 60


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_does_not_matter_even_in_large_buckets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    signatures = rng.integers(0, 4, (100, 6), dtype=np.uint32)
    signatures[:, :3] = 1  # one bucket of all, in which each is like its neighbours: what is "first" decides
    order = rng.permutation(100)
    plain = clusters.near(signatures, bands=2, rows=3, threshold=0.8)
    moved = clusters.near(signatures[order], bands=2, rows=3, threshold=0.8)
    back = {frozenset(order[list(rows)].tolist()) for rows in partition(moved)}
    assert back == partition(plain)


def test_a_large_bucket_is_searched_for_more_than_one_group() -> None:
    # Five groups of 10 whose members meet in the first band alone: each other band differs in one number.
    base = np.random.default_rng(0).integers(0, 2**31, (5, 112), dtype=np.uint32)
    base[:, :8] = 7
    signatures = np.repeat(base, 10, axis=0)
    signatures[:, 8::8] = np.arange(50 * 13).reshape(50, 13)
    assert clusters.near(signatures).tolist() == (np.arange(50) // 10 * 10).tolist()


def test_a_huge_bucket_takes_linear_time_and_still_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    plain = clusters._compare

    def count(*args: NDArray[np.uint32]) -> NDArray[np.bool_]:
        nonlocal compared
        compared += len(args[2])
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(clusters, "_compare", count)
    rng, many = np.random.default_rng(0), 20_000
    signatures = rng.integers(0, 2**32, (many, 112), dtype=np.uint32)
    signatures[:, :8] = 5  # a licence at the head of all
    signatures[100:150, :100] = signatures[100, :100]
    labels = clusters.near(signatures)
    assert (labels[100:150] == 100).all()
    assert len(np.unique(labels)) == many - 49
    assert compared < 10 * many


def test_estimates_are_compared_with_the_threshold() -> None:
    base = np.arange(112, dtype=np.uint32)
    near, far = base.copy(), base.copy()
    near[90:] += 1000  # 90 of 112 = 0.8036
    far[89:] += 2000  # 89 of 112 = 0.7946
    assert clusters.near(np.stack([far, base, near])).tolist() == [0, 1, 1]
    assert clusters.near(np.stack([far, base, near]), threshold=0.79).tolist() == [0, 0, 0]


def test_merge_connects() -> None:
    a = np.array([0, 1, 1, 3, 4, 5])
    b = np.array([0, 1, 2, 2, 4, 0])
    assert clusters.merge(a, b).tolist() == [0, 1, 1, 1, 4, 0]
    assert clusters.merge(a).tolist() == a.tolist()
    with pytest.raises(UserError, match=r"lengths are \[6, 2\]"):
        clusters.merge(a, a[:2])


@given(numbers=groups, contents=st.data(), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_what_stays_depends_on_contents_alone(numbers: list[int], contents: st.DataObject, seed: int) -> None:
    content = contents.draw(st.lists(st.integers(0, 9), min_size=len(numbers), max_size=len(numbers)))
    hashes = exact.hashes(pa.array([f"{group} {text}" for group, text in zip(numbers, content, strict=True)]))
    group = np.array(numbers)
    order = np.random.default_rng(seed).permutation(len(numbers))
    found = []
    for rows in (np.arange(len(numbers)), order):
        labels = np.array([int(np.flatnonzero(group[rows] == group[row])[0]) for row in rows])
        for how in ("one", "log"):
            kept, sizes = clusters.keep(labels, hashes[rows], how)  # type: ignore[arg-type]
            assert sizes.dtype == np.int32 and sizes.tolist() == [Counter(numbers)[numbers[row]] for row in rows]
            head = clusters.head(labels, hashes[rows])
            assert kept[head].all() and (labels[head] == labels).all()
            if how == "one":
                assert np.array_equal(np.flatnonzero(kept), np.unique(head))
            found.append(Counter(hashes[rows][kept].tobytes()[i : i + 16] for i in range(0, 16 * kept.sum(), 16)))
            assert np.bincount(group[rows][kept]).tolist() == [
                0 if many == 0 else 1 if how == "one" else many.bit_length() for many in np.bincount(group).tolist()
            ]
    assert found[0] == found[2] and found[1] == found[3]


def test_the_lowest_hash_stays_and_of_equal_ones_the_first() -> None:
    texts = ["b", "a", "c", "a", "d", "b"]
    hashes = exact.hashes(pa.array(texts))
    lowest = min(range(6), key=lambda row: (content_hash(texts[row]), row))
    kept, sizes = clusters.keep(np.zeros(6, np.int64), hashes)
    assert np.flatnonzero(kept).tolist() == [lowest] and sizes.tolist() == [6] * 6
    kept, _ = clusters.keep(np.zeros(6, np.int64), hashes, "log")
    assert np.flatnonzero(kept).tolist() == sorted(
        sorted(range(6), key=lambda row: (content_hash(texts[row]), row))[:3]
    )


def test_bad_settings_are_said() -> None:
    with pytest.raises(UserError, match=r"shape \(2, 5\); 14 bands of 8 rows need 112"):
        clusters.near(np.zeros((2, 5), np.uint32))
    with pytest.raises(UserError, match=r"threshold is 1\.5"):
        clusters.near(np.zeros((2, 112), np.uint32), threshold=1.5)
    with pytest.raises(UserError, match="unknown keep rule 'two'"):
        clusters.keep(np.zeros(1, np.int64), np.zeros((1, 2), np.uint64), "two")  # type: ignore[arg-type]
