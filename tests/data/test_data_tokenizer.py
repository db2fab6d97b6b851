from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from poise.core.errors import UserError
from poise.data import record
from poise.data.store import Tokens
from poise.data.tokens import fast_encoder
from poise.data.tokens import tokenizer as module
from poise.data.tokens.tokenizer import END_OF_TEXT, Sample, Tokenizer, load, train

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
        "from poise.data.tokens.tokenizer import train\n"
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
    assert len(list(module.segments(text))) > len(text) // 200
    assert all(len(part) <= 200 for part in module.segments(text))


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


# The flat form, and the fast encoder.

ODD = ["", "a", f"x{END_OF_TEXT}y<|pad|>", "\r\n\t  \u3000 日本 é👩‍👩‍👧‍👦", "\x00\x7f", " " * 300, "tail\n"]


@pytest.fixture(scope="module")
def fast() -> Tokenizer:
    pytest.importorskip("gigatoken")
    tokenizer = train(TEXTS, 300, ("<|pad|>",))
    assert "same ids" in tokenizer.accelerate(TEXTS)
    return tokenizer


def expected(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    each = tokenizer.encode_reference(texts)
    return [int(i) for ids in each for i in ids], np.cumsum([0, *map(len, each)]).tolist()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_flat_ids_are_those_of_each_text(
    fast: Tokenizer, trained: Tokenizer, accelerated: bool, kind: pa.DataType
) -> None:
    tokenizer = fast if accelerated else trained
    assert tokenizer.encoder.startswith("gigatoken" if accelerated else "tokenizers")
    for low, high in ((0, 7), (2, 5), (3, 3), (0, 1)):
        for threads in (1, None):
            ids, offsets = tokenizer.encode_flat(pa.array(ODD, kind)[low:high], threads=threads)
            assert (ids.tolist(), offsets.tolist()) == expected(tokenizer, ODD[low:high])
            assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert [ids.tolist() for ids in tokenizer.encode(ODD)] == [ids.tolist() for ids in tokenizer.encode_reference(ODD)]


def test_flat_ids_with_the_end_of_each_text(fast: Tokenizer) -> None:
    ids, offsets = fast.encode_flat(pa.array(ODD), end=True)
    plain = fast.encode_reference(ODD)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [
        [*row.tolist(), fast.end_of_text] for row in plain
    ]


def test_long_texts_are_cut_the_same_way(fast: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "é\n" * 90, "short", "", "日本語x" * 40, "\n".join(TEXTS[:9]), ""]
    monkeypatch.setattr(module, "_SEGMENT", 50)
    ids, offsets = fast.encode_flat(pa.array(texts))
    assert (ids.tolist(), offsets.tolist()) == expected(fast, texts)
    monkeypatch.setattr(fast_encoder, "_GROUP_BYTES", 64)  # several calls of the library
    again, _ = fast.encode_flat(pa.array(texts))
    assert again.tolist() == ids.tolist()


def test_the_fast_encoder_is_built_anew_when_memory_has_grown(fast: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = pickle.loads(pickle.dumps(fast))
    before = tokenizer._fast._backend
    tokenizer.encode(TEXTS)
    assert tokenizer._fast._backend is before
    monkeypatch.setattr(fast_encoder, "_GROUP_BYTES", 4000)
    monkeypatch.setattr(fast_encoder, "_GROWTH_BYTES", -(2**40))
    assert [i.tolist() for i in tokenizer.encode(TEXTS)] == [i.tolist() for i in fast.encode_reference(TEXTS)]
    assert tokenizer._fast._backend is not before


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=60), max_size=4))
@settings(max_examples=80, deadline=None)
def test_any_text_has_the_same_ids(fast: Tokenizer, texts: list[str]) -> None:
    assert [ids.tolist() for ids in fast.encode(texts)] == [ids.tolist() for ids in fast.encode_reference(texts)]


def test_characters_newer_than_the_libraries_are_left_to_the_reference(fast: Tokenizer) -> None:
    # A letter of Unicode 17 after an "a": one word if it is known as a letter, else two.
    facts = json.loads(fast.to_json())
    facts["model"]["vocab"]["a\u00f0"] = 300
    facts["model"]["merges"].append(["a", "\u00f0"])
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(facts)))
    assert "same ids" in tokenizer.accelerate(TEXTS)
    texts = ["plain é", "xa\U00010940b", "日本 \u20c1", "\ue000\u4e00 a👍", "", "a\U00010940", "end"]
    ids, starts = tokenizer.encode_flat(pa.array(texts))
    assert (ids.tolist(), starts.tolist()) == expected(tokenizer, texts)
    alone = tokenizer._fast.encode_flat(*record.flat(pa.array(texts)))[0]
    if alone.tolist() == ids.tolist():
        pytest.skip("both libraries know the same characters by now")


def test_unfamiliar_characters_are_seen() -> None:
    letters = [chr(c) for c in range(0x1000, 0x110000, 13) if not 0xD800 <= c < 0xE000]
    data, offsets = record.flat(pa.array(["x", *(f"é{c}a" for c in letters)])[1:])
    unknown = fast_encoder._unknown()
    assert fast_encoder.unfamiliar(data, offsets).tolist() == [bool(unknown[ord(c)]) for c in letters]
    assert not unknown[ord("日")] and not unknown[0x1F44D] and unknown[0x10FFFF]
    data, offsets = record.flat(pa.array(["日本", "", "a\U0010ffff👍", "x"]))
    assert fast_encoder.unfamiliar(data, offsets).tolist() == [False, False, True, False]


def test_an_encoder_with_other_ids_is_refused_in_words(fast: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fast_encoder.FastEncoder.encode_flat

    def wrong(self: fast_encoder.FastEncoder, data: np.ndarray, offsets: np.ndarray, **more: int) -> tuple:
        ids, starts = real(self, data, offsets, **more)
        ids = ids.copy()
        ids[starts[-2] + 2] += 1  # the third token of the last text
        return ids, starts

    monkeypatch.setattr(fast_encoder.FastEncoder, "encode_flat", wrong)
    tokenizer = train(TEXTS, 300)
    right = tokenizer.encode(["step 1: the loss"])[0]
    found = tokenizer.accelerate(["step 1: the loss"])
    assert "other ids" in found and "token 2 of 'step 1: the loss'" in found
    assert f"not {right[2]}, {right[3]}" in found and f"is {right[2] + 1}, {right[3]}" in found
    assert "\n" not in found and tokenizer.encoder.startswith("tokenizers")
    assert fast_encoder.for_tokenizer(tokenizer, ["step 1: the loss"]) is None
    monkeypatch.setattr(fast_encoder.FastEncoder, "encode_flat", lambda *_, **__: 1 / 0)
    assert "failed on a sample" in tokenizer.accelerate(TEXTS)


def test_what_the_fast_encoder_cannot_read_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = load(foreign(tmp_path, ["</s>"]))
    assert "gigatoken" in tokenizer.accelerate(["loss step"])
    assert tokenizer.encoder.startswith("tokenizers")


def test_without_the_fast_encoder_installed(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert "pip install 'poise[fast]'" in trained.accelerate(TEXTS)
    assert trained.encode(["ab"])[0].tolist() == trained.encode_reference(["ab"])[0].tolist()


def test_workers_get_the_same_tokenizer(fast: Tokenizer, trained: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (fast, trained, load(foreign(tmp_path, []))):
        other = pickle.loads(pickle.dumps(tokenizer))
        assert (other.hash(), other.encoder, other.notes) == (tokenizer.hash(), tokenizer.encoder, tokenizer.notes)
        assert (other.end_of_text, other.vocab_size) == (tokenizer.end_of_text, tokenizer.vocab_size)
        texts = ["loss " + END_OF_TEXT, "step"]
        assert [i.tolist() for i in other.encode(texts)] == [i.tolist() for i in tokenizer.encode(texts)]


def test_special_tokens_are_trained_in_and_cannot_be_written() -> None:
    tokenizer = train(TEXTS, 300, ("<|a|>", "<|b|>"))
    assert [tokenizer.special_id(name) for name in (END_OF_TEXT, "<|a|>", "<|b|>", "a")] == [0, 1, 2, None]
    (ids,) = tokenizer.encode(["x<|a|>y"])
    assert 1 not in ids and tokenizer.decode(ids) == "x<|a|>y"
    for wrong in (("<|a|>", "<|a|>"), (" ",), (END_OF_TEXT,)):
        with pytest.raises(UserError, match="empty or there twice"):
            train(TEXTS, 300, wrong)
    with pytest.raises(UserError, match="need 259 ids"):
        train(TEXTS, 258, ("<|a|>", "<|b|>"))


def test_pieces_are_the_bytes_of_ids(trained: Tokenizer, tmp_path: Path) -> None:
    text = "naïve 日本 the loss\r\n\x00"
    assert b"".join(trained.pieces[i] for i in trained.encode([text])[0]) == text.encode()
    assert trained.pieces[trained.end_of_text] == b""
    blank = {trained.pieces[i] for i in trained.blank_ids}
    assert {b" ", b"\n", b"\t", b"\r"} <= blank and not any(piece.decode().strip() for piece in blank)
    assert load(foreign(tmp_path, ["</s>"])).pieces == (b"[UNK]", b"", b"loss", b"step")


def test_pieces_of_a_vocabulary_with_marks_for_blanks() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "\u2581": 3, "\u2581\u2581": 4, "\u2581a": 5, "b": 9}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(inner)
    assert tokenizer.pieces == (b"<unk>", b"", b"\n", b" ", b"  ", b" a", b"", b"", b"", b"b")
    assert tokenizer.blank_ids.tolist() == [2, 3, 4]


def test_notes_on_the_end_of_text(tmp_path: Path, trained: Tokenizer) -> None:
    assert trained.notes == ()
    assert "no end of text, so '<|endoftext|>' was added as id 3" in load(foreign(tmp_path, [])).notes[0]
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Tokenizer(inner).notes == ("a text that holds '</s>' gets the id of the end of text",)


def test_the_end_of_text_can_be_named(tmp_path: Path) -> None:
    path = foreign(tmp_path, ["</s>", "<|stop|>"])
    assert (load(path).end_of_text, load(path, "<|stop|>").end_of_text) == (1, 2)
    with pytest.raises(UserError, match=r"has no token '<\|stopp\|>', did you mean '<\|stop\|>'"):
        load(path, "<|stopp|>")


def test_added_tokens_that_are_not_special_are_told_by_both(fast: Tokenizer) -> None:
    facts = json.loads(fast.to_json())
    facts["added_tokens"].append({**facts["added_tokens"][0], "id": 300, "content": "loss of", "special": False})
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(facts)))
    assert 300 in tokenizer.encode(["the loss of"])[0]
    tokenizer.accelerate(TEXTS)  # accepted or not, the ids are the same
    assert (
        tokenizer.encode(["the loss of it"])[0].tolist() == tokenizer.encode_reference(["the loss of it"])[0].tolist()
    )
