"""``poise blame``: which documents were in that step?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from poise.cli.args import Parser
from poise.core.errors import UserError
from poise.core.journal import to_json

if TYPE_CHECKING:
    from poise.train.blame import Blame, Document, Repeat, Row, Seen, Tracer

EXCERPT: Final = 160
"""Characters of a row's text that are shown in the list of rows."""

MOST_ORIGINS: Final = 20
MOST_ODD: Final = 5
MOST_REPEATED: Final = 200
"""Characters shown of a stretch that repeats itself."""

_RECORDS: Final = (((".jsonl", ".ndjson"), "line"), ((".json", ".warc", ".wet"), "record"))


def main(words: Sequence[str]) -> int:
    """Show a step's rows, one row's text, or what the steps before it had in common."""
    parser = Parser(
        "blame",
        "Show which documents were in a step of a run, and what was odd about them: every row's sample, files, places, "
        "scores, duplicates and repeats. It works for any step "
        "after the fact, because a batch is a pure function of the run's seed and the sample's number.",
        "poise blame runs/nano --step 120\n  poise blame runs/nano --step 120 --row 3\n"
        "  poise blame runs/nano --step 120 --window 20",
    )
    parser.add_argument("run", help="the run folder that poise train wrote")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step")
    parser.add_argument("--try", dest="attempt", type=int, metavar="N", help="which try of the step, from 1 (the last)")
    parser.add_argument("--row", type=int, metavar="R", help="one row of it, from 0, with its whole text")
    parser.add_argument("--window", type=int, metavar="W", help="the files that the last W steps up to it showed")
    parser.add_argument("--data", metavar="DIR", help="where the run's prepared data is now, if it has been moved")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args(list(words))
    if arguments.window is not None and arguments.window < 1:
        raise UserError(f"--window is {arguments.window}; use a number of steps, at least 1")
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise UserError(f"no run '{folder}'; give the folder that poise train wrote")

    from poise.train.blame import Tracer

    tracer = Tracer(folder, arguments.data)
    blame = tracer.blame(arguments.step, arguments.attempt)
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
        seen = tracer.around(arguments.step, arguments.window, arguments.attempt)
        record["window"] = [one._asdict() for one in seen]
    return record


def _lines(tracer: Tracer, blame: Blame, rows: Sequence[Row], arguments: argparse.Namespace) -> Iterator[str]:
    yield (
        f"step {blame.step}: loss {blame.loss:.4g}, gradient norm {blame.grad_norm:.3g}, "
        f"samples {blame.rows[0].sample} to {blame.rows[-1].sample}"
    )
    if blame.tries > 1:
        yield (
            f"  done {blame.tries} times, this is try {blame.attempt}; the others began with sample "
            f"{', '.join(map(str, blame.earlier)) or blame.rows[0].sample} (--try N shows another)"
        )
    if blame.undone:
        yield "  this try does not count: the run went back behind it, or took the step again"
    if blame.seq_len < tracer.recipe.train.seq_len:
        yield f"  each sample was cut into sequences of {blame.seq_len}"
    yield from _oddest(blame)
    for row in rows:
        yield from _of_row(tracer, row, whole=arguments.row is not None)
    if arguments.window is not None:
        yield from _window(tracer.around(arguments.step, arguments.window, arguments.attempt), arguments)


def _oddest(blame: Blame) -> Iterator[str]:
    """The rows and documents to look at first."""
    known = [row for row in blame.rows if row.loss is not None]
    if len(known) > 1:
        usual = median(row.loss or 0.0 for row in known)
        worst = max(known, key=lambda row: row.loss or 0.0)
        yield f"  highest loss: row {worst.row} with {worst.loss:.3f} nats (median of the rows {usual:.3f})"
    odd = [(row.row, one) for row in blame.rows for one in row.documents if one.odd]
    for row, one in sorted(odd, key=lambda item: -len(item[1].odd))[:MOST_ODD]:
        yield f"  odd: row {row}, {one.origin} (document {one.document}): {'; '.join(one.odd[:3])}"
    if len(odd) > MOST_ODD:
        yield f"  and {len(odd) - MOST_ODD} more rows with something odd"
    if not odd:
        yield "  nothing odd about its documents, by their scores, repeats and duplicates"


def _of_row(tracer: Tracer, row: Row, *, whole: bool) -> Iterator[str]:
    loss = "" if row.loss is None else f"  loss {row.loss:.3f}"
    part = "" if row.counted == 1 else f", {1 - row.counted:.0%} left out of the loss"
    yield f"row {row.row}  sample {row.sample}{loss}  {row.distinct:.0%} of its tokens are different{part}"
    for one in row.documents:
        begins = "" if one.document_start == 0 else f", from its token {one.document_start} on"
        yield (
            f"  tokens {one.span[0]} to {one.span[1] - 1}: {one.origin} "
            f"(document {one.document}{_place(one)}, {one.bytes:,} bytes of text{begins})"
        )
        if whole:
            yield from _facts(one)
    for repeat in row.repeats:
        fate = "its repeats are left out of the loss" if repeat.masked else "it counts in the loss"
        yield (
            f"  tokens {repeat.span[0]} to {repeat.span[1] - 1}: {_excerpt(repr(repeat.text), 60)} "
            f"x {repeat.count:,} in the document; {fate}"
        )
    if whole:
        yield "".join(_mark(text, repeat) for text, repeat in tracer.marked(row))
    else:
        yield "  " + _excerpt(tracer.text(row.sample))


def _place(one: Document) -> str:
    """Where it begins in its file, as far as that is known; its end is not, because text is cleaned when it is read.

    An origin does not say its kind, so this goes by its form: a file, or ``file:number`` for records.
    """
    name, _, number = one.origin.rpartition(":")
    file = name if name and number.isdecimal() else one.origin
    bare = file.lower()
    for ending in (".gz", ".zst", ".bz2", ".xz"):
        bare = bare.removesuffix(ending)
    at = f"{'byte' if bare == file.lower() else 'unpacked byte'} {one.offset:,}"
    if file == one.origin:
        return "" if ":" in file else f", from {at} on"  # what is a part of something else, by name, has no byte
    if bare.endswith((".parquet", ".arrow", ".feather", ".ipc")):
        return f", row {number}"
    for endings, word in _RECORDS:
        if bare.endswith(endings):
            # Only the first can begin at byte 0; else the byte is not known.
            return f", {word} {number}" + (f", at {at}" if one.offset or int(number) < 2 else "")
    return ""


def _facts(one: Document) -> Iterator[str]:
    """Everything that is known of a document, one line a kind."""
    facts = {k: v for k, v in one.facts.items() if k != "scores" and v not in (None, 0)}
    if facts.get("cluster_size") == 1:
        del facts["cluster_size"]
    if facts:
        yield "    " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    if scores := one.facts.get("scores"):
        yield "    " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    yield from (f"    odd: {line}" for line in one.odd)


def _mark(text: str, repeat: Repeat | None) -> str:
    """A piece of text; the repeats in marks, and shortened where they are long."""
    if repeat is None:
        return text
    shown = text if len(text) <= MOST_REPEATED else f"{text[:MOST_REPEATED]} ..."
    return f"[[x{repeat.count}: {shown}]]"


def _window(seen: Sequence[Seen], arguments: argparse.Namespace) -> Iterator[str]:
    yield f"documents in the last {arguments.window} steps up to {arguments.step}, by their tokens:"
    for one in seen[:MOST_ORIGINS]:
        yield f"  {one.tokens:>9,} tokens, {one.rows:>4} rows  {one.origin} (document {one.document})"
    if len(seen) > MOST_ORIGINS:
        yield f"  and {len(seen) - MOST_ORIGINS} more; --json has them all"
    odd = [one for one in seen if one.odd]
    for one in sorted(odd, key=lambda one: -len(one.odd))[:MOST_ORIGINS]:
        yield f"  odd: {one.origin} (document {one.document}): {'; '.join(one.odd[:2])}"


def _excerpt(text: str, most: int = EXCERPT) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[:most] + " ..."
