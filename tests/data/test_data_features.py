"""Features against an obvious implementation, one document and one Python loop at a time."""

from __future__ import annotations

import itertools
import math
import pickle
import random
import unicodedata
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data import record
from poise.data.clean import chars, flat
from poise.data.clean.features import FEATURES, SCORES, SCORES_TYPE, Score, features
from poise.data.readers import Document

TERMINAL = ".?!。！？؟।"
"""Those sentence ends that the texts below hold."""

PROSE = (
    "The norm of the gradient is what we look at. It has to be small! Is it?\n"
    "\n"
    "- a bullet, and one more line of that list with 17 numbers…\n"
    "• another: 3.14 # {braces} and lorem  ipsum, Lorem ipsum ...\n"
    "\n\n"
    "The norm of the gradient is what we look at. It has to be small! Is it?\n"
    "   \n"
    "– naïve Größe, 日本語のテキスト。これは文です。 वाक्य है। And so on......\n"
)


def oracle(text: str) -> dict[str, float]:
    """Return every feature from its definition."""
    words = text.split()
    plain = [w for w in words if any(unicodedata.category(c)[0] in "LMN" for c in w)]
    lines = [line for line in text.split("\n") if line.split()]
    blocks = itertools.groupby(text.split("\n"), lambda line: bool(line.split()))
    paragraphs = ["\n".join(group) for full, group in blocks if full]
    size, all_words, all_lines = max(len(text), 1), max(len(words), 1), max(len(lines), 1)
    raw = text.encode()[: 64 * 1024]
    lower = {w.lower() if len(w) == 1 else w.lower().strip("\"'()[].,;:!?") for w in words}
    found: dict[str, float] = {
        "characters": len(text),
        "words": len(plain),
        "mean_word_length": sum(map(len, plain)) / max(len(plain), 1),
        "hash_ratio": text.count("#") / all_words,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / all_words,
        "bullet_lines": sum(line.strip()[0] in "-•" for line in lines) / all_lines,
        "ellipsis_lines": sum(line.strip().endswith(("...", "…")) for line in lines) / all_lines,
        "alpha_words": sum(any(c.isalpha() for c in w) for w in words) / all_words,
        "stop_words": len(lower & {"the", "be", "to", "of", "and", "that", "have", "with"}),
        "duplicate_lines": _again(lines)[0] / all_lines,
        "duplicate_line_chars": _again(lines)[1] / size,
        "duplicate_line_text": _again(lines)[1] / max(len(text.replace("\n", "")), 1),
        "duplicate_paragraphs": _again(paragraphs)[0] / max(len(paragraphs), 1),
        "duplicate_paragraph_chars": _again(paragraphs)[1] / size,
        "sentences": sum(map(_sentences, lines)),
        "curly_brackets": text.count("{"),
        "lorem_ipsum": text.lower().count("lorem ipsum"),
        "terminal_lines": sum(line[-1] in TERMINAL for line in lines) / all_lines,
        "short_lines": sum(len(line) <= 30 for line in lines) / all_lines,
        "newlines_per_word": text.count("\n") / all_words,
        "mean_line": sum(map(len, lines)) / all_lines,
        "longest_line": max(map(len, lines), default=0),
        "letters": sum(c.isalpha() for c in text) / size,
        "digits": sum(c.isdecimal() for c in text) / size,
        "entropy": -sum(n / len(words) * math.log2(n / len(words)) for n in Counter(words).values()),
        "compression": len(raw) / len(zlib.compress(raw, 1)) if len(raw) > 16_000 else 0,
    }
    for n in (2, 3, 4):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        top = max(((count, len(" ".join(gram))) for gram, count in grams.items() if count > 1), default=(0, 0))
        found[f"top_{n}gram"] = top[0] * top[1] / size
    for n in range(5, 11):
        seen: set[tuple[str, ...]] = set()
        covered: set[int] = set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            covered |= set(range(i, i + n)) if gram in seen else set()
            seen.add(gram)
        found[f"duplicate_{n}grams"] = sum(len(words[i]) for i in covered) / size
    return found


def _again(items: list[str]) -> tuple[int, int]:
    again = [item for number, item in enumerate(items) if item in items[:number]]
    return len(again), sum(map(len, again))


def _sentences(line: str) -> int:
    words = line.split()
    count = 1
    for word, following in itertools.pairwise(words):
        end = word[:-1] if word[-1] in "\"')]}" and len(word) > 1 else word
        count += end[-1] in TERMINAL and not following[0].islower()
    # A full-width stop that no white space follows.
    return count + sum(a in "。！？" and not b.isspace() for a, b in itertools.pairwise(line))


def check(texts: list[str]) -> None:
    found = features(pa.array(texts, pa.string()))
    assert tuple(found) == FEATURES
    for number, text in enumerate(texts):
        wanted = oracle(text)
        assert set(wanted) == set(FEATURES)
        for name in FEATURES:
            assert found[name].dtype == np.float32
            if name == "compression" and not wanted[name]:
                continue  # a small window is used for small texts; see below
            assert found[name][number] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (name, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\n\n \n",
        "word",
        "...",
        "......",
        "a.\nb",
        PROSE,
        PROSE * 3,
        "of of, (of) The THAT. 'with' \"have\" band tof",
        "x" * 70_000,
        "one two three four five " * 9,
        "a b a b a b a b a b c",
        "。。\n文。 文。文",
        'He said: "Stop." Then (yes!) he left. e.g. this. 1st',
        "\u2028a\u3000b\u00a0c\u1680d\x1ce\x85f",
        "a\r\nb\r\nc\r\n",
        "\U0001f600 \U0001f600 \U00020000\U00020001 é",
    ],
)
def test_features_are_what_their_definitions_say(text: str) -> None:
    check([text])


word = st.sampled_from(
    ["a", "b", "the", "of", "Norm.", "naïve", "日本", "42", "#1", "...", "-", "文。文", "{x}", "(ok!)"]
)
space = st.sampled_from([" ", " ", " ", "\n", "\n", "\n\n", "\t", "\u3000", " \n "])
document = st.lists(st.tuples(word, space), max_size=60).map(lambda pairs: "".join(a + b for a, b in pairs))


@settings(max_examples=60, deadline=None)
@given(st.lists(document | st.text(max_size=20).filter(lambda text: not _has_other_ends(text)), max_size=5))
def test_many_documents_at_once_equal_each_alone(texts: list[str]) -> None:
    check(texts)


def _has_other_ends(text: str) -> bool:
    return any(chars.code_classes()[ord(c)] & chars.TERMINAL and c not in TERMINAL for c in text)


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    for name in FEATURES:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_chunks_do_not_change_a_document() -> None:
    texts = [PROSE[: 37 * number] for number in range(20)] + ["", PROSE * 2]
    array = pa.array(texts, pa.string())
    whole = features(array)
    alone = [features(pa.array([text], pa.string())) for text in texts]
    _equal(whole, {name: np.concatenate([one[name] for one in alone]) for name in FEATURES})
    assert len(list(flat.chunks(array, chunk_bytes=1000))) > 5
    # The same of a slice, whose offsets do not begin at zero.
    _equal({name: values[5:9] for name, values in whole.items()}, features(array.slice(5, 4)))


def test_compression_is_near_zlibs_own_for_small_texts() -> None:
    texts = [random.Random(size).choices(PROSE.split(), k=size) for size in (1, 3, 10, 30, 100, 300, 1000, 2000)]
    raw = [" ".join(words).encode() for words in texts]
    found = features(pa.array([one.decode() for one in raw], pa.string()))["compression"]
    assert found.tolist() == pytest.approx([len(one) / len(zlib.compress(one, 1)) for one in raw], rel=0.01)
    assert features(pa.array(["", "a" * 5000], pa.string()))["compression"].tolist() == [
        0,
        pytest.approx(5000 / 39, abs=20),
    ]


def test_no_ngram_reaches_into_the_next_document() -> None:
    check(["x y x", "y y", "a b c d e f a b c d", "e e f f"])


def test_no_documents() -> None:
    assert {name: len(values) for name, values in features(pa.array([], pa.string())).items()} == dict.fromkeys(
        FEATURES, 0
    )


def test_a_long_document_is_judged_by_its_beginning() -> None:
    head = flat.HEAD_BYTES
    text = " " * (head - 300) + "ab é " * 200
    cut = text.encode()[:head].decode("utf-8", "ignore")
    assert len(cut) < len(text)
    _equal(features(pa.array([text], pa.string())), features(pa.array([cut], pa.string())))


def test_cut_between_characters() -> None:
    text = pa.array(["é日😀" * 40], pa.string())
    for most in range(20, 40):
        (chunk,) = flat.chunks(text, chunk_bytes=10, head_bytes=most)
        got = chunk.data.tobytes()[:-1]
        assert got.decode() and most - 3 <= len(got) <= most


def test_score_adds_one_struct_of_float32() -> None:
    batch = record.of([Document(text, "s", "o", 0, 0, None, None) for text in (PROSE, "", "word")])
    stage = pickle.loads(pickle.dumps(Score()))
    scored = stage(batch)
    assert scored.schema.field(SCORES).type == SCORES_TYPE
    assert [field.name for field in SCORES_TYPE] == list(FEATURES) and len(set(FEATURES)) == len(FEATURES)
    assert scored.drop_columns([SCORES]).equals(batch)
    assert scored.column(SCORES)[2].as_py()["letters"] == 1.0
    assert stage(scored).equals(scored)  # a second time replaces the column


def test_classes_follow_the_standard_library() -> None:
    table = chars.code_classes()
    for code in [*range(0x3500), *range(0x9F00, 0xAD00), *range(0xFE00, 0x10500), 0x20001, 0x1D7CE, 0xE0101, 0x10FFFF]:
        char = chr(code)
        wanted = chars.SPACE * char.isspace() | chars.LETTER * char.isalpha() | chars.DIGIT * char.isdecimal()
        wanted |= chars.PLAIN * (unicodedata.category(char)[0] in "LMN") | chars.LOWER * char.islower()
        assert int(table[code]) & ~(chars.TERMINAL | chars.CLOSER) == wanted, hex(code)
    assert all(table[ord(char)] & chars.TERMINAL for char in TERMINAL)
    assert not any(table[ord(char)] & chars.TERMINAL for char in ",;:…aé\n")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=300), st.lists(st.integers(0, 300), max_size=20))
def test_rank_counts_marks_before_a_place(marks: list[bool], places: list[int]) -> None:
    places = [min(place, len(marks)) for place in places]
    rank = flat.Rank(np.array(marks, np.bool_))
    assert rank.before(np.array(places, np.int64)).tolist() == [sum(marks[:place]) for place in places]


def test_bits_counted_without_numpy_2() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    values[:3] = 0, 2**64 - 1, 1
    wanted = [value.bit_count() for value in values.tolist()]
    assert flat._ones_by_halves(values).tolist() == wanted
    assert flat.ones(values).tolist() == wanted


def test_hashes_of_equal_stretches_are_equal_and_of_others_are_not() -> None:
    data = np.frombuffer(b"abcab abca ", np.uint8)
    prefix = flat.Prefix(data)
    spans = [(a, b) for a in range(len(data)) for b in range(a + 1, len(data) + 1)]
    start, end = (np.array(side) for side in zip(*spans, strict=True))
    by_hash: dict[int, set[bytes]] = {}
    by_text: dict[bytes, set[int]] = {}
    for (a, b), value in zip(spans, prefix.hashes(start, end).tolist(), strict=True):
        by_hash.setdefault(value, set()).add(data[a:b].tobytes())
        by_text.setdefault(data[a:b].tobytes(), set()).add(value)
    assert all(len(texts) == 1 for texts in by_hash.values()) and all(len(found) == 1 for found in by_text.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=50))
def test_groups_are_of_equal_hash_and_owner(items: list[tuple[int, int]]) -> None:
    grouped = flat.groups(
        flat.mixed(np.array([a for a, _ in items], np.uint64)), np.array([owner for _, owner in items], np.int64)
    )
    assert grouped.repeats().tolist() == [i for i, item in enumerate(items) if item in items[:i]]
    assert sorted(grouped.shared().tolist()) == [i for i, item in enumerate(items) if items.count(item) > 1]
    first, size = grouped.counted()
    counts = {items.index(item): items.count(item) for item in items if items.count(item) > 1}
    assert dict(zip(first.tolist(), size.tolist(), strict=True)) == counts


@settings(max_examples=30, deadline=None)
@given(st.text("aAbB ", max_size=40), st.sampled_from(["a", "ab", "aba", "b a", "aa"]))
def test_find(text: str, phrase: str) -> None:
    data = np.frombuffer(text.encode() + b"\n", np.uint8)
    for ignore in (False, True):
        searched = text.lower() if ignore else text
        wanted = [at for at in range(len(text)) if searched.startswith(phrase, at)]
        assert flat.find(data, phrase.encode(), ignore_case=ignore).tolist() == wanted
    marks = flat.spells(data, np.arange(-1, len(data)), phrase.encode())
    assert (np.flatnonzero(marks) - 1).tolist() == [at for at in range(len(text)) if text.startswith(phrase, at)]
