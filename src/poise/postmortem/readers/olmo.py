"""Console output of OLMo-core and of OLMo before it: a step in brackets, its metrics on the lines below.

    2025-01-01 00:00:00.000  host:0  olmo_core.train:68  INFO  [step=10/1000,epoch=1,eta=3h]
        train/CE loss=2.345
        optim/total grad norm=0.412

``[eval=..,step=..]`` and ``[eval_step=..]`` are no steps. Metrics below anything else are an evaluation's; of its
losses the first set's is ``val_loss``, the rest keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from poise.postmortem.readers.form import is_told
from poise.postmortem.readers.freetext import NUMBER
from poise.postmortem.readers.names import LOSS, LR, STEP, VAL_LOSS
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source

FORMAT = "olmo"
LOOKS_FOR = "OLMo or OLMo-core output ('[step=10/1000,epoch=1]' above 'train/CE loss=2.345')"

LOOK_AT = 50_000
LONGEST = 2000

_STEP = re.compile(r"\[step=(\d[\d,]{0,14})/([\d,]{1,15}|\?{3})(?:, ?(?:epoch|eta)=[^\]]{0,60})?\]")
_METRIC = re.compile(
    rf"(?:^|[\sZ\]])([A-Za-z][\w\-.]{{0,60}}(?:[/ ](?=\S)[\w\-.*]{{1,60}}){{0,6}}(?: \([^()=]{{1,40}}\))?)"
    rf"=({NUMBER})([KMBTPE])?$"
)
_STAMP = re.compile(r"(?:\[[^\]]{0,40}\]:?\s+|\d{4}-\d\d-\d\d[T ][\d:.,]{5,30}Z?\s+|\d{1,5}:\s+){1,3}")
_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_TRAIN = ("train/", "optim/", "throughput/", "system/", "System/", "gpu_memory/", "checkpoint/")
_CALLED = {"train/CrossEntropyLoss": LOSS, "optim/learning_rate_group0": LR, "optim/learning_rate": LR}
_LOADED = ("Checkpoint successfully loaded", "Will resume training from step", "Loading checkpoint from ")
_BEGINS = ("Training for ", "Starting training...", "CLI environment prepared")
_BATCH = re.compile(
    r"\b(global_batch_size|global_train_batch_size|sequence_length|max_sequence_length)['\"]?[=:] ?(\d+)"
)


def sniff(source: Source) -> float:
    """Return 0.9 when steps in brackets have training metrics below."""
    lines = source.telling[:LOOK_AT]
    at = [i for i, line in enumerate(lines) if "[step=" in line and _STEP.search(line[-LONGEST:])]
    below = (line for i in at[:200] for line in lines[i : i + 4])
    metrics = any("train/" in line and (found := _metric(line)) and found[0].startswith("train/") for line in below)
    return 0.9 if metrics and is_told(at, lines, source.sifted) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield one row a step, and one an evaluation."""
    reader = _Reader(source)
    for line in source.lines():
        yield from reader.line(line)
    yield from reader.flush()


class _Reader:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._step = -1.0
        self._row: Row = {}
        self._seen = self._loaded = self._begun = False
        self._first_set = ""

    def line(self, line: str) -> Iterator[Item]:
        """Take in one line; yield what it ends."""
        if "[step=" in line and (match := _STEP.search(line[-LONGEST:])):
            step = float(match[1].replace(",", ""))
            if step != self._step:
                yield from self.flush()
                yield from self._restart(step)
            self._step = step
            if match[2].replace(",", "").isdigit():
                self._source.settings.setdefault("max_steps", match[2].replace(",", ""))
        elif "=" in line and (found := _metric(line)):
            name, value = found
            if self._step >= 0 and "/" in name:
                self._row.setdefault(self._called(name), value)
            elif self._step >= 0 and self._is_loss(name):
                self._row.setdefault(self._called(f"eval/{name}"), value)
        elif any(mark in line for mark in _LOADED):
            self._loaded = True
        elif any(mark in line for mark in _BEGINS):
            self._begun = True
        if not self._seen and ("batch_size" in line or "sequence_length" in line):
            for key, value in _BATCH.findall(line[:100_000]):
                self._source.settings.setdefault(key, value)

    def flush(self) -> Iterator[Row]:
        """Yield what is known of the present step."""
        if self._row:
            yield {STEP: self._step} | self._row
        self._row = {}

    def _restart(self, step: float) -> Iterator[Item]:
        if (self._seen and (self._begun or self._loaded)) or (self._loaded and step > 1):
            yield RESTARTED
        self._seen, self._begun, self._loaded = True, False, False

    def _called(self, name: str) -> str:
        if name.startswith(_TRAIN):
            return _CALLED.get(name, name)
        if self._is_loss(name):
            self._first_set = self._first_set or name
            if name == self._first_set:
                self._source.notes.add(f"'{name}' is taken as val_loss, being the first evaluation's")
                return VAL_LOSS
        return name if name.startswith("eval/") else f"eval/{name}"

    def _is_loss(self, name: str) -> bool:
        return name.endswith(("CE loss", "CrossEntropyLoss"))


def _metric(line: str) -> tuple[str, float] | None:
    """Return the metric of a line that holds nothing else, but for a stamp before it."""
    if len(line) > LONGEST:
        return None
    if stamp := _STAMP.match(line):
        line = line[stamp.end() :]
    match = _METRIC.match(line)
    return None if match is None else (match[1], float(match[2].replace(",", "")) * _SCALE[match[3] or ""])
