"""QK-norm: normalise queries and keys, so that attention logits cannot grow without bound.

Citation: Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", arXiv 2302.05442;
    for language models Wortsman et al. 2024, "Small-scale proxies for large-scale Transformer training
    instabilities", arXiv 2309.14322; Rybakov et al. 2024, arXiv 2410.16682. Over the whole width: OLMo 2 (Team OLMo
    2024, arXiv 2501.00656).
Formula: logits = <norm(q) · g_q, norm(k) · g_k> / sqrt(K), per head of width K, gains shared by the heads.
    With unit gains |logit| <= sqrt(K). With over = width the norm is over all heads of a position together, H K query
    values and G K key values, each with its own gain; then one head may be as long as sqrt(H K), and a logit as large
    as sqrt(H G K).
Differs from the paper in: the norm is the model's own (RMSNorm by default; the papers but OLMo 2's use LayerNorm).
Cost: 2 K parameters a block, (H + G) K with over = width; two small norms forward and backward. Over the width a
    tensor-parallel split of the heads would have to sum the squares over its ranks.
Acts: in every block, on each head's queries and keys, before RoPE (which keeps their length).
Off: leave `qk_norm` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError, nearest
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="qk_norm",
    kind="model",
    title="Normalises queries and keys, per head or over the whole width, so that attention logits cannot grow "
    "without bound",
    citation="Dehghani et al. 2023, arXiv 2302.05442; Wortsman et al. 2024, arXiv 2309.14322; over the width: OLMo 2, "
    "arXiv 2501.00656",
    formula="logits = <norm(q) g_q, norm(k) g_k> / sqrt(K)",
    acts="in every block, every step, on q and k before RoPE",
    cost="2 K parameters a block, (H + G) K over the width; two small norms forward and backward",
    off="leave `qk_norm` out of the methods",
    differs="uses the model's own norm (RMSNorm by default) where the papers but OLMo 2's use LayerNorm",
)

EXCLUDES: Final[Mapping[str, str]] = {}

OVER: Final = ("head", "width")


class QKNorm(nn.Module):
    """(q, k) -> both normalised.

    Args:
        place: of an attention branch.
        over: ``head``: over the head width, one gain for all query heads and one for all key heads; ``width``: over all
            heads of a position together.
    """

    def __init__(self, place: Place, over: str = "head") -> None:
        super().__init__()
        spec = place.spec
        self.whole = over == "width"
        self.q = make("norm", place, spec.head_dim * (spec.n_heads if self.whole else 1))
        self.k = make("norm", place, spec.head_dim * (spec.n_kv_heads if self.whole else 1))

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        if self.whole:
            return _over_width(self.q, q_BHTK), _over_width(self.k, k_BGTK)
        return self.q(q_BHTK), self.k(k_BGTK)


def _over_width(norm: nn.Module, x_BHTK: Tensor) -> Tensor:
    x_BTHK = x_BHTK.transpose(1, 2)
    out_BTD: Tensor = norm(x_BTHK.flatten(2))
    return out_BTD.view(x_BTHK.shape).transpose(1, 2)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"qk": {"qk_norm": QKNorm}}


def apply(spec: Spec, *, over: str = "head") -> Spec:
    """Return ``spec`` with QK-norm in the ``qk`` slot, over each ``head`` or over the whole ``width``.

    Raises:
        UserError: another word for ``over``.
    """
    if over not in OVER:
        raise UserError(f"qk_norm over is '{over}'{nearest(over, OVER)}; use one of {', '.join(OVER)}")
    return spec.claim("qk", Part.of("qk_norm", {"over": None if over == "head" else over}), "qk_norm")
