"""The stage that gives each document the name of the first rule it fails, and what it would drop before it does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import record
from poise.data.clean import presets
from poise.data.clean.features import FEATURES, SCORES, Score
from poise.data.clean.presets import Rule


@dataclass(frozen=True, slots=True)
class Filter:
    """Stage: gives rows without a reason ``<preset>.<rule>``, the first rule of the preset they fail.

    It reads the column ``scores``, and adds it (``Score``) if it is missing.

    Attributes:
        preset: one of ``presets.PRESETS``; or, with ``rules``, any name for them.
        rules: rules of your own instead of the preset's.
    """

    preset: str
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if not self.rules:
            object.__setattr__(self, "rules", presets.rules(self.preset))
        elif self.preset in presets.PRESETS and self.rules != presets.PRESETS[self.preset]:
            raise UserError(f"filter preset '{self.preset}' has rules of its own; give yours another name")
        names = [rule.name for rule in self.rules]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"filter '{self.preset}' has two rules '{twice}'; rename one")

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        batch = _scored(batch)
        for rule, failed_D in zip(self.rules, self._failed(batch), strict=True):
            batch = record.drop(batch, failed_D, f"{self.preset}.{rule.name}")
        return batch

    def would_drop(self, batch: pa.RecordBatch) -> dict[str, tuple[int, int]]:
        """Return what applying the filter would drop: documents and bytes of text by reason, nothing left out.

        Rows that have a reason already are not counted. The batch stays as it is.
        """
        batch = _scored(batch)
        left_D = record.kept(batch)
        size_D = np.asarray(pc.binary_length(batch.column("text"))).astype(np.int64)
        counts: dict[str, tuple[int, int]] = {}
        for rule, failed_D in zip(self.rules, self._failed(batch), strict=True):
            taken_D = left_D & failed_D
            left_D &= ~failed_D
            counts[f"{self.preset}.{rule.name}"] = (int(taken_D.sum()), int(size_D[taken_D].sum()))
        return counts

    def _failed(self, batch: pa.RecordBatch) -> list[NDArray[np.bool_]]:
        """Return, for each rule, which documents fail it, whatever the other rules say."""
        scores = batch.column(SCORES)
        return [fails(rule, np.asarray(scores.field(rule.feature))) for rule in self.rules]


def fails(rule: Rule, value_D: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which values are outside of the rule's range, (D,)."""
    failed_D = np.zeros(len(value_D), np.bool_)
    # The limits as float32 too: a share of exactly 0.3 is not over a limit of 0.3.
    if rule.at_least is not None:
        failed_D |= value_D < np.float32(rule.at_least)
    if rule.at_most is not None:
        failed_D |= value_D > np.float32(rule.at_most)
    return failed_D


def _scored(batch: pa.RecordBatch) -> pa.RecordBatch:
    if batch.schema.get_field_index(SCORES) < 0:
        return Score()(batch)
    assert [field.name for field in batch.column(SCORES).type] == list(FEATURES)
    return batch
