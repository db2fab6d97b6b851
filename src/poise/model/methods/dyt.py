"""DyT (dynamic tanh): a learned tanh in place of every norm; no statistics.

Citation: Zhu et al. 2025, "Transformers without Normalization", arXiv 2503.10622; reference code jiachenzhu/DyT.
Formula: y = w ⊙ tanh(α x), α a trained scalar per place, w as a norm's gain; no bias, as in the paper's LLaMA.
    α at the start (attention / MLP / final), by width D:
    D >= 8192: 0.2 / 0.05 / 0.05;  D >= 5120: 0.6 / 0.15 / 0.15;  D >= 4096: 0.8 / 0.2 / 0.2;
    D >= 2048: 1.0 / 0.5 / 0.5;  below: 1.0 / 1.0 / 1.0
Differs from the paper in: the paper's table goes by model (34B and 70B, 13B, 7B: the first three lines); which width
    stands for which model, and the two lines for smaller widths, are our interpretation. The paper's language models
    also scale the embedding; apply `embed_scale` for that.
Cost: one tanh an element in place of a norm.
Acts: wherever the model has a norm, with the fields of its place.
Off: leave `dyt` out of the methods.

Not a stability method: it has been reported to need smaller learning rates than norms do. It is here to be compared.
Numerics: tanh is computed in at least fp32.
Shapes: ... any, D last dimension.
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
    name="dyt",
    kind="model",
    title="A learned tanh in place of every norm (dynamic tanh); not a stability method, here to be compared",
    citation="Zhu et al. 2025, Transformers without Normalization, arXiv 2503.10622",
    formula="y = w tanh(alpha x)",
    acts="wherever the model has a norm",
    cost="one tanh an element in place of a norm",
    off="leave `dyt` out of the methods",
    differs="starts of alpha for widths below 4096 are our interpretation; scaling of the embedding is `embed_scale`",
)

_LENGTH = "it bounds attention logits by the length of normalised queries and keys, and a tanh does not fix a length"
EXCLUDES: Final[Mapping[str, str]] = dict.fromkeys(("qk_norm", "qkv_norm", "qk_fc_norm", "hybrid_norm"), _LENGTH)

STARTS: Final = (
    (8192, {"attn": 0.2, "mlp": 0.05, "": 0.05}),
    (5120, {"attn": 0.6, "mlp": 0.15, "": 0.15}),
    (4096, {"attn": 0.8, "mlp": 0.2, "": 0.2}),
    (2048, {"attn": 1.0, "mlp": 0.5, "": 0.5}),
    (0, {"attn": 1.0, "mlp": 1.0, "": 1.0}),
)
"""From which width on -> α at the start by branch; the empty branch is outside the blocks."""


class DyT(nn.Module):
    """x -> w ⊙ tanh(α x)."""

    def __init__(
        self,
        place: Place,
        dim: int,
        attn: float | None = None,
        mlp: float | None = None,
        final: float | None = None,
    ) -> None:
        super().__init__()
        given = {"attn": attn, "mlp": mlp, "": final}[place.branch]
        table = next(starts for width, starts in STARTS if place.spec.d_model >= width)
        self.weight = nn.Parameter(torch.empty(dim))
        self.alpha = nn.Parameter(torch.empty(1))  # FSDP2 shards no parameter without a dimension
        self.param_roles = {"weight": "norm", "alpha": "gain"}
        self.param_fill = {"weight": 1.0, "alpha": table[place.branch] if given is None else given}

    def forward(self, x_D: Tensor) -> Tensor:
        wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
        return (torch.tanh(wide_D * self.alpha) * self.weight).to(x_D.dtype)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"norm": {"dyt": DyT}}


def apply(spec: Spec, *, attn: float | None = None, mlp: float | None = None, final: float | None = None) -> Spec:
    """Return ``spec`` with dynamic tanh for its norms.

    Args:
        spec: the model.
        attn: α at the start in attention branches; by the table unless given.
        mlp: in MLP branches.
        final: outside the blocks: the final norm, and one on the embedding if there is any.

    Raises:
        UserError: an α that is not above 0.
        Conflict: another method has the norm.
    """
    fields = {"attn": attn, "mlp": mlp, "final": final}
    for name, value in fields.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"dyt {name} is {value}; give a finite number above 0, or leave it out for the table")
    return spec.claim("norm", Part.of("dyt", fields), "dyt")
