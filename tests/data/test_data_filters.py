"""Rules, presets and the removal of lines."""

from __future__ import annotations

import inspect
import pickle
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import record
from poise.data.clean import lines
from poise.data.clean.features import FEATURES, SCORES, SCORES_TYPE, Score
from poise.data.clean.filters import Filter
from poise.data.clean.lines import CleanLines
from poise.data.clean.presets import HEAD, PRESETS, Rule, presets_page
from poise.data.readers import Document

GOOD_PAGE = (
    "The river comes down from the hills and turns to the west below the town. People have built mills along it since "
    "the year 1400, and some of them still stand.\n"
    "Below the last mill there is a bridge of stone with seven arches. It was made to carry the road that leads from "
    "the coast to the mines, and it has carried it ever since.\n"
    "In winter the water is high and brown. In summer children walk across it with their shoes in their hands.\n"
    "Nobody knows who named the river, but the name is old and means no more than water."
)
NUMBERS = "\n".join(" ".join(str(a * b) for a in range(2, 14)) for b in range(3, 90))
NOISE = {
    "one line over and over": "Buy now and save the most of all!\n" * 60,
    "numbers": NUMBERS,
    "base64": "".join(
        random.Random(0).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/", k=6000)
    ),
    "dots": "Chapter ........................................................ 12\n" * 40,
}


def batch_of(*texts: str) -> pa.RecordBatch:
    return record.of([Document(text, "s", "o", 0, 0, None, None) for text in texts])


def scored(**columns: list[float]) -> pa.RecordBatch:
    """Return a batch with given scores; all other features are 0."""
    size = len(next(iter(columns.values())))
    arrays = [pa.array(columns.get(name, [0.0] * size), pa.float32()) for name in FEATURES]
    texts = batch_of(*("abcd"[: 1 + row % 4] for row in range(size)))
    return record.set_column(texts, SCORES, pa.StructArray.from_arrays(arrays, fields=list(SCORES_TYPE)))


def reasons(batch: pa.RecordBatch) -> list[str | None]:
    found: list[str | None] = batch.column(record.REASON).to_pylist()
    return found


@pytest.mark.parametrize(("preset", "rule"), [(name, rule) for name, rules in PRESETS.items() for rule in rules])
def test_a_value_on_the_limit_is_kept_and_one_beyond_it_is_dropped(preset: str, rule: Rule) -> None:
    limits = [(limit, sign) for limit, sign in ((rule.at_least, -1), (rule.at_most, 1)) if limit is not None]
    for limit, sign in limits:
        edge = np.float32(limit)
        beyond = np.nextafter(edge, np.float32(sign * np.inf))
        found = reasons(Filter("own", (rule,))(scored(**{rule.feature: [float(edge), float(beyond)]})))
        assert found == [None, f"own.{rule.name}"]
    assert rule.why and preset in PRESETS


def test_a_share_of_three_tenths_is_not_over_0_3() -> None:
    text = "\n".join([*"abcdefg", "a", "b", "c"])
    assert Score()(batch_of(text)).column(SCORES)[0].as_py()["duplicate_lines"] > 0.3  # as a float32 it is
    assert reasons(Filter("own", (Rule("r", "duplicate_lines", at_most=0.3),))(batch_of(text))) == [None]


def limits_of(preset: str) -> dict[str, tuple[float | None, float | None]]:
    return {rule.feature: (rule.at_least, rule.at_most) for rule in PRESETS[preset]}


def test_published_thresholds() -> None:
    assert limits_of("gopher") == {
        "words": (50, 100_000),
        "mean_word_length": (3, 10),
        "hash_ratio": (None, 0.1),
        "ellipsis_ratio": (None, 0.1),
        "bullet_lines": (None, 0.9),
        "ellipsis_lines": (None, 0.3),
        "alpha_words": (0.8, None),
        "stop_words": (2, None),
    }
    table = {"duplicate_lines": 0.3, "duplicate_paragraphs": 0.3}
    table |= {"duplicate_line_chars": 0.2, "duplicate_paragraph_chars": 0.2}
    table |= {"top_2gram": 0.2, "top_3gram": 0.18, "top_4gram": 0.16}
    table |= {f"duplicate_{n}grams": round(0.2 - n / 100, 2) for n in range(5, 11)}
    assert limits_of("gopher_repetition") == {feature: (None, limit) for feature, limit in table.items()}
    assert limits_of("c4") == {"lorem_ipsum": (None, 0), "curly_brackets": (None, 0), "sentences": (5, None)}
    assert limits_of("fineweb") == {
        "terminal_lines": (0.12, None),
        "short_lines": (None, 0.67),
        "duplicate_line_text": (None, 0.01),
        "newlines_per_word": (None, 0.3),
    }
    assert PRESETS["web"] == PRESETS["gopher_repetition"] + PRESETS["gopher"] + PRESETS["c4"] + PRESETS["fineweb"]


@pytest.mark.parametrize("preset", ["web", "books", "manuals"])
def test_presets_keep_good_text_and_drop_noise(preset: str) -> None:
    batch = Filter(preset)(batch_of(GOOD_PAGE, *NOISE.values()))
    found = dict(zip(["good", *NOISE], reasons(batch), strict=True))
    assert found.pop("good") is None
    assert all(reason is not None and reason.startswith(f"{preset}.") for reason in found.values()), found


def test_the_code_preset_keeps_this_pythons_sources() -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]
    texts = [text for text in texts if text.strip()][:120]
    kept = Counter(reasons(Filter("code")(batch_of(*texts))))
    assert kept[None] >= 0.95 * len(texts) and len(texts) > 50
    minified = inspect.cleandoc("var a=function(b){return b.c(d)};") * 200
    generated = "  { 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07 },\n" * 500
    assert None not in reasons(Filter("code")(batch_of(minified, generated, "x")))


def test_the_first_rule_that_fails_is_the_reason_and_an_earlier_reason_stays() -> None:
    rules = (Rule("long", "words", at_most=5), Rule("digits", "digits", at_most=0.5))
    batch = scored(words=[9, 9, 1, 1, 9], digits=[1, 0, 1, 0, 1])
    batch = record.drop(batch, np.array([False, False, False, False, True]), "url")
    stage = pickle.loads(pickle.dumps(Filter("own", rules)))
    would = stage.would_drop(batch)
    after = stage(batch)
    assert reasons(after) == ["own.long", "own.long", "own.digits", None, "url"]
    assert would == {"own.long": (2, 3), "own.digits": (1, 3)}  # texts of 1, 2, 3, 4 and 1 bytes
    assert after.drop_columns([record.REASON]).equals(batch.drop_columns([record.REASON]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([GOOD_PAGE, "short.", *NOISE.values(), GOOD_PAGE + "{"]), max_size=6))
def test_what_would_be_dropped_is_what_is_dropped(texts: list[str]) -> None:
    batch = Score()(batch_of(*texts))
    for preset in PRESETS:
        stage = Filter(preset)
        would = {reason: count for reason, (count, _) in stage.would_drop(batch).items() if count}
        assert would == Counter(reason for reason in reasons(stage(batch)) if reason is not None)


def test_a_missing_score_is_computed() -> None:
    batch = batch_of(GOOD_PAGE, "short.")
    assert Filter("web")(batch).equals(Filter("web")(Score()(batch)))
    assert Filter("web").would_drop(batch) == Filter("web").would_drop(Score()(batch))
    assert SCORES not in batch.schema.names


def test_no_documents() -> None:
    batch = batch_of()
    assert Filter("web")(batch).num_rows == 0
    assert CleanLines()(batch).num_rows == 0
    assert set(Filter("web").would_drop(batch).values()) == {(0, 0)}
    assert CleanLines().would_remove(batch) == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Filter("gofer"), "no filter preset 'gofer', did you mean 'gopher'?; there are gopher, "),
        (lambda: Filter("web", (Rule("a", "words", at_least=1),)), "'web' has rules of its own"),
        (lambda: Filter("own", (Rule("a", "words", at_least=1),) * 2), "two rules 'a'"),
        (lambda: Rule("a", "wrods", at_least=1), "no feature 'wrods', did you mean 'words'?"),
        (lambda: Rule("a", "words"), "has no limit"),
        (lambda: Rule("a", "words", at_least=2, at_most=1), "at_least 2 is over at_most 1"),
        (lambda: CleanLines(min_words=0), "min_words is 0"),
        (lambda: CleanLines(max_word=0), "max_word is 0"),
    ],
)
def test_mistakes_are_one_line(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_has_every_rule_once() -> None:
    rows = presets_page().splitlines()[2:]
    assert len(rows) == sum(map(len, PRESETS.values()))
    assert all(row.count(" | ") == 4 for row in rows)
    assert any("`stop_words`" in row and "at least 2" in row and "2112.11446" in row for row in rows)


# Lines.

CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")


def cleaned(text: str, stage: CleanLines) -> str:
    """Return what the stage makes of a text, from the rules' definitions."""
    kept = []
    for line in (CITATION.sub("", text) if stage.citations else text).split("\n"):
        line = line.strip()
        lower = line.lower()
        bad = len(line.split()) < stage.min_words
        bad |= any(len(word) > stage.max_word for word in line.split())
        bad |= stage.terminal and (not line.endswith((".", "?", "!", '"', "'", "”", "’", "。")) or line.endswith("..."))
        bad |= stage.javascript and "javascript" in lower
        bad |= stage.policy and any(phrase in lower for phrase in lines.POLICY)
        kept += [] if bad else [line]
    return "\n".join(kept)


LINES = [
    "This line is a sentence.",
    "This one is none",
    "Too short.",
    "  Spaces around it go away!  ",
    "It ends with dots...",
    "Please enable JavaScript to read on.",
    "See our Privacy Policy for more of it.",
    "This site uses cookies. Does it?",
    "He wrote of naïve Größen “in quotes.”",
    "Cited[12] facts[] are[edit] here.[citation needed]",
    "A citation ends this line. [3]",
    "[1] [2] [x] [12a] ] [ stays odd.",
    "A " + "w" * 30 + " of thirty characters.",
    "Ein Wort aus " + "é" * 20 + " ist kürzer.",
    "日本語 の 文 です。",
    "",
    "   ",
    "[7]",
]
STAGES = [
    CleanLines(),
    CleanLines(max_word=25, min_words=5),
    CleanLines(terminal=False, min_words=1),
    CleanLines(terminal=False, citations=False, policy=False, javascript=False, max_word=29),
]


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from(LINES), max_size=8).map("\n".join), max_size=5))
def test_lines_are_removed_as_defined(stage: CleanLines, texts: list[str]) -> None:
    batch = batch_of(*texts)
    after = pickle.loads(pickle.dumps(stage))(batch)
    wanted = [cleaned(text, stage) for text in texts]
    for row, (old, new) in enumerate(zip(texts, wanted, strict=True)):
        empty = bool(old) and not new
        assert after.column("text")[row].as_py() == (old if empty else new)
        assert after.column("removed_bytes")[row].as_py() == (0 if empty else len(old.encode()) - len(new.encode()))
        assert after.column(record.REASON)[row].as_py() == (lines.EMPTY if empty else None)


def test_rows_with_a_reason_keep_their_text() -> None:
    batch = record.drop(batch_of("no sentence\nThis is a sentence.", "no sentence"), np.array([True, True]), "url")
    after = CleanLines()(batch)
    assert after.column("text").equals(batch.column("text"))
    assert reasons(after) == ["url", "url"] and after.column("removed_bytes").to_pylist() == [0, 0]
    assert after.schema.field("text") == batch.schema.field("text")


def test_what_would_be_removed() -> None:
    batch = batch_of("\n".join(LINES[:8]), "Nothing to remove here.", LINES[9])
    assert {name: found for name, found in CleanLines().would_remove(batch).items() if found[0]} == {
        "terminal": (2, len(LINES[1]) + len(LINES[4])),
        "min_words": (1, len(LINES[2])),
        "javascript": (1, len(LINES[5])),
        "policy": (2, len(LINES[6]) + len(LINES[7])),
        "citations": (4, len("[12][][edit][citation needed]")),
    }


def test_long_documents_are_cleaned_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    monkeypatch.setattr(lines.flat, "CHUNK_BYTES", 50)
    rng = random.Random(0)
    for _ in range(50):
        made = [rng.choice(LINES[:9]) for _ in range(rng.randrange(1, 12))]
        text = "\n".join(made) + rng.choice(["", "\n"])
        after = CleanLines()(batch_of("A first document is here.", text, "A last document is here."))
        wanted = cleaned(text, CleanLines()) or text
        assert after.column("text").to_pylist()[1] == wanted
    long = "word " * 30 + "end."
    stage = CleanLines()
    after = stage(batch_of(f"A line comes before.\n{long}\nA line comes after.", long))
    assert after.column("text")[0].as_py() == "A line comes before.\nA line comes after."
    assert reasons(after) == [None, lines.EMPTY]
    assert stage.would_remove(batch_of(f"A line comes before.\n{long}\nA line comes after."))["longest_line"] == (
        1,
        len(long) + 1,
    )


def test_the_page_of_filters_is_up_to_date() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "filters.md").read_text(encoding="utf-8")
    assert page == HEAD + presets_page(), "run: python -m poise.data.clean.presets docs/filters.md"
