"""What the words in a record say about its numbers, in tables and in JSON alike.

* **long tables**: one number a row, and a column that says which (``step,tag,value``): a column for each tag;
* **splits**: training and validation have the same columns, and another says which (``split``, ``phase``, ...);
* **ranks**: each process has written its own rows; those of the lowest one count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from poise.postmortem.readers.names import EPOCH, LR, SAMPLES, STEP, TOKENS, choose, is_held_out, rank, words
from poise.postmortem.readers.source import Item, Row, Source

Texts = Mapping[str, str]
Record = tuple[Row, Texts]

LOOK_AT = 200
"""Records from which the columns' parts are learned."""

SPLITS = ("split", "phase", "mode", "stage", "subset", "partition", "dataset_split", "data_split", "event", "type")
TAGS = ("tag", "metric", "metric_name", "name", "key", "variable", "scalar")
VALUES = ("value", "metric_value", "scalar_value")
RUNS = ("run", "run_id", "run_name", "run_uuid", "experiment")
RANKS = ("rank", "global_rank", "process_index", "process_id", "rank_id", "local_rank")
MOST_RANKS = 1_000_000

_HELD_OUT = frozenset({"val", "valid", "validation", "eval", "evaluation", "evaluate", "dev", "test", "heldout"})
_OF_THE_RUN = (STEP, TOKENS, SAMPLES, LR, EPOCH)
_CLOCKS = frozenset({"time", "timestamp", "date", "rank", "seconds", "elapsed"})


def matters(name: str) -> bool:
    """Return whether the words in a column of this name say anything about the numbers."""
    return _plain(name) in (*SPLITS, *TAGS, *RUNS)


def is_needed(names: Iterable[str]) -> bool:
    """Return whether records with these columns have to go through ``rows``."""
    return any(matters(name) or _plain(name) in RANKS for name in names)


def rows(source: Source, records: Iterator[Record]) -> Iterator[Item]:
    """Yield the numbers of the records, under the names that the words give them."""
    first = list(islice(records, LOOK_AT))
    ranks, lowest = _ranks(first)
    split = _split(first)
    long = _Long(source, first)
    held_out = _Names()
    for row, texts in chain(first, records):
        if ranks and row.get(ranks, lowest) > lowest:
            source.notes.add(f"rows of other processes than '{ranks}' {lowest:.0f} left out")
            continue
        if texts:
            if long.value and (pivoted := long(row, texts)) is not None:
                row = pivoted
            if split and (word := _held_out(texts.get(split, ""))):
                row = {held_out(name, word): value for name, value in row.items()}
        if row:
            yield row


class _Long:
    """A table with one number a row."""

    def __init__(self, source: Source, first: Sequence[Record]) -> None:
        self._source = source
        self.value = self._tag = ""
        self._run: str | None = None
        whole = [(row, texts) for row, texts in first if texts]
        for row, texts in whole[:1]:
            tags, values = _named(texts, TAGS), _named(row, VALUES)
            if tags and values and 2 * sum(tags in texts and values in row for row, texts in whole) >= len(first):
                self._tag, self.value = tags, values
                source.notes.add(f"a long table: one column for each '{tags}'")

    def __call__(self, row: Row, texts: Texts) -> Row | None:
        """Return the row with its value under the tag's name; ``None`` where there are not both."""
        if self._tag not in texts or self.value not in row:
            return None
        run = next((text for name, text in texts.items() if _plain(name) in RUNS), "")
        if self._run is None:
            self._run = run
        if run != self._run:
            self._source.notes.add(f"rows of other runs than '{self._run}' left out")
            return {}
        return {texts[self._tag] if name == self.value else name: value for name, value in row.items()}


class _Names:
    """Names for what was measured on data that is not trained on, remembered."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}

    def __call__(self, name: str, word: str) -> str:
        known = self._known.get((name, word))
        if known is None:
            known = self._known[name, word] = name if _is_general(name) else f"{word}/{name}"
        return known


def _is_general(name: str) -> bool:
    """Return whether a column is about the run, whatever data its row is about."""
    said = set(words(name))
    return (
        bool(said & _CLOCKS)
        or "train" in said
        or is_held_out(name)
        or any(rank(meaning, name) is not None for meaning in _OF_THE_RUN)
    )


def _split(first: Sequence[Record]) -> str:
    """Return the column that says what data a row is about: it says something else than validation as well."""
    for plain in SPLITS:
        said = {texts[name] for _, texts in first for name in texts if _plain(name) == plain}
        if said and not all(map(_held_out, said)):
            return next(name for _, texts in first for name in texts if _plain(name) == plain)
    return ""


def _held_out(text: str) -> str:
    """Return the word that says so, where a text stands for data that is not trained on.

    >>> _held_out("validation"), _held_out("eval_step"), _held_out("train"), _held_out("held-out")
    ('validation', 'eval', '', 'val')
    """
    if len(text) > 40:
        return ""
    said = words(text)
    return (
        "val" if "_".join(said) in ("held_out", "heldout") else next((word for word in said if word in _HELD_OUT), "")
    )


def _ranks(first: Sequence[Record]) -> tuple[str, float]:
    """Return the column that counts processes, and the lowest; an empty name where there is none.

    It is the same in all rows, or different ones have rows of the same step.
    """
    counts: dict[str, int] = {}
    for row, _ in first:
        for name in row:
            counts[name] = counts.get(name, 0) + 1
    step, _ = choose(STEP, counts)
    for plain in RANKS:
        name = _named(counts, (plain,))
        if not name:
            continue
        seen = [(row[name], row.get(step or "")) for row, _ in first if name in row]
        ranks = {place for place, _ in seen}
        if not all(0 <= place < MOST_RANKS and place == place // 1 for place in ranks):
            continue
        steps: dict[float, set[float]] = {}
        for place, at in seen:
            if at is not None:
                steps.setdefault(at, set()).add(place)
        if len(ranks) == 1 or any(len(places) > 1 for places in steps.values()):
            return name, min(ranks)
    return "", 0.0


def _named(columns: Iterable[str], wanted: Sequence[str]) -> str:
    return next((name for plain in wanted for name in columns if _plain(name) == plain), "")


def _plain(name: str) -> str:
    return "_".join(words(name.rpartition("/")[2]))
