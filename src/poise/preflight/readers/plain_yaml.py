"""The part of YAML that configurations of runs are written in: mappings by indentation, plain values, lists of them.

YAML itself needs a package that poise does not depend on. What is beyond this part (tags, blocks of text,
lists of mappings, anchors at more than a plain value) is not read, and its keys are named in the result.
Numbers are read as a person means them: ``1e-5`` is a number here, though YAML 1.1 has it as text.
"""

from __future__ import annotations

import re
from typing import Any

from poise.core.errors import UserError

Plain = str | int | float | bool | None
Value = Plain | list[Plain]

MAX_DEPTH = 20

_KEY = re.compile(r"""(?P<key>"[^"]*"|'[^']*'|[^\s#:'"\[\]{},&*!|>%@`-][^:#]*|-[^\s:#][^:#]*):(?:\s+(?P<rest>.*))?$""")
_ANCHOR = re.compile(r"&([^\s,\[\]{}]+)\s+(\S.*)$")
_BEYOND = ("&", "*", "!", "|", ">", "{", "?")
_WORDS: dict[str, Plain] = {"": None, "null": None, "~": None, "true": True, "false": False}


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return (nested mapping, dotted keys that were not read).

    >>> parse_yaml("lr: 1e-5\\nmodel:\\n  layers: 2  # few\\n  betas: [0.9, 0.95]", "a.yaml")[0]
    {'lr': 1e-05, 'model': {'layers': 2, 'betas': [0.9, 0.95]}}

    Raises:
        UserError: a line that is no YAML of any kind that is written in configurations, or a key given two values.
    """
    data: dict[str, Any] = {}
    unread: list[str] = []
    stack: list[tuple[int, dict[str, Any], str]] = [(-1, data, "")]  # indentation, mapping, its dotted name
    pending: tuple[int, dict[str, Any], str, str] | None = None  # a key whose value comes on the next lines
    named: dict[str, str] = {}  # anchor -> the plain value that it stands for
    lines: dict[tuple[int, str], tuple[int, str]] = {}  # mapping and key -> where it was written, and what
    skipped = -1  # lines that stand further right than this belong to what is not read
    for number, line in enumerate(text.splitlines(), 1):
        body = _without_comment(line)
        if not body.strip() or body.startswith(("---", "...", "%")):
            continue
        indent, body = len(body) - len(body.lstrip(" ")), body.strip(" ")
        if skipped >= 0 and (indent > skipped or (indent == skipped and body.startswith("- "))):
            continue
        skipped = -1
        if body.startswith("\t"):
            raise UserError(f"'{where}' line {number} begins with a tab, which YAML does not allow; use blanks")
        if pending and (body == "-" or body.startswith("- ")) and indent >= pending[0]:
            skipped = _item(body[1:].strip(), pending, unread)
            continue
        found = _KEY.match(body)
        if not found:
            raise UserError(f"'{where}' line {number} is {body[:60]!r}, which is no 'key: value'; mend that line")
        if pending and indent > pending[0]:
            owner, key, name = pending[1], pending[2], pending[3]
            owner[key] = {}
            stack.append((indent, owner[key], name))
        pending = None
        while len(stack) > 1 and indent < stack[-1][0]:
            stack.pop()
        if len(stack) > MAX_DEPTH:
            raise UserError(f"'{where}' line {number} is nested deeper than {MAX_DEPTH} levels; use a flatter file")
        _, owner, prefix = stack[-1]
        key, rest = found["key"].strip().strip("\"'"), (found["rest"] or "").strip()
        name = f"{prefix}.{key}" if prefix else key
        before = lines.setdefault((id(owner), key), (number, rest))
        if before != (number, rest) and (before[1] != rest or not rest):
            raise UserError(
                f"'{where}' says {name} twice: line {before[0]} has '{key}: {before[1][:60]}' and line {number} "
                f"'{key}: {rest[:60]}'; leave one of them out"
            )
        rest = _resolved(rest, named)
        if rest.startswith(_BEYOND) and rest != "{}":
            unread.append(name)
            skipped = indent
        elif rest:
            owner[key] = _value(rest)
        else:
            owner[key] = None
            pending = indent, owner, key, name
    return data, tuple(unread)


def _resolved(rest: str, named: dict[str, str]) -> str:
    """Return the plain value behind ``&name value`` and ``*name``; anything else as it is."""
    if found := _ANCHOR.match(rest):
        if not found[2].startswith(_BEYOND):
            named[found[1]] = found[2]
            return found[2]
        named.pop(found[1], None)
    return named.get(rest[1:], rest) if rest.startswith("*") else rest


def _item(body: str, pending: tuple[int, dict[str, Any], str, str], unread: list[str]) -> int:
    """Take in one entry of a list; return the indentation of a list that is not read, else -1."""
    indent, owner, key, name = pending
    if _KEY.match(body) or body.startswith(_BEYOND) or body.startswith("- "):
        owner[key] = None
        unread.append(name)
        return indent
    if owner[key] is None:
        owner[key] = []
    owner[key].append(_plain(body))
    return -1


def _value(text: str) -> Value:
    if text.startswith("[") and text.endswith("]"):
        return [_plain(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    return None if text == "{}" else _plain(text)


def _plain(text: str) -> Plain:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _without_comment(line: str) -> str:
    """Cut off a comment: ``#`` at the start or after a blank, outside of quotes."""
    quote = ""
    for i, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and (i == 0 or line[i - 1] in " [,:-"):
            quote = char
        elif char == "#" and (i == 0 or line[i - 1] in " \t"):
            return line[:i].rstrip()
    return line.rstrip()
