"""Rules on the learning rate, its warm-up and decay. No torch."""

from __future__ import annotations

import math
from typing import Final

from poise.preflight.rules.base import (
    USUAL_LR_SOURCE,
    Rule,
    Verdict,
    deep_norm,
    dense_size,
    heat,
    is_adam,
    logits_bounded,
    put,
    put_lr,
    rule,
    says,
    short,
    usual_lr,
)
from poise.preflight.rules.optimizer import LARGE_BATCH
from poise.preflight.settings import Settings

CARRIED: Final = 5.0
"""Multiple of the usual rate that QK-norm and z-loss are known to carry: 6e-4 (OLMo 2, 3) and 7e-4 (Marin) at 32B."""

CARRIED_UNTIL: Final = 4e10
"""Weights up to which that is published."""

TOO_LOW: Final = 1e-7
"""Peak learning rates of Adam below this train nothing in a run's time."""


def _size(s: Settings) -> Verdict | None:
    assert s.lr is not None
    size, hot = dense_size(s), heat(s)
    if is_adam(s) and s.lr >= 1.0 and hot is not None:
        return Verdict(
            "critical",
            f"{says(s, 'lr')}: every weight moves by about that much a step",
            put_lr(s, usual_lr(size or 1e8)),
            "Adam's steps are as large as the learning rate.",
        )
    if size is None or hot is None:
        return None
    usual = usual_lr(size)
    bounded = logits_bounded(s)
    limit = 10.0 if bounded or size < 1e9 else 2.5
    fragile = s.dtype == "fp16" and size >= 1e10 and not bounded
    if fragile:
        limit = 2.0
    if hot < limit:
        if hot < 2.5 or bounded:
            return None
        return Verdict(
            "note",
            f"{says(s, 'lr')} at {short(size)} weights is {hot:.2g} x the usual {usual:.2g}",
            f"try qk_norm, or {put_lr(s, usual)}",
            "Small models bear more than the usual rate; the margin without QK-norm is not known.",
        )
    worse = size >= 1e9 and hot >= (100.0 if bounded else 2.5 if fragile else 10.0)
    return Verdict(
        "critical" if worse else "warning",
        f"{says(s, 'lr')} at {short(size)} weights is {hot:.2g} x the usual {usual:.2g}",
        put_lr(s, usual) + ("" if bounded else _carried(s, size, usual)),
        also=("qk_norm", "dtype"),
    )


def _carried(s: Settings, size: float, usual: float) -> str:
    """Return what QK-norm and z-loss allow, as far as runs are published."""
    with_ = "qk_norm" if s.z_loss else "qk_norm and z_loss"
    if size > CARRIED_UNTIL:
        return f"; {with_} raise what is stable, by how much at this size is not published"
    return f", or {with_} with up to {CARRIED * usual:.2g} (32B runs with them were stable at 6e-4 and 7e-4)"


def _too_low(s: Settings) -> Verdict | None:
    assert s.lr is not None
    if not is_adam(s) or s.lr >= TOO_LOW:
        return None
    size = dense_size(s)
    usual = usual_lr(size or 1e9)
    at = f" at {short(size)} weights" if size else ""
    return Verdict("warning", f"{says(s, 'lr')}; {usual:.2g} is usual{at}", put_lr(s, usual))


def least_warmup(s: Settings) -> float:
    """Return the steps below which warm-up is short: 2 / (1 - beta2), at most a tenth of the run."""
    least = 2.0 / (1.0 - s.beta2) if s.beta2 is not None and s.beta2 < 1.0 else 40.0
    return least if s.total_steps is None else min(least, s.total_steps // 10)


def usual_warmup(s: Settings) -> int:
    """Return the warm-up to write: 2000 steps for large models, else the least; at most a tenth of the run."""
    size = dense_size(s)
    steps = math.ceil(max(least_warmup(s), 2000 if size is not None and size >= 1e9 else 0))
    return steps if s.total_steps is None else min(steps, s.total_steps // 10)


def _warmup(s: Settings) -> Verdict | None:
    assert s.lr is not None and s.warmup_steps is not None
    if not is_adam(s):
        return None
    steps, size, hot = s.warmup_steps, dense_size(s), heat(s)
    if s.ramp_from and s.batch_sequences and s.ramp_from < s.batch_sequences:
        steps = round(min(1e15, steps * s.batch_sequences / s.ramp_from))  # counted in samples
    tokens = s.batch_tokens or 0
    big = size is not None and size >= 1e9
    what = f"{says(s, 'warmup_steps', 'lr', 'beta2')}" + (f", {short(tokens)} tokens a step" if tokens else "")
    also = ("beta2", "batch_sequences", "seq_len")
    mend = put(s, "warmup_steps", usual_warmup(s))
    tenth = s.total_steps is not None and usual_warmup(s) == s.total_steps // 10
    mend += ", a tenth of the run" if tenth else ""
    few = big and steps < min(500, usual_warmup(s))
    if few and (hot or 0.0) >= 2:
        hard = tokens >= LARGE_BATCH or steps == 0
        return Verdict(
            "warning" if hard else "note",
            f"{what}: {hot or 0:.2g} x the usual rate at {short(size or 0)} weights",
            f"{mend}{' (at least 500)' if usual_warmup(s) > 500 else ''}, or {put(s, 'lr', s.lr / 2)}",
            also=also,
        )
    if steps < least_warmup(s):
        return Verdict(
            "warning" if steps == 0 and (big or (hot or 0.0) >= 3) else "note",
            f"{what}: shorter than 2 / (1 - beta2)",
            mend,
            "Adam's first steps are its largest, and its second moment is not settled before about 2 / (1 - beta2) "
            "steps; linear warm-up over so many is a sensible default.",
            "Ma and Yarats 2021, arXiv 1910.04209",
            also,
        )
    if few:
        return Verdict(
            "note",
            what,
            f"{mend}; 2000 steps are usual at this size",
            "LLaMA, OLMo 2 and OPT-175B warm up for 2000 steps, Llama 3 405B for 8000.",
            "arXiv 2302.13971, 2501.00656, 2205.01068, 2407.21783",
            also,
        )
    return None


def _total(s: Settings) -> Verdict | None:
    assert s.warmup_steps is not None and s.total_steps is not None
    share = s.warmup_steps / s.total_steps
    mend = put(s, "warmup_steps", max(usual_warmup(s), min(2000, s.total_steps // 50)))
    what = says(s, "warmup_steps", "total_steps")
    if share > 1:
        return Verdict("critical", f"{what}: the peak is never reached", mend)
    if share > 0.5:
        return Verdict("warning", f"{what}: {share:.0%} of the run is warm-up", mend)
    return None


def _minimum(s: Settings) -> Verdict | None:
    assert s.lr is not None and s.min_lr is not None
    what = says(s, "lr", "min_lr", "schedule")
    mend = put(s, "min_lr", s.lr / 10)
    if is_adam(s) and s.lr < TOO_LOW:  # then the peak is the mistake
        mend = put_lr(s, usual_lr(dense_size(s) or 1e9))
    if s.min_lr > s.lr:
        return Verdict(
            "critical",
            f"{what}: the rate rises to its minimum",
            mend,
            "The rate grows through the whole run.",
        )
    if s.min_lr == s.lr and s.schedule not in (None, "constant", "constant_with_warmup"):
        return Verdict("note", f"{what}: the schedule does not decay", mend, also=("schedule",))
    return None


def _post_warmup(s: Settings) -> Verdict | None:
    assert s.warmup_steps is not None
    if s.norm != "post" or s.warmup_steps >= 500 or deep_norm(s):
        return None
    if s.total_steps and s.warmup_steps >= 0.05 * s.total_steps:
        return None
    deep, steps = (s.n_layers or 0) >= 12, 4000
    return Verdict(
        "critical" if deep and s.warmup_steps == 0 else "warning",
        says(s, "norm", "warmup_steps", "n_layers"),
        put(s, "warmup_steps", steps if s.total_steps is None else max(1, min(steps, s.total_steps // 10)))
        + ", or Pre-LN",
        also=("n_layers", "total_steps"),
    )


def _ramp(s: Settings) -> Verdict | None:
    assert s.ramp_from is not None and s.batch_sequences is not None
    if s.ramp_from <= s.batch_sequences:
        return None
    return Verdict(
        "warning",
        f"{says(s, 'ramp_from', 'batch_sequences')}: the ramp leads down",
        put(s, "ramp_from", max(1, s.batch_sequences // 16)),
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "lr-size",
        "learning rate high for the size",
        "critical",
        ("optimizer", "lr"),
        _size,
        source=f"OPT-175B logbook (11.x at 3e-4); Marin 8B retrospective (1e-3 stable, 2e-3 not); {USUAL_LR_SOURCE}",
        why="Stable rates fall with size. OPT-175B's lineage 11.x, at 3e-4, exploded until the rate was lowered; Marin "
        "8B was stable at 1e-3 and not at 2e-3. QK-norm and z-loss raise what is stable.",
    ),
    rule(
        "lr-low",
        "learning rate far too low",
        "warning",
        ("optimizer", "lr"),
        _too_low,
        source="arithmetic: Adam's steps are about as large as the learning rate; published peak rates lie above 1e-5",
        why="A weight of 0.02 that moves by 1e-7 a step takes 200,000 steps in one direction to double: the loss "
        "hardly falls, and a digit of the exponent is most likely wrong.",
    ),
    rule(
        "warmup",
        "warm-up short for learning rate and batch",
        "warning",
        ("optimizer", "lr", "warmup_steps"),
        _warmup,
        source="public logs of MLPerf Training v5.1, llama31_8b (mlcommons/training_results_v5.1), our count",
        why="Of 60 public Llama-3.1-8B runs at 8e-4 with 64 or more sequences of 8192 and almost no warm-up, 33 had a "
        "late rise of the evaluation loss; of 170 at 4e-4 with 16 to 32 sequences none had (not a controlled "
        "experiment).",
    ),
    rule(
        "warmup-total",
        "warm-up longer than the run",
        "critical",
        ("warmup_steps", "total_steps"),
        _total,
        source="arithmetic of the schedule",
        why="Warm-up is usually 0.4 to 2 % of a run; what is left after it is all the training there is at full rate.",
    ),
    rule(
        "min-lr",
        "minimum learning rate does not fit the peak",
        "critical",
        ("lr", "min_lr"),
        _minimum,
        source="arithmetic of the schedule; Hoffmann et al. 2022, arXiv 2203.15556, for decay to a tenth",
        why="A rate that does not fall leaves the loss of the decay on the table.",
    ),
    rule(
        "post-norm-warmup",
        "Post-LN without warm-up",
        "critical",
        ("norm", "warmup_steps"),
        _post_warmup,
        source="Xiong et al. 2020, arXiv 2002.04745",
        why="At the start Post-LN's gradients are large near the output; without warm-up such models fail to train.",
    ),
    rule(
        "batch-ramp",
        "batch ramp that leads down",
        "warning",
        ("ramp_from", "batch_sequences"),
        _ramp,
        source="arithmetic; BLOOM (arXiv 2211.05100) ramps from 16 to 2048 sequences",
        why="A ramp begins small, because early steps gain little from a large batch; this one ends smaller.",
    ),
)
"""In the order of the file."""
