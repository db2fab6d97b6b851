"""ReZero: a learnable scalar on every branch, zero at the start, and no norm before the branch.

Citation: Bachlechner et al. 2020, "ReZero is All You Need: Fast Convergence at Large Depth", arXiv 2003.04887.
Formula: x ← x + a · f(x), a a scalar of each branch, a = 0 at the start.
Differs from the paper in: the final norm before the output head stays.
Cost: one scalar and one multiplication of (B, T, D) a branch, less the norm. In the first step the branches get no
    gradient.
Acts: in every block, on what attention and MLP add to the stream; the norms before them are taken away. The same with
    norms is `skip_init`.
Off: leave `rezero` out of the methods.

Numerics: the scalar is fp32 and rounded to the compute dtype where it is used.
Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.methods.skip_init import ScalarAdd
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="rezero",
    kind="model",
    title="Multiplies every branch by a learnable scalar that starts at zero, in place of the norms",
    citation="Bachlechner et al. 2020, arXiv 2003.04887",
    formula="x + a f(x), a = 0 at the start",
    acts="in every block, every step, on what attention and MLP add; no norm before them",
    cost="one scalar and one multiplication a branch, less a norm; branches get no gradient in the first step",
    off="leave `rezero` out of the methods",
    differs="the final norm before the output head stays",
)

EXCLUDES: Final[Mapping[str, str]] = {}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"residual": {"rezero": ScalarAdd}}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with ReZero branches and without norms before them."""
    spec = spec.claim("branch_in", Part("none"), "rezero")
    return spec.claim("residual", Part("rezero"), "rezero")
