"""Small modules: norms, matrices, and the parts that do nothing.

Weights are fp32 masters; every module casts them to the dtype of its input when it uses them, which is what
FSDP2's mixed precision does too. Statistics of norms are taken in fp32.

A module that owns parameters says what each is in ``param_roles`` (local name -> role); a parameter that
starts as a constant says so in ``param_fill``.

Shapes: ... any, D last dimension, O output features, V vocabulary, B batch, T positions,
H heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from poise.model.documents import Documents
from poise.model.place import Place


class Linear(nn.Module):
    """``y = x Wᵀ``, no bias; W is (O, D) and is cast to the dtype of x at each use.

    Whatever stands in the ``linear`` slot offers ``effective_weight``: the matrix that its output is linear in.
    """

    def __init__(self, place: Place, d_in: int, d_out: int, role: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.param_roles = {"weight": role}

    def forward(self, x_D: Tensor) -> Tensor:
        return F.linear(x_D, self.weight.to(x_D.dtype))

    def effective_weight(self) -> Tensor:
        """Return the (O, D) matrix W of ``y = x Wᵀ``, differentiable, at least fp32."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, role={self.param_roles['weight']}"


class Embedding(nn.Module):
    """Token ids -> rows of the (V, D) table, in the table's own dtype."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.param_roles = {"weight": "embedding"}

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.weight)


class Head(nn.Module):
    """Holder of an untied output matrix (V, D); the loss multiplies by it chunk by chunk."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.param_roles = {"weight": "head"}


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x²) + eps) · g`` (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, place: Place, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = place.spec.norm_eps
        self.param_roles = {"weight": "norm"}
        self.param_fill = {"weight": 1.0}

    def forward(self, x_D: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses, and chooses what to keep, by itself
            return _rms_norm(x_D, self.weight, self.eps)[0]
        out: Tensor = _RMSNorm.apply(x_D, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class LayerNorm(nn.Module):
    """``y = (x − mean) / sqrt(var + eps) · g``, no bias (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, place: Place, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = place.spec.norm_eps
        self.param_roles = {"weight": "norm"}
        self.param_fill = {"weight": 1.0}

    def forward(self, x_D: Tensor) -> Tensor:
        out_D = F.layer_norm(_at_least_fp32(x_D), self.weight.shape, self.weight, None, self.eps)
        return out_D.to(x_D.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with its own backward: it keeps x as it came and one fp32 number a row, no fp32 copy of x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_D: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        out_D, scale_1 = _rms_norm(x_D, gain_D, eps)
        ctx.save_for_backward(x_D, gain_D, scale_1)
        return out_D

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_D: Tensor) -> tuple[Tensor, Tensor, None]:
        x_D, gain_D, scale_1 = ctx.saved_tensors  # type: ignore[attr-defined]
        dy32_D = _at_least_fp32(dy_D)
        unit_D = _at_least_fp32(x_D) * scale_1
        dgain_D = (dy32_D * unit_D).flatten(0, -2).sum(0)
        dunit_D = dy32_D * gain_D
        along_1 = (dunit_D * unit_D).mean(-1, keepdim=True)
        dx_D = dunit_D.sub_(unit_D.mul_(along_1)).mul_(scale_1)
        return dx_D.to(x_D.dtype), dgain_D.to(gain_D.dtype), None


def _rms_norm(x_D: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32_D = _at_least_fp32(x_D)
    scale_1 = torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)
    return (x32_D * scale_1 * gain_D).to(x_D.dtype), scale_1


class Same(nn.Module):
    """x -> x: an empty slot of one tensor."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class SamePair(nn.Module):
    """(q, k) -> (q, k), (values, first values) -> the same: an empty ``qk`` or ``values`` slot."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return a, b


class Untapped(nn.Module):
    """(q, k, documents) -> (q, k): an empty ``qk_tap`` slot."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
        return q, k


class SameThree(nn.Module):
    """(q, k, v, attention input) -> (q, k, v): an empty ``qkv_gate`` slot."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v


class Ungated(nn.Module):
    """(branch's tensor, branch's input) -> the tensor: an empty ``attn_gate`` or ``attn_out_gate`` slot."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, out_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        return out_BTD


class NoPenalty(nn.Module):
    """(the block's qkv product, sum of penalties so far) -> that sum: an empty ``qk_penalty`` slot."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, qkv: nn.Module, total: Tensor | None) -> Tensor | None:
        return total


class SiluProduct(nn.Module):
    """``silu(gate) · up``, the first F of 2 F inner activations the gate (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, inner_BTI: Tensor) -> Tensor:
        gate_BTF, up_BTF = inner_BTI.chunk(2, -1)
        return F.silu(gate_BTF) * up_BTF


class Gelu(nn.Module):
    """``gelu(inner)`` (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    The exact form: on a CPU torch's tanh approximation takes three times as long.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, inner_BTF: Tensor) -> Tensor:
        return F.gelu(inner_BTF)


class Add(nn.Module):
    """(stream, branch) -> stream + branch: the plain residual connection."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        return x_BTD + branch_BTD


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
