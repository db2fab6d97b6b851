"""depth-muP: weigh residual branches with 1 / sqrt(depth), so that a deep model learns as the shallow one did.

Citation: Yang, Yu, Zhu and Hayou 2023, "Tensor Programs VI: Feature Learning in Infinite-Depth Neural Networks",
    arXiv 2310.02244.
Formula: with L = N / base_depth, for Adam:
    x ← x + f(x) / sqrt(L)
    learning rate / sqrt(L) for everything in the blocks
    residual outputs start as the base's do: at 1 / sqrt(2 · base_depth) instead of 1 / sqrt(2 N)
Differs from the paper in: the factors are our interpretation (we have not checked the paper's table); the paper
    justifies them only for branches of one layer, and finds limitations for transformers. The final norm has the
    role of the block norms, so it gets their learning rate although it stands behind all branches.
Cost: one multiplication of (B, T, D) a branch.
Acts: in every residual connection, at the start, and in the learning rates (`Decoder.lr_multipliers`). Weight decay
    times learning rate stays what it was.
Off: leave `depth_mup` out of the methods, or base_depth = N.
Numerics: the factor is a Python number; in bf16 the product is rounded once.

With `mup` both factors multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="depth_mup",
    kind="model",
    title="Depth-independent training: residual branches and their learning rates divided by sqrt of the depth",
    citation="Yang et al. 2023, Tensor Programs VI, arXiv 2310.02244",
    formula="x <- x + f(x) / sqrt(L); block lr / sqrt(L); L = N / base_depth",
    acts="in every residual connection, at the start of residual outputs, and in the learning rates by role",
    cost="one multiplication of (B, T, D) a branch",
    off="leave `depth_mup` out of the methods, or base_depth = N",
    differs="our interpretation of the factors; justified by the paper for one-layer branches only",
)

_TWICE = "depth-muP divides branches by sqrt(depth) already, and a start at 1 / sqrt(2 N) would do it a second time"
EXCLUDES: Final[Mapping[str, str]] = {"scaled_init": _TWICE, "small_init": _TWICE}

CHANGES_LR: Final = (
    "the learning rate is that of a model of base_depth blocks; everything in the blocks gets 1 / sqrt(N / base_depth) "
    "of it"
)

OUTSIDE: Final = ("embedding", "head")
"""Roles outside the blocks."""


class ScaledAdd(nn.Module):
    """(stream, branch) -> stream + branch / sqrt(L)."""

    def __init__(self, place: Place, base_depth: int) -> None:
        super().__init__()
        self.factor = math.sqrt(base_depth / place.spec.n_layers)

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        return x_BTD + branch_BTD * self.factor


class DepthRates:
    """Adam's learning rates: 1 / sqrt(L) inside the blocks."""

    fixed_decay = True

    def __init__(self, place: Place, base_depth: int) -> None:
        self._block = math.sqrt(base_depth / place.spec.n_layers)

    def of(self, role: str) -> float:
        return 1.0 if role in OUTSIDE else self._block


def residual_init(place: Place, base_depth: int) -> float:
    """1 / sqrt(2 · base_depth): what the base's residual outputs start with."""
    return 1 / math.sqrt(2 * base_depth)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "residual": {"depth_mup": ScaledAdd},
    "residual_init": {"depth_mup": residual_init},
    "lr_scales": {"depth_mup": DepthRates},
}


def apply(spec: Spec, *, base_depth: int = 8) -> Spec:
    """Return ``spec`` in depth-muP relative to a model of ``base_depth`` blocks.

    Raises:
        UserError: a depth below 1.
        Conflict: another method has the residual connection or the start of residual outputs.
    """
    if base_depth < 1:
        raise UserError(f"depth_mup base_depth is {base_depth}; give the number of blocks that was tuned, e.g. 4")
    part = Part.of("depth_mup", {"base_depth": base_depth})
    plain = dict(spec.init.fields).get("scale_residual") is False
    spec = spec.claim("residual_init", Part("plain") if plain else part, "depth_mup")
    return spec.claim("residual", part, "depth_mup").claim("lr_scales", part, "depth_mup")
