from __future__ import annotations

import numpy as np
import pytest

from poise.data.tokens import vocabulary
from poise.data.tokens.tokenizer import Tokenizer, train

TEXT = "the loss of the batch was low and the norm of the gradient was high\n" * 40


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train([TEXT], 290, ("<|pad|>",))


def counts(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return vocabulary.count(tokenizer.encode([text])[0], tokenizer.vocab_size)


def test_figures_by_hand(trained: Tokenizer) -> None:
    ids = trained.encode([TEXT])[0]
    found = counts(trained, TEXT)
    health = vocabulary.health(found, trained, len(TEXT))
    assert (health["ids"], health["no_token"], health["tokens"]) == (288, 2, len(ids))
    assert health["never"] == 288 - len(set(ids.tolist()))
    assert health["rare"] == sum(1 for i in range(2, 290) if (ids == i).sum() < 10)
    assert health["bytes_per_token"] == pytest.approx(len(TEXT) / len(ids), abs=1e-4)
    top = health["top"][0]
    assert top["count"] == max((ids == i).sum() for i in range(290))
    assert top["byte_share"] == pytest.approx(top["count"] * len(top["text"]) / len(TEXT), abs=1e-6)
    # All ids together carry all bytes of the text.
    assert sum(int(c) * len(p) for c, p in zip(found, trained.pieces, strict=True)) == len(TEXT)


def test_the_fewest_ids_that_make_half() -> None:
    tokenizer = train(["ab"], 257)
    found = np.zeros(257, np.int64)
    found[10:14] = [50, 30, 15, 5]
    for add, expected in ((0, 1), (1, 2), (140, 1)):
        found[13] = 5 + add
        assert vocabulary.health(found, tokenizer, 100)["used_for_half"] == expected


def test_the_end_of_text_is_no_text(trained: Tokenizer) -> None:
    found = counts(trained, TEXT)
    plain = vocabulary.health(found, trained, len(TEXT))
    found[trained.end_of_text] += 1000
    assert vocabulary.health(found, trained, len(TEXT))["bytes_per_token"] == plain["bytes_per_token"]
    assert vocabulary.health(found, trained, len(TEXT))["top"] == plain["top"]


def test_warnings(trained: Tokenizer) -> None:
    bad = train(["ab"], 257)
    text = "x" + " " * 400 + "y\n"
    lines = vocabulary.health(counts(bad, text), bad, len(text))["warnings"]
    assert any("seen fewer than 10 times" in line and "never" in line for line in lines)
    assert any("carries 1.00 bytes" in line for line in lines)
    good = np.full(290, 100)
    assert vocabulary.health(good, trained, 3 * 28800)["warnings"] == []
    good[200] = 10_000
    lines = vocabulary.health(good, trained, 4 * 38800)["warnings"]
    assert len(lines) == 1 and "id 200" in lines[0]


def test_no_text_at_all(trained: Tokenizer) -> None:
    health = vocabulary.health(np.zeros(290, np.int64), trained, 0)
    assert (health["tokens"], health["bytes_per_token"], health["top"], health["warnings"]) == (0, 0.0, [], [])


def test_counts_of_blocks_add_up(trained: Tokenizer) -> None:
    ids = trained.encode([TEXT])[0]
    whole = vocabulary.count(ids, 290)
    assert (vocabulary.count(ids[:99], 290) + vocabulary.count(ids[99:], 290) == whole).all()
    assert whole.dtype == np.int64 and whole.shape == (290,)
