"""Rules on number formats: fp16, bf16 states and weights, checks for NaN. No torch."""

from __future__ import annotations

from functools import cache
from typing import Final

from poise.preflight.rules.base import Rule, Verdict, dense_size, is_adam, put, rule, says, short
from poise.preflight.settings import Settings

_CHRONICLES: Final = "BigScience tr8-104B chronicles (bigscience-workshop/bigscience)"
_OFF: Final = ("none", "off", "false", "1", "1.0", "")


@cache
def stuck_share(beta: float) -> float:
    """Return the share of bf16 numbers x for which beta x rounds to x; ``poise.optim.doctor`` has the same with torch.

    >>> stuck_share(0.999), stuck_share(0.95)
    (1.0, 0.0)
    """
    stuck = 0
    for step in range(128):  # one binade stands for all
        x = 1 + step / 128
        product = x * beta
        spacing = 1 / 128 if product >= 1 else 1 / 256
        stuck += round(product / spacing) * spacing == x
    return stuck / 128


def _loss_scale(s: Settings) -> Verdict | None:
    assert s.loss_scale is not None
    if s.dtype != "fp16":
        return None
    text = s.loss_scale.strip().lower()
    if text in _OFF:
        return Verdict(
            "critical",
            f"{says(s, 'dtype')} and {says(s, 'loss_scale')}: gradients are not scaled",
            "dynamic loss scaling, or bf16",
        )
    try:
        scale = float(text)
    except ValueError:
        return None
    if not 0 < scale < 256:
        return None
    guess = f" (2^{scale:g} = {2**scale:g} may have been meant)" if scale.is_integer() and 4 <= scale <= 32 else ""
    return Verdict(
        "warning",
        f"{says(s, 'dtype')} and {says(s, 'loss_scale')}: a constant scale of {scale:g}{guess}",
        "dynamic loss scaling (beginning at 2^16 or lower), or bf16",
    )


def _fp16(s: Settings) -> Verdict | None:
    size = dense_size(s)
    if s.dtype != "fp16" or size is None or size < 1e9:
        return None
    return Verdict(
        "warning" if size >= 1e10 else "note",
        f"{says(s, 'dtype')} at {short(size)} weights",
        "bf16 where the hardware has it; else dynamic scaling, softmax and logits in fp32, a norm after the embedding",
        also=("params", "n_layers", "d_model"),
    )


def _softmax(s: Settings) -> Verdict | None:
    if s.dtype != "fp16" or s.softmax_fp32 is not False or "flash" in (s.attention_kernel or ""):
        return None
    return Verdict(
        "warning",
        f"{says(s, 'dtype')} and {says(s, 'softmax_fp32')}",
        "compute attention's softmax in fp32",
        also=("attention_kernel",),
    )


def _states(s: Settings) -> Verdict | None:
    assert s.beta2 is not None
    if s.state_dtype != "bf16" or not is_adam(s) or not 0 < s.beta2 < 1 or "stochastic" in (s.optimizer or ""):
        return None
    share = stuck_share(s.beta2)
    if not share:
        return None
    return Verdict(
        "critical" if share > 0.5 else "warning",
        f"{says(s, 'state_dtype', 'beta2')}: beta2 times a bf16 number rounds back to it for {share:.0%} of numbers",
        f"keep the moments in fp32, round them stochastically, or {put(s, 'beta2', 0.95)}",
        also=("optimizer",),
    )


def _weights(s: Settings) -> Verdict | None:
    assert s.lr is not None
    if s.master_weights is not False or s.dtype not in ("bf16", "fp16") or not is_adam(s):
        return None
    half_ulp = 2.0**-9 if s.dtype == "bf16" else 2.0**-12
    std = s.init_std if s.init_std else 0.02
    lost, low = std * half_ulp, s.min_lr if s.min_lr is not None else s.lr
    return Verdict(
        "warning" if min(low, s.lr) < lost else "note",
        f"weights are kept in {s.dtype} only ({says(s, 'master_weights')}): a step of lr {low:.2g} against half a unit "
        f"in the last place of {lost:.2g} for a weight of {std:.2g}",
        "keep fp32 master weights, or round stochastically",
        also=("min_lr", "init_std"),
    )


def _nan(s: Settings) -> Verdict | None:
    if s.nan_check is not False:
        return None
    return Verdict(
        "warning" if s.dtype == "fp16" else "note",
        says(s, "nan_check", "dtype"),
        "stop, or skip the step, when loss or gradient norm is not finite",
        also=("dtype",),
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "fp16-loss-scale",
        "fp16 without loss scaling",
        "critical",
        ("dtype", "loss_scale"),
        _loss_scale,
        source="Micikevicius et al. 2018, mixed precision training, arXiv 1710.03740",
        why="fp16's smallest normal number is 6e-5: most gradients of a language model become zero or lose digits "
        "unless the loss is scaled up.",
    ),
    rule(
        "fp16-size",
        "fp16 for a large model",
        "warning",
        ("dtype",),
        _fp16,
        source=f"{_CHRONICLES}; OPT-175B logbook; GLM-130B's training log; BLOOM (arXiv 2211.05100)",
        why="104B, OPT-175B and GLM-130B, all in fp16, saw the loss scale sink when they went wrong; BLOOM "
        "changed to bf16 and had one spike.",
    ),
    rule(
        "fp16-softmax",
        "attention's softmax in fp16",
        "warning",
        ("dtype", "softmax_fp32"),
        _softmax,
        source=f"GLM-130B (arXiv 2210.02414); {_CHRONICLES}",
        why="Logits above 65504 are infinite and small terms vanish; GLM-130B computes the softmax in fp32.",
    ),
    rule(
        "bf16-states",
        "bf16 moments that cannot decay",
        "critical",
        ("state_dtype", "beta2", "optimizer"),
        _states,
        source="arithmetic of round to nearest with 8 significant bits (poise.optim.doctor)",
        why="A second moment in bf16 does not fall when beta2 rounds away: it remembers its largest value for ever, "
        "and the step shrinks for ever after one gradient spike.",
    ),
    rule(
        "bf16-weights",
        "low-precision weights without masters",
        "warning",
        ("dtype", "master_weights", "lr", "optimizer"),
        _weights,
        source="Micikevicius et al. 2018, arXiv 1710.03740; arithmetic of rounding",
        why="A step below half a unit in the last place is lost; Adam's steps are about as large as the learning rate.",
    ),
    rule(
        "nan-check",
        "no check for NaN",
        "warning",
        ("nan_check",),
        _nan,
        source="arithmetic of NaN; docs/hardware.md on refusing state that is not finite",
        why="One NaN gradient makes every weight NaN, and a checkpoint saved after it cannot be used.",
    ),
)
"""In the order of the file."""
