"""How a program tells of its steps, learned from its first lines; part of the reader ``stdout``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from poise.postmortem.readers.freetext import (
    BAR,
    EPOCH,
    Line,
    Meanings,
    Pair,
    decimal_commas,
    take_apart,
    with_points,
)
from poise.postmortem.readers.names import GRAD_NORM, LOSS, LR, TOKENS, VAL_LOSS, rank
from poise.postmortem.readers.ranks import Ranks, rank_of

LOOK_AT = 20_000
"""Lines from which the form is learned."""

ENOUGH = 1000
"""Lines with a loss; the form is learned from no more."""

FEWEST = 3
"""Rows that make a form; without a step ``FEWEST_BARE``."""

FEWEST_BARE = 10
REACH = 200
"""Lines below a step in which its loss may stand."""

_CODE = re.compile(r"(?:def|class)\s+\w+\s*[(:]|(?:import|from)\s+[\w.]+(?:\s+import\b|$)|assert\s|#include\s|```")
_QUOTED = ('"', "'", "#", ">", "*", "-", "|", "/", "`", "%", "(", 'f"', 'b"')
_FIGURE = re.compile(r"[-+]?(?:\d[\d.,]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b)")
_DONE = re.compile(r"\b(?:done|finished|completed?|end|ended)\b", re.I)
_KINDS = (GRAD_NORM, LR, TOKENS)


@dataclass(frozen=True, slots=True)
class Form:
    """How a program tells of its steps.

    Attributes:
        step: the name of the step, ``bar`` for a progress bar, ``epoch``, empty where none is told.
        loss: the column of the loss.
        sep: what stands between its name and its number.
        inline: whether step and loss share a line; else the loss stands below the step, or above it.
        total: of the progress bar, 0 when any will do.
        columns: names that come with the loss.
        above: whether the loss stands above its step.
        commas: whether numbers have a comma for the point.
        points: rank and step of the lines from which this was learned.
    """

    step: str
    loss: str
    sep: str
    inline: bool
    total: float = 0.0
    columns: frozenset[str] = frozenset()
    above: bool = False
    commas: bool = False
    points: tuple[tuple[int, float], ...] = ()


Key = tuple[str, str, str, bool]
"""Of lines that are alike: the step, the loss, what parts its name and number, and whether they share a line."""

Rows = list[tuple[int, Pair]]
"""The lines' numbers and steps."""


@dataclass(slots=True)
class _Seen:
    """What the lines hold."""

    groups: dict[Key, Rows] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)  # how often a name comes on a line with a loss
    with_step: dict[str, int] = field(default_factory=dict)  # ... with a step, of a known kind
    everywhere: dict[str, int] = field(default_factory=dict)
    steps: dict[str, list[int]] = field(default_factory=dict)  # lines with a step and no loss
    losses: dict[str, list[int]] = field(default_factory=dict)
    early: set[str] = field(default_factory=set)  # names before the first step
    below: dict[str, Pair] = field(default_factory=dict)
    told_at: int = -REACH
    done: bool = False

    def take(self, at: int, now: Line) -> bool:
        """Take in a line; return whether it holds a loss."""
        validation = now.row.keys() & {VAL_LOSS} if not now.losses else set()
        losses = now.losses or dict.fromkeys(validation, "")
        steps = _steps(now)
        for name in now.row:
            self.everywhere[name] = self.everywhere.get(name, 0) + 1
            if losses:
                self.beside[name] = self.beside.get(name, 0) + 1
            elif now.steps and any(rank(kind, name) is not None or name == kind for kind in _KINDS):
                self.with_step[name] = self.with_step.get(name, 0) + 1
        if not self.steps:
            self.early.update(now.row)
        known = {step: (pair, True) for step, pair in steps.items()}
        if not now.steps.keys() - {BAR} and at - self.told_at < REACH:
            below = self.below if not now.steps else {step: self.below[step] for step in (EPOCH,) if step in self.below}
            known |= {step: (pair, False) for step, pair in below.items() if step not in known}
        if not known and now.others:
            known = {"": (Pair("", 0.0, 0.0, ""), False)}
        for loss, sep in losses.items():
            self.losses.setdefault(loss, []).append(at)
            for step, (pair, inline) in known.items():
                if not (now.held_out and step == BAR):
                    self.groups.setdefault((step, loss, sep, inline), []).append((at, pair))
        if steps and not losses:
            recent = at - self.told_at < REACH and not self.done
            self.below, self.told_at = steps | (self.below if recent else {}), at
            for step in steps:
                self.steps.setdefault(step, []).append(at)
            self.done = False
        self.done |= bool(losses)
        return bool(losses)


def _steps(now: Line) -> dict[str, Pair]:
    """Return a line's steps; its epoch where it tells of no other."""
    if now.steps or now.epoch is None or now.epoch.value != now.epoch.value // 1:
        return now.steps
    return {EPOCH: now.epoch}


def learn(lines: Sequence[str], sifted: bool = False, whole: bool = True) -> Form | None:
    """Return the form that most of the lines with a loss keep to; ``None`` when there is none.

    Args:
        lines: the beginning of the log.
        sifted: whether these are only those of its lines that may say something.
        whole: whether the log has no more.
    """
    meaning, seen, rows = Meanings(), _Seen(), 0
    commas = decimal_commas(lines[:LOOK_AT])
    for at, line in enumerate(lines[:LOOK_AT]):
        rows += seen.take(at, take_apart(with_points(line) if commas else line, meaning))
        if rows >= ENOUGH:
            lines, whole = lines[: at + 1], False
            break
    known = {key: ranks for key, of in seen.groups.items() if (ranks := _is_form(key, of, lines, sifted)) is not None}
    best = max(known, default=None, key=_taste(seen.groups))
    if best is None:
        return None
    step, loss, sep, inline = best
    of = seen.groups[best]
    totals = [pair.total for _, pair in of if pair.total == pair.total]
    total = max(set(totals), key=totals.count) if totals and step == BAR and not inline else 0.0
    counts = seen.beside | seen.with_step if inline else seen.everywhere
    usual = frozenset(name for name, times in counts.items() if times >= max(2, len(of) // 100))
    above = bool(step) and not inline and _is_above(step, loss, seen, lines, whole)
    return Form(step, loss, sep, inline or not step, total, usual, above, commas, known[best])


Points = tuple[tuple[int, float], ...]


def _is_form(key: Key, rows: Rows, lines: Sequence[str], sifted: bool) -> Points | None:
    """Return the ranks and steps, if these lines tell of a run: enough of them, with steps that rise."""
    step = key[0]
    if len(rows) < (FEWEST if step else FEWEST_BARE) or not is_told([at for at, _ in rows], lines, sifted):
        return None
    if not step:
        return () if len({lines[at] for at, _ in rows}) > len(rows) // 2 else None
    points = tuple((rank_of(lines[at]), pair.value) for at, pair in rows)
    ranks = Ranks(points)
    values = [
        value
        for (written_by, value), (at, _) in zip(points, rows, strict=True)
        if not ranks.skips(lines[at]) and not ranks.repeats(value)
    ]
    rising = sum(b > a for a, b in pairwise(values))
    falls = sum(b < a for a, b in pairwise(values))
    enough = rising >= FEWEST - 1 and 2 * falls <= rising
    if step == EPOCH:  # one row each
        enough = enough and 10 * rising >= 8 * (len(values) - 1)
    return points if enough else None


def _falls(rows: Rows) -> int:
    return sum(b.value < a.value for (_, a), (_, b) in pairwise(rows))


def _taste(groups: dict[Key, Rows]) -> Callable[[Key], tuple[float, ...]]:
    """Return what the best form has most of: rows; a loss for training; a step on the line; one that never falls."""
    most = max(map(len, groups.values()), default=0)

    def order(key: Key) -> tuple[float, ...]:
        step, loss, _, inline = key
        rows = groups[key]
        fall = _falls(rows) if step else 0
        named = rank("step", step) if step and step != BAR else None
        return (
            loss != VAL_LOSS,
            10 * len(rows) >= 3 * most and bool(step),
            step != EPOCH,
            inline,
            -min(fall, 1),
            -(99 if named is None else named),
            -(rank(LOSS, loss) or 0),
            len(rows),
        )

    return order


def _is_above(step: str, loss: str, seen: _Seen, lines: Sequence[str], whole: bool) -> bool:
    """Return whether each loss stands above the line of its step."""
    steps, losses = seen.steps.get(step, []), seen.losses.get(loss, [])
    if not steps or not losses or losses[0] > steps[0] or abs(len(steps) - len(losses)) > 1:
        return False
    done = sum(_DONE.search(lines[at]) is not None for at in steps)
    return 2 * done > len(steps) or (whole and steps[-1] > losses[-1] and len(seen.early) > 1)


def is_told(at: Sequence[int], lines: Sequence[str], sifted: bool = False) -> bool:
    """Return whether these lines are a log's: close enough together, and not examples within source code or prose.

    Args:
        at: where the rows are; what stands before the first does not matter, it may be the program itself.
        lines: of the log's beginning.
        sifted: whether these are only those that may say something.
    """
    if not at:
        return False
    after = lines[at[0] : LOOK_AT]
    code = sum(2 if line.startswith("```") else 1 for line in after if _CODE.match(line))
    if code >= 2 and 10 * code >= len(at):
        return False
    return len(at) >= 10 or (not sifted and 20 * len(at) >= len(after)) or _is_alike(at, lines)


def _is_alike(at: Sequence[int], lines: Sequence[str]) -> bool:
    """Return whether a few rows among much else are written alike, by a program and in no text."""
    rows = [lines[i] for i in at]
    if len(rows) < FEWEST or any(line.startswith(_QUOTED) for line in rows):
        return False
    if any(_CODE.match(line) for line in lines[:LOOK_AT]):
        return False
    shapes = [" ".join(_FIGURE.sub("#", line.lower()).split()) for line in rows]
    return 5 * max(map(shapes.count, set(shapes))) >= 4 * len(shapes)
