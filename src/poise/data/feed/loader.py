"""Batches from prepared data: a batch is a pure function of (seed, sample number).

Sample number n is a sequence of one source (``mix``), of the whole split where nothing is mixed. Number m of a
source is sequence ``order(m mod S)`` of its epoch ``m // S``, where ``order`` is a permutation of that epoch. Resuming
needs the number of the next sample and nothing else, and any sample can be traced to its documents later.

What does not count in the loss has the target ``IGNORE``: the repeats of an n-gram that repeats itself many times
(``periodic``; the first occurrence counts), documents that were dropped, padding.

Shape letters: B sequences in a batch, T positions in a sequence, C = T + 1, S sequences in an epoch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.core.rng import derive
from poise.core.types import IGNORE, Batch
from poise.data.feed import mix, pack
from poise.data.feed.permute import Permutation
from poise.data.feed.rows import Concatenated, Packed, Rows
from poise.data.store import Split, Tokens
from poise.data.tokens import periodic

_BLOCK: Final = 1024  # sample numbers permuted at once: one call costs as much for eight of them

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Feed:
    """How prepared data becomes samples.

    Attributes:
        mask_repeats: leave repeats of n-grams out of the loss (OLMo 2's rule, at the level of spans).
        pack: ``concat`` cuts documents wherever a sequence ends; ``best_fit`` cuts only documents that are too long.
        document_mask: attention stays inside a document and positions begin again with each.
        mix: ``NAME=WEIGHT[@EPOCHS]`` for each source; empty reads the whole text in proportion to its size.
        temperature: instead of weights: in proportion to size ** (1 / temperature); 0 is off.
    """

    mask_repeats: bool = True
    pack: Literal["concat", "best_fit"] = "concat"
    document_mask: bool = False
    mix: tuple[str, ...] = ()
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.pack not in ("concat", "best_fit"):
            raise UserError(
                f"pack is {self.pack!r}{nearest(self.pack, ('concat', 'best_fit'))}; use concat or best_fit"
            )
        if self.temperature < 0 or (self.temperature and self.mix):
            raise UserError(f"temperature is {self.temperature}; use a positive number and no mix, or 0")
        mix.parse(self.mix)


@dataclass(frozen=True, slots=True)
class View:
    """What a step changes about the samples it shows.

    Attributes:
        seq_len: length of its sequences, a divisor of T: each sample is cut into T / seq_len of them; 0 means T.
        dropped: numbers of documents whose tokens do not count in the loss.
    """

    seq_len: int = 0
    dropped: tuple[int, ...] = ()


PLAIN: Final = View()


class Loader:
    """Reads one split of prepared data as sequences.

    The training split is shuffled anew every epoch; the held-out split is read in its own order, the same
    for every seed, and begins again after its last sequence; nothing is mixed or masked in it.

    Attributes:
        sequences: S, sequences in an epoch of all sources together.
        seq_len: T, positions in a sequence.
        feed: how the data becomes samples.
        mix: the mixture, or ``None`` where nothing is mixed.
        sources: names of the sources a sample can come from.

    Raises:
        UserError: the split has too few tokens for one sequence, ``seq_len`` is not positive, or the mixture names
            a source that is not there.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, split: str = "train", feed: Feed | None = None) -> None:
        if seq_len < 1:
            raise UserError(f"the sequence length is {seq_len}; give a positive number, e.g. 256")
        self._split = tokens.split(split)
        if len(self._split.tokens) < seq_len + 1:
            raise UserError(_too_short(split, len(self._split.tokens), seq_len))
        self.seq_len, self._seed, self._shuffled = seq_len, seed, split == "train"
        given = feed or Feed()
        self.feed = given if self._shuffled else Feed(mask_repeats=False, document_mask=given.document_mask)
        self.packings: list[pack.Packing] = []
        self.sources, self._rows, self.mix = self._laid_out(tokens)
        self.sequences = sum(rows.count for rows in self._rows)
        self._seeds = [seed if self.mix is None else derive(seed, "source", name) for name in self.sources]
        self._block = lru_cache(maxsize=4)(self._placed_block)  # these save time and change nothing
        self._masked = lru_cache(maxsize=8)(self._masked_spans)

    def batch(self, first: int, count: int, view: View = PLAIN) -> Batch:
        """Return samples ``first`` .. ``first + count - 1``; see ``gather``."""
        assert first >= 0 and count > 0, (first, count)
        return self.gather(range(first, first + count), view)

    def gather(self, samples: Sequence[int], view: View = PLAIN) -> Batch:
        """Return any samples as a batch: inputs and targets (B, T) int64, T and B as the view has it."""
        sources, numbers = self._positions(samples)
        ids = np.empty((len(samples), self.seq_len + 1), np.int64)
        ignored = np.zeros((len(samples), self.seq_len), bool)
        documents = np.zeros((len(samples), self.seq_len), np.int32) if self.feed.document_mask else None
        for source in range(len(self._rows)) if len(self._rows) > 1 else (0,):
            here = np.flatnonzero(sources == source) if len(self._rows) > 1 else slice(None)
            some = numbers[here]
            if not len(some):
                continue
            rows = self._rows[source]
            ids[here] = rows.tokens(some)
            if isinstance(rows, Concatenated) and documents is None:
                near = self._near(rows, some, view)
                if len(near):
                    at = near if isinstance(here, slice) else here[near]
                    ignored[at] = self._ignored(*rows.places(some[near]), view)
            else:
                places, pieces = rows.places(some)
                ignored[here] = self._ignored(places, pieces, view)
                if documents is not None:
                    documents[here] = self._document_numbers(places)
        length = view.seq_len or self.seq_len
        assert self.seq_len % length == 0, (self.seq_len, length)
        block = torch.from_numpy(ids)
        # Not ``contiguous`` twice: of a single row both would be views of the same memory, and the mask goes into one.
        inputs_BT, targets_BT = block[:, :-1].contiguous(), block[:, 1:].clone(memory_format=torch.contiguous_format)
        if ignored.any():
            targets_BT.masked_fill_(torch.from_numpy(ignored), IGNORE)
        documents_BT = None if documents is None else torch.from_numpy(documents).view(-1, length)
        each = self.seq_len // length
        numbered = tuple(int(n) for n in samples for _ in range(each)) if each > 1 else tuple(samples)
        return Batch(inputs_BT.view(-1, length), targets_BT.view(-1, length), numbered, documents_BT)

    def row(self, sample: int) -> NDArray[np.int64]:
        """Return the T + 1 tokens of a sample: its inputs, and one more that is the last target."""
        source, number = self._position(sample)
        tokens: NDArray[np.int64] = self._rows[source].tokens(np.array([number]))[0]
        return tokens

    def counted(self, sample: int, view: View = PLAIN) -> NDArray[np.bool_]:
        """Return which of the T targets of a sample count in the loss."""
        source, number = self._position(sample)
        counted: NDArray[np.bool_] = ~self._ignored(*self._rows[source].places(np.array([number])), view)[0]
        return counted

    @property
    def document_count(self) -> int:
        """Documents in the split."""
        return len(self._split.index.lengths)

    def source_of(self, samples: Sequence[int]) -> Ints:
        """Return which of ``sources`` each sample comes from, (B,)."""
        return self._positions(samples)[0]

    def documents(self, sample: int) -> list[dict[str, Any]]:
        """Return the documents that a sample shows, in order.

        Each is a dict: all columns of its row in ``docs.arrow`` but ``token_start`` (``content_hash`` and
        ``cluster`` hexadecimal), ``document`` (number of that row), ``span`` (first and last-plus-one position in
        ``row``), ``document_start`` (which token of the document is at the beginning of the span).
        """
        source, number = self._position(sample)
        (places,), pieces = self._rows[source].places(np.array([number]))
        found = []
        for begin, end in _stretches(places, None if pieces is None else pieces[0]):
            start = int(places[begin])
            between = self._documents_between(start, start + end - begin)
            known = self._split.table.slice(between[0][0], len(between)).to_pylist()  # one look costs as much as ten
            for (document, first, last), facts in zip(between, known, strict=True):
                token = facts.pop("token_start")
                for name in ("content_hash", "cluster"):
                    facts[name] = None if facts[name] is None else facts[name].hex()
                span = (begin + first - start, begin + last - start)
                found.append({"document": document, **facts, "span": span, "document_start": first - token})
        return found

    def repeats(self, sample: int) -> list[dict[str, Any]]:
        """Return the repeated n-grams in a sample.

        Each is a dict: ``span``, ``period``, ``count`` in the whole document, ``blank``, ``masked``.
        """
        source, number = self._position(sample)
        (places,), pieces = self._rows[source].places(np.array([number]))
        all_of = self._split.repeats
        found = []
        for begin, end in _stretches(places, None if pieces is None else pieces[0]):
            start, stop = int(places[begin]), int(places[begin]) + end - begin
            # Not numpy's searchsorted: it would copy the whole mapped column first. Starts and ends both rise.
            low = bisect_right(range(len(all_of)), start, key=lambda i: int(all_of["start"][i] + all_of["length"][i]))
            some = all_of[low : bisect_left(all_of["start"], stop)]
            for one, counts in zip(some, periodic.counted(some, self.seq_len).tolist(), strict=True):
                first, last = max(int(one["start"]), start), min(int(one["start"]) + int(one["length"]), stop)
                if first < last:
                    found.append(
                        {
                            "span": (begin + first - start, begin + last - start),
                            "period": int(one["period"]),
                            "count": int(one["count"]),
                            "blank": bool(one["blank"]),
                            "masked": self.feed.mask_repeats and counts,
                        }
                    )
        return found

    # -- which sequence ------------------------------------------------------------------------------------------

    def _laid_out(self, tokens: Tokens) -> tuple[tuple[str, ...], list[Rows], mix.Mix | None]:
        """Return the sources, their sequences, and how they are mixed."""
        split = self._split
        weights, epochs = mix.parse(self.feed.mix, [span.name for span in split.sources])
        if not weights and not self.feed.temperature:
            name = "+".join(span.name for span in split.sources)
            whole = self._rows_of(split, 0, len(split.tokens), 0, len(split.index.lengths), tokens)
            return (name,), [whole], None
        spans = [span for span in split.sources if not weights or span.name in weights]
        rows: list[Rows] = [
            self._rows_of(split, span.token_start, span.tokens, span.document_start, span.documents, tokens)
            for span in spans
        ]
        sizes = {span.name: one.count for span, one in zip(spans, rows, strict=True)}
        mixed = mix.Mix.of(
            sizes, weights or None, temperature=self.feed.temperature or None, epochs=epochs, seed=self._seed
        )
        return tuple(sizes), rows, mixed

    def _rows_of(self, split: Split, token: int, tokens: int, document: int, documents: int, opened: Tokens) -> Rows:
        if self.feed.pack == "concat":
            return Concatenated(split, token, tokens, self.seq_len)
        packing = pack.best_fit(np.array(split.index.lengths[document : document + documents]), self.seq_len)
        self.packings.append(packing)
        return Packed(split, document, packing, opened.end_of_text)

    def _position(self, sample: int) -> tuple[int, int]:
        assert sample >= 0, sample
        sources, numbers = self._positions([sample])
        return int(sources[0]), int(numbers[0])

    def _positions(self, samples: Sequence[int]) -> tuple[Ints, Ints]:
        """Return which source's sequence each sample is, and its number there."""
        wanted = np.fromiter(samples, np.int64, len(samples))
        end = None if self.mix is None else self.mix.total
        if self.mix is not None and end is not None and len(wanted) and wanted.max() >= end:
            self.mix.place(wanted)  # says what is wrong
        if isinstance(samples, range) and samples.step == 1:
            begin, end = samples[0] // _BLOCK, samples[-1] // _BLOCK + 1
            blocks = [self._block(number) for number in range(begin, end)]
            shift = samples[0] - begin * _BLOCK
            joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
            sources, numbers = joined[:, shift : shift + len(samples)]
            return sources, numbers
        found = np.empty((2, len(wanted)), np.int64)
        for number in np.unique(wanted // _BLOCK).tolist():
            here = wanted // _BLOCK == number
            found[:, here] = self._block(number)[:, wanted[here] % _BLOCK]
        return found[0], found[1]

    def _placed_block(self, number: int) -> Ints:
        """Return (source, sequence) of the samples of a block, (2, ``_BLOCK``)."""
        samples = np.arange(number * _BLOCK, (number + 1) * _BLOCK)
        if self.mix is None:
            sources, local = np.zeros_like(samples), samples
        else:
            end = self.mix.total
            # What comes after the end of all sources is never asked for.
            inside = samples if end is None else np.minimum(samples, end - 1)
            sources, local = self.mix.place(inside)
        out = np.empty_like(local)
        for source in np.unique(sources).tolist():
            of_source = sources == source
            epochs, places = np.divmod(local[of_source], self._rows[source].count)
            if self._shuffled:
                placed = np.empty_like(places)
                for epoch in np.unique(epochs).tolist():
                    here = epochs == epoch
                    order = Permutation(self._rows[source].count, self._seeds[source], epoch)
                    placed[here] = order(places[here])
                places = placed
            out[of_source] = places
        return np.stack([sources, out])

    # -- what counts -----------------------------------------------------------------------------------------------

    def _near(self, rows: Concatenated, numbers: Ints, view: View) -> Ints:
        """Return which of some sequences, by their place in ``numbers``, have a target that does not count."""
        first, last = self._masked(self._window(view), view.dropped)
        begin = rows.first(numbers) + 1
        end = begin + self.seq_len
        return np.flatnonzero(np.searchsorted(last, begin, "right") < np.searchsorted(first, end, "left"))

    def _window(self, view: View) -> int:
        """Return the length of the windows in which repeats are masked; 0 where they are not."""
        return (view.seq_len or self.seq_len) if self.feed.mask_repeats else 0

    def _masked_spans(self, window: int, dropped: tuple[int, ...]) -> tuple[Ints, Ints]:
        """Return the first and the last-plus-one token of every stretch that does not count, in order, disjoint."""
        repeats = self._split.repeats
        some = repeats[periodic.counted(repeats, window)] if window else repeats[:0]
        pointers, lengths, size = self._split.index.pointers, self._split.index.lengths, self._split.tokens.itemsize
        known = np.array([number for number in dropped if number < len(lengths)], np.int64)
        begins = pointers[known] // size
        first = np.concatenate([some["start"] + some["period"], begins]).astype(np.int64)
        last = np.concatenate([some["start"] + some["length"], begins + lengths[known]]).astype(np.int64)
        order = np.argsort(first, kind="stable")
        first, last = first[order], np.maximum.accumulate(last[order])
        apart = np.ones(len(first), bool)
        apart[1:] = first[1:] > last[:-1]
        heads = np.flatnonzero(apart)
        return first[heads], last[np.append(heads[1:], len(last)) - 1] if len(heads) else last

    def _ignored(self, places: Ints, pieces: NDArray[np.int32] | None, view: View) -> NDArray[np.bool_]:
        """Return which targets do not count, (N, T); ``places`` and ``pieces`` are (N, C)."""
        targets = places[:, 1:]
        first, last = self._masked(self._window(view), view.dropped)
        ignored = np.zeros(targets.shape, bool)
        if len(first):
            # Most rows have nothing masked: a row's places lie between its smallest and its largest.
            high = targets.max(axis=1)
            low = np.where(targets < 0, high[:, None], targets).min(axis=1)
            near = np.searchsorted(last, low, "right") < np.searchsorted(first, high, "right")
            some = targets[near]
            at = np.searchsorted(first, some, "right") - 1
            ignored[near] = (at >= 0) & (some < last[np.maximum(at, 0)])
        if pieces is not None:
            ignored |= targets < 0
            # The rest of a document that was cut does not follow from the document before it in the row.
            row, at = np.nonzero(pieces[:, 1:] != pieces[:, :-1])
            begins, after = self._split.begins, targets[row, at]
            ignored[row, at] |= begins[np.searchsorted(begins, after, "right") - 1] != after
        return ignored

    def _document_numbers(self, places: Ints) -> NDArray[np.int32]:
        """Return for each input position which document of its row it is in, (N, T), rising from 0."""
        inputs = places[:, :-1]
        numbers = np.searchsorted(self._split.begins, inputs, "right")
        out = np.zeros(inputs.shape, np.int32)
        out[:, 1:] = np.cumsum(numbers[:, 1:] != numbers[:, :-1], axis=1)
        return out

    def _documents_between(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return (document, first token, last-plus-one token) of the documents in tokens ``start`` .. ``end - 1``."""
        size, index = self._split.tokens.itemsize, self._split.index
        # Not numpy's searchsorted: it would copy the whole mapped array first.
        low = bisect_right(index.pointers, start * size) - 1
        high = bisect_right(index.pointers, (end - 1) * size)
        found = []
        for number in range(low, high):
            begin = int(index.pointers[number]) // size
            found.append((number, max(start, begin), min(end, begin + int(index.lengths[number]))))
        return found


def _stretches(places: Ints, pieces: NDArray[np.int32] | None) -> list[tuple[int, int]]:
    """Return the first and last-plus-one position of each piece of a row, padding left out."""
    if pieces is None:
        return [(0, len(places))]
    real = places >= 0
    edges = np.flatnonzero(np.diff(pieces)) + 1
    bounds = [0, *edges.tolist(), len(places)]
    return [(a, b) for a, b in pairwise(bounds) if real[a]]


def _too_short(split: str, tokens: int, seq_len: int) -> str:
    need = f"the {split} split has {tokens:,} tokens, and one sequence of {seq_len:,} needs {seq_len + 1:,}"
    if split == "val":
        share = "more text or a larger --data.val_fraction"
        return f"{need}; use {f'a sequence length of at most {tokens - 1:,}, ' if tokens > 1 else ''}{share}"
    return f"{need}; use a sequence length of at most {tokens - 1:,} or more text"
