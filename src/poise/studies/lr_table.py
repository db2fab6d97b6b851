"""The result of a study of learning-rate sensitivity in words: plain text for a terminal, plain values for a file.

The page uses the same words, so that both say the same.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from poise.dashboard.text import MISSING, count, plural
from poise.studies.stats import CRITERIA, Criterion, Interval

if TYPE_CHECKING:
    from poise.studies.lr_sensitivity import ArmResult, Result

WIDTH: Final = 120
NAME_WIDTH: Final = 22

NOTES: Final = (
    "Sensitivity: mean over the grid of min(final validation loss, loss at initialisation) minus the best, per seed, "
    "in nats; a run that is not finite counts as the loss at initialisation (Wortsman et al., 2309.14322). Ratio: "
    "paired by seed, geometric. Intervals: two-sided 95 % t over seeds; '?' where they are unknown.",
    "First diverging rate: from there on most seeds diverge, at every larger rate too; in brackets the lowest rate at "
    f"which any seed does. init: {CRITERIA['init']}. half: {CRITERIA['half']} (below that rate a run is slow, "
    "not diverged; the rate is that of the lowest mean over the seeds). An arm that is nowhere 0.02 nats below the "
    "floor is all diverged. V: size of the vocabulary; ln V is the loss of a uniform output. '>' is above the largest "
    "rate run.",
    "Spike scores: per cent of steps, mean over the whole grid. 7σ: that far or farther from the mean of the last 1000 "
    "values (OLMo 2, 2501.00656, section 3.2; sigma over the same window is our reading). 6σ: above mean + 6 sigma of "
    "the last 128 (OLMo-core's stability monitor).",
)


def spread(interval: Interval | None, places: int = 3) -> str:
    """Return mean +- half the interval.

    >>> spread(Interval(1.25, 1.0, 1.5, 3)), spread(Interval(1.25, None, None, 1)), spread(None)
    ('1.250 +-0.250', '1.250 +-?', '–')
    """
    if interval is None:
        return MISSING
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.{places}f} +-?"
    return f"{interval.mean:.{places}f} +-{(interval.high - interval.low) / 2:.{places}f}"


def ends(interval: Interval | None, form: str = ".2f") -> str:
    """Return mean and ends of an interval that is not symmetric.

    >>> ends(Interval(0.2, 0.1, 0.4, 3)), ends(Interval(0.2, None, None, 1))
    ('0.20 [0.10, 0.40]', '0.20 [?]')
    """
    if interval is None:
        return MISSING
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}} [?]"
    low, high = (f"{v:.1e}" if v >= 1e4 or 0 < abs(v) < 1e-3 else f"{v:{form}}" for v in (interval.low, interval.high))
    return f"{interval.mean:{form}} [{low}, {high}]"


def rate(lr: float | None) -> str:
    """Return a learning rate."""
    return MISSING if lr is None else f"{lr:.3g}"


def first_text(arm: ArmResult, criterion: Criterion) -> str:
    """Return the first diverging rate of most seeds and, in brackets, that of any seed where it differs."""
    run = [p.lr for p in arm.points if p.losses]
    if not run:
        return MISSING
    first = arm.first[criterion]
    major, any_seed = (f">{rate(run[-1])}" if lr is None else rate(lr) for lr in (first.majority, first.any_seed))
    return major if major == any_seed else f"{major} ({any_seed})"


def lr_factor(arm: ArmResult, base: ArmResult, criterion: Criterion) -> str:
    """Return how many times higher an arm's first diverging rate is than the baseline's.

    Where one of the two lies above the largest rate that was run, only a bound is known.
    """
    ours, theirs = arm.first[criterion].majority, base.first[criterion].majority
    if not arm.runs or not base.runs:
        return MISSING
    tops = [max((p.lr for p in one.points if p.losses), default=math.nan) for one in (arm, base)]
    if ours is not None and theirs is not None:
        return f"{ours / theirs:.3g}x"
    if theirs is not None:
        return f">{tops[0] / theirs:.3g}x"
    return "?" if ours is None else f"<{ours / tops[1]:.3g}x"


def short(label: str, width: int = NAME_WIDTH) -> str:
    """Return a label that fits; the end is kept too, because that is where variants differ."""
    if len(label) <= width:
        return label
    return label[: width - 9] + "…" + label[-8:]


def percent(interval: Interval | None) -> str:
    """Return a share of steps in per cent, with half its interval."""
    if interval is None:
        return MISSING
    if interval.low is None or interval.high is None:
        return f"{100 * interval.mean:.2f} +-?"
    return f"{100 * interval.mean:.2f} +-{50 * (interval.high - interval.low):.2f}"


def table(result: Result) -> str:
    """Return the whole result as text of at most ``WIDTH`` columns."""
    names = names_of(result)
    head = [
        *_wrap(
            f"{result.name}: {plural(len(result.arms), 'arm')}, {plural(len(result.lrs), 'learning rate')} "
            f"{rate(result.lrs[0])} to {rate(result.lrs[-1])}, {plural(len(result.seeds), 'seed')}"
        ),
        "",
        *_wrap(f"Hypothesis, declared before the first run: {result.hypothesis or 'none'}"),
    ]
    parts = [
        head,
        _grid(_stability(result, names)),
        _grid(_firsts(result, names)),
        _grid(_costs(result, names)),
        _grid(_spiked(result, names)),
        *_logits(result, names),
        _judged(result),
        _published(result),
        _gaps(result),
        ["Notes", *(line for note in NOTES for line in _wrap(note, "  "))],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def names_of(result: Result) -> dict[str, str]:
    """Return a short, unambiguous name for every arm; a dagger marks a changed meaning of the rate."""
    names: dict[str, str] = {}
    for i, arm in enumerate(result.arms):
        name = short(arm.label)
        if name in names.values():
            name = short(f"{i + 1}:{arm.label}")
        names[arm.label] = name
    return {arm.label: names[arm.label] + (" †" if arm.changes_lr else "") for arm in result.arms}


def shortened(result: Result) -> list[str]:
    """Return a sentence for every label that the tables shorten."""
    names = {label: name.removesuffix(" †") for label, name in names_of(result).items()}
    return [f"'{name}' in tables is {label}." for label, name in names.items() if name != label]


def _stability(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    rows = [["arm", "sensitivity", "ratio to baseline", "verdict", "best loss", "at lr"]]
    for arm in result.arms:
        ratio = MISSING if arm.label == result.baseline else ends(arm.ratio)
        cells = [spread(arm.sensitivity), ratio, arm.verdict, spread(arm.best_loss), rate(arm.best_lr)]
        rows.append([names[arm.label], *cells])
    return rows


def _firsts(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    base = result.arm(result.baseline)
    rows = [["first diverging lr (any seed)", *(cell for c in CRITERIA for cell in (c, "x baseline"))]]
    for arm in result.arms:
        cells = [cell for c in CRITERIA for cell in (first_text(arm, c), lr_factor(arm, base, c))]
        rows.append([names[arm.label], *cells])
    return rows


def _costs(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    rows = [["arm", "params", "time per step", "x baseline", "max logit at best lr", "runs", "not finite"]]
    for arm in result.arms:
        times = [seconds(arm.seconds_per_step), ends(arm.time_ratio)]
        runs = f"{arm.runs} of {arm.runs + len(arm.missing)}"
        cells = [count(arm.params), *times, logit_text(arm.max_logit), runs, str(arm.nonfinite)]
        rows.append([names[arm.label], *cells])
    return rows


def _spiked(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    rows = [["spike score, % of steps", "7σ loss", "7σ grad norm", "6σ loss", "6σ grad norm"]]
    for arm in result.arms:
        rows.append([names[arm.label], *(percent(score.grid) for score in arm.spikes.values())])
    return rows


def seconds(interval: Interval | None) -> str:
    """Return the time of a step."""
    return MISSING if interval is None else f"{1000 * interval.mean:.3g} ms"


def logit_text(interval: Interval | None) -> str:
    """Return a mean attention logit with three figures."""
    if interval is None:
        return MISSING
    return f"{interval.mean:,.0f}" if 999.5 <= interval.mean < 1e6 else f"{interval.mean:.3g}"


def _logits(result: Result, names: Mapping[str, str]) -> list[list[str]]:
    """Return the largest attention logit at the end, by rate, in as many tables as the width needs."""
    out = []
    texts = [logit_text(p.max_logit) for arm in result.arms for p in arm.points]
    widest = max(map(len, [*texts, *map(rate, result.lrs)])) + 2
    columns = min(9, (WIDTH - NAME_WIDTH - 2) // widest)
    for start in range(0, len(result.lrs), columns):
        lrs = result.lrs[start : start + columns]
        rows = [["max attention logit; lr", *map(rate, lrs)]]
        for arm in result.arms:
            at = {p.lr: p for p in arm.points}
            rows.append([names[arm.label], *(logit_text(at[lr].max_logit) for lr in lrs)])
        out.append(_grid(rows))
    return out


def verdicts(result: Result) -> list[str]:
    """Return a sentence for every arm: what its sensitivity is beside the baseline's."""
    base = result.arm(result.baseline)
    out = []
    for arm in result.arms:
        if arm.label == result.baseline:
            continue
        why = f"ratio {ends(arm.ratio)}" if arm.ratio else "no ratio: a sensitivity is zero or missing"
        factors = ", ".join(f"{lr_factor(arm, base, c)} ({c})" for c in CRITERIA)
        gap = "unknown" if arm.best_gap is None else ends(arm.best_gap, "+.3f")
        found = "every run diverged" if arm.all_diverged else f"sensitivity {arm.verdict} ({why})"
        line = f"{arm.label}: {found}; first diverging rate {factors}; best loss against the baseline's {gap}."
        if arm.changes_lr:
            line += f" † The learning rate means something else here ({arm.changes_lr})"
            line += ": not comparable over the same grid"
            if arm.windowed:
                low, high = arm.windowed.window
                line += f"; in its best three decades, {rate(low)} to {rate(high)}, against the baseline's best, "
                line += f"ratio {ends(arm.windowed.ratio)}"
            line += "."
        out.append(line)
    return out


def by_verdict(result: Result) -> dict[str, list[ArmResult]]:
    """Return the arms beside the baseline by verdict."""
    found: dict[str, list[ArmResult]] = {}
    for arm in result.arms:
        if arm.label != result.baseline:
            found.setdefault(arm.verdict, []).append(arm)
    return found


def _judged(result: Result) -> list[str]:
    counts = {verdict: len(arms) for verdict, arms in by_verdict(result).items()}
    total = ", ".join(f"{n} {name}" for name, n in counts.items()) or "no arm beside the baseline"
    lines = _wrap(f"The hypothesis and the numbers: sensitivity relative to {result.baseline}: {total}")
    return lines + [line for text in verdicts(result) for line in _wrap(text, "  ")]


def _published(result: Result) -> list[str]:
    if not result.published:
        return ["Published orderings: none of them has two of the arms that were run"]
    lines = ["Published orderings"]
    for one in result.published:
        lines += _wrap(f"{one.ordering.citation}: {one.ordering.name} [{one.ordering.grade}]. {one.headline()}", "  ")
        lines += _wrap(f"Compared with {one.measured}.", "    ")
        lines += [line for text in one.disagreements() for line in _wrap(text, "    ")]
        lines += _wrap(f"Conditions: {one.ordering.note}", "    ")
    return lines


def gaps(result: Result) -> list[str]:
    """Return what is missing or odd, in sentences; empty where nothing is."""
    out = []
    for arm in result.arms:
        if arm.missing:
            cells = ", ".join(f"lr {rate(lr)} seed {seed}" for lr, seed in arm.missing[:6])
            more = f" and {len(arm.missing) - 6:,} more" if len(arm.missing) > 6 else ""
            out.append(f"{arm.label}: {plural(len(arm.missing), 'cell')} not run: {cells}{more}.")
        out += [f"{arm.label}: {remark}." for remark in arm.remarks]
    scores = [(n, s) for arm in result.arms for n, s in arm.spikes.items() if n.startswith("olmo2") and arm.runs]
    used = sorted({w for _, s in scores for w in s.windows if w < s.published_window})
    if used:
        spans = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
        out.append(
            f"7σ score: the runs are too short for its window of 1000; windows of {spans} values were used (too short "
            "to judge below 20), so it compares these arms, not with published scores."
        )
    if result.extra:
        out.append(f"{plural(result.extra, 'record')} that the declaration does not name: left out.")
    return out


def _gaps(result: Result) -> list[str]:
    found = [*gaps(result), *shortened(result)]
    return ["Missing or odd", *(line for text in found for line in _wrap(text, "  "))] if found else []


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def to_json(result: Result) -> dict[str, Any]:
    """Return the result as plain values; non-finite numbers stay numbers, for ``poise.core.journal.to_json``."""
    values = asdict(result)
    values["format"] = 1
    values["verdicts"] = {arm.label: arm.verdict for arm in result.arms}
    values["missing"] = sum(len(arm.missing) for arm in result.arms)
    for one, comparison in zip(values["published"], result.published, strict=True):
        one["headline"] = comparison.headline()
    return values
