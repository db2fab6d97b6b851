"""Configuration: frozen dataclasses, TOML files and ``--section.key value`` overrides, one way of checking.

A config class is an ordinary frozen dataclass with typed fields and, where a value can be wrong, a
``__post_init__`` that raises ``UserError``. Files and command line both become a nested dict, and the dict
becomes the dataclass here, so both get the same checks and the same messages. An unknown key is an error
with the nearest name.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from poise.core.errors import UserError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a ``cls`` from a nested mapping.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a value the class refuses.
    """
    known = {name for name, _, _ in flatten_fields(cls)}
    for key in _flatten_keys(values, cls):
        if any(name.startswith(key + ".") for name in known):
            raise UserError(f"'{key}' is a section; set one of its keys, e.g. '{_first(known, key)}'{_in(where)}")
        if key not in known:
            raise UserError(f"unknown key '{key}'{_in(where)}{nearest(key, known)}")
    return typing.cast(T, _build(cls, values, "", where))


def load(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into a nested dict.

    Raises:
        UserError: the file is missing, unreadable, or not TOML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no recipe file '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe '{path}': {error}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"'{path}' is not valid TOML: {error}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over`` laid on top, section by section.

    >>> merge({"optim": {"lr": 1, "beta1": 2}}, {"optim": {"lr": 3}})
    {'optim': {'lr': 3, 'beta1': 2}}
    """
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn ``--optim.lr 3e-3 --model.tied=false`` into a nested dict; values are read as TOML, else text.

    >>> overrides(["--optim.lr", "3e-3", "--model.tied=false", "--data.source", "notes"])
    {'optim': {'lr': 0.003}, 'model': {'tied': False}, 'data': {'source': 'notes'}}

    Raises:
        UserError: a word that is not ``--key value`` or ``--key=value``.
    """
    out: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"unexpected argument '{word}'; options are written --section.key value")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            if not rest or (rest[0].startswith("--") and not rest[0][2:3].isdigit()):
                raise UserError(f"option '--{key}' needs a value, e.g. --{key} VALUE")
            value = rest.pop(0)
        nested: dict[str, Any] = {}
        *sections, leaf = key.replace("-", "_").split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = _value(value)
        out = merge(out, nested)
    return out


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as a nested dict of plain values, with nothing left out."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, f.name))
        else (list(value) if isinstance(value, tuple) else value)
        for f in dataclasses.fields(config)
    }


def to_toml(config: Any) -> str:
    """Return a config as TOML that ``load`` and ``build`` turn into an equal config.

    ``None`` has no TOML form: the key is written as a comment, or as "none" where that is not the default.
    """
    lines: list[str] = []
    unset = {name for name, _, f in flatten_fields(type(config)) if f.default is None}
    _toml_section(to_dict(config), "", unset, lines)
    return "\n".join(lines).strip() + "\n"


def flatten_fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield (dotted name, type, field) for every leaf of a config class."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from flatten_fields(kind, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", kind, f


def _flatten_keys(values: Mapping[str, Any], cls: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        kind = hints.get(key)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            yield from _flatten_keys(value, kind, f"{prefix}{key}.")
        elif kind is None and isinstance(value, Mapping) and value:  # an unknown section, with all of its name
            yield from (f"{prefix}{key}.{inner}" for inner in value)
        else:
            yield prefix + key


def _build(cls: Any, values: Mapping[str, Any], prefix: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for key, value in values.items():
        kind, name = hints[key], prefix + key
        if dataclasses.is_dataclass(kind):
            given[key] = _build(kind, value, name + ".", where)
        else:
            given[key] = _check(value, kind, name, where)
    try:
        return cls(**given)
    except TypeError as error:
        raise UserError(f"{prefix or cls.__name__}: {error}") from None


def _check(value: Any, kind: Any, name: str, where: str) -> Any:
    """Return ``value`` as ``kind`` (whole numbers pass as floats, lists as tuples) or raise in one line."""
    options = typing.get_args(kind)
    if value == "none" and type(None) in options:
        return None
    if isinstance(value, bool) and not _takes_bool(kind, options):  # pydantic would take true for 1
        number = "a number" if float in (kind, *options) else "a whole number"
        raise UserError(f"'{name}' is {value!r}, but must be {number}{_in(where)}")
    try:
        return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]["msg"].removeprefix("Input ")
        raise UserError(f"'{name}' is {value!r}: it {fault}{_in(where)}") from None


def _takes_bool(kind: Any, options: tuple[Any, ...]) -> bool:
    """Return whether true and false are left to the type's own check: all types but numbers."""
    numbers = {int, float} & {kind, *options}
    return not numbers or bool in options or any(isinstance(option, bool) for option in options)


def _first(known: set[str], section: str) -> str:
    return min(name for name in known if name.startswith(section + "."))


def _in(where: str) -> str:
    return f" in {where}" if where else ""


def _value(text: str) -> Any:
    """Read a command-line value as TOML would; what is not TOML is text, and so are dates and times."""
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text


def _toml_section(values: Mapping[str, Any], name: str, unset: set[str], lines: list[str]) -> None:
    if name:
        lines += ["", f"[{name}]"]
    sections = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    for key, value in values.items():
        if key in sections:
            continue
        if value is None and (f"{name}.{key}" if name else key) in unset:
            lines.append(f"# {key} is not set")
        else:
            lines.append(f"{_toml_key(key)} = {_toml_value('none' if value is None else value)}")
    for key, value in sections.items():
        _toml_section(value, f"{name}.{_toml_key(key)}" if name else _toml_key(key), unset, lines)


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON lets it stand
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
