"""``poise data inspect`` and ``poise data verify``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poise.cli.args import Parser
from poise.cli.data import count, parsed, plain, reading, show, table
from poise.core.errors import UserError

if TYPE_CHECKING:
    from poise.data.look.browse import Shown

EXCERPT: Final = 400
"""Characters shown of a document where several are shown."""

MOST_HITS: Final = 50


def inspect_(words: Sequence[str]) -> int:
    """Show what a prepared folder holds, one way at a time."""
    parser = Parser(
        "data inspect",
        "Show what a prepared folder holds: counts, or one of the views below. Columns are those of docs.arrow; a "
        "score is scores.NAME.",
        "poise data inspect tokens\n  poise data inspect tokens --sample 5\n"
        "  poise data inspect tokens --search '/TODO/i'\n"
        "  poise data inspect tokens --histogram scores.compression\n  poise data inspect tokens --sort repeat_count\n"
        "  poise data inspect tokens --drop 'scores.compression>20' --out cleaner",
    )
    parser.add_argument("folder", help="a folder that poise data prepare wrote")
    views = parser.add_mutually_exclusive_group()
    views.add_argument("--sample", type=count(1), metavar="N", help="N documents drawn at random")
    views.add_argument("--search", metavar="TEXT", help="documents that hold a text or /a regular expression/")
    views.add_argument("--histogram", metavar="COLUMN", help="how a column is distributed")
    views.add_argument(
        "--sort", metavar="COLUMN", help="documents with the largest value of a column (-COLUMN: smallest)"
    )
    views.add_argument("--document", metavar="N", help="one document with its whole text; val:N in the held-out part")
    views.add_argument("--repeats", action="store_true", help="repeated n-grams, by what repeats")
    views.add_argument("--vocabulary", action="store_true", help="ids that are seldom or never seen")
    views.add_argument("--diversity", action="store_true", help="compression, n-gram entropy, duplicates by source")
    views.add_argument(
        "--packing", type=count(1), metavar="T", help="documents cut by sequences of T tokens, both ways"
    )
    views.add_argument("--drop", nargs="+", metavar="RULE", help="write a folder without the documents that match")
    parser.add_argument("--out", metavar="DIR", help="where --drop writes")
    parser.add_argument("--seed", type=count(0), default=0, metavar="N", help="of --sample (0)")
    parser.add_argument("--count", type=count(1), default=20, metavar="N", help="how many documents --sort shows (20)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parsed(parser, list(_with_signs(words)))
    folder, as_json = Path(arguments.folder), arguments.json
    if bool(arguments.drop) != bool(arguments.out):
        raise UserError("--drop and --out belong together: --drop RULE... --out DIR writes a new folder")
    if arguments.search is not None:
        return _search(folder, arguments.search, as_json)
    if arguments.histogram:
        return _histogram(folder, arguments.histogram, as_json)
    if arguments.drop:
        return _drop(folder, arguments.drop, Path(arguments.out), as_json)

    from poise.data.look import browse, health, inspect
    from poise.data.store import open_tokens

    if arguments.sample is not None:
        _documents(browse.sample(folder, arguments.sample, seed=arguments.seed), as_json, EXCERPT)
    elif arguments.sort:
        name = arguments.sort.removeprefix("-")
        found = browse.ranked(folder, name, count=arguments.count, largest=name == arguments.sort)
        _documents(found, as_json, EXCERPT)
    elif arguments.document is not None:
        _documents([browse.document(folder, arguments.document)], as_json, None)
    elif arguments.repeats:
        show(health.repeats(folder), as_json=as_json)
    elif arguments.vocabulary:
        show(health.vocabulary_of(folder), as_json=as_json)
    elif arguments.packing is not None:
        show(health.packing(folder, arguments.packing), as_json=as_json)
    elif arguments.diversity:
        from poise.data.look import diversity

        facts = diversity.report(folder)
        print(json.dumps(facts, indent=2) if as_json else "\n".join(diversity.lines(facts)))
    else:
        show(inspect.describe(folder) | reading(open_tokens(folder).manifest), as_json=as_json)
    return 0


def verify_(words: Sequence[str]) -> int:
    """Check every hash of a prepared folder."""
    parser = Parser("data verify", "Check the hash of every file of a prepared folder.", "poise data verify tokens")
    parser.add_argument("folder", help="a folder that poise data prepare wrote")
    arguments = parsed(parser, words)
    from poise.data.store import verify

    tokens = verify(arguments.folder)
    files = tokens.manifest["files"]
    print(f"{len(files)} files, {sum(facts['bytes'] for facts in files.values()):,} bytes: all as they were written")
    return 0


def _with_signs(words: Sequence[str]) -> Iterator[str]:
    """Yield the words with ``--sort -bytes`` as ``--sort=-bytes``: alone, ``-bytes`` would be taken for an option."""
    waiting = False
    for word in words:
        if waiting and re.fullmatch(r"-[A-Za-z_][\w.]*", word):
            yield f"--sort={word}"
        else:
            yield from ["--sort", word] if waiting else [] if word == "--sort" else [word]
        waiting = word == "--sort" and not waiting
    if waiting:
        yield "--sort"


def _search(folder: Path, query: str, as_json: bool) -> int:
    from poise.data.look import browse

    found = 0
    for hit in browse.search(folder, query):
        found += 1
        if as_json:
            print(json.dumps(hit.as_dict()))
        elif found <= MOST_HITS:
            print(f"{hit.split}:{hit.document}  {plain(hit.origin)}  line {hit.line}  x{hit.count}\n  {hit.excerpt}")
    if not as_json:
        more = f"; the first {MOST_HITS} are shown, --json has all" if found > MOST_HITS else ""
        print(f"{found:,} documents{more}")
    return 0


def _histogram(folder: Path, column: str, as_json: bool) -> int:
    from poise.data.look import inspect

    facts = inspect.histogram(folder, column)
    print(json.dumps(facts, indent=2) if as_json else "\n".join(inspect.bars(facts)))
    return 0


def _drop(folder: Path, rules: Sequence[str], out: Path, as_json: bool) -> int:
    from poise.cli.terminal import PrepareProgress
    from poise.data.look import subset

    progress = PrepareProgress()
    try:
        manifest = subset.drop(folder, rules, out, progress=lambda done, total: progress("copying", done, total))
    finally:
        progress.close()
    show({"folder": str(out), "splits": manifest["splits"], "dropped": manifest["dropped"]}, as_json=as_json)
    return 0


def _documents(found: Sequence[Shown], as_json: bool, most: int | None) -> None:
    if as_json:
        print(json.dumps([one.as_dict() for one in found], indent=2))
        return
    for one in found:
        size = f"{one.bytes:,} bytes, {one.tokens:,} tokens"
        print(f"{one.split}:{one.document}  {plain(one.origin)}  ({one.source}, {size})")
        for line in table([[f"  {name}", _shown(value)] for name, value in _facts(one.facts).items()] or [["", ""]]):
            print(line)
        text = one.text if most is None or len(one.text) <= most else f"{one.text[:most]} ..."
        print(text if most is None else "  | " + text.replace("\n", "\n  | "))
    sys.stdout.flush()


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    scores = facts.get("scores") or {}
    return {k: v for k, v in facts.items() if k != "scores"} | {f"scores.{name}": v for name, v in scores.items()}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))
