from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import record
from poise.data.dedup.contamination import SHORTEST, Decontaminate, Index

EVAL = "Which of these planets, seen from the Earth, is the brightest in the evening sky of June?"
SENTENCES = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


def filler(count: int, start: int = 0) -> str:
    return " ".join(f"word{start + i}" for i in range(count))


def slow_matches(evals: list[str], text: str, n: int) -> int:
    shortest, inside, alone = min(n, SHORTEST), set(), set()
    for each in evals:
        found = each.split()
        if len(found) >= n:
            inside |= {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}
        elif len(found) >= shortest:
            inside.add(tuple(found))
        elif found:
            alone.add(tuple(found))
    words = text.split()
    runs = [tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    return sum(run in inside for run in runs) + (tuple(words) in alone)


def test_a_single_shared_13_gram_is_found_whatever_case_and_punctuation() -> None:
    index = Index.of([EVAL])
    words = EVAL.lower().replace(",", "").rstrip("?").split()
    assert len(words) == 17
    thirteen = " -- ".join(words[2:15]).upper()
    twelve = " ".join(words[2:14])
    texts = pa.array(
        [
            f"{filler(50)} {thirteen} {filler(50)}",
            f"{filler(50)} {twelve} {filler(50)}",
            f"{filler(50)} {EVAL} {filler(50)}",
            filler(200),
            "",
            " ".join(words[:9]),  # with the next document it would make the text: runs do not cross documents
            " ".join(words[9:]),
        ]
    )
    assert index.matches(texts).tolist() == [1, 0, 5, 0, 0, 0, 0]


@given(evals=st.lists(SENTENCES, min_size=1, max_size=5), texts=st.lists(SENTENCES, max_size=8), n=st.integers(1, 11))
@settings(max_examples=80, deadline=None)
def test_matches_are_those_of_the_definition(evals: list[str], texts: list[str], n: int) -> None:
    if not any(evals):
        return
    index = Index.of(evals, n)
    assert index.texts + index.without_words == len(evals)
    assert index.matches(pa.array(texts, pa.string())).tolist() == [slow_matches(evals, text, n) for text in texts]


def test_short_texts_match_whole() -> None:
    index = Index.of(["Yes.", "the cat sat on the mat today again", "", "?!"])
    assert (index.texts, index.without_words) == (2, 2)
    texts = pa.array(
        ["yes", "YES!", "yes and no", "so the cat sat on the mat: today again.", "the cat sat on the mat today"]
    )
    assert index.matches(texts).tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("size", [13, 9])
@pytest.mark.parametrize("after", [-4, -1, 1, 20, 40])
def test_a_match_at_the_cut_of_a_long_document_counts_once(size: int, after: int) -> None:
    words = EVAL.rstrip("?").split()
    match = " ".join(words[:size])
    head = "filler " * (2**20 // 7 + 1)
    text = head[: 2**20 + after - len(match)] + " " + match + " filler" * 1000  # it ends about where the block does
    index = Index.of([" ".join(words[:13]), " ".join(words[:9])])
    assert index.matches(pa.array(["x", text, "y"])).tolist() == [0, 2 if size == 13 else 1, 0]


def test_a_run_does_not_go_on_from_a_long_document_into_the_next() -> None:
    words = EVAL.rstrip("?").split()
    texts = ["filler " * (2**20 // 7 + 1) + " ".join(words[:6]), " ".join(words[6:]), EVAL, "filler"]
    assert Index.of([EVAL]).matches(pa.array(texts)).tolist() == [0, 0, 5, 0]


def test_what_looks_alike_to_the_sieve_is_no_match() -> None:
    index = Index.of([EVAL])  # 5 of 65,536 places of the sieve are taken: of 140,000 n-grams about 10 pass it
    assert index.matches(pa.array([filler(70_000), filler(70_000, 70_000)])).tolist() == [0, 0]


def test_a_long_evaluation_text_is_indexed_whole() -> None:
    text = filler(140_000)
    assert len(text) > 2**20
    index = Index.of([text])
    assert {size: len(grams) for size, grams in index.inside.items()} == {13: 140_000 - 12}
    assert index.matches(pa.array([text])).tolist() == [140_000 - 12]


def test_the_stage_gives_a_reason_and_changes_nothing_else() -> None:
    stage = Decontaminate(Index.of([EVAL]), "planets")
    stage.index.matches(pa.array(["warm"]))  # what is made again on the other side is not sent
    sent = pickle.dumps(stage)
    assert len(sent) < 2000
    stage = pickle.loads(sent)
    rows = [
        {"text": text, "source": "s", "origin": "o", "offset": 0, "replaced_bytes": 0, "reason": reason}
        for text, reason in ((EVAL, "url"), (filler(20), None), (EVAL, None))
    ]
    batch = pa.RecordBatch.from_pylist(rows, record.RECORD_SCHEMA)
    out = stage(batch)
    assert out.column(record.REASON).to_pylist() == ["url", None, "contaminated.planets"]
    assert out.drop_columns([record.REASON]).equals(batch.drop_columns([record.REASON]))
    many = Decontaminate(stage.index, "planets", at_least=6)
    assert many(batch).column(record.REASON).to_pylist() == ["url", None, None]


def test_evaluation_files(tmp_path: Path) -> None:
    rows = [{"question": EVAL, "choices": ["Venus", {"deep": filler(14)}], "answer": 3}, {"question": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"q": filler(15, 100)}))
    pq.write_table(pa.table({"q": [filler(13, 200)], "n": [1]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(
        filler(13, 300) + "\n \n" + filler(6, 400) + "\n" + filler(7, 406), encoding="utf-8"
    )
    (tmp_path / "e.json").write_text(json.dumps([{"q": filler(13, 500)}]), encoding="utf-8")
    index = Index.read(tmp_path)
    assert index.texts == 8
    texts = [
        EVAL,
        "venus",
        filler(14),
        filler(15, 100),
        filler(13, 200),
        filler(13, 300),
        filler(13, 400),
        filler(13, 500),
    ]
    assert index.matches(pa.array(texts)).tolist() == [5, 1, 2, 3, 1, 1, 1, 1]
    assert Index.read(tmp_path / "c.parquet").matches(pa.array(texts)).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 2 evaluation texts holds a word"):
        Index.of(["", "..."])
    with pytest.raises(UserError, match="n is 0"):
        Index.of(["a"], n=0)
    with pytest.raises(UserError, match="no evaluation texts at"):
        Index.read(tmp_path / "missing")
    with pytest.raises(UserError, match="no evaluation texts at"):
        Index.read(tmp_path)
    for name, content in (
        ("a.jsonl", b"{broken"),
        ("a.jsonl.gz", gzip.compress(b"x" * 999)[:-9]),
        ("a.parquet", b"no"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as caught:
            Index.read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="must be one word"):
        Decontaminate(Index.of(["a"]), "two words")
    with pytest.raises(UserError, match="at_least is 0"):
        Decontaminate(Index.of(["a"]), "a", at_least=0)
