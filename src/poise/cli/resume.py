"""``poise resume``: go on with a run, exactly where its newest verified checkpoint is."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from poise.cli.args import Parser, parse
from poise.cli.train import finish
from poise.core.errors import UserError


def main(words: Sequence[str]) -> int:
    """Resume a run folder; a run that has finished says so and ends with code 0."""
    parser = Parser(
        "resume",
        "Go on with a run that was stopped, killed or crashed, from its newest verified checkpoint. Values of "
        "train, optim and guard may be changed; model, data and seed are fixed by the checkpoint.",
        "poise resume runs/nano",
    )
    parser.add_argument("run", help="the run folder that poise train wrote")
    parser.add_argument(
        "--drop-samples", nargs="+", default=[], metavar="A-B", help="never show these samples again (poise blame)"
    )
    parser.add_argument(
        "--drop-documents", nargs="+", type=int, default=[], metavar="N", help="leave these documents out of the loss"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments, over = parse(parser, words)
    folder = Path(arguments.run)

    from poise.cli.terminal import Terminal
    from poise.train.drop import Drop
    from poise.train.run import read_recipe, resume

    ranges = [_range(text) for text in arguments.drop_samples]
    outcome = resume(
        folder,
        over,
        observers=[Terminal()],
        command=shlex.join(["poise", "resume", *words]),
        drop=Drop(tuple(ranges), tuple(arguments.drop_documents)),
    )
    if outcome is None:
        steps = read_recipe(folder, over).train.steps
        dropping = _drop_words(arguments)
        if arguments.json:
            facts = {"run": str(folder), "outcome": "finished", "already": True}
            print(json.dumps(facts | ({"drop_recorded": False} if dropping else {})))
        else:
            said = "What to drop was not recorded. " if dropping else ""
            again = shlex.join(["poise", "resume", str(folder), *dropping, "--train.steps", str(2 * steps)])
            print(f"{folder} has finished its {steps} steps; nothing to resume. {said}To train on: {again}")
        return 0
    return finish(outcome, folder, as_json=arguments.json)


def _drop_words(arguments: argparse.Namespace) -> list[str]:
    """Return the options that say what to drop, as they were given."""
    words = []
    for name in ("drop_samples", "drop_documents"):
        if given := getattr(arguments, name):
            words += [f"--{name.replace('_', '-')}", *map(str, given)]
    return words


def _range(text: str) -> tuple[int, int]:
    """Return the first and last sample of ``A-B`` or ``A``."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise UserError(f"'{text}' is no range of samples; write 960-1023, or one number")
    return int(first), int(last) if dash else int(first)
