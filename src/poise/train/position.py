"""Where a run is, and what follows from it alone: the samples of the next step, and how they are shown.

Everything here is a pure function of the position and the recipe, so that a resumed run, a replay and ``poise blame``
find the very batch again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.core.types import IGNORE, Batch
from poise.data.feed.loader import PLAIN, Loader, View
from poise.data.feed.skips import Range, after, merged
from poise.hardware.distributed import mean_over_ranks
from poise.train.recipe import Recipe


class Sound(NamedTuple):
    """A step that was sound: what it showed and what it gave.

    Attributes:
        step: its number.
        spans: its samples as ranges (first, last).
        seen: tokens seen before it.
        loss: of its first micro-batch, mean over ranks, nats.
    """

    step: int
    spans: list[Range]
    seen: int
    loss: float


@dataclass
class Position:
    """Where the run is. ``step`` steps are done; ``next_sample`` is the next one that has not been shown.

    ``lr_scale`` and ``rewarm_*`` are what the guard made of the learning rate, ``fp32_places`` what it computes in
    fp32; ``good`` is a sound step some steps ago, ``next_good`` will follow it. ``skips`` are ranges (first, last) of
    samples not to be shown; ``dropped`` are pairs (step, document): after that step the document does not count in the
    loss.
    """

    step: int = 0
    next_sample: int = 0
    tokens: int = 0
    lr_scale: float = 1.0
    rewarm_factor: float = 1.0
    rewarm_start: int = 0
    rewarm_steps: int = 0
    fp32_places: list[str] = field(default_factory=list)
    good: Sound | None = None
    next_good: Sound | None = None
    smooth: float | None = None
    val_loss: float | None = None
    val_step: int = -1
    skips: list[Range] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Position:
        """Return the position that a checkpoint holds: JSON knows neither tuples nor names of their places."""
        position = cls(**record)
        position.good, position.next_good = _sound(position.good), _sound(position.next_good)
        position.skips = _pairs(position.skips)
        position.dropped = _pairs(position.dropped)
        return position

    @property
    def documents(self) -> tuple[int, ...]:
        """The documents that do not count in the next step, in order."""
        return tuple(sorted({document for step, document in self.dropped if step <= self.step}))


def upcoming(recipe: Recipe, position: Position) -> Sequence[int]:
    """Return the samples that the next step shows if it follows on this position."""
    growing = recipe.train.batch_ramp
    count = growing.at(position.tokens) if growing else recipe.train.batch_size
    return after(position.next_sample, count, position.skips)


def last_step(recipe: Recipe, position: Position, end: int) -> int:
    """Return the last step that can be done with the samples before ``end``, if the run follows on this position."""
    skipped = [(max(a, position.next_sample), min(b, end - 1)) for a, b in merged(position.skips)]
    left = max(0, end - position.next_sample) - sum(b - a + 1 for a, b in skipped if a <= b)
    growing, step, seen = recipe.train.batch_ramp, position.step, position.tokens
    while growing and (count := growing.at(seen)) < growing.full:
        if count > left:
            return step
        step, left, seen = step + 1, left - count, seen + count * recipe.train.seq_len
    return step + left // recipe.train.batch_size


def view_at(recipe: Recipe, position: Position) -> View:
    """Return how the next step shows its samples."""
    growing, dropped = recipe.train.length_ramp, position.documents
    return View(growing.at(position.tokens) if growing else 0, dropped) if growing or dropped else PLAIN


def view_of(recipe: Recipe, position: Position, step: int, seen: int) -> View:
    """Return how ``step`` showed its samples after ``seen`` tokens; ``position`` is of that step or later."""
    return view_at(recipe, dataclasses.replace(position, step=step - 1, tokens=seen))


def micro_batches(recipe: Recipe, shown: Sequence[int], rank: int, ranks: int) -> list[Sequence[int]]:
    """Return a rank's part of a step's samples, a micro-batch at a time."""
    each = len(shown) // ranks
    size = min(recipe.train.micro_batch or each, each)
    return [shown[start : start + size] for start in range(rank * each, (rank + 1) * each, size)]


def fetch(loader: Loader, samples: Sequence[int], view: View) -> Batch:
    """Return some samples as a batch."""
    if isinstance(samples, range):
        return loader.batch(samples[0], len(samples), view)
    return loader.gather(samples, view)


def batches(
    loader: Loader, parts: Sequence[Sequence[int]], view: View, device: torch.device
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yield a rank's micro-batches of a step, each with its weight; all ranks call together.

    The weight is the number of its targets that count, divided by the mean of that over the micro-batches of all ranks:
    a mean over micro-batches with these weights is one over targets. It is ``None`` where all targets count.
    """
    feed = loader.feed
    if not (feed.mask_repeats or feed.pack == "best_fit" or view.dropped):
        yield from ((fetch(loader, part, view), None) for part in parts)
        return
    some = [fetch(loader, part, view) for part in parts]
    counts = torch.tensor([int((batch.targets != IGNORE).sum()) for batch in some], dtype=torch.float64)
    mean = mean_over_ranks(counts.mean().to(device)).clamp(min=torch.finfo(torch.float64).tiny)
    yield from zip(some, (counts.to(mean) / mean).float().unbind(), strict=True)


def weighed(value: Tensor, weight: Tensor | None) -> Tensor:
    """Return a micro-batch's mean times its weight."""
    return value if weight is None else value * weight.to(value.device)


def _sound(record: Any) -> Sound | None:
    if record is None:
        return None
    step, spans, seen, loss = record
    return Sound(int(step), _pairs(spans), int(seen), float(loss))


def _pairs(values: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in values]
