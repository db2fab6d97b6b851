"""``poise data prepare`` and ``poise data inspect``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from poise.cli.args import Parser
from poise.core.errors import UserError, nearest


def main(words: Sequence[str]) -> int:
    """Dispatch to prepare or inspect."""
    actions = {"prepare": _prepare, "inspect": _inspect}
    if not words or words[0] in ("-h", "--help"):
        print("usage: poise data prepare SOURCE --out DIR\n       poise data inspect DIR\n")
        print("example:\n  poise data prepare my-notes/ --out notes-tokens --vocab-size 8192")
        return 0
    if words[0] not in actions:
        raise UserError(f"unknown action 'data {words[0]}'{nearest(words[0], actions)}; use prepare or inspect")
    return actions[words[0]](words[1:])


def _prepare(words: Sequence[str]) -> int:
    parser = Parser("data prepare", "Turn text into tokens on disk.", "poise data prepare my-notes/ --out notes-tokens")
    parser.add_argument("source", help="file, folder, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, hf:NAME or stdlib")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the cache folder)")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="ids of the BPE to train (8192)")
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one")
    parser.add_argument("--val-fraction", type=float, default=0.01, metavar="X", help="held-out share (0.01)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet (text)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(list(words))

    from poise.cli.terminal import PrepareProgress
    from poise.data.inspect import describe
    from poise.data.prepare import prepare

    progress = PrepareProgress()
    try:
        done = prepare(
            arguments.source,
            Path(arguments.out) if arguments.out else None,
            vocab_size=arguments.vocab_size,
            tokenizer=arguments.tokenizer,
            val_fraction=arguments.val_fraction,
            text_field=arguments.text_field,
            progress=progress,
        )
    finally:
        progress.close()
    _show({"folder": str(done.dir), "reused": done.reused, **describe(done.dir)}, as_json=arguments.json)
    return 0


def _inspect(words: Sequence[str]) -> int:
    parser = Parser("data inspect", "Show what a prepared folder holds.", "poise data inspect notes-tokens")
    parser.add_argument("folder", help="a folder that poise data prepare wrote")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(list(words))

    from poise.data.inspect import describe

    _show(describe(Path(arguments.folder)), as_json=arguments.json)
    return 0


def _show(figures: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2, default=str))
        return
    flat = _flat(figures)
    width = max(map(len, flat))
    for name, value in flat.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"{name.replace('_', ' '):<{width}}  {shown}")


def _flat(figures: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested figures as one table: ``splits.train.tokens``."""
    out: dict[str, object] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
