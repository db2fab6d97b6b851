"""Documents that hold text of an evaluation set, found by shared n-grams of words.

A training document counts as contaminated when it shares at least one run of ``n`` words with a text of the evaluation
set, compared without case and punctuation; 13 words are the choice of Brown et al. 2020 (GPT-3, appendix C). Texts
of fewer words are matched whole: anywhere in a document when they have at least 8 words, and only against a document
that consists of nothing else when they have fewer, because a run such as "yes" stands everywhere.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import record
from poise.data.dedup.shingles import Words, ngrams, runs, words

SHORTEST: Final = 8
"""Words from which on a short evaluation text is looked for inside documents."""

_BATCH: Final = 4096  # evaluation texts hashed at once


@dataclass(frozen=True, eq=False)
class Index:
    """The n-grams of evaluation texts, as sorted 64-bit hashes; picklable.

    ``inside``: for each number of words the hashes looked for anywhere in a document; ``alone``: those that only a
    document of just these words matches. ``texts``: how many texts are in it; ``without_words``: how many are not.
    """

    n: int
    inside: dict[int, NDArray[np.uint64]]
    alone: dict[int, NDArray[np.uint64]]
    texts: int
    without_words: int

    @classmethod
    def of(cls, texts: Iterable[str], n: int = 13) -> Index:
        """Return the index of evaluation texts.

        Errors:
            UserError: ``n`` is below 1, or no text holds a word.
        """
        if n < 1:
            raise UserError(f"contamination: n is {n}; it must be at least 1 word")
        found: dict[int, list[NDArray[np.uint64]]] = {}
        count = empty = 0
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == _BATCH:
                count, empty = count + len(batch), empty + _collect(batch, n, found)
                batch.clear()
        count, empty = count + len(batch), empty + _collect(batch, n, found)
        if count == empty:
            raise UserError(f"none of the {count} evaluation texts holds a word; give texts to look for")
        grams = {size: np.unique(np.concatenate(parts)) for size, parts in sorted(found.items())}
        shortest = min(n, SHORTEST)
        return cls(
            n,
            {size: each for size, each in grams.items() if size >= shortest},
            {size: each for size, each in grams.items() if size < shortest},
            count - empty,
            empty,
        )

    @classmethod
    def read(cls, path: str | Path, n: int = 13) -> Index:
        """Return the index of the evaluation texts in a file, or in all files of a folder.

        Of ``.jsonl`` (also ``.json``, ``.gz``) every string in every record is a text, of ``.parquet`` every string in
        every row; of any other file the paragraphs, parted by empty lines.

        Errors:
            UserError: nothing is there, a file is damaged, or no text holds a word.
        """
        root = Path(path)
        files = sorted(each for each in root.rglob("*") if each.is_file()) if root.is_dir() else [root]
        if not files or not files[0].is_file():
            raise UserError(f"no evaluation texts at '{path}'; give a file or a folder of .jsonl, .parquet or text")
        return cls.of(itertools.chain.from_iterable(map(_texts, files)), n)

    def matches(self, text: pa.StringArray) -> NDArray[np.int64]:
        """Return how many places of every document hold an n-gram of the index, (N,).

        A run of ``n + k`` shared words counts k + 1 times.
        """
        counts_N = np.zeros(len(text), np.int64)
        longest = max(self.inside, default=1)
        carry = np.zeros(0, np.uint64)
        for block in words(text):
            if block.part == 0:
                carry = carry[:0]
            run = np.concatenate([carry, block.hashes]) if len(carry) else block.hashes
            for size, known in self.inside.items():
                at = _found(ngrams(run, size), known, self._sieves[size])
                if block.part or not block.last:
                    # A long document in parts: what lies within the carried words was counted with the part before.
                    counts_N[block.row] += np.count_nonzero(at + size > len(carry))
                    continue
                owner = np.searchsorted(block.offsets, at, side="right") - 1
                owner = owner[at + size <= block.offsets[owner + 1]]  # a run may not leave its document
                counts_N += np.bincount(block.row + owner, minlength=len(counts_N))
            if block.part or not block.last:
                carry = run[-(longest - 1) :] if longest > 1 else run[:0]
            else:
                self._count_alone(block, counts_N)
        return counts_N

    def _count_alone(self, block: Words, counts_N: NDArray[np.int64]) -> None:
        """Count documents that consist of just the words of a very short text."""
        size_D = np.diff(block.offsets)
        for size, known in self.alone.items():
            rows = np.flatnonzero(size_D == size)
            hashes = runs(block.hashes, block.offsets[rows], size)
            counts_N[block.row + rows[np.isin(hashes, known)]] += 1

    @functools.cached_property
    def _sieves(self) -> dict[int, NDArray[np.bool_]]:
        """For each size a table over the leading bits of a hash: False says for certain that it is not in the index."""
        return {size: _sieve(known) for size, known in self.inside.items()}

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_sieves"}  # cheap to make again


@dataclass(frozen=True, eq=False)
class Decontaminate:
    """Stage: the reason ``contaminated.<name>`` for documents that share at least ``at_least`` n-grams with the index.

    Errors:
        UserError: the name is empty or not one word, or ``at_least`` is below 1.
    """

    index: Index
    name: str
    at_least: int = 1

    def __post_init__(self) -> None:
        if not self.name or any(character.isspace() for character in self.name):
            raise UserError(f"contamination: name '{self.name}' of the evaluation set must be one word")
        if self.at_least < 1:
            raise UserError(f"contamination: at_least is {self.at_least}; it must be at least 1 match")

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        matches_N = self.index.matches(batch.column("text"))
        return record.drop(batch, matches_N >= self.at_least, f"contaminated.{self.name}")


def _texts(path: Path) -> Iterator[str]:
    """Yield the evaluation texts of one file."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            for batch in pq.ParquetFile(path).iter_batches(_BATCH):
                for row in batch.to_pylist():
                    yield from _strings(row)
            return
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if name.endswith(".jsonl"):
                for line in file:
                    if line.strip():
                        yield from _strings(json.loads(line))
            elif name.endswith(".json"):
                yield from _strings(json.load(file))
            else:
                yield from re.split(r"\n\s*\n", file.read().decode("utf-8", "replace"))
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"evaluation texts '{path}' cannot be read: {reason}; mend or leave out the file") from error


def _strings(value: object) -> Iterator[str]:
    """Yield every string inside a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _collect(texts: list[str], n: int, found: dict[int, list[NDArray[np.uint64]]]) -> int:
    """Add the n-grams of texts to ``found`` by their number of words; return how many texts have no word."""
    empty = 0
    carry = np.zeros(0, np.uint64)
    for block in words(pa.array(texts, pa.large_string())):
        if block.part or not block.last:  # one text longer than a block
            carry = np.concatenate([carry[:0] if block.part == 0 else carry, block.hashes])
            found.setdefault(n, []).append(ngrams(carry, n))
            carry = carry[-(n - 1) :] if n > 1 else carry[:0]
            continue
        size_D = np.diff(block.offsets)
        empty += int(np.count_nonzero(size_D == 0))
        at = np.arange(max(len(block.hashes) - n + 1, 0))
        owner = np.searchsorted(block.offsets, at, side="right") - 1
        inside = at + n <= block.offsets[owner + 1]
        if inside.any():
            found.setdefault(n, []).append(ngrams(block.hashes, n)[inside])
        for size in range(1, n):
            rows = np.flatnonzero(size_D == size)
            if len(rows):
                found.setdefault(size, []).append(runs(block.hashes, block.offsets[rows], size))
    return empty


def _sieve(known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    bits = min(max(16, (16 * len(known)).bit_length()), 27)
    table = np.zeros(2**bits, bool)
    table[known >> np.uint64(64 - bits)] = True
    return table


def _found(grams: NDArray[np.uint64], known: NDArray[np.uint64], sieve: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the positions of the grams that are in ``known``, which is sorted."""
    shift = np.uint64(65 - len(sieve).bit_length())
    at = np.flatnonzero(sieve[grams >> shift])
    place = np.searchsorted(known, grams[at])
    place[place == len(known)] = 0
    sure: NDArray[np.int64] = at[known[place] == grams[at]]
    return sure
