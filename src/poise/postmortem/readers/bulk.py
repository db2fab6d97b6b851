"""A log of lines of cells, block by block: lines written alike are read at once, the others one by one, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from poise.postmortem.readers.layout import Layout
from poise.postmortem.readers.pages import Floats, Ints, Mask, Page
from poise.postmortem.readers.source import Block, Item, Row, Source, clean

MAX_LAYOUTS = 16
NEW_LAYOUTS = 3
"""Learnt from one block at most."""

FEW = 8
"""Rows that are handed on one by one."""

_ODD = (b"\x1b", b"\x00")
_STEP = "iteration"


class LineReader(Protocol):
    """What a format says about its lines; see ``megatron.Reader``."""

    source: Source
    dumping: int

    @property
    def keywords(self) -> tuple[bytes, ...]: ...
    @property
    def loss_name(self) -> str: ...
    def line(self, text: str, at_end: bool = False) -> list[Item]: ...
    def says(self, text: str) -> bool: ...
    def learn(self, line: bytes) -> Layout | None: ...
    def leads(self, origin: tuple[str, str]) -> bool: ...
    def lead(self, origin: tuple[str, str], step: float) -> list[Item]: ...
    def absent(self, columns: Mapping[str, Floats]) -> Mask | None: ...


class Scan:
    """The blocks of one log, in order."""

    def __init__(self, reader: LineReader) -> None:
        self._reader = reader
        self._layouts: list[Layout] = []
        self._lines = 0

    def page(self, page: Page, last: bool) -> Iterator[Item]:
        """Yield what a block of lines gives, as ``LineReader.line`` would for one after the other."""
        found = _Found(page, last)
        used = [known for known in self._layouts if found.take(known)]
        slow = self._slow(page, found)
        for _ in range(NEW_LAYOUTS):
            new = next((new for place in slow if (new := self._reader.learn(page.line(place)))), None)
            if new is None or new in self._layouts or not found.take(new):
                break
            used.append(new)
            slow = [place for place in slow if found.slot[place] < 0]
        idle = [known for known in self._layouts if known not in used]
        self._layouts = (used + idle)[:MAX_LAYOUTS]
        yield from self._in_order(page, found, slow, last)
        self._lines += len(page)

    def _slow(self, page: Page, found: _Found) -> list[int]:
        """Return the lines that say something and are not read already."""
        places: set[int] = set()
        read = np.flatnonzero(found.slot >= 0)[:1].tolist()
        common = page.line(read[0]) if read else b""
        for word in [*self._reader.keywords, *(byte for byte in _ODD if byte in page.block)]:
            for begin, end in found.gaps() if word in common else [(0, len(page.block))]:
                at = page.block.find(word, begin, end)
                while at >= 0:
                    place = int(np.searchsorted(page.ends, at))
                    if found.slot[place] < 0:
                        places.add(place)
                    at = page.block.find(word, int(page.ends[place]), end)
        return [place for place in sorted(places) if self._reader.says(_text(page, place))]

    def _in_order(self, page: Page, found: _Found, slow: list[int], last: bool) -> Iterator[Item]:
        before = np.concatenate([[0], np.cumsum(found.slot >= 0)])  # lines read already, up to each
        upcoming = iter([*slow, len(page)])
        following = next(upcoming)
        at = 0
        while at < len(page):
            while following < at:
                following = next(upcoming)
            place = at if self._reader.dumping and found.slot[at] < 0 else following
            if before[place] > before[at]:
                yield from self._rows(page, found, at, place)
            if place < len(page):
                yield from self._line(page, place, last and place == len(page) - 1)
            at = place + 1

    def _line(self, page: Page, place: int, at_end: bool = False) -> list[Item]:
        source = self._reader.source
        source.line, source.at_end = self._lines + place + 1, at_end
        raw = page.line(place)
        if any(byte in raw for byte in _ODD):
            source.notes.add("colour codes or NUL bytes taken out of a line", source.where)
        return self._reader.line(_text(page, place), at_end)

    def _rows(self, page: Page, found: _Found, begin: int, end: int) -> Iterator[Item]:
        """Yield the lines from ``begin`` to ``end`` that are read already."""
        places = begin + np.flatnonzero(found.slot[begin:end] >= 0)
        for same in np.split(places, 1 + np.flatnonzero(np.diff(found.slot[places]))):
            layout, columns = found.columns(same)
            if not self._reader.leads(layout.source):
                for place in same.tolist():
                    yield from self._line(page, place)
                continue
            nan = self._reader.absent(columns)
            yield from self._reader.lead(layout.source, float(columns[_STEP][-1]))
            if nan is None:
                yield from _items(columns)
                continue
            for part in np.split(np.arange(len(same)), 1 + np.flatnonzero(np.diff(nan))):
                some = {name: values[part] for name, values in columns.items()}
                if nan[part[0]]:
                    some[self._reader.loss_name] = np.full(len(part), np.nan)
                yield from _items(some)


class _Found:
    """Which lines of a block are read already, and where their numbers are."""

    def __init__(self, page: Page, last: bool) -> None:
        self.slot = np.full(len(page), -1, dtype=np.int32)
        self._page = page
        self._row = np.zeros(len(page), dtype=np.int64)
        self._slots: list[tuple[Layout, list[Floats]]] = []
        self._last = last

    def take(self, layout: Layout) -> bool:
        """Read the lines that are written so; return whether there are any."""
        free = self.slot < 0
        free[-1] &= not self._last  # it may be cut off
        places, values = layout.rows(self._page, free)
        if len(places):
            self.slot[places] = len(self._slots)
            self._row[places] = np.arange(len(places))
            self._slots.append((layout, values))
        return len(places) > 0

    def gaps(self) -> list[tuple[int, int]]:
        """Return from where to where the lines stand that are not read."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.slot < 0, [False]]).astype(np.int8)))
        begins, ends = self._page.begins[edges[::2]], self._page.ends[edges[1::2] - 1]
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def columns(self, places: Ints) -> tuple[Layout, dict[str, Floats]]:
        """Return lines of one layout as columns."""
        layout, values = self._slots[int(self.slot[places[0]])]
        rows = slice(int(self._row[places[0]]), int(self._row[places[-1]]) + 1)
        return layout, {name: column[rows] for name, column in zip([_STEP, *layout.names], values, strict=True)}


def _items(columns: Mapping[str, Floats]) -> Iterator[Row | Block]:
    length = len(columns[_STEP])
    if length >= FEW:
        yield Block(columns)
        return
    for row in range(length):
        yield {name: float(values[row]) for name, values in columns.items()}


def _text(page: Page, place: int) -> str:
    return clean(page.line(place).decode("utf-8", "replace"))
