"""Soft clip: attention probabilities are stretched and clipped, so that a head can give exactly nothing or all.

Citation: Bondarenko, Nagel and Blankevoort 2023, "Quantizable Transformers: Removing Outliers by Helping Attention
    Heads Do Nothing", arXiv 2306.12929 (clipped softmax); for stability Rybakov et al. 2024, arXiv 2410.16682.
Formula: w = clip((zeta - gamma) softmax(z) + gamma, 0, 1), zeta = 1.03, gamma = -0.03.
    w = 0 for p <= 0.0283 and w = 1 for p >= 0.9717, without gradient there; rows no longer sum to 1.
Differs from the paper in: the values are those of Rybakov et al.; that they mean this formula is our interpretation. In
    a row of many keys most p are below 0.0283 and weigh nothing: with long sequences a gamma nearer to 0 is gentler.
Cost: no parameters. No fused kernel can change probabilities: blocks of scores on every device, with their own
    backward, which computes them again.
Acts: in every block, every step, on the attention probabilities.
Off: leave `soft_clip` out of the methods; zeta = 1, gamma = 0 is the same up to rounding.

Numerics: in bf16 the logits, the softmax and the clip are in fp32.

Shapes: B batch, T positions, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.blockwise import Maps
from poise.model.documents import Documents
from poise.model.flex import changed_attention
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="soft_clip",
    kind="model",
    title="Stretches and clips attention probabilities, so that a head can give exactly nothing or all",
    citation="Bondarenko et al. 2023, arXiv 2306.12929; Rybakov et al. 2024, arXiv 2410.16682",
    formula="w = clip((zeta - gamma) softmax(z) + gamma, 0, 1), zeta = 1.03, gamma = -0.03",
    acts="in every block, every step, on the attention probabilities",
    cost="no parameters; no fused kernel on any device: blocks of scores, computed again in the backward pass",
    off="leave `soft_clip` out of the methods; zeta = 1, gamma = 0 is the same up to rounding",
    differs="that the values of Rybakov et al. mean this formula is our interpretation",
)

EXCLUDES: Final[Mapping[str, str]] = {}

KERNEL: Final = "blocks of scores on every device: no fused kernel can change probabilities"


class SoftClip(nn.Module):
    """Causal ``clip((zeta − gamma) softmax(scale q kᵀ) + gamma, 0, 1) v``."""

    def __init__(self, place: Place, scale: float, zeta: float, gamma: float) -> None:
        super().__init__()
        self.maps = Maps(scale, zeta=zeta, gamma=gamma)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents | None = None) -> Tensor:
        first_BT = None if documents is None else documents.first
        return changed_attention(q_BHTK, k_BGTK, v_BGTK, self.maps, first_BT=first_BT)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"scores": {"soft_clip": SoftClip}}


def apply(spec: Spec, *, zeta: float = 1.03, gamma: float = -0.03) -> Spec:
    """Return ``spec`` with attention probabilities stretched to [``gamma``, ``zeta``] and clipped to [0, 1].

    Raises:
        UserError: an interval that does not hold [0, 1].
    """
    if not 1 <= zeta < float("inf"):
        raise UserError(f"soft_clip zeta is {zeta}; give a finite number of at least 1, e.g. 1.03")
    if not float("-inf") < gamma <= 0:
        raise UserError(f"soft_clip gamma is {gamma}; give a finite number of at most 0, e.g. -0.03")
    return spec.claim("scores", Part.of("soft_clip", {"zeta": zeta, "gamma": gamma}), "soft_clip")
