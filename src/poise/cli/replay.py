"""``poise replay``: what would the guard have done on this log?"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.args import Parser
from poise.core import config as configs
from poise.core.errors import UserError
from poise.core.journal import to_json
from poise.guard.config import GuardConfig

if TYPE_CHECKING:
    from poise.postmortem.log import Log
    from poise.postmortem.replay import Finding

SAME_EPISODE = 50
"""Steps between two alarms of one kind that are shown as one line."""

NOTHING = ("proceed", "watch")
"""Actions that leave the run as it is."""


@dataclass(frozen=True)
class _Settings:
    """The recipe values that a replay knows: those of the guard, written as in ``poise train``."""

    guard: GuardConfig = field(default_factory=GuardConfig)


def main(words: Sequence[str]) -> int:
    """Replay every log; exit code 0, whatever was found."""
    parser = Parser(
        "replay",
        "Show recorded training logs to the guard, step by step, and print its alarms and what it would have done. "
        "It looks only at the past, as it would in the run itself. Reads every log that poise diagnose reads.",
        "poise replay loss.csv\n  poise replay runs/nano other.jsonl.gz --json --guard.alarms_per_10k 2",
        _guard_help() if {"-h", "--help"} & set(words) else "",
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log file, or a run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line and nothing else")
    parser.add_argument("--all", action="store_true", help="print alarms that are notes, too")
    parser.add_argument("--step-column", metavar="NAME", help="the log's name for the step, where it is not found")
    parser.add_argument("--loss-column", metavar="NAME", help="the log's name for the loss, where it is not found")
    own, values = _split(words)
    arguments = parser.parse_args(own)
    guard = configs.build(_Settings, configs.overrides(values)).guard
    if guard.mode == "halt":
        raise UserError("guard.mode is 'halt', but a recorded log goes on; leave it out, a replay only observes")

    from poise.postmortem.log import read_log
    from poise.postmortem.replay import replay

    for path in arguments.logs:
        if path != "-" and not Path(path).exists():
            read_log(path)  # its message, before any other log has been worked on
    names = _names(arguments.logs)
    for path in arguments.logs:
        log = read_log(path, step_column=arguments.step_column, loss_column=arguments.loss_column)
        found = replay(log, guard)
        if not arguments.all:
            found = (finding for finding in found if finding.severity != "note")
        if arguments.json:
            _print_json(log, found, names[path])
        else:
            _print_table(log, found, names[path])
    sys.stdout.flush()  # a reader that has gone is noticed here, not when the program ends
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the command's own words, and those that are guard values (``--guard.x 1`` or ``--guard.x=1``)."""
    own: list[str] = []
    values: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, has_value, _ = word.partition("=")
        if not (key.startswith("--") and "." in key):
            own.append(word)
            continue
        values.append(word)
        if not has_value and rest:
            values.append(rest.pop(0))
    return own, values


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Return what each log is called: its short name, or its path where two have the same."""
    from poise.postmortem.log import trace_name

    short = {path: trace_name(Path(path)) for path in paths}
    times = Counter(short.values())
    return {path: name if times[name] == 1 else path for path, name in short.items()}


def _print_json(log: Log, found: Iterable[Finding], name: str) -> None:
    for note in log.notes:
        print(f"poise replay: {name}: {note}", file=sys.stderr)
    for finding in found:
        print(to_json(finding.record() | {"trace": name}))


def _print_table(log: Log, found: Iterable[Finding], name: str) -> None:
    actions: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    rows: list[tuple[str, str, str, str, str]] = []
    for episode in _episodes(_counted(found, kinds, actions)):
        first = episode[0]
        worst = max(episode, key=lambda finding: _rise(finding.value, finding.expected))
        span = f"{first.step}" if len(episode) == 1 else f"{first.step}-{episode[-1].step} ({len(episode)}x)"
        done = Counter(finding.action for finding in episode)
        would = ", ".join(f"{action} {times}x" if times > 1 else action for action, times in done.items())
        rows.append((span, first.kind, first.severity, would, worst.message))
    steps, _ = log.series["loss"]  # the replay has seen to it that there is one
    print(f"{name}: {log.format}, {len(steps)} points, steps {steps[0]} to {steps[-1]}")
    for note in log.notes:
        print(f"  note: {note}")
    if rows:
        rows.insert(0, ("step", "kind", "severity", "would", "seen (at its worst)"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4])
    alarms = ", ".join(f"{times} {kind}" for kind, times in kinds.items())
    acts = ", ".join(f"{times} {action}" for action, times in actions.items() if action not in NOTHING)
    print(f"  {sum(kinds.values())} alarms{': ' + alarms if alarms else ''}; would have done: {acts or 'nothing'}")


def _counted(found: Iterable[Finding], kinds: Counter[str], actions: Counter[str]) -> Iterator[Finding]:
    """Pass the findings on; count the alarms by kind, and the actions once a step."""
    last = None
    for finding in found:
        if finding.detector != "policy":
            kinds[finding.kind] += 1
        actions[finding.action] += finding.step != last
        last = finding.step
        yield finding


def _episodes(found: Iterable[Finding]) -> list[list[Finding]]:
    """Gather alarms of one kind at one place that follow each other closely, in the order of their beginnings."""
    out: list[list[Finding]] = []
    latest: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        key = (finding.kind, finding.place)
        episode = latest.get(key)
        if episode is not None and finding.step - episode[-1].step <= SAME_EPISODE:
            episode.append(finding)
        else:
            latest[key] = [finding]
            out.append(latest[key])
    return out


def _rise(value: float, expected: float) -> float:
    """How far off an alarm's reading is; what cannot be compared is furthest."""
    away = abs(value - expected)
    return away if away == away else float("inf")


def _guard_help() -> str:
    lines = ["guard values, as in poise train (the mode is always observe):"]
    default = GuardConfig()
    for name, _, _ in configs.flatten_fields(GuardConfig):
        value: Any = getattr(default, name)
        if name not in ("mode", "enabled"):
            lines.append(f"  --guard.{name:<20} (default {value})")
    return "\n".join(lines)
