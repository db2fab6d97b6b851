"""How documents become samples: what counts in the loss, packing, document numbers, mixtures, and views of a batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.core.types import IGNORE
from poise.data.feed.loader import Feed, Loader, View
from poise.data.feed.permute import Permutation
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.data.store import Tokens, open_tokens
from poise.data.tokens import periodic

T = 16
LONG = 448  # a window that can show 32 repeats of 13 tokens
OFF = Feed(mask_repeats=False)
FEEDS = {
    "plain": Feed(),
    "off": OFF,
    "documents": Feed(document_mask=True),
    "packed": Feed(pack="best_fit"),
    "packed documents": Feed(pack="best_fit", document_mask=True),
    "mixed": Feed(mix=("a=0.7", "b=0.3"), document_mask=True),
    "packed mixture": Feed(mix=("a=0.2", "b=0.8@3"), pack="best_fit", document_mask=True),
    "tempered": Feed(temperature=2.0),
}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Two sources in which every letter is a token, with repeats of all sorts; half of ``b`` is blank."""
    folder = tmp_path_factory.mktemp("letters")
    rng = np.random.default_rng(0)
    for source, count in (("a", 40), ("b", 14)):
        (folder / source).mkdir()
        for number in range(count):
            text = "".join(chr(c) for c in rng.integers(97, 123, int(rng.choice([3, 9, 15, 16, 17, 31, 32, 50, 75]))))
            text = {4: text + "xy" * 10 + "z", 9: "!" * 40 + text, 11: text + " " * 50 + "e"}.get(number, text)
            (folder / source / f"{number:02}.txt").write_text(text)
    given = [f"{source}={folder / source}" for source in ("a", "b")]
    return open_tokens(prepare(given, folder / "out", Settings(vocab_size=257, val_fraction=0.1)).dir)


def masked_tokens(tokens: Tokens, seq_len: int, dropped: tuple[int, ...] = ()) -> NDArray[np.bool_]:
    """Say by definition which tokens of the training part must not be targets."""
    split = tokens.split("train")
    mask = np.zeros(len(split.tokens), bool)
    for one in split.repeats:
        if one["count"] >= periodic.threshold(seq_len) and not one["blank"]:
            mask[one["start"] + one["period"] : one["start"] + one["length"]] = True
    for number in dropped:
        start = int(split.table["token_start"][number].as_py())
        mask[start : start + int(split.table["token_length"][number].as_py())] = True
    return mask


def places(loader: Loader, sample: int) -> NDArray[np.int64]:
    """Return where the tokens of a sample are in the token file, -1 for padding, as ``documents`` tells."""
    starts = loader._split.table["token_start"]
    out = np.full(loader.seq_len + 1, -1)
    for one in loader.documents(sample):
        begin, end = one["span"]
        out[begin:end] = starts[one["document"]].as_py() + one["document_start"] + np.arange(end - begin)
    return out


@pytest.mark.parametrize("seed", [0, 5])
def test_without_all_that_the_samples_are_those_of_old(letters: Tokens, seed: int) -> None:
    ids = np.array(letters.split("train").tokens, np.int64)
    loader = Loader(letters, T, seed, feed=OFF)
    size = (len(ids) - 1) // T
    assert loader.sequences == size and loader.mix is None and loader.packings == []
    batch = loader.batch(size - 7, 20)
    for row, sample in enumerate(range(size - 7, size + 13)):
        at = Permutation(size, seed, sample // size)(sample % size) * T
        assert batch.inputs[row].tolist() == ids[at : at + T].tolist()
        assert batch.targets[row].tolist() == ids[at + 1 : at + T + 1].tolist()
    assert batch.documents is None
    # Masking changes targets only, and only to what does not count.
    masked = Loader(letters, T, seed).batch(size - 7, 20)
    assert torch.equal(masked.inputs, batch.inputs)
    assert 0 < (masked.targets != batch.targets).sum() == (masked.targets == IGNORE).sum()


@pytest.mark.parametrize("seq_len", [T, LONG])
@pytest.mark.parametrize("dropped", [(), (3,), (0, 9, 10, 40)])
def test_what_repeats_and_what_was_dropped_does_not_count(
    letters: Tokens, seq_len: int, dropped: tuple[int, ...]
) -> None:
    loader = Loader(letters, seq_len, 0)
    mask = masked_tokens(letters, seq_len, dropped)
    ids = np.array(letters.split("train").tokens, np.int64)
    batch = loader.batch(0, loader.sequences, View(dropped=dropped))
    for sample, targets in enumerate(batch.targets.numpy()):
        at = places(loader, sample)[1:]
        assert np.array_equal(targets, np.where(mask[at], IGNORE, ids[at]))
    counts = {int(one["count"]) for one in letters.split("train").repeats}
    assert counts == {10, 40, 50}  # of which 10 is too few in a long window, and 50 are blanks
    assert masked_tokens(letters, T).sum() > masked_tokens(letters, LONG).sum() > 0


def test_the_first_occurrence_counts(letters: Tokens) -> None:
    split, mask = letters.split("train"), masked_tokens(letters, T)
    text = bytes(int(i) for i in np.array(split.tokens) % 256)  # not the letters, but one for each
    for one in split.repeats:
        gram = text[one["start"] : one["start"] + one["period"]]
        assert text[one["start"] :].startswith(gram * int(one["count"]))
        inside = mask[one["start"] : one["start"] + one["length"]]
        assert inside.tolist() == [False] * one["period"] + [not one["blank"]] * (one["length"] - one["period"])


@pytest.mark.parametrize("name", FEEDS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_samples_are_the_rows_of_batches(letters: Tokens, name: str, data: st.DataObject) -> None:
    loader = Loader(letters, T, 3, feed=FEEDS[name])
    samples = data.draw(st.lists(st.integers(0, 3 * loader.sequences), min_size=1, max_size=12))
    length = data.draw(st.sampled_from([0, 1, 4, T]))
    view = View(length, tuple(data.draw(st.sets(st.integers(0, 60), max_size=3))))
    gathered, parts = loader.gather(samples, view), [loader.batch(sample, 1, view) for sample in samples]
    for field in ("inputs", "targets", *(["documents"] if FEEDS[name].document_mask else [])):
        assert torch.equal(getattr(gathered, field), torch.cat([getattr(part, field) for part in parts])), field
    each = T // (length or T)
    assert gathered.inputs.shape == gathered.targets.shape == (len(samples) * each, length or T)
    assert list(gathered.samples) == [sample for sample in samples for _ in range(each)]
    for number, sample in enumerate(samples):
        whole = loader.row(sample)
        assert torch.equal(gathered.inputs.reshape(-1, T)[number], torch.from_numpy(whole[:-1]))
        counted = loader.counted(sample, view)
        targets = gathered.targets.reshape(-1, T)[number].numpy()
        assert np.array_equal(targets, np.where(counted, whole[1:], IGNORE))


@pytest.mark.parametrize("name", FEEDS)
def test_short_rows_joined_are_the_long_ones(letters: Tokens, name: str) -> None:
    loader = Loader(letters, 4 * T, 0, feed=FEEDS[name])
    whole, cut = loader.batch(2, 5), loader.batch(2, 5, View(T))
    assert cut.inputs.shape == (20, T)
    assert torch.equal(cut.inputs.view(5, -1), whole.inputs)
    # 8 repeats are enough in both windows, so the same targets count.
    assert periodic.threshold(T) == periodic.threshold(4 * T)
    assert torch.equal(cut.targets.view(5, -1), whole.targets)
    assert (cut.documents is None) == (whole.documents is None) == (not FEEDS[name].document_mask)
    if whole.documents is not None and cut.documents is not None:
        assert torch.equal(cut.documents.view(5, -1), whole.documents)


def test_a_short_view_masks_by_its_own_window(letters: Tokens) -> None:
    loader = Loader(letters, LONG, 0)
    for length in (T, LONG):
        view = View(length)
        mask = masked_tokens(letters, length)
        targets = loader.batch(0, loader.sequences, view).targets.reshape(-1, LONG).numpy()
        expected = [mask[places(loader, sample)[1:]] for sample in range(loader.sequences)]
        assert np.array_equal(targets == IGNORE, np.array(expected))


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
@pytest.mark.parametrize("seq_len", [5, T, 40])
def test_an_epoch_counts_every_target_once(letters: Tokens, pack: str, seq_len: int) -> None:
    split = letters.split("train")
    ids = np.array(split.tokens, np.int64)
    loader = Loader(letters, seq_len, 1, feed=Feed(mask_repeats=False, pack=pack))  # type: ignore[arg-type]
    seen = np.zeros(len(ids), int)
    batch = loader.batch(loader.sequences, loader.sequences)
    for row, sample in enumerate(batch.samples):
        at, targets = places(loader, sample), batch.targets[row].numpy()
        assert np.array_equal(loader.row(sample), np.where(at < 0, letters.end_of_text, ids[at]))
        counts = targets != IGNORE
        assert not counts[at[1:] < 0].any()
        seen += np.bincount(at[1:][counts], minlength=len(ids))
        # A target follows its input in a document, or the input ends one and the target begins another.
        follows = at[1:] == at[:-1] + 1
        ends, begins = ids[at[:-1]] == letters.end_of_text, np.isin(at[1:], split.begins)
        assert np.array_equal(counts, (at[1:] >= 0) & (follows | (ends & begins)))
    first = np.zeros(len(ids), bool)
    first[split.begins] = True
    if pack == "concat":
        shown = loader.sequences * seq_len
        assert seen.tolist() == [0] + [1] * shown + [0] * (len(ids) - shown - 1)
        assert len(ids) - shown - 1 < seq_len
    else:
        assert (seen[~first] == 1).all()
        assert seen[first].sum() > 0 and seen.max() == 1  # none twice, also where a row begins with it
        (packing,) = loader.packings
        assert packing.truncated == 0 and packing.rows == loader.sequences


@pytest.mark.parametrize("name", [name for name in FEEDS if FEEDS[name].document_mask])
def test_document_numbers(letters: Tokens, name: str) -> None:
    loader = Loader(letters, T, 0, feed=FEEDS[name])
    batch = loader.batch(0, 60)
    assert batch.documents is not None and batch.documents.dtype == torch.int32
    several = 0
    for row, sample in enumerate(batch.samples):
        shown = loader.documents(sample)
        expected = np.full(T, len(shown))
        for number, one in enumerate(shown):
            expected[one["span"][0] : one["span"][1]] = number
        assert batch.documents[row].tolist() == expected.tolist()
        several += len(shown) > 1
    assert several > 2


@pytest.mark.parametrize("name", ["plain", "packed", "mixed", "off"])
def test_repeats_of_a_sample(letters: Tokens, name: str) -> None:
    loader, split = Loader(letters, T, 0, feed=FEEDS[name]), letters.split("train")
    found = 0
    for sample in range(60):
        at = places(loader, sample)
        expected = []
        for one in split.repeats:
            inside = np.flatnonzero((at >= one["start"]) & (at < one["start"] + one["length"]))
            if len(inside):
                masked = bool(not one["blank"] and FEEDS[name].mask_repeats)
                span = (int(inside[0]), int(inside[-1]) + 1)
                facts = (span, int(one["period"]), int(one["count"]), bool(one["blank"]), masked)
                expected.append(facts)
        got = [
            tuple(one[key] for key in ("span", "period", "count", "blank", "masked")) for one in loader.repeats(sample)
        ]
        assert sorted(got) == sorted(expected)
        found += len(got)
    assert found > 5


def test_shares_of_a_mixture(letters: Tokens) -> None:
    loader = Loader(letters, T, 0, feed=Feed(mix=("b=3", "a=1"), mask_repeats=False))
    assert loader.sources == ("a", "b") and loader.mix is not None
    for first in (0, 4096, 5 * 4096):
        assert np.bincount(loader.source_of(range(first, first + 4096))).tolist() == [1024, 3072]
    ids = np.array(letters.split("train").tokens, np.int64)
    samples = range(4096)
    shown = Counter(
        zip(loader.source_of(samples).tolist(), map(tuple, loader.gather(samples).inputs.tolist()), strict=True)
    )
    for source, span in enumerate(letters.split("train").sources):
        begins = range(span.token_start, span.token_start + (span.tokens - 1) // T * T, T)
        sequences = Counter(tuple(ids[at : at + T].tolist()) for at in begins)
        passes = (1024, 3072)[source] // len(begins)  # every pass over a source shows all its sequences
        assert {row for number, row in shown if number == source} == sequences.keys()
        for row, times in sequences.items():
            assert passes * times <= shown[source, row] <= (passes + 1) * times
    for sample, source in zip(range(60), loader.source_of(range(60)).tolist(), strict=True):
        assert {one["source"] for one in loader.documents(sample)} == {loader.sources[source]}
    other = Loader(letters, T, 1, feed=Feed(mix=("b=3", "a=1")))
    assert not torch.equal(other.batch(0, 8).inputs, loader.batch(0, 8).inputs)


def test_epochs_of_a_mixture_end(letters: Tokens) -> None:
    loader = Loader(letters, T, 0, feed=Feed(mix=("a=0.5@2", "b=0.5@3"), mask_repeats=False))
    assert loader.mix is not None and loader.mix.total is not None
    total = loader.mix.total
    sizes = [(span.tokens - 1) // T for span in letters.split("train").sources]
    assert total == 2 * sizes[0] + 3 * sizes[1]
    starts = Counter(int(places(loader, sample)[0]) for sample in range(total))
    begin = [span.token_start for span in letters.split("train").sources]
    assert starts == {begin[0] + T * k: 2 for k in range(sizes[0])} | {begin[1] + T * k: 3 for k in range(sizes[1])}
    for look in (lambda: loader.batch(total - 1, 2), lambda: loader.gather([total]), lambda: loader.row(total)):
        with pytest.raises(UserError, match=f"sample {total:,} lies after the end of the mixture") as error:
            look()
        assert "\n" not in str(error.value)
    assert loader.batch(total - 2, 2).samples == (total - 2, total - 1)


def test_a_temperature_evens_out(letters: Tokens) -> None:
    counts = []
    for temperature in (1.0, 100.0):
        loader = Loader(letters, T, 0, feed=Feed(temperature=temperature))
        assert loader.mix is not None
        counts.append(loader.mix.counts(4096 * 64) / (4096 * 64))
        block = loader.source_of(range(4096, 8192))
        assert np.abs(np.bincount(block) / 4096 - counts[-1]).max() < 1 / 4096
    sizes = np.array([(span.tokens - 1) // T for span in letters.split("train").sources])
    assert np.allclose(counts[0], sizes / sizes.sum(), atol=1e-4)
    assert np.allclose(counts[1], 0.5, atol=0.01)


def test_the_held_out_part_is_read_as_it_is(letters: Tokens) -> None:
    ids = np.array(letters.split("val").tokens, np.int64)
    for feed in FEEDS.values():
        loader = Loader(letters, T, 0, "val", feed)
        batch = loader.batch(0, loader.sequences)
        assert np.array_equal(batch.inputs.numpy().reshape(-1), ids[: loader.sequences * T])
        assert np.array_equal(batch.targets.numpy().reshape(-1), ids[1 : loader.sequences * T + 1])
        assert (batch.documents is not None) == feed.document_mask


def test_bad_feeds(letters: Tokens) -> None:
    for make, match in (
        (lambda: Feed(pack="bestfit"), "pack is 'bestfit'.*best_fit.*use concat or best_fit"),  # type: ignore[arg-type]
        (lambda: Feed(temperature=-1.0), "temperature is -1.0"),
        (lambda: Feed(temperature=2.0, mix=("a=1",)), "temperature is 2.0; use a positive number and no mix"),
        (lambda: Feed(mix=("a",)), "'a' is no share"),
        (lambda: Loader(letters, T, 0, feed=Feed(mix=("a=1", "bb=1"))), "no source 'bb'.*there are a, b"),
        (lambda: Loader(letters, 600, 0, feed=Feed(mix=("a=1", "b=1"))), "source 'b' has no sequence of this length"),
    ):
        with pytest.raises(UserError, match=match) as error:
            make()  # type: ignore[no-untyped-call]
        assert "\n" not in str(error.value)


def test_train_and_held_out_loaders_do_not_disturb_each_other(letters: Tokens, tmp_path: Path) -> None:
    feed = FEEDS["packed documents"]
    train, val = Loader(letters, T, 0, feed=feed), Loader(letters, T, 0, "val", feed)
    alone = [train.batch(0, 4), val.batch(0, 4)]
    for _ in range(2):
        for before, loader in zip(alone, (train, val), strict=True):
            again = loader.batch(0, 4)
            assert torch.equal(again.inputs, before.inputs) and torch.equal(again.targets, before.targets)
            assert before.documents is not None and again.documents is not None
            assert torch.equal(again.documents, before.documents)
