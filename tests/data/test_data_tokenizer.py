from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from poise.core.errors import UserError
from poise.data import tokenizer as module
from poise.data.store import Tokens
from poise.data.tokenizer import END_OF_TEXT, Sample, Tokenizer, load, train

TEXTS = [f"step {i}: the loss of the batch was {i / 7:.3f} after {i} tokens\n" for i in range(200)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train(TEXTS, 300)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), max_size=4))
@settings(max_examples=100, deadline=None)
def test_decoding_gives_the_text_back(tokens: Tokens, texts: list[str]) -> None:
    tokenizer = load(tokens.tokenizer_path)
    ids = tokenizer.encode(texts)
    assert [tokenizer.decode(i) for i in ids] == texts
    assert all((i < tokenizer.vocab_size).all() for i in ids)


def test_vocabulary_has_the_size_asked_for(trained: Tokenizer) -> None:
    assert trained.vocab_size == 300
    assert trained.end_of_text == 0
    # Merges were learnt: fewer ids than bytes.
    assert sum(map(len, trained.encode(TEXTS))) < 0.8 * sum(map(len, TEXTS))


def test_text_cannot_end_a_document(trained: Tokenizer) -> None:
    (ids,) = trained.encode([f"a{END_OF_TEXT}b"])
    assert trained.end_of_text not in ids
    assert trained.decode(ids) == f"a{END_OF_TEXT}b"


def test_training_is_deterministic_across_processes(trained: Tokenizer) -> None:
    assert train(TEXTS, 300).hash() == trained.hash()
    code = (
        "from poise.data.tokenizer import train\n"
        "print(train([f'step {i}: the loss of the batch was {i / 7:.3f} after {i} tokens\\n'"
        " for i in range(200)], 300).hash())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == trained.hash()


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"4096 ids: it supports (\d+); use --data.vocab_size \d+") as error:
        train(TEXTS, 4096)
    assert "\n" not in str(error.value)
    suggested = int(str(error.value).split("--data.vocab_size ")[1].split()[0])
    assert train(TEXTS, suggested).vocab_size == suggested


def test_no_text_supports_the_bytes_alone() -> None:
    with pytest.raises(UserError, match=r"it supports 257; use --data\.vocab_size 257"):
        train(["a"], 400)
    assert train(["a"], 257).encode(["ab"])[0].shape == (2,)


def test_long_texts_are_encoded_in_segments(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(TEXTS) + "x" * 500
    (whole,) = trained.encode([text])
    monkeypatch.setattr(module, "_SEGMENT", 200)
    (cut,) = trained.encode([text])
    assert trained.decode(cut) == text == trained.decode(whole)
    assert len(list(module._segments(text))) > len(text) // 200
    assert all(len(part) <= 200 for part in module._segments(text))


def test_encoding_keeps_the_order_of_texts_with_segments(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEGMENT", 50)
    texts = ["", "short", "long " * 40, "", "last"]
    assert [trained.decode(ids) for ids in trained.encode(texts)] == texts


def test_load_gives_the_same_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert load(place).hash() == trained.hash()


def foreign(tmp_path: Path, specials: list[str], truncate: bool = False) -> Path:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *specials, "loss", "step"])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials:
        inner.add_special_tokens(specials)
    if truncate:
        inner.enable_truncation(2)
        inner.enable_padding()
    inner.save(str(tmp_path / "foreign.json"))
    return tmp_path / "foreign.json"


def test_a_foreign_end_of_text_is_found(tmp_path: Path) -> None:
    tokenizer = load(foreign(tmp_path, ["</s>"]))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (1, 4)


def test_a_vocabulary_without_an_end_of_text_gets_one(tmp_path: Path) -> None:
    tokenizer = load(foreign(tmp_path, []))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (3, 4)
    assert END_OF_TEXT in tokenizer.to_json()


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = load(foreign(tmp_path, ["</s>"], truncate=True))
    assert [len(ids) for ids in tokenizer.encode(["loss step loss", "loss"])] == [3, 1]


def test_bad_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model": 3}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("bad.json", "bytes.json", "none.json"):
        with pytest.raises(UserError, match=name) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_sample_is_bounded_and_independent_of_order() -> None:
    offers = [(i * 7919 % 1009, f"{i:04}" * 25) for i in range(200)]
    one, other = Sample(limit=2000), Sample(limit=2000)
    for key, text in offers:
        one.offer(key, text)
    for key, text in reversed(offers):
        other.offer(key, text)
    smallest = [text for _, text in sorted(offers)[:20]]
    assert one.texts() == other.texts() == smallest


def test_sample_takes_a_part_of_a_huge_document() -> None:
    sample = Sample(limit=1000)
    sample.offer(1, "x" * 10_000)
    assert sample.texts() == ["x" * 250]
