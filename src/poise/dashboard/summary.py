"""The figures of a run, from its journal alone: used by the report and by the last lines in the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from poise.core.journal import Record, timeline
from poise.dashboard.curves import trained
from poise.dashboard.incidents import Fault, Incident, faults, group, incidents, is_announcement, moments
from poise.dashboard.text import count, duration, is_number, number, plural

State = Literal["finished", "stopped", "halted", "partial", "empty"]

LAST_STEPS: Final = 10
"""The final loss is the mean over this many last trained steps: one step's loss is mostly its batch."""

SHOWN_INCIDENTS: Final = 8
"""Most incidents listed in the terminal; the report has them all."""

_ACTIONS: Final = {
    "": "recorded only",
    "proceed": "took the step",
    "skip": "skipped the update",
    "clip": "clipped the gradient",
    "lower_lr": "lowered the learning rate",
    "reset_moments": "reset the moments",
    "rollback": "rolled back",
    "drop_data": "dropped the data",
    "halt": "halted the run",
    "watch": "took the step, watching",
    "qk_clip": "clipped queries and keys",
    "raise_precision": "raised the precision",
}
_ENDINGS: Final[dict[str, State]] = {"finished": "finished", "stopped": "stopped", "halted": "halted"}


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened in a run. None means that the journal does not say.

    Attributes:
        state: how it ended; ``partial`` has no end record (still running, or died), ``empty`` has no step.
        message: what the end record says beyond its reason.
        step: the last step that counts.
        total_steps: steps asked for.
        loss_first: first finite training loss, nats per token.
        loss_last: mean of the last ``LAST_STEPS`` trained steps, NaN if the very last one was not finite.
        eval_last: last validation loss.
        eval_best: lowest validation loss.
        tokens: tokens consumed up to the last step.
        tokens_per_s: median over steps.
        wall_s: seconds the process was running, restarts added up, time between them not counted.
        productive: share of ``wall_s`` in steps that count, with a finite loss and an applied update.
        parameters: number of weights.
        events: event records; those that only announce an injected fault do not count.
        skipped: steps whose update was skipped.
        rollbacks: rollback records.
        restarts: times the run was taken up again.
        lost_steps: steps that were done and then abandoned, or done twice.
        nonfinite_steps: steps of the final history whose loss was NaN or infinite.
        actions: (name, how often) of the guard's decisions other than to proceed, most frequent first.
        incidents: what went wrong and the answer, repetitions folded.
        faults: what was injected on purpose.
    """

    state: State
    message: str
    step: int
    total_steps: int | None
    loss_first: float | None
    loss_last: float | None
    eval_last: float | None
    eval_best: float | None
    tokens: int | None
    tokens_per_s: float | None
    wall_s: float | None
    productive: float | None
    parameters: int | None
    events: int
    skipped: int
    rollbacks: int
    restarts: int
    lost_steps: int
    nonfinite_steps: int
    actions: tuple[tuple[str, int], ...]
    incidents: tuple[Incident, ...]
    faults: tuple[Fault, ...]


def summarise(records: Sequence[Record]) -> Summary:
    """Work out the figures of a run from all records of its journal, in the order they were written."""
    history = timeline(records)
    steps = [r for r in history if r["type"] == "step"]
    run = newest(records, "run") or {}
    evals = [r["loss"] for r in history if r["type"] == "eval" and is_number(r.get("loss"))]
    losses = [r["loss"] for r in steps if is_number(r.get("loss"))]
    actions = Counter(m.action for m in moments(records) if m.action not in ("", "proceed"))
    state, message = _ending(records)
    wall_s = _wall_seconds(records)
    return Summary(
        state=state,
        message=message,
        step=int(steps[-1]["step"]) if steps else 0,
        total_steps=_whole(run.get("total_steps")),
        loss_first=next((x for x in losses if math.isfinite(x)), None),
        loss_last=_final_loss(steps),
        eval_last=evals[-1] if evals else None,
        eval_best=min((x for x in evals if math.isfinite(x)), default=None),
        tokens=_whole(steps[-1].get("tokens")) if steps else None,
        tokens_per_s=_speed(steps, run),
        wall_s=wall_s,
        productive=_productive(steps, wall_s),
        parameters=_whole(run.get("parameters")),
        events=sum(r["type"] == "event" and not is_announcement(r) for r in records),
        skipped=actions["skip"],
        rollbacks=sum(r["type"] == "rollback" for r in records),
        restarts=sum(r["type"] == "restart" for r in records),
        lost_steps=sum(r["type"] == "step" for r in records) - len(steps),
        nonfinite_steps=sum(not math.isfinite(x) for x in losses),
        actions=tuple(actions.most_common()),
        incidents=tuple(group(incidents(records))),
        faults=tuple(faults(records)),
    )


def newest(records: Sequence[Record], kind: str) -> Record | None:
    """Return the last record of a type, None if there is none."""
    return next((r for r in reversed(records) if r["type"] == kind), None)


def outcome(summary: Summary) -> str:
    """Return how the run ended, as the head of a sentence, e.g. ``Finished 400 of 400 steps``."""
    of = f"{summary.step:,}"
    if summary.total_steps is not None:
        of += f" of {summary.total_steps:,}"
    unit = "step" if (summary.total_steps or summary.step) == 1 else "steps"
    return {
        "finished": f"Finished {of} {unit}",
        "stopped": f"Stopped after {of} {unit}",
        "halted": f"Halted after {of} {unit}",
        "partial": f"No end recorded after {of} {unit}",
        "empty": "No step was recorded",
    }[summary.state]


def verdict(summary: Summary) -> str:
    """Return the run in one sentence."""
    if summary.state == "empty":
        return outcome(summary) + "."
    parts = [f"{outcome(summary)}; loss {number(summary.loss_first)} → {number(summary.loss_last)}"]
    parts.append(
        f"{plural(summary.events, 'event')}, {plural(summary.skipped, 'skipped step')}, "
        f"{plural(summary.rollbacks, 'rollback')}"
    )
    return "; ".join(parts) + "."


def action_text(incident: Incident) -> str:
    """Return what was done about an incident, in words."""
    return _ACTIONS.get(incident.action, incident.action.replace("_", " "))


def render_text(summary: Summary, run_dir: Path, next_commands: Sequence[str] = ()) -> str:
    """Return the end-of-run summary for a terminal: plain ASCII where the journal is, no colours.

    Args:
        summary: the figures.
        run_dir: the run's folder, for the path of its report.
        next_commands: commands that the reader is likely to want next.
    """
    lines = [outcome(summary) + (f": {summary.message}" if summary.message else ".")]
    rows = [
        ("loss", f"{number(summary.loss_first)} -> {number(summary.loss_last)}"),
        ("validation", _validation(summary)),
        ("tokens", f"{count(summary.tokens)} at {count(summary.tokens_per_s)} tokens/s"),
        ("time", duration(summary.wall_s) + _productive_text(summary)),
    ]
    if summary.tokens is None:
        rows = [row for row in rows if row[0] != "tokens"]
    if summary.eval_last is None:
        rows = [row for row in rows if row[0] != "validation"]
    lines += [f"  {name:<11} {value}" for name, value in rows]
    if summary.nonfinite_steps:
        lines += [f"  {'not finite':<11} the loss of {plural(summary.nonfinite_steps, 'step')}"]
    lines += _guard_lines(summary)
    report = run_dir / "report.html"
    if report.exists():
        lines += [f"  {'report':<11} {report}"]
    if next_commands:
        lines += ["", "Next:", *(f"  {command}" for command in next_commands)]
    return "\n".join(lines)


def _guard_lines(summary: Summary) -> list[str]:
    if not summary.incidents:
        return [f"  {'guard':<11} no event"]
    facts = [plural(summary.events, "event")]
    facts += [f"{n:,} x {name.replace('_', ' ')}" for name, n in summary.actions]
    lines = [f"  {'guard':<11} {', '.join(facts)}"]
    for one in summary.incidents[:SHOWN_INCIDENTS]:
        times = f" ({one.count:,} x)" if one.count > 1 else ""
        reading = f", {one.signal} {number(one.value)}" if one.signal and one.value is not None else ""
        expected = f" (expected {number(one.expected)})" if reading and one.expected is not None else ""
        injected = ", injected" if one.injected else ""
        head = f"step {one.steps}{times}: {one.kind.replace('_', ' ')}"
        cause = f"; cause: {one.cause}" if one.cause else ""
        lines.append(f"    {head}{reading}{expected}{injected}: {action_text(one)}{cause}")
    more = len(summary.incidents) - SHOWN_INCIDENTS
    if more > 0:
        lines.append(f"    and {more:,} more, all in the report")
    return lines


def _validation(summary: Summary) -> str:
    best = ""
    if summary.eval_best is not None and summary.eval_best != summary.eval_last:
        best = f" (best {number(summary.eval_best)})"
    return number(summary.eval_last) + best


def _productive_text(summary: Summary) -> str:
    return "" if summary.productive is None else f", {summary.productive:.0%} of it productive"


def _ending(records: Sequence[Record]) -> tuple[State, str]:
    """Return state and message. An end that is followed by more steps or a restart was not the end."""
    for record in reversed(records):
        if record["type"] == "end":
            reason = str(record.get("reason"))
            message = str(record.get("message") or "")
            if reason in _ENDINGS:
                return _ENDINGS[reason], message
            return "stopped", message or reason
        if record["type"] in ("step", "restart", "run", "rollback"):
            break
    return ("partial" if any(r["type"] == "step" for r in records) else "empty"), ""


def _final_loss(steps: Sequence[Record]) -> float | None:
    losses = [r["loss"] for r in trained(steps) if is_number(r.get("loss"))][-LAST_STEPS:]
    if not losses:
        return None
    if not math.isfinite(losses[-1]):
        return math.nan
    finite = [x for x in losses if math.isfinite(x)]
    return math.fsum(finite) / len(finite)


def _speed(steps: Sequence[Record], run: Record) -> float | None:
    """Return the median speed: the first step's set-up and a pause for saving do not move it."""
    speeds = [r["tokens_per_s"] for r in steps if is_number(r.get("tokens_per_s"))]
    per_step = run.get("tokens_per_step")
    if not speeds and is_number(per_step):
        speeds = [per_step / r["seconds"] for r in steps if is_number(r.get("seconds")) and r["seconds"] > 0]
    speeds = sorted(x for x in speeds if math.isfinite(x))
    return float(speeds[len(speeds) // 2]) if speeds else None


def _wall_seconds(records: Sequence[Record]) -> float | None:
    total, start, last = 0.0, None, None
    for record in records:
        time = record.get("time")
        if not is_number(time):
            continue
        if start is None or record["type"] in ("run", "restart"):
            total += last - start if start is not None and last is not None else 0.0
            start = time
        last = time
    return None if start is None or last is None else total + last - start


def _productive(steps: Sequence[Record], wall_s: float | None) -> float | None:
    """Return the share of the time that is in the weights; None where the journal has no step times."""
    if not wall_s or any(not is_number(r.get("seconds")) for r in steps):
        return None
    good = [r for r in trained(steps) if not is_number(r.get("loss")) or math.isfinite(r["loss"])]
    useful = math.fsum(r["seconds"] for r in good)
    return min(1.0, useful / wall_s) if useful <= 1.02 * wall_s else None


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) and math.isfinite(value) else None
