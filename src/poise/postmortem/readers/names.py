"""What the columns of a log are called elsewhere, and which of several is meant.

A name is compared without case, units, separators and the folders that trackers put before it, so that
``train/loss``, ``Train Loss`` and ``my-run - train/loss`` are all ``loss``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

STEP, LOSS, GRAD_NORM, LR, TOKENS, VAL_LOSS = "step", "loss", "grad_norm", "lr", "tokens", "val_loss"

ALIASES: Mapping[str, tuple[str, ...]] = {
    STEP: (
        "step",
        "steps",
        "global_step",
        "iteration",
        "iterations",
        "iter",
        "it",
        "iter_num",
        "n_iter",
        "global_steps",
        "current_step",
        "num_steps",
        "optimizer_step",
        "opt_step",
        "update",
        "num_updates",
        "batch",
        "_step",  # W&B's own counter of log calls, which need not be the training step
    ),
    LOSS: (
        "loss",
        "lm_loss",
        "ce_loss",
        "cross_entropy_loss",
        "cross_entropy",
        "nll_loss",
        "language_cross_entropy",
        "reduced_train_loss",
        "loss_train",
        "training_loss",
        "loss_metrics_global_avg_loss",
        "loss_step",
        "loss_avg",
        "avg_loss",
        "mean_loss",
        "total_loss",
        "loss_total",
        "value",  # TensorBoard's CSV of one scalar
    ),
    GRAD_NORM: (
        "grad_norm",
        "gradnorm",
        "gradient_norm",
        "global_grad_norm",
        "total_grad_norm",
        "grad_norm_total",
        "grad_norm_global",
        "global_gradient_norm",
        "l2_norm_grad_global",
        "gnorm",
    ),
    LR: ("lr", "learning_rate", "learningrate", "lr_group_0", "lr_0", "lr_adamw_pg1", "lr_adamw"),
    TOKENS: (
        "tokens",
        "tokens_seen",
        "total_tokens_seen",
        "n_tokens_seen",
        "seen_tokens",
        "num_tokens",
        "n_tokens",
        "total_tokens",
        "consumed_tokens",
        "tokens_consumed",
        "tokens_processed",
        "num_input_tokens_seen",
        "throughput_total_tokens",
    ),
}
"""Name in ``Log.series`` -> what others write, the surest first, in the form that ``words`` gives joined by ``_``."""

_FOLDERS = frozenset({"train", "training", "trainer", "metrics", "metric", "stats", "log", "optim", "optimizer"})
_HELD_OUT = frozenset({"val", "valid", "validation", "eval", "evaluation", "dev", "test"})
_UNITS = re.compile(r"\([^)]*\)|\[[^\]]*\]")


def words(raw: str) -> list[str]:
    """Return the words of a column's name in lower case.

    >>> words("my-run-7 - train/CE loss (nats)")
    ['train', 'ce', 'loss']
    """
    name = _UNITS.sub(" ", raw.rsplit(" - ", 1)[-1])
    return [word for word in re.split(r"[^0-9a-z]+", name.lower()) if word]


def rank(meaning: str, raw: str) -> int | None:
    """Return how well ``raw`` fits: 0 is best; ``None`` when it does not fit at all.

    >>> rank("loss", "loss"), rank("loss", "train/loss"), rank("loss", "eval_loss"), rank("val_loss", "eval_loss")
    (0, 1, None, 0)
    """
    name = words(raw)
    if meaning == STEP and raw.strip().lower() == "_step":
        name = ["_step"]
    if meaning == VAL_LOSS:
        outside = [word for word in name if word not in _HELD_OUT]
        fits = len(outside) < len(name) and rank(LOSS, "_".join(outside))
        return None if fits is None or fits is False or outside == ["value"] else fits
    aliases = ALIASES[meaning]
    for folders in range(len(name)):
        joined = "_".join(name[folders:])
        if joined in aliases:
            return 2 * aliases.index(joined) + min(folders, 1)
        if name[folders] not in _FOLDERS:
            break
    return None


def choose(meaning: str, counts: Mapping[str, int]) -> tuple[str | None, list[str]]:
    """Return the column that is meant, and the others that could have been.

    Args:
        meaning: a key of ``ALIASES`` or ``val_loss``.
        counts: how many values each column has; one with less than half of the fullest is not chosen.
    """
    fitting = {raw: place for raw in counts if counts[raw] and (place := rank(meaning, raw)) is not None}
    if not fitting:
        return None, []
    enough = max(counts[raw] for raw in fitting) / 2
    best = min((raw for raw in fitting if counts[raw] >= enough), key=lambda raw: (fitting[raw], -counts[raw]))
    return best, [raw for raw in fitting if raw != best]
