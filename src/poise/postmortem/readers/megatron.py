"""Standard output of Megatron-LM and its relatives (Megatron-DeepSpeed, GPT-NeoX, Megatron Bridge, NeMo 2).

One line an iteration, cells parted by bars:

     iteration       12/    1000 | consumed samples: 12288 | lm loss: 9.1E+00 | grad norm: 2.100 | ... |

Megatron prints no loss for an iteration that was skipped, and none that is NaN: what is said here about such lines is
read off the counts of skipped and NaN iterations. Of several ranks, or programs, that write into one log the first one
counts, until it falls silent. The dump of the arguments goes to the settings; a second one, or a checkpoint loaded
after the first iteration, is a restart.

Lines that are written alike are read many at once (``layout``), the others one by one (``Reader``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from poise.postmortem.readers import cells, layout
from poise.postmortem.readers.bulk import Scan
from poise.postmortem.readers.layout import Layout
from poise.postmortem.readers.names import LOSS, VAL_LOSS, rank
from poise.postmortem.readers.pages import Floats, Mask, pages
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source

FORMAT = "megatron"
LOOKS_FOR = "Megatron-LM's lines like 'iteration 5/ 100 | lm loss: 2.5E+00 |'"

STEP_NAME, SKIPPED, NAN = "iteration", "number of skipped iterations", "number of nan iterations"
TOKENS_PER_STEP = "tokens_per_step"

ABSENT = "an iteration without a loss, though it was not skipped or had a NaN: its loss is NaN"

SILENCE = 20
"""Iterations of another rank without one of the leader, after which that rank leads."""

MAX_SOURCES = 64
MAX_ARGUMENTS = 3000

KEYWORDS = ("iteration", "arguments -", "training")
"""A line without any of these says nothing, but for those between the marks of an argument dump."""

Origin = tuple[str, str]
"""Who wrote a line: the rank, and the number of all iterations as it is printed."""

_ROW = re.compile(r"iteration([ =])([ =]{0,20}\d{1,15})/( {0,20}\d{1,15} {0,20})\|")
_HELD_OUT = re.compile(
    r"\b(validation|test)\w{0,8} (?:loss|results) at "
    r"(?:(?:iteration|step) {1,20}(\d{1,15})|the end of training)([^|]{0,120})\|"
)
_DUMP = re.compile(r"-{4} {0,3}(end of )?[\w ]{0,40}arguments -{4}")
_ARGUMENT = re.compile(r"(?:^|[\]:\s])([A-Za-z]\w{0,79}) \.{2,}(?: (.*))?$")
_BEGINS = re.compile(r"training \.\.\.$|successfully loaded checkpoint")
_MARKED = re.compile(r"(?<!\.)\.{4,200}\w{1,20}$")
_SAYS = (_ROW, _HELD_OUT, _DUMP, _BEGINS)
_QUOTES = frozenset("\"'`#")


def sniff(source: Source) -> float:
    """Return 0.95 for a line of an iteration, 0.9 for a dump of arguments."""
    arguments = None
    for line in source.head_lines:
        if "iteration" in line and (found := _ROW.search(line)) and not _QUOTES & set(line[: found.start()]):
            if cells.cells(line[found.end() :]):
                return 0.95
        elif "arguments -" in line and _DUMP.search(line):
            arguments = 0
        elif arguments is not None and _ARGUMENT.search(line):
            arguments += 1
    return 0.9 if arguments is not None and arguments >= 5 else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield the iterations, validations as ``val_loss``, and restarts."""
    reader = Reader(source)
    if source.head[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16
        for line in source.lines():
            yield from reader.line(line, source.at_end)
    else:
        scan = Scan(reader)
        for page, last in pages(source):
            yield from scan.page(page, last)
    yield from reader.end()


class Reader:
    """The log line by line: what a line means, given what came before.

    Attributes:
        leader: whose iterations count.
        dumping: lines of an argument dump that may still come.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.leader: Origin | None = None
        self.dumping = 0
        self._held: dict[Origin, list[Row]] = {}
        self._begun = False
        self._restarted = False
        self._loss = ""
        self._step = 0.0

    def line(self, text: str, at_end: bool = False) -> list[Item]:
        """Return what a clean line gives.

        Args:
            text: the line.
            at_end: whether it is the file's last, and so may be cut off.
        """
        if not self.dumping and not any(word in text for word in KEYWORDS):
            return []
        rows = list(_ROW.finditer(text))
        if rows:
            self.dumping = 0
            ends = [found.start() for found in rows[1:]] + [len(text)]
            out: list[Item] = []
            for found, end in zip(rows, ends, strict=True):
                whole = end == len(text) and not at_end
                out += self._row(text, found, cells.cells(text[found.end() : end], whole))
            return out
        if held_out := _HELD_OUT.search(text):
            return self._evaluated(text, held_out, at_end)
        if dump := _DUMP.search(text):
            self._dump(begins=dump[1] is None)
        elif self.dumping:
            self._argument(text)
        elif _BEGINS.search(text):
            self._begins()
        return []

    def end(self) -> list[Item]:
        """Return what was held back to the end, where it is more than a stray line."""
        self._tokens_per_step()
        rows = max(self._held.values(), key=len, default=[])
        return [*self._before_rows(), *rows] if len(rows) > 2 else []

    def _before_rows(self) -> list[Item]:
        out: list[Item] = [RESTARTED] if self._restarted else []
        self._begun, self._restarted = True, False
        return out

    @property
    def keywords(self) -> tuple[bytes, ...]:
        """What a line has to hold to be looked at."""
        return tuple(word.encode() for word in KEYWORDS)

    def says(self, text: str) -> bool:
        """Return whether a line may give something, or change what others mean."""
        return any(word in text for word in KEYWORDS) and any(pattern.search(text) for pattern in _SAYS)

    def learn(self, line: bytes) -> Layout | None:
        """Return how the lines like this one are written; ``None`` for a line that is read by itself."""
        text = line.decode("ascii", "replace")
        found = _ROW.search(text)
        if found is None or "|" in text[: found.end() - 1] or _ROW.search(text, found.end()):
            return None
        exact = [found.span(3)]
        if written_by := cells.rank_of(text):
            exact.append((0, text.index(written_by) + len(written_by)))
        return layout.learn(line, found.span(2), tuple(exact), (written_by, found[3].strip()))

    def leads(self, origin: Origin) -> bool:
        """Return whether iterations of this origin count as they come."""
        return self.leader is None or self.leader == origin

    def lead(self, origin: Origin, step: float) -> list[Item]:
        """Take note of rows of the leader, the last of them at ``step``; return what has to come before them."""
        self.leader, self._step = origin, step
        self._held.clear()
        self.dumping = 0
        return self._before_rows()

    def absent(self, columns: Mapping[str, Floats]) -> Mask | None:
        """Return in which of some rows the loss was NaN, because it was not printed; ``None`` for none of them."""
        self._name_loss(columns)
        if NAN not in columns or any(map(is_loss, columns)):
            return None
        missing = columns[NAN] > 0
        if self._loss and SKIPPED in columns:
            missing = missing | (columns[SKIPPED] == 0)
        if not missing.any():
            return None
        self.source.notes.add(ABSENT)
        return missing

    @property
    def loss_name(self) -> str:
        """What this log calls its loss."""
        return self._loss or "lm loss"

    def _name_loss(self, names: Iterable[str]) -> None:
        self._loss = self._loss or next(filter(is_loss, names), "")

    def _row(self, text: str, found: re.Match[str], values: Row) -> list[Item]:
        if not values:
            return []
        step = float(found[2].strip(" ="))
        row: Row = {STEP_NAME: step} | values
        origin = (cells.rank_of(text), found[3].strip())
        self._name_loss(row)
        if NAN in row and self.absent({name: np.array([value]) for name, value in row.items()}) is not None:
            row[self.loss_name] = float("nan")
        if self.leads(origin):
            return [*self.lead(origin, step), row]
        self.source.notes.add("iterations of another rank, or of another program, left out", self.source.where)
        held = self._held.setdefault(origin, [])
        held.append(row)
        if len(held) >= SILENCE:
            return [*self.lead(origin, step), *held]
        if len(self._held) > MAX_SOURCES:
            self._held.clear()
        return []

    def _evaluated(self, text: str, found: re.Match[str], at_end: bool) -> list[Item]:
        written_by = cells.rank_of(text)
        if self.leader is not None and written_by not in ("", self.leader[0]):
            return []
        where = found[3]
        test = found[1] == "test" or "on test set" in where or "for test data" in where
        panel = re.search(r"\[([\w./ -]{1,60})\]", where)
        prefix = "test " if test else "validation "
        step = float(found[2]) if found[2] else self._step
        row: Row = {STEP_NAME: step}
        for name, value in cells.cells(text[found.end() :], not at_end).items():
            short = name.removesuffix(" value")
            if panel is not None:
                row[f"{prefix}{panel[1]} {short}"] = value
            elif is_loss(short) and not test:
                row[VAL_LOSS if VAL_LOSS not in row else f"{prefix}{short}"] = value
            else:
                row[f"{prefix}{short}"] = value
        return [row] if len(row) > 1 else []

    def _dump(self, begins: bool) -> None:
        self.dumping = MAX_ARGUMENTS if begins else 0
        if begins:
            self._begins()
        else:
            self._tokens_per_step()

    def _argument(self, text: str) -> None:
        self.dumping -= 1
        if (found := _ARGUMENT.search(text)) and len(self.source.settings) < MAX_ARGUMENTS:
            self.source.settings[found[1]] = _MARKED.sub("", found[2] or "").strip()

    def _begins(self) -> None:
        """Take note that the program begins; it begins again when there were iterations before."""
        if self._begun:
            self._restarted, self._begun, self.leader = True, False, None
            self._held.clear()

    def _tokens_per_step(self) -> None:
        settings = self.source.settings
        length = settings.get("seq_length", settings.get("encoder_seq_length", ""))
        batch = settings.get("global_batch_size", settings.get("train_batch_size", ""))
        rampup = settings.get("rampup_batch_size", "None")
        if rampup in ("None", "") and _is_count(length) and _is_count(batch):
            settings[TOKENS_PER_STEP] = str(int(length) * int(batch))


@functools.lru_cache(maxsize=4096)
def is_loss(name: str) -> bool:
    """Return whether a column is a loss."""
    return rank(LOSS, name) is not None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
