"""Arms: what a study compares, as text.

    arm       [label=]methods[@key=value[;key=value ...]]
    methods   baseline, or names joined by +, each with settings after colons: qk_norm+soft_cap:cap=30:other=1
    key       of the recipe, with its section: optim.weight_decay; the value as in TOML

``baseline`` is no method at all. A label is letters, digits and _ . - +, and is followed by the first = of the arm,
before any colon or @; without one, the arm is called what it says. In a list, arms are separated by commas; a comma
inside brackets or quotes belongs to its arm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from poise.core import config as configs
from poise.core.errors import UserError
from poise.model import methods
from poise.studies.cell import UNUSED
from poise.train.recipe import Recipe

BASELINE: Final = "baseline"

_LABEL: Final = re.compile(r"([\w.+-]+)=")
_SEPARATORS: Final = {
    ",": re.compile(r"""((?:[^,\[\]"']|\[[^\]]*\]|"[^"]*"|'[^']*')*)(?:,|$)"""),
    ";": re.compile(r"""((?:[^;\[\]"']|\[[^\]]*\]|"[^"]*"|'[^']*')*)(?:;|$)"""),
}
_PLUS: Final = re.compile(r"\+(?=[A-Za-z_]|$)")  # not that of 1e+3

SET_BY_STUDY: Final[Mapping[str, str]] = {
    "optim.lr": "the study sets it: --lrs",
    "seed": "the study sets it: --seeds",
    **UNUSED,
}
"""Recipe keys that nobody else can set in a study, and why."""


@dataclass(frozen=True)
class Arm:
    """One arm, read.

    Attributes:
        label: what it is called in tables.
        text: what it was read from, with its label.
        methods: as a recipe names them.
        over: nested recipe values besides the methods.
    """

    label: str
    text: str
    methods: tuple[str, ...]
    over: Mapping[str, Any]

    def applied(self, base: Recipe) -> Recipe:
        """Return the base recipe with this arm's methods after its own, and with its values.

        Raises:
            UserError: an unknown method or key, a value that cannot be, methods that are in conflict.
        """
        values = configs.merge(configs.to_dict(base), self.over)
        values["model"]["methods"] = [*base.model.methods, *self.methods]
        try:
            recipe = configs.build(Recipe, values)
            recipe.spec()
        except UserError as error:
            raise type(error)(f"arm '{self.label}': {error}") from None
        return recipe


def parse(text: str) -> Arm:
    """Read one arm.

    >>> arm = parse("capped=qk_norm+soft_cap:cap=30@optim.weight_decay=0;train.steps=10")
    >>> arm.label, arm.methods, arm.over
    ('capped', ('qk_norm', 'soft_cap:cap=30'), {'optim': {'weight_decay': 0}, 'train': {'steps': 10}})
    >>> parse("qk_norm@optim.beta2=0.99").label
    'qk_norm@optim.beta2=0.99'

    Raises:
        UserError: nothing in it, a label with other characters, or values that are not ``key=value`` or
            that the study sets itself.
    """
    text = text.strip()
    found = _LABEL.match(text)
    before = re.split("[:@]", text, maxsplit=1)[0]
    if not found and "=" in before:
        raise UserError(f"arm '{text}': label '{before.partition('=')[0]}' may have letters, digits and _ . - +")
    label, body = (found[1], text[found.end() :]) if found else (text, text)
    named, at, values = body.partition("@")
    if not named.strip() or (at and not values.strip()):
        raise UserError(
            f"arm '{text}' is not complete; write e.g. baseline, qk_norm+z_loss or qk_norm@optim.beta2=0.99"
        )
    parts = [] if named.strip() == BASELINE else [_method(part.strip()) for part in _PLUS.split(named)]
    if BASELINE in parts or "" in parts:
        raise UserError(
            f"arm '{text}': '{BASELINE}' stands alone, and methods are joined by one +, as in qk_norm+z_loss"
        )
    over = _values(values, text) if at else {}
    return Arm(label, text, tuple(parts), over)


def split(lists: Iterable[str]) -> list[str]:
    """Return the arms of one or more comma-separated lists.

    >>> split(["baseline,qk_norm", "x=qk_norm@optim.schedule.decay_ends=[3,5]"])
    ['baseline', 'qk_norm', 'x=qk_norm@optim.schedule.decay_ends=[3,5]']
    """
    return [part.strip() for text in lists for part in _cut(text, ",") if part.strip()]


def parse_all(texts: Iterable[str]) -> tuple[Arm, ...]:
    """Read arms; no two may be called the same.

    Raises:
        UserError: see ``parse``; or there is no arm, or a label comes twice.
    """
    arms = tuple(parse(text) for text in texts)
    if not arms:
        raise UserError("a study needs at least one arm; write e.g. --methods baseline,qk_norm")
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"arm '{label}' is named twice; remove one, or give it a label: other={label}")
    return arms


def changes_lr(arm: Arm) -> list[str]:
    """Return why the learning rate means something else in this arm; empty where it does not.

    A method says so with ``CHANGES_LR`` in its file.
    """
    names = dict.fromkeys(text.partition(":")[0] for text in arm.methods)
    reasons = {name: str(getattr(methods.load(name), "CHANGES_LR", "")) for name in names}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def refuse_set_by_study(over: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` for the first value that a study sets itself or that its runs do not read."""
    for name in _names(over):
        for taken, reason in SET_BY_STUDY.items():
            if name == taken or name.startswith(taken + "."):
                raise UserError(f"'{name}' cannot be set in a study: {reason}")


def _method(text: str) -> str:
    """Turn ``name:a=1:b=2`` into the recipe's ``name:a=1,b=2``."""
    name, colon, settings = text.partition(":")
    return name + colon + settings.replace(":", ",")


def _values(text: str, arm: str) -> dict[str, Any]:
    words = []
    for pair in filter(str.strip, _cut(text, ";")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key or not value:
            raise UserError(f"arm '{arm}': '{pair.strip()}' is not key=value; write e.g. @optim.weight_decay=0")
        words.append(f"--{key}={value}")
    over = configs.overrides(words)
    try:
        refuse_set_by_study(over)
        for name in _names(over):
            if name == "model.methods":
                raise UserError("methods are written before the @")
            if name.startswith("data"):
                raise UserError(f"'{name}' cannot differ between arms: all train on the same text")
    except UserError as error:
        raise UserError(f"arm '{arm}': {error}") from None
    return over


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _cut(text: str, separator: str) -> list[str]:
    """Cut at a separator outside brackets and quotes; where those do not match, at every one."""
    parts, start, pattern = [], 0, _SEPARATORS[separator]
    while start < len(text):
        found = pattern.match(text, start)
        if found is None:
            return text.split(separator)
        parts.append(found[1])
        start = found.end()
    return parts
