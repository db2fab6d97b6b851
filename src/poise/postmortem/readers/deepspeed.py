"""Standard output of DeepSpeed's engines.

    [Rank 0] step=10, skipped=0, lr=[0.001], mom=[(0.9, 0.95)]
    steps: 10 loss: 2.3456 iter time (s): 1.200 samples/sec: 34.5
    [deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 65536, reducing to 32768

Only the pipeline engine prints losses; a program that prints its own beside these lines is left to the reader of any
standard output. What was skipped, and the loss scale since, goes to the next line with a step, because the message of
an overflow has none. ``skipped`` counts the steps skipped since the row before; DeepSpeed prints their sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from poise.postmortem.readers.source import Item, Row, Source, number

FORMAT = "deepspeed"
LOOKS_FOR = "DeepSpeed's lines like 'steps: 10 loss: 2.5 iter time (s): 1.2'"

NUMBER = r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,4})?|nan|inf)"

_STEPS = re.compile(rf"\bsteps: (\d{{1,15}}) loss: ({NUMBER})(?!\S)(.{{0,400}})")
_ENGINE = re.compile(rf"\bstep=(\d{{1,15}}), skipped=(\d{{1,15}}), lr=\[({NUMBER})[,\]]")
_PAIR = re.compile(rf"([A-Za-z][\w/]{{0,30}}(?: [\w/]{{1,20}}){{0,2}})(?: \(s\))?: ({NUMBER})(?!\S)")
_OVERFLOW = re.compile(r"(?:OVERFLOW! Rank \d{1,9}|Overflow detected\.) Skipping step")
_SCALE = re.compile(rf"(?:[Rr]educing to|[Rr]educing (?:dynamic )?loss scale(?: from {NUMBER})? to) ({NUMBER})")
_RAISED = re.compile(rf"Increasing dynamic loss scale from {NUMBER} to ({NUMBER})")
_QUOTES = frozenset("\"'`#")
_BEFORE = frozenset("{(,=")


def sniff(source: Source) -> float:
    """Return 0.9 for the lines of the pipeline engine; less when only steps and rates are told."""
    best = 0.0
    for line in source.head_lines:
        if "steps: " in line and (found := _STEPS.search(line)) and "iter time" in found[3]:
            if not _QUOTES & set(line[: found.start()]):
                return 0.9
        elif "skipped=" in line and (found := _ENGINE.search(line)) and not _QUOTES & set(line[: found.start()]):
            best = 0.2
    return best


def read(source: Source) -> Iterator[Item]:
    """Yield one row a step that is printed, by either engine."""
    engine = _Engine()
    for line in source.lines():
        if found := _STEPS.search(line):
            row: Row = {name: float(value) for name, value in _PAIR.findall(found[3])}
            yield engine.row(int(found[1])) | row | {"loss": _float(found[2])}
        elif found := _ENGINE.search(line):
            yield engine.row(int(found[1]), int(found[2])) | {"lr": _float(found[3])}
        elif _OVERFLOW.search(line):
            engine.overflow(_SCALE.search(line))
        elif found := _RAISED.search(line):
            engine.scale = _float(found[1])


class _Engine:
    """What is known between two printed steps."""

    def __init__(self) -> None:
        self.scale: float | None = None
        self._overflows = 0
        self._sum: int | None = None
        self._step = -1

    def overflow(self, scale: re.Match[str] | None) -> None:
        """Take note of a skipped step."""
        self._overflows += 1
        if scale is not None:
            self.scale = _float(scale[1])

    def row(self, step: int, skipped_so_far: int | None = None) -> Row:
        """Return the row of a step, with what has happened since the one before."""
        row: Row = {"step": float(step)}
        skipped = self._overflows
        if skipped_so_far is not None:
            if self._sum is not None and skipped_so_far >= self._sum and step > self._step:
                skipped = max(skipped, skipped_so_far - self._sum)
            self._sum = skipped_so_far
        if step != self._step or skipped:
            row["skipped"] = float(skipped)
        if self.scale is not None:
            row["loss_scale"] = self.scale
        self._overflows, self._step = 0, step
        return row


def _float(text: str) -> float:
    value = number(text)
    return float("nan") if value is None else value
