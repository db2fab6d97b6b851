"""Gated attention: multiply what attention computes with a sigmoid of the attention branch's input.

Citation: Qiu et al. 2025, "Gated Attention for Large Language Models: Non-linearity, Sparsity, and
    Attention-Sink-Free", arXiv 2505.06708; reference code qiuzh20/gated_attention.
Formula: Y' = Y ⊙ σ(X W_θᵀ), X what queries, keys and values are computed from (after its norm), no bias.
    position: g1 attention output before W_O (the paper's choice), g2 values, g3 keys, g4 queries, g5 after W_O.
    score: elementwise W_θ (H·K, D), one gate an element; headwise (H, D), one gate a head; shared (K, D), one gate
    an element for all heads. At g2 and g3 H is the number of key/value heads.
    ns: 0.5 + 0.5 σ instead of σ (the paper's ablation).
Differs from the paper in: the gate has a matrix of its own (the reference widens the query projection; the same
    function). g2 to g4 act before the rotation and after any norm of queries and keys. `shared` has one set of K
    gates from the start; how the paper averages over heads is our interpretation.
Cost: H·K·D parameters a block (elementwise), one matrix product and one product an element; the paper reports
    under 2 % latency.
Acts: in every block. At the start gates are near 0.5, so g1 halves the attention branch.
Off: leave `gated_attention` out of the methods.

Numerics: the sigmoid is computed in at least fp32 and rounded to the dtype of what it gates.
W_θ is decayed as all matrices are.
Shapes: B batch, T positions, D width, H query heads, G key/value heads, K head width, R rows of W_θ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError, nearest
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="gated_attention",
    kind="model",
    title="Multiplies the attention output with a sigmoid of the branch's input: no sinks, larger learning rates",
    citation="Qiu et al. 2025, Gated Attention for Large Language Models, arXiv 2505.06708",
    formula="Y' = Y * sigmoid(X W_theta^T)",
    acts="in every block, every step; g1 before the output matrix, g2 values, g3 keys, g4 queries, g5 after it",
    cost="H K D parameters a block (elementwise), one matrix product and one product an element",
    off="leave `gated_attention` out of the methods",
    differs="a matrix of its own instead of a wider query matrix; how `shared` averages heads is our interpretation",
)

EXCLUDES: Final[Mapping[str, str]] = {}

POSITIONS: Final = {"g1": "attn_gate", "g2": "qkv_gate", "g3": "qkv_gate", "g4": "qkv_gate", "g5": "attn_out_gate"}
"""Position -> slot."""

SCORES: Final = ("elementwise", "headwise", "shared")


class Gate(nn.Module):
    """Attention input (B, T, D) -> gates (B, T, heads or 1, K or 1), in the dtype of the input."""

    def __init__(self, place: Place, heads: int, width: int, score: str, ns: bool) -> None:
        super().__init__()
        self.shape = {"elementwise": (heads, width), "headwise": (heads, 1), "shared": (1, width)}[score]
        self.ns = ns
        self.linear = make("linear", place, place.spec.d_model, self.shape[0] * self.shape[1], "attn_gate")

    def forward(self, x_BTD: Tensor) -> Tensor:
        z_BTR = self.linear(x_BTD)
        gate_BTR = torch.sigmoid(z_BTR.to(torch.promote_types(z_BTR.dtype, torch.float32)))
        if self.ns:
            gate_BTR = 0.5 + 0.5 * gate_BTR
        return gate_BTR.to(x_BTD.dtype).unflatten(-1, self.shape)


class OutputGate(nn.Module):
    """g1: (attention output, attention input) -> gated output; heads lie side by side."""

    def __init__(self, place: Place, score: str, ns: bool) -> None:
        super().__init__()
        self.heads = place.spec.n_heads
        self.gate = Gate(place, self.heads, place.spec.head_dim, score, ns)

    def forward(self, out_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        return (out_BTD.unflatten(-1, (self.heads, -1)) * self.gate(x_BTD)).flatten(-2)


class ProjectionGate(nn.Module):
    """g2, g3, g4: (q, k, v, attention input) -> the three, one of them gated."""

    def __init__(self, place: Place, position: str, score: str, ns: bool) -> None:
        super().__init__()
        self.position = position
        heads = place.spec.n_heads if position == "g4" else place.spec.n_kv_heads
        self.gate = Gate(place, heads, place.spec.head_dim, score, ns)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_BHTK = self.gate(x_BTD).transpose(1, 2)
        if self.position == "g2":
            return q_BHTK, k_BGTK, v_BGTK * gate_BHTK
        if self.position == "g3":
            return q_BHTK, k_BGTK * gate_BHTK, v_BGTK
        return q_BHTK * gate_BHTK, k_BGTK, v_BGTK


class BranchGate(nn.Module):
    """g5: (output of W_O, attention input) -> gated output; there are no heads any more."""

    def __init__(self, place: Place, ns: bool) -> None:
        super().__init__()
        self.gate = Gate(place, 1, place.spec.d_model, "elementwise", ns)

    def forward(self, out_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        return out_BTD * self.gate(x_BTD).flatten(-2)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "attn_gate": {"gated_attention": OutputGate},
    "qkv_gate": {"gated_attention": ProjectionGate},
    "attn_out_gate": {"gated_attention": BranchGate},
}


def apply(spec: Spec, *, position: str = "g1", score: str = "elementwise", ns: bool = False) -> Spec:
    """Return ``spec`` with gated attention.

    Args:
        spec: the model.
        position: ``g1`` to ``g5``.
        score: ``elementwise``, ``headwise`` or ``shared``.
        ns: gates between 0.5 and 1 instead of 0 and 1.

    Raises:
        UserError: an unknown position or score, or a score per head where there are no heads (g5).
        Conflict: another method has the slot.
    """
    if position not in POSITIONS:
        raise UserError(f"gated_attention position is '{position}'; use one of {', '.join(POSITIONS)}")
    if score not in SCORES:
        raise UserError(f"gated_attention score is '{score}'{nearest(score, SCORES)}; use one of {', '.join(SCORES)}")
    if position == "g5" and score != "elementwise":
        raise UserError(f"gated_attention score is '{score}' at g5, behind the heads; use elementwise there")
    fields: dict[str, Any] = {"ns": ns}
    if position != "g5":
        fields["score"] = score
    if POSITIONS[position] == "qkv_gate":
        fields["position"] = position
    return spec.claim(POSITIONS[position], Part.of("gated_attention", fields), "gated_attention")
