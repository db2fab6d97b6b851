"""Looking at prepared data, and leaving documents out of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import store
from poise.data.clean.features import FEATURES
from poise.data.look import browse, health, inspect, subset
from poise.data.tokens.periodic import REPEAT
from poise.data.tokens.tokenizer import Tokenizer, train
from poise.data.writer import SplitWriter, content_hash


class Doc(NamedTuple):
    text: str
    source: str = "notes"
    split: str = "train"
    compression: float = 2.0
    cluster_size: int = 1
    language: str | None = None


def write(folder: Path, docs: Sequence[Doc], tokenizer: Tokenizer) -> Path:
    """Write prepared data as the pipeline would; documents of 40 tokens and more have a repeat at tokens 5 .. 24."""
    folder.mkdir()
    (folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    writers = {name: SplitWriter(folder, name, np.dtype("<u2")) for name in store.SPLITS}
    names = list(dict.fromkeys(doc.source for doc in docs))
    sources: list[dict[str, Any]] = []
    for name in names:
        splits = {}
        for side, writer in writers.items():
            before = writer.counts()
            for number, doc in enumerate(docs):
                if (doc.source, doc.split) == (name, side):
                    _add(writer, doc, f"{name}/{number}.txt", tokenizer)
            after = writer.counts()
            splits[side] = {key: after[key] - before[key] for key in ("documents", "tokens", "bytes")}
        sources.append({"name": name, "description": name, "files": 1, "splits": splits})
    for writer in writers.values():
        writer.close()
    store.seal(
        folder,
        {
            "source": {"name": "+".join(names), "description": "made", "files": 1, "fingerprint": "0" * 32},
            "sources": sources,
            "settings": {},
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text, "hash": "0"},
            "dtype": "uint16",
            "splits": {name: dict(writer.counts()) for name, writer in writers.items()},
            "dropped": {"gopher.words": {"documents": 3, "bytes": 30}},
            "replaced_bytes": 0,
            "skipped": {},
        },
    )
    return folder


def _add(writer: SplitWriter, doc: Doc, origin: str, tokenizer: Tokenizer) -> None:
    ids = np.append(tokenizer.encode([doc.text])[0], tokenizer.end_of_text).astype(np.uint16)
    row = {
        "token_length": len(ids),
        "content_hash": content_hash(doc.text),
        "source": doc.source,
        "origin": origin,
        "offset": 0,
        "bytes": len(doc.text.encode()),
        "replaced_bytes": 0,
        "cluster_size": doc.cluster_size,
        "language": doc.language,
        "scores": {"compression": doc.compression},
    }
    repeats = np.array([(5, 20, 10, 2, False)] if len(ids) >= 40 else [], REPEAT)
    schema = pa.schema([field for field in store.DOCUMENT_SCHEMA if field.name in row])
    batch = pa.RecordBatch.from_pylist([row], schema)
    writer.add_block(ids, batch, repeats)


WORDS = ["loss", "gradient", "step", "weight", "norm", "layer", "token", "batch", "spike", "rate", "naïve", "日本語"]


def corpus() -> list[Doc]:
    rng = np.random.default_rng(0)
    docs = []
    for number in range(24):
        text = f"document {number}: " + " ".join(rng.choice(WORDS, int(rng.integers(5, 60))))
        docs.append(
            Doc(
                text + ("\nneedle in line two" if number == 7 else "") + (" Größe 7.5" if number % 5 == 0 else ""),
                source="web" if number % 3 == 0 else "books",
                split="val" if number % 6 == 5 else "train",
                compression=1.0 + number / 10,
                cluster_size=1 + number % 4,
                language="en" if number % 2 else None,
            )
        )
    return docs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([doc.text for doc in corpus()], 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write(tmp_path_factory.mktemp("inspect") / "made", corpus(), tokenizer)


def in_order(docs: Sequence[Doc]) -> dict[str, list[Doc]]:
    """Return the documents of each split in the order in which they are written."""
    names = list(dict.fromkeys(doc.source for doc in docs))
    return {side: [d for name in names for d in docs if (d.source, d.split) == (name, side)] for side in store.SPLITS}


def test_a_document_is_shown_with_its_very_text_and_what_is_known_of_it(folder: Path) -> None:
    placed = in_order(corpus())
    for place, doc in [("3", placed["train"][3]), ("val:1", placed["val"][1])]:
        shown = browse.document(folder, place)
        assert (shown.text, shown.source, shown.split) == (doc.text, doc.source, doc.split)
        assert shown.bytes == len(doc.text.encode())
        assert shown.facts["scores"] == {"compression": pytest.approx(doc.compression, abs=1e-3)}
        assert shown.facts["content_hash"] == content_hash(doc.text).hex()
        assert shown.facts.get("language") == doc.language
        json.dumps(shown.as_dict())


@pytest.mark.parametrize("place", ["20", "val:4", "test:1", "-1", "", "x", "1.5"])
def test_a_document_that_is_not_there_is_one_clear_line(folder: Path, place: str) -> None:
    with pytest.raises(UserError, match="document"):
        browse.document(folder, place)


def test_a_sample_depends_on_the_seed_alone_and_has_no_document_twice(folder: Path) -> None:
    places = [(s.split, s.document) for s in browse.sample(folder, 10, seed=1)]
    assert places == [(s.split, s.document) for s in browse.sample(folder, 10, seed=1)]
    assert places != [(s.split, s.document) for s in browse.sample(folder, 10, seed=2)]
    assert len(set(places)) == 10
    everything = browse.sample(folder, 1000)
    placed = in_order(corpus())
    assert [s.text for s in everything] == [d.text for side in store.SPLITS for d in placed[side]]
    with pytest.raises(UserError, match="1 or more"):
        browse.sample(folder, 0)


def test_search_finds_what_a_loop_over_the_texts_finds(folder: Path) -> None:
    placed = in_order(corpus())
    for query in ("naïve", "日本語", "loss", "document 7:", "zzz"):
        expected = [
            (side, n, d.text.count(query), d.text.find(query))
            for side in store.SPLITS
            for n, d in enumerate(placed[side])
            if query in d.text
        ]
        assert [(h.split, h.document, h.count, h.character) for h in browse.search(folder, query)] == expected, query
    (hit,) = browse.search(folder, "needle")
    assert hit.line == 2 and "⏎[[needle]] in line two" in hit.excerpt


def test_search_does_not_find_across_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = write(tmp_path / "made", [Doc("ends with loss"), Doc("norm begins"), Doc("loss norm")], tokenizer)
    assert [h.document for h in browse.search(made, "lossnorm")] == []
    assert [h.document for h in browse.search(made, "lossnor")] == []
    assert [h.document for h in browse.search(made, "loss norm")] == [2]


def test_search_by_regular_expression(folder: Path) -> None:
    hits = list(browse.search(folder, r"/GRÖSSE|größe (\d\.\d)/i"))
    assert len(hits) == 5 and all("[[Größe 7.5]]" in hit.excerpt for hit in hits)
    assert not list(browse.search(folder, r"/GRÖSSE (\d\.\d)/"))
    for query in ("/(/", ""):
        with pytest.raises(UserError, match="regular expression"):
            list(browse.search(folder, query))


def test_a_tokenizer_whose_ids_do_not_simply_join_is_asked_itself(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"<|endoftext|>": 0, "[UNK]": 1, "hel": 2, "##lo": 3, "world": 4}
    inner = Inner(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made = write(tmp_path / "made", [Doc("hello world"), Doc("world hello hello")], Tokenizer(inner))
    assert [s.text for s in browse.sample(made, 9)] == ["hello world", "world hello hello"]
    assert [h.document for h in browse.search(made, "lo world")] == [0]


def test_ranked_by_a_column_ties_in_their_order(folder: Path) -> None:
    most = browse.ranked(folder, "compression", count=3)
    assert [round(s.facts["scores"]["compression"], 1) for s in most] == [3.3, 3.2, 3.1]
    least = browse.ranked(folder, "scores.compression", count=2, largest=False)
    assert [round(s.facts["scores"]["compression"], 1) for s in least] == [1.0, 1.1]
    tied = [
        (s.split, s.document) for s in browse.ranked(folder, "cluster_size", count=24) if s.facts["cluster_size"] == 4
    ]
    assert len(tied) == 6 and tied == sorted(tied)
    with pytest.raises(UserError, match="did not run"):
        browse.ranked(folder, "repeat_count")


def test_unknown_columns_are_named_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"scores\.compression"):
        inspect.histogram(folder, "scores.compresion")


def test_histograms_count_every_document_once(folder: Path) -> None:
    docs = corpus()
    facts = inspect.histogram(folder, "bytes")
    assert sum(facts["counts"]) == facts["documents"] == len(docs)
    sizes = [len(d.text.encode()) for d in docs]
    assert (facts["edges"][0], facts["edges"][-1]) == (min(sizes), max(sizes))
    small = inspect.histogram(folder, "cluster_size")
    assert small["edges"] == [1, 2, 3, 4, 5] and small["counts"] == [6, 6, 6, 6]
    words = inspect.histogram(folder, "source")
    assert words["values"] == [["books", 16], ["web", 8]] and words["others"] == 0
    known = inspect.histogram(folder, "language")
    assert known["values"] == [["en", 12]] and known["missing"] == 12
    lines = inspect.bars(known)
    assert len(lines) == 2 and lines[1].startswith("(not known)") and "50.0%" in lines[0]
    json.dumps([facts, small, words, known])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 10**9), st.floats(-1e6, 1e6)), min_size=1, max_size=60), st.integers(1, 30))
def test_bins_of_any_numbers_hold_them_all(values: list[float], bins: int) -> None:
    facts = inspect._of_numbers(np.array(values, np.float64), bins)
    assert sum(facts["counts"]) == len(values)
    assert len(facts["edges"]) == len(facts["counts"]) + 1 and facts["edges"] == sorted(facts["edges"])
    assert len(inspect.bars({"missing": 0, **facts})) == len(facts["counts"])


RULES = [
    ("scores.compression<1.5", lambda d, n: np.float32(d.compression) < 1.5),
    ("compression>=3", lambda d, n: np.float32(d.compression) >= 3),
    ("cluster_size>2", lambda d, n: d.cluster_size > 2),
    ("cluster_size=1,3", lambda d, n: d.cluster_size in (1, 3)),
    ("cluster_size!=1", lambda d, n: d.cluster_size != 1),
    ("source=web & cluster_size<3", lambda d, n: d.source == "web" and d.cluster_size < 3),
    ("source!=web,none", lambda d, n: d.source != "web"),
    ("origin~books/", lambda d, n: d.source == "books"),
    ("origin!~/^BOOKS/i", lambda d, n: d.source != "books"),
    ("document=1,val:0", lambda d, n: (d.split, n) in (("train", 1), ("val", 0))),
    ("split=val & document<2", lambda d, n: d.split == "val" and n < 2),
    ("language=en", lambda d, n: d.language == "en"),
    ("language!=de", lambda d, n: d.language == "en"),  # where it is not known, nothing matches
    ("text~Größe", lambda d, n: "Größe" in d.text),
    ("text~/document 1\\d:/", lambda d, n: d.text.startswith("document 1") and d.text[10] != ":"),
]


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=[rule for rule, _ in RULES])
def test_rules_match_what_they_say(folder: Path, rule: str, expected: Any) -> None:
    found = subset.matching(folder, rule)
    for side, docs in in_order(corpus()).items():
        assert found[side].tolist() == [bool(expected(doc, n)) for n, doc in enumerate(docs)], side


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("compression", "no rule"),
        ("<3", "no rule"),
        ("bytes<", "no rule"),
        ("bytes<many", "no number"),
        ("bytes<1,2", "one number"),
        ("bytes~3", "holds numbers"),
        ("source<a", "holds text"),
        ("sorce=web", "source"),
        ("origin~/(/", "regular expression"),
        ("document=99", "no document"),
        ("text=a", "text~a"),
        ("bytes<1", "matches no document"),
        ("bytes>0", "nothing would be left"),
    ],
)
def test_bad_rules_are_one_line_and_write_nothing(folder: Path, tmp_path: Path, rule: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        subset.drop(folder, [rule], tmp_path / "out")
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def _dropped_by(folder: Path, rules: Sequence[str]) -> list[bool]:
    return np.any([subset.matching(folder, rule)["train"] for rule in rules], axis=0).tolist()  # type: ignore[no-any-return]


def test_dropping_copies_the_rest_token_by_token(folder: Path, tmp_path: Path) -> None:
    rules = ["cluster_size>3", "document=0,val:1", "text~needle"]
    before = store.open_tokens(folder)
    manifest = subset.drop(folder, rules, tmp_path / "out")
    after = store.verify(tmp_path / "out")
    left_over = [d.compression for d in in_order(corpus())["train"]]
    best = max(d for d, row in zip(left_over, _dropped_by(folder, rules), strict=True) if not row)
    assert manifest["quantiles"]["compression"][-1] == pytest.approx(best, abs=1e-3)
    assert after.manifest == manifest and after.fingerprint != before.fingerprint
    gone = {name: np.zeros(len(before.split(name).index.lengths), bool) for name in store.SPLITS}
    for rule in rules:
        for name, chosen in subset.matching(folder, rule).items():
            gone[name] |= chosen
    for name in store.SPLITS:
        old, new = before.split(name), after.split(name)
        left = np.flatnonzero(~gone[name])
        assert new.table.num_rows == len(left)
        for number, was in enumerate(left.tolist()):
            assert np.array_equal(new.document_tokens(number), old.document_tokens(was))
            row, past = new.table.slice(number, 1).to_pylist()[0], old.table.slice(was, 1).to_pylist()[0]
            start = int(old.index.lengths[left[:number]].sum())
            assert row == {**past, "token_start": start}
            begins = new.repeats["start"]
            count = int(((begins >= start) & (begins < start + row["token_length"])).sum())
            assert count == (row["token_length"] >= 40)
        ends = new.repeats["start"] + new.repeats["length"]
        spans = [new.tokens[a:b].tolist() for a, b in zip(new.repeats["start"], ends, strict=True)]
        kept = [
            r for r in old.repeats if not gone[name][np.searchsorted(old.table["token_start"], r["start"], "right") - 1]
        ]
        assert len(kept) == len(spans) > 0
        assert spans == [old.tokens[r["start"] : r["start"] + r["length"]].tolist() for r in kept]
        assert sum(span.tokens for span in new.sources) == len(new.tokens)
        for span in new.sources:
            names = new.table["source"][span.document_start : span.document_start + span.documents].to_pylist()
            assert set(names) <= {span.name}
            assert all(new.table["token_start"][span.document_start].as_py() == span.token_start for _ in names[:1])


def test_what_was_dropped_is_kept_with_its_reason(folder: Path, tmp_path: Path) -> None:
    manifest = subset.drop(folder, ["cluster_size>3", "source=web"], tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "dropped" / "00000.parquet")
    docs = corpus()
    first = [d for d in docs if d.cluster_size > 3]
    second = [d for d in docs if d.cluster_size <= 3 and d.source == "web"]
    reasons = dict(zip(table["text"].to_pylist(), table["reason"].to_pylist(), strict=True))
    assert reasons == {d.text: "inspect.cluster_size>3" for d in first} | {d.text: "inspect.source=web" for d in second}
    sizes = [sum(len(d.text.encode()) for d in side) for side in (first, second)]
    assert manifest["dropped"] == {
        "inspect.cluster_size>3": {"documents": len(first), "bytes": sizes[0]},
        "inspect.source=web": {"documents": len(second), "bytes": sizes[1]},
    }
    (step,) = manifest["derived"]
    # The made folder says that a filter took three, and does not have them.
    assert step["not_kept"] == {"gopher.words": {"documents": 3, "bytes": 30}}
    assert step["fingerprint"] == store.open_tokens(folder).fingerprint and step["rules"][0]["rule"] == "cluster_size>3"
    again = subset.drop(tmp_path / "out", ["compression>3"], tmp_path / "again")
    assert [each["rules"][0]["rule"] for each in again["derived"]] == ["cluster_size>3", "compression>3"]
    assert all("not_kept" not in each for each in again["derived"][1:])
    assert again["source"]["fingerprint"] not in (manifest["source"]["fingerprint"], "0" * 32)


def test_the_folder_that_is_read_is_never_written_to(folder: Path, tmp_path: Path) -> None:
    for out in (folder, folder / "inside", folder.parent):
        with pytest.raises(UserError, match="another folder"):
            subset.drop(folder, ["bytes<200"], out)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="other files"):
        subset.drop(folder, ["bytes<200"], tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    store.verify(folder)


def test_describe_counts_sources_and_what_was_left_out(folder: Path) -> None:
    facts = inspect.describe(folder)
    assert facts["documents"] == 24 and set(facts["sources"]) == {"web", "books"}
    assert sum(facts["sources"][name][side]["documents"] for name in ("web", "books") for side in store.SPLITS) == 24
    assert facts["dropped"]["gopher.words"]["documents"] == 3
    json.dumps(facts)


def test_every_score_is_a_column(folder: Path) -> None:
    names = inspect.column_names(store.open_tokens(folder).split("train"))
    assert {f"scores.{name}" for name in FEATURES} <= set(names)


def lies_in(folder: Path) -> dict[str, dict[str, int]]:
    """Count what was left out, by reason."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted((folder / store.DROPPED).iterdir()):
        for row in pq.read_table(path, columns=["reason", "bytes"]).to_pylist():
            facts = found.setdefault(row["reason"], {"documents": 0, "bytes": 0})
            facts["documents"], facts["bytes"] = facts["documents"] + 1, facts["bytes"] + row["bytes"]
    return found


@pytest.mark.parametrize("links", [True, False])
def test_nothing_that_was_dropped_before_is_lost(
    cleaned: store.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    first = lies_in(cleaned.dir)
    assert first == cleaned.manifest["dropped"]
    # The same rule twice in a row, and one whose documents an earlier one took.
    once = subset.drop(cleaned.dir, ["document=0", "document=0"], tmp_path / "once")
    twice = subset.drop(tmp_path / "once", ["document=0", "document=1,val:0"], tmp_path / "twice")
    assert lies_in(tmp_path / "once") == once["dropped"] and once["dropped"]["inspect.document=0"]["documents"] == 1
    assert lies_in(tmp_path / "twice") == twice["dropped"] and twice["dropped"]["inspect.document=0"]["documents"] == 2
    assert {reason: twice["dropped"][reason] for reason in first} == first
    assert len(list((tmp_path / "twice" / store.DROPPED).iterdir())) == 3
    store.verify(tmp_path / "twice")
    store.verify(cleaned.dir)


def test_damage_does_not_travel_into_a_derived_folder(cleaned: store.Tokens, tmp_path: Path) -> None:
    copy = shutil.copytree(cleaned.dir, tmp_path / "copy")
    for name in ("train.bin", "train.repeats.bin", "dropped/00000.parquet"):
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=f"damaged: the contents of {name} have changed"):
            subset.drop(copy, ["document=0"], tmp_path / "out")
        (copy / name).write_bytes(good)
    shutil.rmtree(copy / store.DROPPED)  # what was dropped may be removed
    manifest = subset.drop(copy, ["document=0"], tmp_path / "out")
    assert lies_in(tmp_path / "out") == manifest["dropped"]
    assert manifest["derived"][0]["not_kept"] == cleaned.manifest["dropped"]


def test_ids_counted_when_written_are_not_counted_again(
    cleaned: store.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset.drop(cleaned.dir, ["source=books"], tmp_path / "less")
    for folder in (cleaned.dir, tmp_path / "less"):
        known = inspect.describe(folder)
        seen = health.counts(store.open_tokens(folder))
        assert known["tokens_counted"] == known["tokens"] == seen.sum()
        assert known["ids_never_seen"] == (seen == 0).sum() > 0
        assert known["ids_seen_under_10_times"] == (seen < 10).sum()
    manifest = json.loads((tmp_path / "less" / store.MANIFEST).read_text())
    del manifest["vocabulary"]
    (tmp_path / "less" / store.MANIFEST).write_text(json.dumps(manifest))
    assert inspect.describe(tmp_path / "less") == known  # an older folder
    monkeypatch.setattr(health, "counts", lambda *_: pytest.fail("tokens were read"))
    inspect.describe(cleaned.dir)
