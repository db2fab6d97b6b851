"""The demonstration: the same model, data, seed and faults, bare and guarded, beside clean runs.

Five short runs: clean with three seeds (their spread is the noise), bare with the faults, guarded with the
faults. "Bare" is what most loops are: AdamW with clipping of the global norm and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.core.errors import UserError
from poise.core.journal import read, timeline
from poise.dashboard.compare import write_comparison
from poise.studies.bare import BareAdamW
from poise.studies.inject import Fault, Injector
from poise.train.observers import Observer
from poise.train.recipe import Recipe, load
from poise.train.run import Progress, train
from poise.train.state import Run

FAULTS = (
    Fault("garbage_batch", at=90),
    Fault("high_lr", at=130, length=12, factor=100.0),
    Fault("inf_gradient", at=180),
    Fault("nan_gradient", at=205),
)
LAST = 10
"""The final loss is the mean over this many last steps."""


@dataclass(frozen=True)
class Row:
    """One run of the demonstration; losses in nats per token, ``nan`` where the run ended without one."""

    name: str
    final_loss: float
    val_loss: float
    outcome: str
    skipped: int
    rollbacks: int
    worst_loss: float


@dataclass(frozen=True)
class Demo:
    """Result: a row per run, the noise (range of the clean runs' validation losses), the picture."""

    rows: tuple[Row, ...]
    noise: float
    page: Path

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def guarded_gap(self) -> float:
        """Validation loss of the guarded run minus the clean run of the same seed."""
        return self.row("guarded").val_loss - self.row("clean").val_loss


def run_demo(
    out: Path,
    *,
    over: dict[str, Any] | None = None,
    faults: Sequence[Fault] = FAULTS,
    observer: Callable[[str], Observer] | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Run the five runs under ``out`` and write ``demo.html`` there; ``observer`` makes one for each run's name.

    Raises:
        UserError: ``out`` holds a demonstration already, or a setting cannot be.
    """
    base = load("demo", over)
    needed = max(fault.at + fault.length for fault in faults) + LAST
    if base.train.steps < needed or not base.train.eval_every:
        raise UserError(
            f"the demonstration needs train.steps of at least {needed} (here {base.train.steps}), so that every "
            f"fault strikes, and train.eval_every above 0 (here {base.train.eval_every})"
        )
    bare = base.replace("guard", enabled=False)
    plan: list[tuple[str, Recipe, Sequence[Fault]]] = [
        ("clean", base, ()),
        ("bare", bare, faults),
        ("guarded", base, faults),
        ("clean seed 1", dataclasses.replace(base, seed=base.seed + 1), ()),
        ("clean seed 2", dataclasses.replace(base, seed=base.seed + 2), ()),
    ]
    rows, folders = [], []
    for name, recipe, strikes in plan:
        folder = out / name.replace(" ", "-")
        recipe = dataclasses.replace(recipe, name=folder.name)
        train(
            recipe,
            folder,
            observers=[observer(name)] if observer else [],
            progress=progress,
            before=_prepared_for(name, strikes),
            command="poise demo",
        )
        rows.append(row_of(name, folder))
        folders.append((name, folder))
    clean = [row.val_loss for row in rows if row.name.startswith("clean")]
    page = write_comparison(
        folders[:3],
        out / "demo.html",
        "The same run, bare and guarded",
        "All faults are injected: " + "; ".join(f"batch {f.at}: {f.text}" for f in faults) + ".",
    )
    return Demo(tuple(rows), max(clean) - min(clean), page)


def _prepared_for(name: str, faults: Sequence[Fault]) -> Callable[[Run], None]:
    def before(run: Run) -> None:
        if name == "bare":
            run.optimizer = BareAdamW(run.optimizer, run.recipe.optim)  # type: ignore[assignment]
        Injector(faults).attach(run)

    return before


def row_of(name: str, folder: Path) -> Row:
    """Read a finished run's figures from its journal."""
    records = read(folder / "journal.jsonl")
    steps = [r for r in timeline(records) if r["type"] == "step"]
    losses = [r["loss"] for r in steps]
    evals = [r["loss"] for r in records if r["type"] == "eval"]
    tail = losses[-LAST:]
    final = sum(tail) / len(tail)
    end = next((r for r in reversed(records) if r["type"] == "end"), {"reason": "died"})
    outcome = end["reason"] if math.isfinite(final) else "dead: NaN"
    after_start = [x for x in losses[len(losses) // 5 :] if math.isfinite(x)]
    return Row(
        name=name,
        final_loss=final,
        val_loss=evals[-1] if evals else math.nan,
        outcome=outcome,
        skipped=sum(r.get("action") == "skip" for r in records if r["type"] == "step"),
        rollbacks=sum(r["type"] == "rollback" for r in records),
        worst_loss=max(after_start, default=math.nan),
    )


__all__ = ["FAULTS", "Demo", "Row", "run_demo"]
