"""Sandwich-LN: normalise the input and the output of every branch.

Citation: Ding et al. 2021, "CogView: Mastering Text-to-Image Generation via Transformers", arXiv 2105.13290.
Formula: x <- x + norm_out(f(norm_in(x))), f attention, then the MLP; a final norm before the head.
Differs from the paper in: our interpretation: the block equation is that of Peri-LN without the norm of the
    embedding; details of the paper were not checked. The paper's PB-relax of the attention logits, for fp16, is not
    part of it. The norm is the model's own (RMSNorm by default; the paper uses LayerNorm).
Cost: 2 D parameters a block on top of Pre-LN's; two more norms a block.
Acts: in every block on both branches' input and output.
Off: leave `sandwich_ln` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="sandwich_ln",
    kind="model",
    title="Normalises input and output of every branch (Sandwich-LN)",
    citation="Ding et al. 2021, CogView, arXiv 2105.13290",
    formula="x = x + norm(f(norm(x)))",
    acts="in every block, every step, on input and output of attention and MLP",
    cost="two more norms and 2 D more parameters a block than the default",
    off="leave `sandwich_ln` out of the methods",
    differs="our interpretation: Peri-LN's block without the embedding's norm; the paper's PB-relax is not part of it",
)

EXCLUDES: Final[Mapping[str, str]] = {
    "zero_init": "the output norm divides a branch by its own size: one that starts at 0 has a gradient "
    "1 / sqrt(norm_eps) times as large as without the norm, and full size as soon as it exceeds sqrt(norm_eps)",
}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with norms around each branch."""
    return spec.claim("branch_in", Part("norm"), "sandwich_ln").claim("branch_out", Part("norm"), "sandwich_ln")
