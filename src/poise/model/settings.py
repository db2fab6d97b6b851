"""Settings of methods as text in a recipe, checked against what the method takes."""

from __future__ import annotations

import inspect
import tomllib
import typing
from collections.abc import Callable, Mapping

from poise.core.errors import UserError, nearest
from poise.model.spec import Spec, Value


def split(text: str) -> tuple[str, dict[str, Value]]:
    """Read ``name:key=value,key=value``; a value is read as TOML, else as text.

    >>> split("z_loss:coefficient=1e-5")
    ('z_loss', {'coefficient': 1e-05})

    Raises:
        UserError: a setting without a value.
    """
    name, _, rest = text.partition(":")
    given: dict[str, Value] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"setting '{pair}' of method '{name}' has no value; write {name}:{pair}=VALUE")
        try:
            given[key.strip()] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            given[key.strip()] = value
    return name, given


def checked(name: str, apply: Callable[..., Spec], given: Mapping[str, Value]) -> dict[str, Value]:
    """Check settings against the typed keywords of a method's ``apply``; whole numbers pass as floats.

    Raises:
        UserError: an unknown setting, or a value of another type.
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
            value = float(value)
        if type(value) not in kinds:
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise UserError(f"setting '{key}' of method '{name}' is {value!r}; give a value of type {wanted}")
        out[key] = value
    return out
