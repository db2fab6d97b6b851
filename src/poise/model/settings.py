"""Settings of methods as text in a recipe, checked against what the method takes."""

from __future__ import annotations

import inspect
import math
import tomllib
import typing
from collections.abc import Callable, Mapping
from typing import Final

from poise.core.errors import UserError, nearest
from poise.model.spec import MOST, Spec, Value

SMALLEST: Final = 1e-30
LARGEST: Final = 1e30
"""Bounds of the size of a number with a fraction, within those of fp32; methods that square theirs ask for less."""


def split(text: str) -> tuple[str, dict[str, Value]]:
    """Read ``name:key=value,key=value``; a value is read as TOML, else as text.

    >>> split("z_loss:coefficient=1e-5")
    ('z_loss', {'coefficient': 1e-05})

    Raises:
        UserError: a setting without a value, or one that is named twice; a line break or a comment; no text.
    """
    if not isinstance(text, str):
        raise UserError(f'methods are names, not a {type(text).__name__}; write apply(spec, "qk_norm", ...)')
    if "#" in text or len(text.splitlines()) > 1:
        raise UserError(f"method {text!r} holds a line break or '#'; write NAME:KEY=VALUE on one line")
    name, _, rest = text.partition(":")
    given: dict[str, Value] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"setting '{pair}' of method '{name}' has no value; write {name}:{pair}=VALUE")
        key = key.strip()
        if key in given:
            raise UserError(f"setting '{key}' of method '{name}' is given twice; give it once")
        try:
            given[key] = tomllib.loads(f"x = {value}")["x"]
        except (ValueError, RecursionError):  # not TOML, or numbers and brackets without end
            given[key] = value
    return name, given


def checked(name: str, apply: Callable[..., Spec], given: Mapping[str, Value]) -> dict[str, Value]:
    """Check settings against the typed keywords of a method's ``apply``; whole numbers pass as floats.

    Raises:
        UserError: an unknown setting, a value of another type, or a number that no model can hold.
    """
    hints = typing.get_type_hints(apply)
    known = [p.name for p in inspect.signature(apply).parameters.values() if p.kind is p.KEYWORD_ONLY]
    out: dict[str, Value] = {}
    for key, value in given.items():
        if key not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"method '{name}' has no setting '{key}'{nearest(key, known)}; {there_are}")
        kinds = set(typing.get_args(hints[key]) or (hints[key],))
        if float in kinds and type(value) is int:
            value = _as_float(value)
        if type(value) not in kinds:
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            give = "true or false" if wanted == "bool" else f"a value of type {wanted}"
            raise UserError(f"setting '{key}' of method '{name}' is {value!r}; give {give}")
        if type(value) is float and value != 0 and not SMALLEST <= abs(value) <= LARGEST:
            raise UserError(
                f"{name} {key} is {value}; give a finite number, 0 or of a size from {SMALLEST:g} to {LARGEST:g}"
            )
        if type(value) is int and abs(value) > MOST:
            raise UserError(f"{name} {key} is beyond {MOST}; give a smaller whole number")
        out[key] = value
    return out


def shown(key: str, value: object) -> str:
    """Write a setting as ``split`` reads it; one that is ``None`` is chosen by the method and cannot be written.

    >>> shown("learned", True), shown("rank", None)
    ('learned=true', "rank (default: by the method's rule)")
    """
    if value is None:
        return f"{key} (default: by the method's rule)"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
