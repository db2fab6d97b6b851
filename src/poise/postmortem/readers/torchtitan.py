"""torchtitan's standard output.

    [rank0]:[titan] 2025-01-01 00:00:00,000 - root - INFO - step: 10  loss:  8.0491  grad_norm:  1.2  memory: ...

``validate step:`` lines are validation losses. Settings come from the line of the trainer's batch sizes and from the
dump of the job's configuration. Each ``Training starts at step N`` but a first with N = 1 is a restart. Its files of
two columns (step, loss) are tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from poise.postmortem.readers.form import is_told
from poise.postmortem.readers.freetext import pairs, whole
from poise.postmortem.readers.names import STEP, VAL_LOSS
from poise.postmortem.readers.ranks import Ranks, rank_of
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source

FORMAT = "torchtitan"
LOOKS_FOR = "torchtitan output ('step: 10  loss: 8.0491  ...  tps: 1,234')"

LOOK_AT = 50_000
ENOUGH = 1000
LONGEST = 4000

_POINT = re.compile(r"(?:^|[\]\s])(validate )?step: {0,9}(\d{1,12}) {1,4}(?=[A-Za-z_])")
_MARKS = ("tps:", "memory:", "wps:", "mfu:")
_STARTS = re.compile(r"Training starts at step (\d{1,12})\b")
_TOLD = re.compile(
    r"(local batch size|global batch size|sequence length|maximum context length|gradient accumulation steps"
    r"|total steps|warmup) (\d{1,12})\b|(\d{1,15}) (tokens per train step)"
)
_CALLED = {
    "sequence length": "seq_len",
    "maximum context length": "seq_len",
    "total steps": "steps",
    "warmup": "warmup_steps",
    "tokens per train step": "tokens_per_step",
}
_DUMPED = re.compile(r'"([\w.\-]{1,60})": ("[^"]{0,200}"|[-+\w.]{1,40}|\{\}?|\[[^\]]{0,100}\]?),?$')
_MOST_DUMPED = 1000


def sniff(source: Source) -> float:
    """Return 0.9 when there are lines of a step with torchtitan's figures of throughput or memory."""
    lines = source.telling[:LOOK_AT]
    at = list(islice((i for i, line in enumerate(lines) if _is_point(line)), ENOUGH))
    lines = lines[: at[-1] + 1] if len(at) == ENOUGH else lines
    return 0.9 if is_told(at, lines, source.sifted) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield one row a step, by any rank."""
    seen = restarted = False
    dump = _Dump(source)
    told = ((line, _point(line)) for line in source.telling[:LOOK_AT] if _is_point(line))
    ranks = Ranks(islice(((rank_of(line), row[STEP]) for line, row in told if row is not None), ENOUGH))
    ranks.note(source.notes)
    for raw in source.lines():
        if ranks.skips(raw):
            continue
        line = whole(raw, source)
        if "step: " in line and (row := _point(line)) is not None:
            if restarted:
                yield RESTARTED
                restarted = False
            seen = True
            if VAL_LOSS in row or not ranks.repeats(row[STEP]):
                yield row
        elif "Training starts at step" in line or "initialized with" in line:
            match = _STARTS.search(line)
            restarted |= match is not None and (seen or int(match[1]) > 1)
            _batch(line, source)
        else:
            dump.line(line)


def _is_point(line: str) -> bool:
    return "step: " in line and any(mark in line for mark in _MARKS) and "loss" in line and _point(line) is not None


def _point(line: str) -> Row | None:
    """Return the numbers of a line of a step."""
    if len(line) > LONGEST or (match := _POINT.search(line)) is None:
        return None
    validation = match[1] is not None
    row: Row = {STEP: float(match[2])}
    for name, value, _, _ in pairs(line[match.end() :]):
        if validation:
            name = VAL_LOSS if name == "loss" else f"validation/{name}"
        row.setdefault(name, value)
    return row if len(row) > 1 else None


def _batch(line: str, source: Source) -> None:
    """Note the batch sizes that the trainer tells."""
    for name, value, value_before, name_after in _TOLD.findall(line[:LONGEST]):
        key = name or name_after
        source.settings[_CALLED.get(key, key.replace(" ", "_"))] = value or value_before
    sizes = source.settings.get("global_batch_size", ""), source.settings.get("seq_len", "")
    if all(size.isdigit() for size in sizes):
        source.settings["tokens_per_step"] = str(int(sizes[0]) * int(sizes[1]))


class _Dump:
    """The job's configuration as indented JSON among the lines; its scalars become settings."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._inside = False
        self._taken = 0
        self._path: list[str] = []

    def line(self, line: str) -> None:
        """Take in one line."""
        if not self._inside:
            if "Running with " in line[:200] and line.endswith("{"):
                self._inside, self._path = True, []
            return
        self._taken += 1
        bare = line.rsplit("]:", 1)[-1].strip()
        if self._taken > _MOST_DUMPED:
            self._inside = False
        elif match := _DUMPED.search(bare):
            name, value = match.groups()
            if value == "{":
                self._path.append(name)
            elif value[0] not in "{[" and len(self._path) < 8:
                self._source.settings[".".join([*self._path, name])] = value.strip('"')
        elif bare in ("}", "},"):
            self._inside = bool(self._path)
            del self._path[-1:]
