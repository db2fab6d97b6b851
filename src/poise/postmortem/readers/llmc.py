"""llm.c: what it prints, and its ``main.log``.

The program prints a step when it is done, counted from 1; ``val loss`` without a step is measured between two steps and
belongs to the one before it. ``main.log`` says ``s:STEP`` with ``trl`` (training loss), ``tel`` (validation loss) or
``eval`` (share of HellaSwag solved). Older versions and the PyTorch twin print ``train loss``, and a colon for the bar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from poise.postmortem.readers.names import GRAD_NORM, LOSS, LR, STEP, VAL_LOSS
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source, number

FORMAT = "llmc"
LOOKS_FOR = "llm.c lines like 'step 1/750 | loss 11.01 (+nanz)| norm 15.3' or its main.log"

HELLASWAG = "hellaswag"

_PREFIX = r"(?:\[?[a-zA-Z]{0,12} ?\d{1,6}\]?: )?"
_STEP = re.compile(rf"{_PREFIX}step +(\d{{1,15}})(?:/\d{{1,15}})? ?[|:] ?(?=(?:train )?loss )")
_READING = re.compile(r"(?:train )?(loss|norm|lr) {1,12}([-+.\w]{1,40})")
_VAL = re.compile(rf"{_PREFIX}val loss ([-+.\w]{{1,40}})$")
_MAIN = re.compile(r"s:(\d{1,15}) (?=(?:trl|tel|eval):)")
_MAIN_READING = re.compile(r"(trl|tel|eval|lr|norm):([-+.\w]{1,40})")
_HELLASWAG = re.compile(r"HellaSwag: \d{1,9}/\d{1,9} = ([.\d]{1,20})$")
_PARAMETER = re.compile(r"\| ([\w .()/*-]{1,60}?) +\| ([^|]{1,200}?) *\|$")
_HEADER = ("Parameter", "Value")
_NAMES = {
    "loss": LOSS,
    "norm": GRAD_NORM,
    "lr": LR,
    "trl": LOSS,
    "tel": VAL_LOSS,
    "eval": HELLASWAG,
}


def sniff(source: Source) -> float:
    """Return 0.9 for two lines of steps; 0.98 for ``main.log``, which holds nothing else."""
    first = source.head_lines[:20]
    if first and all(_MAIN.match(line) for line in first[: max(len(first) - 1, 1)]):  # the last may be cut off
        return 0.98
    found = 0
    for line in source.head_lines:
        found += _is_step(line) or _MAIN.match(line) is not None
        if found == 2:
            return 0.9
    return 0.6 * found


def _is_step(line: str) -> bool:
    """Return whether only llm.c writes so: a z-score behind the loss, or the time behind its ``train loss``."""
    return _STEP.match(line) is not None and ("z)" in line or ("train loss" in line and " ms" in line))


def read(source: Source) -> Iterator[Item]:
    """Yield one row a step, and one an evaluation."""
    last: int | None = None  # step printed last since the program began
    waiting: list[Row] = []  # evaluations before the first step
    decimals = 0
    for line in source.lines():
        row, step = _row_of(line)
        if step is not None:
            if source.at_end and _cut_off(line, decimals):
                source.bad_line("line left out")
                continue
            decimals = _decimals(line)
            for early in waiting:
                yield early | {STEP: float(max(step - 1, 0))}
            waiting.clear()
            last = step if LOSS in row else last
            yield row | {STEP: float(step)}
        elif row and last is not None:
            yield row | {STEP: float(last)}
        elif row:
            waiting = [*waiting[-9:], row]
        elif line.startswith("|") and (found := _PARAMETER.match(line)):
            if found.groups() == _HEADER and last is not None:
                yield RESTARTED
                last = None
            elif found.groups() != _HEADER:
                source.settings[found[1]] = found[2]
                if found[1] == "total batch size":  # llm.c counts it in tokens
                    source.settings["tokens_per_step"] = found[2]
    for early in waiting:
        yield early | {STEP: 0.0}


def _row_of(line: str) -> tuple[Row, int | None]:
    """Return the readings of a line and its step, as far as it has any."""
    found = _STEP.match(line)
    if found:
        row = _readings(_READING.findall(line, found.end()))
        return (row, int(found[1])) if LOSS in row else ({}, None)
    found = _MAIN.match(line)
    if found:
        row = _readings(_MAIN_READING.findall(line, found.end()))
        return (row, int(found[1])) if row else ({}, None)
    found = _VAL.match(line)
    if found:
        return _readings([("tel", found[1])]), None
    found = _HELLASWAG.search(line[-200:])
    return (_readings([("eval", found[1])]) if found else {}), None


def _readings(pairs: list[tuple[str, str]]) -> Row:
    row: Row = {}
    for name, text in pairs:
        value = number(text)
        if value is not None:
            row.setdefault(_NAMES[name], value)
    return row


def _decimals(line: str) -> int:
    """Return how many digits follow the point in a number that ends the line; 0 where none does."""
    found = re.search(r"\.(\d{1,12})$", line[-40:])
    return len(found[1]) if found else 0


def _cut_off(line: str, decimals: int) -> bool:
    """Return whether the file's last line ends within a number, judged by the lines before."""
    return bool(re.search(r"[\d.]$", line)) and _decimals(line) < decimals
