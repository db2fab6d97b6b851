"""QK-norm: normalise queries and keys, so that attention logits cannot grow without bound.

Citation: Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", arXiv 2302.05442;
    for language models Wortsman et al. 2024, "Small-scale proxies for large-scale Transformer training
    instabilities", arXiv 2309.14322; Rybakov et al. 2024, arXiv 2410.16682.
Formula: logits = <norm(q) · g_q, norm(k) · g_k> / sqrt(K), per head of width K, gains shared by the heads.
    With unit gains |logit| <= sqrt(K).
Differs from the paper in: the norm is the model's own (RMSNorm by default; the papers use LayerNorm).
Cost: 2 K parameters a block; two small norms forward and backward.
Acts: in every block, on each head's queries and keys, before RoPE (which keeps their length).
Off: leave `qk_norm` out of the methods.

Shapes: B batch, T positions, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.registry import Card
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="qk_norm",
    kind="model",
    title="Normalises queries and keys per head, so that attention logits cannot grow without bound",
    citation="Dehghani et al. 2023, arXiv 2302.05442; Wortsman et al. 2024, arXiv 2309.14322",
    formula="logits = <norm(q) g_q, norm(k) g_k> / sqrt(K)",
    acts="in every block, every step, on q and k before RoPE",
    cost="2 K parameters a block; two small norms forward and backward",
    off="leave `qk_norm` out of the methods",
    differs="uses the model's own norm (RMSNorm by default) where the papers use LayerNorm",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class QKNorm(nn.Module):
    """(q, k) -> both normalised over the head width; one gain for all query heads, one for all keys."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.q = make("norm", place, place.spec.head_dim)
        self.k = make("norm", place, place.spec.head_dim)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(q_BHTK), self.k(k_BGTK)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"qk": {"qk_norm": QKNorm}}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with QK-norm in the ``qk`` slot."""
    return spec.claim("qk", Part("qk_norm"), "qk_norm")
