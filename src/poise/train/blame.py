"""Which documents were in that step, and was anything odd about them? For any step of any run, after the fact.

Nothing is logged for it but the number of the step's first sample: a batch is a pure function of (seed, sample number),
so a sample leads to its sequence, its sequence to a span of tokens, and that to the documents it was made from
(``data/feed/loader.py``). It works while the run goes on, and after a rollback: the samples are those that the step
showed when it was done last; its earlier tries can be asked for, and so can steps that a rollback has undone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from poise.core.errors import UserError
from poise.core.journal import Record, parse_line
from poise.data.feed.loader import Loader, View
from poise.data.feed.skips import samples_of
from poise.data.look.odd import odd
from poise.data.store import Tokens, check, is_prepared, open_tokens
from poise.data.tokens import periodic, tokenizer
from poise.train.recipe import Recipe
from poise.train.run import read_recipe

CHECKED: Final = 2**28
"""Bytes of data whose hashes are compared before anything is said of it: a quarter of a second."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document's part in a row.

    Attributes:
        document: its number in the training text.
        source, origin: what it came from: the source's name, and the file within it.
        offset, bytes: where it begins in that file, and how many bytes of cleaned text it has.
        content_hash: of its text, hexadecimal.
        span: first and last-plus-one position in the row.
        document_start: which of its tokens is at the beginning of the span.
        facts: everything else that is known of it: ``id``, ``url``, ``cluster`` and ``cluster_size`` of its duplicates,
            ``repeat_count``, ``repeat_tokens``, ``replaced_bytes``, ``language``, ``scores``.
        odd: what is odd about it, in words.
    """

    document: int
    source: str
    origin: str
    offset: int
    bytes: int
    content_hash: str
    span: tuple[int, int]
    document_start: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    odd: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Repeat:
    """A repeated n-gram in a row.

    Attributes:
        span: first and last-plus-one position in the row.
        period, count: tokens of the n-gram, and how often it comes in the document.
        masked: whether its repeats were left out of the loss.
        text: the n-gram.
    """

    span: tuple[int, int]
    period: int
    count: int
    masked: bool
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step.

    Attributes:
        row: its place in the step's batch, from 0.
        sample: its global sample number.
        source: the source it came from, or all of them where they are not mixed by weight.
        loss: its mean loss in nats where the run recorded it (steps with an alarm, and ``train.row_losses``).
        distinct: share of its tokens that are different ids; a row that repeats itself has few.
        counted: share of its targets that counted in the loss.
        documents: what it shows, in order.
        repeats: the repeated n-grams in it.
    """

    row: int
    sample: int
    source: str
    loss: float | None
    distinct: float
    counted: float
    documents: tuple[Document, ...]
    repeats: tuple[Repeat, ...]


@dataclass(frozen=True, slots=True)
class Blame:
    """What a step showed.

    Attributes:
        step: the step.
        loss, grad_norm: as journalled.
        rows: its sequences.
        attempt, tries: which try of the step this is, from 1, and how often it was done (rollbacks, resumes).
        earlier: first sample numbers of its other tries, where they differ.
        undone: whether this try no longer counts: the run went back behind it.
        seq_len: length of the sequences that its samples were cut into.
    """

    step: int
    loss: float
    grad_norm: float
    rows: tuple[Row, ...]
    attempt: int = 1
    tries: int = 1
    earlier: tuple[int, ...] = ()
    undone: bool = False
    seq_len: int = 0

    def record(self) -> dict[str, Any]:
        """Return the fields by name for JSON."""
        return dataclasses.asdict(self)


class Seen(NamedTuple):
    """What several steps showed of one document."""

    document: int
    origin: str
    tokens: int
    rows: int
    odd: tuple[str, ...]


class Tracer:
    """Leads from the steps of one run to their documents.

    Args:
        folder: of the run.
        data: where its prepared data is now, if it has been moved; it has to be the same.

    Raises:
        UserError: no run there, or its prepared data is gone or has changed since.
    """

    def __init__(self, folder: str | Path, data: str | Path | None = None) -> None:
        self._folder = Path(folder)
        moved = None if data is None else {"data": {"dir": str(Path(data).expanduser())}}
        self.recipe: Recipe = read_recipe(self._folder, moved)
        self._log = _Log.read(self._folder / "journal.jsonl")
        if not self._log.steps:
            raise UserError(f"'{folder}' has not journalled a step yet; blame it when it has")
        self._tokens = self._opened(moved is not None)
        self._loader = Loader(self._tokens, self.recipe.train.seq_len, self.recipe.seed, feed=self.recipe.data.feed)

    @property
    def steps(self) -> Iterable[int]:
        """The steps of the run, in order."""
        return sorted(self._log.steps)

    def blame(self, step: int, attempt: int | None = None) -> Blame:
        """Return what ``step`` showed: its last try, or the one asked for, from 1.

        Raises:
            UserError: the run has not done that step, or not so often.
        """
        tries, chosen = self._chosen(step, attempt)
        at, record = tries[chosen - 1]
        size = self.recipe.train.batch_size
        samples = samples_of(record, size)
        losses = record.get("row_losses") or []
        view = self._view(at, record, len(samples))
        rows = tuple(
            self._row(i, sample, losses[i] if i < len(losses) else None, view) for i, sample in enumerate(samples)
        )
        firsts = [samples_of(one, size)[0] for _, one in tries]
        return Blame(
            step=step,
            loss=float(record["loss"]),
            grad_norm=float(record["grad_norm"]),
            rows=rows,
            attempt=chosen,
            tries=len(tries),
            earlier=tuple(dict.fromkeys(sample for sample in firsts if sample != samples[0])),
            undone=chosen < len(tries) or self._log.undone(step, at),
            seq_len=view.seq_len or self.recipe.train.seq_len,
        )

    def _chosen(self, step: int, attempt: int | None) -> tuple[list[tuple[int, Record]], int]:
        tries = self._log.tries(step)
        chosen = len(tries) if attempt is None else attempt
        if not 1 <= chosen <= len(tries):
            times = "once" if len(tries) == 1 else f"{len(tries)} times"
            raise UserError(f"step {step} has no try {chosen}; it was done {times}, give 1 to {len(tries)}")
        return tries, chosen

    def text(self, sample: int) -> str:
        """Return the text that a sample shows."""
        return self._tokenizer.decode(self._loader.row(sample).tolist())

    def marked(self, row: Row) -> Iterator[tuple[str, Repeat | None]]:
        """Yield a row's text in pieces, each with the repeat it lies in; a document ends in one piece with the end of
        text."""
        ids, at = self._loader.row(row.sample).tolist(), 0
        for repeat in row.repeats:
            first, last = max(repeat.span[0], at), repeat.span[1]
            if first > at:
                yield self._tokenizer.decode(ids[at:first]), None
            if last > first:
                yield self._tokenizer.decode(ids[first:last]), repeat
            at = max(at, last)
        if at < len(ids):
            yield self._tokenizer.decode(ids[at:]), None

    def around(self, step: int, window: int, attempt: int | None = None) -> list[Seen]:
        """Return what the last ``window`` steps up to ``step`` showed, by document, the most (input) tokens first.

        They are the steps that led to that try of it (the last): what was done again later is not among them.

        Raises:
            UserError: the run has not done that step, or not so often.
        """
        tokens: Counter[int] = Counter()
        rows: Counter[int] = Counter()
        known: dict[int, Document] = {}
        tries, chosen = self._chosen(step, attempt)
        for record in self._log.leading_to(tries[chosen - 1][0], step - window + 1, step):
            samples = samples_of(record, self.recipe.train.batch_size)
            length = self._length(record, len(samples))
            for sample in samples:
                documents = self._documents(sample, length)
                for one in documents:
                    # The last token of a row is only a target: as an input it is the first of another.
                    tokens[one.document] += min(one.span[1], self.recipe.train.seq_len) - one.span[0]
                    if one.document not in known or len(one.odd) > len(known[one.document].odd):
                        known[one.document] = one
                rows.update({one.document for one in documents})
        return [Seen(d, known[d].origin, n, rows[d], known[d].odd) for d, n in tokens.most_common()]

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer.load(self._tokens.tokenizer_path)

    def _view(self, at: int, record: Record, samples: int) -> View:
        """Return how the step that is journalled at a place of the file showed its samples."""
        return View(self._length(record, samples), self._log.dropped(at))

    def _length(self, record: Record, samples: int) -> int:
        """Return the length of a step's sequences; 0 where it is the full one of a run without a ramp."""
        growing = self.recipe.train.length_ramp
        seen = int(record["tokens"]) - samples * self.recipe.train.seq_len
        return growing.at(max(seen, 0)) if growing else 0

    def _row(self, row: int, sample: int, loss: Any, view: View) -> Row:
        ids = self._loader.row(sample)
        least = periodic.threshold(view.seq_len or self.recipe.train.seq_len)  # a shorter window masks earlier
        repeats = tuple(
            Repeat(
                span=one["span"],
                period=one["period"],
                count=one["count"],
                masked=self.recipe.data.mask_repeats and one["count"] >= least,
                text=self._tokenizer.decode(ids[one["span"][0] : one["span"][0] + one["period"]].tolist()),
            )
            for one in self._loader.repeats(sample)
            if not one["blank"]
        )
        value = None if loss is None else float(loss)
        return Row(
            row=row,
            sample=sample,
            source=self._loader.sources[int(self._loader.source_of([sample])[0])],
            loss=None if value is None or math.isnan(value) else value,
            distinct=len(set(ids.tolist())) / len(ids),
            counted=float(self._loader.counted(sample, view).mean()),
            documents=self._documents(sample, view.seq_len),
            repeats=repeats,
        )

    def _documents(self, sample: int, length: int) -> tuple[Document, ...]:
        """Return the documents in a sample; what repeats itself is odd where sequences of this length mask it."""
        found = []
        known = self._tokens.manifest.get("quantiles", {})
        count = self._tokens.manifest["splits"]["train"]["documents"]
        least = periodic.threshold(length or self.recipe.train.seq_len)
        for facts in self._loader.documents(sample):
            of = {name: facts.pop(name) for name in _OF_DOCUMENT}
            found.append(Document(**of, facts=facts, odd=tuple(odd(facts, known, count, least))))
        return tuple(found)

    def _opened(self, moved: bool) -> Tokens:
        kept = Path(self.recipe.data.dir)
        if not moved and not is_prepared(kept):
            raise UserError(
                f"the prepared data of '{self._folder}' was in '{kept}' and is gone; give --data DIR if it has been "
                f"moved, or prepare it again with poise data prepare"
            )
        tokens = open_tokens(kept)
        check(tokens, CHECKED)
        said = self._log.data.get("fingerprint")
        if said is not None and said != tokens.fingerprint:
            raise UserError(
                f"'{kept}' does not hold the data that '{self._folder}' was trained on; its documents are others"
            )
        return tokens


_OF_DOCUMENT: Final = tuple(f.name for f in dataclasses.fields(Document) if f.name not in ("facts", "odd"))
_HEAD: Final = re.compile(rb'\{\s*"type":\s*"(run|step|restart|rollback|drop)"(?:[^{}]*?"step":\s*(\d+))?')


class _Log:
    """Where the steps are in a journal. Only the lines that are asked for are parsed: a long run has millions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.steps: dict[int, list[int]] = {}  # step -> places of its lines in the file, in order
        self.data: Mapping[str, Any] = {}
        self._drops: list[tuple[int, tuple[int, ...]]] = [(-1, ())]  # from this place on: documents that do not count
        self._backs: list[tuple[int, int]] = []  # place, step that the run went back to

    @classmethod
    def read(cls, path: Path) -> _Log:
        log = cls(path)
        if not path.exists():
            return log
        at = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"}\n") and (match := _HEAD.match(line)):  # others are torn
                    log._take(match[1], match[2], line, at)
                at += len(line)
        return log

    def _take(self, kind: bytes, step: bytes | None, line: bytes, at: int) -> None:
        if kind == b"step":
            if step is not None:
                self.steps.setdefault(int(step), []).append(at)
            return
        record = parse_line(line)
        if record is None:
            return
        if kind == b"run":
            self.data = record.get("data", {})
        elif kind == b"drop":
            known = self._drops[-1][1]
            self._drops.append((at, tuple(sorted({*known, *record.get("documents", ())}))))
        else:
            self._backs.append((at, int(record["to" if kind == b"rollback" else "step"])))
            if kind == b"restart":  # what the checkpoint knew of
                self._drops.append((at, tuple(record.get("dropped", ()))))

    def dropped(self, at: int) -> tuple[int, ...]:
        """Return the documents that did not count in a step, by the place of its line."""
        return self._drops[bisect_right(self._drops, at, key=lambda one: one[0]) - 1][1]

    def undone(self, step: int, at: int) -> bool:
        """Return whether the run went back behind a step after the line at this place."""
        return any(place > at and to < step for place, to in self._backs)

    def tries(self, step: int) -> list[tuple[int, Record]]:
        """Return the records of a step with their places, in order."""
        found = []
        if step in self.steps:
            with self._path.open("rb") as file:
                for at in self.steps[step]:
                    file.seek(at)
                    if (record := parse_line(file.readline())) is not None and "sample" in record:
                        found.append((at, record))
        if not found:
            raise UserError(f"step {step} is not among the run's steps {min(self.steps)} to {max(self.steps)}")
        return found

    def leading_to(self, at: int, first: int, last: int) -> Iterator[Record]:
        """Yield the records of the steps from ``first`` to ``last`` that led to the one at this place."""
        for step in range(max(first, min(self.steps)), last + 1):
            before = [record for place, record in self.tries(step) if place <= at] if step in self.steps else []
            if before:
                yield before[-1]
