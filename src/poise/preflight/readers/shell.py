"""The arguments of a program as a shell script gives them: variables, arrays, arithmetic and simple conditions.

Nothing is run. What only a running shell can know (positional parameters, the environment, output of commands) stays
as it is written, with its ``$``, and so does a variable to which branches give different values.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

MAX_VALUE: Final = 200_000
"""Characters of a variable's value; a script that doubles a string on and on stops here."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_BRACED = re.compile(r"([A-Za-z_]\w*|[0-9@*#])(?:\[[@*]\])?(?:(:?[-=])(.*))?", re.DOTALL)
_SUM = re.compile(r"[0-9\s+*/%()-]{1,200}")
_SLURM_NODES = re.compile(r"^#SBATCH\s+(?:--nodes[=\s]|-N\s*)(\d{1,6})\s*(?:#.*)?$", re.MULTILINE)
_PREFIXES = frozenset({"export", "local", "readonly", "declare", "typeset"})
_BREAKS = frozenset("\n;&|(){}")
_ENDS = _BREAKS | frozenset(" \t\r\\'\"`$")
_LEADERS = frozenset({"then", "do", "else", "{", "!", "time"})

_MATH: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: Mapping[str, Callable[[str, str], bool]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "-eq": lambda a, b: int(a) == int(b),
    "-ne": lambda a, b: int(a) != int(b),
    "-gt": lambda a, b: int(a) > int(b),
    "-ge": lambda a, b: int(a) >= int(b),
    "-lt": lambda a, b: int(a) < int(b),
    "-le": lambda a, b: int(a) <= int(b),
}


@dataclass(slots=True)
class _Word:
    """A word of a statement: its pieces, each with what quotes stood around it."""

    pieces: list[tuple[str, str]] = field(default_factory=list)  # ("", "'" or '"', text)
    array: list[_Word] | None = None

    @property
    def plain(self) -> str:
        return "".join(text for _, text in self.pieces)


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every command, and of every value of a variable, of a script.

    >>> command_lines('D=64\\nA=(--lr 1e-3 # note\\n  --hidden-size $((D * 2)))\\nrun "${A[@]}"')[0]
    ['run', '--lr', '1e-3', '--hidden-size', '128']
    """
    return script(text)[0]


def script(text: str) -> tuple[list[list[str]], dict[str, str]]:
    """Return the words of every command and value, as ``command_lines`` does, and the values by variable."""
    shell = _Shell()
    if nodes := _SLURM_NODES.search(text):
        shell.variables |= dict.fromkeys(("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), nodes[1])
    lines = list(shell.run(text))
    return [*lines, *(_parted(value) for value in shell.variables.values())], dict(shell.variables)


class _Shell:
    def __init__(self) -> None:
        self.variables: dict[str, str] = {}
        self._branches: list[bool | None] = []  # of each open if, for, ...: taken, not taken, nobody knows
        self._decided: list[bool] = []  # whether a branch of it was taken before
        self._doubtful: set[str] = set()  # variables with a value that was given in a branch nobody knows of

    def run(self, text: str) -> Iterator[list[str]]:
        for statement in _statements(text):
            words = self._flow(statement)
            if not words or False in self._branches:
                continue
            if self._assigned(words):
                continue
            expanded = [part for word in words for part in self._split(word)]
            if expanded:
                yield expanded

    def _flow(self, words: list[_Word]) -> list[_Word]:
        """Follow if, for and case; return what is left to be done."""
        while words:
            first = words[0].plain if not words[0].array else ""
            if first == "if":
                self._open(self._test(words[1:]))
                return []
            if first == "elif" and self._branches:
                verdict = False if self._decided[-1] else self._test(words[1:])
                self._branches[-1], self._decided[-1] = verdict, self._decided[-1] or verdict is True
                return []
            if first in ("for", "while", "until", "case", "select", "function"):
                if first == "function":
                    return []
                self._open(None)
                return []
            if first in ("fi", "done", "esac"):
                if self._branches:
                    self._branches.pop()
                    self._decided.pop()
                return []
            if first == "else" and self._branches:
                was = self._branches[-1]
                self._branches[-1] = False if self._decided[-1] else (True if was is False else None)
            if first not in _LEADERS:
                return words
            words = words[1:]
        return words

    def _open(self, verdict: bool | None) -> None:
        self._branches.append(verdict)
        self._decided.append(verdict is True)

    def _test(self, words: list[_Word]) -> bool | None:
        """Return whether ``[ A = B ]`` and its like hold; ``None`` where nobody knows."""
        texts = [self._expand(word) for word in words]
        if len(texts) < 3 or texts[0] not in ("[", "[["):
            return None
        inner = texts[1:-1]
        if any("$" in text or "`" in text for text in inner):
            return None
        if len(inner) == 2 and inner[0] in ("-z", "-n"):
            return (inner[1] == "") == (inner[0] == "-z")
        if len(inner) == 3 and inner[1] in _COMPARE:
            try:
                return _COMPARE[inner[1]](inner[0], inner[2])
            except ValueError:
                return None
        return None

    def _assigned(self, words: list[_Word]) -> bool:
        """Take in ``NAME=value`` words; return whether the statement has no others."""
        rest = words[1:] if words[0].plain in _PREFIXES else words
        for word in rest:
            found = _ASSIGNMENT.match(word.plain)
            if not found or not word.pieces or word.pieces[0][0]:
                return rest is not words  # "export NAME" sets nothing, and is no command of interest
            name, more = found.groups()
            if word.array is not None:
                value = " ".join(part for item in word.array for part in self._split(item))
            else:
                value = self._expand(word)[found.end() :]
            if more:
                value = (
                    f"{self.variables.get(name, '')} {value}"
                    if word.array is not None
                    else (self.variables.get(name, "") + value)
                )
            self._set(name, value, bool(more))
        return True

    def _set(self, name: str, value: str, more: bool) -> None:
        unsure = None in self._branches
        old = self.variables.get(name)
        differs = old is not None and old != value and not more
        if len(value) > MAX_VALUE or (unsure and differs and (name in self._doubtful or "$" not in (old or ""))):
            value = f"${name}"
        self.variables[name] = value
        if unsure:
            self._doubtful.add(name)

    def _split(self, word: _Word) -> list[str]:
        """Return the words that a word becomes; what holds a whole command line is taken apart as well."""
        text = self._expand(word)
        quoted = any(quote for quote, _ in word.pieces)
        words = _parted(text)
        return [text] if quoted and text and not any(part.startswith("--") for part in words[1:]) else words

    def _expand(self, word: _Word) -> str:
        return "".join(text if quote == "'" else self._values(text) for quote, text in word.pieces)[: 2 * MAX_VALUE]

    def _values(self, text: str) -> str:
        """Put in the values of variables and of arithmetic."""
        out: list[str] = []
        at = 0
        while (dollar := text.find("$", at)) >= 0:
            out.append(text[at:dollar])
            if text.startswith("$((", dollar) and (end := text.find("))", dollar)) > 0:
                out.append(self._arithmetic(text[dollar + 3 : end], text[dollar : end + 2]))
                at = end + 2
            elif text.startswith("$(", dollar):
                at = _closing(text, dollar + 1, "(", ")")
                out.append(text[dollar:at])
            elif text.startswith("${", dollar):
                at = _closing(text, dollar + 1, "{", "}")
                out.append(self._braced(text[dollar + 2 : at - 1], text[dollar:at]))
            elif found := _NAME.match(text, dollar + 1):
                out.append(self.variables.get(found[0], f"${found[0]}"))
                at = found.end()
            else:
                out.append("$")
                at = dollar + 1
        return "".join([*out, text[at:]])

    def _braced(self, inner: str, whole: str) -> str:
        found = _BRACED.fullmatch(inner)
        if not found:
            return whole
        name, operation, otherwise = found.groups()
        if name in self.variables and (self.variables[name] or not (operation or "").startswith(":")):
            return self.variables[name]
        if not operation:
            return whole
        return self._values(otherwise.strip("\"'")) if len(otherwise) < 1000 else whole

    def _arithmetic(self, inner: str, whole: str) -> str:
        text = _NAME.sub(lambda m: self.variables.get(m[0], m[0]), self._values(inner).replace("$", ""))
        if not _SUM.fullmatch(text):
            return whole
        try:
            return str(_computed(ast.parse(text.strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return whole


def _computed(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _MATH:
        value = _MATH[type(node.op)](_computed(node.left), _computed(node.right))
        if abs(value) < 1 << 64:
            return value
    raise ValueError("no arithmetic of whole numbers")


def _closing(text: str, start: int, opening: str, closing: str, quotes: bool = True) -> int:
    """Return the position behind the bracket that closes the one at ``start``; quoted ones do not count."""
    depth, quote = 0, ""
    for i in range(start, len(text)):
        char = text[i]
        if quote or (quotes and char in "\"'" and text[i - 1] != "\\"):
            quote = "" if char == quote else quote or char
            continue
        depth += (char == opening) - (char == closing)
        if depth == 0:
            return i + 1
    return _closing(text, start, opening, closing, False) if quotes else len(text)  # an apostrophe is no quote


def _parted(text: str) -> list[str]:
    """Cut text into words; what a command would write, ``$(cat x)``, is one word, as it may be any."""
    words: list[str] = []
    word, at = "", 0
    while at < len(text):
        end = at + 1
        if text.startswith("$(", at):
            end = _closing(text, at + 1, "(", ")")
        elif text[at].isspace():
            words.append(word)
            word, at = "", end
            continue
        else:
            while end < len(text) and text[end] != "$" and not text[end].isspace():
                end += 1
        word, at = word + text[at:end], end
    return [one for one in (*words, word) if one]


def _statements(text: str) -> Iterator[list[_Word]]:
    """Cut a script into statements and words; quotes are taken off, values are not yet put in."""
    return _Lexer(text).statements()


class _Lexer:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._words: list[_Word] = []
        self._word: _Word | None = None
        self._outer: tuple[list[_Word], _Word] | None = None  # of an array: the statement and word it belongs to

    def statements(self) -> Iterator[list[_Word]]:
        while self._at < len(self._text):
            if self._piece() or self._bracket():
                continue
            char = self._text[self._at]
            self._word = None
            self._at += 1
            if char in _BREAKS and self._outer is None:
                if self._words:
                    yield self._words
                self._words = []
        if self._outer is not None:
            self._outer[1].array, self._words = self._words, self._outer[0]
        if self._words:
            yield self._words

    def _piece(self) -> bool:
        """Take in a comment or a piece of a word, if one stands here."""
        text, at = self._text, self._at
        char = text[at]
        if text.startswith(("\\\n", "\\\r\n"), at):
            self._at += 2 if text[at + 1] == "\n" else 3
        elif char == "\\":
            self._add("'", text[at + 1 : at + 2], at + 2)
        elif char in "'`":
            close = text.find(char, at + 1)
            close = len(text) if close < 0 else close
            inner = text[at + 1 : close]
            self._add("'" if char == "'" else "", inner if char == "'" else _as_command(inner), close + 1)
        elif char == '"':
            self._add('"', *_double_quoted(text, at + 1))
        elif text.startswith(("$(", "${"), at):
            close = _closing(text, at + 1, text[at + 1], ")" if text[at + 1] == "(" else "}")
            self._add("", text[at:close], close)
        elif char == "#" and self._word is None:
            close = text.find("\n", at)
            self._at = len(text) if close < 0 else close
        elif char not in _BREAKS and char not in " \t\r":
            end = at + 1
            while end < len(text) and text[end] not in _ENDS:
                end += 1
            self._add("", text[at:end], end)
        else:
            return False
        return True

    def _bracket(self) -> bool:
        """Begin or end an array, if that is what the bracket here does."""
        char = self._text[self._at]
        if char == "(" and self._outer is None and self._word and _ASSIGNMENT.fullmatch(self._word.plain):
            self._outer = self._words, self._word
            self._words = []
        elif char == ")" and self._outer is not None:
            self._outer[1].array, self._words = self._words, self._outer[0]
            self._outer = None
        else:
            return False
        self._word = None
        self._at += 1
        return True

    def _add(self, quote: str, piece: str, at: int) -> None:
        """Add a piece to the word, or begin a word with it, and go on at ``at``."""
        if self._word is None:
            self._word = _Word()
            self._words.append(self._word)
        self._word.pieces.append((quote, piece))
        self._at = at


def _as_command(text: str) -> str:
    """Return the inside of backticks in the other form, which is left as it is."""
    return "$(" + text.replace("(", "").replace(")", "") + ")"


def _double_quoted(text: str, at: int) -> tuple[str, int]:
    """Return what stands in double quotes that began before ``at``, and where it goes on."""
    out: list[str] = []
    end = len(text)
    while at < end and text[at] != '"':
        if text[at] == "\\" and at + 1 < end:
            following = text[at + 1]
            out.append("" if following == "\n" else following if following in '"\\`' else text[at : at + 2])
            at += 2
        elif text[at] == "`":
            close = text.find("`", at + 1)
            close = end if close < 0 else close
            out.append(_as_command(text[at + 1 : close]))
            at = close + 1
        elif text.startswith("$(", at):
            close = _closing(text, at + 1, "(", ")")
            out.append(text[at:close])
            at = close
        else:
            start = at
            while at < end and text[at] not in '"\\`$':
                at += 1
            if at == start:
                at += 1
            out.append(text[start:at])
    return "".join(out), at + 1
