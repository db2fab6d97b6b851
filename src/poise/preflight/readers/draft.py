"""Settings in the making: typed look-ups of a source's own keys, and how the source says each field."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from poise.core.errors import UserError, nearest
from poise.preflight.settings import Said, Settings

WEAK = ("default of ", "guessed from ")
"""How ``said`` begins where a field gives way to a file that really says it."""

LARGEST = 2**53
"""Bound of whole numbers."""

SHOWN = 4
"""Names in a note."""

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_SKIPPED = frozenset({"source", "format", "methods", "said", "notes"})


_OPEN = re.compile(r"\$[\w({@*#]|\{\{|^\?\?\?$")
"""A value that only the shell, a template or another file knows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unread:
    """Stands for a value that is written and cannot be read."""

    text: str = ""


class Found(NamedTuple):
    """A value, ``None`` where it is written and cannot be read; how the source says it; and what it calls it."""

    value: Any
    said: str
    key: str = ""

    def then(self, make: Callable[[Any], Any]) -> Found:
        """Return what is made of the value; of one that cannot be read nothing is."""
        return self if self.value is None else self._replace(value=make(self.value))


class Draft:
    """The fields of ``Settings`` as they are found; ``called`` is what the source calls them."""

    def __init__(self, source: str, form: str, called: Mapping[str, str] | None = None) -> None:
        self.source, self.form = source, form
        self.values: dict[str, Any] = {}
        self.said: dict[str, str] = {}
        self.called: dict[str, str] = dict(called or {})
        self.notes: list[str] = []
        self._unclear: set[str] = set()

    def put(self, name: str, found: Found | None) -> None:
        """Set a field, where something was found; what cannot be read leaves it unknown."""
        if found is None:
            return
        if found.key:
            self.called[name] = found.key
        if found.value is None:
            self.unknown(name)
        else:
            self.values[name], self.said[name] = found.value, found.said
            self._unclear.discard(name)

    def unknown(self, *names: str) -> None:
        """Leave fields unknown, whatever the framework does by itself."""
        for name in names:
            self.values[name] = None
            self.said.pop(name, None)
            self._unclear.add(name)

    def default(self, name: str, value: Any, of: str) -> None:
        """Set a field that is not set as the framework does by itself."""
        if name not in self.values:
            self.put(name, Found(value, f"default of {of}"))

    def get(self, name: str) -> Any:
        """Return a field that was set, or ``None``."""
        return self.values.get(name)

    def settings(self) -> Settings:
        said = Said(self.said, self.called, self._unclear)
        return Settings(source=self.source, format=self.form, said=said, notes=tuple(self.notes), **self.values)


class Keys:
    """The keys of a source, each to be asked for by all of its names.

    What is written and cannot be read (``Unread``, a variable of the shell, a template) is found as ``None``.

    Args:
        raw: key -> value; ``None``, and the words ``None`` and ``null``, are as good as absent.
        where: the file, for messages.
        form: how the source writes a key with its value.
        label: how the source writes a key.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        form: Callable[[str, Any], str],
        label: Callable[[str], str] = str,
    ) -> None:
        self.raw, self.where, self.form, self.label = raw, where, form, label
        self._asked: set[str] = set()
        self._unclear: dict[str, str] = {}

    def find(self, *names: str) -> tuple[str, Any] | None:
        """Return the first of the names that has a value, and the value; nothing where it cannot be read."""
        found = self._seek(*names)
        return None if found is None or isinstance(found[1], Unread) else found

    def has(self, *names: str) -> bool:
        """Return whether one of the names is written."""
        return self._seek(*names) is not None

    def is_unclear(self, *names: str) -> bool:
        """Return whether a value is written and cannot be read."""
        found = self._seek(*names)
        return found is not None and isinstance(found[1], Unread)

    def notes(self) -> list[str]:
        """Return a note for each setting that was asked for and cannot be read."""
        out = []
        for key, text in self._unclear.items():
            shown = text if len(text) <= 60 else text[:57] + "..."
            how = f"is {shown}, whose value the file does not say" if shown else "has a value that cannot be read"
            out.append(" ".join(f"{self.label(key)} {how}".split()))
        return out

    def _seek(self, *names: str) -> tuple[str, Any] | None:
        self._asked.update(names)
        for name in names:
            value = self.raw.get(name)
            if value is None or (isinstance(value, str) and value in ("None", "null", "")):
                continue
            parts = value if isinstance(value, list) else [value]
            if any(isinstance(part, Unread) or (isinstance(part, str) and _OPEN.search(part)) for part in parts):
                text = value.text if isinstance(value, Unread) else " ".join(map(str, parts))
                self._unclear[name] = text
                return name, Unread(text)
            return name, value
        return None

    def _typed(self, *names: str) -> tuple[str, Any] | Found | None:
        """Return what is there, or what a typed look-up answers where it cannot be read."""
        found = self._seek(*names)
        if found is None:
            return None
        key, raw = found
        if isinstance(raw, str) and raw.lower() == "auto":
            self._unclear[key] = raw
            raw = Unread(raw)
        return Found(None, "", self.label(key)) if isinstance(raw, Unread) else (key, raw)

    def number(self, *names: str, low: float = -math.inf, high: float = math.inf) -> Found | None:
        """Return a finite number within bounds.

        Raises:
            UserError: something else.
        """
        found = self._typed(*names)
        if found is None or isinstance(found, Found):
            return found
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
        return Found(value, self.form(key, raw), self.label(key))

    def whole(self, *names: str, low: int = 0) -> Found | None:
        """Return a whole number of at least ``low``.

        Raises:
            UserError: something else.
        """
        found = self._typed(*names)
        if found is None or isinstance(found, Found):
            return found
        key, raw = found
        value: float = math.nan
        try:
            if not isinstance(raw, bool | list | dict):
                value = int(raw) if isinstance(raw, int) else float(raw)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not low <= value <= LARGEST or value != int(value):
            raise self._wrong(key, raw, f"a whole number of at least {low}")
        return Found(int(value), self.form(key, raw), self.label(key))

    def size(self, *names: str) -> Found | None:
        """Return a whole number of at least 1."""
        return self.whole(*names, low=1)

    def flag(self, *names: str) -> Found | None:
        """Return true or false.

        Raises:
            UserError: something else.
        """
        found = self._typed(*names)
        if found is None or isinstance(found, Found):
            return found
        key, raw = found
        word = str(raw).lower()
        if isinstance(raw, list | dict) or word not in _TRUE | _FALSE:
            raise self._wrong(key, raw, "true or false")
        return Found(word in _TRUE, self.form(key, raw), self.label(key))

    def is_on(self, *names: str) -> bool:
        """Return whether a flag is there and true."""
        found = self.flag(*names)
        return found is not None and bool(found.value)

    def word(self, *names: str) -> Found | None:
        """Return a word in lower case; one of a list's where it has only that, ``Kind.name`` as ``name``.

        Raises:
            UserError: a list or a mapping.
        """
        if (found := self._seek(*names)) is None:
            return None
        key, raw = found
        if isinstance(raw, Unread):
            return Found(None, "", self.label(key))
        if isinstance(raw, list | dict):
            raise self._wrong(key, raw, "a word")
        return Found(str(raw).strip().lower(), self.form(key, raw), self.label(key))

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

    def misspelt(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return notes about those names that are close to one that was asked for, and the other names."""
        notes: list[str] = []
        rest: list[str] = []
        for name in names:
            hint = nearest(name, sorted(self._asked))
            (notes if hint else rest).append(f"{self.label(name)} is not read{hint}" if hint else name)
        return notes, rest

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


def with_unread(data: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the mapping with ``Unread`` at the dotted names whose values could not be read."""
    out = {key: with_unread(value, ()) if isinstance(value, Mapping) else value for key, value in data.items()}
    for name in names:
        *path, last = name.split(".")
        owner: Any = out
        for part in path:
            owner = owner.get(part) if isinstance(owner, dict) else None
        if isinstance(owner, dict) and owner.get(last) is None:
            owner[last] = Unread()
    return out


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
    called = {name: own for part in reversed(parts) for name, own in part.called.items()}
    unclear = {name for part in parts if isinstance(part.said, Said) for name in part.said.unclear}
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
            if own := part.called.get(name):
                called[name] = own
    for name in [name for name in unclear if said.get(name, "").startswith(WEAK)]:
        values[name] = None
        del said[name]
    values["said"] = Said(said, called, {name for name in unclear if values[name] is None})
    values["source"] = ", ".join(part.source for part in parts)
    values["notes"] = tuple(note for part in parts for note in part.notes)
    values["methods"] = tuple(dict.fromkeys(method for part in parts for method in part.methods))
    return Settings(**values)
