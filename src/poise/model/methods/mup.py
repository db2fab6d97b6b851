"""muP: start, scale and train a wide model so that it learns as the narrow one did whose learning rate was tuned.

Citation: Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    arXiv 2203.03466 (table 8, the form with a multiplier on the output); reference code microsoft/mup.
Formula: with m = D / base_width, for Adam:
    hidden matrices  std = (the base's std) / sqrt(m), learning rate / m
    embedding, head  std and learning rate of the base; output logits = (head · h) / m
    gains            learning rate of the base
    attention logits = sqrt(K_base) / K · q·k, which is the usual 1 / sqrt(K) at K = K_base
Differs from the paper in: the scale of attention logits is relative, so that the base model is bit for bit the plain
    one; K_base is this model's own head width unless `base_head_dim` is given, because most families of models grow
    in the number of heads. MLP width is taken to grow with D. The paper recommends to start the head and the query
    matrix at zero; here both start as the base's do.
Cost: one multiplication of (B, T, D) before the head.
Acts: at the start, in the attention scale, before the head, and in the learning rates (`Decoder.lr_multipliers`),
    which whoever builds the optimizer has to apply. Weight decay times learning rate stays what it was (as MuAdamW).
Off: leave `mup` out of the methods, or base_width = D.
Numerics: multipliers are Python numbers; in bf16 the hidden states before the head are rounded once.

The deviations of the base model are those of the initialisation that the spec has when the method is applied
(`default`, or `small` at the base's width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.init import DefaultInit
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="mup",
    kind="model",
    title="Width-independent training (muP): a learning rate tuned on a narrow model holds for a wide one",
    citation="Yang et al. 2022, Tensor Programs V, arXiv 2203.03466",
    formula="hidden: std / sqrt(m), lr / m; logits / m; attention scale sqrt(K_base) / K; m = D / base_width",
    acts="at the start, in attention's scale, before the head, and in the learning rates by role",
    cost="one multiplication of (B, T, D) before the head",
    off="leave `mup` out of the methods, or base_width = D",
    differs="attention scale relative to the base's, so that the base model is the plain one; no zero start of head "
    "and queries",
)

EXCLUDES: Final[Mapping[str, str]] = {
    "small_init": "muP sets the deviations by width itself; start from the init `small` instead and apply mup",
    "embed_scale": "muP keeps the size of the embedding's output, and sqrt(D) grows with the width: the coordinate "
    "check fails",
}

CHANGES_LR: Final = (
    "the learning rate is that of a model of base_width; hidden matrices get 1 / m of it, so equal numbers mean "
    "equal steps only at the base width"
)

KEEP: Final = ("embedding", "head", "norm", "gain", "bias")
"""Roles whose start and learning rate do not depend on the width; every other role is a hidden matrix."""


class MupInit(DefaultInit):
    """The base's deviations; hidden matrices divided by sqrt(m)."""

    def __init__(
        self,
        place: Place,
        base_width: int,
        std: float = 0.02,
        embedding_std: float = 0.02,
        scale_residual: bool = True,
    ) -> None:
        super().__init__(place, std, embedding_std, scale_residual)
        self._narrow = math.sqrt(base_width / place.spec.d_model)

    def std(self, role: str) -> float:
        return super().std(role) * (1.0 if role in KEEP else self._narrow)


def attn_scale(place: Place, base_head_dim: int | None = None) -> float:
    """sqrt(K_base) / K, written so that K_base = K gives the same bits as 1 / sqrt(K)."""
    K = place.spec.head_dim
    return float(K**-0.5 * ((K if base_head_dim is None else base_head_dim) / K) ** 0.5)


class DividedHidden(nn.Module):
    """h -> h / m."""

    def __init__(self, place: Place, base_width: int) -> None:
        super().__init__()
        self.factor = base_width / place.spec.d_model

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.factor


class MupRates:
    """Adam's learning rates: 1 / m for hidden matrices, 1 for the rest (the head's logits are divided)."""

    fixed_decay = True

    def __init__(self, place: Place, base_width: int) -> None:
        self._hidden = base_width / place.spec.d_model

    def of(self, role: str) -> float:
        return 1.0 if role in KEEP else self._hidden


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "init": {"mup": MupInit},
    "attn_scale": {"mup": attn_scale},
    "head_in": {"mup": DividedHidden},
    "lr_scales": {"mup": MupRates},
}


def apply(spec: Spec, *, base_width: int = 256, base_head_dim: int | None = None) -> Spec:
    """Return ``spec`` in muP relative to a model of width ``base_width``.

    Args:
        spec: a model with the initialisation `default` or `small`.
        base_width: width of the model whose learning rate was tuned.
        base_head_dim: its head width, if it is not this model's.

    Raises:
        UserError: a size below 1.
        Conflict: another method has the initialisation, the attention scale or the place before the head.
    """
    for name, value in (("base_width", base_width), ("base_head_dim", base_head_dim)):
        if value is not None and value < 1:
            raise UserError(f"mup {name} is {value}; give the size of the model that was tuned, e.g. 64")
    base = _base_init(spec, base_width)
    spec = spec.claim("init", Part.of("mup", {"base_width": base_width, **base}), "mup")
    spec = spec.claim("attn_scale", Part.of("mup", {"base_head_dim": base_head_dim}), "mup")
    spec = spec.claim("head_in", Part.of("mup", {"base_width": base_width}), "mup")
    return spec.claim("lr_scales", Part.of("mup", {"base_width": base_width}), "mup")


def _base_init(spec: Spec, base_width: int) -> dict[str, Any]:
    """Return the fields by which the base model starts, from the initialisation that the spec has."""
    if spec.init.name == "default":
        return dict(spec.init.fields)
    std = math.sqrt(2 / (5 * base_width))  # `small`; where a method has the slot, the claim will say so
    return {"std": std, "embedding_std": std}
