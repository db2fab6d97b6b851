"""MLPerf training logs: lines of ``:::MLLOG`` and a JSON record, among anything else.

The loss is in the value of ``tracked_stats`` (``reduced_train_loss``), or the value of ``train_loss``. Where it stands
is told in samples (``samples_count``, in older logs ``step``); divided by the global batch size they are optimizer
steps. For benchmarks of language models ``eval_accuracy`` is the validation loss.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from poise.postmortem.readers.names import GRAD_NORM, LOSS, LR, STEP, VAL_LOSS, rank
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source, number

FORMAT = "mllog"
LOOKS_FOR = "MLPerf lines of :::MLLOG"

TOKEN = ":::MLLOG"
SAMPLES_COUNT = "samples_count"
MAX_NAMES = 10_000

_LANGUAGE_MODELS = re.compile("llama|gpt|llm|mixtral|deepseek|qwen|moe", re.IGNORECASE)
_EVALUATIONS = ("eval_accuracy", "eval_loss", "validation_loss")
_NO_SETTINGS = re.compile("cache_clear|submission_(?!benchmark)|.*_(?:start|stop|end)$|weights_initialization")


def sniff(source: Source) -> float:
    """Return 1 for a line whose record can be read."""
    for line in source.head_lines:
        if TOKEN in line and _record(line) is not None:
            return 1.0
    return 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield one row a loss, and one an evaluation."""
    where = _Where(source)
    rows = 0  # since the run began
    of_training: dict[str, bool] = {}  # names met so far: does a record with it tell of the training?
    for line in source.lines():
        if TOKEN not in line:
            continue
        record = _record(line)
        if record is None:
            source.bad_line(f"{TOKEN} line that cannot be read left out")
            continue
        key, value, metadata = record
        if key != "tracked_stats":
            where.learn(metadata)
        if key in ("run_start", "init_start"):
            if rows:
                yield RESTARTED
            rows = 0
        elif key in ("tracked_stats", "train_loss", *_EVALUATIONS):
            row = _row(key, value, metadata, source, of_training)
            if row:
                where.learn(metadata)
            if row and where.place(metadata, row, key in _EVALUATIONS):
                rows += 1
                yield row
        elif isinstance(value, int | float | str) and not isinstance(value, bool) and not _NO_SETTINGS.match(key):
            source.settings[key] = str(value)
            where.settle()


def _record(line: str) -> tuple[str, Any, dict[str, Any]] | None:
    """Return (key, value, metadata) of a line; ``None`` where it is damaged."""
    start = line.find("{", line.find(TOKEN))
    if start < 0:
        return None
    try:
        record, _ = json.JSONDecoder().raw_decode(line, start)
    except (ValueError, RecursionError):
        return None
    key = record.get("key")
    metadata = record.get("metadata")
    return (key, record.get("value"), metadata if isinstance(metadata, dict) else {}) if isinstance(key, str) else None


def _row(key: str, value: Any, metadata: dict[str, Any], source: Source, of_training: dict[str, bool]) -> Row:
    """Return what a record says of the training, without its place."""
    if key == "tracked_stats":
        row = {name: x for name, v in value.items() if (x := number(v)) is not None} if isinstance(value, dict) else {}
        for name in row:
            if name not in of_training and len(of_training) < MAX_NAMES:
                of_training[name] = any(rank(meaning, name) is not None for meaning in (LOSS, GRAD_NORM, LR, VAL_LOSS))
        trains = any(of_training.get(name) for name in row)
        return {name: x for name, x in row.items() if name not in (STEP, SAMPLES_COUNT)} if trains else {}
    x = number(value)
    if x is None:
        return {}
    if key == "train_loss":
        further = {
            name: y for name in (LR, GRAD_NORM, "learning_rate") if (y := number(metadata.get(name))) is not None
        }
        return {LOSS: x} | further
    is_loss = key != "eval_accuracy" or _LANGUAGE_MODELS.search(source.settings.get("submission_benchmark", ""))
    if is_loss and key == "eval_accuracy":
        source.notes.add("eval_accuracy is the validation loss in this benchmark")
    return {VAL_LOSS if is_loss else key: x}


class _Where:
    """Finds the step of a record."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._batch = 0.0
        self._length = 0.0
        self._steps_are_steps = False  # the metadata's ``step`` is seen to count optimizer steps
        self._in_samples: bool | None = None  # the samples do not divide by the batch size

    def settle(self) -> None:
        """Take in the settings known so far."""
        settings = self._source.settings
        self._batch = _positive(settings.get("global_batch_size"))
        self._length = _positive(settings.get("max_sequence_length"))
        if self._batch and self._length and self._batch * self._length < 2.0**53:
            settings["tokens_per_step"] = str(int(self._batch * self._length))

    def learn(self, metadata: dict[str, Any]) -> None:
        """See from a record with both counts what ``step`` counts."""
        samples, step = _positive(metadata.get(SAMPLES_COUNT)), _positive(metadata.get("step"))
        if samples and step and self._batch > 1.0:
            self._steps_are_steps = self._steps_are_steps or abs(samples / step / self._batch - 1.0) < 0.2

    def place(self, metadata: dict[str, Any], row: Row, evaluation: bool) -> bool:
        """Add the record's place to the row; return whether it has one."""
        samples = number(metadata.get(SAMPLES_COUNT))
        step = number(metadata.get("step"))
        tokens = number(metadata.get("epoch_num")) if evaluation else None
        if samples is None and step is not None:
            if self._steps_are_steps or not self._batch:
                row[STEP] = step
                return math.isfinite(step)
            samples = step
            self._source.notes.add("the metadata's step is taken as a count of samples")
        if samples is None and tokens is not None and self._batch:  # older logs count the epoch in samples or tokens
            per_step = self._batch * (self._length or 1.0)
            samples = tokens / (per_step if tokens % per_step == 0 else self._batch) * self._batch
        if samples is None or not math.isfinite(samples):
            return False
        return self._divide(samples, row)

    def _divide(self, samples: float, row: Row) -> bool:
        if self._in_samples is None:
            self._in_samples = not self._batch or samples % self._batch != 0
            if not self._in_samples and self._batch > 1.0:
                self._source.notes.add(f"the steps are counts of samples divided by the batch size {self._batch:g}")
        if self._in_samples:
            row[SAMPLES_COUNT] = samples
        else:
            row |= {STEP: samples // self._batch, SAMPLES_COUNT: samples}
        return True


def _positive(value: Any) -> float:
    """Return a number above 0; 0 for anything else."""
    x = number(value)
    return x if x is not None and 0.0 < x < 2.0**53 else 0.0
