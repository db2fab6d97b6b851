"""Mix-LN: Post-LN in the first blocks, Pre-LN in the rest, to even out the blocks' gradients.

Citation: Li et al. 2024, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN",
    arXiv 2412.13795 (ICLR 2025).
Formula: blocks 1 .. floor(a N): x <- norm(x + f(x)); the others: x <- x + f(norm(x)); f attention, then the MLP; a
    final norm before the head. a = 0.25.
Differs from the paper in: a share above 0 is at least one block, so that the method acts in models of fewer than 1 / a
    blocks too. The embedding starts with the model's own deviation (0.02); the paper's code starts it at
    sqrt(2 / 5) = 0.632, which `embed_std` gives. The norm is the model's own.
Cost: none: as many norms and parameters as Pre-LN.
Acts: in every block. The Post-LN blocks are the fragile part: a later paper (arXiv 2502.05795) reports divergence at
    350M and 1B parameters.
Off: leave `mix_ln` out of the methods, or a = 0 (all blocks Pre-LN).
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.layers import Add, Same
from poise.model.methods.post_ln import PostNorm
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="mix_ln",
    kind="model",
    title="Post-LN in the first quarter of the blocks, Pre-LN in the rest (Mix-LN), to even out gradients",
    citation="Li et al. 2024, arXiv 2412.13795",
    formula="blocks 1 .. floor(a N): x = norm(x + f(x)); others: x = x + f(norm(x))",
    acts="in every block, every step",
    cost="none: as many norms and parameters as the default model",
    off="leave `mix_ln` out of the methods, or a = 0",
    differs="a share above 0 is at least one block; the embedding starts with the model's own deviation, in the "
    "paper's code at sqrt(2 / 5); the model's own norm",
)

EXCLUDES: Final[Mapping[str, str]] = {}


def post_blocks(n_layers: int, a: float) -> int:
    """Return the number of Post-LN blocks: floor(a N), and where ``a`` is above 0 at least 1.

    A product that rounding left just below a whole number counts as that number.

    >>> [post_blocks(n, 0.25) for n in (6, 12, 24)], post_blocks(100, 0.29), post_blocks(2, 0.25), post_blocks(2, 0.0)
    ([1, 3, 6], 29, 1, 0)
    """
    return max(math.floor(a * n_layers + 1e-9), 1 if a > 0 else 0)


def _is_post(place: Place, a: float) -> bool:
    return place.layer <= post_blocks(place.spec.n_layers, a)


def branch_in(place: Place, a: float) -> nn.Module:
    """The norm of a Pre-LN block, nothing in a Post-LN block."""
    module: nn.Module = Same(place) if _is_post(place, a) else make("norm", place, place.spec.d_model)
    return module


def residual(place: Place, a: float) -> nn.Module:
    """The normalised sum of a Post-LN block, the plain sum of a Pre-LN block."""
    return PostNorm(place) if _is_post(place, a) else Add(place)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "branch_in": {"mix_ln": branch_in},
    "residual": {"mix_ln": residual},
}


def apply(spec: Spec, *, a: float = 0.25) -> Spec:
    """Return ``spec`` with Post-LN in the first ``a`` of the blocks and Pre-LN in the rest.

    Raises:
        UserError: a share outside 0 .. 1.
    """
    if not 0 <= a <= 1:
        raise UserError(f"mix_ln a is {a}; give a share of the blocks from 0 to 1, e.g. 0.25")
    part = Part.of("mix_ln", {"a": a})
    return spec.claim("branch_in", part, "mix_ln").claim("residual", part, "mix_ln")
