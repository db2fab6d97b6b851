"""σReparam: every weight is divided by its spectral norm and multiplied by a learnable scalar.

Citation: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
    arXiv 2303.06296; for language models Rybakov et al. 2024, arXiv 2410.16682.
Formula: Ŵ = γ / σ(W) · W, σ the largest singular value, γ a learnable scalar a matrix. One step of the power iteration
    each training forward: v ← unit(W u), u ← unit(Wᵀ v), σ = vᵀ W u = ‖Wᵀ v‖; u and v are constants of the gradient,
    which flows through σ(W). u starts at the top right singular vector.
Differs from the paper in: the fused matrix of queries, keys and values has one σ and one γ (our interpretation of
    "every matrix"); embedding and head are left as they are; norms stay unless other methods take them away; the new u
    is stored in the backward pass instead of the forward pass, which is the same thing in training. γ starts at
    σ(W), so that Ŵ = W, as in the authors' PyTorch code; their JAX code starts at 1, here `gamma=one`, with
    which the scale of the start is divided out: neither the deviation of a matrix nor 1 / sqrt(2 N) has an effect.
Cost: two products of W with a vector and one pass over W forward, in fp32; three passes over W backward; per matrix one
    scalar and the buffer u (D). Building takes an eigendecomposition of the smaller Gram matrix of each matrix.
Acts: in every block, on all matrices. The iteration goes on once for each training forward that has a backward pass:
    with gradient accumulation once each micro-batch, as in the authors' code. Evaluation and `effective_weight` take
    one step from the stored u and forget it; activation checkpointing, eager or compiled, finds the u of the first
    time. Weight decay of W does not change Ŵ directly, only how fast W turns.
Off: leave `sigma_reparam` out of the methods.

Numerics: iteration, σ and Ŵ in at least fp32, then Ŵ is rounded to the dtype of x.
Shapes: O output features, D input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="sigma_reparam",
    kind="model",
    title="Divides every weight by its spectral norm and multiplies by a learnable scalar, which bounds logit growth",
    citation="Zhai et al. 2023, arXiv 2303.06296",
    formula="W_hat = gamma / sigma(W) W",
    acts="in every block, on all matrices; one step of the power iteration each training step; with gamma=one the "
    "deviations of the start have no effect",
    cost="two products of W with a vector and a pass over W forward, three passes backward",
    off="leave `sigma_reparam` out of the methods",
    differs="one spectral norm for the fused query-key-value matrix; embedding and head as they are; norms stay",
)

CHANGES_LR: Final = (
    "the size of W has no say in the output, so that the same step turns a small W further than a large one"
)

EXCLUDES: Final[Mapping[str, str]] = {
    "zero_init": "W / sigma(W) is not defined for a matrix of zeros",
}

STARTS: Final = ("sigma", "one")
_TINY: Final = 1e-30


class SigmaLinear(nn.Module):
    """``y = x Ŵᵀ`` with ``Ŵ = γ / σ(W) · W``.

    Attributes:
        u_D: the right vector of the power iteration.
    """

    def __init__(self, place: Place, d_in: int, d_out: int, role: str, gamma: str = "sigma") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.gamma = nn.Parameter(torch.empty(1))
        self.u_D: Tensor
        self.register_buffer("u_D", torch.empty(d_in))
        self.param_roles = {"weight": role, "gamma": "gain"}
        self.param_fill = {"gamma": 1.0}
        self._gamma_is_sigma = gamma == "sigma"

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Start the iteration at the top right singular vector, and γ at the singular value where that is wanted."""
        sigma, u_D = _top(self.weight)
        self.u_D.copy_(u_D)
        if self._gamma_is_sigma:
            self.gamma.fill_(sigma)

    def forward(self, x_D: Tensor) -> Tensor:
        return F.linear(x_D, self._hat(self.weight, self.gamma, go_on=self.training).to(x_D.dtype))

    def effective_weight(self) -> Tensor:
        """Return Ŵ (O, D), differentiable, in at least fp32; the iteration does not go on."""
        return self._hat(_whole(self.weight), _whole(self.gamma), go_on=False)

    def _hat(self, weight_OD: Tensor, gamma: Tensor, go_on: bool) -> Tensor:
        w_OD = weight_OD.to(torch.promote_types(weight_OD.dtype, torch.float32))
        sigma: Tensor = _Sigma.apply(w_OD, self.u_D, go_on)  # type: ignore[no-untyped-call]
        hat_OD: Tensor = w_OD * (gamma / sigma)
        return hat_OD

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, role={self.param_roles['weight']}"


class _Sigma(torch.autograd.Function):
    """σ(W) after one step of the power iteration from u; the backward pass stores the new u.

    The forward pass changes nothing, so that a block that is computed again for its backward pass, eager or compiled,
    finds the u of the first time, and a forward pass without a backward pass leaves no trace.
    """

    @staticmethod
    def forward(ctx: Any, w_OD: Tensor, u_D: Tensor, go_on: bool) -> Tensor:
        v_O = _unit(w_OD @ u_D)
        next_D = w_OD.mT @ v_O
        sigma: Tensor = torch.linalg.vector_norm(next_D).clamp_min(_TINY)  # = vᵀ W u for the new u
        ctx.save_for_backward(v_O, next_D / sigma)
        ctx.stored_D = u_D if go_on else None
        return sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsigma: Tensor) -> tuple[Tensor, None, None]:
        v_O, u_D = ctx.saved_tensors
        if ctx.stored_D is not None:
            ctx.stored_D.copy_(u_D)
        return torch.outer(dsigma * v_O, u_D), None, None


def _unit(x: Tensor) -> Tensor:
    out: Tensor = x / torch.linalg.vector_norm(x).clamp_min(_TINY)
    return out


def _top(weight_OD: Tensor) -> tuple[float, Tensor]:
    """Return the largest singular value and its right vector."""
    w_OD = weight_OD.double()
    wide = w_OD.shape[0] < w_OD.shape[1]
    gram = w_OD @ w_OD.mT if wide else w_OD.mT @ w_OD
    top = torch.linalg.eigh(gram)[1][:, -1]
    u_D = _unit(w_OD.mT @ top) if wide else top
    return float(torch.linalg.vector_norm(w_OD @ u_D)), u_D


def _whole(x: Tensor) -> Tensor:
    """The whole of a sharded tensor; another one as it is. Inside a forward pass nothing is sharded."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"linear": {"sigma_reparam": SigmaLinear}}


def apply(spec: Spec, *, gamma: str = "sigma") -> Spec:
    """Return ``spec`` with σReparam in all matrices of the blocks.

    Args:
        spec: the model without it.
        gamma: where γ starts: ``sigma``, so that Ŵ = W, or ``one``.

    Raises:
        UserError: another start.
    """
    if gamma not in STARTS:
        raise UserError(f"sigma_reparam gamma is '{gamma}'; use one of {', '.join(STARTS)}")
    return spec.claim("linear", Part.of("sigma_reparam", {"gamma": gamma}), "sigma_reparam")
