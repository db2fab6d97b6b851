"""What any program prints while it trains: lines that hold a step and a loss, in whatever form.

A line is taken apart into pairs of a name and a number (``Step 10 | loss: 2.5``, ``lr=1e-3``, ``"num_updates": "10"``).
The beginning of the file says which name is the step, by rising, and where the loss stands: on the same line, on
lines below a step of their own (``[batch=10/100]:``), or on lines of one form without a step. Only what keeps to that
form is read, so that prose, source code and dumps of arguments give nothing. Progress bars count too
(``| 10/200 [00:01<00:19, loss=2.5]``). Every other format is asked first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from poise.postmortem.readers.names import GRAD_NORM, LOSS, LR, STEP, TOKENS, VAL_LOSS, rank, words
from poise.postmortem.readers.source import Item, Row, Source

FORMAT = "stdout"
LOOKS_FOR = "lines of any program with a step and a loss, like 'step 10 | loss 2.5'"

SCORE = 0.25
"""A guess; whoever knows the format goes first."""

LONGEST = 4000
"""Characters of a line that is looked into; steps are told in less."""

LOOK_AT = 20_000
"""Lines from which the form is learned."""

ENOUGH = 1000
"""Lines with a loss; the form is learned from no more."""

FEWEST = 3
"""Rows that make a form; without a step ``FEWEST_BARE``."""

FEWEST_BARE = 10
REACH = 200
"""Lines below a step in which its loss may stand."""

BAR = "bar"
EPOCH = "epoch"

# Linear: every quantifier is bounded or possessive, and a name is tried only where a word begins.
NUMBER = (
    r"[+-]?(?>(?:\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d*)?|\d++\.?\d*|\.\d++)(?:[eE][+-]?\d{1,4})?"
    r"|(?i:nan|inf(?:inity)?)(?![A-Za-z0-9_]))"
)
_WORD = r"[A-Za-z_][\w/.\-]{0,60}"
_NEXT = r" (?!(?i:nan|inf|infinity)(?![\w/]))" + _WORD
PAIR = re.compile(
    rf"(?<![\w/.\-])((?>{_WORD}(?:{_NEXT}){{0,3}}))(?:\s?\([\w%/ ]{{1,12}}\))?"  # the name, and a unit
    r"([\"']?\s{0,8}[:=]?\s{0,12}[\"'\[(]{0,2}\s{0,8})(?:(?:tensor|Array|np\.float\d\d)\()?"
    rf"({NUMBER})(?:\s?/\s?(\d[\d,]{{0,15}}(?<!,)|\?+))?(?:([KkMBTPE])(?![\w/]))?(?!\d|[-./,:]\d|x[0-9a-f]|%\||it/)"
)
_BAR = re.compile(r"(?:[|:\[(]|^)\s{0,20}(\d{1,15})\s?/\s?(\d{1,15}|\?+)(?=[\s\])])")
_RATE_BAR = re.compile(r"(?<![\d.])(\d{1,9}(?:\.\d{1,3})?)(k?)it/(\d[\d.]{0,15}k?|[?-])")
_HELD_OUT = re.compile(r"(?<![a-z_/])(?:val|valid|validation|eval|evaluation|evaluating|dev|test)(?![a-z_/])", re.I)
_CODE = re.compile(r"(?:def|class)\s+\w+\s*[(:]|(?:import|from)\s+[\w.]+(?:\s+import\b|$)|assert\s|#include\s|```")

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


@dataclass(frozen=True, slots=True)
class Form:
    """How a program tells of its steps.

    Attributes:
        step: the name of the step, ``bar`` for a progress bar, empty where none is told.
        loss: the column of the loss.
        sep: what stands between its name and its number.
        inline: whether step and loss share a line; else the loss stands below the step.
        total: of the progress bar, 0 when any will do.
        columns: names that come with the loss.
    """

    step: str
    loss: str
    sep: str
    inline: bool
    total: float = 0.0
    columns: frozenset[str] = frozenset()


def sniff(source: Source) -> float:
    """Return a low score when the first lines have a form."""
    return 0.0 if learn(source.head_lines) is None else SCORE


def read(source: Source) -> Iterator[Item]:
    """Yield one row a line that holds a loss, or a row for each step where the loss stands below it."""
    form = learn(source.head_lines)
    if form is None:
        return
    told = f"'{form.step}'" if form.step else "none"
    source.notes.add(f"read as free text: the step is {told}, the loss '{form.loss}'")
    yield from _inline(source, form) if form.inline else _below(source, form)


Key = tuple[str, str, str, bool]
"""Of lines that are alike: the step, the loss, what parts its name and number, and whether they share a line."""

Groups = dict[Key, list[tuple[int, Pair]]]
"""For each the lines' numbers and steps."""

# -- lines ---------------------------------------------------------------------------------------------


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
    epoch: float = float("nan")
    held_out: bool = False


def take_apart(line: str, meaning: Meanings) -> Line:
    """Return a line's numbers by what they mean."""
    out, before, tested = Line(), "", False
    if len(line) > LONGEST:
        return out
    for pair in pairs(line):
        kind, column = meaning(pair.name)
        if kind == STEP:
            if pair.value == pair.value // 1:
                out.steps.setdefault(column, pair)
        elif kind == EPOCH:
            out.epoch = pair.value if out.epoch != out.epoch else out.epoch
        elif column not in out.row and kind != "nothing":
            out.row[column] = pair.value
            if kind == LOSS:
                out.losses[column] = pair.sep
                before = before or line.partition(pair.name)[0]
            elif kind:
                out.others += 1
                tested |= kind == VAL_LOSS
    counted = bar(line)
    if counted is not None:
        out.steps.setdefault(BAR, counted)
    if (out.losses and not tested) or BAR in out.steps:
        told = any("train" in column.lower() for column in out.losses)
        out.held_out = _HELD_OUT.search(before if out.losses else line) is not None and not told
    if out.losses and out.held_out:  # "Evaluation at step 10: loss 2.5"
        first = next(iter(out.losses))
        out.row[VAL_LOSS] = out.row.pop(first)
        out.losses.clear()
        out.others += 1
    elif out.losses and "val" in out.row:  # "loss train: 2.5, val: 2.6"
        out.row[VAL_LOSS] = out.row.pop("val")
    return out


# -- the form ------------------------------------------------------------------------------------------


def learn(lines: Sequence[str]) -> Form | None:
    """Return the form that most of the lines with a loss keep to; ``None`` when there is none."""
    meaning = Meanings()
    groups: Groups = {}
    beside: dict[str, int] = {}  # how often a name comes on a line with a loss, and on any
    everywhere: dict[str, int] = {}
    below: dict[str, Pair] = {}
    told_at, done, rows = -REACH, False, 0
    for at, line in enumerate(lines[:LOOK_AT]):
        now = take_apart(line, meaning)
        validation = now.row.keys() & {VAL_LOSS} if not now.losses else set()
        losses = now.losses or dict.fromkeys(validation, "")
        for counts in (beside, everywhere) if losses else (everywhere,):
            for name in now.row:
                counts[name] = counts.get(name, 0) + 1
        steps = now.steps or (below if at - told_at < REACH else {})
        none = {"": Pair("", 0.0, 0.0, "")} if now.others else {}
        for loss, sep in losses.items():
            for step, pair in (steps or none).items():
                if not (now.held_out and step == BAR):
                    groups.setdefault((step, loss, sep, bool(now.steps)), []).append((at, pair))
        if now.steps and not losses:
            below, told_at = now.steps | (below if at - told_at < REACH and not done else {}), at
            done = False
        done |= bool(losses)
        rows += bool(losses)
        if rows >= ENOUGH:
            lines = lines[: at + 1]
            break
    best = max((key for key in groups if _is_form(key, groups[key], lines)), default=None, key=_taste(groups))
    if best is None:
        return None
    step, loss, sep, inline = best
    totals = [pair.total for _, pair in groups[best] if pair.total == pair.total]
    total = max(set(totals), key=totals.count) if totals and step == BAR and not inline else 0.0
    usual = frozenset(
        name for name, times in (beside if inline else everywhere).items() if times >= max(2, len(groups[best]) // 100)
    )
    return Form(step, loss, sep, inline or not step, total, usual)


def _is_form(key: Key, rows: Sequence[tuple[int, Pair]], lines: Sequence[str]) -> bool:
    """Return whether these lines tell of a run: enough of them, with steps that rise."""
    step = key[0]
    if len(rows) < (FEWEST if step else FEWEST_BARE) or not is_told([at for at, _ in rows], lines):
        return False
    if not step:
        return len({lines[at] for at, _ in rows}) > len(rows) // 2
    values = [pair.value for _, pair in rows]
    rising = sum(b > a for a, b in pairwise(values))
    return rising >= FEWEST - 1 and 2 * _falls(rows) <= rising


def _falls(rows: Sequence[tuple[int, Pair]]) -> int:
    return sum(b.value < a.value for (_, a), (_, b) in pairwise(rows))


def _taste(groups: Groups) -> Callable[[Key], tuple[float, ...]]:
    """Return what the best form has most of: rows; a loss for training; a step on the line; one that never falls."""
    most = max(map(len, groups.values()), default=0)

    def order(key: Key) -> tuple[float, ...]:
        step, loss, _, inline = key
        rows = groups[key]
        fall = _falls(rows) if step else 0
        named = rank(STEP, step) if step and step != BAR else None
        return (
            loss != VAL_LOSS,
            10 * len(rows) >= 3 * most and bool(step),
            inline,
            -min(fall, 1),
            -(99 if named is None else named),
            -(rank(LOSS, loss) or 0),
            len(rows),
        )

    return order


def is_told(at: Sequence[int], lines: Sequence[str]) -> bool:
    """Return whether these lines are a log's: close enough together, and not examples within source code or prose.

    Args:
        at: where the rows are; what stands before the first does not matter, it may be the program itself.
    """
    if not at:
        return False
    after = lines[at[0] : LOOK_AT]
    code = sum(2 if line.startswith("```") else 1 for line in after if _CODE.match(line))
    return (len(at) >= 10 or 20 * len(at) >= len(after)) and not (code >= 2 and 10 * code >= len(at))


# -- reading -------------------------------------------------------------------------------------------


class Unroll:
    """Steps that start anew in each epoch, counted on."""

    def __init__(self, source: Source, by_total: bool) -> None:
        self._source, self._by_total = source, by_total
        self._epoch, self._step, self._total = float("nan"), -1.0, float("nan")
        self._offset = 0.0
        self._began: dict[float, float] = {}

    def __call__(self, pair: Pair, epoch: float) -> float:
        if pair.value < self._step and (epoch > self._epoch or (self._by_total and self._step >= self._total)):
            self._offset += self._step if self._total != self._total else self._total
            self._source.notes.add("the steps start anew in each epoch; they are counted on", self._source.where)
        elif epoch < self._epoch:  # the run went back
            self._offset = self._began.get(epoch, self._offset)
        if epoch == epoch and len(self._began) < 10_000:
            self._began[epoch] = self._offset
        self._epoch = epoch if epoch == epoch else self._epoch
        self._step, self._total = pair.value, pair.total
        return self._offset + pair.value


def _inline(source: Source, form: Form) -> Iterator[Row]:
    meaning, unroll = Meanings(), Unroll(source, form.step == BAR)
    for line in source.lines():
        now = take_apart(line, meaning)
        if form.step and form.step not in now.steps:
            continue
        if not (now.losses or now.others) or (now.held_out and form.step == BAR):
            continue
        if now.losses.get(form.loss, form.sep) != form.sep:
            source.notes.add("line with a loss in another form left out (a summary?)", source.where)
            continue
        if not form.step and form.loss not in now.row and VAL_LOSS not in now.row:
            continue
        row = _kept(now, form)
        if form.step:
            row[STEP] = unroll(now.steps[form.step], now.epoch)
        yield row


def _below(source: Source, form: Form) -> Iterator[Row]:
    meaning, unroll = Meanings(), Unroll(source, form.step == BAR)
    row: Row = {}
    step, told_at = float("nan"), 0
    for line in source.lines():
        now = take_apart(line, meaning)
        pair = now.steps.get(form.step)
        if pair is not None and not (form.total and pair.total != form.total) and not now.losses:
            at = unroll(pair, now.epoch)
            if at != step and row:
                yield {STEP: step} | row
                row = {}
            step, told_at = at, source.line
        if step == step and source.line - told_at < REACH and now.row and not (now.steps and form.step == BAR):
            row |= _kept(now, form)
    if row and step == step:
        yield {STEP: step} | row


def _kept(now: Line, form: Form) -> Row:
    """Return the columns that usually come with the loss."""
    return {name: value for name, value in now.row.items() if name in form.columns or name == VAL_LOSS}
