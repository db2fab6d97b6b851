"""The injection campaign: what the guard makes of every kind of fault, over several seeds.

    python benchmarks/campaign.py --seeds 3 --jobs 1 --out runs/campaign

A small GPT (4 layers, width 64, 300 steps of 1024 tokens, Python's own sources as text) is struck by each
fault of ``poise.studies.faults.CASES``; a run takes about 15 s on one core. A campaign that was interrupted goes on
when the command is given again with the same ``--out``. Prints one table: per kind the share of runs in which the
fault was detected in time, its place and its cause were named and (where it is recoverable) the final validation
loss is within 1 % of the clean run of the same seed, each with its 95 % interval (Wilson); then what was said and
done in each run, and the healthy runs, where every action is a false one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from poise.core.errors import UserError
from poise.studies.campaign import LAST, Campaign, Row, run_campaign, wilson
from poise.studies.faults import CASES

WITHIN = 0.01


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per kind of fault (default 3)")
    parser.add_argument("--healthy", type=int, default=6, help="clean runs (default 6)")
    parser.add_argument("--steps", type=int, default=300, help="steps per run (default 300)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core each (default 1)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help=f"some faults only, of: {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--bare", action="store_true", help="no guard: what the faults do by themselves")
    options = parser.parse_args(words)

    def progress(name: str, done: int, total: int) -> None:
        print(f"{done}/{total} {name}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as tmp:
        try:
            campaign = run_campaign(
                options.out or Path(tmp) / "campaign",
                options.seeds,
                options.kinds,
                options.healthy,
                options.steps,
                jobs=options.jobs,
                guarded=not options.bare,
                progress=progress,
            )
        except UserError as error:
            parser.error(str(error))
    print(f"{options.steps} steps, {options.seeds} seeds, {'no guard' if options.bare else 'guard on'}")
    print(table(campaign))
    return 0


def table(campaign: Campaign) -> str:
    """Return the campaign's result as plain text."""
    head = ("fault", "n", "detected", "delay", "place", "cause", "within 1 %", "val. loss", "skips", "undone", "NaN")
    lines = [head]
    for kind in campaign.kinds:
        lines.append(_line(kind, campaign.of(kind)))
    if campaign.kinds:
        lines.append(_line("all", campaign.faulty))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for kind in campaign.kinds:
        out += ["", *_details(kind, campaign.of(kind))]
    return "\n".join([*out, "", *_healthy(campaign), "", *_legend()])


def _line(kind: str, rows: Sequence[Row]) -> tuple[str, ...]:
    delays = [row.delay for row in rows if row.detected and row.delay is not None]
    recoverable = [row for row in rows if row.recoverable]
    gaps = [row.gap for row in rows]
    ended = [gap for gap in gaps if math.isfinite(gap)]
    return (
        kind,
        str(len(rows)),
        _share(row.detected for row in rows),
        f"{statistics.median(delays):g} ({min(delays)}-{max(delays)})" if delays else "-",
        _share(row.place_right for row in rows if row.place_right is not None),
        _share(row.cause_right for row in rows if row.cause_right is not None),
        _share(row.gap <= WITHIN for row in recoverable),
        f"{statistics.mean(ended):+.2%}, worst {max(ended):+.2%}" if len(ended) == len(gaps) else "not all ended",
        str(sum(row.skipped for row in rows)),
        str(sum(row.steps_undone for row in rows)),
        str(sum(row.nonfinite for row in rows)),
    )


def _share(hits: Iterable[bool | None]) -> str:
    """Return ``3/3 [.44, 1.0]``; ``-`` where nothing was to be hit."""
    found = [bool(hit) for hit in hits]
    if not found:
        return "-"
    low, high = wilson(sum(found), len(found))
    return f"{sum(found)}/{len(found)} [{low:.2f}, {high:.2f}]"


def _details(kind: str, rows: Sequence[Row]) -> list[str]:
    """Return what was said and done in each run of a kind."""
    out = [f"{kind}:"]
    for row in rows:
        alarms = ", ".join(row.alarms) or "none"
        actions = _actions(row.actions) or "none"
        verdict = f"{row.cause} ({row.certainty})" if row.cause else "none"
        early = f"; before the onset {row.early_alarms} alarms, {row.early_actions} actions" if row.early_alarms else ""
        came = "" if row.struck else "; THE FAULT NEVER CAME"
        out.append(
            f"  seed {row.seed}: alarms {alarms}; place {row.place or 'none'}; verdict {verdict}; actions {actions}; "
            f"training loss {row.train_gap:+.1%}, {row.outcome}{early}{came}"
        )
        if row.message:
            out.append(f"    {row.message[:200]}")
    return out


def _actions(actions: object) -> str:
    assert isinstance(actions, dict)
    return ", ".join(f"{n} {action}" for action, n in actions.items())


def _healthy(campaign: Campaign) -> list[str]:
    rows = campaign.healthy
    actions: Counter[str] = Counter()
    for row in rows:
        actions.update(row.actions)
    out = [
        f"healthy: n {len(rows)}, runs with a false action {_share(bool(row.actions) for row in rows)}, "
        f"false actions {sum(actions.values())} ({_actions(dict(actions)) or 'none'}), "
        f"alarms of warning or critical {sum(row.early_alarms for row in rows)}"
    ]
    base = [row.val_loss for row in rows if row.variant == "base"]
    if len(base) > 1:
        mean, spread = statistics.mean(base), statistics.stdev(base)
        out.append(f"clean validation loss {mean:.4f}, sd over {len(base)} seeds {spread:.4f} ({spread / mean:.2%})")
    return out


def _legend() -> list[str]:
    return [
        "detected: an alarm of severity warning or critical, or the note of an odd batch, within 15 steps after the",
        "onset (high_lr: 45, for it has to warm up); delay: steps, median and range; within 1 %: final validation loss",
        "at most 1 % above the clean run of the same seed, of the faults that can be recovered from; skips: steps not",
        "taken; undone: steps that rollbacks undid; NaN: runs whose weights were ever not finite; training loss: mean",
        f"of the last {LAST} steps against the clean run. Shares with the 95 % interval of Wilson.",
    ]


if __name__ == "__main__":
    sys.exit(main())
