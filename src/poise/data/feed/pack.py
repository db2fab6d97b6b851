"""Packing documents into rows with few cuts: best-fit decreasing, in blocks, for any number of documents.

A row holds C = T + 1 tokens, T inputs and their targets. A document that is longer than a row is cut into chunks of C
tokens of which each begins with the last token of the one before, so that every next-token target inside a document is
in exactly one chunk. Chunks go into rows from the longest to the shortest, each into the row with the least room that
still holds it. So a document that fits into a row is never cut; what is left of a row is padding.

Rows are packed block by block, so that working memory is that of a block and the time is linear in the documents. The
packing is a function of the lengths alone. All chunks of one length are placed together: rows with the same room are
kept as ranges, and a length moves whole ranges at once, O(C log C) range moves a block, however many chunks it has.

Source: H. Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024, arXiv 2404.10830. Differs: chunks of a
long document share a token; rows are filled block by block instead of over the whole corpus.

Shape letters: D documents, P pieces, R rows, B rows asked for, C = T + 1 tokens of a row.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError

Ints = NDArray[np.int64]

PIECE: Final = np.dtype([("document", "<i8"), ("start", "<i4"), ("length", "<i4")])
"""A stretch of a document in a row: which document, the first of its tokens, how many."""

BLOCK: Final = 2**20
"""Documents packed together, and about the chunks packed together."""

_HEAD: Final = 8  # int64 numbers before the rest of a file: see ``Packing.save``
_MAGIC: Final = 0x6B6361702D65736F  # "ose-pack"
_VERSION: Final = 1


@dataclass(frozen=True)
class Packing:
    """Which stretches of which documents make every row.

    Attributes:
        seq_len: T; a row holds T + 1 tokens.
        pieces: all pieces with ``PIECE``, row after row, (P,); within a row in the order of the documents.
        row_first: number of the first piece of each row, and P at the end, (R + 1,).
        documents: D, documents given.
        tokens: tokens in the pieces; a token that two chunks share counts twice.
        cut: documents that were cut.
        cut_though_fitting: of these the ones that would have fitted into a row.
        fitting: documents that fit into a row.
    """

    seq_len: int
    pieces: NDArray[np.void]
    row_first: Ints
    documents: int
    tokens: int
    cut: int
    cut_though_fitting: int
    fitting: int

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return len(self.row_first) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return self.tokens / (self.rows * (self.seq_len + 1)) if self.rows else 0.0

    @property
    def truncated(self) -> float:
        """Share of the documents that fit into a row and were cut all the same."""
        return self.cut_though_fitting / self.fitting if self.fitting else 0.0

    def row(self, number: int) -> NDArray[np.void]:
        """Return the pieces of one row."""
        assert 0 <= number < self.rows, (number, self.rows)
        return self.pieces[self.row_first[number] : self.row_first[number + 1]]

    def place(self, rows: Ints, document_first: Ints) -> tuple[Ints, NDArray[np.int32]]:
        """Return where the tokens of some rows are, and which tokens belong together.

        Args:
            rows: numbers of rows, (B,).
            document_first: position of each document's first token in the token file, (D,).

        Returns:
            index_BC: position of every token in the token file, -1 for padding.
            piece_BC: number of the piece within its row, from 0 on; padding goes on counting, as one more piece. A
                target is one only where its input is of the same piece and it is no padding.
        """
        first, end = self.row_first[rows], self.row_first[np.asarray(rows) + 1]
        count = end - first
        row = np.repeat(np.arange(len(first)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        pieces = self.pieces[np.repeat(first, count) + nth]
        length = pieces["length"].astype(np.int64)
        width = self.seq_len + 1
        index_BC = np.full((len(first), width), -1, np.int64)
        piece_BC = np.repeat(count.astype(np.int32)[:, None], width, axis=1)
        ends = np.cumsum(length)
        row_tokens = np.bincount(row, length, len(first)).astype(np.int64)
        # From a token's number among all pieces to its place in (B, C): rows before it are filled up with padding.
        shift = np.arange(len(first)) * width - (np.cumsum(row_tokens) - row_tokens)
        number = np.arange(int(length.sum()))
        spot = number + np.repeat(shift[row], length)
        begin = document_first[pieces["document"]] + pieces["start"]
        index_BC.reshape(-1)[spot] = number + np.repeat(begin - (ends - length), length)
        piece_BC.reshape(-1)[spot] = np.repeat(nth.astype(np.int32), length)
        return index_BC, piece_BC

    def rows_of(self, documents: Ints) -> Ints:
        """Return the rows that show any of some documents, rising; reads all pieces."""
        found = np.flatnonzero(np.isin(self.pieces["document"], documents))
        return np.unique(np.searchsorted(self.row_first, found, "right") - 1).astype(np.int64)

    def save(self, path: str | Path) -> None:
        """Write to one ``.npy`` of int64: 8 numbers, the pieces (two numbers each), ``row_first``."""
        write(path, [self])

    @classmethod
    def load(cls, path: str | Path) -> Packing:
        """Open what ``save`` wrote, memory-mapped.

        Raises:
            UserError: the file cannot be read, or is no packing.
        """
        try:
            words = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "not a whole .npy file"
            raise UserError(f"cannot read the packing '{path}': {reason}; prepare the data again") from None
        head = [int(n) for n in words[:_HEAD]] if words.dtype == np.int64 and words.ndim == 1 else []
        if len(head) < _HEAD or head[0] != _MAGIC or head[1] >> 32 != _VERSION:
            raise UserError(f"'{path}' is no packing that this poise reads; prepare the data again")
        seq_len, pieces = head[1] & 0xFFFFFFFF, head[2]
        if pieces < 0 or len(words) < _HEAD + 2 * pieces + 1 or words[-1] != pieces:
            raise UserError(f"the packing '{path}' is damaged: its parts disagree; prepare the data again")
        split = _HEAD + 2 * pieces
        plain = np.asarray(words)
        return cls(seq_len, plain[_HEAD:split].view(PIECE), plain[split:], *head[3:8])


def best_fit(lengths: NDArray[np.integer], seq_len: int, *, block: int = BLOCK) -> Packing:
    """Pack documents of the given lengths (in tokens, with their end of text) into rows of ``seq_len`` + 1 tokens.

    Args:
        lengths: tokens of every document, (D,); may be memory-mapped. A document of no tokens gets no piece.
        seq_len: T, inputs of a row.
        block: documents packed together; more gives fuller rows and takes more memory.

    Raises:
        UserError: ``seq_len`` is not positive.
    """
    return join(blocks(lengths, seq_len, block=block), seq_len)


def blocks(lengths: NDArray[np.integer], seq_len: int, *, block: int = BLOCK) -> Iterator[Packing]:
    """Yield ``best_fit`` block by block, for more documents than fit into memory; ``write`` takes it as it is.

    Document numbers are those of ``lengths``; rows and ``row_first`` begin at 0 in every block.
    """
    if seq_len < 1:
        raise UserError(f"the sequence length is {seq_len}; give a positive number, e.g. 256")
    assert block > 0, block
    for first in range(0, len(lengths), block):
        here = np.asarray(lengths[first : first + block]).astype(np.int64)
        assert here.min() >= 0, "a document cannot have less than no tokens"
        assert here.max() < 2**31, "a document has 2**31 tokens or more"
        # Documents of many chunks: fewer of them at once.
        ends = np.cumsum(_chunks(here, seq_len))
        part = 0
        while part < len(here):
            done = int(ends[part - 1]) if part else 0
            upto = max(part + 1, int(np.searchsorted(ends, done + 2 * block, "right")))
            yield _pack(here[part:upto], seq_len, first + part)
            part = upto


def join(packings: Iterable[Packing], seq_len: int) -> Packing:
    """Return packings one after another as one."""
    parts = list(packings)
    if len(parts) == 1:
        return parts[0]
    assert all(part.seq_len == seq_len for part in parts)
    offsets = np.cumsum([0, *(len(part.pieces) for part in parts)])
    firsts = [part.row_first[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
    return Packing(
        seq_len,
        np.concatenate([np.zeros(0, PIECE), *(part.pieces for part in parts)]),
        np.concatenate([*firsts, offsets[-1:]]),
        *(sum(figures) for figures in zip((0,) * 5, *map(_figures, parts), strict=True)),
    )


def write(path: str | Path, packings: Iterable[Packing]) -> None:
    """Write packings as one, in the form of ``Packing.save``, with no more than one of them in memory.

    An error leaves an unfinished file, which ``load`` refuses; write into a folder that is renamed when it is whole.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        with path.open("w+b") as out, tempfile.TemporaryFile(dir=path.parent) as rest:
            _write(out, rest, packings)
    except OSError as error:
        raise UserError(f"cannot write the packing '{path}': {error.strerror}") from None


def concat_truncation(lengths: NDArray[np.integer], seq_len: int, *, block: int = BLOCK) -> float:
    """Return the share of documents that fit into a row and are cut by concatenating and splitting.

    Sequence k is tokens k*T .. k*T + T of all documents end to end, as the loader reads them without packing; what
    follows the last whole sequence is shown nowhere, so a document that reaches into it is cut, too.
    """
    starts, cut, fitting = 0, 0, 0
    total = sum(int(np.sum(lengths[i : i + block], dtype=np.int64)) for i in range(0, len(lengths), block))
    last = (total - 1) // seq_len * seq_len + 1 if total > seq_len else 0  # tokens that are shown
    for first in range(0, len(lengths), block):
        here = np.asarray(lengths[first : first + block]).astype(np.int64)
        end = np.cumsum(here) + starts
        begin = end - here
        fits = (here > 0) & (here <= seq_len + 1)
        whole = (begin % seq_len + here <= seq_len + 1) & (end <= last)
        cut += int((fits & ~whole).sum())
        fitting += int(fits.sum())
        starts = int(end[-1])
    return cut / fitting if fitting else 0.0


def _chunks(lengths: Ints, seq_len: int) -> Ints:
    """Return how many chunks every document makes: all its targets, T to a chunk, and one chunk for a lone token."""
    return np.where(lengths > 1, -(-(lengths - 1) // seq_len), lengths)


def _pack(lengths: Ints, seq_len: int, first_document: int) -> Packing:
    """Pack one block."""
    chunks = _chunks(lengths, seq_len)
    document = np.repeat(np.arange(len(lengths)), chunks)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * seq_len
    length = np.minimum(lengths[document] - start, seq_len + 1)
    row, rows = _best_fit(length, seq_len + 1)
    order = np.argsort(row, kind="stable")
    pieces = np.empty(len(order), PIECE)
    pieces["document"] = document[order] + first_document
    pieces["start"] = start[order]
    pieces["length"] = length[order]
    row_first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
    fits = (lengths > 0) & (lengths <= seq_len + 1)
    cut = chunks > 1
    figures = (len(lengths), length.sum(), cut.sum(), (cut & fits).sum(), fits.sum())
    return Packing(seq_len, pieces, row_first, *map(int, figures))


def _best_fit(length: Ints, room: int) -> tuple[Ints, int]:
    """Return (row of every chunk, number of rows) by best-fit decreasing; lengths lie in 1 .. room.

    The rule for one chunk is: the row with the least room that still holds it, else a new row. A row that takes a chunk
    of length s and has room for another s is then the best fit for the next one, so rows with room r take r // s at
    once. ``open_`` holds, for every room that some row has left, ranges (first row, rows).
    """
    kind = np.dtype(np.uint16) if room < 2**16 else np.dtype(np.int64)  # a radix sort up to 16 bits
    order = np.argsort((room - length).astype(kind), kind="stable")
    counts = np.bincount(length, minlength=room + 1)
    open_: dict[int, list[tuple[int, int]]] = {}
    rooms: list[int] = []  # the keys of open_, rising
    moves: list[tuple[int, int, int]] = []  # (first row, chunks a row, chunks), in the order of the chunks
    rows = 0

    def leave(left: int, ranges: list[tuple[int, int]]) -> None:
        if left:
            if left not in open_:
                rooms.insert(bisect_left(rooms, left), left)
                open_[left] = ranges
            else:
                open_[left].extend(ranges)

    for size in np.flatnonzero(counts)[::-1].tolist():
        todo = int(counts[size])
        at = bisect_left(rooms, size)
        while todo and at < len(rooms):
            had = rooms[at]
            taken, todo = _fill(open_[had], size, had, todo, moves)
            if not open_[had]:
                del open_[had], rooms[at]
            # What is left is less than ``size``, or it is the last row filled in part, which ends the search.
            for left, ranges in taken:
                leave(left, ranges)
            at = bisect_left(rooms, size)
        if todo:
            fresh = [(rows, -(-todo // (room // size)))]
            rows += fresh[0][1]
            for left, ranges in _fill(fresh, size, room, todo, moves)[0]:
                leave(left, ranges)
    first, each, items = np.array(moves, np.int64).reshape(-1, 3).T
    within = np.arange(int(items.sum())) - np.repeat(np.cumsum(items) - items, items)
    row = np.empty(len(length), np.int64)
    row[order] = np.repeat(first, items) + within // np.repeat(each, items)
    return row, rows


def _fill(
    ranges: list[tuple[int, int]], size: int, had: int, todo: int, moves: list[tuple[int, int, int]]
) -> tuple[list[tuple[int, list[tuple[int, int]]]], int]:
    """Put up to ``todo`` chunks of ``size`` into rows with room ``had``, taking the used rows out of ``ranges``.

    Returns:
        The used ranges by the room they have left, and the chunks that found no place.
    """
    each = had // size
    used: list[tuple[int, int]] = []
    out = [(had - each * size, used)]
    while todo and ranges:
        first, count = ranges.pop()
        whole, rest = divmod(todo, each)
        if whole >= count:
            moves.append((first, each, count * each))
            used.append((first, count))
            todo -= count * each
            continue
        moves.append((first, each, todo))
        if whole:
            used.append((first, whole))
        if rest:
            out.append((had - rest * size, [(first + whole, 1)]))
        after = whole + (rest > 0)
        if after < count:
            ranges.append((first + after, count - after))
        todo = 0
    return [(left, found) for left, found in out if found], todo


def _figures(packing: Packing) -> tuple[int, int, int, int, int]:
    return packing.documents, packing.tokens, packing.cut, packing.cut_though_fitting, packing.fitting


def _write(out: BinaryIO, rest: BinaryIO, packings: Iterable[Packing]) -> None:
    """Write pieces to ``out`` as they come and ``row_first`` aside, to follow them; the header last."""
    head = _header(0)
    out.write(head + bytes(8 * _HEAD))
    figures, seq_len, pieces, rows = np.zeros(5, np.int64), 0, 0, 0
    for packing in packings:
        assert seq_len in (0, packing.seq_len), (seq_len, packing.seq_len)
        seq_len = packing.seq_len
        out.write(np.ascontiguousarray(packing.pieces).view(np.int64).astype("<i8", copy=False).tobytes())
        rest.write((packing.row_first[:-1] + pieces).astype("<i8").tobytes())
        pieces += len(packing.pieces)
        rows += packing.rows
        figures += _figures(packing)
    rest.write(np.int64(pieces).astype("<i8").tobytes())
    rest.seek(0)
    while part := rest.read(2**20):
        out.write(part)
    whole = _header(_HEAD + 2 * pieces + rows + 1)
    assert len(whole) == len(head)
    out.seek(0)
    words = [_MAGIC, _VERSION << 32 | seq_len, pieces, *figures.tolist()]
    out.write(whole + np.array(words, "<i8").tobytes())


def _header(words: int) -> bytes:
    """Return the start of an ``.npy`` file of so many int64, always equally long."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({words},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"
