"""Stability methods of the model, one file each, and the functions that apply them to a ``Spec``.

To add a method: write its file (copy the shape of ``z_loss.py``), and add its name to ``METHODS``.
"""

from __future__ import annotations

import importlib
import inspect
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from poise.core.errors import Conflict, UserError, nearest
from poise.core.registry import Card
from poise.model.spec import Spec, Value

METHODS: Final[Mapping[str, str]] = {
    "qk_norm": "qk_norm",
    "z_loss": "z_loss",
    "embed_norm": "embed_norm",
    "embed_scale": "embed_scale",
}
"""Name in recipes -> module in this folder."""


class Method(Protocol):
    """What the file of a method holds."""

    CARD: Card
    EXCLUDES: Mapping[str, str]
    """Name of another method -> why the two do not go together."""
    PARTS: Mapping[str, Mapping[str, Callable[..., Any]]]
    """Slot -> part name -> builder."""
    apply: Callable[..., Spec]
    """``apply(spec, *, setting=default, ...) -> Spec``: claims slots, touches nothing else."""


def load(name: str) -> Method:
    """Return the module of a method.

    Raises:
        UserError: no method of this name.
    """
    if name not in METHODS:
        raise UserError(
            f"no model method '{name}'{nearest(name, METHODS)}; there are {', '.join(sorted(METHODS))}"
        )
    return typing.cast(Method, importlib.import_module(f"{__name__}.{METHODS[name]}"))


def cards() -> list[Card]:
    """Return the cards of all methods, by name."""
    return [load(name).CARD for name in sorted(METHODS)]


def apply_methods(spec: Spec, wanted: Iterable[str] | Mapping[str, Mapping[str, Value]]) -> Spec:
    """Return ``spec`` with methods applied in order.

    Args:
        spec: the model without them.
        wanted: ``["qk_norm", "z_loss:coefficient=1e-5"]`` (settings after a colon, separated by commas), or
            a mapping ``{"z_loss": {"coefficient": 1e-5}}``.

    Raises:
        UserError: an unknown method or setting, or a value that does not fit.
        Conflict: two methods claim one slot, one excludes the other, or one is named twice.
    """
    pairs = wanted.items() if isinstance(wanted, Mapping) else [_split(text) for text in wanted]
    for name, given in pairs:
        method = load(name)
        for earlier in spec.methods:
            reason = method.EXCLUDES.get(earlier) or load(earlier).EXCLUDES.get(name)
            if reason:
                raise Conflict(f"methods '{earlier}' and '{name}' exclude each other: {reason}; remove one")
        spec = method.apply(spec, **_settings(name, method.apply, given))
    return spec


def table_markdown() -> str:
    """Return the page of all methods, as ``docs/methods.md`` holds it."""
    rows = [f"| [`{c.name}`](#{c.name}) | {c.title} | {c.acts} | {c.cost} |" for c in cards()]
    lines = [
        "# Model methods",
        "",
        "Generated from the cards by `python -m poise.model.methods > docs/methods.md`; a test holds it current.",
        "",
        "| method | what it is | where and when it acts | cost |",
        "|---|---|---|---|",
        *rows,
    ]
    for card in cards():
        signature = inspect.signature(load(card.name).apply)
        settings = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        lines += [
            "",
            f"## {card.name}",
            "",
            f"{card.title}. {card.citation}.",
            "",
            f"- Formula: `{card.formula}`",
            f"- Settings: {', '.join(f'`{p.name}={p.default}`' for p in settings) or 'none'}",
            f"- Acts: {card.acts}",
            f"- Cost: {card.cost}",
            f"- Off: {card.off}",
            f"- Differs from the paper in: {card.differs}",
        ]
        lines += [f"- Not with `{other}`: {why}" for other, why in load(card.name).EXCLUDES.items()]
    return "\n".join(lines) + "\n"


def _split(text: str) -> tuple[str, dict[str, Value]]:
    """Read ``name:key=value,key=value``; a value is read as TOML, else as text."""
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


def _settings(name: str, apply: Callable[..., Spec], given: Mapping[str, Value]) -> dict[str, Value]:
    """Check settings against the typed keywords of ``apply``; whole numbers pass as floats."""
    hints = typing.get_type_hints(apply)
    known = [p.name for p in inspect.signature(apply).parameters.values() if p.kind is p.KEYWORD_ONLY]
    checked: dict[str, Value] = {}
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
        checked[key] = value
    return checked
