"""TensorBoard event files: scalars of either style, one column a tag.

A file is a sequence of ``Event`` messages (TensorFlow's ``event.proto``, ``summary.proto``, ``tensor.proto``) in
TFRecord framing (``tfrecord.py``). Read are ``simple_value`` scalars (TF1, ``torch.utils.tensorboard``) and tensors of
one number (TF2, Keras, JAX); texts, as settings of the run (Megatron and the Hugging Face Trainer write theirs so).
Pictures, histograms, audio and graphs are passed over. A ``SessionLog`` START says that the program began again, and
that what has its step or a later one does not count any more.

A training loop writes the same few records over and over, where only time, step and value differ. What a record
is, is worked out once (``_learn``), and known again by the bytes around its value.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from poise.postmortem.readers import dense, summary, tfrecord, wire
from poise.postmortem.readers.names import STEP
from poise.postmortem.readers.source import RESTARTED, Item, Rewound, Source
from poise.postmortem.readers.summary import FLOAT

FORMAT = "tensorboard"
LOOKS_FOR = "TensorBoard event files"

WALL_TIME, STEP_FIELD, SUMMARY = 0x09, 0x10, 0x2A
"""First bytes of an event's fields 1, 2 and 5."""

MAX_TAGS = 20_000
MAX_KNOWN = 50_000
MAX_KNOWN_SIZE = 4_096
"""Kinds of records that are remembered, and bytes of the longest."""

UNKNOWN, OTHER = -2, -1
"""Instead of a tag: a record not met before; a value that is left out."""

MAX_LAYOUTS = 16
MAX_SETTINGS = 2_000
MAX_TEXT = 1 << 18
MAX_LINE = 500
"""Characters of a text that may be settings in JSON, or one setting."""

_OTHER_AXIS = re.compile(r"\b(?:vs\.?[ _-](?:samples|tokens)|y=\w{1,30},x=(?:samples|tokens))$", re.IGNORECASE)
_WRITER = re.compile(r"tfevents\.\d+\.(.+?\.\d+)\.\d+(?:\.|$)")
_HELD_OUT = re.compile(r"(?:val|valid|validation|eval|evaluation|dev|test)(?:[^a-z]|$)", re.IGNORECASE)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Place = tuple[int, int, struct.Struct]
"""Tag, where the value lies, and how."""


def sniff(source: Source) -> float:
    """Return 1 when the first record's length has the right checksum and it is an event."""
    head = source.head[:64]
    if len(head) < tfrecord.HEAD:
        return 0.0
    raw = np.frombuffer(head, dtype=np.uint8)
    whole = tfrecord.checksums(raw, np.array([0]), np.array([8]))[0] == tfrecord.words(raw, np.array([8]))[0]
    versioned = b"\x1a\rbrain.Event:" in head and b"\0" in head
    if versioned:
        return 1.0 if whole else 0.9
    return 0.5 if whole and len(head) > tfrecord.HEAD and head[tfrecord.HEAD] in (0x09, 0x10, 0x1A, 0x2A) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield the scalars of all parts, in order."""
    events = _Events(source)
    for part in source.parts:
        yield from events.part(part)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Values in the order in which they were written; ``start`` is the step of the START before them, if one is."""

    steps: Ints
    tags: Ints
    values: Floats
    start: int | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """Records with their values in the same places: what stands between these -> the tags, and how to unpack them."""

    between: tuple[tuple[int, int], ...]
    kinds: dict[bytes, tuple[tuple[int, ...], struct.Struct]] = field(default_factory=dict)


class _Events:
    """The events of one run, over all its files."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._notes = source.notes
        self._parser = _Parser(source)
        self._last: dict[int, int] = {}  # tag -> its last step
        self._writer = ""

    def part(self, path: Path) -> Iterator[Item]:
        """Yield what one file holds."""
        where = path.name if len(self._source.parts) > 1 else ""
        writer = _writer(path)
        other = bool(self._writer and writer) and writer != self._writer
        self._writer = writer or self._writer
        earlier = dict(self._last)
        framing = tfrecord.Framing(lambda text: self._notes.add(text, where))
        with self._source.binary(path) as file:
            for batch in framing.batches(file):
                for stretch in self._parser.stretches(batch):
                    yield from self._marks(stretch, earlier, other)
                    yield from dense.rows(stretch.steps, stretch.tags, stretch.values, self._parser.columns)
                    self._remember(stretch)

    def _marks(self, stretch: _Stretch, earlier: dict[int, int], other: bool) -> Iterator[Item]:
        """Yield what has to be said before the stretch's rows. ``earlier`` is emptied once the new file is judged."""
        highest = max(self._last.values(), default=-1)
        if stretch.start is not None:
            if self._last:
                yield RESTARTED
            if 0 <= stretch.start <= highest:
                yield Rewound(stretch.start - 1)
            earlier.clear()
        for tag, step in zip(stretch.tags.tolist(), stretch.steps.tolist(), strict=True) if earlier else ():
            if tag in earlier and not _HELD_OUT.match(self._parser.columns[tag]):
                if other or step <= earlier[tag]:
                    yield RESTARTED
                earlier.clear()
                return

    def _remember(self, stretch: _Stretch) -> None:
        tags, places = np.unique(stretch.tags[::-1], return_index=True)
        self._last.update(zip(tags.tolist(), stretch.steps[::-1][places].tolist(), strict=True))


class _Parser:
    """Finds the scalars in records; remembers the kinds of records it has met."""

    def __init__(self, source: Source) -> None:
        self._notes = source.notes
        self._settings = source.settings
        self.columns: list[str] = []
        self._tags: dict[str, int] = {}
        self._plugins: dict[str, str] = {}
        self._simple: dict[bytes, int] = {}  # all but the last four bytes after the step -> tag
        self._layouts: dict[int, list[_Layout]] = {}  # length after the step -> where values may lie
        self._learned = 0

    def stretches(self, batch: tfrecord.Batch) -> Iterator[_Stretch]:
        """Yield the batch's scalars."""
        data, starts, ends = batch.data, batch.starts, batch.starts + batch.sizes
        raw = np.frombuffer(data, dtype=np.uint8)
        steps, after = _steps(raw, starts, ends)
        cut = np.maximum(ends - 4, after)
        get = self._simple.get
        found = [get(data[i:j], UNKNOWN) for i, j in zip(after.tolist(), cut.tolist(), strict=True)]
        tags = np.array(found, dtype=np.int64)
        with np.errstate(invalid="ignore"):  # a signalling NaN is one like any other
            values = tfrecord.words(raw, ends - 4).view(np.float32).astype(np.float64)
        late: list[tuple[int, int, int, float]] = []  # record, step, tag, value
        marks: list[tuple[int, int]] = []  # record, step of a START
        for i in np.flatnonzero(tags == UNKNOWN).tolist():
            self._one(i, data[starts[i] : ends[i]], int(after[i] - starts[i]), int(steps[i]), late, marks)
        records = np.flatnonzero(tags >= 0)
        steps, tags, values = steps[records], tags[records], values[records]
        late = [entry for entry in late if entry[2] != OTHER]
        if late:
            at, their_steps, their_tags, their_values = zip(*late, strict=True)
            records = np.append(records, np.array(at, dtype=np.int64))
            order = np.argsort(records, kind="stable")
            records = records[order]
            steps = np.append(steps, np.array(their_steps, dtype=np.int64))[order]
            tags = np.append(tags, np.array(their_tags, dtype=np.int64))[order]
            values = np.append(values, np.array(their_values, dtype=np.float64))[order]
        begin, start = 0, None
        for record, step in marks:
            end = int(np.searchsorted(records, record))
            if end > begin or start is not None:
                yield _Stretch(steps[begin:end], tags[begin:end], values[begin:end], start)
            begin, start = end, step
        yield _Stretch(steps[begin:], tags[begin:], values[begin:], start)

    def _one(
        self,
        i: int,
        payload: bytes,
        after: int,
        step: int,
        late: list[tuple[int, int, int, float]],
        marks: list[tuple[int, int]],
    ) -> None:
        """Take in a record that is no simple one; ``after`` is where its step ends, 0 where that is not known."""
        rest = payload[after:]
        if after:
            tag = self._simple.get(rest[:-4], UNKNOWN)
            if tag != UNKNOWN:
                late.append((i, step, tag, FLOAT.unpack(rest[-4:])[0]))
                return
            for layout in self._layouts.get(len(rest), ()):
                known = layout.kinds.get(b"".join([rest[a:b] for a, b in layout.between]))
                if known is not None:
                    late.extend(zip(repeat(i), repeat(step), known[0], known[1].unpack(rest), strict=False))
                    return
        try:
            event = summary.event(payload, self._plugins)
        except wire.Malformed:
            self._notes.add("record that is no event left out")
            return
        if event.start:
            marks.append((i, event.step))
        for tag_name, text in event.texts:
            self._setting(tag_name, text)
        places = [(self._tag(scalar.tag), scalar.at - after, scalar.form) for scalar in event.scalars]
        late.extend((i, event.step, tag, s.value) for s, (tag, _, _) in zip(event.scalars, places, strict=True))
        if after and event.values == len(places) > 0 and all(at >= 0 for _, at, _ in places):
            self._learn(rest, places)

    def _tag(self, name: str) -> int:
        """Return the number of a tag's column, ``OTHER`` where it gets none."""
        tag = self._tags.get(name)
        if tag is not None:
            return tag
        if _OTHER_AXIS.search(name):
            self._notes.add("tags counted by samples or tokens instead of steps left out")
            return OTHER
        if len(self._tags) >= MAX_TAGS:
            self._notes.add(f"tags beyond the first {MAX_TAGS} left out")
            return OTHER
        self._tags[name] = len(self._tags)
        self.columns.append(f"tag {name}" if name.strip().lower() == STEP else name)
        return self._tags[name]

    def _learn(self, rest: bytes, places: list[Place]) -> None:
        """Remember a record by the bytes around its values."""
        if self._learned >= MAX_KNOWN or len(rest) > MAX_KNOWN_SIZE:
            return
        self._learned += 1
        tag, at, form = places[0]
        if len(places) == 1 and form is FLOAT and at + 4 == len(rest):
            self._simple[rest[:at]] = tag
            return
        edges = [0, *(edge for _, at, form in places for edge in (at, at + form.size)), len(rest)]
        between = tuple(zip(edges[::2], edges[1::2], strict=True))
        layouts = self._layouts.setdefault(len(rest), [])
        layout = next((layout for layout in layouts if layout.between == between), None)
        if layout is None:
            if len(layouts) >= MAX_LAYOUTS:
                return
            layout = _Layout(between)
            layouts.append(layout)
        pattern = "".join(f"{b - a}x{form.format[1:]}" for (a, b), (_, _, form) in zip(between, places, strict=False))
        all_at_once = struct.Struct(f"<{pattern}{len(rest) - edges[-2]}x")
        layout.kinds[b"".join([rest[a:b] for a, b in between])] = tuple(tag for tag, _, _ in places), all_at_once

    def _setting(self, tag: str, text: str) -> None:
        """Keep a text that states settings: one value, or a JSON object of them."""
        name, text = tag.removesuffix("/text_summary"), text.strip()
        if text.startswith("{") and len(text) <= MAX_TEXT:
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(text)
                for key, value in settings(found):
                    self._set(key, value)
        elif len(text) <= MAX_LINE and "\n" not in text:
            self._set(name, text)

    def _set(self, name: str, value: str) -> None:
        if name in self._settings or len(self._settings) < MAX_SETTINGS:
            self._settings[name] = value


def _steps(raw: NDArray[np.uint8], starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Return (step, where what follows it begins) of records that begin with time and step; else where they begin."""
    last = len(raw) - 1
    timed = (ends - starts >= 10) & (raw[starts] == WALL_TIME)
    at = np.minimum(starts + 9, last)
    after = np.where(timed & (raw[at] == SUMMARY), at, starts)  # step 0 is not written
    steps = np.zeros(len(starts), dtype=np.uint64)
    active = np.flatnonzero(timed & (raw[at] == STEP_FIELD))
    for digit in range(wire.MAX_VARINT):
        place = np.minimum(starts[active] + 10 + digit, last)
        byte = raw[place]
        steps[active] |= (byte & 0x7F).astype(np.uint64) << np.uint64(7 * digit)
        done = byte < 0x80
        after[active[done]] = place[done] + 1
        active = active[~done]
    return steps.view(np.int64), np.where(after <= ends, after, starts)


def _writer(path: Path) -> str:
    """Return which process wrote a file, by its name: host and number; empty where the name does not say."""
    found = _WRITER.search(path.name)
    return found.group(1) if found else ""


def settings(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a JSON object as (name, text); inner names after the outer one and a dot."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from settings(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)
