"""The page of a study of learning-rate sensitivity: one file that needs no network, made from its records."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from poise.dashboard.figures import ZOOM
from poise.dashboard.page import Page
from poise.dashboard.text import MISSING, count, duration, plural
from poise.studies import study_figures as figures
from poise.studies import study_panels as panels
from poise.studies.lr_sensitivity import SCORES, Record, Result, as_float
from poise.studies.lr_table import (
    NOTES,
    by_verdict,
    ends,
    first_text,
    gaps,
    logit_text,
    lr_factor,
    names_of,
    percent,
    rate,
    seconds,
    shortened,
    spread,
    verdicts,
)
from poise.studies.stats import CRITERIA

_LEGEND: Final = "Click a name in the legend to switch it on or off, double-click to see it alone."
_SHOWN_ENVIRONMENT: Final = ("poise", "torch", "python", "cpu", "machine", "os")


def write(result: Result, records: Sequence[Record], declaration: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a study and return its path.

    Args:
        result: of ``lr_sensitivity.summarise``.
        records: the same that it was made from; for the training curves and the versions.
        declaration: as for ``summarise``; optionally ``command``, ``size``, ``created``.
        path: the HTML file to write.

    Raises:
        OSError: the file cannot be written.
    """
    page = Page(f"{result.name}: {plural(len(result.arms), 'arm')}")
    _top(page, result, records, declaration)
    _curves(page, result)
    _sensitivity(page, result)
    _divergence(page, result)
    _cost(page, result)
    page.heading("Every arm: final loss by learning rate")
    page.paragraph(
        "Points are runs, lines are means over the seeds, the baseline in grey; an open circle is a run that "
        "diverged ('init' below); one that is not finite or worse than at the start is drawn at the loss before the "
        "first step.",
        "soft",
    )
    page.figure(panels.loss_panels(result), "Final loss by learning rate, a panel for every arm")
    _training(page, result, records)
    _published(page, result)
    _honesty(page, result)
    _reproduce(page, result, records, declaration)
    return page.write(Path(path))


def _top(page: Page, result: Result, records: Sequence[Record], declaration: Mapping[str, Any]) -> None:
    judged = ", ".join(f"{len(arms)} {verdict}" for verdict, arms in by_verdict(result).items())
    if judged:
        page.paragraph(f"Sensitivity to the learning rate against {result.baseline}: {judged}.", "verdict")
    created = f", declared {declaration['created']} UTC" if declaration.get("created") else ""
    page.paragraph(f"Hypothesis, written before the first run{created}: {result.hypothesis or 'none'}")
    missing = sum(len(arm.missing) for arm in result.arms)
    if missing:
        page.paragraph(
            f"Not run yet: {plural(missing, 'cell')} of this study. What needs them is shown as {MISSING}.", "warning"
        )
    params = sorted({arm.params for arm in result.arms if arm.params is not None})
    base = result.arm(result.baseline)
    ranked = [(arm.sensitivity.mean, arm) for arm in result.arms if arm.sensitivity and not arm.all_diverged]
    best = min(ranked, key=lambda one: one[0])[1] if ranked else None
    sizes = [count(params[0]), count(params[-1])] if params else []
    page.key_figures(
        [
            ("Runs", f"{sum(arm.runs for arm in result.arms):,}"),
            ("Not finite", f"{sum(arm.nonfinite for arm in result.arms):,}"),
            ("Learning rates", f"{len(result.lrs)}: {rate(result.lrs[0])} to {rate(result.lrs[-1])}"),
            ("Seeds", f"{len(result.seeds)}"),
            ("Parameters", " to ".join(dict.fromkeys(sizes)) or MISSING),
            (
                "Steps",
                ", ".join(f"{n:,}" for n in sorted({int(r["steps"]) for r in records if "steps" in r})) or MISSING,
            ),
            ("Baseline's sensitivity", _pretty(spread(base.sensitivity))),
            ("Lowest sensitivity", _pretty(spread(best.sensitivity)) if best else MISSING),
            ("Arm of the lowest", best.label if best else MISSING),
            ("Training time, all runs", duration(sum(as_float(r["seconds"]) for r in records if "seconds" in r))),
        ]
    )


def _curves(page: Page, result: Result) -> None:
    page.heading("Loss by learning rate")
    opened = figures.opened(result)
    some = (
        f"Shown at first: the baseline and the {len(opened) - 1} arms with the lowest sensitivity. "
        if len(opened) < len(result.arms)
        else ""
    )
    page.paragraph(
        "Final validation loss, mean and 95 % interval over the seeds. Runs that are not finite or worse than at the "
        f"start count, and are drawn, at the loss before the first step; open marks: most seeds diverged "
        f"('init' below). {some}{_LEGEND} {ZOOM}",
        "soft",
    )
    page.figure(figures.loss_by_lr(result), f"Final validation loss by learning rate. {' '.join(verdicts(result)[:3])}")


def _sensitivity(page: Page, result: Result) -> None:
    page.heading("Sensitivity to the learning rate")
    page.paragraph(
        "Nats, smaller is better; bars with 95 % intervals, the dotted line is the baseline. † below.", "soft"
    )
    figure = figures.bars(result, "sensitivity")
    if figure is None:
        page.paragraph("No arm has a complete grid yet.")
    else:
        page.figure(figure, "Sensitivity of every arm; the table below has the numbers")
    head = ["Arm", "Sensitivity", "Ratio", "Verdict", "Best loss", "Loss − baseline's", "At lr"]
    rows = []
    for arm in result.arms:
        gap = MISSING if arm.best_gap is None else ends(arm.best_gap, "+.3f")
        rows.append(
            [spread(arm.sensitivity), ends(arm.ratio), arm.verdict, spread(arm.best_loss), gap, rate(arm.best_lr)]
        )
    _table(page, result, head, rows)
    page.paragraph(_pretty(NOTES[0]), "soft")
    flagged = [arm for arm in result.arms if arm.changes_lr]
    if flagged:
        page.paragraph(
            "† The learning rate means something else in these arms, so their sensitivity over the same grid is not "
            "comparable: " + "; ".join(f"{arm.label} ({arm.changes_lr})" for arm in flagged) + ".",
            "warning",
        )
    page.heading("The hypothesis and the numbers")
    page.paragraph(f"Declared: {result.hypothesis or 'none'}")
    page.paragraph(
        f"Sensitivity relative to {result.baseline}, judged by whether the 95 % interval of the ratio holds 1. "
        "Nothing is corrected for the number of arms: of twenty arms without any effect, one is expected to be called "
        "different.",
        "soft",
    )
    rows = [[verdict, ", ".join(arm.label for arm in arms)] for verdict, arms in by_verdict(result).items()]
    page.table(["Sensitivity", "Arms"], rows, wide=["Arms"])
    slid = [
        [a.label, *map(rate, a.windowed.window), spread(a.windowed.sensitivity), ends(a.windowed.ratio)]
        for a in flagged
        if a.windowed
    ]
    if slid:
        page.paragraph(
            "† In the three decades where each is least sensitive, against the baseline in its own such window:"
        )
        page.table(
            ["Arm", "From lr", "To lr", "Sensitivity", "Ratio to baseline"], [[_pretty(c) for c in r] for r in slid]
        )


def _divergence(page: Page, result: Result) -> None:
    page.heading("First diverging learning rate")
    page.paragraph(
        "Filled: from here on most seeds diverge; open: the lowest rate at which any seed does; a triangle at the "
        "right: above the largest rate that was run. Known to one step of the grid.",
        "soft",
    )
    page.figure(
        figures.first_by_arm(result), "First diverging learning rate of every arm; the table below has the numbers"
    )
    base = result.arm(result.baseline)
    head = [
        "Arm",
        "init: diverges from (any seed)",
        "init: × baseline",
        "half: diverges from (any seed)",
        "half: × baseline",
    ]
    firsts = [[t for c in CRITERIA for t in (first_text(arm, c), lr_factor(arm, base, c))] for arm in result.arms]
    _table(page, result, head, firsts)
    page.paragraph(NOTES[1], "soft")
    figure = figures.logit_by_lr(result)
    if figure is None:
        return
    page.heading("Largest attention logit at the end")
    page.paragraph(f"Both scales logarithmic; geometric mean and interval over the seeds. {_LEGEND}", "soft")
    page.figure(figure, "Largest attention logit by learning rate; the table below has the numbers")
    rows = [[logit_text(point.max_logit) for point in arm.points] for arm in result.arms]
    _table(page, result, ["Arm; lr", *map(rate, result.lrs)], rows)


def _cost(page: Page, result: Result) -> None:
    page.heading("Time per step")
    page.paragraph(
        "Time per step relative to the baseline, over pairs of the same rate and seed, with 95 % intervals. The runs "
        "shared the machine with other runs of the study; a benchmark that takes turns is more exact.",
        "soft",
    )
    figure = figures.bars(result, "time_ratio")
    if figure is not None:
        page.figure(figure, "Time per step of every arm relative to the baseline; the table below has the numbers")
    head = ["Arm", "Parameters", "Time per step", "× baseline", "Max logit at best lr", "Runs", "Not finite"]
    rows = []
    for arm in result.arms:
        times = [seconds(arm.seconds_per_step), ends(arm.time_ratio)]
        runs = f"{arm.runs} of {arm.runs + len(arm.missing)}"
        rows.append([count(arm.params), *times, logit_text(arm.max_logit), runs, str(arm.nonfinite)])
    _table(page, result, head, rows)
    page.heading("Spike scores")
    head = ["Arm"] + [f"{title}: {at}" for title in SCORES.values() for at in ("grid", "best lr")]
    scores = [[percent(i) for s in arm.spikes.values() for i in (s.grid, s.best)] for arm in result.arms]
    _table(page, result, head, scores)
    page.paragraph(_pretty(NOTES[2]), "soft")


def _training(page: Page, result: Result, records: Sequence[Record]) -> None:
    figure = panels.training_panels(result, records)
    if figure is None:
        return
    page.heading("Every arm: training loss by step")
    page.paragraph(
        f"Smoothed, seed {result.seeds[0]}, a line for every learning rate; a line that stops early belongs to a run "
        "that was no longer finite. Click a rate in the legend to switch it off in all panels.",
        "soft",
    )
    page.figure(figure, "Training loss by step, a panel for every arm and a line for every learning rate")


def _published(page: Page, result: Result) -> None:
    page.heading("Beside published orderings")
    if not result.published:
        page.paragraph("None of the published orderings has two of the arms that were run.")
        return
    page.paragraph(
        "Another model, other data and other sizes: only the order is compared. 'Not separated': the interval over the "
        "seeds holds zero, or both have the same rate of the grid. Grade 'paper' was read from the paper's own text or "
        "tables, 'secondary' from notes on it; cells that could not be verified are left out.",
        "soft",
    )
    rows = []
    for one in result.published:
        tau = MISSING if one.tau is None else f"{one.tau:+.2f}"
        what = f"{one.ordering.name}: {one.ordering.what}. {one.ordering.citation} [{one.ordering.grade}]. "
        found = f"{one.count('agrees')} of {len(one.pairs)}"
        wrong = [str(one.count("reversed")), str(one.count("not separated"))]
        rows.append([_pretty(what) + f"Beside: {one.measured}.", found, *wrong, tau, one.ordering.note])
    head = ["Published", "Reproduced", "Reversed", "Not separated", "Tau-b", "Conditions"]
    page.table(head, rows, wide=["Published", "Conditions"])
    pairs = [[one.ordering.name, text] for one in result.published for text in one.disagreements()]
    if pairs:
        page.heading("Where the order does not reproduce")
        page.table(["Published", "Pairs"], pairs, wide=["Pairs"])


def _honesty(page: Page, result: Result) -> None:
    page.heading("What is missing or odd")
    found = [*gaps(result), *shortened(result)]
    if found:
        page.table(["Arm and remark"], [[text] for text in found], wide=["Arm and remark"])
    else:
        page.paragraph("Nothing: every declared run was done, on a complete grid.")


def _reproduce(page: Page, result: Result, records: Sequence[Record], declaration: Mapping[str, Any]) -> None:
    page.heading("How to run it again")
    page.code(str(declaration.get("command") or command(result, declaration)))
    page.paragraph("study.toml, beside this page, has the declaration with every value of the recipe.", "soft")
    facts: dict[str, list[str]] = {}
    for record in records:
        environment = record.get("environment") or {}
        for name in _SHOWN_ENVIRONMENT:
            value = str(environment.get(name) or "")
            if value and value not in facts.setdefault(name, []):
                facts[name].append(value)
    threads = sorted({str(r["threads"]) for r in records if "threads" in r})
    rows = [[name, ", ".join(values)] for name, values in facts.items() if values]
    if threads:
        rows.append(["threads of a run", ", ".join(threads)])
    if rows:
        page.table(["What", "Version"], rows)


def _seeds(seeds: Sequence[int]) -> str:
    """Return seeds as ``--seeds`` takes them."""
    return str(len(seeds)) if list(seeds) == list(range(len(seeds))) else "".join(f"{seed}," for seed in seeds)


def command(result: Result, declaration: Mapping[str, Any]) -> str:
    """Return the command that declares this study, without values of the recipe that were set by hand."""
    texts = declaration.get("arm_texts", {})
    arms = ",".join(str(texts.get(arm.label, arm.label)) for arm in result.arms)
    words = ["poise", "study", result.name, "--methods", arms]
    words += ["--lrs", ",".join(map(rate, result.lrs)), "--seeds", _seeds(result.seeds)]
    if declaration.get("size"):
        words += ["--size", str(declaration["size"])]
    return shlex.join([*words, "--hypothesis", result.hypothesis])


def _table(page: Page, result: Result, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Add a table with a row an arm, whose numbers do not break over lines."""
    names = names_of(result)
    cells = [[names[arm.label], *row] for arm, row in zip(result.arms, rows, strict=True)]
    page.table(head, [[_pretty(cell).replace(" ", "\u00a0") for cell in row] for row in cells])


def _pretty(text: str) -> str:
    return text.replace("+-", "±")
