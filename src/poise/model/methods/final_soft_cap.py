"""Final soft cap: output logits go through a tanh, so that none can exceed a fixed size.

Citation: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size", arXiv 2408.00118 (c = 30).
Formula: z' = c tanh(z / c), z the output logits, c = 30. Cross-entropy, log Z, z-loss and `Decoder.logits` see z' only.
Differs from the paper in: nothing known.
Cost: no parameters; a tanh of each output logit forward, and its slope backward, chunk by chunk.
Acts: on the output logits, every step, before the softmax. With a cap of c over V tokens no probability exceeds
    1 / (1 + (V - 1) exp(-2 c)), and the gradient of a logit near the cap vanishes.
Off: leave `final_soft_cap` out of the methods. No finite cap is bit-equal to none.

Numerics: in bf16 the tanh is in fp32, on logits that come from a bf16 product.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="final_soft_cap",
    kind="model",
    title="Caps output logits smoothly with a tanh, so that none can exceed a fixed size",
    citation="Gemma Team 2024, arXiv 2408.00118",
    formula="z' = c tanh(z / c), c = 30",
    acts="on the output logits, every step, before the cross-entropy and the z-loss",
    cost="no parameters; a tanh of each output logit, chunk by chunk",
    off="leave `final_soft_cap` out of the methods",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class FinalSoftCap(nn.Module):
    """z -> c tanh(z / c), element by element."""

    def __init__(self, place: Place, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits_RV: Tensor) -> Tensor:
        return (logits_RV / self.cap).tanh() * self.cap


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"logits": {"final_soft_cap": FinalSoftCap}}


def apply(spec: Spec, *, cap: float = 30.0) -> Spec:
    """Return ``spec`` with output logits kept within ``cap`` of zero.

    Raises:
        UserError: a cap that is not above 0, or not finite.
    """
    if not 0 < cap < float("inf"):
        raise UserError(
            f"final_soft_cap cap is {cap}; give a finite number above 0, e.g. 30, or leave final_soft_cap out"
        )
    return spec.claim("logits", Part.of("final_soft_cap", {"cap": cap}), "final_soft_cap")
