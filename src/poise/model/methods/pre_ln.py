"""Pre-LN: normalise the input of every branch; the residual stream itself is never normalised but at the end.

Citation: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", arXiv 2002.04745.
Formula: x <- x + f(norm(x)), f attention, then the MLP; a final norm before the head.
Differs from the paper in: the norm is the model's own (RMSNorm by default; the paper uses LayerNorm).
Cost: 2 D parameters a block; two norms.
Acts: in every block, on the input of attention and MLP. It is what the decoder does by itself: naming it makes the
    choice explicit, and a second placement method in the same recipe a Conflict.
Off: leave `pre_ln` out of the methods; with branch_in = none in the spec the block has no norm.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="pre_ln",
    kind="model",
    title="Normalises the input of every branch (Pre-LN): the decoder's default placement, made explicit",
    citation="Xiong et al. 2020, arXiv 2002.04745",
    formula="x = x + f(norm(x))",
    acts="in every block, every step, on the input of attention and MLP; the same as a model without methods",
    cost="2 D parameters a block; two norms, which the default model has too",
    off="leave `pre_ln` out of the methods",
    differs="uses the model's own norm (RMSNorm by default) where the paper uses LayerNorm",
)

EXCLUDES: Final[Mapping[str, str]] = {}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with the model's norm in the ``branch_in`` slot."""
    return spec.claim("branch_in", Part("norm"), "pre_ln")
