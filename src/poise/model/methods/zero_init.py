"""Zero initialisation of residual outputs: every block is the identity at the start.

Citation: Zhang, Dauphin and Ma 2019, "Fixup Initialization", arXiv 1901.09321 (the last layer of every residual branch
    starts at zero); Goyal et al. 2017, arXiv 1706.02677, for the gain of the last norm of a branch.
Formula: attn_out = mlp_out = 0 at the start.
Differs from the paper in: only this rule of Fixup; its rescaling of the other layers, its scalar biases and multipliers
    and the removal of the norms are left out. Norms stay.
Cost: none. In the first step only the two output matrices, the embedding, the final norm and the head get a gradient.
Acts: once, before the first step.
Off: leave `zero_init` out of the methods.
Numerics: starting values are drawn in fp32; nothing happens in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="zero_init",
    kind="model",
    title="Starts the output matrices of attention and MLP at zero, so that every block is the identity at first",
    citation="Zhang et al. 2019, Fixup, arXiv 1901.09321",
    formula="attn_out = mlp_out = 0 at the start",
    acts="once, before the first step",
    cost="none; the other matrices of the blocks get their first gradient in the second step",
    off="leave `zero_init` out of the methods",
    differs="only this rule of Fixup; its rescaling, its scalar biases and the removal of norms are left out",
)

_DEAD = "with a scalar of 0 and an output matrix of 0 neither ever gets a gradient, and the block stays dead"
EXCLUDES: Final[Mapping[str, str]] = {"rezero": _DEAD, "skip_init": _DEAD}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with the house part ``zero`` in the slot ``residual_init``."""
    return spec.claim("residual_init", Part("zero"), "zero_init")
