"""Reports on prepared data as a whole, against counting by hand."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from poise.core.errors import UserError
from poise.data.feed.loader import Feed, Loader
from poise.data.look import health
from poise.data.store import MANIFEST, SPLITS, Tokens
from poise.data.tokens import periodic


def test_counts(cleaned: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CHUNK", 1000)
    expected = Counter(int(i) for name in SPLITS for i in cleaned.split(name).tokens)
    found = health.counts(cleaned)
    assert found.tolist() == [expected[i] for i in range(cleaned.vocab_size)]


def test_repeats_and_vocabulary(cleaned: Tokens) -> None:
    split = cleaned.split("train")
    for seq_len in (16, 10_000):
        report = health.repeats(cleaned.dir, seq_len=seq_len)
        often = split.repeats[split.repeats["count"] >= periodic.threshold(seq_len)]
        assert report["spans"] == len(often) and report["blank_spans"] == int(often["blank"].sum())
        assert report["documents"] == len(split.index.lengths)
    facts = health.vocabulary_of(cleaned.dir)
    size = sum(cleaned.manifest["splits"][name]["bytes"] for name in SPLITS)
    tokens = sum(len(cleaned.split(name).tokens) for name in SPLITS)
    assert facts["bytes_per_token"] == pytest.approx(size / (tokens - 42), rel=0.01)
    assert health.warnings(cleaned.dir) == [*health.repeats(cleaned.dir)["warnings"], *facts["warnings"]]


def test_packing_is_what_the_loader_does(cleaned: Tokens) -> None:
    for seq_len in (64, 300):
        facts = health.packing(cleaned.dir, seq_len)
        assert facts["documents"] == cleaned.manifest["splits"]["train"]["documents"]
        for name in ("concat", "best_fit"):
            loader = Loader(cleaned, seq_len, 0, feed=Feed(pack=name))  # type: ignore[arg-type]
            assert facts[name]["sequences"] == loader.sequences
            cut, fitting = set(), set(np.flatnonzero(cleaned.split("train").index.lengths <= seq_len + 1).tolist())
            shown = Counter[int]()
            for sample in range(loader.sequences):
                for one in loader.documents(sample):
                    begin, end = one["span"]
                    whole = (one["document_start"], end - begin) == (0, one["token_length"])
                    shown[one["document"]] += whole
            cut = {document for document in fitting if not shown[document]}
            assert facts[name]["truncated"] == round(len(cut) / len(fitting), 6)
        assert facts["best_fit"]["truncated"] == 0 < facts["concat"]["truncated"]
        assert 0.5 < facts["best_fit"]["fill"] <= facts["concat"]["fill"] == 1
    with pytest.raises(UserError, match="the sequence length is 0"):
        health.packing(cleaned.dir, 0)


def test_a_folder_without_data(tmp_path: Path) -> None:
    for report in (health.repeats, health.vocabulary_of, health.warnings):
        with pytest.raises(UserError, match="holds no prepared data"):
            report(tmp_path)


@pytest.mark.parametrize(
    ("name", "at", "what"),
    [("start", 10**15, "cannot be"), ("start", -1, "cannot be"), ("period", 0, "cannot be"), ("period", 1, "has id")],
)
def test_repeats_that_cannot_be(cleaned: Tokens, tmp_path: Path, name: str, at: int, what: str) -> None:
    copy = shutil.copytree(cleaned.dir, tmp_path / "copy")
    if what == "has id":
        first = int(cleaned.split("train").repeats["start"][0])
        ids = np.fromfile(copy / "train.bin", np.uint16)
        ids[first] = cleaned.vocab_size
        ids.tofile(copy / "train.bin")
    else:
        spans = cleaned.split("train").repeats.copy()
        spans[name][-1] = at
        spans.tofile(copy / "train.repeats.bin")
    with pytest.raises(UserError, match=f"damaged: .*{what}"):
        health.repeats(copy)


def test_a_tokenizer_of_another_size(cleaned: Tokens, tmp_path: Path) -> None:
    copy = shutil.copytree(cleaned.dir, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["tokenizer"]["vocab_size"] += 1
    (copy / MANIFEST).write_text(json.dumps(manifest))
    for report in (health.repeats, health.vocabulary_of):
        with pytest.raises(UserError, match=r"tokenizer.json has 320 ids, the manifest says 321"):
            report(copy)
