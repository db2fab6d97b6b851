"""Small initialisation: every matrix starts at sqrt(2 / (5 D)), residual outputs at 1 / sqrt(2 N) of that.

Citation: Nguyen and Salazar 2019, "Transformers without Tears", arXiv 1910.05895 (SmallInit); with the residual factor
    it is the vanilla initialisation of Takase et al. 2023, "Spike No More", arXiv 2312.16903, and of Megatron-LM.
Formula: std = sqrt(2 / (5 D)); attn_out and mlp_out: std / sqrt(2 N).
Differs from the paper in: normal values are cut off at three deviations, as all starting values of the house, which
    makes the true deviation 1.3 % smaller.
Cost: none.
Acts: once, before the first step.
Off: leave `small_init` out of the methods.
Numerics: starting values are drawn in fp32; nothing happens in training.

Shapes: D width, N number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="small_init",
    kind="model",
    title="Starts every matrix at sqrt(2 / (5 D)) and residual outputs at 1 / sqrt(2 N) of that: small sub-layers",
    citation="Nguyen and Salazar 2019, arXiv 1910.05895; Takase et al. 2023, Spike No More, arXiv 2312.16903",
    formula="std = sqrt(2 / (5 D)); attn_out, mlp_out: std / sqrt(2 N)",
    acts="once, before the first step",
    cost="none",
    off="leave `small_init` out of the methods",
    differs="starting values are cut off at three deviations: the true deviation is 1.3 % smaller",
)

EXCLUDES: Final[Mapping[str, str]] = {}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with the house parts ``small`` and ``scaled`` as its initialisation."""
    spec = spec.claim("init", Part("small"), "small_init")
    return spec.claim("residual_init", Part("scaled"), "small_init")
