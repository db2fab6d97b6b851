"""The injection campaign: every kind of fault, several seeds, beside clean runs of the same seeds.

Each run is a folder under ``out`` and is run once: a campaign that was interrupted goes on where it was, and one
with more seeds or kinds adds to it. What is scored is read from the journals, as a user would. Runs know nothing
of the code that made them: after a change of the guard, start in a new folder.

A fault counts as detected when the first alarm of severity warning or critical after its onset, or the note that a
batch was odd (all that one odd batch deserves), comes within the case's number of steps; alarms of severity warning
or critical before the onset are false and counted apart. Time is counted in steps really done,
so a rollback does not turn it back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch

from poise.core import config as configs
from poise.core.errors import UserError, nearest
from poise.core.journal import Record, read, timeline, to_json
from poise.data.prepare import prepare
from poise.studies.faults import CASES, Case, Fault, Variant
from poise.studies.inject import Injector
from poise.train.recipe import Recipe, load
from poise.train.run import train
from poise.train.state import Run

LAST: Final = 20
"""The final training loss is the mean over this many last steps."""
NAMED_WITHIN: Final = 60
"""A verdict counts for the fault if it comes within so many steps after the onset: looking into it takes a while."""
CERTAINTIES: Final = ("measured", "likely", "possible")
FACTS: Final = "campaign.json"
"""File in a run's folder that says that the run is over, and how it ended."""

BASE: Final[Mapping[str, Any]] = {
    "name": "campaign",
    "model": {"n_layers": 4, "d_model": 64, "n_heads": 4},
    "data": {"vocab_size": 1024},
    "optim": {"lr": 1e-2, "schedule": {"kind": "cosine", "warmup_steps": 30}},
    "train": {
        "steps": 300,
        "batch_size": 16,
        "seq_len": 64,
        "eval_every": 100,
        "eval_batches": 32,
        "save_every": 25,
        "compile": "off",
        "dtype": "fp32",
        "threads": 1,
    },
}
"""Laid over the demo recipe: 1024 tokens a step, about 15 s for 300 steps on one core."""

VARIANTS: Final[Mapping[Variant, Mapping[str, Any]]] = {
    "base": {},
    "no_qk_norm": {"model": {"methods": ["z_loss"]}},
}


@dataclass(frozen=True)
class Plan:
    """One run of the campaign; ``case`` is ``None`` for a clean one."""

    folder: Path
    recipe: Recipe
    variant: Variant
    case: Case | None

    @property
    def fault(self) -> Fault | None:
        return None if self.case is None else self.case.fault(self.recipe.train.steps, self.recipe.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        fault = None if self.fault is None else dataclasses.asdict(self.fault)
        settings: dict[str, Any] = json.loads(to_json({"recipe": configs.to_dict(self.recipe), "fault": fault}))
        return settings


@dataclass(frozen=True)
class Row:
    """How one run went; losses in nats per token, ``nan`` where the run ended without one.

    ``kind`` is ``healthy`` for a clean run; ``struck`` says that the fault really came. ``delay`` counts steps from
    the onset to the first alarm, ``actions`` what was decided other than to proceed or watch (after the onset of a
    fault; before it, ``early_actions``). ``place_right`` and ``cause_right`` are ``None`` where nothing is to be named.
    """

    name: str
    kind: str
    variant: str
    seed: int
    outcome: str
    message: str
    recoverable: bool
    struck: bool
    detected: bool
    delay: int | None
    alarms: tuple[str, ...]
    early_alarms: int
    place: str
    place_right: bool | None
    cause: str
    certainty: str
    cause_right: bool | None
    actions: Mapping[str, int]
    early_actions: int
    steps_undone: int
    nonfinite: bool
    train_loss: float
    val_loss: float
    clean_train_loss: float
    clean_val_loss: float
    seconds: float

    @property
    def skipped(self) -> int:
        return self.actions.get("skip", 0)

    @property
    def gap(self) -> float:
        """Validation loss relative to the clean run of the same seed, 0.01 for 1 % above it."""
        return self.val_loss / self.clean_val_loss - 1

    @property
    def train_gap(self) -> float:
        """The same of the training loss; the batches of the last steps differ where data were dropped."""
        return self.train_loss / self.clean_train_loss - 1


@dataclass(frozen=True)
class Campaign:
    """Result: a row per run, clean ones included."""

    rows: tuple[Row, ...]

    @property
    def healthy(self) -> tuple[Row, ...]:
        return self.of("healthy")

    @property
    def faulty(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind != "healthy")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.kind for row in self.faulty))

    def of(self, kind: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == kind)


def run_campaign(
    out: str | Path,
    seeds: int = 3,
    kinds: Sequence[str] | None = None,
    healthy: int = 6,
    steps: int = 300,
    *,
    jobs: int = 1,
    over: Mapping[str, Any] | None = None,
    guarded: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Campaign:
    """Run what is missing under ``out`` and score all of it.

    Args:
        seeds: runs per kind of fault, and the least number of clean runs.
        kinds: names of ``CASES``; all of them where ``None``.
        healthy: clean runs of the base recipe; a recipe that only some faults need has one clean run per seed.
        steps: of every run.
        jobs: runs at the same time, each in a process of its own if more than one.
        over: settings on top of ``BASE``, e.g. another text.
        guarded: false runs everything without a guard, to see what the faults do by themselves.
        progress: called as (name of a run that is over, how many are, of how many).

    Raises:
        UserError: a kind that there is not, too few steps for a fault, or ``out`` holds runs of other settings.
    """
    plans = plan(Path(out), seeds, kinds, healthy, steps, over=over, guarded=guarded)
    waiting = [one for one in plans if not _is_over(one)]
    done = len(plans) - len(waiting)
    for one in _carry_out(waiting, jobs):
        done += 1
        if progress is not None:
            progress(one.folder.name, done, len(plans))
    clean: dict[tuple[str, int], Row] = {}
    rows = []
    for one in plans:  # clean ones first
        row = score(one, clean.get((one.variant, one.recipe.seed)))
        if one.case is None:
            clean[one.variant, one.recipe.seed] = row
        rows.append(row)
    return Campaign(tuple(rows))


def plan(
    out: Path,
    seeds: int,
    kinds: Sequence[str] | None,
    healthy: int,
    steps: int,
    *,
    over: Mapping[str, Any] | None = None,
    guarded: bool = True,
) -> list[Plan]:
    """Return the runs of a campaign, clean ones first; prepares the text, once for all of them."""
    if seeds < 1 or healthy < 0:
        raise UserError(
            f"a campaign needs at least one seed and no less than 0 healthy runs, not {seeds} and {healthy}"
        )
    chosen = [_case(kind) for kind in (CASES if kinds is None else kinds)]
    for case in chosen:
        fault = case.fault(steps, min(seeds, 8) - 1)
        needed = LAST + (case.within if case.from_start else fault.at + fault.length + case.within)
        if steps < needed:
            raise UserError(
                f"steps is {steps}; {case.kind} over {seeds} seeds needs at least {needed} to strike and end"
            )
    values = configs.merge(configs.merge(BASE, over or {}), {"guard": {} if guarded else {"enabled": False}})
    data = load("demo", values).data
    text = prepare(
        data.source,
        Path(data.dir) if data.dir else None,
        data.settings,
    )
    values = configs.merge(values, {"data": {"source": str(text.dir), "dir": ""}, "train": {"steps": steps}})

    def make(variant: Variant, seed: int, case: Case | None) -> Plan:
        start = ("clean" if variant == "base" else f"clean-{variant}") if case is None else case.kind
        name = f"{start}-s{seed}"
        recipe = load("demo", configs.merge(configs.merge(values, VARIANTS[variant]), {"name": name, "seed": seed}))
        return Plan(out / name, recipe, variant, case)

    variants: dict[Variant, None] = dict.fromkeys(["base", *(case.variant for case in chosen)])
    clean = [
        make(variant, seed, None)
        for variant in variants
        for seed in range(max(healthy, seeds) if variant == "base" else seeds)
    ]
    return clean + [make(case.variant, seed, case) for case in chosen for seed in range(seeds)]


def _case(kind: str) -> Case:
    if kind not in CASES:
        raise UserError(f"there is no fault '{kind}'{nearest(kind, CASES)}; use {', '.join(CASES)}")
    return CASES[kind]


# -- running -------------------------------------------------------------------------------------------


def _is_over(one: Plan) -> bool:
    """Whether the run is on disk; one of other settings is the user's mistake, half of one is run again."""
    facts = one.folder / FACTS
    if not facts.exists():
        return False
    if json.loads(facts.read_text(encoding="utf-8"))["settings"] != one.settings:
        raise UserError(f"'{one.folder}' is a run of other settings; choose another folder for this campaign")
    return True


def _carry_out(plans: Sequence[Plan], jobs: int) -> Iterator[Plan]:
    """Run all of them and yield each as it ends."""
    if jobs <= 1:
        for one in plans:
            run_one(one)
            yield one
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_one, one): one for one in plans}
        for future in as_completed(running):
            try:
                future.result()
            except BrokenProcessPool:
                raise UserError(
                    f"a process died during '{running[future].folder.name}' or a run beside it (memory?); start the "
                    "campaign again with fewer jobs: it goes on where it was"
                ) from None
            yield running[future]


def run_one(one: Plan) -> None:
    """Train one run of the campaign in its folder; an exception in it is how the run ended, not ours."""
    if one.folder.exists():  # a run that was interrupted: only a whole one counts
        shutil.rmtree(one.folder)
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    watched: list[Run] = []
    nonfinite: list[int] = []

    def before(run: Run) -> None:
        watched.append(run)
        run.optimizer.register_step_post_hook(lambda *_: None if _finite(run) else nonfinite.append(run.position.step))
        Injector(() if one.fault is None else (one.fault,)).attach(run)

    began = time.perf_counter()
    try:
        outcome = train(one.recipe, one.folder, before=before)
    except Exception as error:
        reason, message = "died", f"{type(error).__name__}: {error}"
    else:
        reason, message = outcome.reason, outcome.message
    if reason == "stopped":
        raise KeyboardInterrupt  # by the user, who stops the campaign
    facts = {
        "settings": one.settings,
        "outcome": reason,
        "message": message,
        "nonfinite_after": sorted(set(nonfinite)),
        "nonfinite_at_end": bool(watched) and not _finite(watched[0]),
        "seconds": round(time.perf_counter() - began, 2),
    }
    one.folder.mkdir(exist_ok=True)
    aside = one.folder / (FACTS + ".new")
    aside.write_text(to_json(facts) + "\n", encoding="utf-8")
    aside.replace(one.folder / FACTS)


def _finite(run: Run) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in run.model.parameters())


# -- scoring -------------------------------------------------------------------------------------------


def score(one: Plan, clean: Row | None) -> Row:
    """Score a run that is over by its journal; ``clean`` is the clean run of the same recipe and seed."""
    facts = json.loads((one.folder / FACTS).read_text(encoding="utf-8"))
    journal = one.folder / "journal.jsonl"
    records = read(journal) if journal.exists() else []
    onset = next((i for i, r in enumerate(records) if r["type"] == "event" and r["detector"] == "injector"), None)
    before, after = (records, []) if onset is None else (records[:onset], records[onset + 1 :])
    within, expected = (0, "") if one.case is None else (one.case.within, one.case.place)
    first = _first_alarm(after)
    near = [r for _, r in _alarms(after, within)]
    verdict = _verdict(after)
    place = verdict.get("place") or next((r["place"] for r in near if r.get("place")), "")
    cause = verdict.get("cause", "")
    causes = None if one.fault is None else one.fault.what.causes
    train_loss, val_loss = _final_losses(records, one.recipe.train.steps)
    return Row(
        name=one.folder.name,
        kind="healthy" if one.case is None else one.case.kind,
        variant=one.variant,
        seed=one.recipe.seed,
        outcome=facts["outcome"],
        message=facts["message"],
        recoverable=one.fault is None or one.fault.recoverable,
        struck=onset is not None,
        detected=first is not None and first <= within,
        delay=first,
        alarms=tuple(dict.fromkeys(r["kind"] for r in near)),
        early_alarms=sum(1 for _, r in _alarms(before) if r["severity"] != "note"),
        place=place,
        place_right=(place == expected or place.startswith(expected + ".")) if expected else None,
        cause=cause,
        certainty=verdict.get("certainty", ""),
        cause_right=None if causes is None else cause in causes,
        actions=_actions(records if one.case is None else after),
        early_actions=0 if one.case is None else sum(_actions(before).values()),
        steps_undone=sum(r["step"] - r["to"] for r in records if r["type"] == "rollback"),
        nonfinite=bool(facts["nonfinite_after"]) or facts["nonfinite_at_end"],
        train_loss=train_loss,
        val_loss=val_loss,
        clean_train_loss=train_loss if one.case is None else math.nan if clean is None else clean.train_loss,
        clean_val_loss=val_loss if one.case is None else math.nan if clean is None else clean.val_loss,
        seconds=facts["seconds"],
    )


def _counted(records: Sequence[Record]) -> Iterator[tuple[int, Record]]:
    """Yield each record with the number of steps done since the first one's step: 0 for what belongs to it."""
    done = -1
    for record in records:
        done += record["type"] == "step"
        yield max(done, 0), record


def _alarms(records: Sequence[Record], within: float = math.inf) -> Iterator[tuple[int, Record]]:
    """Yield alarms that say what happened, each with its delay, up to ``within`` steps."""
    for delay, record in _counted(records):
        told = record["type"] == "event" and (record["severity"] != "note" or record["kind"] == "data_outlier")
        if told and delay <= within:
            yield delay, record


def _first_alarm(records: Sequence[Record]) -> int | None:
    return next((delay for delay, _ in _alarms(records)), None)


def _verdict(records: Sequence[Record]) -> Record:
    """Return the surest verdict near the onset, the first of several; empty where there is none."""
    found = [r for delay, r in _counted(records) if r["type"] == "verdict" and delay <= NAMED_WITHIN]
    named = [r for r in found if r["cause"] != "unknown"] or found
    return min(named, key=lambda r: CERTAINTIES.index(r["certainty"]), default={})


def _actions(records: Sequence[Record]) -> dict[str, int]:
    taken = Counter(r["action"] for r in records if r["type"] == "decision")
    return {action: n for action, n in sorted(taken.items()) if action not in ("proceed", "watch")}


def _final_losses(records: Sequence[Record], steps: int) -> tuple[float, float]:
    """Return the mean training loss of the last steps and the validation loss; ``nan`` where the run did not end."""
    losses = [r["loss"] for r in timeline(records) if r["type"] == "step"]
    val = [r["loss"] for r in records if r["type"] == "eval" and r["step"] == steps]
    if not any(r["type"] == "end" and r["reason"] == "finished" for r in records):
        return math.nan, math.nan
    return sum(losses[-LAST:]) / len(losses[-LAST:]), val[-1] if val else math.nan


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22); (0, 1) where nothing was tried.

    >>> [round(x, 2) for x in wilson(3, 3)]
    [0.44, 1.0]
    """
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


__all__ = ["BASE", "VARIANTS", "Campaign", "Plan", "Row", "plan", "run_campaign", "run_one", "score", "wilson"]
