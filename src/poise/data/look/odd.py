"""What is odd about a document, among the documents it was trained with: for the question asked after a spike.

``quantiles`` says how a corpus is; it is written into the manifest when text is prepared. ``odd`` compares one document
with it. Odd is not guilty: of ten thousand documents ten have a score in the highest thousandth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from poise.data.clean.features import ABOUT

AT: Final = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
"""The quantiles that are kept."""

ROWS: Final = 100_000
"""Documents that the quantiles are taken from, at even distances."""

LEAST: Final = 1_000
"""Documents from which a thousandth means anything; in a smaller text a hundredth is looked at."""

_NUMBERS: Final = ("token_length",)

_SIZES: Final = ("characters", "words")
"""Scores that only say how long a document is; its tokens say that."""


def quantiles(table: pa.Table) -> dict[str, list[float]]:
    """Return the values at ``AT`` of every number known about the documents of a split; empty without documents."""
    if table.num_rows == 0:
        return {}
    step = -(-table.num_rows // ROWS)
    chosen, at = [], 0
    for batch in table.select([*_NUMBERS, "scores"]).to_batches():  # a batch at a time: a large table stays on disk
        rows = np.arange(-at % step, batch.num_rows, step)
        chosen.append(batch.take(pa.array(rows)))
        at += batch.num_rows
    some = pa.Table.from_batches(chosen)
    columns = {name: some[name] for name in _NUMBERS}
    scores = some["scores"].combine_chunks()
    if scores.null_count < len(scores):
        columns |= {name: scores.drop_null().field(name) for name in scores.type.names if name not in _SIZES}
    found = {name: np.asarray(column.drop_null(), np.float64) for name, column in columns.items()}
    return {name: [float(f"{q:.6g}") for q in np.quantile(v, AT)] for name, v in found.items() if len(v)}


def odd(facts: Mapping[str, Any], known: Mapping[str, list[float]], documents: int, repeats: int) -> list[str]:
    """Return in words what is odd about a document, the plainest first; empty where nothing is.

    Args:
        facts: its row in ``docs.arrow``.
        known: the corpus' ``quantiles``.
        documents: how many documents the corpus has.
        repeats: how often an n-gram has to repeat itself to be odd (``periodic.threshold``).
    """
    found: list[str] = []
    if (count := facts.get("repeat_count") or 0) >= repeats:
        found.append(f"an n-gram of it repeats itself {count:,} times ({facts['repeat_tokens']:,} tokens)")
    if facts.get("replaced_bytes"):
        found.append(f"{facts['replaced_bytes']:,} bytes of it were not readable text")
    if (size := facts.get("cluster_size") or 1) > 1:
        found.append(f"it had {size - 1:,} near or equal {'copy' if size == 2 else 'copies'}")
    low, high = (AT.index(0.001), AT.index(0.999)) if documents >= LEAST else (AT.index(0.01), AT.index(0.99))
    values = {**facts, **(facts.get("scores") or {})}
    for name, at in known.items():
        value = values.get(name)
        if value is None:
            continue
        about = ABOUT.get(name, name.replace("_", " "))
        if value > at[high]:
            found.append(f"{name} {value:.4g} is above {AT[high]:.1%} of the documents ({about})")
        elif value < at[low]:
            found.append(f"{name} {value:.4g} is below {1 - AT[low]:.1%} of the documents ({about})")
    return found
