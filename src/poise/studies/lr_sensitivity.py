"""The result of a study of learning-rate sensitivity: what was measured of every arm, beside the baseline.

``summarise`` turns the records of cells and the declaration into a frozen ``Result``; nothing that was not measured is
filled in. Losses are nats per token; every figure is computed per seed and then averaged over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from poise.core.errors import UserError, nearest
from poise.studies import lr_table, stats
from poise.studies.published import Comparison, Quantity, Reading, canonical, compare
from poise.studies.stats import Criterion, FirstDiverging, Interval

Record = Mapping[str, Any]
Verdict = Literal["baseline", "lower", "higher", "no difference shown", "unknown", "all diverged"]

SCORES: Final[Mapping[str, str]] = {
    "olmo2_loss": "7σ loss",
    "olmo2_grad": "7σ grad norm",
    "olmo_core_loss": "6σ loss",
    "olmo_core_grad": "6σ grad norm",
}
"""Spike scores: OLMo 2's definition and OLMo-core's, each of the loss and of the gradient norm."""

_TEXT_NUMBERS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Point:
    """An arm at one rate.

    Attributes:
        lr: peak learning rate.
        losses: (seed, final validation loss), not capped.
        loss: mean of the losses, each capped at its loss at initialisation.
        nonfinite: runs that ended without a finite loss.
        diverged: runs that diverged, by criterion.
        diverged_seeds: the seeds of those of "init".
        max_logit: largest attention logit at the end, geometric mean over the seeds with a finite one.
        logits_lost: runs whose last logit was not finite.
    """

    lr: float
    losses: tuple[tuple[int, float], ...]
    loss: Interval | None
    nonfinite: int
    diverged: Mapping[Criterion, int]
    diverged_seeds: tuple[int, ...]
    max_logit: Interval | None
    logits_lost: int


@dataclass(frozen=True)
class Windowed:
    """Sensitivity in the three decades where it is smallest, and against the baseline's own smallest."""

    window: tuple[float, float]
    sensitivity: Interval
    ratio: Interval | None


@dataclass(frozen=True)
class Spikes:
    """A spike score: mean over the whole grid, and at the arm's best rate; ``windows`` are those that were used.

    ``by_seed`` has the mean over the grid, of the runs that are long enough to be judged.
    """

    grid: Interval | None
    best: Interval | None
    by_seed: Mapping[int, float]
    windows: tuple[int, ...]
    published_window: int


@dataclass(frozen=True)
class ArmResult:
    """What was measured of one arm; see the fields' names in ``lr_table`` for words.

    ``ratio``, ``best_gap`` and ``time_ratio`` are against the baseline, paired by seed; ``by_seed`` has the seeds whose
    grid is complete, the only ones whose sensitivity is defined. ``changes_lr`` says why the rate means something else.
    """

    label: str
    methods: tuple[str, ...]
    changes_lr: str
    params: int | None
    params_non_embedding: int | None
    init_loss: Interval | None
    points: tuple[Point, ...]
    by_seed: Mapping[int, float]
    sensitivity: Interval | None
    ratio: Interval | None
    windowed: Windowed | None
    verdict: Verdict
    best_lr: float | None
    best_loss: Interval | None
    best_gap: Interval | None
    first: Mapping[Criterion, FirstDiverging]
    spikes: Mapping[str, Spikes]
    max_logit: Interval | None
    seconds_per_step: Interval | None
    time_ratio: Interval | None
    runs: int
    nonfinite: int
    missing: tuple[tuple[float, int], ...]
    remarks: tuple[str, ...]

    @property
    def all_diverged(self) -> bool:
        """Whether no run learned anything; the sensitivity of such an arm says nothing good."""
        return bool(self.runs) and _all_diverged(self.points)


@dataclass(frozen=True)
class Result:
    """The whole study."""

    name: str
    hypothesis: str
    baseline: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    arms: tuple[ArmResult, ...]
    published: tuple[Comparison, ...]
    extra: int

    def table(self) -> str:
        """Return the result as plain text of at most 120 columns."""
        return lr_table.table(self)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values; ``poise.core.journal.to_json`` writes numbers that are not finite."""
        return lr_table.to_json(self)

    def arm(self, label: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.label == label)


@dataclass(frozen=True)
class Cells:
    """The records of one arm, by rate and seed, beside the grid that was declared."""

    label: str
    runs: Mapping[tuple[float, int], Record]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def losses(self, seed: int) -> dict[float, float]:
        return {lr: as_float(self.runs[lr, seed]["final_loss"]) for lr in self.lrs if (lr, seed) in self.runs}

    def init(self, seed: int) -> float:
        """Return the loss before the first step; it does not depend on the rate."""
        values = [as_float(self.runs[lr, seed]["init_loss"]) for lr in self.lrs if (lr, seed) in self.runs]
        return math.fsum(values) / len(values)

    def vocab_size(self) -> int | None:
        """Return the vocabulary of the recipe; all arms of a study train on the same text."""
        data = next((run["recipe"].get("data") or {} for run in self.runs.values() if run.get("recipe")), {})
        return int(data["vocab_size"]) if "vocab_size" in data else None

    def run_seeds(self) -> list[int]:
        return [seed for seed in self.seeds if any((lr, seed) in self.runs for lr in self.lrs)]

    def complete(self) -> list[int]:
        return [seed for seed in self.seeds if all((lr, seed) in self.runs for lr in self.lrs)]

    def capped(self, lr: float) -> dict[int, float]:
        """Return the losses at a rate by seed, none above the one at initialisation."""
        here = [seed for seed in self.seeds if (lr, seed) in self.runs]
        return {s: stats.capped(as_float(self.runs[lr, s]["final_loss"]), self.init(s)) for s in here}


def as_float(value: object) -> float:
    """Return a record's number; "nan", "inf" and "-inf" are read as in a journal.

    Raises:
        UserError: it is no number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value in _TEXT_NUMBERS:
        return _TEXT_NUMBERS[value]
    raise UserError(f"a record holds {value!r} where a number belongs; delete that cell's file and run the study again")


def summarise(records: Sequence[Record], declaration: Mapping[str, Any]) -> Result:
    """Return what the records say about the declared arms.

    Args:
        records: of cells, in any order; ``poise.studies.cell`` says what is in one. Of two records of the same arm,
            rate and seed the later counts. Those that were not declared are counted in ``Result.extra`` and left out.
        declaration: ``arms`` (labels, in order), ``lrs`` and ``seeds`` as ``Declaration.facts`` gives them. Optional:
            ``name``, ``hypothesis``, ``baseline`` (a label; else the arm called so, else the first), ``methods`` and
            ``arm_texts`` and ``changes_lr`` by label.

    Raises:
        UserError: the declaration names no arm, rate or seed, or a baseline that is no arm; a damaged record.
    """
    labels, lrs, seeds, baseline = _declared(declaration)
    runs: dict[str, dict[tuple[float, int], Record]] = {label: {} for label in labels}
    extra = 0
    for record in records:
        _check(record)
        lr = next((x for x in lrs if math.isclose(x, as_float(record["lr"]), rel_tol=1e-9)), None)
        if record["arm"] not in runs or lr is None or record["seed"] not in seeds:
            extra += 1
            continue
        runs[record["arm"]][lr, record["seed"]] = record
    cells = {label: Cells(label, runs[label], lrs, seeds) for label in labels}
    base = _arm(cells[baseline], cells[baseline], None, declaration)
    arms = tuple(base if x == baseline else _arm(cells[x], cells[baseline], base, declaration) for x in labels)
    readings = [_reading(arm, cells[arm.label], declaration) for arm in arms]
    return Result(
        name=str(declaration.get("name", "lr-sensitivity")),
        hypothesis=str(declaration.get("hypothesis", "")),
        baseline=baseline,
        lrs=lrs,
        seeds=seeds,
        arms=arms,
        published=compare(readings),
        extra=extra,
    )


def _check(record: Record) -> None:
    """Raise a ``UserError`` that names the file of a record that holds something else where a number belongs."""
    try:
        for name in ("lr", "init_loss", "final_loss", "seconds_per_step"):
            as_float(record[name])
        for name in ("loss", "grad_norm"):
            for value in record.get(name, ()):
                as_float(value)
        _last_logit(record)
    except UserError as error:
        raise UserError(f"cells/{record.get('key', '?')}.json: {error}") from None


def _declared(declaration: Mapping[str, Any]) -> tuple[list[str], tuple[float, ...], tuple[int, ...], str]:
    labels = [str(label) for label in declaration.get("arms", ())]
    lrs = tuple(sorted(float(lr) for lr in declaration.get("lrs", ())))
    seeds = tuple(int(seed) for seed in declaration.get("seeds", ()))
    for name, values in (("arms", labels), ("lrs", lrs), ("seeds", seeds)):
        if not values:
            raise UserError(f"the declaration has no {name}; a study needs at least one of each: arms, lrs, seeds")
        if len(set(values)) < len(values):
            raise UserError(f"the declaration's {name} {values} name one twice; remove it")
    baseline = str(declaration.get("baseline") or ("baseline" if "baseline" in labels else labels[0]))
    if baseline not in labels:
        raise UserError(f"the baseline '{baseline}' is not an arm of the study{nearest(baseline, labels)}")
    return labels, lrs, seeds, baseline


def _arm(cells: Cells, base_cells: Cells, base: ArmResult | None, declaration: Mapping[str, Any]) -> ArmResult:
    """Summarise one arm; ``base`` is ``None`` for the baseline itself."""
    records = list(cells.runs.values())
    by_seed = {s: stats.lr_sensitivity(cells.losses(s), cells.init(s)) for s in cells.complete()}
    ratio = stats.paired_ratio(by_seed, base.by_seed) if base else None
    table = {lr: {s: as_float(cells.runs[lr, s]["final_loss"]) for s in cells.capped(lr)} for lr in cells.lrs}
    inits = {s: cells.init(s) for s in cells.run_seeds()}
    vocab_size = cells.vocab_size()
    first = {c: stats.first_diverging_lr(table, inits, c, vocab_size) for c in stats.CRITERIA}
    bad = {c: stats.diverged_seeds(table, inits, c, vocab_size) for c in stats.CRITERIA}
    points = tuple(_point(cells, lr, table[lr], {c: bad[c][lr] for c in bad}) for lr in cells.lrs)
    best_lr = stats.best_rate(table, inits)
    best = cells.capped(best_lr) if best_lr is not None else {}
    base_best = base_cells.capped(base.best_lr) if base and base.best_lr is not None else {}
    sensitivity = stats.mean_interval(list(by_seed.values()))
    return ArmResult(
        label=cells.label,
        methods=tuple(declaration.get("methods", {}).get(cells.label, cells.label.partition("@")[0].split("+"))),
        changes_lr=_reasons(declaration.get("changes_lr", {}).get(cells.label, "")),
        params=records[0].get("params") if records else None,
        params_non_embedding=records[0].get("params_non_embedding") if records else None,
        init_loss=stats.mean_interval(list(inits.values())),
        points=points,
        by_seed=by_seed,
        sensitivity=sensitivity,
        ratio=ratio,
        windowed=_windowed(cells, base_cells),
        verdict="all diverged" if records and _all_diverged(points) else _verdict(by_seed, base, ratio),
        best_lr=best_lr,
        best_loss=stats.mean_interval(list(best.values())),
        best_gap=stats.paired_difference(best, base_best) if base else None,
        first=first,
        spikes=_spikes(cells, best_lr),
        max_logit=next((p.max_logit for p in points if p.lr == best_lr), None),
        seconds_per_step=_seconds(cells),
        time_ratio=_time_ratio(cells, base_cells) if base else None,
        runs=len(records),
        nonfinite=sum(point.nonfinite for point in points),
        missing=tuple((lr, s) for lr in cells.lrs for s in cells.seeds if (lr, s) not in cells.runs),
        remarks=tuple(_remarks(cells, points, best_lr, first["init"], records)),
    )


def _all_diverged(points: Sequence[Point]) -> bool:
    return all(p.diverged["init"] == len(p.losses) for p in points)


def _verdict(ours: Mapping[int, float], base: ArmResult | None, ratio: Interval | None) -> Verdict:
    """Judge the sensitivity against the baseline's by the interval of the ratio, or of the difference without one.

    A sensitivity of exactly 0 has no ratio in the logarithm; its paired difference is judged instead.
    """
    if base is None:
        return "baseline"
    if base.all_diverged:
        return "unknown"
    judged, nothing = (ratio, 1.0) if ratio else (stats.paired_difference(ours, base.by_seed), 0.0)
    if judged is None or judged.low is None or judged.high is None:
        return "unknown"
    return "lower" if judged.high < nothing else "higher" if judged.low > nothing else "no difference shown"


def _reasons(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _point(cells: Cells, lr: float, losses: Mapping[int, float], bad: Mapping[Criterion, tuple[int, ...]]) -> Point:
    ends = [_last_logit(cells.runs[lr, seed]) for seed in losses]
    logits = [value for value in ends if value is not None]
    sound = [value for value in logits if math.isfinite(value) and value > 0]
    return Point(
        lr=lr,
        losses=tuple(losses.items()),
        loss=stats.mean_interval(list(cells.capped(lr).values())),
        nonfinite=sum(not math.isfinite(loss) for loss in losses.values()),
        diverged={c: len(seeds) for c, seeds in bad.items()},
        diverged_seeds=bad["init"],
        max_logit=stats.geometric_interval(sound),
        logits_lost=sum(not math.isfinite(value) for value in logits),
    )


def _last_logit(record: Record) -> float | None:
    rows = record.get("max_logit") or []
    return as_float(rows[-1][1]) if rows and rows[-1][1] is not None else None


def _windowed(cells: Cells, base_cells: Cells) -> Windowed | None:
    found = {}
    for one in (cells, base_cells):
        seeds = one.complete()
        slid = stats.best_window([(one.losses(s), one.init(s)) for s in seeds])
        if slid is None:
            return None
        found[one.label] = slid[0], dict(zip(seeds, slid[1], strict=True))
    window, ours = found[cells.label]
    interval = stats.mean_interval(list(ours.values()))
    assert interval is not None, "a window has seeds"
    same = cells.label == base_cells.label
    return Windowed(window, interval, None if same else stats.paired_ratio(ours, found[base_cells.label][1]))


def _spikes(cells: Cells, best_lr: float | None) -> dict[str, Spikes]:
    rules = {"olmo2": stats.spike_score_olmo2, "olmo_core": stats.spike_score_olmo_core}
    out = {}
    for name in SCORES:
        rule, _, series = name.rpartition("_")
        field = "loss" if series == "loss" else "grad_norm"
        scores = {at: rules[rule]([as_float(x) for x in run.get(field, ())]) for at, run in cells.runs.items()}
        shares = {at: score.share for at, score in scores.items() if score.share is not None}
        per_seed: dict[int, float] = {}
        for seed in cells.seeds:
            of_seed = [share for (_, s), share in shares.items() if s == seed]
            if of_seed:
                per_seed[seed] = math.fsum(of_seed) / len(of_seed)
        best = [share for (lr, _), share in shares.items() if lr == best_lr]
        out[name] = Spikes(
            grid=stats.mean_interval(list(per_seed.values())),
            best=stats.mean_interval(best),
            by_seed=per_seed,
            windows=tuple(sorted({score.window for score in scores.values()})),
            published_window=next((score.published_window for score in scores.values()), 0),
        )
    return out


def _seconds(cells: Cells) -> Interval | None:
    per_seed = []
    for seed in cells.seeds:
        times = [as_float(run["seconds_per_step"]) for (_, s), run in cells.runs.items() if s == seed]
        times = [t for t in times if math.isfinite(t) and t > 0]
        per_seed += [math.exp(math.fsum(map(math.log, times)) / len(times))] if times else []
    return stats.geometric_interval(per_seed) if per_seed else None


def _time_ratio(cells: Cells, base: Cells) -> Interval | None:
    """Return time per step by that of the baseline, over pairs of the same rate, seed, threads and device."""
    per_seed = []
    for seed in cells.seeds:
        logs = []
        for lr in cells.lrs:
            ours, theirs = cells.runs.get((lr, seed)), base.runs.get((lr, seed))
            if ours is None or theirs is None or any(ours.get(k) != theirs.get(k) for k in ("threads", "device")):
                continue
            times = as_float(ours["seconds_per_step"]), as_float(theirs["seconds_per_step"])
            if all(math.isfinite(t) and t > 0 for t in times):
                logs.append(math.log(times[0] / times[1]))
        per_seed += [math.exp(math.fsum(logs) / len(logs))] if logs else []
    return stats.geometric_interval(per_seed) if per_seed else None


def _remarks(
    cells: Cells, points: Sequence[Point], best_lr: float | None, first: FirstDiverging, records: Sequence[Record]
) -> list[str]:
    out = []
    if not records:
        return ["not run at all"]
    incomplete = [s for s in cells.seeds if s not in cells.complete()]
    if incomplete:
        out.append(f"no sensitivity for seed {', '.join(map(str, incomplete))}: the grid is not complete")
    if len(cells.complete()) == 1:
        out.append("one seed only: intervals are unknown")
    if _all_diverged(points):
        out.append("every run diverged: its sensitivity says nothing good")
    elif best_lr is not None and len(cells.lrs) > 1 and best_lr in (cells.lrs[0], cells.lrs[-1]):
        out.append(f"its best rate {best_lr:.3g} is at the edge of the grid")
    if first.islands:
        out.append(f"diverged at {', '.join(f'{lr:.3g}' for lr in first.islands)} but trained at a larger rate")
    lost = sum(point.logits_lost for point in points)
    if lost:
        out.append(f"{lost} runs ended with an attention logit that is not finite; they are not in its mean")
    if len({record.get("params") for record in records}) > 1:
        out.append("its records differ in the number of parameters")
    return out


def _reading(arm: ArmResult, cells: Cells, declaration: Mapping[str, Any]) -> Reading:
    text = str(declaration.get("arm_texts", {}).get(arm.label, arm.label))
    first = arm.first["half"].majority
    best = cells.capped(arm.best_lr) if arm.best_lr is not None else {}
    values: dict[Quantity, Mapping[int, float]] = {
        "sensitivity": {} if arm.all_diverged else arm.by_seed,
        "best_loss": best,
        "first_diverging_half": {-1: math.inf if first is None else first} if arm.runs else {},
        "spikes_grad": arm.spikes["olmo2_grad"].by_seed,
    }
    return Reading(arm.label, None if "@" in text else canonical(arm.methods), values)
