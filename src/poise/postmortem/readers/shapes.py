"""Lines of free text that are written like one before: their numbers without taking the line apart again.

The line is turned into a pattern, the text between its numbers word for word. The first lines that fit are taken apart
all the same, and a pattern that gives anything else is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

STEP_AT, TOTAL_AT = "step\0", "total\0"
"""Among the names of columns: the step and what stands behind its slash."""

MOST = 8
"""Patterns that are kept."""

TRIED = 40
"""Times that a line gave no pattern, after which no more are made."""

PROVED = 20
"""Lines that are taken apart to see that the pattern is right."""

_TOKEN = re.compile(r"(?:(?<=[\s=:(])[-+])?(?<![\w.])\d++(?:\.\d++)?(?:[eE][-+]?\d++)?(?!\w)")
_ANY = r"\d++(?:\.\d++)?(?:[eE][-+]?\d++)?"
_BLANKS = re.compile(r"(?:\\ )+")


class Place(NamedTuple):
    """Where in a line a number stands, and what it is."""

    name: str
    start: int
    end: int


@dataclass(slots=True)
class _Shape:
    pattern: re.Pattern[str]
    names: tuple[str, ...]
    proved: int = 0


class Shapes:
    """The patterns of one log."""

    def __init__(self) -> None:
        self._shapes: list[_Shape] = []
        self._tried = 0

    def match(self, line: str) -> tuple[dict[str, float], _Shape] | None:
        """Return the numbers of a line that is written like one before, and its pattern."""
        for at, shape in enumerate(self._shapes):
            found = shape.pattern.fullmatch(line)
            if found is not None:
                if at:
                    self._shapes.insert(0, self._shapes.pop(at))
                return dict(zip(shape.names, map(float, found.groups()), strict=True)), shape
        return None

    def prove(self, shape: _Shape, got: Mapping[str, float], right: Mapping[str, float]) -> None:
        """Keep a pattern only if it gives what it should."""
        shape.proved += 1
        if got != right:
            self._shapes.remove(shape)
            self._tried += 1

    def learn(self, line: str, places: list[Place]) -> None:
        """Make a pattern of a line, if its numbers are plain ones."""
        if len(self._shapes) >= MOST or self._tried >= TRIED:
            return
        self._tried += 1
        wanted = {(place.start, place.end): place.name for place in places}
        pattern, names, at = "", [], 0
        for token in _TOKEN.finditer(line):
            pattern += _BLANKS.sub(" {1,12}", re.escape(line[at : token.start()]))
            name = wanted.pop(token.span(), "")
            sign = "[-+]?" if line[token.start() - 1 : token.start()] in tuple(" =:(") and token.start() else ""
            sign = "[-+]?" if token[0][0] in "-+" else sign
            pattern += f"({sign}{_ANY})" if name else f"{sign}{_ANY}"
            names += [name] if name else []
            at = token.end()
        if not wanted and names:
            pattern += _BLANKS.sub(" {1,12}", re.escape(line[at:]))
            self._shapes.append(_Shape(re.compile(pattern), tuple(names)))
