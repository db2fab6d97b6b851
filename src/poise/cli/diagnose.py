"""``poise diagnose``: what happened to this run, from its log alone."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poise.cli.args import Parser
from poise.core.errors import UserError
from poise.core.journal import to_json

if TYPE_CHECKING:
    from poise.postmortem.compare import Comparison
    from poise.postmortem.diagnosis import Diagnosis

SEVERITIES: Final = ("note", "warning", "critical")
WIDTH: Final = 120
"""Columns where the output is no terminal."""

MOST_PAIRS: Final = 6
"""Pairs of logs that are compared; with more logs than that makes, each is compared with the first."""


def main(words: Sequence[str]) -> int:
    """Diagnose every log; exit code 1 where ``--fail-on`` was met, else 0."""
    parser = Parser(
        "diagnose",
        "Say what happened to a run: is it healthy, what happened when, did the damage stay, what was the likely "
        "cause, what did it cost, what to do. Reads anybody's log and recognises it by content: Hugging Face trainer "
        "states and output, TensorBoard, W&B, Megatron-LM, MLPerf, llm.c, nanoGPT, torchtitan, Lightning, OLMo-core, "
        "DeepSpeed, nanotron, CSV, JSON lines, runs of poise; also as .gz, .bz2 or .xz. Several logs are compared.",
        "poise diagnose slurm-123.out\n  poise diagnose run_a/ run_b/\n"
        "  poise diagnose metrics.csv --json --fail-on warning",
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log file, or a folder with one")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--html", metavar="FILE", help="write a report that needs no network")
    parser.add_argument("--fail-on", choices=SEVERITIES, help="exit with 1 if an event is at least so severe")
    parser.add_argument("--all", action="store_true", help="show every event and every note")
    parser.add_argument("--step-column", metavar="NAME", help="the log's name for the step, where it is not found")
    parser.add_argument("--loss-column", metavar="NAME", help="the log's name for the loss, where it is not found")
    parser.add_argument("--tokens-per-step", type=int, metavar="N", help="for costs in tokens, where the log is silent")
    arguments = parser.parse_args(list(words))
    if arguments.tokens_per_step is not None and arguments.tokens_per_step < 1:
        raise UserError(f"--tokens-per-step is {arguments.tokens_per_step}; use a number of at least 1")
    diagnoses, comparisons = _diagnose(arguments)
    if arguments.html:
        from poise.postmortem.page import write

        write(diagnoses, comparisons, Path(arguments.html))
    if arguments.json:
        _print_json(diagnoses, comparisons)
    else:
        _print(diagnoses, comparisons, arguments)
    sys.stdout.flush()  # a reader that has gone is noticed here, not when the program ends
    return _exit_code(diagnoses, arguments.fail_on)


def _diagnose(arguments: argparse.Namespace) -> tuple[list[Diagnosis], list[Comparison]]:
    from poise.postmortem.diagnosis import diagnose
    from poise.postmortem.log import read_log

    for path in arguments.logs:
        if path != "-" and not Path(path).exists():
            read_log(path)  # its message, before any other log has been worked on
    diagnoses = []
    for path in arguments.logs:
        log = read_log(path, step_column=arguments.step_column, loss_column=arguments.loss_column)
        diagnoses.append(diagnose(log, tokens_per_step=arguments.tokens_per_step))
    if len(diagnoses) == 1:
        return diagnoses, []

    from poise.postmortem.diagnosis import beside

    pairs = list(itertools.combinations(range(len(diagnoses)), 2))
    if len(pairs) > MOST_PAIRS:
        pairs = [(0, i) for i in range(1, len(diagnoses))]
    comparisons = []
    for a, b in pairs:
        first, comparison = beside(diagnoses[a], diagnoses[b])
        diagnoses[b], _ = beside(diagnoses[b], diagnoses[a])
        diagnoses[a] = first
        comparisons.append(comparison)
    return diagnoses, comparisons


def _exit_code(diagnoses: Sequence[Diagnosis], fail_on: str | None) -> int:
    if fail_on is None:
        return 0
    enough = SEVERITIES[SEVERITIES.index(fail_on) :]
    return int(any(event.severity in enough for d in diagnoses for event in d.events))


def _print_json(diagnoses: Sequence[Diagnosis], comparisons: Sequence[Comparison]) -> None:
    """One log is one object; several are a list beside what they show together."""
    if len(diagnoses) == 1:
        print(to_json(diagnoses[0].record()))
        return
    together: dict[str, Any] = {
        "logs": [d.record() for d in diagnoses],
        "comparisons": [c.record() for c in comparisons],
    }
    print(to_json(together))


def _print(diagnoses: Sequence[Diagnosis], comparisons: Sequence[Comparison], arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from poise.postmortem.terminal import compared, show, verdict

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    for d in diagnoses:
        show(d, console, everything=arguments.all, extra=_further(d))
        if len(diagnoses) > 1:
            print()
    if len(diagnoses) > 1:
        compared(diagnoses, console)
    for comparison in comparisons:
        verdict(comparison, console)
    if arguments.html:
        print(f"report: {arguments.html}")


def _further(d: Diagnosis) -> list[str]:
    """Return commands that go on from here."""
    run = d.log.path.parent
    serious = [event for event in d.events if event.severity != "note"]
    lines = []
    if d.format == "poise" and serious:
        lines.append(f"which documents were in that step: poise blame {run} --step {serious[0].start}")
    return lines + _settings(d)


def _settings(d: Diagnosis) -> list[str]:
    """Return what ``poise check`` says of the settings that the log itself states."""
    if not d.log.settings or d.health == "healthy":
        return []
    from poise.preflight.check import check
    from poise.preflight.read import from_mapping

    try:
        settings = from_mapping(d.log.settings, str(d.log.path))
    except UserError:
        return []
    found = [] if settings is None else [f for f in check(settings).findings if f.severity != "note"]
    if not found:
        return []
    rules = ", ".join(f"{finding.rule} ({finding.severity})" for finding in found)
    return [f"the settings in this log are warned of: {rules}; poise check {d.log.path}"]
