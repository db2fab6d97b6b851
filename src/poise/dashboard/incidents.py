"""What went wrong and what was done about it: events joined with the decisions that answered them.

The journal holds one ``event`` record an alarm and one ``decision`` record a step that got one. Both carry
the step; after a rollback the same step number comes again, so records are joined by step *and* by their
place in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from poise.core.journal import Record
from poise.dashboard.text import is_number

GAP: Final = 5
"""Steps of silence after which the same alarm is a new incident."""

_LONGEST: Final = 100_000  # steps of one fault; a damaged record must not fill the memory
_BREAKS: Final = frozenset({"run", "restart", "rollback", "end"})


@dataclass(frozen=True, slots=True)
class Incident:
    """One alarm, or a run of equal alarms with equal answers, and the answer.

    Attributes:
        step: the first step.
        last: the last step; equal to ``step`` for a single alarm.
        count: how many alarms are folded into this one.
        kind: e.g. ``fast_spike``; ``decision`` where a decision came without an alarm.
        severity: ``note``, ``warning``, ``critical`` or empty.
        signal: name of the reading, e.g. ``loss``.
        value: the worst reading; None if not recorded.
        expected: what a healthy run would have shown; None if not recorded.
        message: the detector's sentence.
        action: what the guard decided, e.g. ``skip``; empty if it decided nothing.
        reason: why.
        injected: name of the fault that was put in on purpose; empty for a natural one.
        loss: training loss of the first step; None if not recorded.
        cause: the guard's verdict with its certainty and place, e.g. ``data (measured)``; empty where it gave none.
        evidence: what the verdict rests on.
    """

    step: int
    last: int
    count: int
    kind: str
    severity: str = ""
    signal: str = ""
    value: float | None = None
    expected: float | None = None
    message: str = ""
    action: str = ""
    reason: str = ""
    injected: str = ""
    loss: float | None = None
    cause: str = ""
    evidence: tuple[str, ...] = ()

    @property
    def steps(self) -> str:
        """Step or range of steps, as text."""
        return f"{self.step:,}" if self.step == self.last else f"{self.step:,} to {self.last:,}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that was injected on purpose, from step ``first`` to step ``last``."""

    name: str
    first: int
    last: int


@dataclass(slots=True)
class Moment:
    """All that the journal says about one pass over one step."""

    step: int
    events: list[Record] = field(default_factory=list)
    decisions: list[Record] = field(default_factory=list)
    verdicts: list[Record] = field(default_factory=list)
    step_record: Record | None = None

    @property
    def action(self) -> str:
        """What was done, e.g. ``skip``; empty or ``proceed`` for an ordinary step."""
        decision = self.decisions[-1] if self.decisions else None
        return action_of(decision) or action_of(self.step_record)


def incidents(records: Iterable[Record]) -> list[Incident]:
    """Return every alarm with its answer, in the order of the journal.

    An alarm inside an injected fault is said to be injected.
    """
    records = list(records)
    known = faults(records)
    out = []
    for one in (incident for moment in moments(records) for incident in _of_moment(moment)):
        cause = next((f.name for f in known if f.first <= one.step <= f.last), "")
        out.append(replace(one, injected=one.injected or cause))
    return out


def group(found: Iterable[Incident]) -> list[Incident]:
    """Fold repetitions (same kind, signal, action and fault, at most ``GAP`` steps apart) into one.

    The order is that of first appearance; the folded incident shows its worst reading.
    """
    out: list[Incident] = []
    newest: dict[tuple[str, ...], int] = {}
    for one in found:
        key = (one.kind, one.signal, one.action, one.injected)
        at = newest.get(key)
        if at is not None and 0 < one.step - out[at].last <= GAP:
            out[at] = _fold(out[at], one)
        else:
            newest[key] = len(out)
            out.append(one)
    return out


def faults(records: Iterable[Record]) -> list[Fault]:
    """Return the injected faults, neighbouring steps of one fault folded together.

    A record with ``injected`` names the fault that struck its step; ``length``, if given, says for how many.
    """
    steps: dict[str, set[int]] = {}
    for record in records:
        name = record.get("injected")
        if name and is_number(record.get("step")):
            first, length = int(record["step"]), record.get("length")
            length = int(length) if is_number(length) and 1 <= length <= _LONGEST else 1
            steps.setdefault(str(name), set()).update(range(first, first + length))
    out: list[Fault] = []
    for name, hit in steps.items():
        for step in sorted(hit):
            if out and out[-1].name == name and step - out[-1].last <= GAP:
                out[-1] = replace(out[-1], last=step)
            else:
                out.append(Fault(name, step, step))
    return sorted(out, key=lambda fault: (fault.first, fault.name))


def action_of(record: Record | None) -> str:
    """Return the action named in a record, empty where there is none."""
    return str(record.get("action") or "") if record else ""


def moments(records: Iterable[Record]) -> Iterator[Moment]:
    """Yield every pass over a step, in the order of the journal.

    Within a pass the step record may come before its events, after them, or (where a rollback is carried out
    first) even after the rollback record.
    """
    now: Moment | None = None
    over = False
    for record in records:
        kind, step = record["type"], record.get("step")
        if kind in _BREAKS:
            over = True
        elif kind in ("event", "decision", "verdict", "step") and is_number(step):
            same = now is not None and now.step == step and (kind != "step" or now.step_record is None)
            if now is None or not same or (over and not (kind == "step" and action_of(record))):
                if now:
                    yield now
                now = Moment(int(step))
            over = False
            if kind == "event":
                now.events.append(record)
            elif kind == "decision":
                now.decisions.append(record)
            elif kind == "verdict":
                now.verdicts.append(record)
            else:
                now.step_record = record
    if now:
        yield now


def is_announcement(record: Record) -> bool:
    """Return whether an event record only says that a fault is being injected: it is nobody's alarm."""
    name = record.get("injected")
    return bool(name) and (record.get("detector") == "injector" or record.get("kind") == name)


def _of_moment(moment: Moment) -> Iterator[Incident]:
    decision = moment.decisions[-1] if moment.decisions else None
    action = moment.action
    reason = str((decision or {}).get("reason") or "")
    sources = [*moment.events, *moment.decisions, *([moment.step_record] if moment.step_record else [])]
    injected = next((str(s["injected"]) for s in sources if s.get("injected")), "")
    events = [e for e in moment.events if not is_announcement(e)]
    alarms: Sequence[Any] = events or (decision or {}).get("alarms") or ()
    answered = [a if isinstance(a, dict) else {"kind": a} for a in alarms]
    if not answered and action not in ("", "proceed"):
        answered = [{"kind": "decision"}]
    cause, evidence = _cause(moment.verdicts[-1]) if moment.verdicts else ("", ())
    for alarm in answered:
        yield Incident(
            step=moment.step,
            last=moment.step,
            count=1,
            kind=str(alarm.get("kind") or "event"),
            severity=str(alarm.get("severity") or ""),
            signal=str(alarm.get("signal") or ""),
            value=_reading(alarm.get("value")),
            expected=_reading(alarm.get("expected")),
            message=str(alarm.get("message") or ""),
            action=action,
            reason=reason,
            injected=str(alarm.get("injected") or injected),
            loss=_loss(moment, alarm),
            cause=cause,
            evidence=evidence,
        )


def _cause(verdict: Record) -> tuple[str, tuple[str, ...]]:
    place = f" in {verdict['place']}" if verdict.get("place") else ""
    evidence = verdict.get("evidence")
    sentences = tuple(str(e) for e in evidence) if isinstance(evidence, list | tuple) else ()
    return f"{verdict.get('cause')}{place} ({verdict.get('certainty')})", sentences


def _fold(first: Incident, more: Incident) -> Incident:
    worst = more if _badness(more) > _badness(first) else first
    return replace(
        first,
        last=more.last,
        count=first.count + more.count,
        value=worst.value,
        expected=worst.expected,
        message=worst.message,
        reason=worst.reason,
        severity=worst.severity,
        cause=first.cause or more.cause,
        evidence=first.evidence or more.evidence,
    )


def _badness(one: Incident) -> float:
    if one.value is None:
        return -1.0
    if not math.isfinite(one.value):
        return math.inf
    return abs(one.value - (one.expected if one.expected is not None else 0.0))


def _loss(moment: Moment, alarm: Record) -> float | None:
    """Return the loss of this pass over the step: a rolled-back step has another one in the final history."""
    if moment.step_record:
        return _reading(moment.step_record.get("loss"))
    return _reading(alarm.get("value")) if alarm.get("signal") == "loss" else None


def _reading(value: Any) -> float | None:
    return float(value) if is_number(value) else None
