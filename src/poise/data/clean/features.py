"""Numbers about each document's text that the published filter rules ask for, from flat bytes without a Python loop.

What the rules leave open is decided here, and differs in these points from datatrove's implementation, which splits
words with spaCy:

* a word is a run of characters without white space (so is Dolma's); spaCy cuts punctuation off as words of its own;
* a line or paragraph counts when it holds a word; datatrove counts blank lines among the lines of some rules;
* the top n-gram must occur twice, and of equally frequent ones the longest counts; elsewhere the first, even if alone;
* characters in duplicate n-grams are those of all words covered by an n-gram that has occurred before, each word once,
  as Gopher's paper says; datatrove steps over a duplicate and so misses some that overlap;
* sentences are estimated from punctuation; others use trained models (punkt).

In scripts without spaces a "word" is a clause, so word rules are for languages with spaces.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data import record
from poise.data.clean import chars, flat
from poise.data.clean.flat import Chunk, Ints

SCORES: Final = "scores"
"""The column that ``Score`` adds: a struct of float32."""

ABOUT: Final[dict[str, str]] = {
    "characters": "characters, white space included",
    "words": "words with more than punctuation or symbols",
    "mean_word_length": "characters of such a word, punctuation at its ends included",
    "hash_ratio": "signs # a word",
    "ellipsis_ratio": "ellipses (... or …) a word",
    "bullet_lines": "share of lines that begin with a bullet (• or -)",
    "ellipsis_lines": "share of lines that end with an ellipsis",
    "alpha_words": "share of words with at least one letter",
    "stop_words": "how many of: the, be, to, of, and, that, have, with",
    "duplicate_lines": "share of lines that have occurred before in the document",
    "duplicate_line_chars": "share of the document's characters in such lines",
    "duplicate_line_text": "the same, of the characters without newlines",
    "duplicate_paragraphs": "share of paragraphs that have occurred before in the document",
    "duplicate_paragraph_chars": "share of the document's characters in such paragraphs",
    **{f"top_{n}gram": f"share of characters in the most frequent {n}-gram of words" for n in (2, 3, 4)},
    **{
        f"duplicate_{n}grams": f"share of characters in {n}-grams of words that have occurred before"
        for n in range(5, 11)
    },
    "sentences": "sentences, estimated",
    "curly_brackets": "signs {",
    "lorem_ipsum": "occurrences of lorem ipsum",
    "terminal_lines": "share of lines that end with . ? ! or their like in other scripts",
    "short_lines": "share of lines of at most 30 characters",
    "newlines_per_word": "newlines a word",
    "mean_line": "characters a line",
    "longest_line": "characters of the longest line",
    "letters": "share of characters that are letters",
    "digits": "share of characters that are decimal digits",
    "entropy": "Shannon entropy of the words, in bits a word",
    "compression": "bytes over compressed bytes of the first 64 KiB (zlib level 1)",
}
"""What each feature says, in the order of the columns."""

FEATURES: Final[tuple[str, ...]] = tuple(ABOUT)
"""Names of the features: the fields of the column ``scores``, in order."""

SCORES_TYPE: Final = pa.struct([pa.field(name, pa.float32(), nullable=False) for name in FEATURES])

STOP_WORDS: Final = ("the", "be", "to", "of", "and", "that", "have", "with")
SHORT_LINE: Final = 30
COMPRESSED_BYTES: Final = 64 * 2**10

Floats = NDArray[np.float64]


def features(text: pa.StringArray) -> dict[str, NDArray[np.float32]]:
    """Return every feature of every document, each (D,) float32, never NaN; an empty document has zeros.

    Documents over 2 MiB are judged by their first 2 MiB.
    """
    parts = [_features_of(chunk) for chunk in flat.chunks(text)]
    empty = np.zeros(0, np.float32)
    return {name: np.concatenate([part[name].astype(np.float32) for part in parts] or [empty]) for name in FEATURES}


@dataclass(frozen=True, slots=True)
class Score:
    """Stage: adds the column ``scores``, one struct of float32 a document with the fields ``FEATURES``."""

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        found = features(batch.column("text"))
        arrays = [pa.array(found[name]) for name in FEATURES]
        return record.set_column(batch, SCORES, pa.StructArray.from_arrays(arrays, fields=list(SCORES_TYPE)))


class _View:
    """A chunk with its words and the lines that hold a word (L); what several features need is made once."""

    def __init__(self, chunk: Chunk) -> None:
        places = flat.layout(chunk)
        full_K = np.diff(places.line_word) > 0
        full = np.flatnonzero(full_K)
        after_blank_K = np.ones(len(full_K), np.bool_)
        after_blank_K[1:] = ~full_K[:-1]
        after_blank_K[np.searchsorted(places.line_start, chunk.first[:-1])] = True
        self.documents = len(chunk.first) - 1
        self.bytes_N, self.class_N, self.first_D1 = chunk.data, places.classes, chunk.first
        self.ascii = places.inner is None
        self.length = places.length
        self.start_W, self.end_W, self.word_D1 = places.starts, places.ends, places.first_word
        self.words_D = np.diff(places.first_word)
        self.doc_W = np.repeat(np.arange(self.documents), self.words_D)
        self.line_L, self.line_end_L = places.line_start[full], places.newlines[full]
        self.after_blank_L = after_blank_K[full]  # the line begins a paragraph
        self.first_word_L, self.last_word_L = places.line_word[full], places.line_word[full + 1] - 1
        self.lines_D = np.diff(np.searchsorted(self.line_L, chunk.first))
        self.doc_L = np.repeat(np.arange(self.documents), self.lines_D)
        self.chars_D = places.length(chunk.first[:-1], chunk.first[1:]) - 1
        self.newlines_D = self.per_document(places.newlines) - 1
        self.size_W = places.length(places.starts, places.ends)
        self.prefix = flat.Prefix(chunk.data)

    def per_document(self, places_M: Ints) -> Ints:
        """Return how many of some sorted places are in each document, (D,)."""
        return np.diff(np.searchsorted(places_M, self.first_D1))

    def marked(self, mark: int) -> Ints:
        """Return the number of bytes of a class in each document, (D,)."""
        return flat.Rank((self.class_N & mark) != 0).within(self.first_D1)


def _share(part_D: NDArray[np.number], whole_D: NDArray[np.number]) -> Floats:
    """Return part over whole, and 0 where there is no whole."""
    shares: Floats = part_D / np.maximum(whole_D, 1)
    return shares


def _sums(owner_M: Ints, value_M: NDArray[np.number | np.bool_] | None, owners: int) -> Floats:
    """Return the sum of the values (or the number of items) of each owner, (owners,)."""
    return np.bincount(owner_M, value_M, owners).astype(np.float64)


def _features_of(chunk: Chunk) -> dict[str, Floats]:
    view = _View(chunk)
    found: dict[str, Floats] = {"characters": view.chars_D.astype(np.float64)}
    for part in (_of_words, _of_lines, _of_duplicates, _of_ngrams, _of_signs):
        found |= part(view)
    found["compression"] = _compression(chunk)
    return found


def _of_words(view: _View) -> dict[str, Floats]:
    start_W, end_W, doc_W, documents = view.start_W, view.end_W, view.doc_W, view.documents
    all_D = view.words_D
    first_W = view.class_N[start_W]
    plain_W, letter_W = (first_W & chars.PLAIN) != 0, (first_W & chars.LETTER) != 0
    # Most words begin with a letter; the rest are looked through.
    for marks_W, mark in ((plain_W, chars.PLAIN), (letter_W, chars.LETTER)):
        rest = np.flatnonzero(~marks_W)
        rank = flat.Rank((view.class_N & mark) != 0)
        marks_W[rest] = rank.before(end_W[rest]) > rank.before(start_W[rest])
    plain_D = _sums(doc_W, plain_W, documents)
    return {
        "words": plain_D,
        "mean_word_length": _share(_sums(doc_W, view.size_W * plain_W, documents), plain_D),
        "alpha_words": _share(_sums(doc_W, letter_W, documents), all_D),
        "stop_words": _stop_words(view),
        "sentences": _sentences(view),
        "newlines_per_word": _share(view.newlines_D, all_D),
    }


def _stop_words(view: _View) -> Floats:
    """Count the stop words that each document holds, without regard to ASCII case and punctuation at the ends."""
    short = np.flatnonzero(view.end_W - view.start_W <= 6)
    start, end = view.start_W[short], view.end_W[short]
    bytes_N, class_N = view.bytes_N, view.class_N
    start = start + ((class_N[start] & chars.PLAIN) == 0)
    end = end - ((class_N[end - 1] & (chars.PLAIN | chars.INNER)) == 0)
    fits = (end - start >= 2) & (end - start <= 4)
    start, size, doc = start[fits], (end - start)[fits], view.doc_W[short[fits]]
    value = np.zeros(len(start), np.uint32)
    for step in range(4):
        # Past its end a short word meets the newline that ends every chunk, or the next word; both are masked.
        byte = bytes_N[np.minimum(start + step, len(bytes_N) - 1)].astype(np.uint32) | 0x20
        value |= byte << np.uint32(8 * step)
    value &= np.array([0, 0, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF], np.uint32)[size]
    present_D = np.zeros(view.documents, np.uint8)
    for number, word in enumerate(STOP_WORDS):
        hit = value == int.from_bytes(word.encode(), "little")
        seen = np.zeros(view.documents, np.bool_)
        seen[doc[hit]] = True
        present_D |= seen.astype(np.uint8) << np.uint8(number)
    return flat.ones(present_D.astype(np.uint64)).astype(np.float64)


def _sentences(view: _View) -> Floats:
    """Estimate sentences: one a line, and one more wherever a sentence ends inside of a line.

    It ends after a word that ends with . ? ! (a quote or bracket may follow), if the next word does not begin with a
    lower-case letter; and at a full-width stop that no space follows.
    """
    class_N, start_W, end_W = view.class_N, view.start_W, view.end_W
    ends_W = (class_N[end_W - 1] & chars.TERMINAL) != 0
    closed = np.flatnonzero((class_N[end_W - 1] & chars.CLOSER) != 0)
    closed = closed[end_W[closed] - start_W[closed] > 1]
    ends_W[closed] = (class_N[end_W[closed] - 2] & chars.TERMINAL) != 0
    ends_W[view.last_word_L] = False
    at = np.flatnonzero(ends_W)
    at = at[(class_N[start_W[at + 1]] & chars.LOWER) == 0]
    count_D = view.lines_D + _sums(view.doc_W[at], None, view.documents)
    if not view.ascii:
        bytes_N = view.bytes_N
        wide = np.flatnonzero((bytes_N >= 0xE3) & ((class_N & chars.TERMINAL) != 0))
        wide = wide[(class_N[wide + 3] & chars.SPACE) == 0]
        count_D = count_D + view.per_document(wide)
    return count_D


def _of_lines(view: _View) -> dict[str, Floats]:
    bytes_N, class_N, doc_L, count_D = view.bytes_N, view.class_N, view.doc_L, view.lines_D
    size_L = view.length(view.line_L, view.line_end_L)
    longest_D = np.zeros(view.documents, np.int64)
    np.maximum.at(longest_D, doc_L, size_L)
    first_L, end_L = view.start_W[view.first_word_L], view.end_W[view.last_word_L]

    def share(marks_L: NDArray[np.bool_]) -> Floats:
        return _share(_sums(doc_L, marks_L, view.documents), count_D)

    bullet_L = flat.spells(bytes_N, first_L, b"-") | flat.spells(bytes_N, first_L, "•".encode())
    ellipsis_L = flat.spells(bytes_N, end_L - 3, b"...") | flat.spells(bytes_N, end_L - 3, "…".encode())
    return {
        "bullet_lines": share(bullet_L),
        "ellipsis_lines": share(ellipsis_L),
        "terminal_lines": share((class_N[view.line_end_L - 1] & chars.TERMINAL) != 0),
        "short_lines": share(size_L <= SHORT_LINE),
        "mean_line": _share(_sums(doc_L, size_L, view.documents), count_D),
        "longest_line": longest_D.astype(np.float64),
    }


def _of_duplicates(view: _View) -> dict[str, Floats]:
    """Lines and paragraphs that have occurred before in their document."""
    doc_L = view.doc_L
    again_D, chars_D = _again(view, view.line_L, view.line_end_L, doc_L)
    text_D = view.chars_D - view.newlines_D
    first_P = np.flatnonzero(view.after_blank_L)
    last_P = np.append(first_P, len(doc_L))[1:] - 1
    doc_P = doc_L[first_P]
    para_again_D, para_chars_D = _again(view, view.line_L[first_P], view.line_end_L[last_P], doc_P)
    return {
        "duplicate_lines": _share(again_D, view.lines_D),
        "duplicate_line_chars": _share(chars_D, view.chars_D),
        "duplicate_line_text": _share(chars_D, text_D),
        "duplicate_paragraphs": _share(para_again_D, _sums(doc_P, None, view.documents)),
        "duplicate_paragraph_chars": _share(para_chars_D, view.chars_D),
    }


def _again(view: _View, start_M: Ints, end_M: Ints, doc_M: Ints) -> tuple[Floats, Floats]:
    """Return, for each document, how many stretches have occurred before in it, and their characters."""
    repeats = flat.groups(view.prefix.hashes(start_M, end_M), doc_M).repeats()
    size = view.length(start_M[repeats], end_M[repeats])
    doc = doc_M[repeats]
    return _sums(doc, None, view.documents), _sums(doc, size, view.documents)


def _of_ngrams(view: _View) -> dict[str, Floats]:
    """Entropy, top 2- to 4-grams and duplicate 5- to 10-grams of words, from short to long.

    An n-gram can only occur twice where both (n-1)-grams in it do: so only such places are looked at, and they become
    fewer with every n.
    """
    start_W, end_W, doc_W, documents = view.start_W, view.end_W, view.doc_W, view.documents
    hash_W = view.prefix.hashes(start_W, end_W)
    sequence = flat.Prefix(hash_W)
    size_W1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(view.size_W)])
    border_W = np.zeros(len(start_W) + 1, np.bool_)  # the word is the first of its document
    border_W[view.word_D1] = True
    shared_W = np.zeros(len(start_W) + 1, np.bool_)  # the (n-1)-gram that begins here occurs twice

    grouped = flat.groups(hash_W, doc_W)
    shared_W[grouped.shared()] = True
    found = {"entropy": _entropy(view, grouped)}
    for n in range(2, 11):
        at = np.flatnonzero(shared_W[:-1] & shared_W[1:] & ~border_W[1:])
        doc = doc_W[at]
        grouped = flat.groups(sequence.hashes(at, at + n), doc)
        shared_W[:] = False
        shared_W[at[grouped.shared()]] = True
        if n <= 4:
            first, count = grouped.counted()
            chars_G = size_W1[at[first] + n] - size_W1[at[first]] + n - 1
            top_D = np.zeros(documents, np.int64)
            np.maximum.at(top_D, doc[first], count << 32 | chars_G)
            found[f"top_{n}gram"] = _share((top_D >> 32) * (top_D & 0xFFFFFFFF), view.chars_D)
        else:
            repeats = at[grouped.repeats()]
            reach = repeats + n
            reach[:-1] = np.minimum(reach[:-1], repeats[1:])  # where two overlap, the later one has the rest
            covered_D = _sums(doc_W[repeats], size_W1[reach] - size_W1[repeats], documents)
            found[f"duplicate_{n}grams"] = _share(covered_D, view.chars_D)
    return found


def _entropy(view: _View, grouped: flat.Groups) -> Floats:
    """Return log2 W - (sum over words of count * log2 count) / W of each document."""
    all_D = view.words_D
    first, count = grouped.counted()
    part_D = _sums(view.doc_W[first], count * np.log2(count), view.documents)
    return np.maximum(np.log2(np.maximum(all_D, 1)) - _share(part_D, all_D), 0.0)


def _of_signs(view: _View) -> dict[str, Floats]:
    bytes_N, all_D = view.bytes_N, view.words_D
    return {
        "hash_ratio": _share(view.per_document(np.flatnonzero(bytes_N == ord("#"))), all_D),
        "ellipsis_ratio": _share(_ellipses(view), all_D),
        "curly_brackets": view.per_document(np.flatnonzero(bytes_N == ord("{"))).astype(np.float64),
        "lorem_ipsum": view.per_document(flat.find(bytes_N, b"lorem ipsum", ignore_case=True)).astype(np.float64),
        "letters": _share(view.marked(chars.LETTER), view.chars_D),
        "digits": _share(view.marked(chars.DIGIT), view.chars_D),
    }


def _ellipses(view: _View) -> Ints:
    """Count "..." (three dots each, as ``str.count``) and "…" of each document, (D,)."""
    at = flat.find(view.bytes_N, b"...")
    place = np.arange(len(at))
    new = np.ones(len(at), np.bool_)
    new[1:] = np.diff(at) != 1
    since = place - np.maximum.accumulate(np.where(new, place, 0))
    wide = flat.find(view.bytes_N, "…".encode()) if not view.ascii else at[:0]
    return view.per_document(at[since % 3 == 0]) + view.per_document(wide)


def _compression(chunk: Chunk) -> Floats:
    """Return bytes over compressed bytes of each document's beginning; 0 for an empty document."""
    whole = chunk.data.data
    first = chunk.first.tolist()
    ratios = np.zeros(len(first) - 1)
    # A loop over documents, but the work is zlib's.
    for number, (start, end) in enumerate(pairwise(first)):
        size = min(end - 1 - start, COMPRESSED_BYTES)
        if size:
            ratios[number] = size / compressed(whole[start : start + size])
    return ratios


def compressed(data: memoryview | bytes) -> int:
    """Return the size after zlib at level 1.

    Window and hash table are as large as the data needs: setting up the default ones takes longer than compressing a
    document of some kilobytes. The sizes differ by less than 0.5 %.
    """
    window = max(9, min(15, (len(data) + 261).bit_length()))
    squeezer = zlib.compressobj(1, zlib.DEFLATED, window, window - 7)
    return len(squeezer.compress(data)) + len(squeezer.flush())
