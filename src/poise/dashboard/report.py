"""``report.html``: a run on one page, made from its journal and the recipe beside it, nothing else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from poise.core import journal
from poise.core.errors import UserError
from poise.core.journal import Record
from poise.dashboard.figures import run_figures
from poise.dashboard.incidents import Incident
from poise.dashboard.page import Page
from poise.dashboard.summary import LAST_STEPS, Summary, action_text, newest, outcome, summarise, verdict
from poise.dashboard.text import MISSING, count, duration, is_number, number, plural

ROWS: Final = 500
"""Most rows of the table of incidents; the journal has the rest."""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    The page is one file without any link to the network. A journal that stops in the middle, or in the middle
    of a line, gives a page that says so.

    Raises:
        UserError: there is no journal in the folder.
        OSError: the folder cannot be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / "journal.jsonl"
    if not path.is_file():
        raise UserError(f"no journal '{path}'; give the folder of a run, the one that holds journal.jsonl")
    records = journal.read(path)
    summary = summarise(records)
    run = newest(records, "run") or {}
    page = Page(run_dir.resolve().name or "run")
    page.paragraph(verdict(summary), "verdict")
    page.paragraph(_when(records), "soft")
    for warning in _warnings(summary, records, _is_torn(path)):
        page.paragraph(warning, "warning")
    page.key_figures(_key_figures(summary))
    for title, text, figure in run_figures(records, summary):
        page.heading(title)
        if text:
            page.paragraph(text, "soft")
        page.figure(figure, f"{title} by training step. {verdict(summary)}")
    _guard_section(page, summary)
    _origin_sections(page, run, run_dir)
    return page.write(run_dir / "report.html")


def _key_figures(summary: Summary) -> list[tuple[str, str]]:
    best = summary.eval_best
    pairs = [
        (
            f"Loss, first → mean of last {LAST_STEPS}",
            f"{number(summary.loss_first)} → {number(summary.loss_last)}",
        ),
        ("Validation loss", number(summary.eval_last)),
        ("Best validation loss", number(best) if best != summary.eval_last else ""),
        ("Tokens", count(summary.tokens)),
        ("Tokens/s, median", count(summary.tokens_per_s)),
        ("Wall time", duration(summary.wall_s)),
        (
            "Productive share of the time",
            MISSING if summary.productive is None else f"{summary.productive:.0%}",
        ),
        ("Parameters", count(summary.parameters)),
        ("Restarts", f"{summary.restarts:,}" if summary.restarts else ""),
        ("Steps lost", f"{summary.lost_steps:,}" if summary.lost_steps else ""),
    ]
    return [(name, value) for name, value in pairs if value]


def _warnings(summary: Summary, records: Sequence[Record], torn: bool) -> list[str]:
    out = []
    if summary.message:
        out.append(f"{outcome(summary)}: {summary.message}")
    if summary.state == "partial":
        out.append(
            "This journal has no end record: the run is still going, or it died after "
            f"step {summary.step:,}. The page shows what was written until then."
        )
    elif summary.state == "empty":
        out.append("The journal holds no training step: the run had not begun, or it died before its first step.")
    if torn:
        out.append("The last line of the journal is torn: it was being written when the run died. It is left out.")
    if summary.nonfinite_steps:
        out.append(f"{plural(summary.nonfinite_steps, 'step')} had a loss that is not a finite number.")
    if summary.faults:
        names = ", ".join(dict.fromkeys(f.name.replace("_", " ") for f in summary.faults))
        out.append(f"Faults were injected into this run on purpose: {names}.")
    return out


def _guard_section(page: Page, summary: Summary) -> None:
    page.heading("What the guard did and why")
    found = summary.incidents
    if not found:
        page.paragraph("The journal has no event and no intervention.")
        return
    page.paragraph(
        f"{plural(summary.events, 'event')}"
        + "".join(f", {n:,} × {name.replace('_', ' ')}" for name, n in summary.actions)
        + ". Repetitions are folded into one row with their worst reading.",
        "soft",
    )
    injected = any(one.injected for one in found)
    head = ["Step", "Kind", "Value", "Expected", "Action", "Reason"]
    rows = [_row(one) for one in found[:ROWS]]
    if injected:
        head.insert(2, "Injected")
        for row, one in zip(rows, found, strict=False):
            row.insert(2, one.injected.replace("_", " "))
    if any(one.cause for one in found):
        head.insert(-1, "Cause")
        for row, one in zip(rows, found, strict=False):
            row.insert(-1, one.cause or MISSING)
    page.table(head, rows, wide=["Reason"], tag="Injected")
    if len(found) > ROWS:
        page.paragraph(f"{len(found) - ROWS:,} more are in journal.jsonl.", "soft")


def _row(one: Incident) -> list[str]:
    times = f" ({one.count:,} ×)" if one.count > 1 else ""
    severity = f" ({one.severity})" if one.severity else ""
    value = number(one.value) if one.value is not None else MISSING
    parts = [one.message] if one.severity == "note" or not one.reason else [one.reason]
    if one.message and one.message not in parts[0]:
        parts.append(one.message)
    parts += [sentence for sentence in one.evidence if one.message not in sentence]
    reason = " ".join(_sentence(part) for part in parts if part)
    return [
        one.steps + times,
        one.kind.replace("_", " ") + severity,
        f"{one.signal.replace('_', ' ')} {value}".strip(),
        number(one.expected),
        action_text(one),
        reason or MISSING,
    ]


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def _origin_sections(page: Page, run: Record, run_dir: Path) -> None:
    page.heading("Configuration")
    page.code(_recipe_text(run, run_dir))
    page.heading("Environment")
    environment = _flat(run.get("environment"))
    if environment:
        page.table(["Name", "Value"], environment, wide=["Value"])
    else:
        page.paragraph("The journal does not say where the run was made.")
    page.heading("Command")
    command = run.get("command")
    if command:
        page.paragraph("This command, in the same environment, makes the run again:", "soft")
        page.code(shlex.join(map(str, command)) if isinstance(command, list) else str(command))
    else:
        page.paragraph("The journal does not say which command started the run.")


def _recipe_text(run: Record, run_dir: Path) -> str:
    path = run_dir / "recipe.toml"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").rstrip()
    if run.get("recipe"):
        return json.dumps(run["recipe"], indent=2, default=str, ensure_ascii=False)
    return "There is no recipe.toml in the run's folder, and the journal holds no recipe."


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    """Return nested mappings as rows of dotted name and value."""
    if not isinstance(value, Mapping):
        return [] if value is None else [[prefix, str(value)]]
    rows = []
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, Mapping):
            rows += _flat(inner, name)
        elif isinstance(inner, list):
            rows.append([name, ", ".join(map(str, inner))])
        else:
            rows.append([name, MISSING if inner is None else str(inner)])
    return rows


def _when(records: Sequence[Record]) -> str:
    times = [r["time"] for r in records if is_number(r.get("time"))]
    if not times:
        return "The journal has no times."
    first, last = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in (times[0], times[-1]))
    return f"Started {first} UTC, last record {last} UTC."


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"
