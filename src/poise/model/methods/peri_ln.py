"""Peri-LN: normalise the input and the output of every branch, and the embedding.

Citation: Kim et al. 2025, "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
    arXiv 2502.02732 (ICML 2025).
Formula: x_0 = norm(E[ids]); x <- x + norm_out(f(norm_in(x))), f attention, then the MLP; a final norm before the head.
    With unit gains a branch adds mean square 1, so the stream's variance grows linearly with depth; the gradient of a
    branch's last matrix does not depend on the size of its hidden activations.
Differs from the paper in: the norm is the model's own (RMSNorm by default). The paper calls the norm of the embedding
    optional; here it is on unless embed = false.
Cost: two more norms and 2 D more parameters a block than Pre-LN, and one norm of the embedding.
Acts: in every block on both branches' input and output, and once after the embedding.
Off: leave `peri_ln` out of the methods.
Numerics: norms take their statistics in fp32 and round once, to the compute dtype.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.registry import Card
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="peri_ln",
    kind="model",
    title="Normalises input and output of every branch, and the embedding (Peri-LN): variance grows only linearly",
    citation="Kim et al. 2025, arXiv 2502.02732",
    formula="x_0 = norm(E[ids]); x = x + norm(f(norm(x)))",
    acts="in every block, every step, on input and output of attention and MLP; once after the embedding",
    cost="two more norms and 2 D more parameters a block than the default, and a norm of the embedding",
    off="leave `peri_ln` out of the methods",
    differs="uses the model's own norm; the embedding's norm, optional in the paper, is on unless embed = false",
)

EXCLUDES: Final[Mapping[str, str]] = {
    "zero_init": "the output norm divides a branch by its own size: one that starts at 0 has a gradient "
    "1 / sqrt(norm_eps) times as large as without the norm, and full size as soon as it exceeds sqrt(norm_eps)",
}

PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}


def apply(spec: Spec, *, embed: bool = True) -> Spec:
    """Return ``spec`` with norms around each branch and, where ``embed``, behind the embedding."""
    spec = spec.claim("branch_in", Part("norm"), "peri_ln").claim("branch_out", Part("norm"), "peri_ln")
    return spec.claim("embed_out", Part("embed_norm"), "peri_ln") if embed else spec
