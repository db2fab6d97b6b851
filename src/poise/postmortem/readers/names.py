"""What the columns of a log are called elsewhere, and which of several is meant.

A name is compared without case, units, separators and the folders that trackers put before it, so that
``train/loss``, ``Train Loss``, ``TrainLoss`` and ``my-run - train/loss`` are all ``loss``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

STEP, LOSS, GRAD_NORM, LR, TOKENS, VAL_LOSS = "step", "loss", "grad_norm", "lr", "tokens", "val_loss"
LOSS_SCALE, SKIPPED, SAMPLES, UPDATE_NORM = "loss_scale", "skipped_steps", "samples", "update_norm"
MAX_LOGIT, Z_LOSS, BALANCE_LOSS = "max_attention_logit", "z_loss", "load_balancing_loss"

PERPLEXITY, BITS, EPOCH = "perplexity", "bits", "epoch"

ROW = "row"
"""What a reader calls its own count of rows, where the log says neither steps nor anything else that counts."""

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
        "current_steps",
        "num_steps",
        "optimizer_step",
        "opt_step",
        "iteration_step",
        "num_updates",
        "update",  # after num_updates: fairseq's "update" is a fraction of an epoch
        "batch",
        "time_batch",
        "itr",
        "iters",
        "step_num",
        "step_count",
        "updates",
        "n_updates",
        "n_steps",
        "opt_steps",
        "update_step",
        "global_iter",
        "cur_step",
        "_step",  # W&B's own counter of log calls, which need not be the training step
        "batch_idx",
        "i",
        "index",
        ROW,
    ),
    LOSS: (
        "loss",
        "lm_loss",
        "ce_loss",
        "cross_entropy_loss",
        "cross_entropy",
        "crossentropyloss",
        "nll_loss",
        "language_cross_entropy",
        "languagecrossentropy",
        "reduced_train_loss",
        "loss_train",
        "training_loss",
        "loss_metrics_global_avg_loss",
        "global_avg_loss",
        "loss_step",
        "loss_avg",
        "avg_loss",
        "mean_loss",
        "llm_loss",
        "reduced_llm_loss",
        "loss_reduced_llm_loss",
        "loss_per_nonpadding_target_token",
        "total_loss",
        "loss_total",
        "loss_train_total",
        "nll",
        "ce",
        "xent",
        "tr_loss",
        "loss_mean",
        "loss_lm",
        "loss_ce",
        "mlm_loss",
        "ntp_loss",
        "next_token_loss",
        "loss_value",
        "losses",
        "losses_train",
        "trainloss",
        "pretrain_loss",
        "batch_loss",
        "loss_batch",
        "loss_epoch",
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
        "grad_2_0_norm_total",
        "grad_l2_norm",
        "gnorm",
        "raw_grad_norm",
        "unclipped_grad_norm",
        "grad_norm_preclip",
        "grad_norm_pre_clip",
        "preclip_grad_norm",
        "pre_clip_grad_norm",
        "grad_norm_before_clip",
        "grad_norm_before_clipping",
        "grad_norm_unclipped",
        "grad_norm_avg",
        "grad_norm_mean",
        "actor_grad_norm",
        "grads_norm",
        "grads_global_norm",
        "grad_global_norm",
        "gradient_global_norm",
        "gradients_global_norm",
        "gradients_norm",
        "norm_grad",
        "global_norm",
        "total_norm",
        "grad",
    ),
    LR: (
        "lr",
        "learning_rate",
        "learningrate",
        "current_learning_rate",
        "current_lr",
        "lr_group_0",
        "lr_group0",
        "learning_rate_group0",
        "learning_rate_group_0",
        "lr_0",
        "lr_adamw_pg1",
        "lr_adamw",
        "lr_adamw_group0",
        "lr_decoupledadamw_group0",
        "lr_decoupledlionw_group0",
    ),
    TOKENS: (
        "tokens",
        "tokens_seen",
        "total_tokens_seen",
        "n_tokens_seen",
        "seen_tokens",
        "num_tokens_seen",
        "num_tokens",
        "n_tokens",
        "total_tokens",
        "tokens_total",
        "consumed_tokens",
        "tokens_consumed",
        "consumed_train_tokens",
        "tokens_processed",
        "num_input_tokens_seen",
        "throughput_total_tokens",
        "time_token",
    ),
}
"""Name in ``Log.series`` -> what others write, the surest first, in the form that ``words`` gives joined by ``_``."""

FURTHER: Mapping[str, tuple[str, ...]] = {
    LOSS_SCALE: (
        "loss_scale",
        "lossscale",
        "loss_scaler",
        "cur_scale",
        "amp_scale",
        "fp16_scale",
        "grad_scale",
        "scale",
    ),
    SKIPPED: (
        "skipped_steps",
        "number_of_skipped_iterations",
        "skipped_iterations",
        "skipped_iter",
        "skipped",
        "num_skipped",
        "num_skipped_steps",
        "step_skipped",
        "skipped_step",
        "skipped_updates",
    ),
    SAMPLES: (
        "samples",
        "consumed_samples",
        "consumed_train_samples",
        "samples_consumed",
        "samples_count",
        "samples_seen",
        "seen_samples",
        "n_samples",
        "num_samples",
        "total_samples",
        "time_sample",
        "sample",
    ),
    UPDATE_NORM: ("update_norm", "updates_norm", "total_update_norm", "param_update_norm", "l2_norm_update_global"),
    MAX_LOGIT: (
        "max_attention_logit",
        "max_attention_logits",
        "max_attn_logit",
        "max_attn_logits",
        "attn_logit_max",
        "attention_logit_max",
        "max_qk_logit",
        "max_logit",
        "max_logits",
    ),
    Z_LOSS: ("z_loss", "zloss"),
    BALANCE_LOSS: ("load_balancing_loss", "load_balance_loss", "lb_loss"),
}
"""The same for what only some logs have."""

INSTEAD: Mapping[str, tuple[str, ...]] = {
    PERPLEXITY: ("perplexity", "ppl"),
    BITS: ("bits_per_byte", "bpb", "bits_per_token", "bits_per_character", "bits_per_char", "bpc", "bpt", "bpw"),
    EPOCH: ("epoch", "epochs", "current_epoch", "epoch_num", "ep"),
}
"""What is used where something better is missing; such a column keeps its name."""

_FOLDERS = frozenset(
    {"train", "training", "trainer", "metrics", "metric", "stats", "log", "optim", "optimizer", "learning", "samples"}
    | {"opt", "schedule", "scheduler"}
)
_HELD_OUT = frozenset({"val", "valid", "validation", "eval", "evaluation", "dev", "test"})
_UNITS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")  # no bracket within: linear in time
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_MONITOR = re.compile(r"lr-[A-Z][A-Za-z0-9]{0,40}(?:/(?:pg1|group_?0|0))?")
"""What Lightning calls the learning rate of any optimizer; ``lr-SGD-momentum`` is none."""

_OF_ONE_SET = 1000
"""Added to the rank of a validation loss that belongs to one of several sets."""


def words(raw: str) -> list[str]:
    """Return the words of a column's name in lower case.

    >>> words("my-run-7 - train/CE loss (nats)")
    ['train', 'ce', 'loss']
    """
    name = _UNITS.sub(" ", raw.rsplit(" - ", 1)[-1])
    return [word for word in re.split(r"[^0-9a-z]+", name.lower()) if word]


@lru_cache(maxsize=4096)  # the same few names are asked for on every line; it changes nothing
def rank(meaning: str, raw: str) -> int | None:
    """Return how well ``raw`` fits: 0 is best; ``None`` when it does not fit at all.

    >>> rank("loss", "loss"), rank("loss", "train/loss"), rank("loss", "eval_loss"), rank("val_loss", "eval_loss")
    (0, 1, None, 0)
    """
    name = words(raw)
    if meaning == STEP and raw.rsplit(" - ", 1)[-1].strip().lower() == "_step":
        name = ["_step"]
    if meaning == VAL_LOSS:
        return _rank_held_out(name, raw)
    aliases = ALIASES.get(meaning) or FURTHER.get(meaning) or INSTEAD[meaning]
    for folders in range(len(name)):
        joined = "_".join(name[folders:])
        if joined in aliases:
            return 2 * aliases.index(joined) + min(folders, 1)
        if name[folders] not in _FOLDERS:
            break
    if meaning == LR and _MONITOR.fullmatch(raw.rpartition(" - ")[2]):
        return 2 * len(aliases)
    place = _rank_repeated(meaning, raw)
    parted = _CAMEL.sub(" ", raw)
    return rank(meaning, parted) if place is None and parted != raw else place


def is_held_out(raw: str) -> bool:
    """Return whether a name speaks of data that is not trained on.

    >>> is_held_out("eval/loss"), is_held_out("valLoss"), is_held_out("interval")
    (True, True, False)
    """
    return not _HELD_OUT.isdisjoint(words(_CAMEL.sub(" ", raw)))


def without_held_out(raw: str) -> str:
    """Return a name without the words for data that is not trained on: what it is that was measured there."""
    return "_".join(word for word in words(_CAMEL.sub(" ", raw)) if word not in _HELD_OUT)


def _rank_held_out(name: list[str], raw: str) -> int | None:
    """Rank a loss on data that is held out: ``eval_loss``, or that of one set, ``eval/c4/CE loss``."""
    outside = [word for word in name if word not in _HELD_OUT]
    if len(outside) == len(name):
        parted = _CAMEL.sub(" ", raw)
        return rank(VAL_LOSS, parted) if parted != raw else None
    place = rank(LOSS, "_".join(outside))
    leaf = raw.rpartition("/")[2]
    if place is None and leaf != raw and rank(LOSS, leaf) is not None:
        return _OF_ONE_SET + (rank(LOSS, leaf) or 0)
    return place


def _rank_repeated(meaning: str, raw: str) -> int | None:
    """Rank ``lm-loss-training/lm loss``: folders that only say once more what the last part says."""
    folder, _, leaf = raw.rpartition("/")
    last = words(leaf)
    before = words(folder)
    if not before or not last or any(word not in last and word not in _FOLDERS for word in before):
        return None
    place = rank(meaning, leaf)
    return None if place is None else place | 1


def choose(meaning: str, counts: Mapping[str, int]) -> tuple[str | None, list[str]]:
    """Return the column that is meant, and the others that could have been.

    Args:
        meaning: a key of ``ALIASES`` or ``FURTHER``, or ``val_loss``.
        counts: how many values each column has; one with less than half of the fullest is not chosen.
    """
    fitting = {raw: place for raw in counts if counts[raw] and (place := rank(meaning, raw)) is not None}
    if not fitting:
        return None, []
    enough = max(counts[raw] for raw in fitting) / 2
    best = min((raw for raw in fitting if counts[raw] >= enough), key=lambda raw: (fitting[raw], -counts[raw]))
    return best, [raw for raw in fitting if raw != best]
