from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.tokens.augment import SENTINELS, BpeDropout, FillInTheMiddle
from poise.data.tokens.tokenizer import Tokenizer, train
from poise.data.writer import content_hash

TEXTS = [f"step {i}: the loss of the batch was {i / 7:.3f}; naïve 日本語 aaaaaaa\n" * 3 for i in range(60)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train(TEXTS, 330, SENTINELS)


def hashes(texts: list[str]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(content_hash, texts)), np.uint64).reshape(-1, 2)


def rows(ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def drop(tokenizer: Tokenizer, texts: list[str], p: float, seed: int = 0) -> list[list[int]]:
    return rows(*BpeDropout(p, seed).encode(tokenizer, pa.array(texts, pa.string()), hashes(texts)))


def fill(tokenizer: Tokenizer, texts: list[str], **settings: float) -> list[list[int]]:
    method = FillInTheMiddle(**settings)  # type: ignore[arg-type]
    return rows(*method.encode(tokenizer, pa.array(texts, pa.string()), hashes(texts)))


letters = st.text(st.sampled_from("aab  los1.\n日é\u3000"), max_size=60)


@given(st.lists(letters, max_size=4))
@settings(max_examples=60, deadline=None)
def test_without_dropout_the_ids_are_those_of_the_tokenizer(trained: Tokenizer, texts: list[str]) -> None:
    assert drop(trained, texts, 0.0) == [ids.tolist() for ids in trained.encode(texts)]


@given(st.lists(letters, max_size=4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_dropout_keeps_the_text(trained: Tokenizer, texts: list[str], p: float) -> None:
    assert [trained.decode(ids) for ids in drop(trained, texts, p)] == texts


def test_dropout_of_all_merges_leaves_bytes(trained: Tokenizer) -> None:
    assert [len(ids) for ids in drop(trained, TEXTS, 1.0)] == [len(text.encode()) for text in TEXTS]


def test_share_of_dropped_merges(trained: Tokenizer) -> None:
    # "ab" is one merge if any: with p it stays two letters.
    tokenizer = train(["ab ab ab ab"], 258)
    texts = [f"{'ab ' * 400}{i}" for i in range(10)]
    pair = tokenizer.encode(["ab"])[0].tolist()
    assert len(pair) == 1
    made = sum(ids.count(pair[0]) for ids in drop(tokenizer, texts, 0.3))
    assert made / 4000 == pytest.approx(0.7, abs=0.04)


def test_dropout_depends_on_text_and_seed_alone(trained: Tokenizer) -> None:
    together = drop(trained, TEXTS, 0.2)
    assert drop(trained, TEXTS[::-1], 0.2) == together[::-1]
    assert [drop(trained, [text], 0.2)[0] for text in TEXTS[:3]] == together[:3]
    assert drop(trained, TEXTS, 0.2, seed=1) != together
    # Equal words of one document are spelled in several ways.
    word = drop(trained, ["batch batch batch batch batch batch batch batch batch batch\n"], 0.5)[0]
    assert len(word) > len(trained.encode(["batch batch batch batch batch batch batch batch batch batch\n"])[0])


def test_long_words_are_left_alone(trained: Tokenizer) -> None:
    text = "a" * 600
    assert drop(trained, [text], 0.9) == [trained.encode([text])[0].tolist()]


def test_dropout_with_the_end_of_text(trained: Tokenizer) -> None:
    text = pa.array(["ab", "", "c"])
    ids, offsets = BpeDropout(0.0).encode(trained, text, hashes(["ab", "", "c"]), end=True)
    assert [row[-1] for row in rows(ids, offsets)] == [trained.end_of_text] * 3


def restore(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Put a document together again."""
    prefix, suffix, middle = (tokenizer.special_id(name) for name in SENTINELS)
    if not ids or ids[0] != prefix:
        return tokenizer.decode(ids)
    assert [ids.count(mark) for mark in (prefix, suffix, middle)] == [1, 1, 1]
    a, c, b = ids[1 : ids.index(suffix)], ids[ids.index(suffix) + 1 : ids.index(middle)], ids[ids.index(middle) + 1 :]
    if a:
        return tokenizer.decode(a) + tokenizer.decode(b) + tokenizer.decode(c)
    return tokenizer.decode(b) + tokenizer.decode(c)  # second order: prefix and middle are together


@given(st.lists(letters, max_size=4), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_filled_in_middles_hold_the_whole_text(trained: Tokenizer, texts: list[str], seed: int) -> None:
    found = fill(trained, texts, rate=1.0, seed=seed)
    assert [restore(trained, ids) for ids in found] == texts
    assert all("\ufffd" not in trained.decode(ids) for ids in found)  # no cut inside a character
    assert all(len(ids) >= 3 for ids in found)


def test_rate_and_order(trained: Tokenizer) -> None:
    texts = [f"{i} the loss of the batch" for i in range(1000)]
    prefix, suffix, _ = (trained.special_id(name) for name in SENTINELS)
    found = fill(trained, texts, rate=0.4, spm=0.25)
    changed = [ids for ids in found if ids[0] == prefix]
    assert len(changed) == pytest.approx(400, abs=60)
    assert sum(ids[1] == suffix for ids in changed) / len(changed) == pytest.approx(0.25, abs=0.1)
    plain = [ids.tolist() for ids in trained.encode(texts)]
    assert all(ids == same for ids, same in zip(found, plain, strict=True) if ids[0] != prefix)
    assert fill(trained, texts, rate=0.0) == plain


def test_middles_depend_on_text_and_seed_alone(trained: Tokenizer) -> None:
    together = fill(trained, TEXTS, rate=0.5)
    assert fill(trained, TEXTS[::-1], rate=0.5) == together[::-1]
    assert fill(trained, TEXTS, rate=0.5, seed=1) != together


def test_end_of_text_and_slices(trained: Tokenizer) -> None:
    text = pa.array(TEXTS)[5:9]
    ids, offsets = FillInTheMiddle(1.0).encode(trained, text, hashes(TEXTS[5:9]), end=True)
    found = rows(ids, offsets)
    assert [row[-1] for row in found] == [trained.end_of_text] * 4
    assert [restore(trained, row[:-1]) for row in found] == TEXTS[5:9]


def test_what_cannot_be_done_is_said(trained: Tokenizer) -> None:
    plain = train(TEXTS, 300)
    with pytest.raises(UserError, match=r"no special token '<\|fim_prefix\|>'"):
        fill(plain, TEXTS, rate=0.5)
    for wrong in (lambda: BpeDropout(1.5), lambda: FillInTheMiddle(-0.1), lambda: FillInTheMiddle(0.5, spm=2)):
        with pytest.raises(UserError, match="give a probability"):
            wrong()
    with pytest.raises(UserError, match="three different"):
        FillInTheMiddle(0.5, sentinels=("a", "a", "b"))
