"""Readings of one rank made into readings of all."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean


def over_ranks(readings: Mapping[str, float]) -> dict[str, float]:
    """Return the same readings on every rank: the largest of ``..._max...``, the mean of all others.

    For the rare readings that are taken on alarm: it pickles and waits. A reading that some rank could not take is
    that of the others. Every rank has to call this.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return dict(readings)
    every: list[dict[str, float]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(every, dict(readings))
    names = sorted({name for one in every for name in one})
    values = {name: [one[name] for one in every if name in one] for name in names}
    return {name: max(v) if "_max" in name else fmean(v) for name, v in values.items()}
