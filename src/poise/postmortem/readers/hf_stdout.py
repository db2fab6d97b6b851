"""What the Hugging Face ``Trainer`` prints: Python dicts among the progress bars of tqdm; part of the reader ``hf``.

The dicts have no step. It is taken, the surest first, from the dict itself where somebody put it there; from the
progress bar that stands before or after it, whichever goes up more evenly; from the epoch, where the steps of an epoch
are known; else the rows are counted. Which of these is right is only known at the end (a buffered standard output
comes in lumps between the bars), so the file is gone through twice.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from poise.postmortem.readers.names import ROW, STEP, VAL_LOSS, rank
from poise.postmortem.readers.ranks import Ranks, rank_of
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source, number

MANY = 50_000
"""Lines from which it is learned who prints dicts."""

MAX_DICT = 20_000
"""Characters of a printed dict."""

EPOCH_DIGIT, EPOCH_SHARE = 0.0051, 0.00051
"""Epochs are printed with two decimals, by later versions with four digits."""

_PAIR = re.compile(r"'([^'\n]{1,120})': {0,2}(?:(?:np\.float\d\d|tensor)\()?'?([^,'\"{}()\n]{1,60})")
_BAR = re.compile(r"(?<!\d)\d{1,3}%\|[^|\n]{0,400}\| {0,9}(\d{1,12})/(\d{1,12}) \[")
_IN_FRONT = re.compile(
    r"(?:\b(?:global[_ ])?(?:step|iter(?:ation)?)[\"']?[ =:#\[]{0,4}(\d{1,12})|\[ {0,8}(\d{1,12}) ?/ ?\d{1,12}\])"
    r"[^\d]{0,40}$",
    re.I,
)
"""A step before a dict: ``Step 10: {'loss': ...}``, ``[10/600] {'loss': ...}``."""

IN_FRONT = "step in front"
_BANNER = "***** Running training *****"
_SAID = re.compile(
    r"(Num examples|Num Epochs|Instantaneous batch size per device|Total train batch size \([^)]{0,80}\)"
    r"|Gradient Accumulation steps|Total optimization steps) = ([0-9,]{1,20})"
)
_SETTINGS = {
    "Num examples": "num_examples",
    "Num Epochs": "num_train_epochs",
    "Instantaneous": "per_device_train_batch_size",
    "Total train": "total_train_batch_size",
    "Gradient": "gradient_accumulation_steps",
    "Total optimization": "max_steps",
}
_COMPANIONS = (
    "epoch",
    "learning_rate",
    "grad_norm",
    "lr",
    "step",
    "global_step",
    "eval_runtime",
    "eval_samples_per_second",
)
_PROGRESS = ("global_step/max_steps", "step", "global_step", "step in front")


@dataclass(frozen=True, slots=True)
class Bar:
    """A progress bar without a name stood at ``count`` of ``total``."""

    count: int
    total: int


@dataclass(frozen=True, slots=True)
class Began:
    """The banner with which training begins."""


@dataclass(frozen=True, slots=True)
class Said:
    """A setting in the banner."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The summary at the end of training."""

    epoch: float


Event = Row | Bar | Began | Said | Closed


def sniff(source: Source) -> float:
    """Return 0.9 for two printed dicts, or one among progress bars; less where only the banner is in sight."""
    dicts = marks = 0
    for line in source.head_lines:
        for event in events_of(line):
            dicts += isinstance(event, dict)
            marks += isinstance(event, Bar | Began)
        if dicts >= 2 or (dicts and marks):
            return 0.9
    if dicts:
        return 0.6
    return 0.5 if any(_BANNER in line for line in source.head_lines) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield one row a printed dict."""
    survey = _survey(source.again(), _ranks(source))
    survey.ranks.note(source.notes)
    source.settings |= survey.settings
    steps, column, how = survey.steps()
    if how:
        source.notes.add(how)
    place, part = 0, 0
    for line in source.lines():
        if survey.ranks.skips(line):
            continue
        for event in events_of(line):
            if isinstance(event, Closed):
                source.notes.add("the trainer's closing summary is not a step and is left out", source.where)
            if not isinstance(event, dict) or place >= len(steps):
                continue
            if survey.parts[place] > part:
                part = survey.parts[place]
                yield RESTARTED
            yield {name: value for name, value in event.items() if name not in _PROGRESS} | {column: steps[place]}
            place += 1


def events_of(line: str) -> list[Event]:
    """Return what one line says, in the order in which it stands there."""
    out: list[tuple[int, Event]] = []
    if "loss'" in line or "'train_runtime'" in line:
        out += _dicts(line)
    if "%|" in line:
        for found in _BAR.finditer(line):
            before = line[max(0, found.start() - 40) : found.start()].rstrip()
            if not before or before.endswith(("]", ")", "}", ">")) or before.lower().endswith(("train:", "training:")):
                out.append((found.start(), Bar(int(found[1]), int(found[2]))))
    if _BANNER in line:
        out.append((0, Began()))
    elif " = " in line and (said := _SAID.search(line)):
        name = next(name for start, name in _SETTINGS.items() if said[1].startswith(start))
        out.append((0, Said(name, said[2].replace(",", ""))))
    return [event for _, event in sorted(out, key=lambda pair: pair[0])]


def _dicts(line: str) -> Iterator[tuple[int, Event]]:
    """Find the dicts in a line; those of a program's text do not count."""
    passed = 0
    while (end := line.find("}", passed)) >= 0:
        start = line.rfind("{'", passed, end)
        before, after = line[passed:start].rstrip()[-1:], line[end + 1 : end + 9].lstrip()[:1]
        if (
            start >= 0
            and end - start <= MAX_DICT
            and before not in tuple("=([,{#'\"`")
            and after not in tuple(",)];:'\"`")
        ):
            event = _event(line[start:end])
            if isinstance(event, dict) and (told := _IN_FRONT.search(line[max(0, start - 80) : start])):
                event[IN_FRONT] = float(told[1] or told[2])
            if event is not None:
                yield start, event
        passed = end + 1


def _event(text: str) -> Row | Closed | None:
    """Return the numbers of a dict, if it is one of a training."""
    row: Row = {}
    for name, value in _PAIR.findall(text):
        x = number(value.strip())
        if x is None and name == _PROGRESS[0]:
            x = number(value.partition("/")[0])
        if x is not None:
            row[name] = x
    if "train_runtime" in row:
        return Closed(row.get("epoch", math.nan))
    has_loss = "loss" in row or any(_is_held_out(name) for name in row if name.endswith("loss"))
    return row if has_loss and any(name in row for name in _COMPANIONS) else None


def _is_held_out(name: str) -> bool:
    return rank(VAL_LOSS, name) is not None or (name.startswith("eval_") and name.endswith("_loss"))


@dataclass(slots=True)
class _Survey:
    """What is known of the step of each printed dict; -1 stands for nothing."""

    ranks: Ranks
    settings: dict[str, str] = field(default_factory=dict)
    train: array[int] = field(default_factory=lambda: array("b"))
    parts: array[int] = field(default_factory=lambda: array("I"))  # how often training had begun again
    said: array[int] = field(default_factory=lambda: array("q"))
    before: array[int] = field(default_factory=lambda: array("q"))  # the progress bar that came before
    after: array[int] = field(default_factory=lambda: array("q"))
    epoch: array[float] = field(default_factory=lambda: array("d"))
    total: int = 0  # of the training's progress bar
    last_epoch: float = math.nan

    def steps(self) -> tuple[list[float], str, str]:
        """Return the step of each dict, the name of that column, and a note on where it comes from."""
        train = np.array(self.train, dtype=bool)
        parts = np.array(self.parts, dtype=np.int64)
        said = np.array(self.said, dtype=np.int64)
        if train.any() and (said[train] >= 0).mean() > 0.9 and _rises(said[train]):
            return _filled(said), STEP, ""
        bars = [np.array(values, dtype=np.int64) for values in (self.before, self.after)]
        evenness = [_evenness(values[train], parts[train]) for values in bars]
        best = int(evenness[1] > evenness[0])
        if evenness[best] >= 0.5:
            steps = np.where(bars[best] >= 0, bars[best], bars[1 - best])
            return _filled(steps), STEP, "the steps are those of the progress bars"
        epochs = self._by_epoch(train)
        if epochs is not None:
            return epochs
        count = np.cumsum(train).astype(np.float64)
        epoch = np.array(self.epoch, dtype=np.float64)
        later = np.append(False, ~train[1:] & ~train[:-1] & (epoch[1:] > epoch[:-1]))
        count[later] += 1  # an evaluation below another one, as at the end of training
        every = self._every(int(train.sum()))
        if every > 1 and not parts.any():
            note = f"the dicts have no step: counted as one every {every} steps, a guess from how many there are"
            return (count * every).tolist(), STEP, note
        return count.tolist(), ROW, "the dicts have no step: the rows with a loss are counted from 1"

    def _by_epoch(self, train: NDArray[np.bool_]) -> tuple[list[float], str, str] | None:
        """Return steps of the epochs, where those are given finely enough."""
        per_epoch = self._per_epoch()
        epoch = np.array(self.epoch, dtype=np.float64)
        if not math.isfinite(per_epoch) or not np.isfinite(epoch[train]).all() or train.sum() < 2:
            return None
        note = f"the steps are the epochs times {per_epoch:g} steps"
        exact = (np.nan_to_num(epoch, nan=-1.0) * per_epoch).clip(-1, 2.0**52)
        every = round((exact[train][-1] - exact[train][0]) / (train.sum() - 1))
        even = every * np.arange(1, train.sum() + 1)
        if every >= 1 and (np.abs(even - exact[train]) <= EPOCH_DIGIT * per_epoch + EPOCH_SHARE * exact[train]).all():
            steps = np.full(len(train), -1)
            steps[train] = even
            return _filled(steps), STEP, f"{note}, one dict every {every}"
        steps = np.round(exact).astype(np.int64)
        return (_filled(steps), STEP, note) if (np.diff(steps[train]) > 0).mean() >= 0.95 else None

    def _per_epoch(self) -> float:
        steps, epochs = (number(self.settings.get(name, "")) for name in ("max_steps", "num_train_epochs"))
        total = steps or float(self.total)
        if total > 0 and self.last_epoch > 0:
            return total / self.last_epoch
        return total / epochs if total and epochs else math.nan

    def _every(self, dicts: int) -> int:
        """Return 1, 2 or 5 times a power of ten that so many dicts up to the last step suggest; 0 for nothing."""
        reached = max(max(self.before, default=-1), max(self.after, default=-1))
        if dicts < 2 or reached < dicts:
            return 0
        scale = int(10.0 ** math.floor(math.log10(reached / dicts)))
        return max(factor * scale for factor in (1, 2, 5) if factor * scale <= reached / dicts)


def _ranks(source: Source) -> Ranks:
    """Return whose dicts count, of several ranks that print the same epochs or steps."""
    told = []
    for line in source.telling[:MANY]:
        if "{'" in line:
            rows = [event for event in events_of(line) if isinstance(event, dict)]
            told += [
                (rank_of(line), next((row[name] for name in (*_PROGRESS, "epoch") if name in row), math.nan))
                for row in rows
            ]
    ranks = Ranks(told)
    ranks.stride = 0.0
    return ranks


def _survey(source: Source, ranks: Ranks) -> _Survey:
    survey = _Survey(ranks)
    part, seen = 0, 0  # ``seen``: dicts since training began
    counts: dict[int, int] = {}  # progress bar's total -> where it stands
    votes: Counter[int] = Counter()
    last = 0  # total of the bar seen last
    for line in source.lines():
        if ranks.skips(line):
            continue
        for event in events_of(line):
            if isinstance(event, Said):
                survey.settings.setdefault(event.name, event.value)
            elif isinstance(event, Closed):
                survey.last_epoch = event.epoch
            elif isinstance(event, Began) or (
                isinstance(event, Bar) and event.count == 0 and event.total == survey.total and counts.get(event.total)
            ):
                part, seen = part + bool(seen), 0
                counts.clear()
                votes.clear()
            elif isinstance(event, Bar):
                if len(counts) < 1000 or event.total in counts:
                    counts[event.total] = event.count
                last = event.total
                if event.total == survey.total and survey.after and survey.after[-1] < 0 and seen:
                    survey.after[-1] = event.count
            else:
                train = "loss" in event
                if train and last:
                    votes[last] += 1
                    survey.total = last if len(votes) == 1 else votes.most_common(1)[0][0]
                seen += 1
                survey.train.append(train)
                survey.parts.append(part)
                survey.said.append(_whole(next((event[name] for name in _PROGRESS if name in event), -1.0)))
                survey.before.append(counts.get(survey.total, -1))
                survey.after.append(-1)
                survey.epoch.append(event.get("epoch", math.nan))
    return survey


def _whole(x: float) -> int:
    return int(x) if 0 <= x < 2.0**53 and x == x // 1 else -1


def _rises(steps: NDArray[np.int64]) -> bool:
    """Return whether these are steps rather than what is the same for all of them."""
    return len(steps) < 3 or bool((np.diff(steps) > 0).mean() >= 0.5)


def _evenness(values: NDArray[np.int64], parts: NDArray[np.int64]) -> float:
    """Return which share of the rows lies one usual stride above the row before."""
    if len(values) < 2:
        return float(len(values) == 1 and values[0] >= 0)
    rises = np.diff(values)[(np.diff(parts) == 0)]
    rises = np.where(values[1:][np.diff(parts) == 0] >= 0, rises, -1)
    up = rises[rises > 0]
    if not len(up):
        return 0.0
    strides, times = np.unique(up, return_counts=True)
    return float(times.max() / len(rises)) if len(rises) > 1 else float(strides[0] > 0)


def _filled(steps: NDArray[np.int64]) -> list[float]:
    """Fill steps that are not known with the one before them: an evaluation belongs to the step before it."""
    known = np.maximum.accumulate(np.where(steps >= 0, np.arange(len(steps)), -1))
    filled: list[float] = np.where(known >= 0, steps[known], 0).astype(np.float64).tolist()
    return filled
