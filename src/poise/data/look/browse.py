"""Looking at prepared documents: a sample, one by its number, the ends of a column, a search through all text.

The text is decoded from the tokens, so it is what a model is trained on. Decoding puts together the bytes that each id
stands for; where that would not be what the tokenizer itself says (checked on the first documents), the tokenizer
decodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.look.health import tokenizer_of
from poise.data.look.inspect import column
from poise.data.store import SPLITS, Split, Tokens, check_ids, damaged, open_tokens

_BLOCK: Final = 2**20  # tokens decoded together
_CHECKED: Final = 8  # documents on which decoding is checked
_AROUND: Final = 60  # characters shown on either side of a hit
_BASE: Final = ("source", "origin", "offset", "bytes")
_POSITION: Final = ("token_start", "token_length")


@dataclass(frozen=True, slots=True)
class Shown:
    """A document as it is shown.

    Attributes:
        split: ``train`` or ``val``.
        document: its number in the split.
        source, origin, offset, bytes: where it came from, as in ``docs.arrow``.
        tokens: its tokens, the end of text included.
        facts: what else is known of it; columns without a value are left out, hashes are hexadecimal.
        text: all of it, without the end of text.
    """

    split: str
    document: int
    source: str
    origin: str
    offset: int
    bytes: int
    tokens: int
    facts: dict[str, Any]
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Hit:
    """A document in which a search found something.

    Attributes:
        split, document, source, origin: the document.
        count: how often it was found there; matches do not overlap.
        character: where the first match begins in the document, from 0.
        line: the line it begins in, from 1.
        excerpt: one line of text around it, with ``[[`` and ``]]`` around the match.
    """

    split: str
    document: int
    source: str
    origin: str
    count: int
    character: int
    line: int
    excerpt: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)


class Texts:
    """Decodes documents of one folder.

    Errors:
        UserError: what is to be decoded is damaged.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._tokenizer = tokens, tokenizer_of(tokens)
        self._end = tokens.end_of_text
        pieces = list(self._tokenizer.pieces[: tokens.vocab_size])
        pieces += [b""] * (tokens.vocab_size - len(pieces))
        # Special tokens inside a document (fill-in-the-middle) are shown as the tokenizer writes them.
        pieces = [piece or self._tokenizer.decode([i]).encode() for i, piece in enumerate(pieces)]
        pieces[self._end] = b""
        self._pieces = pieces
        self._sizes = np.array([len(piece) for piece in pieces], np.int64)
        self._by_piece = True
        self._by_piece = all(self._agrees(tokens.split(name)) for name in SPLITS)

    def of(self, split: Split, number: int) -> str:
        """Return the text of one document, without its end of text."""
        return self.block(split, number, number + 1)[0].decode("utf-8", "replace")

    def block(self, split: Split, first: int, last: int) -> tuple[bytes, NDArray[np.int64]]:
        """Return the UTF-8 text of documents ``first .. last - 1`` and where each begins and the last ends."""
        ids, lengths = self._ids(split, first, last)
        if len(lengths) == 0:
            return b"", np.zeros(1, np.int64)
        if not self._by_piece:
            texts = [self._slow(split, number) for number in range(first, last)]
            return b"".join(texts), np.cumsum([0, *map(len, texts)])
        pieces = self._pieces
        data = b"".join([pieces[i] for i in ids.tolist()])
        sizes = np.add.reduceat(self._sizes[ids], np.cumsum(lengths) - lengths)
        return data, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def _ids(self, split: Split, first: int, last: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Return the ids of documents ``first .. last - 1``, all within the vocabulary, and their lengths."""
        starts = split.index.pointers[first:last] // split.tokens.itemsize
        lengths = split.index.lengths[first:last].astype(np.int64)
        if len(starts) == 0:
            return split.tokens[:0], lengths
        ends = starts + lengths
        if starts[0] < 0 or (lengths < 1).any() or (starts[1:] != ends[:-1]).any() or ends[-1] > len(split.tokens):
            raise damaged(split.folder, f"{split.name}.idx does not fit {split.name}.bin")
        ids = split.tokens[int(starts[0]) : int(ends[-1])]
        check_ids(self._tokens, split.name, ids)
        return ids, lengths

    def _slow(self, split: Split, number: int) -> bytes:
        ids, _ = self._ids(split, number, number + 1)
        ids = ids[:-1] if len(ids) and ids[-1] == self._end else ids
        return self._tokenizer.decode(ids).encode("utf-8", "replace")

    def _agrees(self, split: Split) -> bool:
        few = range(min(_CHECKED, split.table.num_rows))
        return all(
            self.block(split, n, n + 1)[0].decode("utf-8", "replace").encode() == self._slow(split, n) for n in few
        )


def blocks(split: Split) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of documents that together have about a million tokens."""
    ends = np.cumsum(split.index.lengths, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        yield first, last
        first = last


def place_of(tokens: Tokens, place: str) -> tuple[str, int]:
    """Return (split, document) of ``12``, ``train:12`` or ``val:12``.

    Raises:
        UserError: it is no such place, or there is no such document.
    """
    name, _, number = place.strip().rpartition(":")
    name = name or "train"
    if name not in SPLITS or not re.fullmatch(r"[0-9]{1,18}", number):
        raise UserError(f"'{place}' is no document; give its number, e.g. 12 (of train) or val:12")
    count = int(tokens.manifest["splits"][name]["documents"])
    if int(number) >= count:
        held = f"has documents 0 to {count - 1:,}" if count else "has no documents"
        raise UserError(f"there is no document {place.strip()}: {name} {held}")
    return name, int(number)


def document(folder: str | Path, place: str) -> Shown:
    """Return one document; ``place`` is its number in train, or ``val:NUMBER``.

    Raises:
        UserError: no prepared data, or no such document.
    """
    tokens = open_tokens(folder)
    name, number = place_of(tokens, place)
    return shown(tokens.split(name), number, Texts(tokens))


def sample(folder: str | Path, count: int, *, seed: int = 0) -> list[Shown]:
    """Return ``count`` documents drawn at random from both splits, none twice, in their order; all if there are fewer.

    Raises:
        UserError: no prepared data, or ``count`` is not positive.
    """
    if count < 1:
        raise UserError(f"a sample of {count} documents shows nothing; give 1 or more")
    tokens = open_tokens(folder)
    splits = [tokens.split(name) for name in SPLITS]
    sizes = [split.table.num_rows for split in splits]
    # Floyd's method inside: no list of all documents is made.
    drawn = np.random.default_rng(seed).choice(sum(sizes), min(count, sum(sizes)), replace=False, shuffle=False)
    texts = Texts(tokens)
    return [shown(splits[int(n >= sizes[0])], int(n if n < sizes[0] else n - sizes[0]), texts) for n in np.sort(drawn)]


def ranked(folder: str | Path, name: str, *, count: int = 20, largest: bool = True) -> list[Shown]:
    """Return the documents of both splits with the largest or smallest value of a column; ties in their order.

    Documents for which it is not known are left out.

    Raises:
        UserError: no prepared data, no such column, or nothing is known in it.
    """
    tokens = open_tokens(folder)
    splits = [tokens.split(split) for split in SPLITS]
    found: list[tuple[Any, int, int]] = []
    for side, split in enumerate(splits):
        values = column(split, name)
        at = np.flatnonzero(np.asarray(values.is_valid()))
        keys = values.take(at).to_numpy(zero_copy_only=False)
        if keys.dtype.kind == "f":
            at, keys = at[~np.isnan(keys)], keys[~np.isnan(keys)]
        # Stable either way: ties stay in the order of the documents.
        order = (
            np.argsort(keys, kind="stable")
            if not largest
            else len(keys) - 1 - np.argsort(keys[::-1], kind="stable")[::-1]
        )
        found += [(keys[i], side, int(at[i])) for i in order[:count]]
    if not found:
        raise UserError(f"column '{name}' of '{folder}' is empty: that stage did not run; choose another")
    found.sort(key=lambda entry: entry[0], reverse=largest)
    texts = Texts(tokens)
    return [shown(splits[side], number, texts) for _, side, number in found[:count]]


def search(
    folder: str | Path,
    query: str,
    *,
    splits: Sequence[str] = SPLITS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Hit]:
    """Yield the documents in which ``query`` occurs, in their order, train first.

    Args:
        folder: prepared data.
        query: text as it is, or ``/regular expression/`` with the letters ``i``, ``m``, ``s`` after it as flags.
        splits: where to look.
        progress: called with (tokens done, all tokens).

    Raises:
        UserError: no prepared data, or a query that is empty or no regular expression.
    """
    expression = compiled(query)
    tokens = open_tokens(folder)
    texts, done = Texts(tokens), 0
    total = sum(int(tokens.manifest["splits"][name]["tokens"]) for name in splits)
    for name in splits:
        split = tokens.split(name)
        for first, last in blocks(split):
            data, offsets = texts.block(split, first, last)
            for row in _rows_with(expression, data, offsets):
                text = data[offsets[row] : offsets[row + 1]].decode("utf-8", "replace")
                if hit := _hit(expression, text, split, first + row):
                    yield hit
            done += int(split.index.lengths[first:last].sum())
            if progress:
                progress(done, total)


def compiled(query: str) -> re.Pattern[str] | str:
    """Return a query as a regular expression, or as text that is looked for as it is."""
    match = re.fullmatch(r"/(.+)/([ims]*)", query, re.S)
    if not match:
        if not query:
            raise UserError("nothing to search for; give a text, or /a regular expression/")
        return query
    flags = sum(flag for letter, flag in (("i", re.I), ("m", re.M), ("s", re.S)) if letter in match[2])
    try:
        return re.compile(match[1], flags)
    except re.error as error:
        raise UserError(f"'{query}' is no regular expression ({error}); mend it, or leave out the slashes") from None


def shown(split: Split, number: int, texts: Texts) -> Shown:
    """Return a document of an opened split."""
    row = split.table.slice(number, 1).to_pylist()[0]
    base = {name: row.pop(name) for name in _BASE}
    for name in _POSITION:
        row.pop(name)
    facts = {name: _plain(value) for name, value in row.items() if value is not None}
    tokens = int(split.index.lengths[number])
    return Shown(split.name, number, **base, tokens=tokens, facts=facts, text=texts.of(split, number))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: round(inner, 4) for name, inner in value.items() if inner is not None}
    return value


def _rows_with(expression: re.Pattern[str] | str, data: bytes, offsets: NDArray[np.int64]) -> Iterator[int]:
    """Yield the rows of a block that may hold a match."""
    if isinstance(expression, re.Pattern):
        yield from range(len(offsets) - 1)
        return
    needle = expression.encode("utf-8", "replace")
    place = data.find(needle)
    while place >= 0:
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        end = int(offsets[row + 1])
        if place + len(needle) <= end:  # else it reaches into the next document, as would any later one in this row
            yield row
        place = data.find(needle, end)


def _hit(expression: re.Pattern[str] | str, text: str, split: Split, number: int) -> Hit | None:
    if isinstance(expression, str):
        start, count = text.find(expression), text.count(expression)
        end = start + len(expression)
    else:
        match = expression.search(text)
        start, end = match.span() if match else (-1, -1)
        count = sum(1 for _ in expression.finditer(text)) if match else 0
    if start < 0:
        return None
    before, found, after = text[max(0, start - _AROUND) : start], text[start:end], text[end : end + _AROUND]
    found = found if len(found) <= 2 * _AROUND else found[: 2 * _AROUND] + "…"
    line = text.count("\n", 0, start) + 1
    row = {name: split.table[name][number].as_py() for name in ("source", "origin")}
    excerpt = f"{_one_line(before)}[[{_one_line(found)}]]{_one_line(after)}"
    return Hit(split.name, number, row["source"], row["origin"], count, start, line, excerpt)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)
