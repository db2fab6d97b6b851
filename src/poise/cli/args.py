"""Words of the command line: a command's own few options, and recipe values as ``--section.key value``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from poise.core.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line and exit code 2, as for every other mistake."""

    def __init__(self, command: str, description: str, example: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"poise {command}",
            description=description,
            epilog=f"example:\n  {example}" + (f"\n\n{epilog}" if epilog else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(parser: Parser, words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Split ``words`` into the command's options and a nested dict of recipe values.

    A word counts as a recipe value when it is ``--section.key`` or the name of a top-level recipe key.
    """
    from poise.core import config
    from poise.train.recipe import Recipe

    leaves = [name for name, _, _ in config.flatten_fields(Recipe)]
    own, recipe = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key = word[2:].partition("=")[0] if word.startswith("--") else ""
        if "." not in key and key not in leaves:
            own.append(word)
            continue
        recipe.append(word)
        if "=" not in word and rest:
            recipe.append(rest.pop(0))
    values = config.overrides(recipe)
    arguments, unknown = parser.parse_known_args(own)
    if unknown:
        options = [o for action in parser._actions for o in action.option_strings] + [f"--{n}" for n in leaves]
        hint = nearest(unknown[0].lstrip("-"), [option.lstrip("-") for option in options]).replace("mean '", "mean '--")
        raise UserError(f"unknown argument '{unknown[0]}'{hint}; see {parser.prog} --help")
    return arguments, values


def recipe_help() -> str:
    """Return the recipe's keys with types and defaults, one a line."""
    from poise.core import config
    from poise.train.recipe import Recipe

    lines = ["recipe values (in the TOML file, or here as --section.key value):"]
    for name, kind, _ in config.flatten_fields(Recipe):
        section, _, leaf = name.rpartition(".")
        default: Any = Recipe()
        for part in [*section.split("."), leaf] if section else [leaf]:
            default = getattr(default, part)
        shown = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else _kind(kind)
        lines.append(f"  --{name:<30} {shown} (default {_shown(default)})")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return repr(value) if value == "" else str(value)


def _kind(kind: Any) -> str:
    import typing

    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return str(kind).replace("typing.", "").replace("NoneType", "none")
