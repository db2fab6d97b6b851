from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.feed import pack

Ints = NDArray[np.int64]

LENGTHS = st.lists(st.integers(0, 60), max_size=60)


def naive_rooms(lengths: list[int], seq_len: int) -> list[int]:
    """Room left in every row after best-fit decreasing, chunk by chunk as the rule is stated."""
    chunks = []
    for n in lengths:
        start = 0
        while n - start > seq_len + 1:
            chunks.append(seq_len + 1)
            start += seq_len
        if n:
            chunks.append(n - start)
    rooms: list[int] = []
    for chunk in sorted(chunks, reverse=True):
        at = bisect_left(rooms, chunk)
        room = rooms.pop(at) if at < len(rooms) else seq_len + 1
        insort(rooms, room - chunk)
    return rooms


def row_rooms(packing: pack.Packing) -> list[int]:
    used = [int(packing.row(r)["length"].sum()) for r in range(packing.rows)]
    return sorted(packing.seq_len + 1 - u for u in used)


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_places_chunks_as_the_rule_says(lengths: list[int], seq_len: int) -> None:
    packing = pack.best_fit(np.array(lengths, np.int32), seq_len)
    assert row_rooms(packing) == naive_rooms(lengths, seq_len)


def test_places_many_chunks_as_the_rule_says() -> None:
    rng = np.random.default_rng(1)
    for lengths in (rng.integers(1, 300, 20_000), rng.lognormal(4, 1, 20_000).astype(int) + 1):
        assert row_rooms(pack.best_fit(lengths, 255)) == naive_rooms(lengths.tolist(), 255)


@given(lengths=LENGTHS, seq_len=st.integers(1, 30), block=st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_every_target_is_in_one_row(lengths: list[int], seq_len: int, block: int) -> None:
    packing = pack.best_fit(np.array(lengths, np.int64), seq_len, block=block)
    targets: list[tuple[int, int]] = []
    tokens: set[tuple[int, int]] = set()
    for document, start, length in packing.pieces.tolist():
        targets += [(document, start + i) for i in range(1, length)]
        tokens |= {(document, start + i) for i in range(length)}
    assert sorted(targets) == [(d, i) for d, n in enumerate(lengths) for i in range(1, n)]
    assert tokens == {(d, i) for d, n in enumerate(lengths) for i in range(n)}
    assert min(row_rooms(packing), default=0) >= 0
    assert packing.tokens == packing.pieces["length"].sum()
    assert packing.documents == len(lengths)


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_what_fits_is_never_cut(lengths: list[int], seq_len: int) -> None:
    packing = pack.best_fit(np.array(lengths, np.int64), seq_len)
    pieces = np.bincount(packing.pieces["document"], minlength=len(lengths)).tolist()
    assert all(pieces[d] == 1 for d, n in enumerate(lengths) if 0 < n <= seq_len + 1)
    assert packing.truncated == 0
    assert packing.fitting == sum(0 < n <= seq_len + 1 for n in lengths)
    assert packing.cut == sum(n > seq_len + 1 for n in lengths)


def test_packing_is_fuller_than_one_document_a_row() -> None:
    packing = pack.best_fit(np.array([6, 5, 5, 4, 3, 3, 2, 2]), 9)
    assert packing.rows == 3
    assert packing.fill == 1.0
    rows = [packing.row(r)["document"].tolist() for r in range(packing.rows)]
    assert rows == [[0, 3], [1, 2], [4, 5, 6, 7]]


def test_a_long_document_shares_a_token_between_chunks() -> None:
    packing = pack.best_fit(np.array([25]), 10)
    pieces = sorted((start, length) for _, start, length in packing.pieces.tolist())
    assert pieces == [(0, 11), (10, 11), (20, 5)]
    assert packing.cut == 1
    assert packing.truncated == 0


def test_blocks_are_packed_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    whole = pack.best_fit(lengths, 31, block=30)
    parts = [pack.best_fit(lengths[i : i + 30], 31) for i in range(0, 100, 30)]
    assert whole.rows == sum(part.rows for part in parts)
    expected = np.concatenate([part.pieces["document"] + 30 * i for i, part in enumerate(parts)])
    assert whole.pieces["document"].tolist() == expected.tolist()
    assert whole.row_first[-1] == len(whole.pieces)
    joined = pack.join(pack.blocks(lengths, 31, block=30), 31)
    assert joined.row_first.tolist() == whole.row_first.tolist()


def test_a_block_with_huge_documents_is_packed_in_parts() -> None:
    lengths = np.array([1000, 5, 1000, 5, 5, 5])
    parts = list(pack.blocks(lengths, 10, block=6))
    assert len(parts) == 4
    assert sum(part.documents for part in parts) == 6


def test_no_documents_make_no_rows() -> None:
    for lengths in ([], [0, 0]):
        packing = pack.best_fit(np.array(lengths, np.int32), 8)
        assert (packing.rows, packing.fill, packing.truncated, len(packing.pieces)) == (0, 0.0, 0.0, 0)
    assert pack.concat_truncation(np.array([], np.int32), 8) == 0.0


def test_a_sequence_length_must_be_positive() -> None:
    with pytest.raises(UserError, match="the sequence length is 0"):
        pack.best_fit(np.array([3]), 0)


def naive_concat_truncation(lengths: list[int], seq_len: int) -> float:
    total = sum(lengths)
    windows = [set(range(k * seq_len, k * seq_len + seq_len + 1)) for k in range(max(total - 1, 0) // seq_len)]
    begin = cut = fitting = 0
    for n in lengths:
        if 0 < n <= seq_len + 1:
            fitting += 1
            cut += not any(set(range(begin, begin + n)) <= window for window in windows)
        begin += n
    return cut / fitting if fitting else 0.0


@given(lengths=st.lists(st.integers(0, 14), max_size=25), seq_len=st.integers(1, 8), block=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_concat_truncation_by_definition(lengths: list[int], seq_len: int, block: int) -> None:
    share = pack.concat_truncation(np.array(lengths, np.int64), seq_len, block=block)
    assert share == pytest.approx(naive_concat_truncation(lengths, seq_len))


def placed(packing: pack.Packing, rows: list[int], lengths: Ints) -> tuple[Ints, NDArray[np.int32], Ints]:
    first = np.cumsum(lengths) - lengths
    index_BC, piece_BC = packing.place(np.array(rows), first)
    return index_BC, piece_BC, first


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_place_says_where_the_tokens_are(lengths: list[int], data: st.DataObject) -> None:
    packing = pack.best_fit(np.array(lengths), 12)
    if not packing.rows:
        return
    rows = data.draw(st.lists(st.integers(0, packing.rows - 1), min_size=1, max_size=6))
    index_BC, piece_BC, first = placed(packing, rows, np.array(lengths))
    for b, row in enumerate(rows):
        tokens: list[int] = []
        groups: list[int] = []
        pieces = packing.row(row).tolist()
        for i, (document, start, length) in enumerate(pieces):
            tokens += range(int(first[document]) + start, int(first[document]) + start + length)
            groups += [i] * length
        room = 13 - len(tokens)
        assert index_BC[b].tolist() == tokens + [-1] * room
        assert piece_BC[b].tolist() == groups + [len(pieces)] * room


def test_rows_of_documents() -> None:
    lengths = np.random.default_rng(4).integers(0, 60, 50)
    packing = pack.best_fit(lengths, 20)
    wanted = np.array([3, 17, 41])
    slow = [r for r in range(packing.rows) if set(packing.row(r)["document"].tolist()) & set(wanted.tolist())]
    assert packing.rows_of(wanted).tolist() == slow
    assert packing.rows_of(np.array([50])).tolist() == []


def same(one: pack.Packing, other: pack.Packing) -> bool:
    numbers = [(p.seq_len, p.documents, p.tokens, p.cut, p.cut_though_fitting, p.fitting) for p in (one, other)]
    arrays = np.array_equal(one.pieces, other.pieces) and np.array_equal(one.row_first, other.row_first)
    return arrays and numbers[0] == numbers[1]


@pytest.mark.parametrize("count", [0, 1, 500])
def test_saved_and_loaded_is_the_same(tmp_path: Path, count: int) -> None:
    packing = pack.best_fit(np.random.default_rng(2).integers(1, 99, count), 32, block=64)
    packing.save(tmp_path / "rows.npy")
    assert same(pack.Packing.load(tmp_path / "rows.npy"), packing)
    assert np.load(tmp_path / "rows.npy").dtype == np.int64  # plain NumPy reads it, too


def test_written_block_by_block_is_the_same_file(tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).integers(1, 99, 500)
    pack.best_fit(lengths, 32, block=64).save(tmp_path / "whole.npy")
    pack.write(tmp_path / "parts.npy", pack.blocks(lengths, 32, block=64))
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "parts.npy").read_bytes()


def test_a_damaged_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with pytest.raises(UserError, match="cannot read the packing") as caught:
        pack.Packing.load(path)
    assert "No such file" in str(caught.value)
    pack.best_fit(np.arange(1, 50), 16).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-8], b"PK\x03\x04" + whole[4:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read the packing"):
            pack.Packing.load(path)
    np.save(path, np.arange(100))
    with pytest.raises(UserError, match="is no packing"):
        pack.Packing.load(path)
    np.save(path, np.arange(100.0))
    with pytest.raises(UserError, match="is no packing"):
        pack.Packing.load(path)
    path.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(UserError, match="its parts disagree"):
        pack.Packing.load(path)


def test_an_unfinished_file_is_refused(tmp_path: Path) -> None:
    def broken() -> Iterator[pack.Packing]:
        yield from pack.blocks(np.arange(1, 50), 16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack.write(tmp_path / "rows.npy", broken())
    with pytest.raises(UserError, match="is no packing"):
        pack.Packing.load(tmp_path / "rows.npy")


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the packing"):
        pack.best_fit(np.array([3]), 4).save(tmp_path / "missing" / "rows.npy")


def test_a_million_chunks_a_second() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 500_000)
    begin = time.process_time()
    packing = pack.best_fit(lengths, 2048)
    assert time.process_time() - begin < 0.5  # 0.07 s when measured
    assert packing.fill > 0.99
