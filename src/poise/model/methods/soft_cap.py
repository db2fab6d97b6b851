"""Soft cap: attention logits go through a tanh, so that none can exceed a fixed size.

Citation: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size", arXiv 2408.00118; as a method
    for stability Rybakov et al. 2024, arXiv 2410.16682. The tanh of logits: Bello et al. 2016, arXiv 1611.09940.
Formula: p = softmax(c tanh(z / c)), z = q kᵀ scale, c = 50. The slope is 1 - tanh²(z / c): 0.96 at z = 10, 0.42 at 50,
    0.07 at 100. The cap comes before the mask, which it would make finite.
Differs from the paper in: nothing known.
Cost: no parameters. Torch's fused attention has no cap: on a GPU flex_attention, on a CPU blocks of scores with their
    own backward, which computes them again (`benchmarks/attention_paths.py`).
Acts: in every block, every step, on the attention logits.
Off: leave `soft_cap` out of the methods. No finite cap is bit-equal to none.

With QK-norm and unit gains |z| <= sqrt(K), and a cap of 50 does next to nothing until the gains have grown.
Numerics: in bf16 the logits, their tanh and the softmax are in fp32.

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
    name="soft_cap",
    kind="model",
    title="Caps attention logits smoothly with a tanh, so that none can exceed a fixed size",
    citation="Gemma Team 2024, arXiv 2408.00118; Rybakov et al. 2024, arXiv 2410.16682",
    formula="p = softmax(c tanh(z / c)), c = 50",
    acts="in every block, every step, on the scaled attention logits before the mask",
    cost="no parameters; attention leaves torch's fused kernel: flex_attention on a GPU, blocks of scores on a CPU",
    off="leave `soft_cap` out of the methods",
)

EXCLUDES: Final[Mapping[str, str]] = {}

KERNEL: Final = "flex_attention on a GPU (a score_mod); on a CPU blocks of scores, computed again in the backward pass"


class SoftCap(nn.Module):
    """Causal ``softmax(c tanh(scale q kᵀ / c)) v``."""

    def __init__(self, place: Place, scale: float, cap: float) -> None:
        super().__init__()
        self.maps = Maps(scale, cap=cap)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents | None = None) -> Tensor:
        first_BT = None if documents is None else documents.first
        return changed_attention(q_BHTK, k_BGTK, v_BGTK, self.maps, first_BT=first_BT)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"scores": {"soft_cap": SoftCap}}


def apply(spec: Spec, *, cap: float = 50.0) -> Spec:
    """Return ``spec`` with attention logits kept within ``cap`` of zero.

    Raises:
        UserError: a cap that is not above 0, or not finite.
    """
    if not 0 < cap < float("inf"):
        raise UserError(f"soft_cap cap is {cap}; give a finite number above 0, e.g. 50, or leave soft_cap out")
    return spec.claim("scores", Part.of("soft_cap", {"cap": cap}), "soft_cap")
