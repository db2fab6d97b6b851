"""``poise data prepare``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poise.cli.args import Parser
from poise.cli.data import count, one_of, parsed, plain, reading, show, table
from poise.core.errors import UserError

if TYPE_CHECKING:
    from poise.data.prepare import Kept, Prepared
    from poise.data.settings import Settings

LIST = "list"
SHOWN = 5
DEDUP, KEEP, MINHASH = ("none", "exact", "near"), ("one", "log"), ("numpy", "rensa")


def prepare_(words: Sequence[str]) -> int:
    """Prepare text; with ``--filters list`` show the filters instead."""
    arguments = parsed(_parser(), words)
    if arguments.filters == [LIST]:
        return _show_filters()
    _check_places(arguments)

    from poise.cli.terminal import PrepareProgress
    from poise.data.prepare import prepare

    progress = PrepareProgress()
    kept: list[Kept] = []

    def report(found: Kept) -> None:
        kept.append(found)
        progress.close()
        if not arguments.json and (found.dropped or arguments.dry_run):
            print("\n".join(_would_drop(found)), file=sys.stdout if arguments.dry_run else sys.stderr, flush=True)

    try:
        done = prepare(
            arguments.source,
            Path(arguments.out) if arguments.out else None,
            _settings(arguments),
            processes=arguments.processes,
            progress=progress,
            report=report,
            dry_run=arguments.dry_run,
        )
    finally:
        progress.close()
    if not arguments.dry_run:
        _show_result(done, arguments.json)
    elif arguments.json:
        show(_facts(kept[0]), as_json=True)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "data prepare",
        "Turn text into tokens on disk. Nothing is left out of it but what the options ask for; what would be left out "
        "is shown before it is, and kept with its reason in dropped/. An interrupted call goes on where it was when it "
        "is made again.",
        "poise data prepare my-notes/ --out notes-tokens\n"
        "  poise data prepare web=crawl/ books=s3://corpus/books --out mix --filters web --dedup near --dry-run",
    )
    add = parser.add_argument
    add(
        "source",
        nargs="*",
        help="file, folder or address (s3://, gs://, hf://) of text, .jsonl, .parquet, .arrow, .warc, each also .gz or "
        ".zst; hf:NAME; stdlib. Several can be given, also as NAME=SOURCE",
    )
    add("--out", metavar="DIR", help="where to write (default: the cache folder)")
    add("--vocab-size", type=int, default=8192, metavar="N", help="ids of the BPE to train (8192)")
    add("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one")
    add("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="further ids that no text can produce")
    add("--val-fraction", type=float, default=0.01, metavar="X", help="held-out share (0.01)")
    add("--text-field", default="text", metavar="NAME", help="field of .jsonl, .parquet and .arrow (text)")
    add("--filters", nargs="+", default=[], metavar="PRESET", help=f"drop documents by these rules; {LIST} shows them")
    add("--clean-lines", action="store_true", help="take lines out of documents as C4 does")
    add("--repair", action="store_true", help="turn UTF-8 that was once read as cp1252 back (Ã© becomes é)")
    add("--mask-pii", action="store_true", help="replace e-mail and IP addresses, card numbers and keys")
    add("--languages", nargs="+", default=[], metavar="CODE", help="keep documents in these languages (rough)")
    add("--block-urls", metavar="FILE", help="drop documents from these hosts and addresses")
    add(
        "--dedup", type=one_of(DEDUP), default="none", metavar="HOW", help="drop duplicates: none, exact or near (none)"
    )
    add(
        "--dedup-keep",
        type=one_of(KEEP),
        default="one",
        metavar="HOW",
        help="of a cluster keep one, or log: 1 + log2(size)",
    )
    add("--minhash", type=one_of(MINHASH), default="numpy", metavar="WHAT", help="numpy or rensa (numpy)")
    add("--similarity", type=float, default=0.8, metavar="X", help="share of word 5-grams that makes a duplicate (0.8)")
    add("--decontaminate", nargs="+", default=[], metavar="FILE", help="drop what shares 13 words with these texts")
    add("--fim-rate", type=float, default=0.0, metavar="X", help="share of documents rearranged to fill in the middle")
    add("--bpe-dropout", type=float, default=0.0, metavar="X", help="share of the BPE's merges left out at random")
    add("--seed", type=int, default=0, metavar="N", help="chooses what is held out (0)")
    add(
        "--processes",
        type=count(0, 1024),
        default=0,
        metavar="N",
        help="how many work at once (0: all cores for a long text)",
    )
    add("--strict", action="store_true", help="stop at a damaged or vanished file instead of skipping and counting it")
    add("--dry-run", action="store_true", help="only show what would be left out; the next call goes on from there")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _check_places(arguments: argparse.Namespace) -> None:
    """Raise a ``UserError`` where there is nothing to read, or nothing to do."""
    if not arguments.source:
        raise UserError("no source; give a file, a folder or stdlib; see poise data prepare --help")
    if "" in arguments.source or arguments.out == "":
        what = "a source" if "" in arguments.source else "--out"
        raise UserError(f"{what} is empty; was a variable not set? give a path")

    from poise.data.store import is_prepared

    (first, *others), out = arguments.source, arguments.out
    if others or not is_prepared(Path(first).expanduser()):
        return
    if arguments.dry_run or (out and Path(out).expanduser().resolve() != Path(first).expanduser().resolve()):
        raise UserError(
            f"'{first}' is prepared already; use it as it is (poise data inspect shows it), or give its text"
        )


def _settings(arguments: argparse.Namespace) -> Settings:
    from poise.data.settings import Settings

    return Settings(
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        special_tokens=tuple(arguments.special_tokens),
        val_fraction=arguments.val_fraction,
        seed=arguments.seed,
        text_field=arguments.text_field,
        filters=tuple(arguments.filters),
        clean_lines=arguments.clean_lines,
        repair=arguments.repair,
        mask_pii=arguments.mask_pii,
        languages=tuple(arguments.languages),
        block_urls=arguments.block_urls,
        dedup=arguments.dedup,
        dedup_keep=arguments.dedup_keep,
        minhash=arguments.minhash,
        similarity=arguments.similarity,
        decontaminate=tuple(arguments.decontaminate),
        fim_rate=arguments.fim_rate,
        bpe_dropout=arguments.bpe_dropout,
        strict=arguments.strict,
    )


def _show_result(done: Prepared, as_json: bool) -> None:
    from poise.data.look.health import ENOUGH, warnings
    from poise.data.look.inspect import describe

    warned = [] if done.reused else warnings(done.dir)  # they were said when it was made
    facts = {"folder": str(done.dir), "reused": done.reused, **describe(done.dir, ENOUGH), **reading(done.manifest)}
    show(facts | ({"warnings": warned} if as_json else {}), as_json=as_json)
    if as_json:
        return
    if damaged := done.manifest.get("damaged"):
        warned = [
            f"damaged, the rest of them is used: {_some(damaged)}; fetch again, or --strict stops at them",
            *warned,
        ]
    for line in warned:
        print(f"note: {line}", file=sys.stderr)


def _would_drop(found: Kept) -> list[str]:
    gone = sum(documents for documents, _ in found.dropped.values())
    size = sum(size for _, size in found.dropped.values())
    share = gone / max(1, found.documents)
    head = f"left out: {gone:,} of {found.documents:,} documents ({share:.1%}), {size / 1e6:,.1f} of "
    rows = [[f"  {reason}", documents, f"{size / 1e6:,.1f} MB"] for reason, (documents, size) in found.dropped.items()]
    lines = [f"{head}{found.bytes / 1e6:,.1f} MB" + (":" if rows else ""), *(table(rows) if rows else ())]
    if found.skipped:
        lines.append("not read: " + ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items()))
    if found.damaged:
        lines.append(f"damaged: {_some(found.damaged)}")
    return lines


def _some(names: Sequence[str]) -> str:
    """The first of some files' names, and how many more there are."""
    more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    return ", ".join(map(plain, names[:SHOWN])) + more


def _facts(found: Kept) -> dict[str, object]:
    dropped = {reason: {"documents": n, "bytes": size} for reason, (n, size) in found.dropped.items()}
    facts = {"documents": found.documents, "bytes": found.bytes, "dropped": dropped}
    return facts | {"skipped": dict(found.skipped), "damaged": list(found.damaged)}


def _show_filters() -> int:
    from poise.data.clean.presets import PRESETS

    for name, rules in PRESETS.items():
        print(name)
        for rule in rules:
            low = "" if rule.at_least is None else f"at least {rule.at_least:g}"
            high = "" if rule.at_most is None else f"at most {rule.at_most:g}"
            print(f"  {rule.name:<28} {rule.feature:<26} {', '.join(filter(None, (low, high)))}")
    return 0
