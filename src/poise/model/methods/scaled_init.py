"""Scaled initialisation: matrices that write into the residual stream start 1 / sqrt(2 N) smaller.

Citation: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2); Shoeybi et al. 2019,
    Megatron-LM, arXiv 1909.08053; one of the two conditions of Takase et al. 2023, arXiv 2312.16903 (small sub-layers).
Formula: std(attn_out) = std(mlp_out) = std / sqrt(2 N), whatever the initialisation says.
Differs from the paper in: normal values are cut off at three deviations, as all starting values of the house, which
    makes the true deviation 1.3 % smaller.
Cost: none.
Acts: once, before the first step. The house's default initialisation does it by itself; there the method says so in the
    list of methods and keeps others from changing it. It acts where the initialisation does not (`default` with
    `scale_residual=false`).
Off: leave `scaled_init` out of the methods, and have an initialisation that does not scale residual outputs.
Numerics: starting values are drawn in fp32; nothing happens in training.

Shapes: N number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="scaled_init",
    kind="model",
    title="Starts the matrices that write into the residual stream 1 / sqrt(2 N) smaller, so the stream stays small",
    citation="Radford et al. 2019, GPT-2; Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053",
    formula="std(attn_out) = std(mlp_out) = std / sqrt(2 N)",
    acts="once, before the first step; the default initialisation does so by itself",
    cost="none",
    off="leave `scaled_init` out of the methods, with an initialisation that does not scale residual outputs",
    differs="starting values are cut off at three deviations: the true deviation is 1.3 % smaller",
)

EXCLUDES: Final[Mapping[str, str]] = {}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with the house part ``scaled`` in the slot ``residual_init``."""
    return spec.claim("residual_init", Part("scaled"), "scaled_init")
