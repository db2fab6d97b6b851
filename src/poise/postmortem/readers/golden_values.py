"""Golden values of Megatron's functional tests: one JSON object, each metric with its values by step.

    {"lm loss": {"start_step": 0, "end_step": 50, "step_interval": 5, "values": [10.8, 10.7]}}
    {"lm loss": {"start_step": 1, "end_step": 50, "step_interval": 5, "values": {"1": 10.8, "5": "nan"}}}
    {"lm loss": {"1": 10.8, "5": 10.7}}

``"nan"`` as a value is what the test saw where a metric was not logged at that step; of the loss it is kept as NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from poise.core.errors import UserError
from poise.postmortem.readers.names import LOSS, VAL_LOSS, rank
from poise.postmortem.readers.source import Item, Row, Source, number

FORMAT = "golden_values"
LOOKS_FOR = 'golden values like {"lm loss": {"values": {"1": 10.8, "5": 10.7}}}'

MAX_BYTES = 1 << 26
MAX_STEP = 1 << 53
_HEAD = 1 << 16


def sniff(source: Source) -> float:
    """Return 0.95 for an object whose first metrics have values by step."""
    head = source.head[:_HEAD].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not head.startswith("{"):
        return 0.0
    try:
        whole, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return _cut(head)
    if head[end:].strip():  # more follows: JSON lines, or something else
        return 0.0
    return 0.95 if isinstance(whole, dict) and _metrics(whole) else 0.0


def read(source: Source) -> Iterator[Item]:
    """Yield one row a step, from all metrics."""
    rows: dict[int, Row] = {}
    for name, values in _metrics(_parsed(source)).items():
        loss = rank(LOSS, name) is not None or rank(VAL_LOSS, name) is not None
        for step, value in values:
            if loss or value == value:
                rows.setdefault(step, {"step": float(step)})[name] = value
    for step in sorted(rows):
        yield rows[step]


def _parsed(source: Source) -> dict[str, Any]:
    text = "\n".join(_lines(source))
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f"'{source.path}' begins like golden values but is no whole JSON object (cut off?); get the file again"
        ) from None
    return whole if isinstance(whole, dict) else {}


def _lines(source: Source) -> Iterator[str]:
    size = 0
    for line in source.lines():
        size += len(line)
        if size > MAX_BYTES:
            raise UserError(
                f"'{source.path}' looks like golden values but is larger than {MAX_BYTES >> 20} MiB; "
                "write it as CSV with a header"
            )
        yield line


def _cut(head: str) -> float:
    """Return how likely the beginning of an object, longer or cut off, is one of golden values."""
    begin = head[:300]
    return 0.95 if '"step_interval"' in begin and '"values"' in begin else 0.0


def _metrics(whole: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each metric that has some, where a loss or several metrics have."""
    found = {name: points for name, metric in whole.items() if (points := _points(metric))}
    known = any(rank(LOSS, name) is not None or rank(VAL_LOSS, name) is not None for name in found)
    return found if known else {}


def _points(metric: object) -> list[tuple[int, float]]:
    if not isinstance(metric, dict):
        return []
    values = metric.get("values", metric)
    if isinstance(values, list):
        first, interval = _whole(metric.get("start_step", 0)), _whole(metric.get("step_interval", 1))
        if first is None or not interval:
            return []
        by_step: list[tuple[int | None, object]] = [(first + at * interval, x) for at, x in enumerate(values)]
    elif isinstance(values, dict):
        by_step = [(_whole(step), x) for step, x in values.items()]
        if any(step is None for step, _ in by_step):
            return []
    else:
        return []
    read = [(step, number(x)) for step, x in by_step]
    return [(step, x) for step, x in read if step is not None and x is not None]


def _whole(x: object) -> int | None:
    """Return a step: a whole number, or one as text."""
    if isinstance(x, str) and x.isascii() and x.isdigit() and len(x) < 16:
        x = int(x)
    return x if isinstance(x, int) and not isinstance(x, bool) and 0 <= x < MAX_STEP else None
