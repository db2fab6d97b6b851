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
    rule,
    says,
    short,
    usual_lr,
)
from poise.preflight.rules.optimizer import LARGE_BATCH
from poise.preflight.settings import Settings


def _size(s: Settings) -> Verdict | None:
    assert s.lr is not None
    size, hot = dense_size(s), heat(s)
    if is_adam(s) and s.lr >= 1.0 and hot is not None:
        return Verdict(
            "critical",
            f"{says(s, 'lr')}: every weight moves by about that much a step",
            f"lr = {usual_lr(size or 1e8):.1g}",
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
            f"try qk_norm, or lr = {usual:.2g}",
            "Small models bear more than the usual rate; the margin without QK-norm is not known.",
        )
    worse = size >= 1e9 and hot >= (100.0 if bounded else 2.5 if fragile else 10.0)
    return Verdict(
        "critical" if worse else "warning",
        f"{says(s, 'lr')} at {short(size)} weights is {hot:.2g} x the usual {usual:.2g}",
        f"lr = {usual:.2g}" + ("" if bounded else f", or qk_norm and z_loss with up to {3 * usual:.2g}"),
        also=("qk_norm", "dtype"),
    )


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
    if big and steps < 500 and (hot or 0.0) >= 2:
        hard = tokens >= LARGE_BATCH or steps == 0
        return Verdict(
            "warning" if hard else "note",
            f"{what}: {hot or 0:.2g} x the usual rate at {short(size or 0)} weights",
            "warmup_steps = 2000 (at least 500), or halve lr",
            also=also,
        )
    least = 2.0 / (1.0 - s.beta2) if s.beta2 is not None and s.beta2 < 1.0 else 40.0
    if s.total_steps:
        least = min(least, 0.1 * s.total_steps)
    if steps < least:
        return Verdict(
            "warning" if steps == 0 and (big or (hot or 0.0) >= 3) else "note",
            f"{what}: shorter than 2 / (1 - beta2)",
            f"warmup_steps = {math.ceil(max(least, 2000 if big else 0))}",
            "Adam's first steps are its largest, and its second moment is not settled before about 2 / (1 - beta2) "
            "steps; linear warm-up over so many is a sensible default.",
            "Ma and Yarats 2021, arXiv 1910.04209",
            also,
        )
    if big and steps < 500:
        return Verdict(
            "note",
            what,
            "warmup_steps = 2000 is usual at this size",
            "LLaMA, OLMo 2 and OPT-175B warm up for 2000 steps, Llama 3 405B for 8000.",
            "arXiv 2302.13971, 2501.00656, 2205.01068, 2407.21783",
            also,
        )
    return None


def _total(s: Settings) -> Verdict | None:
    assert s.warmup_steps is not None and s.total_steps is not None
    share = s.warmup_steps / s.total_steps
    what = says(s, "warmup_steps", "total_steps")
    if share > 1:
        return Verdict(
            "critical", f"{what}: the peak is never reached", f"warmup_steps = {max(1, min(2000, s.total_steps // 50))}"
        )
    if share > 0.5:
        return Verdict(
            "warning",
            f"{what}: {share:.0%} of the run is warm-up",
            f"warmup_steps = {max(1, min(2000, s.total_steps // 50))}",
        )
    return None


def _minimum(s: Settings) -> Verdict | None:
    assert s.lr is not None and s.min_lr is not None
    what = says(s, "lr", "min_lr", "schedule")
    if s.min_lr > s.lr:
        return Verdict(
            "critical",
            f"{what}: the rate rises to its minimum",
            f"min_lr = {s.lr / 10:.2g}",
            "The rate grows through the whole run.",
        )
    if s.min_lr == s.lr and s.schedule not in (None, "constant", "constant_with_warmup"):
        return Verdict("note", f"{what}: the schedule does not decay", f"min_lr = {s.lr / 10:.2g}", also=("schedule",))
    return None


def _post_warmup(s: Settings) -> Verdict | None:
    assert s.warmup_steps is not None
    if s.norm != "post" or s.warmup_steps >= 500 or deep_norm(s):
        return None
    if s.total_steps and s.warmup_steps >= 0.05 * s.total_steps:
        return None
    deep = (s.n_layers or 0) >= 12
    return Verdict(
        "critical" if deep and s.warmup_steps == 0 else "warning",
        says(s, "norm", "warmup_steps", "n_layers"),
        "warmup_steps = 4000, or Pre-LN",
        also=("n_layers", "total_steps"),
    )


def _ramp(s: Settings) -> Verdict | None:
    assert s.ramp_from is not None and s.batch_sequences is not None
    if s.ramp_from <= s.batch_sequences:
        return None
    return Verdict(
        "warning",
        f"{says(s, 'ramp_from', 'batch_sequences')}: the ramp leads down",
        f"ramp_from = {max(1, s.batch_sequences // 16)}",
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
