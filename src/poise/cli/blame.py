"""``poise blame``: which documents were in that step?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poise.cli.args import Parser
from poise.core.errors import UserError
from poise.core.journal import to_json

if TYPE_CHECKING:
    from poise.train.blame import Blame, Row, Tracer

EXCERPT: Final = 160
"""Characters of a row's text that are shown in the list of rows."""

MOST_ORIGINS: Final = 20


def main(words: Sequence[str]) -> int:
    """Show a step's rows, one row's text, or what the steps before it had in common."""
    parser = Parser(
        "blame",
        "Show which documents were in a step of a run: every row's sample, files and places. It works for any step "
        "after the fact, because a batch is a pure function of the run's seed and the sample's number.",
        "poise blame runs/nano --step 120\n  poise blame runs/nano --step 120 --row 3\n"
        "  poise blame runs/nano --step 120 --window 20",
    )
    parser.add_argument("run", help="the run folder that poise train wrote")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step")
    parser.add_argument("--row", type=int, metavar="R", help="one row of it, from 0, with its whole text")
    parser.add_argument("--window", type=int, metavar="W", help="the files that the last W steps up to it showed")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args(list(words))
    if arguments.window is not None and arguments.window < 1:
        raise UserError(f"--window is {arguments.window}; use a number of steps, at least 1")
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise UserError(f"no run '{folder}'; give the folder that poise train wrote")

    from poise.train.blame import Tracer

    tracer = Tracer(folder)
    blame = tracer.blame(arguments.step)
    rows = _chosen(blame, arguments.row)
    if arguments.json:
        print(to_json(_record(tracer, blame, rows, arguments)))
    else:
        print("\n".join(_lines(tracer, blame, rows, arguments)))
    sys.stdout.flush()
    return 0


def _chosen(blame: Blame, row: int | None) -> Sequence[Row]:
    if row is None:
        return blame.rows
    if not 0 <= row < len(blame.rows):
        raise UserError(f"--row is {row}, but step {blame.step} has rows 0 to {len(blame.rows) - 1}")
    return [blame.rows[row]]


def _record(tracer: Tracer, blame: Blame, rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    record = blame.record()
    kept = {row.row for row in rows}
    record["rows"] = [r | {"text": tracer.text(r["sample"])} for r in record["rows"] if r["row"] in kept]
    if arguments.window is not None:
        seen = tracer.around(arguments.step, arguments.window)
        record["window"] = [{"origin": origin, "tokens": tokens, "rows": n} for origin, tokens, n in seen]
    return record


def _lines(tracer: Tracer, blame: Blame, rows: Sequence[Row], arguments: argparse.Namespace) -> Iterator[str]:
    last = blame.rows[-1].sample
    yield (
        f"step {blame.step}: loss {blame.loss:.4g}, gradient norm {blame.grad_norm:.3g}, "
        f"samples {blame.rows[0].sample} to {last}"
    )
    if blame.earlier:
        tries = ", ".join(map(str, blame.earlier))
        yield f"  done more than once; earlier tries began with sample {tries}"
    for row in rows:
        text = tracer.text(row.sample)
        yield f"row {row.row}  sample {row.sample}  {row.distinct:.0%} of its tokens are different"
        for one in row.documents:
            begins = "" if one.document_start == 0 else f", from its token {one.document_start} on"
            yield (
                f"  tokens {one.span[0]} to {one.span[1] - 1}: {one.origin} "
                f"(document {one.document}, which is bytes {one.offset} to {one.offset + one.bytes - 1}{begins})"
            )
        yield text if arguments.row is not None else "  " + _excerpt(text)
    if arguments.window is not None:
        seen = tracer.around(arguments.step, arguments.window)
        yield f"files in the last {arguments.window} steps up to {arguments.step}, by their tokens:"
        yield from (f"  {tokens:>9,} tokens, {n:>4} rows  {origin}" for origin, tokens, n in seen[:MOST_ORIGINS])
        if len(seen) > MOST_ORIGINS:
            yield f"  and {len(seen) - MOST_ORIGINS} more; --json has them all"


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT else flat[:EXCERPT] + " ..."
