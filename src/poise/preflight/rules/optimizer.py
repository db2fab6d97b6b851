"""Rules on Adam's constants, clipping, decay and states. No torch."""

from __future__ import annotations

import math
from functools import cache
from typing import Final

from poise.preflight.rules.base import Rule, Verdict, dense_size, is_adam, put, put_lr, rule, says, short, usual_lr
from poise.preflight.settings import Settings

LARGE_BATCH: Final = 2**19
"""Tokens of a step that count as a large batch: 64 sequences of 8192."""


@cache
def overshoot(beta1: float, beta2: float) -> tuple[float, int]:
    """Return by how much Adam's step exceeds the learning rate after a sudden growth of gradients, and when.

    The largest (1 - beta1^n) / sqrt(1 - beta2^n) over n: gradients grow at once by a large factor and stay there.

    >>> [(round(peak, 2), n) for peak, n in (overshoot(0.9, beta2) for beta2 in (0.95, 0.99, 0.999))]
    [(1.1, 20), (2.13, 13), (6.57, 12)]
    """
    peak, at = 0.0, 0
    for n in range(1, 2001):
        ratio = -math.expm1(n * math.log(beta1)) if beta1 > 0 else 1.0
        value = ratio / math.sqrt(-math.expm1(n * math.log(beta2))) if beta2 > 0 else ratio
        if value > peak:
            peak, at = value, n
    return peak, at


def _in_range(s: Settings) -> bool:
    return s.beta1 is not None and s.beta2 is not None and 0 <= s.beta1 < 1 and 0 <= s.beta2 < 1


def _usual_betas(s: Settings) -> str:
    return f"{put(s, 'beta1', 0.9)}, {put(s, 'beta2', 0.95)}"


def _beta_range(s: Settings) -> Verdict | None:
    assert s.beta1 is not None and s.beta2 is not None
    if not _in_range(s):
        return Verdict(
            "critical",
            f"{says(s, 'beta1', 'beta2')}: an average's decay must be below 1",
            _usual_betas(s),
            "At 1 the average never takes anything in; optimizers refuse it.",
        )
    if is_adam(s) and s.beta1**2 > s.beta2:
        return Verdict(
            "warning",
            f"{says(s, 'beta1', 'beta2')}: beta1 is above sqrt(beta2) = {math.sqrt(s.beta2):.3g}",
            _usual_betas(s),
        )
    return None


def _beta2_batch(s: Settings) -> Verdict | None:
    assert s.beta1 is not None and s.beta2 is not None
    if not is_adam(s) or not _in_range(s):
        return None
    peak, at = overshoot(s.beta1, s.beta2)
    tokens, size = s.batch_tokens, dense_size(s)
    if peak < 1.4 or (tokens is not None and tokens < 2**17):
        return None
    mended, _ = overshoot(s.beta1, 0.95)
    alone = mended < 1.4 and s.beta1**2 <= 0.95
    best = mended if alone else overshoot(0.9, 0.95)[0]
    large = tokens is not None and tokens >= LARGE_BATCH and size is not None and size >= 1e9
    batch = f", {short(tokens)} tokens a step" if tokens is not None else ""
    return Verdict(
        "warning" if large and peak >= 1.5 else "note",
        f"{says(s, 'beta1', 'beta2')}{batch}: when gradients grow suddenly, steps reach {peak:.3g} x the learning rate "
        f"{at} steps later",
        f"{put(s, 'beta2', 0.95) if alone else _usual_betas(s)} (overshoot {best:.2g} x)",
        also=("batch_sequences", "seq_len"),
    )


def gradient_rms(weights: float, clip: float) -> float:
    """Return the largest root mean square that one element of a clipped gradient can have: clip / sqrt(weights)."""
    return clip / math.sqrt(weights)


def _fitting_eps(weights: float, clip: float = 1.0) -> float:
    """Return 1e-8, or the power of ten that is a hundredth of such gradients or less."""
    return float(min(1e-8, 10.0 ** math.floor(math.log10(gradient_rms(weights, clip) / 100))))


def _eps(s: Settings) -> Verdict | None:
    assert s.eps is not None
    size = s.n_params
    if not is_adam(s):
        return None
    if s.eps == 0.0:
        return Verdict(
            "warning",
            f"{says(s, 'eps')}",
            put(s, "eps", f"{_fitting_eps(size or 1.0):.0e}"),
            "Where a gradient is exactly zero, as in rows of "
            "the embedding that a batch does not use, the step is 0 / 0.",
        )
    if not size:
        return None
    clip = min(s.clip or 1.0, 1.0)  # a wide bound makes usual gradients no larger
    rms = gradient_rms(size, clip)
    share = s.eps / rms
    if share < 0.1:
        return None
    return Verdict(
        "critical" if share >= 30 else "warning" if share >= 3 else "note",
        f"{says(s, 'eps')} against gradients of at most {rms:.2g} an element on average (estimate: norm {clip:g} over "
        f"sqrt of {short(size)} weights)",
        put(s, "eps", f"{_fitting_eps(size, clip):.0e}"),
        also=("clip", "params"),
    )


def _clip(s: Settings) -> Verdict | None:
    assert s.clip is not None
    size = dense_size(s)
    big = size is not None and size >= 1e9
    if s.clip == 0.0:
        return Verdict(
            "warning" if big or s.dtype == "fp16" else "note",
            f"{says(s, 'clip')}: gradients are not clipped",
            put(s, "clip", 1.0),
        )
    if s.clip <= 2.0:
        return None
    return Verdict(
        "warning" if big else "note",
        f"{says(s, 'clip')}",
        put(s, "clip", 1.0),
        "OPT-175B's failing lineage began with 2.5 and went to 1.5 and 1.0; nearly all published runs use 1.0 or less.",
        "OPT-175B logbook (facebookresearch/metaseq)",
    )


def _no_decay(s: Settings) -> Verdict | None:
    assert s.weight_decay is not None
    if s.weight_decay == 0.0:
        return (
            None
            if s.dtype != "bf16"
            else Verdict(
                "note",
                f"{says(s, 'weight_decay')} in bf16",
                f"{put(s, 'weight_decay', 0.1)}, not on embeddings and norms",
                also=("dtype",),
            )
        )
    if s.weight_decay < 0.5 or not is_adam(s) or (s.lr is not None and s.lr < 1e-5):
        return None
    lr = f" and {says(s, 'lr')}" if s.lr is not None else ""
    return Verdict(
        "note",
        f"{says(s, 'weight_decay')}{lr}",
        put(s, "weight_decay", 0.1),
        "Weights forget with a time constant of 1 / (lr x weight decay) steps; published runs use 0.05 to 0.1.",
        "Wang and Aitchison 2024, arXiv 2405.13698; settings of the runs in docs/case-studies.md",
    )


def _lion(s: Settings) -> Verdict | None:
    assert s.lr is not None
    size = dense_size(s)
    if "lion" not in (s.optimizer or "").lower() or size is None:
        return None
    usual = usual_lr(size)
    if s.lr <= usual / 2:
        return None
    return Verdict(
        "warning",
        f"{says(s, 'optimizer', 'lr')} at {short(size)} weights, where AdamW's usual rate is {usual:.2g}",
        f"{put_lr(s, usual / 5)}, and a weight decay 3 to 10 times AdamW's",
    )


def _low_bit_states(s: Settings) -> Verdict | None:
    if s.state_dtype not in ("8bit", "4bit"):
        return None
    return Verdict("note", f"{says(s, 'state_dtype')}", "keep the embedding's states in fp32")


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "betas",
        "betas out of order",
        "critical",
        ("beta1", "beta2"),
        _beta_range,
        source="Kingma and Ba 2015, arXiv 1412.6980 (the condition beta1 < sqrt(beta2)); Zhang et al. 2022, "
        "arXiv 2208.09632",
        why="The direction then lives longer than the estimate of its size: one large gradient gives steps without "
        "bound in relation to the learning rate.",
    ),
    rule(
        "beta2-batch",
        "beta2 too slow for the batch",
        "warning",
        ("optimizer", "beta1", "beta2"),
        _beta2_batch,
        source="arithmetic: the largest (1 - beta1^n) / sqrt(1 - beta2^n); BigScience tr8-104B chronicles and the "
        "OPT-175B logbook, which both went to 0.95",
        why="The second moment lags behind a sudden growth of gradients, so steps overshoot. 104B began with 0.999 and "
        "OPT 11.x with 0.98; 0.95 is the published choice for large batches. Alone it did not save 104B.",
    ),
    rule(
        "eps-gradient",
        "eps not small against gradients",
        "critical",
        ("optimizer", "eps"),
        _eps,
        source="Wortsman et al. 2024, arXiv 2309.14322; OLMo 2 (arXiv 2501.00656)",
        why="Gradients shrink with size; where sqrt(v) comes near eps the step is no longer normalised and training "
        "slows. OLMo 2 went from 1e-5 to 1e-8. (Llama-like runs have trained with 1e-5.)",
    ),
    rule(
        "clip",
        "gradient clipping off or wide",
        "warning",
        ("clip",),
        _clip,
        source="settings of published runs (docs/case-studies.md); Pascanu et al. 2013, arXiv 1211.5063",
        why="One bad batch then moves the weights, or Adam's moments, without limit; nearly every published run clips "
        "the global norm at 1.0 or lower.",
    ),
    rule(
        "weight-decay",
        "unusual weight decay",
        "note",
        ("weight_decay",),
        _no_decay,
        source="D'Angelo et al. 2023, Why Do We Need Weight Decay, arXiv 2310.04415",
        why="Weight decay prevents sudden divergences of bf16 training: without it weights outgrow bf16's resolution.",
    ),
    rule(
        "lion-lr",
        "Lion with AdamW's learning rate",
        "warning",
        ("optimizer", "lr"),
        _lion,
        source="Chen et al. 2023, arXiv 2302.06675, section 5",
        why="Lion's steps are as large as the learning rate in every element; its authors find rates 3 to 10 times "
        "smaller than AdamW's suitable.",
    ),
    rule(
        "low-bit-states",
        "8- or 4-bit optimizer states for the embedding",
        "note",
        ("state_dtype",),
        _low_bit_states,
        source="Dettmers et al. 2022, 8-bit optimizers, arXiv 2110.02861",
        why="Its authors keep the embedding's states in 32 bits, for stability.",
    ),
)
"""In the order of the file."""
