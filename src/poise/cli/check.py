"""``poise check``: will this configuration be stable? What is known to break, before it runs."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poise.cli.args import Parser
from poise.core.errors import UserError, nearest
from poise.core.journal import to_json

if TYPE_CHECKING:
    from rich.console import Console

    from poise.preflight.check import Report
    from poise.preflight.measure import Measurement
    from poise.preflight.settings import Settings

SEVERITIES: Final = ("note", "warning", "critical")
WIDTH: Final = 120
"""Columns where the output is no terminal."""

MOST_MINUTES: Final = 120.0

_NOT_SETTINGS: Final = ("source", "format", "said", "notes")


def main(words: Sequence[str]) -> int:
    """Judge one run's configuration; exit code 1 where ``--fail-on`` was met, else 0."""
    began = time.perf_counter()
    arguments = _parser().parse_args(list(words))
    if arguments.minutes is not None and not arguments.model:
        raise UserError("--minutes is how long --model may measure; add --model, or leave it out")
    minutes = 2.0 if arguments.minutes is None else arguments.minutes
    if not 0 < minutes <= MOST_MINUTES or not math.isfinite(minutes):
        raise UserError(f"--minutes is {minutes:g}; give a number above 0, up to {MOST_MINUTES:g}, e.g. 2")
    if arguments.list or arguments.presets:
        _list(arguments)
        return 0
    if not arguments.configs:
        raise UserError("no configuration is named; give a file, a checkpoint folder, a recipe or a preset, e.g. nano")

    from poise.preflight.check import check

    settings = _read(arguments.configs)
    report, measured = check(settings), None
    if arguments.model:
        from poise.preflight.measure import measure

        spent = (time.perf_counter() - began) / 60  # loading torch is part of the time
        measured = measure(settings, minutes=max(0.01, minutes - spent), say=_progress())
        report = measured.added_to(report)
    if arguments.json:
        print(to_json(_record(report, settings, measured)))
    else:
        from poise.preflight.terminal import show

        lines = measured.lines(arguments.all) if measured else ()
        show(report, settings, _console(), everything=arguments.all, measured=lines)
    sys.stdout.flush()  # a reader that has gone is noticed here, not when the program ends
    return int(arguments.fail_on is not None and report.at_least(arguments.fail_on))


def _parser() -> Parser:
    parser = Parser(
        "check",
        "Say what is known to break about a configuration, before it runs: each finding with its reason, what to "
        "write instead, and whose experience that is. CONFIG is a recipe of poise (file or name), a Hugging Face "
        "config.json with training arguments beside it, Megatron-LM arguments (a script, or a log that begins with "
        "them), a torchtitan TOML, a checkpoint folder, or the name of a published run (--presets). Several files "
        "are read as one run.",
        "poise check nano\n  poise check config.json training_args.json --fail-on critical\n"
        "  poise check bloom-176b\n  poise check small --model --minutes 2",
        "--model also measures, on this machine and within --minutes, a model of the configuration's family: its "
        "start, one\nbackward pass, three widths, and small proxies whose attention logits are extrapolated. A "
        "forecast is a forecast.",
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="files, a folder, a recipe's or a preset's name")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--fail-on", choices=SEVERITIES, help="exit with 1 if a finding is at least so severe")
    parser.add_argument("--all", action="store_true", help="say why for every finding, and name every rule")
    parser.add_argument("--model", action="store_true", help="also measure a model of this family on this machine")
    parser.add_argument("--minutes", type=float, metavar="M", help="that long at most, with --model (default 2)")
    parser.add_argument("--list", action="store_true", help="list all rules, with severity and source")
    parser.add_argument("--presets", action="store_true", help="list the published configurations")
    return parser


def _read(words: Sequence[str]) -> Settings:
    from poise.preflight.presets import PRESETS
    from poise.preflight.read import read_settings
    from poise.preflight.readers.recipe import names

    for word in words:
        if Path(word).exists():
            continue
        if word in PRESETS:
            if len(words) > 1:
                raise UserError(f"'{word}' is a published configuration, which is judged alone; leave the others out")
            return PRESETS[word].settings
        known = names()
        if "/" not in word and Path(word).stem not in known:
            near = nearest(word, [*PRESETS, *known])
            if near or not Path(word).suffix:
                raise UserError(
                    f"no configuration '{word}'{near or ';'} give a file, a checkpoint folder, a recipe "
                    f"({', '.join(known)}), or a published run (poise check --presets)"
                )
    return read_settings([Path(word) for word in words])


def _record(report: Report, settings: Settings, measured: Measurement | None) -> dict[str, Any]:
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    read = {name: value for name, value in values.items() if value is not None and name not in _NOT_SETTINGS}
    record = report.record() | {
        "settings": read | {"n_params": settings.n_params, "batch_tokens": settings.batch_tokens},
        "said": dict(settings.said),
    }
    return record | ({"measured": measured.record()} if measured else {})


def _list(arguments: argparse.Namespace) -> None:
    from poise.preflight.presets import PRESETS
    from poise.preflight.terminal import columns, rule_lines, show_rules

    if arguments.json:
        rules = [dict(zip(("rule", "severity", "title", "source"), row, strict=True)) for row in rule_lines()]
        presets = [
            {"name": p.name, "title": p.title, "outcome": p.outcome, "what": p.what, "mark": p.mark}
            | {"sources": list(p.sources)}
            for p in PRESETS.values()
        ]
        listed = ({"rules": rules} if arguments.list else {}) | ({"presets": presets} if arguments.presets else {})
        print(to_json(listed))
        return
    if arguments.list:
        show_rules(_console())
    if arguments.presets:
        print("\n".join(columns((p.name, p.outcome, p.mark, p.title) for p in PRESETS.values())))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)


def _progress() -> Callable[[str], None]:
    """Return what is told how far a measurement is: a line each, on standard error."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return say
