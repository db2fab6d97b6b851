from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data.feed import loader as module
from poise.data.feed.loader import Loader
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.data.store import Tokens, open_tokens
from poise.data.tokens.tokenizer import load

T = 32
PINNED = ["abcd", "ijkl", "ijkl", "ABCD"]


@pytest.fixture
def loader(tokens: Tokens) -> Loader:
    return Loader(tokens, T, seed=0)


def test_shapes_and_shift(loader: Loader) -> None:
    batch = loader.batch(5, 3)
    assert batch.inputs.shape == batch.targets.shape == (3, T)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
    assert batch.samples == (5, 6, 7)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for row, sample in enumerate(batch.samples):
        whole = torch.from_numpy(loader.row(sample))
        assert whole.shape == (T + 1,)
        assert torch.equal(batch.inputs[row], whole[:-1])
        assert torch.equal(batch.targets[row], whole[1:])


@given(first=st.integers(0, 5000), count=st.integers(1, 40), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_a_pure_function_of_its_numbers(tokens: Tokens, first: int, count: int, seed: int) -> None:
    batch = Loader(tokens, T, seed).batch(first, count)
    other = Loader(tokens, T, seed)
    other.batch(first + 977, 7)  # whatever was read before
    for row in reversed(range(count)):
        one = other.batch(first + row, 1)
        assert torch.equal(one.inputs[0], batch.inputs[row])
        assert torch.equal(one.targets[0], batch.targets[row])


def test_resume_needs_only_a_number(tokens: Tokens) -> None:
    straight = [Loader(tokens, T, 0).batch(n, 4).inputs for n in range(0, 80, 4)]
    first = Loader(tokens, T, 0)
    begun = [first.batch(n, 4).inputs for n in range(0, 40, 4)]
    resumed = Loader(open_tokens(tokens.dir), T, 0)
    begun += [resumed.batch(n, 4).inputs for n in range(40, 80, 4)]
    assert all(torch.equal(a, b) for a, b in zip(straight, begun, strict=True))


def test_an_epoch_shows_every_target_once(tokens: Tokens, loader: Loader) -> None:
    ids = tokens.split("train").tokens
    rows = [loader.row(n)[1:].tolist() for n in range(loader.sequences)]
    expected = ids[1 : loader.sequences * T + 1].astype(int).reshape(-1, T).tolist()
    assert sorted(rows) == sorted(expected)
    assert len(ids) - 1 - loader.sequences * T < T  # no more than the last, incomplete row is left out


def test_every_epoch_and_seed_has_its_own_order(tokens: Tokens, loader: Loader) -> None:
    size = loader.sequences
    epochs = [loader.batch(e * size, size).inputs for e in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())
    assert not torch.equal(Loader(tokens, T, 1).batch(0, size).inputs, epochs[0])
    in_order = tokens.split("train").tokens[: size * T].reshape(-1, T).astype(np.int64)
    assert not np.array_equal(epochs[0].numpy(), in_order)


def test_a_batch_may_span_epochs_and_blocks(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loader(tokens, T, 0)
    size = plain.sequences
    expected = [plain.row(n) for n in range(size - 3, size + 3)]
    monkeypatch.setattr(module, "_BLOCK", 4)
    batch = Loader(tokens, T, 0).batch(size - 3, 6)
    assert all(torch.equal(batch.inputs[i], torch.from_numpy(row[:-1])) for i, row in enumerate(expected))


def test_values_are_the_same_on_every_machine(tmp_path: Path) -> None:
    # With 257 ids a token is a byte. Pinned: a change gives every run that resumes other data.
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz0123456789ABCD")
    opened = open_tokens(prepare(str(tmp_path / "a.txt"), tmp_path / "out", Settings(vocab_size=257)).dir)
    loader, tokenizer = Loader(opened, 4, seed=0), load(opened.tokenizer_path)
    shown = [tokenizer.decode(row) for row in loader.batch(8, 4).inputs.tolist()]
    assert loader.sequences == 10
    assert shown == PINNED


@pytest.mark.parametrize("split", ["train", "val"])
def test_documents_of_a_sample_agree_with_their_files(corpus: Path, tokens: Tokens, split: str) -> None:
    loader, tokenizer = Loader(tokens, T, 0, split), load(tokens.tokenizer_path)
    several = 0
    for sample in range(loader.sequences):
        row, documents = loader.row(sample), loader.documents(sample)
        several += len(documents) > 1
        assert [d["span"][0] for d in documents[1:]] == [d["span"][1] for d in documents[:-1]]
        assert (documents[0]["span"][0], documents[-1]["span"][1]) == (0, T + 1)
        for d in documents:
            begin, end = d["span"]
            text = (corpus / d["origin"]).read_text(encoding="utf-8")
            (ids,) = tokenizer.encode([text])
            whole = [*ids.tolist(), tokens.end_of_text]
            assert row[begin:end].tolist() == whole[d["document_start"] : d["document_start"] + end - begin]
            stored = tokens.split(split).table.slice(d["document"], 1).to_pylist()[0]
            assert (stored["origin"], stored["content_hash"].hex()) == (d["origin"], d["content_hash"])
            assert d["bytes"] == len(text.encode())
        assert "".join(tokenizer.decode(row[slice(*d["span"])]) for d in documents).replace(
            "\ufffd", ""
        ) in tokenizer.decode(row).replace("\ufffd", "")
    assert several > 3


def test_documents_of_one_token_and_of_many_rows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(["a", "b", "c" * 40, "d"]):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    opened = open_tokens(prepare(str(tmp_path / "in"), tmp_path / "out", Settings(vocab_size=257, val_fraction=0)).dir)
    loader = Loader(opened, 8, 0)
    found = {}
    for sample in range(loader.sequences):
        _, place = loader._position(sample)
        found[place] = [(d["origin"], d["span"], d["document_start"]) for d in loader.documents(sample)]
    assert loader.sequences == 5  # 2 + 2 + 41 + 2 = 47 tokens
    assert found[0] == [("0.txt", (0, 2), 0), ("1.txt", (2, 4), 0), ("2.txt", (4, 9), 0)]
    assert found[1] == [("2.txt", (0, 9), 4)]
    assert found[4] == [("2.txt", (0, 9), 28)]
    # The next document begins right after the row.
    assert [d["origin"] for d in Loader(opened, 44, 0).documents(0)] == ["0.txt", "1.txt", "2.txt"]


def test_the_held_out_part_has_a_fixed_order(tokens: Tokens) -> None:
    ids = tokens.split("val").tokens
    one, other = Loader(tokens, T, 0, "val"), Loader(tokens, T, 9, "val")
    expected = ids[: one.sequences * T].astype(np.int64).reshape(-1, T)
    assert np.array_equal(one.batch(0, one.sequences).inputs.numpy(), expected)
    assert torch.equal(other.batch(0, 4).targets, one.batch(0, 4).targets)
    assert torch.equal(one.batch(one.sequences, 2).inputs, one.batch(0, 2).inputs)


def test_the_longest_sequence_that_fits(tokens: Tokens) -> None:
    count = len(tokens.split("train").tokens)
    loader = Loader(tokens, count - 1, 0)
    assert loader.sequences == 1
    assert np.array_equal(loader.row(3), tokens.split("train").tokens)
    with pytest.raises(UserError, match=f"has {count:,} tokens.* at most {count - 1:,} or more text"):
        Loader(tokens, count, 0)


def test_too_short_and_senseless_lengths(tokens: Tokens, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sequence length is 0"):
        Loader(tokens, 0, 0)
    (tmp_path / "a.txt").write_text("abc")
    tiny = open_tokens(prepare(str(tmp_path / "a.txt"), tmp_path / "out", Settings(vocab_size=257)).dir)
    with pytest.raises(UserError, match=r"the train split has 4 tokens.* at most 3 or more text"):
        Loader(tiny, 256, 0)
    with pytest.raises(UserError, match=r"the val split has 0 tokens.*; use more text or a larger --data.val_frac"):
        Loader(tiny, 2, 0, "val")
    assert Loader(tiny, 3, 0).sequences == 1


def test_batches_do_not_share_memory_with_the_file(loader: Loader) -> None:
    before = loader.batch(0, 2).inputs.clone()
    loader.batch(0, 2).inputs.zero_()
    loader.row(0)[:] = 0
    assert torch.equal(loader.batch(0, 2).inputs, before)
