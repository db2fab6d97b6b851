from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data.feed import mix
from poise.data.feed.mix import Mix
from poise.data.feed.phases import BLOCK

PINNED = [(0, 1, 173), (1, 0, 745), (4095, 0, 722), (4096, 1, 1751), (10000, 0, 7535), (16383, 0, 9033)]


@st.composite
def mixes(draw: st.DrawFn, finite: bool = False) -> Mix:
    count = draw(st.integers(1, 5))
    names = [f"s{i}" for i in range(count)]
    sizes = {name: draw(st.integers(1, 3000)) for name in names}
    weights = {name: draw(st.sampled_from([1e-7, 0.01, 0.3, 1.0, 2.5])) for name in names}
    if count > 1 and draw(st.booleans()):
        weights["s0"] = 0.0
    limit = st.sampled_from([1.0, 1.5, 3.0])
    if finite:
        epochs = {name: draw(limit) for name in names}
    else:
        epochs = {name: draw(limit) for name in names if draw(st.booleans())}
    return Mix.of(sizes, weights, epochs=epochs, seed=draw(st.integers(0, 2**40)))


@given(mixture=mixes(finite=True))
@settings(max_examples=25, deadline=None)
def test_with_limits_every_sample_comes_once(mixture: Mix) -> None:
    assert mixture.total is not None
    source, local = mixture.place(np.arange(mixture.total))
    for s, (cap, weight) in enumerate(zip(mixture.caps, mixture.weights, strict=True)):
        assert np.array_equal(np.sort(local[source == s]), np.arange(cap or 0 if weight else 0))
    with pytest.raises(UserError, match="lies after the end of the mixture"):
        mixture.place(np.array([mixture.total]))


@given(mixture=mixes(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_place_and_sample_of_are_inverse(mixture: Mix, data: st.DataObject) -> None:
    end = mixture.total or 10**12
    samples = np.array(data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=40)))
    source, local = mixture.place(samples)
    assert all(mixture.weights[s] > 0 for s in source.tolist())
    for s in np.unique(source).tolist():
        assert np.array_equal(mixture.sample_of(s, local[source == s]), samples[source == s])


@given(mixture=mixes(), samples=st.integers(0, 60_000))
@settings(max_examples=30, deadline=None)
def test_counts_are_those_of_the_samples(mixture: Mix, samples: int) -> None:
    if mixture.total is not None:
        samples = min(samples, mixture.total)
    source, local = mixture.place(np.arange(samples))
    counts = np.bincount(source, minlength=len(mixture.names))
    assert mixture.counts(samples).tolist() == counts.tolist()
    # A source's samples come block by block in their own order, so that an epoch ends before the next begins.
    whole = samples // BLOCK * BLOCK
    for s in range(len(mixture.names)):
        here = local[:whole][source[:whole] == s]
        assert np.array_equal(np.sort(here), np.arange(len(here)))


@given(mixture=mixes(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_sample_does_not_depend_on_what_is_asked_with_it(mixture: Mix, data: st.DataObject) -> None:
    end = min(mixture.total or 30_000, 30_000)
    samples = np.array(data.draw(st.lists(st.integers(0, end - 1), min_size=2, max_size=20)))
    source, local = mixture.place(samples)
    alone = [tuple(int(x[0]) for x in mixture.place(samples[i : i + 1])) for i in range(len(samples))]
    assert alone == list(zip(source.tolist(), local.tolist(), strict=True))


def test_every_block_has_the_mixture() -> None:
    mixture = Mix.of({"web": 10**6, "books": 10**5, "rare": 100}, {"web": 0.7, "books": 0.2999, "rare": 0.0001})
    source, _ = mixture.place(np.arange(64 * BLOCK))
    per_block = np.stack([np.bincount(part, minlength=3) for part in source.reshape(64, BLOCK)])
    exact = np.array(mixture.weights) * BLOCK
    # A whole number next to the exact share in every block, and the nearest to it in 64 of them.
    assert (np.abs(per_block - exact) < 1).all()
    assert (np.abs(per_block.sum(axis=0) - exact * 64) < 1).all()
    assert per_block[:, 2].sum() == 26
    # What is rare is spread evenly over the blocks.
    assert sorted(per_block[:, 2].reshape(4, 16).sum(axis=1).tolist()) == [6, 6, 7, 7]


def test_a_tiny_weight_comes_too() -> None:
    mixture = Mix.of({"a": 100, "b": 100}, {"a": 1.0, "b": 1e-12})
    assert mixture.counts(64 * BLOCK).tolist() == [64 * BLOCK - 1, 1]


def test_order_in_a_block_is_mixed() -> None:
    mixture = Mix.of({"a": 10**6, "b": 10**6})
    source, _ = mixture.place(np.arange(BLOCK))
    # 4095 places where neighbours may differ, half expected; sorted sources would differ once.
    assert 1900 < (np.diff(source) != 0).sum() < 2200
    later, _ = mixture.place(np.arange(BLOCK, 2 * BLOCK))
    assert 1850 < (source != later).sum() < 2250


def test_every_place_in_a_block_sees_the_mixture() -> None:
    mixture = Mix.of({"a": 10**6, "b": 10**6}, {"a": 3, "b": 1})
    for place in (0, 1, 2047, 4095):
        source, _ = mixture.place(np.arange(4000) * BLOCK + place)
        assert (source == 0).mean() == pytest.approx(0.75, abs=0.03)  # more than four standard deviations


def test_order_depends_on_the_seed() -> None:
    one, other = (Mix.of({"a": 10**6, "b": 10**6}, seed=seed).place(np.arange(BLOCK))[0] for seed in (0, 1))
    assert (one != other).sum() > 1800
    assert one.sum() == other.sum()


def test_values_are_the_same_on_every_machine() -> None:
    mixture = Mix.of({"a": 10**6, "b": 900, "c": 5 * 10**4}, {"a": 6, "b": 3, "c": 1}, epochs={"b": 2}, seed=5)
    samples = np.array([sample for sample, _, _ in PINNED])
    source, local = mixture.place(samples)
    assert list(zip(samples.tolist(), source.tolist(), local.tolist(), strict=True)) == PINNED


def test_share_of_a_source_that_ends_goes_to_the_others_in_proportion() -> None:
    mixture = Mix.of({"a": 10**6, "b": 10**6, "c": 1000}, {"a": 0.4, "b": 0.2, "c": 0.4}, epochs={"c": 4})
    before = mixture.counts(2 * BLOCK)
    assert before[2] == pytest.approx(0.4 * 2 * BLOCK, abs=1)
    counts = mixture.counts(100 * BLOCK)
    assert counts[2] == 4000
    later = counts - mixture.counts(4 * BLOCK)
    assert later[2] == 0
    assert later[0] / later[1] == pytest.approx(2, rel=1e-3)
    _, local = mixture.place(np.arange(4 * BLOCK))
    assert local.max() < 10**6


def test_shares_by_size_and_temperature() -> None:
    sizes = {"big": 8000, "small": 1000, "none": 0}
    assert Mix.of(sizes).weights == pytest.approx((8 / 9, 1 / 9, 0))
    assert Mix.of(sizes, temperature=1).weights == pytest.approx((8 / 9, 1 / 9, 0))
    assert Mix.of(sizes, temperature=3).weights == pytest.approx((2 / 3, 1 / 3, 0))
    assert Mix.of({"a": 10**15, "b": 1}, temperature=1e6).weights == pytest.approx((0.5, 0.5), abs=1e-4)


def test_one_source_is_read_once_an_epoch() -> None:
    mixture = Mix.of({"all": 700})
    source, local = mixture.place(np.arange(BLOCK))
    assert mixture.total is None
    assert not source.any()
    assert np.array_equal(np.sort(local), np.arange(BLOCK))


def test_report() -> None:
    mixture = Mix.of(
        {"web": 10**6, "books": 1000, "notes": 100, "off": 5}, {"web": 8, "books": 1, "notes": 1, "off": 0}
    )
    lines = mixture.report(50_000, seq_len=10)
    web, books, notes, off = lines
    assert [line["source"] for line in lines] == ["web", "books", "notes", "off"]
    assert sum(line["samples"] for line in lines) == 50_000
    assert web["epochs"] == pytest.approx(0.04, rel=0.01)
    assert web["tokens"] == web["effective_tokens"] == web["samples"] * 10
    assert web["warning"] is None
    assert books["epochs"] == pytest.approx(5, rel=0.01)
    assert "seen 5.0 times" in books["warning"]
    assert "cap its epochs" in notes["warning"] and "44 passes" in notes["warning"]
    assert notes["effective_tokens"] < 16.4 * 1000
    assert (off["samples"], off["epochs"], off["effective_tokens"], off["warning"]) == (0, 0, 0, None)


def test_report_of_a_run_longer_than_the_mixture_is_of_all_there_is() -> None:
    mixture = Mix.of({"a": 10, "b": 30}, epochs={"a": 2, "b": 1})
    assert [line["samples"] for line in mixture.report(10**6)] == [20, 30]


def test_effective_samples_as_published() -> None:
    # Muennighoff 2023: the next pass is worth 0.82 after 4, 0.38 after 16, 0.08 after 40; never more than 16.4 U.
    for passes, worth in ((4, 0.82), (16, 0.38), (40, 0.08)):
        size = 10**6
        next_pass = (
            (mix.effective(passes * size + size // 1000, size) - mix.effective(passes * size, size)) * 1000 / size
        )
        assert next_pass == pytest.approx(worth, abs=0.005)
    assert mix.effective(10**9, 100) == pytest.approx(1640)
    assert mix.effective(70, 100) == 70


def test_limits_of_zero_weight_and_of_parts_of_an_epoch() -> None:
    mixture = Mix.of({"a": 10, "b": 30}, {"a": 1, "b": 0}, epochs={"a": 0.5, "b": 2})
    assert mixture.total == 5
    assert mixture.counts(5).tolist() == [5, 0]
    assert Mix.of({"a": 10}, epochs={"a": math.inf}).total is None
    assert Mix.of({"a": 3}, epochs={"a": 0.1 + 0.2 + 0.7}).total == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": {}}, "at least one source"),
        ({"weights": {"web": 1, "bokks": 1}}, "no source 'bokks', did you mean 'books'"),
        ({"epochs": {"bok": 1}}, "no source 'bok'"),
        ({"weights": {"web": 1}}, "source 'books' has no weight; give it one, or books=0"),
        ({"weights": {"web": 1, "books": -1}}, "has the weight -1"),
        ({"weights": {"web": math.nan, "books": 1}}, "has the weight nan"),
        ({"weights": {"web": 0, "books": 0}}, "all sources of the mixture have weight 0"),
        ({"sizes": {"web": 5, "books": 0}, "weights": {"web": 1, "books": 1}}, "has no sequence of this length"),
        ({"weights": {"web": 1, "books": 1}, "temperature": 2}, "weights or a temperature, not both"),
        ({"temperature": 0}, "temperature of the mixture is 0"),
        ({"epochs": {"books": 0}}, "limited to 0 epochs of 50 sequences, less than one"),
        ({"epochs": {"books": 0.001}}, "less than one"),
        ({"epochs": {"books": math.nan}}, "less than one"),
    ],
)
def test_bad_mixtures(arguments: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mix.of(**{"sizes": {"web": 100, "books": 50}, **arguments})  # type: ignore[arg-type]


def test_a_sample_that_a_source_never_gives() -> None:
    mixture = Mix.of({"a": 10, "b": 30, "off": 5}, {"a": 1, "b": 1, "off": 0}, epochs={"a": 2})
    with pytest.raises(UserError, match="'a' gives 20 samples to the mixture; it has no number 20"):
        mixture.sample_of(0, np.array([19, 20]))
    with pytest.raises(UserError, match="'off' gives 0 samples"):
        mixture.sample_of(2, np.array([0]))


def test_parse() -> None:
    assert mix.parse(("web=0.7", "a=b=2@1.5", "off=0")) == ({"web": 0.7, "a=b": 2.0, "off": 0.0}, {"a=b": 1.5})
    assert mix.parse(()) == ({}, {})


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("web",), "'web' is no share of a mixture"),
        (("=0.3",), "no share of a mixture"),
        (("web=much",), "'web=much': 'much' is no weight"),
        (("web=-1",), "'-1' is no weight"),
        (("web=inf",), "'inf' is no weight"),
        (("web=1@",), "'' is no number of epochs"),
        (("web=1@x",), "'x' is no number of epochs"),
        (("web=1", "web=2"), "twice"),
        (("bokks=1",), "no source 'bokks', did you mean 'books'"),
    ],
)
def test_bad_shares(items: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix.parse(items, known=("web", "books"))


def test_hundreds_of_sources() -> None:
    rng = np.random.default_rng(0)
    sizes = {f"s{i}": int(n) for i, n in enumerate(rng.integers(1, 10**5, 120))}
    mixture = Mix.of(sizes, epochs={name: float(rng.uniform(0.5, 4)) for name in sizes if sizes[name] > 10})
    assert mixture.total is not None
    samples = rng.integers(0, mixture.total, 2000)
    source, local = mixture.place(samples)
    for s in np.unique(source).tolist():
        assert np.array_equal(mixture.sample_of(s, local[source == s]), samples[source == s])
