"""Standard output of nanotron: ``iteration: 100 / 5000 | consumed_tokens: 1.05M | lm_loss: 3.4 | grad_norm: 0.5``.

Numbers are written with three digits and a suffix for thousands, so tokens are coarse. Whoever writes a line (the first
rank of the last pipeline stage) is told in brackets before it; of several the last one counts, step by step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from poise.postmortem.readers import cells
from poise.postmortem.readers.names import VAL_LOSS
from poise.postmortem.readers.source import RESTARTED, Item, Source

FORMAT = "nanotron"
LOOKS_FOR = "nanotron's lines like 'iteration: 5 / 100 | lm_loss: 2.5'"

_ROW = re.compile(r"iteration: (\d{1,15}) / (\d[\d.]{0,15}[KMBTPE]?) \|")
_VALIDATED = re.compile(r"\b[Vv]alidation[ _]loss: {0,3}([^\s|]{1,30})")
_BEGINS = "[Start training]"
_QUOTES = frozenset("\"'`#")


def sniff(source: Source) -> float:
    """Return 0.95 for a line of an iteration."""
    for line in source.head_lines:
        found = _ROW.search(line) if "iteration: " in line else None
        if found and not _QUOTES & set(line[: found.start()]) and cells.cells(line[found.end() :], suffixes=True):
            return 0.95
    return 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield the iterations, validation losses as ``val_loss``, and restarts."""
    step: float | None = None
    begun = restarted = False
    for line in source.lines():
        if "iteration: " in line and (found := _ROW.search(line)):
            row = cells.cells(line[found.end() :], whole=not source.at_end, suffixes=True)
            if not row:
                source.bad_line("iteration without a number left out")
                continue
            if restarted:
                yield RESTARTED
            begun, restarted, step = True, False, float(found[1])
            yield {"iteration": step} | row
        elif step is not None and (held_out := _VALIDATED.search(line)):
            value = cells.human(held_out[1])
            if value is not None:
                yield {"iteration": step, VAL_LOSS: value}
        elif _BEGINS in line:
            begun, restarted = False, restarted or begun
            _settings(line, source)


def _settings(line: str, source: Source) -> None:
    """Take over what the line at the start of training says: batch size, length of a sample, steps."""
    said = cells.cells(line[line.index(_BEGINS) :], whole=not source.at_end)
    for name, value in said.items():
        if value == value // 1 and abs(value) < 1e15:
            source.settings[name] = str(int(value))
    batch, length = said.get("global_batch_size", 0.0), said.get("sequence_length", 0.0)
    if 0 < batch * length < 1e15:
        source.settings["tokens_per_step"] = str(int(batch * length))
