"""Embedding deviation: the embedding starts at about one, so that the first norm does not blow gradients up.

Citation: Takase et al. 2023, "Spike No More", arXiv 2312.16903 (named there as the alternative to Scaled Embed and
    Embed LN); the option `embedding_init_method_std` of Megatron-LM cites it.
Formula: E ~ N(0, std²), std = 1; x_0 = E[ids].
Differs from the paper in: weight decay. Megatron-LM's option also takes the embedding out of weight decay, since decay
    would shrink it again; here no embedding is ever decayed.
Cost: none. Adam's step on the embedding stays the learning rate, relative to larger values: unlike `embed_scale`, whose
    step on x_0 is sqrt(D) times larger, the embedding turns slowly.
Acts: once, before the first step.
Off: leave `embed_std` out of the methods.
Numerics: starting values are drawn in fp32; nothing happens in training.

A tied head is the embedding: its logits start with a deviation of std · sqrt(D), and the first loss lies about
std² · D / 2 above log V. More than 2 for that deviation is refused (our bound; the paper says nothing about it).

Shapes: D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

LARGEST_TIED_LOGIT_STD: Final = 2.0
"""Of the logits of a tied head at the start."""

CARD: Final = Card(
    name="embed_std",
    kind="model",
    title="Starts the embedding at a deviation of one, so that the first norm does not blow gradients up",
    citation="Takase et al. 2023, Spike No More, arXiv 2312.16903",
    formula="E ~ N(0, std^2), std = 1",
    acts="once, before the first step; needs an untied head, or a small std",
    cost="none",
    off="leave `embed_std` out of the methods",
    differs="starting values are cut off at three deviations; no embedding of the house is ever decayed",
)

EXCLUDES: Final[Mapping[str, str]] = {
    "embed_scale": "they are alternatives; with both the residual stream starts at sqrt(D) instead of 1",
}


def fixed_std(place: Place, std: float) -> float:
    """The deviation of the embedding at the start, whatever the initialisation says."""
    return std


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"embed_std": {"embed_std": fixed_std}}


def apply(spec: Spec, *, std: float = 1.0) -> Spec:
    """Return ``spec`` with an embedding that starts at the deviation ``std``.

    Raises:
        UserError: a deviation that is not above 0, or too large for a tied head.
    """
    if not 0 < std < math.inf:
        raise UserError(f"embed_std std is {std}; give a finite number above 0, e.g. 1")
    at_most = LARGEST_TIED_LOGIT_STD / math.sqrt(spec.d_model)
    if spec.tied and std > at_most:
        raise UserError(
            f"embed_std std is {std}, but the head is tied: its logits would start at {std * spec.d_model**0.5:.3g}; "
            f"set tied = false, use embed_scale or embed_norm instead, or give std at most {at_most:.3g}"
        )
    return spec.claim("embed_std", Part.of("embed_std", {"std": std}), "embed_std")
