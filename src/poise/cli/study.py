"""``poise study``: many small runs that answer one question."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from poise.cli.args import Parser, parse
from poise.core.errors import UserError, nearest

if TYPE_CHECKING:
    from poise.studies.grid import Study
    from poise.studies.pool import Standing
    from poise.studies.runner import Outcome

NAMED: Final = {"coord-check": ("poise.studies.coord_check", "does every activation keep its size as the width grows?")}
"""Studies with a module of their own, whose ``main(words)`` is called; one that is not installed is not listed."""

EXIT_FAILED, EXIT_STOPPED = 1, 130
PLAIN_SECONDS: Final = 30.0
"""Time between two lines where there is no terminal."""
FIRST_SECONDS: Final = 10.0
"""Time before the first of them: earlier there is no pace to speak of."""

ARMS_HELP = """arms (--methods), separated by commas outside brackets and quotes; the option may be given several times:
  baseline                             no method
  qk_norm+z_loss                       methods joined by +
  soft_cap:cap=30:other=1              settings of a method, each after a colon
  baseline@optim.weight_decay=0        other recipe values after @, several separated by ;
  capped=qk_norm+soft_cap:cap=30       with a label, for tables (letters, digits and _ . - +)
  --model.methods '["z_loss"]'         methods that every arm has

The study's folder holds its declaration (study.toml: hypothesis, arms, rates, seeds; written before anything runs and
never changed), a record of each run, table.txt, result.json and report.html. The same command goes on where a study
was stopped or killed."""


def main(words: Sequence[str]) -> int:
    """Run, continue or show a study."""
    commands = {"lr-sensitivity": _lr_sensitivity, "cell": _cell, "show": _show}
    name = words[0] if words else ""
    if name in ("", "-h", "--help"):
        print(_help())
        return 0 if name else 2
    if name in commands:
        return commands[name](words[1:])
    named = _named()
    if name in named:
        return int(importlib.import_module(named[name][0]).main(words[1:]))
    raise UserError(f"no study '{name}'{nearest(name, [*commands, *named])}; see poise study --help")


def _named() -> dict[str, tuple[str, str]]:
    return {name: entry for name, entry in NAMED.items() if importlib.util.find_spec(entry[0]) is not None}


def _help() -> str:
    rows = {
        "lr-sensitivity": "train each arm at each learning rate: how much does a wrong rate cost, what diverges?",
        **{name: text for name, (_, text) in _named().items()},
        "show": "print the table of a study again and write its page anew",
        "cell": "run one run of a study (what --emit prints)",
    }
    width = max(map(len, rows))
    return "\n".join(
        [
            "usage: poise study NAME [options]      poise study NAME --help shows them, with an example",
            "",
            *(f"  {name.ljust(width)}  {text}" for name, text in rows.items()),
            "",
            "example:\n  poise study lr-sensitivity --methods baseline,qk_norm --lrs 3e-4:3e-1:7 --seeds 3 --size 1m",
        ]
    )


def _lr_sensitivity(words: Sequence[str]) -> int:
    from poise.studies.sizes import SIZES

    parser = Parser(
        "study lr-sensitivity",
        "Train every arm at every learning rate with several seeds, and tell how much a wrong rate costs (Wortsman et "
        "al. 2024), at which rate runs diverge, and what a step costs.",
        "poise study lr-sensitivity --methods baseline,qk_norm,qk_norm+z_loss --lrs 3e-4:3e-1:7 --seeds 3 --size 1m",
        ARMS_HELP,
    )
    parser.add_argument("--methods", metavar="ARMS", action="append", required=True, help="what is compared; see below")
    parser.add_argument(
        "--lrs", metavar="GRID", default="3e-4:3e-1:7", help="first:last:points or a list (default 3e-4:3e-1:7)"
    )
    parser.add_argument("--seeds", metavar="N", default="3", help="seeds 0 to N - 1, or a list: 3,4,5 (default 3)")
    parser.add_argument("--size", default="1m", help=f"{', '.join(SIZES)} (default 1m)")
    parser.add_argument("--hypothesis", metavar="TEXT", default="", help="what you expect; declared before any run")
    parser.add_argument("--out", metavar="DIR", help="the study's folder (default: studies/lr-sensitivity)")
    parser.add_argument("--workers", metavar="N", default="0", help="processes; 0, the default: one a usable core")
    parser.add_argument("--emit", choices=("commands", "slurm"), help="run nothing; print commands, or write a script")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say how many runs there are, stop")
    _common(parser)
    arguments, over = parse(parser, words)
    threads, workers = _whole("--threads", arguments.threads, 1), _whole("--workers", arguments.workers, 0)

    from poise.studies import arms, grid, runner

    runner.check_counts(workers, threads)
    cache = Path(arguments.cache) if arguments.cache else None
    if cache is not None:
        runner.check_cache(cache)
    folder = Path(arguments.out or "studies/lr-sensitivity")
    with _Preparing() as preparing:
        declaration = grid.plan(
            "lr-sensitivity",
            arms=arms.split(arguments.methods),
            lrs=grid.lr_grid(arguments.lrs),
            seeds=grid.seed_list(arguments.seeds),
            size=arguments.size,
            over=over,
            hypothesis=arguments.hypothesis,
            progress=preparing,
        )
    if arguments.dry_run:
        print(_about(declaration.facts()))
        return 0
    study = grid.declare(folder, declaration, keep_hypothesis=not arguments.hypothesis)
    if arguments.emit == "commands":
        print("\n".join(runner.commands(study, threads=threads, cache=cache)))
        return 0
    if arguments.emit == "slurm":
        print(f"sbatch {shlex.quote(str(runner.write_slurm(study, threads=threads, cache=cache)))}")
        return 0
    print(_about(study.declaration.facts()), file=sys.stderr, flush=True)
    with Progress() as progress:
        outcome = runner.run_study(
            study, workers=workers, threads=threads, cache=cache, progress=progress, note=progress.note
        )
    return _end(study, outcome, as_json=arguments.json)


def _cell(words: Sequence[str]) -> int:
    parser = Parser("study cell", "Run one run of a declared study.", "poise study cell studies/lr-sensitivity KEY")
    parser.add_argument("folder", help="the study's folder")
    parser.add_argument("key", help="the run's key, as --emit commands and show --keys print it")
    _common(parser)
    arguments = parser.parse_args(list(words))
    threads = _whole("--threads", arguments.threads, 1)

    from poise.core.journal import to_json
    from poise.studies import runner
    from poise.studies.cell import Stopped
    from poise.studies.grid import open_study

    study = open_study(Path(arguments.folder))
    cache = Path(arguments.cache) if arguments.cache else None
    try:
        record, there = runner.run_one(study, arguments.key, threads=threads, cache=cache)
    except Stopped:
        print("poise study cell: stopped; the same command goes on where it was", file=sys.stderr)
        return EXIT_STOPPED
    if arguments.json:
        print(to_json(record))
    else:
        when = "was there already" if there else f"{record['seconds']:.1f} s"
        about = runner.describe(runner.find(study, arguments.key))
        print(f"{about}: {record['ended']}, loss {record['final_loss']:.4f} ({when})")
    return 0


def _show(words: Sequence[str]) -> int:
    parser = Parser(
        "study show",
        "Print the table of a study again and write its page anew, from the runs that are there. Ends with 1 where no "
        "run has a record yet.",
        "poise study show studies/lr-sensitivity",
    )
    parser.add_argument("folder", help="the study's folder")
    parser.add_argument("--keys", action="store_true", help="list the runs and what became of them instead")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args(list(words))

    from poise.core.journal import to_json
    from poise.studies import runner
    from poise.studies.grid import open_study

    study = open_study(Path(arguments.folder))
    if not arguments.keys:
        return _print_result(study, study.failures(), as_json=arguments.json)
    missing, failures = {cell.key for cell in study.missing()}, study.failures()
    for cell in study.declaration.cells:
        state = failures.get(cell.key, "missing") if cell.key in missing else "done"
        facts = {"key": cell.key, "arm": cell.arm, "lr": cell.lr, "seed": cell.seed, "state": state}
        print(to_json(facts) if arguments.json else f"{cell.key}  {runner.describe(cell)}  {state}")
    return 0


def _common(parser: Parser) -> None:
    parser.add_argument("--cache", metavar="DIR", help="records shared with other studies (default: none)")
    parser.add_argument("--threads", metavar="N", default="1", help="of each process (default 1)")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _whole(option: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"{option} is '{text}'; give a whole number of {least} or more")
    return number


def _about(facts: dict[str, Any]) -> str:
    from poise.dashboard.text import plural

    recipe = facts["recipe"]
    tokens = recipe["train"]["steps"] * recipe["train"]["batch_size"] * recipe["train"]["seq_len"]
    return "\n".join(
        [
            f"{facts['name']}: {plural(len(facts['arms']), 'arm')} x {plural(len(facts['lrs']), 'learning rate')} x "
            f"{plural(len(facts['seeds']), 'seed')} = {plural(facts['cells'], 'run')} of "
            f"{plural(recipe['train']['steps'], 'step')}, "
            f"{tokens:,} tokens each, size {facts['size']}",
            f"hypothesis: {facts['hypothesis']}",
        ]
    )


def _end(study: Study, outcome: Outcome, *, as_json: bool) -> int:
    if outcome.reused:
        print(f"{outcome.reused} of {outcome.total} runs were there already", file=sys.stderr)
    code = _print_result(study, outcome.failed, as_json=as_json)
    if outcome.stopped:
        print(f"poise study: stopped by {outcome.stopped}; the same command goes on where it was", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_FAILED if outcome.failed else code


def _print_result(study: Study, failed: dict[str, str], *, as_json: bool) -> int:
    """Print what the records that are there say; return 0, or 1 where there are none."""
    from poise.core.journal import to_json
    from poise.studies import runner

    result = runner.conclude(study)
    missing = len(study.missing())
    if as_json:
        facts = {"folder": str(study.folder), "missing": missing, "failed": failed}
        print(to_json(facts | ({} if result is None else result.to_json())))
        return EXIT_FAILED if result is None else 0
    print("no run has a record yet: nothing to show" if result is None else result.table().rstrip("\n"))
    if missing:
        total = len(study.declaration.cells)
        print(f"\nnot complete: {missing} of {total} runs are missing")
    for key, reason in failed.items():
        print(f"failed: {runner.describe(runner.find(study, key))} ({key}): {reason}")
    if result is not None:
        print(f"\npage: {study.folder / 'report.html'}")
    return EXIT_FAILED if result is None else 0


class _Preparing:
    """The bar of text preparation, closed in any case."""

    def __enter__(self) -> Any:
        from poise.cli.terminal import PrepareProgress

        self._progress = PrepareProgress()
        return self._progress

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._progress.close()


class Progress:
    """How far a study is: a bar with the time left on a terminal, else a line about every half minute."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._said = time.monotonic() - PLAIN_SECONDS + FIRST_SECONDS
        self._last: Standing | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("starting workers", total=None)
            self._bar.start()
        return self

    def __call__(self, standing: Standing) -> None:
        """Show it where it is time to."""
        self._last = standing
        if self._bar is not None:
            self._bar.update(
                self._task, total=standing.total_steps, completed=standing.steps, description=_standing(standing)
            )
        elif standing.steps and time.monotonic() - self._said >= PLAIN_SECONDS:
            self._line()

    def note(self, text: str) -> None:
        """Write a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last is not None and self._last.steps:
            self._line()

    def _line(self) -> None:
        assert self._last is not None
        self._said = time.monotonic()
        share = self._last.steps / self._last.total_steps
        print(f"{share:4.0%}  {_standing(self._last)}", file=sys.stderr, flush=True)


def _standing(standing: Standing) -> str:
    from poise.dashboard.text import count, duration

    left = standing.seconds_left
    rate = standing.steps / max(standing.seconds, 1e-9)
    words = [f"{standing.cells} of {standing.total_cells} runs", f"{count(rate)} steps/s", duration(standing.seconds)]
    return ", ".join([*words, *([f"{duration(left)} left"] if left is not None and left > 0 else [])])
