"""Small corpora, made from a fixed word list so that every test run sees the same text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from poise.data.prepare import prepare
from poise.data.store import Tokens, open_tokens

TEXT = """loss gradient step weight norm layer token batch spike learning rate warm decay moment attention
head embedding residual branch scale clip seed epoch sample document vocabulary sequence checkpoint restart
naïve 日本語 Größe"""


def write_corpus(folder: Path, count: int = 24, words: int = 120) -> Path:
    """Write ``count`` text files of some ``words`` words, all different."""
    folder.mkdir(parents=True)
    rng, known = random.Random(0), TEXT.split()
    for number in range(count):
        length = rng.randint(words // 2, words)
        text = " ".join(rng.choice(known) for _ in range(length))
        (folder / f"doc{number:02}.txt").write_text(f"{number}: {text}.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 text files; not to be changed."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "notes")


@pytest.fixture(scope="session")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """The corpus, prepared with 320 ids and about a quarter held out; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "notes"
    return open_tokens(prepare(str(corpus), out, vocab_size=320, val_fraction=0.25).dir)
