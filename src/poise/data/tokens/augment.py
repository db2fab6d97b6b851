"""Opt-in changes of the training text: BPE-dropout and fill-in-the-middle. Neither is claimed to make training stable.

Both are pure functions of the text: what happens to a document depends on its content hash and the seed alone, not on
its place, its neighbours or the number of processes.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.core.rng import derive
from poise.data.bits import mix
from poise.data.record import flat
from poise.data.tokens.tokenizer import Tokenizer, gather, segments, with_ends

SENTINELS: Final = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""Special tokens before prefix, suffix and middle; give them to ``tokenizer.train`` as ``special_tokens``."""

_LONG_WORD: Final = 512  # letters; the merges of longer words are not dropped, their cost grows with the square
_NO_RANK: Final = np.int64(2**62)


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """Move the middle of some documents to their end, so that a model learns to fill gaps.

    A document is cut at two places, uniform over its bytes and moved to the beginning of a character, and becomes
    ``<prefix> a <suffix> c <middle> b``, or with probability ``spm`` ``<prefix><suffix> c <middle> a b``. Source:
    M. Bavarian et al., "Efficient training of language models to fill in the middle", 2022 (arXiv 2207.14255), who cut
    by characters, not by tokens, and mix both orders half and half.

    Attributes:
        rate: probability that a document is changed, 0 to 1.
        seed: chooses documents and places.
        spm: share of the second order among the changed documents.
        sentinels: the three special tokens, which the tokenizer must have.
    """

    rate: float
    seed: int = 0
    spm: float = 0.5
    sentinels: tuple[str, str, str] = SENTINELS

    def __post_init__(self) -> None:
        _probability("rate", self.rate)
        _probability("spm", self.spm)
        if len(self.sentinels) != 3 or len(set(self.sentinels)) != 3:
            raise UserError(f"sentinels are {self.sentinels}; give three different tokens, as {SENTINELS}")

    def encode(
        self,
        tokenizer: Tokenizer,
        text: pa.StringArray | pa.LargeStringArray,
        hashes: NDArray[np.uint64],
        *,
        threads: int | None = None,
        end: bool = False,
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return ids and offsets as ``Tokenizer.encode_flat`` does.

        Args:
            tokenizer: has the sentinels as special tokens.
            text: (N,) documents.
            hashes: (N, 2) their content hashes.
            threads: as for ``encode_flat``.
            end: put the end of text after every document.

        Raises:
            UserError: the tokenizer lacks a sentinel.
        """
        marks = [tokenizer.special_id(name) for name in self.sentinels]
        for name, mark in zip(self.sentinels, marks, strict=True):
            if mark is None:
                raise UserError(f"the tokenizer has no special token '{name}'; train one with it, or name its own")
        data, places = flat(text)
        keys = _keys(hashes, self.seed, "fill-in-the-middle")
        chosen = _uniform(keys, 0) < self.rate
        second = _uniform(keys, 1) < self.spm  # the order with the prefix after the suffix
        parts = _cuts(data, places, keys, chosen)
        cut = pa.LargeStringArray.from_buffers(len(parts) - 1, pa.py_buffer(parts), pa.py_buffer(data))
        ids, offsets = tokenizer.encode_flat(cut, threads=threads)
        a, b, c = offsets[:-1].reshape(-1, 3).T
        size_a, size_b, size_c = np.diff(offsets).reshape(-1, 3).T
        prefix, suffix, middle = (np.full(len(text), len(ids) + k) for k in range(3))
        starts_N8 = np.stack([prefix, a, suffix, c, middle, a, b, c], 1)
        # Documents that stay as they are have their text in c, and nothing in a and b.
        first_c, last_c = size_c * chosen, size_c * ~chosen
        lengths = [chosen, size_a * ~second, chosen, first_c, chosen, size_a * second, size_b, last_c]
        lengths_N8 = np.stack(lengths, 1).astype(np.int64)
        ids = gather(np.append(ids, np.array(marks, np.uint32)), starts_N8.ravel(), lengths_N8.ravel())
        offsets = np.concatenate([[0], np.cumsum(lengths_N8.sum(axis=1))])
        return with_ends(ids, offsets, tokenizer.end_of_text) if end else (ids, offsets)


@dataclass(frozen=True, slots=True)
class BpeDropout:
    """Encode with each merge of the BPE left out with probability ``p``, so that words come in several spellings.

    In every step each merge that a word allows is dropped with probability ``p`` and the best of the others is made; a
    word is done when none is left. Source: I. Provilkov, D. Emelianenko, E. Voita, "BPE-dropout: simple and effective
    subword regularization", ACL 2020 (arXiv 1910.13267). With ``p = 0`` the ids are those of the tokenizer. Words of
    more than 512 letters are encoded without dropout. Much slower than plain encoding.

    Attributes:
        p: probability, 0 to 1; the paper uses 0.1.
        seed: chooses the merges.
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        _probability("p", self.p)

    def encode(
        self,
        tokenizer: Tokenizer,
        text: pa.StringArray | pa.LargeStringArray,
        hashes: NDArray[np.uint64],
        *,
        end: bool = False,
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return ids and offsets as ``Tokenizer.encode_flat`` does; ``hashes`` (N, 2) are the content hashes.

        Raises:
            UserError: the tokenizer is not a byte-level BPE, or it has added tokens that a text can hold.
        """
        merges = _Merges.of(tokenizer)
        words = [[w for part in segments(row.as_py()) for w in tokenizer.words(part)] for row in text]
        flat_words = [word for row in words for word in row]
        counts = np.array([len(row) for row in words], np.int64)
        letters = np.array([len(word) for word in flat_words], np.int64)
        first = np.cumsum(counts) - counts
        keys = _keys(hashes, self.seed, "bpe-dropout")
        lengths, pieces = np.zeros(len(flat_words), np.int64), []
        # A few million letters at once bound the memory.
        for low, high in _blocks(letters, 2**21):
            document = np.repeat(np.arange(len(words)), counts)[low:high]
            # The number of a word in its document, not in the batch, so that the batch does not matter.
            word_keys = mix(keys[document] + (np.arange(low, high) - first[document]).astype(np.uint64) * _STEP)
            ids, lengths[low:high] = merges.apply(flat_words[low:high], word_keys, self.p)
            pieces.append(ids)
        ids = np.concatenate([np.zeros(0, np.uint32), *pieces])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        offsets = ends[np.concatenate([[0], np.cumsum(counts)])]
        return with_ends(ids, offsets, tokenizer.end_of_text) if end else (ids, offsets)


class _Merges:
    """The merges of a byte-level BPE as arrays."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self._size = np.int64(max(vocabulary.values()) + 1)
        keys = np.array([vocabulary[a] * int(self._size) + vocabulary[b] for a, b in merges], np.int64)
        ids = np.array([vocabulary[a + b] for a, b in merges], np.int64)
        _, last = np.unique(keys[::-1], return_index=True)  # as a map filled in order: the last of equals holds
        at = len(keys) - 1 - last
        self._keys, self._ids, self._ranks = keys[at], ids[at], at.astype(np.int64)
        self._letters = np.full(0x400, -1, np.int64)
        for token, i in vocabulary.items():
            if len(token) == 1 and ord(token) < len(self._letters):
                self._letters[ord(token)] = i

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Merges:
        """Take the merges out of a tokenizer."""
        facts = json.loads(tokenizer.to_json())
        model = facts["model"]
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model.get("type") != "BPE" or model.get("byte_fallback") or affixes or not tokenizer.byte_level:
            raise UserError("BPE-dropout needs a byte-level BPE tokenizer, this one is not; train one, or leave it out")
        plain = [token["content"] for token in facts.get("added_tokens") or () if not token["special"]]
        if plain:
            raise UserError(f"BPE-dropout cannot encode the added token '{plain[0]}'; use a tokenizer without, or none")
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        return cls(model["vocab"], [(a, b) for a, b in pairs])

    def apply(
        self, words: list[str], keys: NDArray[np.uint64], p: float
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the ids of words one after another, and the number of each, (len(words),)."""
        lengths = np.array([len(word) for word in words], np.int64)
        codes = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
        symbol = self._letters[codes]
        assert (symbol >= 0).all(), "a byte without a token"
        word = np.repeat(np.arange(len(words)), lengths)
        place = np.arange(len(word)) - (np.cumsum(lengths) - lengths)[word]
        tag = keys[word] + place.astype(np.uint64) * _STEP  # names a symbol by where its first letter is
        chance = np.where(lengths > _LONG_WORD, 0.0, p)
        done: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        step = 0
        while len(word):
            symbol, word, tag, finished = self._step(symbol, word, tag, chance, step)
            done.append(finished)
            step += 1
        words_done = np.concatenate([np.zeros(0, np.int64), *(w for w, _ in done)])
        order = np.argsort(words_done, kind="stable")
        ids = np.concatenate([np.zeros(0, np.int64), *(s for _, s in done)])[order]
        return ids.astype(np.uint32), np.bincount(words_done, minlength=len(words))

    def _step(
        self,
        symbol: NDArray[np.int64],
        word: NDArray[np.int64],
        tag: NDArray[np.uint64],
        chance: NDArray[np.float64],
        step: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Make the best merge of every word, at all its places; return what goes on, and the words that are done."""
        rank = np.full(len(symbol), _NO_RANK)
        into = np.zeros(len(symbol), np.int64)
        pair = np.flatnonzero(word[1:] == word[:-1])
        key = symbol[pair] * self._size + symbol[pair + 1]
        at = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        allowed = (self._keys[at] == key) if len(self._keys) else np.zeros(len(pair), bool)
        pair, at = pair[allowed], at[allowed]
        stays = _uniform(tag[pair], step) >= chance[word[pair]]
        pair, at = pair[stays], at[stays]
        rank[pair], into[pair] = self._ranks[at], self._ids[at]
        begins = np.flatnonzero(np.append(True, word[1:] != word[:-1]))
        sizes = np.diff(np.append(begins, len(word)))
        best = np.repeat(np.minimum.reduceat(rank, begins), sizes)
        chosen = (rank == best) & (best < _NO_RANK)
        # Of overlapping places (aaa) every second one, from the left.
        index = np.arange(len(chosen))
        run = np.maximum.accumulate(np.where(chosen & ~np.append(False, chosen[:-1]), index, 0))
        chosen &= (index - run) % 2 == 0
        symbol = np.where(chosen, into, symbol)
        alive = best < _NO_RANK
        keep = alive & ~np.append(False, chosen[:-1])
        return symbol[keep], word[keep], tag[keep], (word[~alive], symbol[~alive])


_STEP: Final = np.uint64(0x9E3779B97F4A7C15)


def _uniform(keys: NDArray[np.uint64], number: int) -> NDArray[np.float64]:
    """Return draw ``number`` of each key, uniform in [0, 1)."""
    salt = np.uint64((number + 1) * int(_STEP) % 2**64)
    return (mix(mix(keys) + salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _keys(hashes: NDArray[np.uint64], seed: int, name: str) -> NDArray[np.uint64]:
    """Return a key for each document, (N,)."""
    assert hashes.ndim == 2 and hashes.shape[1] == 2, hashes.shape
    return mix(hashes[:, 0] ^ mix(hashes[:, 1] + np.uint64(derive(seed, name))))


def _cuts(
    data: NDArray[np.uint8], places: NDArray[np.int64], keys: NDArray[np.uint64], chosen: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the offsets of three parts of each document, (3 N + 1,); the first two are empty if it is not chosen."""
    low, high = places[:-1, None], places[1:, None]
    draws_N2 = np.sort(np.stack([_uniform(keys, 2), _uniform(keys, 3)], 1), axis=1)
    at_N2 = np.where(chosen[:, None], low + (draws_N2 * (high - low + 1)).astype(np.int64), low)
    for _ in range(3 if len(data) else 0):  # back to the first byte of a character
        inside = (data[np.minimum(at_N2, len(data) - 1)] & 0xC0) == 0x80
        at_N2 -= inside & (at_N2 < high)
    return np.append(np.column_stack([low, at_N2]).ravel(), places[-1:])


def _blocks(sizes: NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Return ranges of items of about ``limit`` in sum."""
    number = np.cumsum(sizes) // limit
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(sizes)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{name} is {value}; give a probability from 0 to 1, e.g. 0.1")
