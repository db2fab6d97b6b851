"""Which documents were in that step? ``blame(run_folder, step)``, for any step of any run, after the fact.

Nothing is logged for it but the number of the step's first sample: a batch is a pure function of (seed, sample number),
so a sample leads to its sequence, its sequence to a span of tokens, and that to the documents it was made from
(``data/loader.py``). It works while the run goes on, and after a rollback: the samples are those that the step showed
when it was done last; those of its earlier tries are named, too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from poise.core.errors import UserError
from poise.core.journal import Record, read, timeline
from poise.data import tokenizer
from poise.data.loader import Loader
from poise.data.store import Tokens, is_prepared, open_tokens
from poise.train.recipe import Recipe
from poise.train.run import read_recipe


@dataclass(frozen=True, slots=True)
class Document:
    """A document's part in a row.

    Attributes:
        document: its number in the prepared data.
        source, origin: what it came from: the source's name, and the file within it.
        offset, bytes: where its text is in that file.
        content_hash: of its text, hexadecimal.
        span: first and last-plus-one position in the row.
        document_start: which of its tokens is at the beginning of the span.
    """

    document: int
    source: str
    origin: str
    offset: int
    bytes: int
    content_hash: str
    span: tuple[int, int]
    document_start: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step.

    Attributes:
        row: its place in the step's batch, from 0.
        sample: its global sample number.
        distinct: share of its tokens that are different ids; a row that repeats itself has few.
        documents: what it shows, in order.
    """

    row: int
    sample: int
    distinct: float
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Blame:
    """What a step showed.

    Attributes:
        step: the step.
        loss, grad_norm: as journalled.
        rows: its sequences.
        earlier: first sample numbers of earlier tries of the step, before a rollback or a resume.
    """

    step: int
    loss: float
    grad_norm: float
    rows: tuple[Row, ...]
    earlier: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the fields by name for JSON."""
        return dataclasses.asdict(self)


class Tracer:
    """Leads from the steps of one run to their documents.

    Raises:
        UserError: no run there, or its prepared data is gone or has changed since.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.recipe: Recipe = read_recipe(folder)
        records = read(folder / "journal.jsonl") if (folder / "journal.jsonl").exists() else []
        self._tries = [r for r in records if r["type"] == "step" and "sample" in r]
        self.steps: Mapping[int, Record] = {r["step"]: r for r in timeline(self._tries)}
        if not self.steps:
            raise UserError(f"'{folder}' has not journalled a step yet; blame it when it has")
        self._tokens = self._opened(folder, records)
        self._loader = Loader(self._tokens, self.recipe.train.seq_len, self.recipe.seed)

    def blame(self, step: int) -> Blame:
        """Return what ``step`` showed.

        Raises:
            UserError: the run has not done that step.
        """
        if step not in self.steps:
            raise UserError(f"step {step} is not among the run's steps {min(self.steps)} to {max(self.steps)}")
        record = self.steps[step]
        first = int(record["sample"])
        tries = [int(r["sample"]) for r in self._tries if r["step"] == step]
        rows = tuple(self._row(i, first + i) for i in range(self.recipe.train.batch_size))
        earlier = tuple(dict.fromkeys(sample for sample in tries if sample != first))
        return Blame(step, float(record["loss"]), float(record["grad_norm"]), rows, earlier)

    def text(self, sample: int) -> str:
        """Return the text that a sample shows."""
        return self._tokenizer.decode(self._loader.row(sample).tolist())

    def around(self, step: int, window: int) -> list[tuple[str, int, int]]:
        """Return (origin, tokens, rows) for what the last ``window`` steps up to ``step`` showed, the most first.

        Raises:
            UserError: the run has not done that step.
        """
        tokens: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for number in range(max(step - window + 1, min(self.steps)), step + 1):
            if number == step or number in self.steps:
                for row in self.blame(number).rows:
                    for one in row.documents:
                        tokens[one.origin] += one.span[1] - one.span[0]
                    rows.update({one.origin for one in row.documents})
        return [(origin, n, rows[origin]) for origin, n in tokens.most_common()]

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer.load(self._tokens.tokenizer_path)

    def _row(self, row: int, sample: int) -> Row:
        ids = self._loader.row(sample)
        documents = tuple(Document(**facts) for facts in self._loader.documents(sample))
        return Row(row, sample, len(set(ids.tolist())) / len(ids), documents)

    def _opened(self, folder: Path, records: Sequence[Record]) -> Tokens:
        kept = Path(self.recipe.data.dir)
        if not is_prepared(kept):
            raise UserError(
                f"the prepared data of '{folder}' was in '{kept}' and is gone; prepare it again with poise data prepare"
            )
        tokens = open_tokens(kept)
        said = next((r.get("data", {}).get("fingerprint") for r in reversed(records) if r["type"] == "run"), None)
        if said is not None and said != tokens.fingerprint:
            raise UserError(
                f"'{kept}' no longer holds the data that '{folder}' was trained on; its documents are others"
            )
        return tokens
