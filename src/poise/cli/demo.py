"""``poise demo``: one picture and one table that show why the tool exists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poise.cli.args import Parser, parse
from poise.cli.train import next_free

if TYPE_CHECKING:
    from poise.studies.demo import Demo


def main(words: Sequence[str]) -> int:
    """Run the demonstration and print its table."""
    parser = Parser(
        "demo",
        "Train the same small model five times: clean with three seeds (the noise), and with injected faults bare "
        "and guarded. The faults: a garbage batch, a stretch of far too high learning rate, an inf and a NaN in "
        "a gradient. Takes a few minutes on two cores.",
        "poise demo --out runs/demo",
    )
    parser.add_argument("--out", metavar="DIR", help="where the five runs go (default: the next free runs/demo)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    arguments, over = parse(parser, words)
    out = Path(arguments.out) if arguments.out else next_free(Path("runs") / "demo")

    from poise.cli.terminal import PrepareProgress, Terminal
    from poise.core.journal import to_json
    from poise.studies.demo import run_demo

    progress = PrepareProgress()
    demo = run_demo(out, over=over, observer=lambda name: Terminal(name, progress), progress=progress)
    if arguments.json:
        print(to_json({**dataclasses.asdict(demo), "page": str(demo.page)}))
    else:
        _show(demo)
    return 0


def _show(demo: Demo) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="The same model, data, seed and injected faults")
    for column in ("run", "final", "val.", "worst", "skipped", "rollbacks", "outcome"):
        table.add_column(column, justify="left" if column in ("run", "outcome") else "right", no_wrap=True)
    for row in demo.rows:
        figures = [f"{x:.3f}" for x in (row.final_loss, row.val_loss, row.worst_loss)]
        table.add_row(row.name, *figures, str(row.skipped), str(row.rollbacks), row.outcome)
    console = Console()
    console.print(table)
    bare, clean = demo.row("bare"), demo.row("clean")
    if math.isfinite(bare.val_loss):
        console.print(f"bare: validation loss {bare.val_loss - clean.val_loss:+.3f} against the clean run")
    else:
        console.print("bare: died; its weights are NaN and no later step can mend them")
    console.print(
        f"guarded: validation loss {demo.guarded_gap:+.3f} against the clean run of the same seed; "
        f"three clean seeds differ by {demo.noise:.3f}"
    )
    console.print(f"picture: {demo.page}", soft_wrap=True)
