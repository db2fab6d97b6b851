"""What measurements mean: findings like those of the rules, with ids that begin with ``measured-``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from poise.preflight.measure_forecast import THRESHOLD, Forecast
from poise.preflight.measure_start import Start
from poise.preflight.measure_widths import Widths
from poise.preflight.rules.base import names, outputs_normalised, put, put_lr, short
from poise.preflight.settings import Finding, Settings

LOSS_ABOVE: Final = 2.0
"""Nats above ln V at the start. OLMo 2 32B's configuration starts 1.0 above, BigScience 104B's 3.2."""

LOGIT: Final = 20.0
"""Largest attention logit at the start: over a few hundred keys the softmax is then close to one-hot."""

PROFILE: Final = 10.0
"""Ratio of the gradients of first and last block, either way, that is worth a note."""

EXTREME: Final = 1000.0
"""The ratio that is worth a warning: far from every published configuration that was measured."""

PARAMETRISED: Final = frozenset({"mup", "u_mup", "depth_mup"})
"""Our methods that promise activations whose size does not depend on the width."""

_SPIKE_NO_MORE: Final = "measured here; Takase et al. 2023, Spike No More, arXiv 2312.16903"
_MUP: Final = "measured here; Yang et al. 2022, arXiv 2203.03466"
_WORTSMAN: Final = "measured here; Wortsman et al. 2023, arXiv 2309.14322"


NEAR_ONE: Final = (0.5, 2.0)
"""Deviations of the stream behind the embedding that count as about 1."""


def judge(
    settings: Settings,
    start: Start,
    widths: Widths | None,
    forecast: Forecast | None,
    lr: float,
    stand_in: str = "",
) -> list[Finding]:
    """Return what is wrong with what was measured.

    Args:
        settings: the configuration.
        start, widths, forecast: what was measured.
        lr: the learning rate that counts as the configured one.
        stand_in: how the model whose start was measured differs from the configured one; empty where it does not.
    """
    found = [_of(stand_in, one) for one in _start(settings, start)]
    if widths is not None:
        found += _widths(settings, widths)
    if forecast is not None:
        found += [*_rate(settings, forecast, lr), *_logits(settings, forecast)]
    return found


def _of(stand_in: str, found: Finding) -> Finding:
    if not stand_in:
        return found
    return replace(found, what=f"{found.what}; measured on a stand-in ({stand_in}), not on the configured model")


def _profile_mend(settings: Settings, s: Start) -> str:
    """Return what is left to do about gradients that differ between blocks."""
    mends = []
    if not NEAR_ONE[0] <= s.embedded <= NEAR_ONE[1]:
        mends.append("bring the embedding's output to a deviation of about 1")
    if settings.residual_init not in ("scaled", "depth") and not outputs_normalised(settings):
        mends.append("scale residual outputs by 1 / sqrt(2 layers)")
    return ", and ".join(mends) or "nothing before it runs; watch the gradient norms of the blocks in the first steps"


def _start(settings: Settings, s: Start) -> Iterator[Finding]:
    if not (math.isfinite(s.loss) and math.isfinite(s.gradient)):
        yield Finding(
            "measured-start-nonfinite",
            "critical",
            f"the first loss is {s.loss:g} and the norm of its gradient {s.gradient:g}",
            "A model whose first gradient is no number cannot be trained.",
            "start its matrices smaller",
            "measured here",
            ("init_std", "embed_std"),
        )
        return
    if s.loss - s.nothing > LOSS_ABOVE:
        yield Finding(
            "measured-start-loss",
            "warning",
            f"the first loss is {s.loss:.2f}, {s.loss - s.nothing:.2f} above ln V: output logits start with a "
            f"deviation of {s.logits:.2g}",
            "Output logits that are large before anything is learnt are wrong guesses with confidence; the first "
            "steps go into unlearning them, with their largest gradients.",
            "start the output matrix (with a tied head the embedding) at about 1 / sqrt(width) or below",
            "measured here; loss and logits of independent normal logits: ln V + deviation^2 / 2",
            ("init_std", "embed_std", "tied", "d_model"),
        )
    logit = max((layer.logit for layer in s.layers if math.isfinite(layer.logit)), default=0.0)
    if logit > LOGIT:
        yield Finding(
            "measured-start-attention",
            "warning",
            f"the largest attention logit is {logit:.3g} before the first step",
            "A softmax that starts close to one-hot has hardly a gradient, and rates that would be safe push it on.",
            "start query and key matrices at sqrt(2 / (5 width)) or below, or apply qk_norm",
            _WORTSMAN,
            ("init_std", "d_model", "qk_norm"),
        )
    zero = [layer.number for layer in s.layers if layer.gradient == 0.0]
    if zero:
        shown = ", ".join(map(str, zero[:4])) + (", ..." if len(zero) > 4 else "")
        yield Finding(
            "measured-gradient-zero",
            "warning",
            f"{len(zero)} of {len(s.layers)} blocks have no gradient at the start: {shown}",
            "A block without a gradient does not learn until something else moves.",
            "see that no two matrices in a row start at zero",
            "measured here",
            ("init_std", "residual_init"),
        )
    elif not 1 / PROFILE <= s.profile <= PROFILE:
        yield Finding(
            "measured-gradient-profile",
            "note" if 1 / EXTREME <= s.profile <= EXTREME else "warning",
            f"the first block's gradient is {s.profile:.3g} x the last block's at the start",
            "Where every sub-layer enlarges the gradient on its way back, early layers' gradients can spike; where it "
            "shrinks, they do not learn. By itself it condemns nothing: measured like this, the configurations of OLMo "
            "2 32B, DeepSeek-V3 and Marin 32B with QK-norm, which trained well, are at about 20 to 90.",
            _profile_mend(settings, s),
            _SPIKE_NO_MORE,
            ("init_std", "embed_std", "residual_init", "norm", "n_layers"),
        )


def _widths(settings: Settings, w: Widths) -> Iterator[Finding]:
    growing = w.growing("change_verdict")
    if not growing or not PARAMETRISED & set(names(settings)):
        return
    steepest = w.steepest("change")
    most = f", most at {steepest[0]} (slope {steepest[1].mean:+.2f})" if steepest else ""
    yield Finding(
        "measured-widths",
        "warning",
        f"what {w.steps} steps moved grows with the width at {len(growing)} of {len(w.taps)} places{most}",
        "The parametrisation is to make learning rates transfer over widths, and they transfer only if it does not "
        "grow.",
        "see poise study coord-check, and methods that undo the parametrisation",
        _MUP,
        ("methods", "lr"),
    )


def _rate(settings: Settings, f: Forecast, lr: float) -> Iterator[Finding]:
    n, total = f.diverged(lr)
    if not n:
        return
    yield Finding(
        "measured-lr-diverged",
        "critical" if 2 * n > total else "warning",
        f"{n} of {total} proxies diverged at {_rate_words(settings, lr)}, within {f.steps} steps",
        "Models that are larger, or trained for longer, diverge at lower rates than small ones.",
        f"start from {put_lr(settings, lr / 10)} and measure again; a longer warm-up and qk_norm widen the range",
        _WORTSMAN,
        ("lr", "optimizer"),
    )


def _rate_words(settings: Settings, lr: float) -> str:
    return f"the configured lr = {lr:g}" if settings.lr is not None else f"lr = {lr:g}, the usual one at this size"


def _logits(settings: Settings, f: Forecast) -> Iterator[Finding]:
    if not f.points or not f.informative or f.points[0].high <= THRESHOLD:
        return
    here = f.points[0]
    likely = here.logit > THRESHOLD
    says = "passes" if likely else "may pass, within its interval,"
    yield Finding(
        "measured-logit-forecast",
        "warning" if likely else "note",
        f"forecast, not a fact: at {short(f.weights)} block weights and lr {here.lr:.2g} the largest attention logit "
        f"{says} {THRESHOLD:g} ({here.logit:.2g} [{here.low:.2g}, {here.high:.2g}], {f.decades:.1f} decades beyond the "
        f"largest proxy, left-out error {f.left_out_error:.2f} decades)",
        "Every run of Wortsman et al. whose largest logit passed 1e4 diverged.",
        f"apply qk_norm, or {put(settings, 'lr', here.lr / 3)} and measure again",
        _WORTSMAN,
        ("lr", "qk_norm", "d_model", "n_layers"),
    )
