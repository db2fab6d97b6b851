"""``poise resume``: go on with a run, exactly where its newest verified checkpoint is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from poise.cli.args import Parser, parse
from poise.cli.train import finish


def main(words: Sequence[str]) -> int:
    """Resume a run folder; a run that has finished says so and ends with code 0."""
    parser = Parser(
        "resume",
        "Go on with a run that was stopped, killed or crashed, from its newest verified checkpoint. Values of "
        "train, optim and guard may be changed; model, data and seed are fixed by the checkpoint.",
        "poise resume runs/nano",
    )
    parser.add_argument("run", help="the run folder that poise train wrote")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments, over = parse(parser, words)
    folder = Path(arguments.run)

    from poise.cli.terminal import Terminal
    from poise.train.run import read_recipe, resume

    outcome = resume(folder, over, observers=[Terminal()], command=shlex.join(["poise", "resume", *words]))
    if outcome is None:
        steps = read_recipe(folder, over).train.steps
        if arguments.json:
            print(json.dumps({"run": str(folder), "outcome": "finished", "already": True}))
        else:
            print(
                f"{folder} has finished its {steps} steps; nothing to resume. "
                f"To train on: poise resume {folder} --train.steps {2 * steps}"
            )
        return 0
    return finish(outcome, folder, as_json=arguments.json)
