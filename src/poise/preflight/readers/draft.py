"""Settings in the making: typed look-ups of a source's own keys, and how the source says each field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from poise.core.errors import UserError
from poise.preflight.settings import Settings

WEAK = ("default of ", "guessed from ")
"""How ``said`` begins where a field gives way to a file that really says it."""

LARGEST = 2**53
"""Bound of whole numbers."""

SHOWN = 4
"""Names in a note."""

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_SKIPPED = frozenset({"source", "format", "methods", "said", "notes"})


class Found(NamedTuple):
    """A value, and how the source says it."""

    value: Any
    said: str


class Draft:
    """The fields of ``Settings`` as they are found."""

    def __init__(self, source: str, form: str) -> None:
        self.source, self.form = source, form
        self.values: dict[str, Any] = {}
        self.said: dict[str, str] = {}
        self.notes: list[str] = []

    def put(self, name: str, found: Found | None) -> None:
        """Set a field, where something was found."""
        if found is not None:
            self.values[name], self.said[name] = found

    def default(self, name: str, value: Any, of: str) -> None:
        """Set a field that is not set as the framework does by itself."""
        if name not in self.values:
            self.put(name, Found(value, f"default of {of}"))

    def get(self, name: str) -> Any:
        """Return a field that was set, or ``None``."""
        return self.values.get(name)

    def settings(self) -> Settings:
        return Settings(
            source=self.source, format=self.form, said=dict(self.said), notes=tuple(self.notes), **self.values
        )


class Keys:
    """The keys of a source, each to be asked for by all of its names.

    Args:
        raw: key -> value; ``None``, and the words ``None`` and ``null``, are as good as absent.
        where: the file, for messages.
        form: how the source writes a key with its value.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, form: Callable[[str, Any], str]) -> None:
        self.raw, self.where, self.form = raw, where, form
        self._asked: set[str] = set()

    def find(self, *names: str) -> tuple[str, Any] | None:
        """Return the first of the names that has a value, and the value."""
        self._asked.update(names)
        for name in names:
            value = self.raw.get(name)
            if value is not None and not (isinstance(value, str) and value in ("None", "null", "")):
                return name, value
        return None

    def has(self, *names: str) -> bool:
        return self.find(*names) is not None

    def number(self, *names: str, low: float = -math.inf, high: float = math.inf) -> Found | None:
        """Return a finite number within bounds.

        Raises:
            UserError: something else.
        """
        if (found := self.find(*names)) is None:
            return None
        key, raw = found
        try:
            value = math.nan if isinstance(raw, bool | list | dict) else float(raw)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise self._wrong(key, raw, "a finite number")
        if not low <= value <= high:
            bounds = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
            raise self._wrong(key, raw, bounds)
        return Found(value, self.form(key, raw))

    def whole(self, *names: str, low: int = 0) -> Found | None:
        """Return a whole number of at least ``low``.

        Raises:
            UserError: something else.
        """
        if (found := self.find(*names)) is None:
            return None
        key, raw = found
        value: float = math.nan
        try:
            if not isinstance(raw, bool | list | dict):
                value = int(raw) if isinstance(raw, int) else float(raw)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not low <= value <= LARGEST or value != int(value):
            raise self._wrong(key, raw, f"a whole number of at least {low}")
        return Found(int(value), self.form(key, raw))

    def size(self, *names: str) -> Found | None:
        """Return a whole number of at least 1."""
        return self.whole(*names, low=1)

    def flag(self, *names: str) -> Found | None:
        """Return true or false.

        Raises:
            UserError: something else.
        """
        if (found := self.find(*names)) is None:
            return None
        key, raw = found
        word = str(raw).lower()
        if isinstance(raw, list | dict) or word not in _TRUE | _FALSE:
            raise self._wrong(key, raw, "true or false")
        return Found(word in _TRUE, self.form(key, raw))

    def is_on(self, *names: str) -> bool:
        """Return whether a flag is there and true."""
        found = self.flag(*names)
        return found is not None and found.value

    def word(self, *names: str) -> Found | None:
        """Return a word in lower case; one of a list's where it has only that, ``Kind.name`` as ``name``.

        Raises:
            UserError: a list or a mapping.
        """
        if (found := self.find(*names)) is None:
            return None
        key, raw = found
        if isinstance(raw, list | dict):
            raise self._wrong(key, raw, "a word")
        return Found(str(raw).strip().lower(), self.form(key, raw))

    def wrong(self, name: str, wanted: str) -> UserError:
        """Return the error for a key that is there and means nothing."""
        return self._wrong(name, self.raw.get(name), wanted)

    def unread(self, known: Iterable[str] = ()) -> list[str]:
        """Return the keys nobody asked for, apart from those that are known not to matter."""
        skip = set(known)
        return [
            str(key)
            for key, value in self.raw.items()
            if key not in self._asked and key not in skip and value is not None
        ]

    def _wrong(self, key: str, raw: Any, wanted: str) -> UserError:
        shown = repr(raw) if len(repr(raw)) <= 60 else repr(raw)[:57] + "..."
        return UserError(f"'{self.where}': '{key}' is {shown}; give {wanted}")


def not_read(names: Sequence[str], what: str = "settings") -> list[str]:
    """Return the note about keys that were not read: none, or one with the first names."""
    if not names:
        return []
    more = ", ..." if len(names) > SHOWN else ""
    return [
        f"{len(names)} {what if len(names) > 1 else what.removesuffix('s')} not read: {', '.join(names[:SHOWN])}{more}"
    ]


def flattened(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return all values of nested mappings by their own key, and the keys that come with several values.

    Of several the first counts.
    """
    out: dict[str, Any] = {}
    twice: list[str] = []
    rest: list[tuple[str, Any]] = list(data.items())
    while rest:
        key, value = rest.pop(0)
        if isinstance(value, Mapping):
            rest.extend((str(inner), v) for inner, v in value.items())
        elif key in out and out[key] is not None and value is not None:
            if out[key] != value and key not in twice:
                twice.append(key)
        elif value is not None or key not in out:
            out[key] = value
    return out, twice


def merge(parts: Sequence[Settings]) -> Settings:
    """Return one ``Settings`` with what all the parts say; a default gives way to what is said.

    Raises:
        UserError: two parts say different things; both are named.
    """
    first, *others = parts
    values = {f.name: getattr(first, f.name) for f in dataclasses.fields(Settings)}
    said, origin = dict(first.said), dict.fromkeys(values, first.source)
    for part in others:
        for name in values.keys() - _SKIPPED:
            value = getattr(part, name)
            here = said.get(name, "")
            if value is None or (value == values[name] and not here.startswith(WEAK)):
                continue
            there = part.said.get(name, f"{name} = {value}")
            if values[name] is not None and there.startswith(WEAK):
                continue
            if values[name] is not None and not here.startswith(WEAK):
                here = here or f"{name} = {values[name]}"
                raise UserError(
                    f"'{origin[name]}' and '{part.source}' disagree about {name}: {here} and {there}; "
                    "mend one of them or leave one file out"
                )
            values[name], said[name], origin[name] = value, there, part.source
    values["said"] = said
    values["source"] = ", ".join(part.source for part in parts)
    values["notes"] = tuple(note for part in parts for note in part.notes)
    values["methods"] = tuple(dict.fromkeys(method for part in parts for method in part.methods))
    return Settings(**values)
