"""Judging all documents together: it depends on what they say and on nothing else."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data import record
from poise.data.dedup.exact import from_binary, hashes
from poise.data.gather import codes, sample
from poise.data.judge import Judgement, held_out, judge
from poise.data.pipeline import SIGNATURE, Block, Clean, clean_path, read_batch
from poise.data.readers import Document
from poise.data.settings import Settings

WORDS = [f"word{n}" for n in range(400)]


def judged(folder: Path, blocks: list[list[str]], asked: Settings) -> Judgement:
    """Clean blocks of texts and judge them."""
    clean = Clean(folder, (), asked.dedup == "near")
    reasons, found, signatures = [], [], []
    for number, texts in enumerate(blocks):
        documents = [Document(text, "s", str(row), 0, 0) for row, text in enumerate(texts)]
        clean(Block(number, record.of(documents), {}))
        batch = read_batch(clean_path(folder, number))
        reasons.append(codes(batch.column(record.REASON), {"": 0}))
        found.append(from_binary(batch.column("content_hash")))
        if asked.dedup == "near":
            signatures.append(np.array([np.frombuffer(one, np.uint32) for one in batch.column(SIGNATURE).to_pylist()]))
    rows = [len(texts) for texts in blocks]
    near = np.concatenate(signatures) if signatures else None
    return judge(folder, asked, rows, np.concatenate(reasons), [""], np.concatenate(found), near)


def cut(texts: list[str], rng: random.Random) -> list[list[str]]:
    edges = sorted({0, len(texts), *(rng.randrange(len(texts)) for _ in range(3))})
    return [texts[a:b] for a, b in pairwise(edges)]


def corpus() -> list[str]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=80)) for _ in range(30)]
    near = [f"{text} and {n}" for n, text in enumerate(texts[:6])]
    return texts + near + texts[3:9] + texts[3:5]


@pytest.mark.parametrize("keep", ["one", "log"])
@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
def test_the_verdict_on_a_text_does_not_depend_on_its_place(
    tmp_path_factory: pytest.TempPathFactory, dedup: str, keep: str
) -> None:
    asked = Settings(dedup=dedup, dedup_keep=keep, val_fraction=0.3)  # type: ignore[arg-type]
    verdicts = []
    for seed in range(3):
        rng, texts = random.Random(seed), corpus()
        rng.shuffle(texts)
        blocks = cut(texts, rng)
        found = judged(tmp_path_factory.mktemp("work"), blocks, asked)
        names = [found.reasons[code] for code in found.array("reason").tolist()]
        sides, sizes = found.array("side").tolist(), found.array("size").tolist()
        clusters = [texts[row] for row in found.array("cluster").tolist()]
        verdicts.append(sorted(zip(texts, names, sides, sizes, clusters, strict=True)))
        for number, block in enumerate(blocks):
            of_block = found.block(number)
            assert len(of_block.reason) == len(block)
            firsts = found.hashes_of(of_block.cluster, of_block.size).to_pylist()
            assert [first is None for first in firsts] == [size == 1 for size in of_block.size.tolist()]
        by_cluster: dict[str, set[int]] = {}
        for _, _, side, _, cluster in verdicts[-1]:
            by_cluster.setdefault(cluster, set()).add(side)
        assert all(len(both) == 1 for both in by_cluster.values())
        assert {0, 1} == set(sides)
    assert verdicts[0] == verdicts[1] == verdicts[2]
    reasons = [name for _, name, *_ in verdicts[0]]
    exact, near = reasons.count("duplicate.exact"), reasons.count("duplicate.near")
    # Of clusters of 2, 3 and 4 stay 2, 2 and 3 with ``log``.
    assert exact + near == {"none": 0, "exact": {"one": 8, "log": 2}[keep], "near": {"one": 14, "log": 3}[keep]}[dedup]
    assert (near > 0) <= (dedup == "near")


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=40), st.integers(1, 60), st.randoms())
@settings(max_examples=25, deadline=None)
def test_a_sample_is_the_texts_with_the_smallest_hashes(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], most: int, rng: random.Random
) -> None:
    """By definition: in the order of their hashes, as many as fit."""
    most *= 4
    keys = {text: int(key) for text, key in zip(texts, hashes(pa.array(texts))[:, 0], strict=True)}
    expected, held = [], 0
    for text in sorted(texts, key=lambda text: keys[text]):
        held += min(len(text), most // 4)
        if held > most:
            break
        expected.append(text[: most // 4])
    folder = tmp_path_factory.mktemp("work")
    rng.shuffle(texts)
    blocks = cut(texts, rng)
    assert sample(folder, judged(folder, blocks, Settings()), len(blocks), most) == expected


def test_a_huge_document_is_not_a_sample(tmp_path: Path) -> None:
    blocks = [["日" * 1000], ["small"]]
    texts = sample(tmp_path, judged(tmp_path, blocks, Settings()), 2, 1000)
    assert sorted(texts) == ["small", "日" * 83]  # 250 bytes, no half characters


def test_held_out_is_the_share_asked_for() -> None:
    texts = pa.array([f"text {n}" for n in range(4000)])
    found = hashes(texts)
    for fraction in (0.0, 0.01, 0.25, 0.5):
        _, out = held_out(found, fraction, 0)
        assert abs(out.mean() - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 4000)
        _, more = held_out(found, min(0.5, fraction + 0.1), 0)
        assert not (out & ~more).any()  # a larger part holds the smaller one
        assert np.array_equal(held_out(found[::-1], fraction, 0)[1], out[::-1])
    _, other = held_out(found, 0.5, 1)
    assert 0.4 < (other == out).mean() < 0.6


def test_reasons_get_codes_in_the_order_they_are_met() -> None:
    names = {"": 0}
    assert codes(pa.array([None, "b", "a", None, "b"], pa.string()), names).tolist() == [0, 1, 2, 0, 1]
    assert codes(pa.array(["c", "a", None], pa.string()), names).tolist() == [3, 2, 0]
    assert codes(pa.array([None], pa.string()), names).tolist() == [0]
    assert names == {"": 0, "b": 1, "a": 2, "c": 3}
