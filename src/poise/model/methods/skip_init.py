"""SkipInit: a learnable scalar on every branch, zero at the start.

Citation: De and Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
    Networks", arXiv 2002.10444.
Formula: x ← x + a · f(norm(x)), a a scalar of each branch, a = 0 at the start.
Differs from the paper in: norms stay (the paper replaces batch normalisation); so it is compared with Pre-LN by Sun et
    al. 2025 (arXiv 2502.05795, table 4), where it did worse than Pre-LN without it.
Cost: one scalar and one multiplication of (B, T, D) a branch. In the first step the branches get no gradient.
Acts: in every block, on what attention and MLP add to the stream.
Off: leave `skip_init` out of the methods, or init = 1 and frozen scalars.

Numerics: the scalar is fp32 and rounded to the compute dtype where it is used.
Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="skip_init",
    kind="model",
    title="Multiplies every branch by a learnable scalar that starts at zero; norms stay",
    citation="De and Smith 2020, arXiv 2002.10444",
    formula="x + a f(norm(x)), a = 0 at the start",
    acts="in every block, every step, on what attention and MLP add",
    cost="one scalar and one multiplication a branch; the branches get their first gradient in the second step",
    off="leave `skip_init` out of the methods",
    differs="norms stay; the paper replaces batch normalisation by it",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class ScalarAdd(nn.Module):
    """(stream, branch) -> stream + a · branch."""

    def __init__(self, place: Place, init: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))
        self.param_roles = {"scale": "gain"}
        self.param_fill = {"scale": init}

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        return x_BTD + branch_BTD * self.scale.to(branch_BTD.dtype)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"residual": {"skip_init": ScalarAdd}}


def apply(spec: Spec, *, init: float = 0.0) -> Spec:
    """Return ``spec`` with a scalar on every branch that starts at ``init``.

    Raises:
        UserError: a start that is not finite.
    """
    if not math.isfinite(init):
        raise UserError(f"skip_init init is {init}; give a finite number, e.g. 0")
    return spec.claim("residual", Part.of("skip_init", {"init": init}), "skip_init")
