"""What any program prints while it trains: lines that hold a step and a loss, in whatever form.

A line is taken apart into pairs of a name and a number (``Step 10 | loss: 2.5``, ``lr=1e-3``, ``"num_updates": "10"``).
The beginning of the file says which name is the step, by rising, and where the loss stands: on the same line, on
lines below a step of their own (``[batch=10/100]:``), or on lines of one form without a step. Only what keeps to that
form is read, so that prose, source code and dumps of arguments give nothing. Progress bars count too
(``| 10/200 [00:01<00:19, loss=2.5]``). Every other format is asked first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from poise.core.errors import UserError
from poise.postmortem.readers.form import FEWEST, REACH, Form, is_told, learn
from poise.postmortem.readers.freetext import (
    BAR,
    EPOCH,
    NUMBER,
    Line,
    Meanings,
    Pair,
    announces,
    pairs,
    places,
    take_apart,
    whole,
    with_points,
)
from poise.postmortem.readers.names import ROW, STEP, VAL_LOSS, rank
from poise.postmortem.readers.ranks import Ranks
from poise.postmortem.readers.shapes import PROVED, STEP_AT, TOTAL_AT, Shapes
from poise.postmortem.readers.source import HEAD_BYTES, Block, Item, Row, Source

__all__ = ["FORMAT", "LOOKS_FOR", "NUMBER", "Meanings", "is_told", "pairs", "read", "sniff", "take_apart"]

FORMAT = "stdout"
LOOKS_FOR = "lines of any program with a step and a loss, like 'step 10 | loss 2.5'"

SCORE = 0.25
"""A guess; whoever knows the format goes first."""

BLOCK_ROWS, FEW = 4096, 8
"""Rows of a block; fewer are yielded one by one."""

HOPELESS = 0.01
"""For a log of a line or two: nobody else's, and said so."""

SHORT = 20
"""Lines of a file that may be such a log."""


def sniff(source: Source) -> float:
    """Return a low score when the first lines have a form."""
    if _form(source) is not None:
        return SCORE
    return HOPELESS if _too_few(source) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield one row a line that holds a loss, or a row for each step where the loss stands below it.

    Raises:
        UserError: there are too few lines to tell a form.
    """
    form = _form(source)
    if form is None:
        few = _too_few(source)
        lines = "1 line with a loss is" if few == 1 else f"{few} lines with a loss are"
        raise UserError(f"'{source.path}': {lines} too few to recognise a log; {FEWEST} are enough")
    told = f"'{form.step}'" if form.step else "none"
    source.notes.add(f"read as free text: the step is {told}, the loss '{form.loss}'")
    if form.step == EPOCH:
        source.notes.add("no steps are told: the epochs are counted")
    if form.commas:
        source.notes.add("numbers are written with a comma for the point")
    if form.above:
        source.notes.add("each loss stands above the line of its step")
    ranks = Ranks(form.points)
    ranks.note(source.notes)
    lines_of = _lines(source, form, ranks)
    yield from _inline(source, form, lines_of, ranks) if form.inline else _apart(source, form, lines_of)


def _form(source: Source) -> Form | None:
    return learn(source.telling, source.sifted, len(source.head) < HEAD_BYTES)


def _too_few(source: Source) -> int:
    """Return how many lines of a very short log hold a step and a loss."""
    if len(source.head_lines) > SHORT:
        return 0
    found = [take_apart(line, Meanings()) for line in source.head_lines]
    few = sum(bool(now.losses) and bool(now.steps) for now in found)
    return few if few < FEWEST and is_told(range(few), source.head_lines) else 0


# -- reading -------------------------------------------------------------------------------------------


class Unroll:
    """Steps that start anew in each epoch, counted on."""

    def __init__(self, source: Source, by_total: bool) -> None:
        self._source, self._by_total = source, by_total
        self._epoch, self._step, self._total = float("nan"), -1.0, float("nan")
        self._offset = 0.0
        self._began: dict[float, float] = {}

    def __call__(self, pair: Pair, epoch: float) -> float:
        if pair.value < self._step and (epoch > self._epoch or self._is_full(epoch)):
            self._offset += self._step if self._total != self._total else self._total
            self._source.notes.add("the steps start anew in each epoch; they are counted on", self._source.where)
        elif epoch < self._epoch:  # the run went back
            self._offset = self._began.get(epoch, self._offset)
        if epoch == epoch and len(self._began) < 10_000:
            self._began[epoch] = self._offset
        self._epoch = epoch if epoch == epoch else self._epoch
        self._step, self._total = pair.value, pair.total
        return self._offset + pair.value

    def _is_full(self, epoch: float) -> bool:
        """Return whether the step before was an epoch's last."""
        return self._step >= self._total and (self._by_total or epoch != epoch)


def _lines(source: Source, form: Form, ranks: Ranks) -> Iterator[str]:
    """Yield the lines that count."""
    for line in source.lines():
        if not ranks.skips(line):
            line = whole(line, source)
            yield with_points(line) if form.commas else line


def _word(form: Form) -> str:
    """Return what every line with a step must hold; an empty text where lines are not to be passed over."""
    if form.step in ("", EPOCH, "batch"):
        return ""
    return "/" if form.step == BAR else form.step.rpartition("_")[2]


def _may_matter(line: str, word: str) -> bool:
    """Return whether a line may hold a step, an epoch, or say that an evaluation begins."""
    low = line.lower()
    return word in low or "ep" in low or "val" in low or "held" in low


class Rows:
    """Rows with the same columns, as blocks."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def add(self, row: Row) -> Iterator[Item]:
        """Take in a row; yield those before it that are enough or have other columns."""
        if self._rows and (len(self._rows) >= BLOCK_ROWS or row.keys() != self._rows[0].keys()):
            yield from self.flush()
        self._rows.append(row)

    def flush(self) -> Iterator[Item]:
        """Yield all rows."""
        if len(self._rows) >= FEW:
            names = list(self._rows[0])
            table = np.array([[row[name] for name in names] for row in self._rows])
            yield Block({name: table[:, i].copy() for i, name in enumerate(names)})
        else:
            yield from self._rows
        self._rows = []


def _inline(source: Source, form: Form, lines: Iterator[str], ranks: Ranks) -> Iterator[Item]:
    meaning, unroll = Meanings(), Unroll(source, form.step == BAR)
    epoch, last, announced = float("nan"), float("nan"), False
    shapes, block = Shapes(), Rows()
    word = _word(form)
    for line in lines:
        known = shapes.match(line)
        if known is not None and known[1].proved >= PROVED and not announced:
            got = known[0]
            step = unroll(Pair("", got.pop(STEP_AT), got.pop(TOTAL_AT, float("nan")), ""), epoch)
            if not ranks.repeats(step):
                got[STEP] = last = step
                yield from block.add(got)
            continue
        if word and known is None and not _may_matter(line, word):
            continue
        now = take_apart(line, meaning)
        epoch = epoch if now.epoch is None else now.epoch.value
        pair = now.epoch if form.step == EPOCH else now.steps.get(form.step)
        if not now.row:
            announced |= announces(line)
        if form.step and pair is None:
            continue
        if not (now.losses or now.others) or (now.held_out and form.step == BAR):
            continue
        if now.losses.get(form.loss, form.sep) != form.sep:
            source.notes.add("line with a loss in another form left out (a summary?)", source.where)
            continue
        if not form.step and form.loss not in now.row and VAL_LOSS not in now.row:
            continue
        row = _kept(now, form)
        if pair is not None and word and now.epoch is None and form.loss in now.losses:
            right = row | {STEP_AT: pair.value} | ({TOTAL_AT: pair.total} if pair.total == pair.total else {})
            if known is not None:
                shapes.prove(known[1], known[0], right)
            elif not now.held_out:
                shapes.learn(line, places(line, form.step, row, meaning))
        elif known is not None:
            shapes.prove(known[1], known[0], {})
        if pair is not None and form.step:
            step = pair.value if form.step == EPOCH else unroll(pair, epoch)
            if form.loss in now.losses and announced and step == last:
                row[VAL_LOSS] = row.pop(form.loss)
            elif form.loss in now.losses and ranks.repeats(step):
                continue
            row[ROW if form.step == EPOCH else STEP] = last = step
        announced = announced and form.loss not in now.losses
        yield from block.flush()
        yield row
    yield from block.flush()


def _apart(source: Source, form: Form, lines: Iterator[str]) -> Iterator[Row]:
    """Yield the rows of a log whose losses stand below the line of their step, or above it."""
    meaning, unroll = Meanings(), Unroll(source, form.step == BAR)
    row: Row = {}
    step, told_at = float("nan"), 0
    name = ROW if form.step == EPOCH else STEP
    for line in lines:
        now = take_apart(line, meaning)
        pair = now.epoch if form.step == EPOCH and not now.losses else now.steps.get(form.step)
        if pair is not None and not (form.total and pair.total != form.total) and not now.losses:
            at = pair.value if form.step == EPOCH else unroll(pair, now.epoch.value if now.epoch else float("nan"))
            if form.above:
                step = at
            if row and step == step and (at != step or form.above):
                yield {name: step} | row
                row = {}
            step, told_at = at, source.line
        near = form.above or (step == step and source.line - told_at < REACH)
        if near and now.row and not (now.steps and form.step == BAR):
            row |= _kept(now, form)
    if row and step == step and not form.above:
        yield {name: step} | row


def _kept(now: Line, form: Form) -> Row:
    """Return the columns that usually come with the loss."""
    return {name: value for name, value in now.row.items() if name in form.columns or rank(VAL_LOSS, name) is not None}
