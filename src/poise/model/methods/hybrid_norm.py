"""HybridNorm: normalise queries, keys and values inside attention, and the residual stream before the MLP.

Citation: Zhuo et al. 2025, "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid Normalization",
    arXiv 2503.04598.
Formula: y = x + attention(norm(q), norm(k), norm(v)), per head, no norm before; x <- norm(y) + MLP(norm(y)): the
    norm is on the residual path too. A final norm before the head.
    star = true (HybridNorm*): in block 1 both branches also are Pre-LN: y = x + attention(.. of norm(x)),
    x <- y + MLP(norm(y)), the norms of q, k, v stay.
Differs from the paper in: the norm is the model's own; the initialisation is a slot of its own (the authors'
    configuration starts at a deviation of sqrt(2 / (5 D)): see `small_init`).
Cost: 3 K + D parameters a block in place of 2 D; three small norms in place of a large one.
Acts: in every block: on q and k before RoPE, on v, and on the stream after attention's addition.
Off: leave `hybrid_norm` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from poise.core.registry import Card
from poise.model.layers import Add, Same
from poise.model.methods.post_ln import PostNorm
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="hybrid_norm",
    kind="model",
    title="Norms on queries, keys and values, and on the residual stream before the MLP (HybridNorm, HybridNorm*)",
    citation="Zhuo et al. 2025, arXiv 2503.04598",
    formula="y = x + attention(norm(q), norm(k), norm(v)); x = norm(y) + MLP(norm(y))",
    acts="in every block, every step; with star = true the first block's branches are Pre-LN",
    cost="3 K + D parameters a block in place of 2 D; three small norms in place of a large one",
    off="leave `hybrid_norm` out of the methods",
    differs="uses the model's own norm; the paper's initialisation is a method of its own (`small_init`)",
)

EXCLUDES: Final[Mapping[str, str]] = {}


def _is_pre(place: Place, star: bool) -> bool:
    return star and place.layer == 1


def branch_in(place: Place, star: bool = False) -> nn.Module:
    """Nothing: what the MLP reads was normalised on the stream. In a starred model's first block the model's norm."""
    module: nn.Module = make("norm", place, place.spec.d_model) if _is_pre(place, star) else Same(place)
    return module


def residual(place: Place, star: bool = False) -> nn.Module:
    """The normalised sum after attention, the plain sum after the MLP; in a starred model's first block plain sums."""
    return PostNorm(place) if place.branch == "attn" and not _is_pre(place, star) else Add(place)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "branch_in": {"hybrid_norm": branch_in},
    "residual": {"hybrid_norm": residual},
}


def apply(spec: Spec, *, star: bool = False) -> Spec:
    """Return ``spec`` with HybridNorm, or HybridNorm* where ``star``."""
    part = Part.of("hybrid_norm", {"star": star or None})
    spec = spec.claim("qk", Part("qk_norm"), "hybrid_norm").claim("values", Part("qkv_norm"), "hybrid_norm")
    return spec.claim("branch_in", part, "hybrid_norm").claim("residual", part, "hybrid_norm")
