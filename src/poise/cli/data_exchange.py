"""``poise data export`` and ``poise data import``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

from poise.cli.args import Parser
from poise.cli.data import count, one_of, parsed, show

FORMATS: Final = {
    "megatron": "Megatron-LM .bin and .idx",
    "datatrove": "datatrove .ds, .ds.index and .ds.metadata",
    "olmo": "OLMo .npy with .csv.gz",
    "hf": "a Hugging Face data set, saved to disk",
}


def export_(words: Sequence[str]) -> int:
    """Write prepared data in another format."""
    parser = Parser(
        "data export",
        "Write prepared tokens in the format of other programs: "
        + "; ".join(f"{name} ({about})" for name, about in FORMATS.items())
        + ".",
        "poise data export tokens --to megatron --out megatron-tokens",
    )
    parser.add_argument("folder", help="a folder that poise data prepare wrote")
    parser.add_argument("--to", type=one_of(FORMATS), metavar="FORMAT", required=True, help="the format")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parsed(parser, words)
    files = _with_progress(
        lambda progress: _module(arguments.to).export(arguments.folder, arguments.out, progress=progress)
    )
    show({"folder": arguments.out, "files": len(files)}, as_json=arguments.json)
    return 0


def import_(words: Sequence[str]) -> int:
    """Turn the tokens of others into prepared data."""
    parser = Parser(
        "data import",
        "Turn tokens that another program has written into prepared data. With their tokenizer.json, poise blame can "
        "show text; without, --vocab-size says how many ids there are and --end-of-text which of them ends a "
        "document.",
        "poise data import megatron/ --from megatron --tokenizer tokenizer.json --out tokens",
    )
    parser.add_argument("source", help="a folder with the files, or one of them")
    parser.add_argument(
        "--from", dest="format", type=one_of(FORMATS), metavar="FORMAT", required=True, help=", ".join(FORMATS)
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write")
    parser.add_argument("--tokenizer", metavar="FILE", help="the tokenizer.json of the ids (the one beside them)")
    parser.add_argument("--vocab-size", type=count(1), metavar="N", help="number of ids where there is no tokenizer")
    parser.add_argument(
        "--end-of-text", type=count(0), metavar="ID", help="the id that ends a document, without tokenizer"
    )
    parser.add_argument("--val-fraction", type=float, default=0.01, metavar="X", help="held-out share (0.01)")
    parser.add_argument("--split-documents", action="store_true", help="cut documents after every end of text in them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses what is held out (0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parsed(parser, words)
    from poise.data.exchange.incoming import Import
    from poise.data.look.inspect import describe

    how = Import(
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        end_of_text=arguments.end_of_text,
        val_fraction=arguments.val_fraction,
        split=arguments.split_documents,
        seed=arguments.seed,
    )
    _with_progress(
        lambda progress: _module(arguments.format).import_(arguments.source, arguments.out, how, progress=progress),
    )
    show({"folder": arguments.out, **describe(arguments.out)}, as_json=arguments.json)
    return 0


def _module(name: str) -> Any:
    return importlib.import_module(f"poise.data.exchange.{name}")


def _with_progress(work: Any) -> Any:
    from poise.cli.terminal import PrepareProgress

    progress = PrepareProgress()
    try:
        return work(progress)
    finally:
        progress.close()
