"""Figures of diversity against plain definitions."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import record, store
from poise.data.look import diversity
from poise.data.readers import Document
from poise.data.tokens.tokenizer import train
from poise.data.writer import SplitWriter, content_hash


def words_of(text: str) -> list[bytes]:
    return [word.lower() for word in re.findall(rb"[A-Za-z0-9\x80-\xff]+", text.encode())]


def plainly(texts: list[str], order: int) -> tuple[float | None, float | None]:
    """Return (distinct share, entropy in bits) of word n-grams by counting."""
    grams = [tuple(ws[i : i + order]) for ws in map(words_of, texts) for i in range(len(ws) - order + 1)]
    if not grams:
        return None, None
    counts = Counter(grams)
    entropy = -sum(c / len(grams) * math.log2(c / len(grams)) for c in counts.values())
    return len(counts) / len(grams), entropy


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "A", "b", "é", "x1", "ab", ".", "\n", "日本"]), max_size=12).map(" ".join),
        max_size=5,
    )
)
def test_n_grams_by_definition(texts: list[str]) -> None:
    figures = diversity.measure(texts)
    assert figures["words"] == sum(len(words_of(text)) for text in texts)
    for order in (1, 2, 3, 4):
        distinct, entropy = plainly(texts, order)
        assert figures[f"distinct_{order}"] == (None if distinct is None else pytest.approx(distinct, abs=1e-4))
        assert figures[f"entropy_{order}"] == (None if entropy is None else pytest.approx(entropy, abs=1e-4))


def test_word_order_matters_for_n_grams() -> None:
    assert diversity.measure(["a b b a"])["distinct_2"] == 1.0
    assert diversity.measure(["a b a b a"])["distinct_2"] == 0.5


def test_compression_is_bytes_over_gzip_bytes() -> None:
    texts = ["one two three " * 50, "four " * 20]
    whole = "\n".join(texts).encode()
    assert diversity.measure(texts)["compression"] == pytest.approx(len(whole) / len(gzip.compress(whole, 6)), abs=1e-3)


def test_type_token_is_a_mean_over_windows_and_does_not_fall_with_length() -> None:
    rng = np.random.default_rng(0)
    drawn = [f"w{n}" for n in rng.integers(0, 400, 3500)]
    expected = np.mean([len(set(drawn[i : i + 1000])) / 1000 for i in (0, 1000, 2000)])
    assert diversity.measure([" ".join(drawn)])["type_token"] == pytest.approx(expected, abs=1e-4)
    assert diversity.measure([" ".join(drawn[:999])])["type_token"] is None


def batches(rows: list[tuple[str, str]], reasons: list[str | None] | None = None) -> list[pa.RecordBatch]:
    batch = record.of([Document(text, source, str(n), 0, 0) for n, (text, source) in enumerate(rows)])
    if reasons:
        batch = record.set_column(batch, "reason", pa.array(reasons, pa.string()))
    return [batch]


def test_sources_are_apart_and_dropped_rows_left_out() -> None:
    rows = [("a b c", "web"), ("a b c", "web"), ("d e f", "books"), ("a b c", "books"), ("no no", "web")]
    facts = diversity.report(batches(rows, [None, None, None, None, "x.y"]))
    web, books = facts["sources"]["web"], facts["sources"]["books"]
    assert (web["documents"], web["duplicate_documents"], web["duplicate_share"]) == (2, 1, 0.5)
    assert (books["documents"], books["duplicate_documents"], books["near_duplicate_share"]) == (2, 0, None)
    assert web["bytes"] == 10 and "no effect on stability" in facts["note"]
    json.dumps(facts)
    lines = diversity.lines(facts)
    assert len(lines) == 4 and lines[1].startswith("web") and lines[-1] == facts["note"]


def test_the_sample_does_not_depend_on_order_and_is_bounded() -> None:
    rng = np.random.default_rng(1)
    rows = [(" ".join(f"w{n}" for n in rng.integers(0, 50, 40)), "s") for _ in range(60)]
    one = diversity.report(batches(rows), sample_bytes=2000)
    other = diversity.report([batch for row in reversed(rows) for batch in batches([row])], sample_bytes=2000)
    assert one == other
    figures = one["sources"]["s"]
    assert 1500 < figures["sampled_bytes"] < 2100 and figures["documents"] == 60


def test_a_folder_gives_what_its_text_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    known = [f"wort{n}" for n in range(40)] + ["naïve", "日本語"]
    rows = [(" ".join(rng.choice(known, 60)), source) for source in ("web", "books") for _ in range(30)]
    rows[3] = rows[2]
    tokenizer = train([text for text, _ in rows], 300)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    splits = {name: SplitWriter(folder, name, np.dtype("<u2")) for name in store.SPLITS}
    sources = [{"name": name, "splits": {}} for name in ("web", "books")]
    for source in sources:
        for side, writer in splits.items():
            before = writer.counts()
            for number, (text, of) in enumerate(rows):
                if of == source["name"] and (number % 5 == 4) == (side == "val"):
                    ids = np.append(tokenizer.encode([text])[0], tokenizer.end_of_text)
                    row = {"content_hash": content_hash(text), "source": of, "origin": "o", "offset": 0}
                    more = {"bytes": len(text.encode()), "replaced_bytes": 0, "cluster_size": 2 if number == 0 else 1}
                    writer.add(ids, row | more)
            source["splits"][side] = {k: writer.counts()[k] - before[k] for k in ("documents", "tokens", "bytes")}  # type: ignore[index]
    for writer in splits.values():
        writer.close()
    facts = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    counts = {name: dict(writer.counts()) for name, writer in splits.items()}
    store.seal(folder, {"source": {"description": "x"}, "sources": sources, "tokenizer": facts, "splits": counts})
    for limit in (1500, 10**6):
        of_folder = diversity.report(folder, sample_bytes=limit)["sources"]
        of_text = diversity.report(batches(rows), sample_bytes=limit)["sources"]
        assert of_folder["web"].pop("near_duplicate_share") == pytest.approx(1 / 30, abs=1e-6)
        assert of_folder["books"].pop("near_duplicate_share") == 0
        for name in ("web", "books"):
            assert of_text[name].pop("near_duplicate_share") is None
        assert of_folder == of_text
    assert of_text["web"]["duplicate_documents"] == 1


def test_nothing_to_report_on_is_one_line() -> None:
    with pytest.raises(UserError, match="no documents"):
        diversity.report(itertools.chain())
