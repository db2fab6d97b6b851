"""What a reader yields, and what it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self


class Place(NamedTuple):
    """A reader's position just after a document; reading goes on from there.

    Attributes:
        file: number of the file in ``Source.files``; 0 for a Hugging Face data set.
        offset: bytes of the file that are done, decompressed; 0 in Parquet and Arrow.
        number: lines, rows, records or pieces of the file that are done.
    """

    file: int
    offset: int
    number: int


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        text: its text, without lone surrogates, so that it has a UTF-8 form.
        source: short name of the source it came from.
        origin: path relative to the source's root; ``path:line`` (from 1) in JSON lines, ``path:row``
            (from 0) in Parquet, Arrow and a list in JSON, ``path:record`` (from 0) in a WARC.
        offset: byte at which it begins in the (uncompressed) file, or its line, object or record does; 0 in Parquet,
            Arrow and a Hugging Face data set. Behind damage, what was lost does not count, nor in ``origin``.
        replaced_bytes: bytes that could not be read as characters and became U+FFFD.
        id: the record's own id, where it has one.
        url: the address the text came from, where the record gives it.
        place: where to go on after this document; None for a document that was not read from a source.
    """

    text: str
    source: str
    origin: str
    offset: int
    replaced_bytes: int
    id: str | None = None
    url: str | None = None
    place: Place | None = None


@dataclass(slots=True)
class Tally:
    """What a reading pass has met so far. When a document is handed out, it holds what came before its place.

    Attributes:
        skipped: how many files, rows or lines were left out, by reason. ``damaged file`` counts the files of
            ``damaged``, ``damaged member`` the members, row groups, batches and records left out of them.
        done: bytes of the source's files read, compressed as they are.
        fields: the fields of the first row that had no usable text field.
        on_read: called whenever ``done`` has grown.
        replaced_bytes: bytes of all documents that became U+FFFD.
        converted: documents whose text was not UTF-8 and was converted, by encoding.
        removed: characters taken out of texts, by kind: ``NUL``, ``control character``, ``CR of CR LF``.
        repaired: documents in which UTF-8 read as cp1252 was turned back.
        damaged: origins of the files of which something is damaged; what can be read of them is used.
        ended: name of the source that was read to its end last.
        over: ``ended`` of the state this goes on from. A state taken when a source had ended holds what was skipped
            after its last document, so going on from that document reads nothing more.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    done: int = 0
    fields: tuple[str, ...] = ()
    on_read: Callable[[int], None] = lambda done: None
    replaced_bytes: int = 0
    converted: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    repaired: int = 0
    damaged: list[str] = field(default_factory=list)
    ended: str | None = None
    over: str | None = None

    def skip(self, reason: str) -> None:
        """Count one thing left out."""
        self.skipped[reason] += 1

    def missing(self, text_field: str, fields: tuple[str, ...]) -> None:
        """Count a row (or a whole table) without the text field, and keep its fields for the message."""
        self.skip(f"no text field '{text_field}'")
        self.fields = self.fields or fields

    def reached(self, done: int) -> None:
        """Note that ``done`` bytes of the source have been read."""
        self.done = done
        self.on_read(done)

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON values, to go on from a ``Place``."""
        return {
            "skipped": dict(self.skipped),
            "fields": list(self.fields),
            "replaced_bytes": self.replaced_bytes,
            "converted": dict(self.converted),
            "removed": dict(self.removed),
            "repaired": self.repaired,
            "damaged": list(self.damaged),
            "ended": self.ended,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return a tally that goes on from ``state``."""
        return cls(
            skipped=Counter(state["skipped"]),
            fields=tuple(state["fields"]),
            replaced_bytes=state["replaced_bytes"],
            converted=Counter(state["converted"]),
            removed=Counter(state["removed"]),
            repaired=state["repaired"],
            damaged=list(state["damaged"]),
            ended=state["ended"],
            over=state["ended"],
        )
