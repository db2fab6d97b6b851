"""``poise train``: text in; a stable model, a report and a resumable run out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.args import Parser, parse, recipe_help
from poise.core import config as configs

if TYPE_CHECKING:
    from poise.train.loop import Outcome
    from poise.train.recipe import Recipe

EXIT_HALTED = 3


def main(words: Sequence[str]) -> int:
    """Parse, train, summarise. Exit code 0 when the run finished or was stopped on request, 3 when halted."""
    parser = Parser(
        "train",
        "Train a model from text. Without arguments: the nano recipe on the Python standard library's sources.",
        "poise train small --data my-notes/ --optim.lr 2e-3 --out runs/notes",
        recipe_help() if {"-h", "--help"} & set(words) else "",
    )
    parser.add_argument("recipe", nargs="?", default="nano", help="a TOML file, or nano, small, 100m, 1b")
    parser.add_argument("--data", metavar="PATH", help="text to train on: file, folder, .jsonl, .parquet, hf:NAME")
    parser.add_argument("--out", metavar="DIR", help="the new run folder (default: the next free runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print size, memory and budget; train nothing")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments, over = parse(parser, words)
    if arguments.data:
        over = configs.merge(over, {"data": {"source": arguments.data}})

    from poise.train import recipe as recipes

    recipe = recipes.load(arguments.recipe, over)
    if arguments.dry_run:
        return _dry_run(recipe, as_json=arguments.json)
    out = Path(arguments.out) if arguments.out else next_free(Path("runs") / recipe.name)

    from poise.cli.terminal import Terminal
    from poise.train.run import train

    terminal = Terminal()
    try:
        outcome = train(
            recipe,
            out,
            observers=[terminal],
            progress=terminal.progress,
            command=shlex.join(["poise", "train", *words]),
        )
    finally:
        terminal.progress.close()
    return finish(outcome, out, as_json=arguments.json)


def finish(outcome: Outcome, out: Path, *, as_json: bool) -> int:
    """Print the summary of a run that has ended; return the exit code."""
    from poise.cli.terminal import show_summary, summary_json
    from poise.hardware.distributed import leave, rank

    code = EXIT_HALTED if outcome.reason == "halted" else 0
    if rank() == 0:
        if as_json:
            print(summary_json(out, outcome.reason))
        else:
            show_summary(out, next_commands(outcome, out))
    leave(code)
    return code


def next_commands(outcome: Outcome, out: Path) -> list[str]:
    """Three commands worth trying after this run."""
    if outcome.reason == "finished":
        return [
            f"poise resume {out} --train.steps {2 * outcome.step}",
            "poise train --data YOUR_TEXT_FOLDER",
            "poise demo",
        ]
    if outcome.reason == "stopped":
        return [f"poise resume {out}", "poise train --data YOUR_TEXT_FOLDER", "poise demo"]
    if outcome.used_up:
        return [
            f"poise resume {out} --train.steps {outcome.step}  # call it finished here",
            f"poise train {out / 'recipe.toml'} --data.mix {_wider(out)}  # start anew, with more epochs",
            f"poise blame {out} --step {outcome.step}",
        ]
    from poise.train.run import read_recipe

    lower = read_recipe(out).optim.lr / 2
    return [f"poise resume {out} --optim.lr {lower:g}", f"poise resume {out}", "poise demo"]


def _wider(out: Path) -> str:
    """Return the mixture of a run with twice its limits of epochs, as a word of the command line."""
    from poise.data.feed.mix import parse as parts_of
    from poise.train.run import read_recipe

    weights, epochs = parts_of(read_recipe(out).data.mix)
    limits = {name: f"@{2 * epochs[name]}" if name in epochs else "" for name in weights}
    return shlex.quote(json.dumps([f"{name}={weight}{limits[name]}" for name, weight in weights.items()]))


def next_free(folder: Path) -> Path:
    """Return ``folder``, or ``folder-2``, ``-3``, ... where that exists."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _dry_run(recipe: Recipe, *, as_json: bool) -> int:
    from poise.train.budget import budget, render

    figures: dict[str, Any] = budget(recipe)
    print(json.dumps(figures) if as_json else render(recipe, figures))
    return 0
