"""What every file of rules uses: ``Rule``, and estimates that several rules share. No torch.

Judges see settings that ``check`` has cleaned: a number that is not finite, or negative, or zero where that is no size,
is ``None`` by then (the rule ``unusable-value`` reports it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from poise.core.types import Severity
from poise.preflight.settings import Finding, Settings

WEAK: Final = ("default of ", "guessed from ")
"""How a field's words begin that the source does not say itself."""

_GUESSED: Final = ("dtype", "init_std", "embed_std")
"""Fields that raise no severity above a note where nobody wrote them: readers fill them in from neighbours."""

RANK: Final = {"critical": 0, "warning": 1, "note": 2}
"""Order of severities, the gravest first."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is known to break, hurt or puzzle.

    Attributes:
        id: short name, e.g. ``init-std-width``.
        title: one line.
        severity: the highest that it gives.
        needs: fields that must be said; with one of them ``None`` the rule does not judge.
        judge: cleaned settings -> what is wrong, or nothing.
        source: whose experience it is.
        why: what is known to happen.
    """

    id: str
    title: str
    severity: Severity
    needs: tuple[str, ...]
    judge: Callable[[Settings], Finding | None]
    source: str
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule's function says; ``rule`` makes a ``Finding`` of it.

    Attributes:
        severity: of this case.
        what: what the configuration says, with its values.
        mend: what to write instead.
        why: instead of the rule's own reason, where the case has one.
        source: likewise.
        also: fields judged besides those that the rule needs.
    """

    severity: Severity
    what: str
    mend: str
    why: str = ""
    source: str = ""
    also: tuple[str, ...] = ()


def rule(
    id: str,
    title: str,
    severity: Severity,
    needs: tuple[str, ...],
    verdict: Callable[[Settings], Verdict | None],
    *,
    source: str,
    why: str,
) -> Rule:
    """Make a rule from a function that returns a ``Verdict``."""

    def judge(settings: Settings) -> Finding | None:
        said = verdict(settings)
        if said is None:
            return None
        assert RANK[said.severity] >= RANK[severity], f"{id} gave {said.severity}, above its {severity}"
        given = said.severity
        unsaid = {name: None for name in _GUESSED if weak(settings, name)}
        if unsaid and given != "note":
            # As grave as it is without the guess, and a note where it rests on the guess.
            without = None if unsaid.keys() & set(needs) else verdict(replace(settings, **unsaid))  # type: ignore[arg-type]
            given = max(without.severity if without else "note", given, key=RANK.__getitem__)
        return Finding(id, given, said.what, said.why or why, said.mend, said.source or source, needs + said.also)

    return Rule(id, title, severity, needs, judge, source, why)


def says(settings: Settings, *names: str) -> str:
    """Return how the source says those of the fields that it says: ``a = 1, b = 2``."""
    said = [settings.say(name) for name in names if getattr(settings, name) is not None]
    return ", ".join(dict.fromkeys(said))  # one setting may hold two of them


def weak(settings: Settings, name: str) -> bool:
    """Return whether a field is only what a framework does by itself, or guessed from a neighbouring setting."""
    return settings.said.get(name, "").startswith(WEAK)


def put(settings: Settings, name: str, value: float | str) -> str:
    """Return what to write for a field, by the source's own name of it: ``warmup_steps = 2000``, ``--lr 0.0003``."""
    text = value if isinstance(value, str) else f"{value:d}" if isinstance(value, int) else f"{value:.2g}"
    own = settings.name_of(name)
    return f"{own} {text}" if own.startswith("-") else f"{own} = {text}"


def short(number: float) -> str:
    """Return a count in words of size.

    >>> [short(n) for n in (950, 131072, 1.25e8, 8.03e9, 1.04e12)]
    ['950', '131k', '125M', '8.03B', '1.04T']
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:.4g}"


# -- size and learning rate ---------------------------------------------------------------------------------------

USUAL_LR: Final = (
    (1.7e7, 3e-3),
    (1.3e8, 1e-3),
    (1e9, 5e-4),
    (7e9, 3e-4),
    (1.3e10, 3e-4),
    (3.25e10, 1.5e-4),
    (7e10, 1.5e-4),
    (4.05e11, 8e-5),
)
"""(weights, peak learning rate of AdamW): about the highest that published runs without QK-norm report at this size."""

USUAL_LR_SOURCE: Final = (
    "peak rates of LLaMA (arXiv 2302.13971, table 2), Llama 3 (arXiv 2407.21783, table 3), LayerNorm Scaling's "
    "baselines (arXiv 2502.05795) and, at 17M, a public sweep of the CS336 course; "
    "GPT-3's (arXiv 2005.14165, table 2.1) are lower"
)

OTHER_LR: Final = ("mlra", "wesar", "sigma_reparam", "mup", "depth_mup", "u_mup", "ngpt")
"""Our methods under which a learning rate means something else, so that it cannot be compared."""

BOUNDED_LOGITS: Final = ("qk_norm", "qkv_norm", "qk_fc_norm", "soft_cap", "soft_clip", "hybrid_norm", "ngpt")
"""Our methods that bound attention logits."""


def names(settings: Settings) -> tuple[str, ...]:
    """Return the names of our methods, without their settings."""
    return tuple(str(method).partition(":")[0].strip() for method in settings.methods or ())


def dense_size(settings: Settings) -> float | None:
    """Return the weights that one token meets, roughly: of a mixture of experts the shape's, not all experts'."""
    if settings.n_experts:
        return replace(settings, params=None).n_params or None
    return settings.n_params or None


def is_adam(settings: Settings) -> bool:
    """Return whether the optimizer is of Adam's family, where a learning rate is about the size of a step."""
    return "adam" in (settings.optimizer or "").lower()


def usual_lr(weights: float) -> float:
    """Return the usual highest peak learning rate at this size, between the points of ``USUAL_LR`` in log-log.

    >>> [f"{usual_lr(n):.2g}" for n in (1e6, 1e9, 8e9, 3.25e10, 1.75e11, 1e13)]
    ['0.003', '0.0005', '0.0003', '0.00015', '0.00011', '8e-05']
    """
    below = USUAL_LR[0]
    for above in USUAL_LR:
        if weights <= above[0]:
            if above is below:
                return above[1]
            share = math.log(weights / below[0]) / math.log(above[0] / below[0])
            return float(below[1] * (above[1] / below[1]) ** share)
        below = above
    return below[1]


def put_lr(settings: Settings, lr: float) -> str:
    """Return what to write for a peak learning rate; with the minimum where that would lie above it."""
    low = "" if settings.min_lr is None or settings.min_lr <= lr else f", {put(settings, 'min_lr', lr / 10)}"
    return put(settings, "lr", lr) + low


def heat(settings: Settings) -> float | None:
    """Return the peak learning rate over the usual one; nothing where they cannot be compared."""
    size = dense_size(settings)
    if settings.lr is None or size is None or not is_adam(settings) or set(OTHER_LR) & set(names(settings)):
        return None
    return settings.lr / usual_lr(size)


def logits_bounded(settings: Settings) -> bool:
    """Return whether something bounds attention logits: QK-norm, QK-Clip, a cap, or a method of ours."""
    return bool(
        settings.qk_norm or settings.qk_clip or settings.attn_soft_cap or set(BOUNDED_LOGITS) & set(names(settings))
    )


def outputs_normalised(settings: Settings) -> bool:
    """Return whether what a sub-layer adds to the stream is normalised first (OLMo 2, Peri-LN, sandwich)."""
    return settings.norm in ("reordered", "sandwich") or bool(
        {"olmo2_norm", "peri_ln", "sandwich_ln"} & set(names(settings))
    )


def deep_norm(settings: Settings) -> bool:
    """Return whether Post-LN is DeepNorm's."""
    words = settings.say("norm") + settings.say("residual_init")
    return "deep_norm" in names(settings) or "deepnorm" in words.lower().replace("_", "")


def embedding_normalised(settings: Settings) -> bool:
    """Return whether a norm stands right after the embedding."""
    return bool(settings.embed_norm) or bool({"embed_norm", "peri_ln"} & set(names(settings)))
