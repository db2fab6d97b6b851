"""Small corpora, made from a fixed word list so that every test run sees the same text."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.shell import Poise, write

from poise.data import record
from poise.data.prepare import prepare
from poise.data.settings import Settings
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
    return open_tokens(prepare(str(corpus), out, Settings(vocab_size=320, val_fraction=0.25)).dir)


@dataclass(frozen=True)
class Dirty:
    """Two sources with something in them for every stage.

    Attributes:
        sources: as ``prepare`` takes them.
        settings: that find all of it.
        why: for each text that is left out, the reason.
    """

    sources: tuple[str, ...]
    settings: Settings
    why: dict[str, str]

    def prepare(self, out: Path, **kwargs: Any) -> Tokens:
        """Prepare them at ``out``."""
        return open_tokens(prepare(self.sources, out, self.settings, **kwargs).dir)


@pytest.fixture(scope="session")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Dirty:
    """Two sources with something in them for every stage; not to be changed."""
    folder = tmp_path_factory.mktemp("dirty")
    rng, known = random.Random(1), TEXT.split()

    def essay(sentences: int = 12) -> str:
        return " ".join(" ".join(rng.choices(known, k=rng.randint(5, 9))).capitalize() + "." for _ in range(sentences))

    why: dict[str, str] = {}
    plain = [essay() for _ in range(30)]
    plain[3] += " Write to jane.doe@example-mail.org about it."
    plain[17] = "The cat sat on the mat and then the dog came by. " + plain[17]
    evaluation = "the cat sat on the mat and then the dog came by and sat down beside it"
    (folder / "quiz.txt").write_text(evaluation)
    plain[17] = plain[17].replace("came by.", "came by and sat down beside it.")
    why[plain[17]] = "contaminated.quiz"
    code = "if (x) { y(); } " + essay()
    short = "Only one sentence."
    why[code], why[short] = "c4.curly_brackets", "c4.sentences"
    near = [plain[5].replace("Loss", "Cost", 1) + " The end.", plain[6] + " The end."]
    rows = [{"id": f"d{i}", "url": f"https://e.org/{i}", "text": text} for i, text in enumerate(plain)]
    rows += [{"id": "d1", "text": text} for text in (code, short, *near, plain[0], plain[1])]
    rng.shuffle(rows)
    web = folder / "web"
    web.mkdir()
    (web / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (web / "b.jsonl").write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in rows[20:]))
    books = folder / "books"
    books.mkdir()
    for number in range(12):
        text = essay(20)
        if number % 2:
            text += "\n" + " ho ho" * (20 + 10 * number) + ". " + essay(6)
        if number % 3 == 0:
            text += "\n" + " " * 600 + "x"
        (books / f"{number:02}.txt").write_text(text)
    (books / "12.txt").write_bytes("Größe und Maß. Ende. Neu. Alt. Gut. Schlecht.".encode("cp1252"))
    settings = Settings(
        vocab_size=320,
        val_fraction=0.2,
        filters=("c4",),
        mask_pii=True,
        dedup="near",
        decontaminate=(str(folder / "quiz.txt"),),
    )
    return Dirty((f"web={web}", str(books)), settings, why)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut sources into many blocks."""
    monkeypatch.setattr(record, "BLOCK_BYTES", 8000)


@pytest.fixture(scope="session")
def cleaned(dirty: Dirty, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """The dirty sources, prepared in many blocks; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "BLOCK_BYTES", 8000)
        return dirty.prepare(tmp_path_factory.mktemp("cleaned") / "out")


@pytest.fixture
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the test's own folder, with a cache of its own."""
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def poise(capsys: pytest.CaptureFixture[str]) -> Poise:
    return Poise(capsys)


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 short texts; not to be changed."""
    return write(tmp_path_factory.mktemp("hostile") / "notes")
