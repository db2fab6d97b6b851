"""What a log counts: the loss in nats or bits, the steps in steps, samples or tokens, and the tokens of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from poise.postmortem.readers.names import LOSS, ROW, SAMPLES, STEP, TOKENS, VAL_LOSS, rank, words
from poise.postmortem.readers.source import number

Series = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]

_BITS = frozenset({"bit", "bits", "bpb", "bpc", "bpt", "bpw"})
_NATS = frozenset({"nat", "nats"})
_PERPLEXITY = frozenset({"ppl", "perplexity"})

FIRST_STEPS = 10
"""A run logged from here on still shows the loss of its initialisation."""

_VOCABULARY = ("padded_vocab_size", "vocab_size", "vocab_size_v", "n_vocab", "vocabulary_size", "tokenizer_vocab_size")
_TOKENS_IN_STEP = (
    "tokens_per_step",
    "tokens_per_iter",
    "tokens_per_iteration",
    "tokens_per_batch",
    "num_tokens_per_step",
    "batch_size_in_tokens",
    "global_batch_size_tokens",
    "global_batch_size_in_tokens",
)
_SEQUENCES = (
    "global_batch_size",
    "global_train_batch_size",
    "total_train_batch_size",
    "global_batch_size_to_train_on",
    "batch_size_global",
)
_LENGTH = (
    "seq_length",
    "seq_len",
    "sequence_length",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "sequence_len",
    "encoder_seq_length",
    "max_target_length",
    "cutoff_len",
    "context_length",
    "block_size",
    "n_positions",
    "model_max_length",
    "max_length",
)
_MICRO = ("per_device_train_batch_size", "micro_batch_size", "device_train_microbatch_size", "local_batch_size")
_ACCUMULATION = ("gradient_accumulation_steps", "batch_accumulation_per_replica", "accumulate_grad_batches")
_REPLICAS = ("data_parallel_size", "dp", "dp_size", "data_parallel_world_size")


def loss_unit(names: Mapping[str, str], series: Series, settings: Mapping[str, str]) -> str:
    """Return ``nats`` or ``bits``, or an empty string where it cannot be told.

    By the name of the loss; by a column of perplexities, which are e or 2 to the power of the loss; by the loss of a
    run at its very beginning, which is about the logarithm of the vocabulary's size.

    Args:
        names: the log's own name -> the name in ``series``.
        series: as in ``Log.series``.
        settings: as in ``Log.settings``.
    """
    for raw, name in names.items():
        if name == LOSS:
            said = set(re.split(r"[^a-z]+", raw.lower()))
            if said & _BITS:
                return "bits"
            if said & _NATS:
                return "nats"
    for raw, name in names.items():
        if _PERPLEXITY & set(words(raw)) and name in (LOSS, VAL_LOSS):
            return "nats"  # ``columns`` takes the natural logarithm
        if _PERPLEXITY & set(words(raw)) and name in series:
            held_out = rank(VAL_LOSS, re.sub("ppl|perplexity", "loss", raw.lower())) is not None
            unit = _by_perplexity(series, VAL_LOSS if held_out else LOSS, name)
            if unit:
                return unit
    return _by_start(series, settings)


def step_unit(column: str) -> str:
    """Return what the column that orders the rows counts; an empty name stands for no column.

    >>> step_unit("iteration"), step_unit("consumed_samples"), step_unit("tokens_seen"), step_unit("")
    ('steps', 'samples', 'tokens', 'rows')
    """
    if not column or column == ROW:
        return "rows"
    if rank(STEP, column) is not None:
        return "steps"
    if rank(SAMPLES, column) is not None:
        return "samples"
    return "tokens" if rank(TOKENS, column) is not None else "steps"


def ordering(columns: Mapping[str, list[float]]) -> str | None:
    """Return a column of samples or tokens that can stand for the steps: whole numbers that rise from row to row.

    Args:
        columns: the first values of each column, in the order of the rows.
    """
    fullest = max(map(len, columns.values()), default=0)
    for meaning in (SAMPLES, TOKENS):
        fitting = [(place, raw) for raw in columns if (place := rank(meaning, raw)) is not None]
        for _, raw in sorted(fitting):
            if 2 * len(columns[raw]) < fullest:
                continue
            values = np.array(columns[raw])
            rising = np.diff(values)
            whole = np.isfinite(values).all() and (values == np.floor(values)).all()
            if whole and len(rising) and (rising > 0).mean() >= 0.8:
                return raw
    return None


def tokens_per_step(series: Series, settings: Mapping[str, str]) -> int | None:
    """Return how many tokens a step has: as said, or from counted tokens or samples, or from batch size and length.

    Returns:
        The usual number where it changes during the run; ``None`` where the log does not tell.
    """
    said = _setting(settings, _TOKENS_IN_STEP)
    if said:
        return said
    counted = _slope(series, TOKENS)
    if counted:
        return counted
    length = _setting(settings, _LENGTH)
    if not length:
        return None
    samples = _slope(series, SAMPLES)
    if samples:
        return samples * length
    sequences = _setting(settings, _SEQUENCES)
    if sequences:
        return sequences * length
    micro, replicas = _setting(settings, _MICRO), _setting(settings, _REPLICAS)
    if micro and replicas:
        return micro * replicas * (_setting(settings, _ACCUMULATION) or 1) * length
    return None


def _by_perplexity(series: Series, loss: str, perplexity: str) -> str:
    """Compare the logarithm of the perplexity with the loss, where both were logged."""
    if loss not in series:
        return ""
    _, here, there = np.intersect1d(series[loss][0], series[perplexity][0], assume_unique=True, return_indices=True)
    losses, perplexities = series[loss][1][here], series[perplexity][1][there]
    with np.errstate(all="ignore"):
        ratios = np.log(perplexities) / losses
    good = np.isfinite(ratios) & (losses > 0.1) & (perplexities > 1.0)
    if not good.any():
        return ""
    ratio = float(np.median(ratios[good]))
    if abs(ratio - 1.0) < 0.02:
        return "nats"
    return "bits" if abs(ratio / math.log(2.0) - 1.0) < 0.02 else ""


def _by_start(series: Series, settings: Mapping[str, str]) -> str:
    vocabulary = _setting(settings, _VOCABULARY)
    if LOSS not in series or not vocabulary or vocabulary < 256:
        return ""
    steps, losses = series[LOSS]
    if not len(steps) or not 0 <= steps[0] <= FIRST_STEPS or not math.isfinite(losses[0]):
        return ""
    share = float(losses[0]) / math.log(vocabulary)
    if abs(share - 1.0) < 0.15:
        return "nats"
    return "bits" if abs(share * math.log(2.0) - 1.0) < 0.15 else ""


def _slope(series: Series, name: str) -> int | None:
    """Return by how much a count usually grows in a step."""
    if name not in series or len(series[name][0]) < 2:
        return None
    steps, values = series[name]
    with np.errstate(all="ignore"):
        slopes = np.diff(values) / np.diff(steps)
    slopes = slopes[np.isfinite(slopes)]
    if not len(slopes):
        return None
    usual = float(np.median(slopes))
    return round(usual) if 1.0 <= usual < 2.0**53 else None


def _setting(settings: Mapping[str, str], names: Iterable[str]) -> int | None:
    """Return the first of these settings that is a whole number above 0; folders before its name do not matter."""
    by_name: dict[str, str] = {}
    for key, text in settings.items():
        by_name.setdefault("_".join(words(re.split(r"[./]", key)[-1])), text)
    for name in names:
        value = number(by_name.get(name, "").replace(",", ""))
        if value is not None and 1.0 <= value < 2.0**53 and value == value // 1:
            return int(value)
    return None
