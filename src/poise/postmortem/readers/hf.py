"""Hugging Face ``Trainer``: its ``trainer_state.json``, and what it prints (``hf_stdout.py``).

The state is one JSON object, whose ``log_history`` is a list with one record a log call; the last one of a finished
run is a summary without ``loss``. A list of such records alone is read too. The file is taken apart record by record,
so that its size does not matter, and so that one that was cut off while it was saved gives all whole records.
"""

from __future__ import annotations

import codecs
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from poise.core.errors import UserError
from poise.postmortem.readers import hf_stdout, jsonl
from poise.postmortem.readers.names import LOSS, VAL_LOSS, rank
from poise.postmortem.readers.source import PIECE, Item, Row, Source

FORMAT = "hf"
LOOKS_FOR = "Hugging Face trainer_state.json, or what its Trainer prints"

CHUNK = 1 << 20
MAX_RECORD = 1 << 18
"""Characters of one record, or of one setting; a longer one is damage."""

MAX_DAMAGED = 200
"""Damaged records after which the rest of the file is left alone."""

_STATE = re.compile(r'\A\s*\{.*?"log_history"\s*:\s*\[', re.DOTALL)
_LIST = re.compile(r"\A\s*\[\s*(?=\{)")
_BLANK = re.compile("[ \t\r\n\0\ufeff]*")
_MARKS = ("learning_rate", "grad_norm", "epoch", "step")
_DECODER = json.JSONDecoder()


def sniff(source: Source) -> float:
    """Return 1 for a state file, 0.9 for what the trainer prints."""
    start = _text(source.head[:MAX_RECORD])
    if '"log_history"' in start and _STATE.match(start):
        return 1.0
    found = _LIST.match(start)
    if found:
        record, _ = _decode(start, found.end())
        if isinstance(record, dict) and sum(name in record for name in _MARKS) and _has_loss(record):
            return 0.85
    return hf_stdout.sniff(source)


def read(source: Source) -> Iterator[Item]:
    """Yield one row a record, or a printed line."""
    start = _text(source.head[:MAX_RECORD])
    if not _STATE.match(start) and not _LIST.match(start):
        yield from hf_stdout.read(source)
        return
    text = _Text(source)
    found = False
    for record in _records(text, source):
        if "train_runtime" in record:
            source.notes.add("the trainer's closing summary is not a step and is left out")
            continue
        row = _row(record)
        if row:
            found = True
            yield row
    if not found:
        raise UserError(f"'{source.path}' has no record with a number in its log_history; name a later checkpoint's")


def _row(record: dict[str, Any]) -> Row:
    try:
        return jsonl.row(record)
    except RecursionError:  # no trainer nests its records so deep
        return {}


def _has_loss(record: dict[str, Any]) -> bool:
    return any(rank(meaning, name) is not None for name in record for meaning in (LOSS, VAL_LOSS))


def _text(head: bytes) -> str:
    return head.decode("utf-8", errors="replace").lstrip("\ufeff")


class _Text:
    """The file's characters from ``at`` on; what was passed is forgotten."""

    def __init__(self, source: Source) -> None:
        self.text = ""
        self.at = 0
        self.at_end = False
        self._source = source
        self._pieces = self._read()

    def ahead(self, length: int) -> None:
        """See to it that so many characters can be seen, if the file has them."""
        if self.at > CHUNK:
            self.text, self.at = self.text[self.at :], 0
        while len(self.text) - self.at < length and not self.at_end:
            piece = next(self._pieces, None)
            if piece is None:
                self.at_end = True
            else:
                self.text += piece

    def next(self) -> str:
        """Return the next character that is not blank, without passing it; an empty string at the end."""
        while True:
            self.ahead(1)
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self.at = blank.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.at_end:
                return ""

    def value(self) -> tuple[Any, bool]:
        """Pass the JSON value that begins here and return it; ``(None, False)`` where there is none."""
        self.next()
        self.ahead(MAX_RECORD)
        value, end = _decode(self.text, self.at)
        if end < 0 or end - self.at > MAX_RECORD:
            return None, False
        self.at = end
        return value, True

    def _read(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with self._source.binary() as file:
            while pieces := list(islice(self._pieces_of(file), CHUNK // PIECE)):
                yield decoder.decode(b"".join(pieces))

    def _pieces_of(self, file: IO[bytes]) -> Iterator[bytes]:
        """Yield small pieces, so that damage in a compressed file costs no more than one."""
        while True:
            try:
                piece = file.read(PIECE)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk, not the data
                    raise
                self._source.notes.add("the compressed file is damaged or cut off; what came before is used")
                return
            if not piece:
                return
            yield piece


def _decode(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value at a place and where it ends; ``(None, -1)`` where there is none."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, -1


def _records(text: _Text, source: Source) -> Iterator[dict[str, Any]]:
    """Yield the records of the list; what stands around it goes to the settings."""
    if text.next() == "[":
        yield from _list(text, source)
        return
    text.at += 1
    while (mark := text.next()) != "}":
        if not mark:
            source.notes.add("the file is cut off; what was read before is used")
            return
        if mark == ",":
            text.at += 1
            continue
        name, good = text.value()
        if not good or not isinstance(name, str) or text.next() != ":":
            source.notes.add("the file is damaged or cut off outside its records; what was read before is used")
            return
        text.at += 1
        if name == "log_history" and text.next() == "[":
            yield from _list(text, source)
            continue
        value, good = text.value()
        if not good:
            source.notes.add("the file is damaged or cut off outside its records; what was read before is used")
            return
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            source.settings[name] = str(value)


def _list(text: _Text, source: Source) -> Iterator[dict[str, Any]]:
    """Yield the records of the list that begins here, and pass its end."""
    text.at += 1
    damaged = 0
    while damaged < MAX_DAMAGED:
        mark = text.next()
        if mark == "]":
            text.at += 1
            return
        if not mark:
            source.notes.add("the file is cut off; the whole records before are used")
            return
        if mark == ",":
            text.at += 1
            continue
        value, good = text.value()
        if good and isinstance(value, dict):
            yield value
        elif not good:
            if text.at_end and "}" not in text.text[text.at :]:
                source.notes.add("the file is cut off; the whole records before are used")
                text.at = len(text.text)
                return
            damaged += 1
            source.notes.add("a damaged record left out")
            _pass_damage(text)
    source.notes.add(f"more than {MAX_DAMAGED} damaged records; the rest of the file is left out")
    text.at = len(text.text)


def _pass_damage(text: _Text) -> None:
    """Go to where the next record may begin."""
    text.at += 1
    while True:
        text.ahead(1)
        found = text.text.find("{", text.at)
        if found >= 0:
            text.at = found
            return
        text.at = len(text.text)
        if text.at_end:
            return
