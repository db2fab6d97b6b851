"""LayerScale: a small learnable gain for every channel of a branch.

Citation: Touvron et al. 2021, "Going deeper with Image Transformers", arXiv 2103.17239; for language models Rybakov et
    al. 2024, arXiv 2410.16682.
Formula: x ← x + λ ⊙ f(norm(x)), λ (D) of each branch; λ = 0.1 at the start up to 18 blocks, 1e-5 up to 24, 1e-6 beyond.
Differs from the paper in: the starts are our interpretation, unverified: constants of vision models, read in a summary;
    between 18 and 24 blocks nothing is said there and 1e-5 is taken. Rybakov et al. do not report theirs.
Cost: 2 D parameters a block; one multiplication of (B, T, D) a branch.
Acts: in every block, on what attention and MLP add to the stream.
Off: leave `layer_scale` out of the methods.

Numerics: the gains are fp32 and rounded to the compute dtype where they are used.
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
    name="layer_scale",
    kind="model",
    title="Multiplies every branch by small learnable gains, one a channel",
    citation="Touvron et al. 2021, CaiT, arXiv 2103.17239; Rybakov et al. 2024, arXiv 2410.16682",
    formula="x + lambda * f(norm(x)); lambda = 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond",
    acts="in every block, every step, on what attention and MLP add",
    cost="2 D parameters a block; one multiplication a branch",
    off="leave `layer_scale` out of the methods",
    differs="starts are our interpretation, unverified: constants of vision models, from a summary",
)

EXCLUDES: Final[Mapping[str, str]] = {}


def start_of(n_layers: int) -> float:
    """Return the start of the gains for a model of so many blocks: our interpretation, unverified.

    >>> start_of(12), start_of(24), start_of(48)
    (0.1, 1e-05, 1e-06)
    """
    if n_layers <= 18:
        return 0.1
    return 1e-5 if n_layers <= 24 else 1e-6


class GainAdd(nn.Module):
    """(stream, branch) -> stream + λ ⊙ branch."""

    def __init__(self, place: Place, init: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(place.spec.d_model))
        self.param_roles = {"weight": "gain"}
        self.param_fill = {"weight": start_of(place.spec.n_layers) if init is None else init}

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        return x_BTD + branch_BTD * self.weight.to(branch_BTD.dtype)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"residual": {"layer_scale": GainAdd}}


def apply(spec: Spec, *, init: float | None = None) -> Spec:
    """Return ``spec`` with gains on every branch that start at ``init``, by default as the depth asks.

    Raises:
        UserError: a start that is 0 or not finite.
    """
    if init is not None and (init == 0 or not math.isfinite(init)):
        raise UserError(
            f"layer_scale init is {init}; give a finite number other than 0, e.g. 0.1, or use skip_init, which starts "
            "at 0"
        )
    return spec.claim("residual", Part.of("layer_scale", {"init": init}), "layer_scale")
