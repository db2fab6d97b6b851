"""LocATER: a penalty that keeps the scale of the query-key spectrum small and its mean where it is.

Citation: Bao, Hataya and Karakida 2024, "Self-attention Networks Localize When QK-eigenspectrum Concentrates",
    arXiv 2402.02098 (LocAteR).
Formula: loss += λ Σ_{layers, heads} [S(M) + ρ (tr M − c)²], M = W_Q W_Kᵀ of a head; S = ‖M‖_F² (measure `frobenius`) or
    tr(M²) (`square`); c is tr M of the first training step, or a number.
Differs from the paper in: our interpretation. The paper's objective, its λ and its target were not seen, only the aim:
    the least scale of the eigenvalues of M at their mean. λ = 1e-4 (at the start of three small models the penalty's
    gradient had 1 % of the size of the other gradient of the query and key rows at λ = 1.2e-4 to 3e-4), ρ = 1 and c
    are ours, and so is ‖M‖_F² >= |tr(M²)|: tr(M²) can be negative and has no lower bound.
Cost: O(H D K²) multiplications a layer, no (D, D) matrix; one buffer of H numbers a layer. Independent of the batch.
Acts: in the loss, every step, evaluation too; reported apart from the cross-entropy as `penalty`. On the matrices
    themselves: without RoPE, 1 / sqrt(K) and the gain of the norm before. Grouped queries: each with the key head that
    it shares.
Off: leave `locater` out of the methods, or coefficient = 0.
Numerics: the penalty is computed in at least fp32, of the weights before they are cast.

c is read in the first forward pass in training mode, since the penalty sees the matrices only there, and then saved
with the model; in evaluation before it, c is the value of the moment. The identities are those of
``poise.model.spectrum``, in at least fp32.
Shapes: D width, H query heads, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec
from poise.model.spectrum import qk_spectrum

CARD: Final = Card(
    name="locater",
    kind="model",
    title="Penalises the scale of the query-key spectrum around its mean (our interpretation), against collapse",
    citation="Bao et al. 2024, arXiv 2402.02098",
    formula="loss += lambda sum_heads [||M||_F^2 + rho (tr M - c)^2], M = W_Q W_K^T",
    acts="in the loss, every step, on the query and key matrices of every block; reported apart from the cross-entropy",
    cost="O(H D K^2) multiplications a layer, whatever the batch",
    off="leave `locater` out of the methods, or coefficient = 0",
    differs="our interpretation: the paper's objective, coefficient and target were not seen",
)

_NORMED: Final = (
    "with normalised queries and keys the logits do not depend on the size of their matrices, so that the penalty is "
    "weight decay and nothing else"
)
EXCLUDES: Final[Mapping[str, str]] = dict.fromkeys(
    ("qk_norm", "qkv_norm", "qk_fc_norm", "hybrid_norm", "ngpt"), _NORMED
)

MEASURES: Final = ("frobenius", "square")


class Locater(nn.Module):
    """(the block's qkv product, penalties so far) -> their sum with this block's.

    Attributes:
        start_H: c of every head, once it is known.
        known: 1 once it is, 0 before.
    """

    def __init__(
        self,
        place: Place,
        coefficient: float,
        rho: float = 1.0,
        target: float | None = None,
        measure: str = "frobenius",
    ) -> None:
        super().__init__()
        spec = place.spec
        self.heads, self.kv_heads, self.head_dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
        self.coefficient, self.rho, self.target, self.measure = coefficient, rho, target, measure
        self.start_H: Tensor
        self.known: Tensor
        if coefficient != 0 and target is None:
            self.register_buffer("start_H", torch.empty(self.heads))
            self.register_buffer("known", torch.empty(1))

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Forget c: the next training forward reads it."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(self, qkv: Any, total: Tensor | None) -> Tensor | None:
        if self.coefficient == 0:
            return total
        q_rows, k_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        wq_OD, wk_OD = qkv.effective_weight()[: q_rows + k_rows].split((q_rows, k_rows))
        D = wq_OD.shape[-1]
        spectrum = qk_spectrum(
            wq_OD.unflatten(0, (self.heads, self.head_dim)), wk_OD.unflatten(0, (self.kv_heads, self.head_dim))
        )
        size_H = spectrum.frobenius if self.measure == "frobenius" else spectrum.scale * D
        trace_H = spectrum.mean * D
        away_H = trace_H - self._centre(trace_H)
        penalty: Tensor = self.coefficient * (size_H + self.rho * away_H.square()).sum()
        return penalty if total is None else total + penalty

    @torch.no_grad()
    def _centre(self, trace_H: Tensor) -> Tensor | float:
        """c; a second forward with the same weights, as of a recomputed block, finds the same."""
        if self.target is not None:
            return self.target
        centre_H = torch.where(self.known > 0, self.start_H, trace_H.detach())
        if self.training:
            self.start_H.copy_(centre_H)
            self.known.fill_(1.0)
        return centre_H


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"qk_penalty": {"locater": Locater}}


def apply(
    spec: Spec,
    *,
    coefficient: float = 1e-4,
    rho: float = 1.0,
    target: float | None = None,
    measure: str = "frobenius",
) -> Spec:
    """Return ``spec`` with the penalty in every block.

    Args:
        spec: the model without it.
        coefficient: λ.
        rho: weight of the trace's distance from ``target``.
        target: c; by default the trace of each head at the first training step.
        measure: S, ``frobenius`` or ``square``.

    Raises:
        UserError: a negative coefficient or weight, a target that is not finite or too large, or an unknown measure.
    """
    for name, value in (("coefficient", coefficient), ("rho", rho)):
        if not 0 <= value <= 1e15:
            raise UserError(f"locater {name} is {value}; give a number of 0 or more, up to 1e15")
    if target is not None and not abs(target) <= 1e15:
        raise UserError(f"locater target is {target}; give a number of a size up to 1e15, e.g. 1, or leave it out")
    if measure not in MEASURES:
        raise UserError(f"locater measure is '{measure}'; use one of {', '.join(MEASURES)}")
    fields = {"coefficient": coefficient, "rho": rho, "target": target, "measure": measure}
    return spec.claim("qk_penalty", Part.of("locater", fields), "locater")
