"""Free text taken apart: the names and numbers of a line, and what they mean; part of the reader ``stdout``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from poise.postmortem.readers.names import GRAD_NORM, LOSS, LR, STEP, TOKENS, VAL_LOSS, rank, words
from poise.postmortem.readers.shapes import STEP_AT, TOTAL_AT, Place
from poise.postmortem.readers.source import Row, Source

LONGEST = 4000
"""Characters of a line that is looked into; steps are told in less."""

BAR = "bar"
EPOCH = "epoch"

# Linear: every quantifier is bounded or possessive, and a name is tried only where a word begins.
NUMBER = (
    r"[+-]?(?>(?:\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d*)?|\d++\.?\d*|\.\d++)(?:[eE][+-]?\d{1,4})?"
    r"|(?i:nan|inf(?:inity)?)(?![A-Za-z0-9_]))"
)
_WORD = r"[A-Za-z_][\w/.\-]{0,60}"
_NEXT = r" (?!(?i:nan|inf|infinity)(?![\w/])|(?:tensor|Array|np\.float\d\d)\()" + _WORD
PAIR = re.compile(
    rf"(?<![\w/.\-])((?>{_WORD}(?:{_NEXT}){{0,3}}))(?:\s?\([\w%/ ]{{1,12}}\))?"  # the name, and a unit
    r"([\"']?\s{0,8}(?:[:=]|\.{2,80})?\s{0,12}[\"'\[(]{0,2}\s{0,8})(?:(?:tensor|Array|np\.float\d\d)\()?"
    rf"({NUMBER})(?:\s?/\s?(\d[\d,]{{0,15}}(?<!,)|\?+))?(?:([KkMBTPE])(?![\w/]))?(?!\d|[-./,:]\d|x[0-9a-f]|%\||it/)"
)
_BAR = re.compile(r"(?:[|:\[(]|^)\s{0,20}(\d{1,15})\s{0,2}/\s{0,12}(\d{1,15}|\?+)(?=[\s\])])")
_IN_BRACKETS = re.compile(r"\[(\d{1,6}), {0,6}(\d{1,12})\]:? {1,4}(?=[A-Za-z])")
"""Epoch and batch, as PyTorch's tutorial prints them."""

_RATE_BAR = re.compile(r"(?<![\d.])(\d{1,9}(?:\.\d{1,3})?)(k?)it/(\d[\d.]{0,15}k?|[?-])")
_SETS = r"(?:val|valid|validation|eval|evaluation|evaluating|dev|test|held[-_ ]?out)"
_HELD_OUT = re.compile(rf"(?<![a-z_/]){_SETS}(?![a-z_/])", re.I)
_MARK = re.compile(rf"[(\[<]\s{{0,2}}{_SETS}(?: set| loss)?\s{{0,2}}[)\]>]", re.I)
_ANNOUNCED = re.compile(
    r"(?<![a-z_/])(?:evaluat(?:ing|ion)|validat(?:ing|ion)|eval|valid|val|held[-_ ]?out)(?![a-z_/])", re.I
)

_SCALE = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_LEVELS = frozenset({"info", "debug", "warning", "root", "main", "completed", "current", "running", "at", "on", "for"})
_STEPS = frozenset({"step", "steps", "iteration", "iterations", "iter", "it", "update"})
_NOISE = re.compile(r"\.py$|^cuda$|^(?:rank|pid|port|line)$", re.I)
_NO_STEP = frozenset(
    {"eval", "val", "valid", "validation", "test", "warmup", "total", "max", "per", "save", "log", "each", "every"}
    | {"of", "num", "decay", "accumulation", "micro", "time"}
)
_ALSO = {
    "loss_train_total": LOSS,
    "languagecrossentropy": LOSS,
    "crossentropyloss": LOSS,
    "tr_loss": LOSS,
    "xent": LOSS,
    "nll": LOSS,
    "norm": GRAD_NORM,
    "languagecrossentropy_eval": VAL_LOSS,
    "epoch": EPOCH,
    "epochs": EPOCH,
    "ep": EPOCH,
}
_FOLDERS = frozenset({"train", "training", "metrics", "eval"})


class Pair(NamedTuple):
    """A name with its number. ``total`` is what stands behind a slash, NaN for none; ``sep`` what parts the two."""

    name: str
    value: float
    total: float
    sep: str


def pairs(line: str) -> list[Pair]:
    """Return the names and numbers of a line.

    >>> [(p.name, p.value, p.total) for p in pairs("completed step: 10/200, grad norm 1,234.5 | lr=nan 3.2.1")]
    [('completed step', 10.0, 200.0), ('grad norm', 1234.5, nan), ('lr', nan, nan)]
    """
    found = []
    for name, sep, number, total, unit in PAIR.findall(line):
        if name[-1:].isdigit() and not sep.strip() and not sep:
            continue  # the tail of a word, not a number of its own
        value = float(number.replace(",", "")) * _SCALE[unit]
        of = float(total.replace(",", "")) if total[:1].isdigit() else float("nan")
        found.append(Pair(name, value, of, sep.strip(" \t\"'([")))
    return found


def places(line: str, step: str, names: Collection[str], meaning: Meanings) -> list[Place]:
    """Return where a line's step and the wanted columns stand; an empty list where one of them has a unit or such."""
    found: dict[str, Place] = {}
    for match in PAIR.finditer(line):
        name, sep, number, total, unit = match.groups()
        if name[-1:].isdigit() and not sep:
            continue
        kind, column = meaning(name)
        wanted = STEP_AT if kind == STEP and column == step else column
        if wanted in found or (wanted != STEP_AT and (column not in names or kind in (STEP, EPOCH))):
            continue
        if unit or "," in number or (total or "").startswith("?"):
            return []
        found[wanted] = Place(wanted, *match.span(3))
        if total and wanted == STEP_AT:
            found[TOTAL_AT] = Place(TOTAL_AT, *match.span(4))
    if step == BAR and (counted := _BAR.search(line)) and counted[2].isdigit():
        found[STEP_AT] = Place(STEP_AT, *counted.span(1))
        found[TOTAL_AT] = Place(TOTAL_AT, *counted.span(2))
    return list(found.values()) if set(names) | {STEP_AT} <= found.keys() else []


def bar(line: str) -> Pair | None:
    """Return what a progress bar has counted.

    >>> bar("train:  5%|#   | 10/200 [00:01<00:19, 9.5it/s, loss=2.5]")[1:3]
    (10.0, 200.0)
    """
    if "/" not in line:
        return None
    if match := _BAR.search(line):
        done, total = match.groups()
        return Pair(BAR, float(done), float(total) if total.isdigit() else float("nan"), "")
    if "it/" in line and (match := _RATE_BAR.search(line)):
        done, kilo, total = match.groups()
        end = total.rstrip("k")
        every = float(end) * (1e3 if total.endswith("k") else 1.0) if end.count(".") < 2 and end[0].isdigit() else 0.0
        value = float(done) * (1e3 if kilo else 1.0)
        return Pair(BAR, float(round(value)), every or float("nan"), "") if kilo or value == value // 1 else None
    return None


def announces(line: str) -> bool:
    """Return whether a line without numbers of its own says that an evaluation begins."""
    return len(line) < 200 and _ANNOUNCED.search(line) is not None


_COMMA = re.compile(r"(?<![\d,.])(\d{1,15}),(\d{1,15})(?![\d,.])")
_LOSS_NUMBER = re.compile(r"loss[\"']?\s{0,4}[:=]?\s{0,4}([-+]?\d[\d.,]{0,20})", re.I)
_COUNTED = re.compile(r"(?:step|iter(?:ation)?|tokens|samples)s?\W{0,4}$", re.I)


def decimal_commas(lines: Iterable[str]) -> bool:
    """Return whether the losses are written with a comma for the point: three of them, and none otherwise.

    >>> decimal_commas(["loss 13,116", "loss 9,5", "loss 8,25"]), decimal_commas(["loss 1,234.5", "loss 9,123.0"] * 2)
    (True, False)
    """
    found = [number.rstrip(".,") for line in lines if "loss" in line.lower() for number in _LOSS_NUMBER.findall(line)]
    return len(found) >= 3 and all(re.fullmatch(r"[-+]?\d{1,6},\d+", number) for number in found)


def with_points(line: str) -> str:
    """Return the line with points for decimal commas; what counts steps keeps its thousands."""
    return _COMMA.sub(
        lambda m: m[0] if _COUNTED.search(line[max(0, m.start() - 20) : m.start()]) else f"{m[1]}.{m[2]}", line
    )


_CUT = re.compile(r"[^\s=:|;(\[]*$")


def without_last(line: str) -> str:
    """Return a line without the number that ends it, which may have been cut off.

    >>> without_last("step 60 loss 3.43 lr 3.0e-"), without_last("step=60, loss=3.4 |")
    ('step 60 loss 3.43 lr ', 'step=60, loss=3.4 |')
    """
    tail = _CUT.search(line)
    assert tail is not None
    return (
        line[: tail.start()] if any(mark.isdigit() for mark in tail[0]) or tail[0] in ("n", "na", "i", "in") else line
    )


def whole(line: str, source: Source) -> str:
    """Return the present line of a file without a number that is cut off."""
    if not source.unfinished:
        return line
    kept = without_last(line)
    if kept != line:
        source.notes.add("the last line has no end: its last number may be cut off and is left out", source.where)
    return kept


def own_name(name: str) -> str:
    """Return the name without the log level and such before it."""
    first, _, rest = name.partition(" ")
    while rest and first.lower() in _LEVELS:
        name = rest
        first, _, rest = name.partition(" ")
    return name


class Meanings:
    """What names stand for, remembered: (kind, column), where kind is ``step``, ``loss``, ..., ``epoch`` or empty."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}

    def __call__(self, name: str) -> tuple[str, str]:
        known = self._known.get(name)
        if known is None:
            if len(self._known) > 5000:
                self._known.clear()
            known = self._known[name] = _meaning(name)
        return known


def _meaning(name: str) -> tuple[str, str]:
    column = own_name(name)
    own = words(column)
    for kind in (LOSS, VAL_LOSS, GRAD_NORM, LR, TOKENS):
        if rank(kind, column) is not None:
            return kind, column
    rest = list(own)
    while len(rest) > 1 and rest[0] in _FOLDERS:
        del rest[0]
    if (also := _ALSO.get("_".join(rest))) is not None:
        also = VAL_LOSS if also == LOSS and "eval" in own else also
        return also, also
    for place in ("after", "at"):  # "eval metrics after step"
        own = own[own.index(place) + 1 :] or own if place in own else own
    if own[:1] in (["valid"], ["val"], ["eval"]) and own[1:] in (["num", "updates"], ["global", "step"]):
        return STEP, "_".join(own[1:])
    plain = "_".join(own)
    if rank(STEP, column) is not None:
        return STEP, plain
    if own and own[-1] in _STEPS and not _NO_STEP & set(own):
        return STEP, own[-1]
    return ("nothing", "") if _NOISE.search(column) else ("", column)


@dataclass(slots=True)
class Line:
    """What a line holds, by meaning; the first of each."""

    steps: dict[str, Pair] = field(default_factory=dict)
    row: Row = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)  # column -> what parts name and number
    others: int = 0  # gradient norm, learning rate, tokens, validation loss
    epoch: Pair | None = None
    held_out: bool = False


def take_apart(line: str, meaning: Meanings) -> Line:
    """Return a line's numbers by what they mean."""
    out, before, tested = Line(), "", False
    if len(line) > LONGEST or "Namespace(" in line:
        return out
    for pair in pairs(line):
        kind, column = meaning(pair.name)
        if kind == STEP:
            if pair.value == pair.value // 1:
                out.steps.setdefault(column, pair)
        elif kind == EPOCH:
            out.epoch = out.epoch or pair
        elif column not in out.row and kind != "nothing":
            out.row[column] = pair.value
            if kind == LOSS:
                out.losses[column] = pair.sep
                before = before or line.partition(pair.name)[0]
            elif kind:
                out.others += 1
                tested |= kind == VAL_LOSS
    if line.startswith("[") and (found := _IN_BRACKETS.match(line)):
        out.epoch = out.epoch or Pair(EPOCH, float(found[1]), float("nan"), "")
        out.steps.setdefault("batch", Pair("batch", float(found[2]), float("nan"), ""))
    counted = bar(line)
    if counted is not None and out.epoch is not None and counted[1:3] == out.epoch[1:3]:
        counted = None  # "Epoch [1/5], Step [100/600]"
    if counted is not None:
        out.steps.setdefault(BAR, counted)
    if (out.losses and not tested) or BAR in out.steps:
        told = any("train" in column.lower() for column in out.losses)
        tested = _HELD_OUT.search(before if out.losses else line) is not None or _MARK.search(line) is not None
        out.held_out = tested and not told
    if out.losses and out.held_out:  # "Evaluation at step 10: loss 2.5"
        first = next(iter(out.losses))
        out.row[VAL_LOSS] = out.row.pop(first)
        out.losses.clear()
        out.others += 1
    elif out.losses and "val" in out.row:  # "loss train: 2.5, val: 2.6"
        out.row[VAL_LOSS] = out.row.pop("val")
    return out
