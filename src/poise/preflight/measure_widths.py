"""The coordinate check on a configuration's family: which activations do not keep their size over three widths?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from poise.preflight.measure_family import Family
from poise.studies.coord_check import POSITIONS, VOCAB, Plan, Tap, trace
from poise.studies.stats import Interval

WIDTHS: Final = (64, 128, 256)
BLOCKS: Final = 2
STEPS: Final = 4
SEEDS: Final = 2


@dataclass(frozen=True, slots=True)
class Widths:
    """What was found, at learning rate ``lr``.

    Attributes:
        widths: compared.
        lr: of AdamW.
        steps, seeds: of training, and of starting values and batches.
        taps: by name: slopes of log mean |x| against log width, before the first step, behind the last, and of what
            the steps moved.
    """

    widths: tuple[int, ...]
    lr: float
    steps: int
    seeds: int
    taps: dict[str, Tap]

    def growing(self, which: str) -> list[str]:
        """Return the taps whose ``verdict`` or ``change_verdict`` is that they grow, or are no numbers."""
        return [name for name, tap in self.taps.items() if getattr(tap, which) in ("grows", "not finite")]

    def steepest(self, which: str) -> tuple[str, Interval] | None:
        """Return the tap with the largest ``slope``, ``start`` or ``change``; nothing where none has one."""
        found = [(name, value) for name, tap in self.taps.items() if (value := getattr(tap, which)) is not None]
        return max(found, key=lambda pair: pair[1].mean) if found else None


def widths(
    family: Family, lr: float, until: float, *, sizes: Sequence[int] = WIDTHS, seeds: int = SEEDS, steps: int = STEPS
) -> Widths | None:
    """Train models of several widths a few steps on one batch each; ``None`` where time was up before the end.

    Args:
        family: of the models; all have ``BLOCKS`` blocks.
        lr: of AdamW, the configured one.
        until: value of ``time.perf_counter`` at which to stop.
        sizes: the widths, ascending.
        seeds: of starting values and batches.
        steps: of training.

    Raises:
        UserError: methods that do not go together.
    """
    plan = Plan({"configured": ()}, sizes=tuple(sizes), other=BLOCKS, steps=steps, seeds=seeds, lr=lr)
    values: dict[str, dict[int, list[list[float]]]] = {}
    changes: dict[str, dict[int, list[list[float]]]] = {}
    for size in plan.sizes:
        spec = family.spec(size, vocab_size=VOCAB, seq_len=POSITIONS, depth=BLOCKS)
        for seed in range(seeds):
            if time.perf_counter() >= until:
                return None
            for tap, rows in trace(spec, plan, seed).items():
                for table, column in ((values, 0), (changes, 1)):
                    table.setdefault(tap, {}).setdefault(size, []).append([row[column] for row in rows])
    return Widths(plan.sizes, lr, steps, seeds, {tap: Tap(values[tap], changes[tap]) for tap in values})
