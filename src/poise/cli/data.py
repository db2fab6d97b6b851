"""``poise data``: prepare text, look into what was prepared, change its format."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from poise.cli.args import Parser
from poise.core.errors import UserError, nearest

ACTIONS = {
    "prepare": ("poise.cli.data_prepare", "SOURCE... --out DIR", "turn text into tokens on disk"),
    "inspect": ("poise.cli.data_inspect", "DIR", "counts, samples, search, histograms; drop documents"),
    "export": ("poise.cli.data_exchange", "DIR --to FORMAT --out DIR", "write megatron, datatrove, olmo or hf"),
    "import": ("poise.cli.data_exchange", "SOURCE --from FORMAT --out DIR", "read the tokens of others"),
    "verify": ("poise.cli.data_inspect", "DIR", "check the hash of every file"),
}
"""Action -> (module with a function of its name, its arguments, what it does)."""

WIDEST = 48
"""Characters of a cell in a table of records."""

_OPTIONS = (
    ("--data.dir PATH or set POISE_CACHE", "--out DIR"),
    ("--data.dir PATH", "--out DIR"),
    ("--data.source PATH", "a folder as SOURCE"),
    ("--data.vocab_size", "--vocab-size"),
    ("--data.text_field", "--text-field"),
)
"""What the recipe's keys, which the data room names in its advice, are called here."""


def main(words: Sequence[str]) -> int:
    """Dispatch to an action."""
    if not words or words[0] in ("-h", "--help"):
        width = max(len(f"{name} {usage}") for name, (_, usage, _) in ACTIONS.items())
        print("usage:")
        for name, (_, usage, about) in ACTIONS.items():
            print(f"  poise data {f'{name} {usage}':<{width}}  {about}")
        print("\nexample:\n  poise data prepare my-notes/ --out notes-tokens --vocab-size 8192")
        return 0
    if words[0] not in ACTIONS:
        raise UserError(f"unknown action 'data {words[0]}'{nearest(words[0], ACTIONS)}; use {', '.join(ACTIONS)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text, and not every terminal knows UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    module = importlib.import_module(ACTIONS[words[0]][0])
    try:
        code: int = getattr(module, f"{words[0]}_")(words[1:])
    except UserError as error:
        raise UserError(_in_own_words(str(error))) from None
    return code


def parsed(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Return the options; for an unknown one name the nearest.

    Raises:
        UserError: an unknown option, or a bad value.
    """
    parser.description = textwrap.fill(parser.description or "", 100)
    arguments, unknown = parser.parse_known_args(list(words))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        hint = nearest(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
        raise UserError(f"unknown argument '{unknown[0]}'{hint}; see {parser.prog} --help")
    return arguments


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Return a type of argument: one of some words."""
    known = tuple(names)

    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"'{word}' is none of {', '.join(known)}{nearest(word, known)}")
        return word

    return check


def count(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a type of argument: a whole number from ``least`` to ``most``."""

    def check(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"'{word}' is no whole number from {least} to {most:,}")
        return number

    return check


def reading(manifest: Mapping[str, Any]) -> dict[str, object]:
    """Return what was changed or found wrong in reading the sources: nothing of it may stay unseen."""
    names = ("damaged", "converted", "removed", "repaired", "duplicate_ids")
    return {name: manifest[name] for name in names if manifest.get(name)}


def plain(text: str) -> str:
    """Return a name in one line, whatever is in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(figures: dict[str, object], *, as_json: bool) -> None:
    """Print figures: as JSON, or one a line, and lists of records as tables below."""
    if as_json:
        print(json.dumps(figures, indent=2, default=str))
        return
    whole = _flat(figures)
    records: dict[str, Any] = {name: value for name, value in whole.items() if _is_records(value)}
    flat = {plain(name): value for name, value in whole.items() if name not in records}
    width = max(map(len, flat), default=0)
    for name, value in flat.items():
        print(f"{name.replace('_', ' '):<{width}}  {_shown(value, width + 2)}".rstrip())
    for name, rows in records.items():
        print("\n".join(["", plain(name.replace("_", " ")), *(f"  {line}" for line in _of_records(rows))]))


def table(rows: Sequence[Sequence[object]]) -> Iterable[str]:
    """Return rows as aligned lines; numbers to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, raw in zip(cells, rows, strict=True):
        parts = [
            f"{cell:>{width}}" if isinstance(value, int | float) else f"{cell:<{width}}"
            for cell, width, value in zip(row, widths, raw, strict=True)
        ]
        yield "  ".join(parts).rstrip()


def _is_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and each for each in value)


def _of_records(records: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield records as an aligned table under the names of their fields; numbers to the right."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = []
    for name in names:
        values = [record.get(name) for record in records]
        right = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        # Blanks at the ends of a text, and marks that would end the line, are seen only within quotes.
        quoted = any(isinstance(value, str) and (value != value.strip() or value != plain(value)) for value in values)
        cells = [plain(name.replace("_", " ")), *(_cell(value, quoted) for value in values)]
        width = max(map(len, cells))
        columns.append([f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell in cells])
    for row in zip(*columns, strict=True):
        yield "  ".join(row).rstrip()


def _cell(value: object, quoted: bool) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        text = " ".join(map(str, value))
    else:
        text = f"{value:,}" if isinstance(value, int) else repr(value) if quoted else plain(str(value))
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _shown(value: object, indent: int) -> str:
    """Return a value as text; what a list holds, one a line."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_shown(inner, indent)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return f"\n{' ' * indent}".join(_shown(inner, indent) for inner in value)
    return plain(str(value))


def _in_own_words(message: str) -> str:
    for key, option in _OPTIONS:
        message = message.replace(key, option)
    return message


def _flat(figures: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested figures as one table: ``splits.train.tokens``."""
    out: dict[str, object] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
