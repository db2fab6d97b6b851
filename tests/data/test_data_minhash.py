from __future__ import annotations

import sys
import tracemalloc
import unicodedata
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data.dedup import minhash
from poise.data.dedup.minhash import backend_of, signatures
from poise.data.dedup.shingles import ngrams, runs, shingles, words

BACKENDS = ["numpy", pytest.param("rensa", marks=pytest.mark.skipif(find_spec("rensa") is None, reason="no rensa"))]
LETTERS = "abZ9 .,-\n_'éÉßçŁłΩωЖжאب…“’—。　、你好かカ한국กขកမ🙂𝒜⁵\u0301×½"
texts = st.lists(st.text(LETTERS, max_size=40), max_size=12)


def slow_words(text: str) -> list[str]:
    """The definition of shingles.py, one character after another."""
    out, word = [], ""
    for letter in text:
        code, alone, keep = ord(letter), False, True
        if code < 0x80:
            keep = letter.isalnum()
        elif code < 0x800:
            keep = unicodedata.category(letter)[0] in "LMN"
        else:
            keep = not (0x2000 <= code < 0x2070 or 0x3000 <= code < 0x3040)
            alone = 0x3040 <= code < 0xA000 or 0x0E00 <= code < 0x0F00 or 0x1000 <= code < 0x10C0
            alone = alone or 0x1780 <= code < 0x1800
        if not keep or alone:
            out, word = [*out, word], ""
        if alone:
            out.append(letter)
        elif keep:
            lower = letter.lower() if code < 0x800 else letter
            word += lower if len(lower.encode()) == len(letter.encode()) else letter
    return [word for word in [*out, word] if word]


def slow_shingles(text: str, n: int) -> list[tuple[str, ...]]:
    found = slow_words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)] if len(found) >= n else [tuple(found)]


def jaccard(left: str, right: str, n: int = 5) -> float:
    a, b = set(slow_shingles(left, n)), set(slow_shingles(right, n))
    return len(a & b) / len(a | b)


@given(texts=texts, block=st.sampled_from([200, 2**20]))
@settings(max_examples=80, deadline=None)
def test_words_are_those_of_the_definition(texts: list[str], block: int) -> None:
    got: list[list[int]] = [[] for _ in texts]
    for part in words(pa.array(texts, pa.string()), block):
        for d in range(len(part.offsets) - 1):
            got[part.row + d] += part.hashes[part.offsets[d] : part.offsets[d + 1]].tolist()
    want = [slow_words(text) for text in texts]
    assert [len(each) for each in got] == [len(each) for each in want]
    meaning: dict[int, str] = {}
    for hashes, each in zip(got, want, strict=True):
        for value, word in zip(hashes, each, strict=True):
            assert meaning.setdefault(value, word) == word  # one hash, one word
    assert len(meaning) == len({word for each in want for word in each})  # one word, one hash


def test_words_ignore_case_and_punctuation() -> None:
    left, right = (
        words(pa.array(["Don't -- STOP,\tGrün; ЖИЗНЬ!", "x"])),
        words(pa.array(["don’t stop\ngrÜn “жизнь”", "x"])),
    )
    assert next(left).hashes.tolist() == next(right).hashes.tolist()


def test_word_hashes_tell_apart_prefixes_lengths_and_long_words() -> None:
    base = "abcdefgh" * 5
    cases = [base[:i] for i in range(1, 41)] + [base[:i] + "X" + base[i + 1 :] for i in range(40)]
    block = next(words(pa.array([" ".join(cases)])))
    assert len(set(block.hashes.tolist())) == len({case.lower() for case in cases})


@given(count=st.integers(0, 40), n=st.integers(1, 14))
@settings(max_examples=40, deadline=None)
def test_ngrams_by_doubling_equal_the_polynomial(count: int, n: int) -> None:
    hashes = np.random.default_rng(count).integers(0, 2**64, count, dtype=np.uint64)
    got = ngrams(hashes, n)
    assert len(got) == max(count - n + 1, 0)
    assert got.tolist() == runs(hashes, np.arange(len(got)), n).tolist()


@given(texts=texts, n=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_shingles_are_the_ngrams_of_each_document(texts: list[str], n: int) -> None:
    got: list[list[int]] = []
    for part in shingles(pa.array(texts, pa.string()), n):
        got += [part.hashes[a:b].tolist() for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)]
    want = [slow_shingles(text, n) for text in texts]
    assert [len(each) for each in got] == [len(each) for each in want]
    pairs = {pair for hashes, each in zip(got, want, strict=True) for pair in zip(hashes, each, strict=True) if pair[1]}
    assert len({value for value, _ in pairs}) == len({gram for _, gram in pairs}) == len(pairs)


@pytest.mark.parametrize("count", [0, 3, 4, 5, 200])
def test_a_long_document_in_parts_has_the_same_shingles(count: int) -> None:
    text = " ".join(f"w{i}" for i in range(count)) + "." * 300
    column = pa.array(["before", text, "after"])
    whole = [each.hashes for each in shingles(column, 5)]
    parts = [each.hashes for each in shingles(column, 5, block_bytes=64)]
    assert len(parts) > 3
    assert np.concatenate(parts).tolist() == np.concatenate(whole).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signature_depends_on_its_own_text_alone(backend: str) -> None:
    rng = np.random.default_rng(3)
    made = [" ".join(f"w{i}" for i in rng.integers(0, 50, size)) for size in (0, 1, 4, 5, 30, 400, 3000)] + [
        "!!",
        "你好" * 50,
    ]
    column = pa.array(made, pa.large_string())
    together = signatures(column, backend=backend)
    assert together.shape == (len(made), 112) and together.dtype == np.uint32
    for row in range(len(made)):
        alone = signatures(column[row : row + 1].cast(pa.string()), backend=backend)
        assert np.array_equal(alone[0], together[row])
    assert np.array_equal(signatures(column, backend=backend, block_bytes=256), together)
    assert len(np.unique(together, axis=0)) == len(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_estimate_follows_the_exact_similarity(backend: str) -> None:
    rng = np.random.default_rng(1)
    for size in (12, 60, 900):
        made, truth = [], []
        for change in np.linspace(0, size // 4, 24).astype(int):
            left = [f"w{i}" for i in rng.integers(0, 10**6, size)]
            right = list(left)
            for at in rng.choice(size, change, replace=False):
                right[at] = "other"
            made += [" ".join(left), " ".join(right)]
            truth.append(jaccard(made[-2], made[-1]))
        found = signatures(pa.array(made), backend=backend)
        error = (found[::2] == found[1::2]).mean(1) - truth
        assert np.abs(error).max() < 0.2, size  # 4 standard deviations of 112 independent numbers
        assert abs(error.mean()) < 0.025, size
        assert error[0] == 0


def test_numpy_numbers_are_unbiased_and_no_worse_than_independent_ones() -> None:
    # 300 pairs of sets of each size, drawn without text: the mean over pairs must hit the similarity closely.
    rng, size = np.random.default_rng(0), 112
    for many, shared in ((6, 4), (40, 30), (150, 130), (600, 500)):
        union = 2 * many - shared
        hashes = rng.integers(0, 2**64, (300, union), dtype=np.uint64)
        offsets = np.arange(0, 600 * many + 1, many)
        both = np.stack([hashes[:, :many], hashes[:, union - many :]], axis=1).ravel()
        found = minhash._numpy(both, offsets, size)
        share = (found[::2] == found[1::2]).mean(1)
        truth = shared / union
        ideal = (truth * (1 - truth) / size) ** 0.5
        assert abs(share.mean() - truth) < 4 * ideal / 300**0.5
        assert share.std() < 1.15 * ideal


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_long_document_takes_little_memory(backend: str) -> None:
    rng = np.random.default_rng(0)
    text = pa.array([" ".join(f"{i:x}" for i in rng.integers(0, 2**20, 700_000))])  # 4 MB of text
    tracemalloc.start()
    signatures(text, backend=backend)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


def test_a_repeated_word_is_no_trap() -> None:
    found = signatures(pa.array(["spam " * 200_000, "spam " * 900, "spam " * 5]), backend="numpy")
    assert (found == found[0]).all()


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_of("numpy").startswith("numpy ")
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert backend_of("auto").startswith("numpy ")
    with pytest.raises(UserError, match=r"pip install 'poise\[fast\]'"):
        backend_of("rensa")
    with pytest.raises(UserError, match="'minhash'; choose auto, rensa or numpy"):
        backend_of("minhash")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bands is 0"):
        signatures(pa.array(["a"]), bands=0)
