"""QK-FC-norm: QK-norm, and a norm on the outputs of attention and MLP.

Citation: Rybakov et al. 2024, "Methods of improving LLM training stability", arXiv 2410.16682.
Formula: q, k <- norm(q), norm(k) per head; x <- x + norm_out(f(norm_in(x))), f attention, then the MLP: norms on the
    outputs of the matrices Proj and FC2, none on FC1's.
Differs from the paper in: our interpretation: QK-norm is per head, gains shared by the heads (the paper does not
    say). The norm is the model's own (RMSNorm by default; the paper uses LayerNorm).
Cost: 2 K + 2 D parameters a block on top of Pre-LN's; two more norms and two small ones a block.
Acts: in every block: on q and k before RoPE, and on the output of attention and MLP. The norms before the branches
    stay. Reported not to raise the highest stable learning rate above QK-norm's.
Off: leave `qk_fc_norm` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="qk_fc_norm",
    kind="model",
    title="QK-norm, and norms on the outputs of attention and MLP",
    citation="Rybakov et al. 2024, arXiv 2410.16682",
    formula="q, k = norm(q), norm(k); x = x + norm(f(norm(x)))",
    acts="in every block, every step: on q and k before RoPE, and on the output of attention and MLP",
    cost="2 K + 2 D parameters, two norms and two small ones a block more than the default",
    off="leave `qk_fc_norm` out of the methods",
    differs="our interpretation: QK-norm per head, gains shared by the heads (the paper does not say); the model's own "
    "norm",
)

EXCLUDES: Final[Mapping[str, str]] = {
    "zero_init": "the output norm divides a branch by its own size: one that starts at 0 has a gradient "
    "1 / sqrt(norm_eps) times as large as without the norm, and full size as soon as it exceeds sqrt(norm_eps)",
}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec) -> Spec:
    """Return ``spec`` with QK-norm and a norm behind each branch."""
    return spec.claim("qk", Part("qk_norm"), "qk_fc_norm").claim("branch_out", Part("norm"), "qk_fc_norm")
