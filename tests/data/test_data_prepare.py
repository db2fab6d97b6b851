from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import socket
import time
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poise.core.errors import UserError
from poise.data import assemble, record, store, writer
from poise.data.clean.features import features
from poise.data.clean.pii import PLACEHOLDERS
from poise.data.dedup.exact import hashes
from poise.data.judge import held_out
from poise.data.prepare import default_dir, prepare
from poise.data.settings import Settings
from poise.data.store import Tokens, open_tokens, verify
from poise.data.tokens import periodic
from poise.data.tokens.augment import SENTINELS
from poise.data.tokens.tokenizer import load

if TYPE_CHECKING:
    from tests.data.conftest import Dirty


def texts_of(tokens: Tokens, split: str) -> list[str]:
    opened, tokenizer = tokens.split(split), load(tokens.tokenizer_path)
    out = []
    for number in range(opened.table.num_rows):
        ids = opened.document_tokens(number)
        assert ids[-1] == tokens.end_of_text
        out.append(tokenizer.decode(ids[:-1]))
    return out


def make(folder: Path, **kwargs: Any) -> Tokens:
    return open_tokens(prepare(str(folder), folder.parent / "out", Settings(**{"vocab_size": 300, **kwargs})).dir)


def fails(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        prepare(*args, settings=Settings(**kwargs))
    assert "\n" not in str(error.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(corpus: Path, tokens: Tokens) -> None:
    expected = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    train, val = texts_of(tokens, "train"), texts_of(tokens, "val")
    assert len(train) + len(val) == len(expected) == 24
    assert {*train, *val} == expected
    assert val and len(train) > len(val)
    facts = tokens.manifest["splits"]
    for name, texts in (("train", train), ("val", val)):
        split = tokens.split(name)
        assert facts[name] == {
            "documents": len(texts),
            "tokens": len(split.tokens),
            "bytes": sum(len(text.encode()) for text in texts),
        }
        assert split.tokens.dtype == np.dtype("<u2")
        assert int(split.tokens.max()) < tokens.vocab_size == 320


def test_documents_table_names_every_document(corpus: Path, tokens: Tokens) -> None:
    for name in ("train", "val"):
        rows = tokens.split(name).table.to_pylist()
        for row, text in zip(rows, texts_of(tokens, name), strict=True):
            assert (corpus / row["origin"]).read_text(encoding="utf-8") == text
            assert row["content_hash"] == writer.content_hash(text)
            assert (row["source"], row["offset"], row["bytes"]) == ("notes", 0, len(text.encode()))
        assert [row["origin"] for row in rows] == sorted(row["origin"] for row in rows)


def test_two_runs_write_the_same_bytes(corpus: Path, tokens: Tokens, tmp_path: Path) -> None:
    again = prepare(str(corpus), tmp_path / "again", Settings(vocab_size=320, val_fraction=0.25))
    assert names(again.dir) == {*store.FILES, store.MANIFEST}
    for name in names(again.dir):
        assert (again.dir / name).read_bytes() == (tokens.dir / name).read_bytes(), name
    assert verify(again.dir).fingerprint == tokens.fingerprint


def test_the_same_input_again_does_nothing(corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "notes")
    out = tmp_path / "out"
    first = prepare(str(folder), out, Settings(vocab_size=300))
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    second = prepare(str(folder), out, Settings(vocab_size=300))
    assert (first.reused, second.reused) == (False, True)
    assert second.manifest == first.manifest
    assert {name: (out / name).stat().st_mtime_ns for name in names(out)} == before
    # Any change of the input or the settings makes it anew.
    (folder / "new.txt").write_text("a new document")
    third = prepare(str(folder), out, Settings(vocab_size=300))
    assert not third.reused
    assert third.manifest["splits"]["train"]["documents"] == first.manifest["splits"]["train"]["documents"] + 1
    assert not prepare(str(folder), out, Settings(vocab_size=301)).reused
    assert not prepare(str(folder), out, Settings(vocab_size=301, seed=1)).reused
    assert names(tmp_path) == {"notes", "out"}


def test_damaged_data_is_made_again(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", Settings(vocab_size=300)).dir
    os.truncate(out / "train.bin", 10)
    assert not prepare(str(corpus), out, Settings(vocab_size=300)).reused
    verify(out)


def test_prepared_data_as_a_source_is_opened(tokens: Tokens, tmp_path: Path) -> None:
    found = prepare(str(tokens.dir), tmp_path / "unused", Settings(vocab_size=999))
    assert (found.dir, found.reused) == (tokens.dir, True)
    assert not (tmp_path / "unused").exists()
    assert default_dir(str(tokens.dir), Settings()) == tokens.dir


def test_prepared_data_inside_its_source_is_not_read_as_text(corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "notes")
    assert not prepare(str(folder), folder / "ready", Settings(vocab_size=300)).reused
    assert prepare(str(folder), folder / "ready", Settings(vocab_size=300)).reused


def test_equal_texts_are_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"text number {number % 20}")
    tokens = make(folder, vocab_size=260, val_fraction=0.4)
    train, val = texts_of(tokens, "train"), texts_of(tokens, "val")
    assert len(train) + len(val) == 60
    assert len(set(train)) * 3 == len(train) and len(set(val)) * 3 == len(val)
    assert not set(train) & set(val)
    assert 3 <= len(set(val)) <= 14  # 8 of 20 expected


def test_the_seed_chooses_the_held_out_documents(corpus: Path, tmp_path: Path) -> None:
    held = []
    for seed in (0, 1):
        opened = prepare(str(corpus), tmp_path / str(seed), Settings(vocab_size=300, val_fraction=0.3, seed=seed))
        held.append(set(texts_of(open_tokens(opened.dir), "val")))
    assert held[0] != held[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [1e-9, 0.5])
def test_two_texts_have_both_sides(tmp_path: Path, seed: int, fraction: float) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "a.txt").write_text("first text")
    (folder / "b.txt").write_text("second text")
    (folder / "c.txt").write_text("first text")
    tokens = make(folder, vocab_size=257, val_fraction=fraction, seed=seed)
    verify(tokens.dir)
    sides = [set(texts_of(tokens, name)) for name in ("train", "val")]
    assert sorted(len(side) for side in sides) == [1, 1]
    assert sides[0] | sides[1] == {"first text", "second text"}
    assert not list(tokens.dir.glob("again"))


def test_moving_a_text_keeps_the_others_in_order(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", Settings(vocab_size=300, val_fraction=1e-12)).dir
    tokens = verify(out)
    train, val = texts_of(tokens, "train"), texts_of(tokens, "val")
    assert (len(train), len(val)) == (23, 1)
    origins = [row["origin"] for row in tokens.split("train").table.to_pylist()]
    assert origins == sorted(origins)
    starts = tokens.split("train").table["token_start"].to_numpy()
    assert np.array_equal(starts, tokens.split("train").index.pointers // 2)
    # The choice is by hash: it stays when other, larger keys come and go.
    keys, _ = held_out(hashes(pa.array(train + val)), 1e-12, 0)
    assert (train + val)[int(keys.argmin())] == val[0]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5])
def test_one_document_is_for_training(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "a.txt").write_text("only text")
    out = prepare(str(tmp_path / "a.txt"), tmp_path / "out", Settings(vocab_size=257, val_fraction=fraction)).dir
    tokens = verify(out)
    assert texts_of(tokens, "train") == ["only text"]
    assert texts_of(tokens, "val") == []


def test_no_held_out_part_if_none_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", Settings(vocab_size=300, val_fraction=0)).dir
    assert open_tokens(out).manifest["splits"]["val"] == {"documents": 0, "tokens": 0, "bytes": 0}


def test_replaced_and_skipped_are_in_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"bad \xff\xfe byte" * 3)
    (folder / "b.bin").write_bytes(b"\0\0\0")
    (folder / "c.txt").write_text("fine")
    (folder / "d.txt").symlink_to(folder / "none")
    tokens = make(folder, vocab_size=257)
    assert tokens.manifest["replaced_bytes"] == 6
    assert tokens.manifest["skipped"] == {"binary file": 1, "broken link": 1}
    by_origin = {
        row["origin"]: row["replaced_bytes"]
        for name in ("train", "val")
        for row in tokens.split(name).table.to_pylist()
    }
    assert by_origin == {"a.txt": 6, "c.txt": 0}


def test_a_given_tokenizer_is_used(corpus: Path, tokens: Tokens, tmp_path: Path) -> None:
    out = prepare(
        str(corpus),
        tmp_path / "out",
        Settings(tokenizer=str(tokens.tokenizer_path), val_fraction=0.25, vocab_size=5000),
    )
    assert out.manifest["tokenizer"] == tokens.manifest["tokenizer"]
    assert (out.dir / "train.bin").read_bytes() == (tokens.dir / "train.bin").read_bytes()
    assert (out.manifest["settings"]["tokenizer"], out.manifest["settings"]["vocab_size"]) == ("given", None)


def test_large_vocabularies_take_four_bytes(corpus: Path, tmp_path: Path) -> None:
    import tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000, "loss": 70_001}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "big.json"))
    out = prepare(str(corpus), tmp_path / "out", Settings(tokenizer=str(tmp_path / "big.json"), val_fraction=0.25)).dir
    split = verify(out).split("train")
    assert split.tokens.dtype == np.dtype("<u4")
    assert {70_000, 70_001} <= set(split.tokens.tolist())
    assert split.document_tokens(3)[-1] == 70_000


def test_progress_rises_to_the_total(corpus: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    prepare(str(corpus), tmp_path / "out", Settings(vocab_size=300), progress=lambda *call: calls.append(call))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    totals = {
        "reading and cleaning": size,
        "looking for duplicates": size,
        "training tokenizer": 1,
        "encoding": size,
        "writing": size,
        "sealing": 1,
    }
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == list(totals)
    for stage, total in totals.items():
        done = [d for s, d, t in calls if s == stage and t == total]
        assert done == sorted(done) and done[-1] == total
        assert len(done) == len([call for call in calls if call[0] == stage])


def test_many_batches_and_record_batches(
    corpus: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "BLOCK_DOCUMENTS", 3)
    monkeypatch.setattr(writer, "_ROWS", 2)
    out = prepare(str(corpus), tmp_path / "out", Settings(vocab_size=320, val_fraction=0.25)).dir
    assert (out / "train.bin").read_bytes() == (tokens.dir / "train.bin").read_bytes()
    assert (out / "train.idx").read_bytes() == (tokens.dir / "train.idx").read_bytes()
    table = verify(out).split("train").table
    assert table["origin"].num_chunks > 5
    assert table.equals(tokens.split("train").table)


# What can go wrong.


def test_bad_settings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails("vocab_size is 256.*at least 257", "stdlib", out, vocab_size=256)
    for fraction in (-0.1, 0.51, float("nan")):
        fails(f"val_fraction is {fraction}", "stdlib", out, val_fraction=fraction)
    fails("text_field is empty", "stdlib", out, text_field="")
    fails("no tokenizer 'none.json'", "stdlib", out, tokenizer="none.json")


def test_sources_without_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails("no file or folder", str(tmp_path / "none"), out)
    folder = tmp_path / "in"
    folder.mkdir()
    fails("no text in .*it is empty", str(folder), out)
    (folder / "a.bin").write_bytes(b"\0")
    fails("no text in .*1 binary file", str(folder), out)
    (folder / "a.jsonl").write_text('{"body": "x", "id": 3}\n')
    fails("its fields: body, id.*--data.text_field", str(folder), out)
    fails("its fields: body, id", str(folder), out, tokenizer=None, vocab_size=257)
    assert names(tmp_path) == {"in"}


def test_too_little_text_for_the_default_vocabulary(corpus: Path, tmp_path: Path) -> None:
    fails("too small for a vocabulary of 8192 ids: it supports", str(corpus), tmp_path / "out")
    assert names(tmp_path) == set()


def test_other_files_are_never_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    fails("holds other files.*--data.dir", str(corpus), tmp_path, vocab_size=300)
    fails("is a file", str(corpus), tmp_path / "thesis.tex", vocab_size=300)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_place_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(
        "cannot write .*--data.dir PATH or set POISE_CACHE",
        str(corpus),
        tmp_path / "file" / "a",
        vocab_size=300,
    )


def test_unfinished_folders_of_the_living_stay(corpus: Path, tmp_path: Path) -> None:
    host = socket.gethostname()
    mine = tmp_path / f".out.partial-{host}-{os.getppid()}"
    fresh, stale = tmp_path / ".out.partial-elsewhere-1", tmp_path / ".out.partial-elsewhere-2"
    other = tmp_path / ".output.partial-elsewhere-3"
    for folder in (mine, fresh, stale, other):
        folder.mkdir()
    for folder in (mine, stale, other):
        os.utime(folder, (time.time() - 10**6,) * 2)
    prepare(str(corpus), tmp_path / "out", Settings(vocab_size=300))
    assert names(tmp_path) == {"out", mine.name, fresh.name, other.name}


def test_without_a_folder_the_cache_is_used(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    done = prepare(str(corpus), settings=Settings(vocab_size=300))
    assert done.dir == default_dir(str(corpus), Settings(vocab_size=300))
    assert verify(done.dir).vocab_size == 300
    assert prepare(str(corpus), None, Settings(vocab_size=300)).reused
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*file.*--data\.dir PATH or set POISE_CACHE"):
        prepare(str(corpus), settings=Settings(vocab_size=300))


def test_default_dir(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    place = default_dir(str(corpus), Settings())
    assert place.parent == tmp_path / "cache" / "data"
    assert place.name.startswith("notes-")
    assert default_dir(str(corpus), Settings()) == place
    assert default_dir(str(corpus), Settings(seed=1)) != place
    copy = shutil.copytree(corpus, tmp_path / "notes")
    assert default_dir(str(copy), Settings()) != place
    monkeypatch.delenv("POISE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_dir("stdlib", Settings()).parent == tmp_path / ".cache" / "poise" / "data"
    assert default_dir("hf:owner/na me:test", Settings()).name.startswith("owner-na-me-")


def test_jsonl_and_parquet_lead_to_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    made = [
        prepare(str(tmp_path / name), tmp_path / f"out{name}", Settings(vocab_size=300)).dir
        for name in ("a.jsonl", "a.parquet")
    ]
    for name in ("train.bin", "val.bin", "train.idx", "tokenizer.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


# What is cleaned, dropped and counted.


def read_dropped(tokens: Tokens) -> list[dict[str, Any]]:
    return [row for path in sorted((tokens.dir / store.DROPPED).iterdir()) for row in pq.read_table(path).to_pylist()]


def test_what_is_left_out_is_kept_with_its_reason(dirty: Dirty, cleaned: Tokens) -> None:
    rows = read_dropped(cleaned)
    reasons = {row["text"]: row["reason"] for row in rows}
    assert {text: reasons[text] for text in dirty.why} == dirty.why
    others = [row for row in rows if row["text"] not in dirty.why]
    assert sorted(row["reason"] for row in others) == ["duplicate.exact"] * 2 + ["duplicate.near"] * 2
    kept = texts_of(cleaned, "train") + texts_of(cleaned, "val")
    stored = [row for name in store.SPLITS for row in cleaned.split(name).table.to_pylist()]
    by_hash = {row["content_hash"]: (row, text) for row, text in zip(stored, kept, strict=True)}
    for row in others:  # the cluster names the document that was kept of it
        kept_row, text = by_hash[row["cluster"]]
        assert kept_row["cluster_size"] == 2 and kept_row["cluster"] == kept_row["content_hash"]
        assert (text == row["text"]) == (row["reason"] == "duplicate.exact")
        assert SequenceMatcher(None, text, row["text"]).ratio() > 0.9
    for row in rows:
        assert row["content_hash"] == writer.content_hash(row["text"])
        assert row["scores"]["words"] == features(pa.array([row["text"]]))["words"][0] > 0
        origin, _, line = row["origin"].partition(":")
        if row["source"] == "web":
            lines = (Path(dirty.sources[0].removeprefix("web=")) / origin).read_bytes().splitlines(keepends=True)
            assert json.loads(lines[int(line) - 1])["text"] == row["text"]
            assert row["offset"] == sum(map(len, lines[: int(line) - 1]))
    assert not set(reasons) & set(kept) - {row["text"] for row in others if row["reason"] == "duplicate.exact"}


def test_the_counts_of_the_manifest_add_up(cleaned: Tokens) -> None:
    facts = cleaned.manifest
    for what in ("documents", "bytes"):
        kept = sum(facts["splits"][name][what] for name in store.SPLITS)
        dropped = sum(counts[what] for counts in facts["dropped"].values())
        assert facts["read"]["bytes_after_cleaning" if what == "bytes" else what] == kept + dropped
        for name in store.SPLITS:
            assert sum(one["splits"][name][what] for one in facts["sources"]) == facts["splits"][name][what]
    rows = read_dropped(cleaned)
    assert {reason: counts["documents"] for reason, counts in facts["dropped"].items()} == Counter(
        row["reason"] for row in rows
    )
    assert sum(counts["bytes"] for counts in facts["dropped"].values()) == sum(row["bytes"] for row in rows)
    assert facts["read"]["documents"] == 36 + 13
    assert facts["read"]["bytes"] != facts["read"]["bytes_after_cleaning"], "a stage has changed text"
    assert facts["skipped"] == {"line that is not JSON": 1}
    assert facts["converted"] == {"cp1252": 1}
    ids = ["d1"] * 6 + [f"d{n}" for n in range(30)]
    assert facts["duplicate_ids"] == len(ids) - len(set(ids))
    assert facts["settings"]["filters"] == ["c4"]


def test_tokens_of_a_source_stand_together(cleaned: Tokens) -> None:
    for name in store.SPLITS:
        split = cleaned.split(name)
        sources = split.table["source"].to_pylist()
        at = tokens = 0
        for span in split.sources:
            lengths = split.index.lengths[at : at + span.documents]
            assert sources[at : at + span.documents] == [span.name] * span.documents
            assert (span.token_start, span.tokens) == (tokens, int(lengths.sum()))
            at, tokens = at + span.documents, tokens + span.tokens
        assert (at, tokens) == (len(sources), len(split.tokens))
    assert [span.name for span in cleaned.split("train").sources] == ["web", "books"]


def test_repeats_are_those_of_the_tokens(cleaned: Tokens) -> None:
    tokenizer, blank = load(cleaned.tokenizer_path), 0
    for name in store.SPLITS:
        split = cleaned.split(name)
        ends = np.cumsum(split.index.lengths, dtype=np.int64)
        found = periodic.find(np.array(split.tokens), ends, blank_ids=tokenizer.blank_ids)
        assert np.array_equal(np.array(split.repeats), found) and len(found)
        count, tokens = periodic.per_document(found, ends, ~found["blank"])
        assert split.table["repeat_count"].to_pylist() == count.tolist()
        assert split.table["repeat_tokens"].to_pylist() == tokens.tolist()
        blank += int(found["blank"].sum())
    assert blank == 4


def test_personal_data_is_masked_before_it_is_tokenised(cleaned: Tokens) -> None:
    texts = texts_of(cleaned, "train") + texts_of(cleaned, "val")
    assert not any("jane.doe" in text for text in texts)
    assert sum(PLACEHOLDERS["email"] in text for text in texts) == 1


def test_ids_and_addresses_are_kept(cleaned: Tokens) -> None:
    rows = [row for name in store.SPLITS for row in cleaned.split(name).table.to_pylist()]
    web = [row for row in rows if row["source"] == "web" and row["url"]]
    assert len(web) > 20 and all(row["url"] == f"https://e.org/{row['id'][1:]}" for row in web)


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_on_one_side(tmp_path: Path, seed: int) -> None:
    """With ``log`` several of a cluster stay; they must not be split between training and held-out part."""
    folder, rng = tmp_path / "in", random.Random(seed)
    folder.mkdir()
    groups: dict[str, int] = {}
    for group in range(12):
        words = [f"w{rng.randrange(10**6)}" for _ in range(60)]
        for copy in range(4):
            text = " ".join([*words[:58], str(copy)])
            groups[text] = group
            (folder / f"{copy}-{group:02}.txt").write_text(text)
    tokens = make(folder, vocab_size=300, val_fraction=0.4, seed=seed, dedup="near", dedup_keep="log")
    sides = [[groups[text] for text in texts_of(tokens, name)] for name in store.SPLITS]
    assert not set(sides[0]) & set(sides[1])
    assert min(map(len, sides)) > 0
    assert Counter(sides[0] + sides[1]) == dict.fromkeys(range(12), 3)  # 1 + log2(4)
    assert tokens.manifest["dropped"] == {"duplicate.near": {"documents": 12, "bytes": ANY}}
    assert all(size == 4 for size in tokens.split("train").table["cluster_size"].to_pylist())
    exact = make(folder, vocab_size=300, val_fraction=0.4, seed=seed, dedup="exact")
    assert exact.manifest["dropped"] == {}
    assert not (exact.dir / store.DROPPED).exists()


def test_nothing_left_names_the_filters(corpus: Path, tmp_path: Path) -> None:
    fails(
        r"^nothing is left of 24 documents: c4\.sentences took 24; use other filters$",
        str(corpus),
        tmp_path / "out",
        filters=("c4",),
        vocab_size=300,
    )
    assert names(tmp_path) == set()


def test_lines_are_cleaned_and_what_becomes_empty_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(
        "A line that ends here. And one more word.\nmenu item\nOne more line, a good one.\n" * 2
    )
    (folder / "b.txt").write_text("menu\nitem\n")
    tokens = make(folder, vocab_size=260, clean_lines=True, val_fraction=0)
    (text,) = texts_of(tokens, "train")
    assert "menu" not in text and "good one" in text
    assert [row["reason"] for row in read_dropped(tokens)] == ["lines.empty"]


def test_dropped_texts_fill_several_files(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "_FILE_BYTES", 3000)
    monkeypatch.setattr(record, "BLOCK_DOCUMENTS", 4)
    folder = shutil.copytree(corpus, tmp_path / "notes")
    for path in list(folder.iterdir()):
        (folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    tokens = make(folder, dedup="exact")
    rows = read_dropped(tokens)
    assert len(list((tokens.dir / store.DROPPED).iterdir())) > 2
    assert len(rows) == 24 and {row["text"] for row in rows} == {path.read_text() for path in corpus.iterdir()}
    assert verify(tokens.dir)
    shutil.rmtree(tokens.dir / store.DROPPED)  # who does not need it may remove it
    assert verify(tokens.dir).fingerprint == tokens.fingerprint


def test_augmented_tokens_are_the_same_whatever_the_blocks(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, change in enumerate(({"fim_rate": 1.0}, {"bpe_dropout": 0.3})):
        settings = Settings(vocab_size=320, val_fraction=0.25, **change)
        made = []
        for documents in (8192, 5):
            monkeypatch.setattr(record, "BLOCK_DOCUMENTS", documents)
            made.append(verify(prepare(str(corpus), tmp_path / f"{number}-{documents}", settings).dir))
        for name in ("train.bin", "val.bin", "train.repeats.bin"):
            assert (made[0].dir / name).read_bytes() == (made[1].dir / name).read_bytes()
        opened, tokenizer = made[0].split("train"), load(made[0].tokenizer_path)
        rows = opened.table.to_pylist()
        for document, row in enumerate(rows):
            ids = opened.document_tokens(document)[:-1].tolist()
            text = (corpus / row["origin"]).read_text(encoding="utf-8")
            if "fim_rate" in change:
                marks = [tokenizer.special_id(name) for name in SENTINELS]
                assert all(ids.count(mark) == 1 for mark in marks)
                assert row["bytes"] == len(text.encode())
            else:
                assert tokenizer.decode(ids) == text
                assert ids != tokenizer.encode([text])[0].tolist()


def test_strict_stops_at_what_is_damaged(corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "notes")
    packed = gzip.compress(b"some more text. " * 500, mtime=0)
    (folder / "cut.txt.gz").write_bytes(packed[: len(packed) // 2])
    fails(
        "cut.txt.gz' is damaged: .*; fetch it again or remove it",
        str(folder),
        tmp_path / "out",
        strict=True,
        vocab_size=300,
    )
    tokens = make(folder)
    assert (tokens.manifest["damaged"], tokens.manifest["skipped"]) == (["cut.txt.gz"], {"damaged file": 1})
    assert names(tmp_path) == {"notes", "out"}


def test_a_changed_list_is_new_input(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    quiz = tmp_path / "lists" / "quiz.txt"
    quiz.write_text("one two three four five six seven eight nine ten eleven twelve thirteen")
    for place in (quiz, quiz.parent):
        settings = Settings(vocab_size=300, decontaminate=(str(place),))
        quiz.write_text("one two three four five six seven eight nine ten eleven twelve thirteen")
        assert not prepare(str(corpus), tmp_path / "out", settings).reused
        assert prepare(str(corpus), tmp_path / "out", settings).reused
        quiz.write_text("two three four five six seven eight nine ten eleven twelve thirteen one")
        assert not prepare(str(corpus), tmp_path / "out", settings).reused
    assert names(tmp_path) == {"lists", "out"}
