"""OLMo 2's reordered norm: normalise the output of every branch instead of its input.

Citation: Team OLMo 2024, "2 OLMo 2 Furious", arXiv 2501.00656.
Formula: x <- x + norm(f(x)), f attention, then the MLP; a final norm before the head.
    The scale of the output matrices then changes nothing in the forward pass.
Differs from the paper in: nothing known for the placement alone. The model of the paper is `olmo2_norm` together with
    `qk_norm:over=width`, `z_loss:coefficient=1e-5` and a standard deviation of 0.02 for all matrices, without
    1 / sqrt(2 N) for the residual outputs (init `scale_residual = false`), and no weight decay on embeddings.
Cost: 2 D parameters a block; two norms: what Pre-LN costs.
Acts: in every block on the output of attention and MLP. Nothing normalises what a branch reads: its matrix products see
    the residual stream as large as it is.
Off: leave `olmo2_norm` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="olmo2_norm",
    kind="model",
    title="Normalises the output of every branch instead of its input (OLMo 2's reordered norm)",
    citation="Team OLMo 2024, arXiv 2501.00656",
    formula="x = x + norm(f(x))",
    acts="in every block, every step, on the output of attention and MLP",
    cost="2 D parameters a block; two norms, as many as the default model has",
    off="leave `olmo2_norm` out of the methods",
    differs="the placement alone; the paper's model is `olmo2_norm` with `qk_norm:over=width`, z-loss 1e-5, and all "
    "matrices started at 0.02 without 1 / sqrt(2 N)",
)

EXCLUDES: Final[Mapping[str, str]] = {
    "zero_init": "the output norm divides a branch by its own size: one that starts at 0 has a gradient "
    "1 / sqrt(norm_eps) times as large as without the norm, and full size as soon as it exceeds sqrt(norm_eps)",
}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with a norm behind each branch and none before it."""
    return spec.claim("branch_in", Part("none"), "olmo2_norm").claim("branch_out", Part("norm"), "olmo2_norm")
