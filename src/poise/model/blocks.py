"""The two branches of a block, and the block.

Shapes: B batch, T positions, D width, F MLP width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from poise.model.attention import Rope
from poise.model.place import Place
from poise.model.slots import make


class Attention(nn.Module):
    """Causal self-attention; with fewer key/value heads than query heads, grouped-query attention.

    The rows of ``qkv.weight`` are the H·K query rows, then the G·K key rows, then the G·K value rows.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.n_heads, self.n_kv_heads, self.head_dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
        rows = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
        self.qkv = make("linear", place, spec.d_model, rows, "qkv")
        self.qk = make("qk", place)
        self.scores = make("scores", place)
        self.gate = make("attn_gate", place)
        self.out = make("linear", place, spec.d_model, spec.d_model, "attn_out")
        self.taps = _identities("q", "k", "v", "attn_mix")

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        B, T, D = x_BTD.shape
        heads = self.n_heads + 2 * self.n_kv_heads
        qkv_BHTK = self.qkv(x_BTD).view(B, T, heads, self.head_dim).transpose(1, 2)
        q_BHTK, k_BGTK, v_BGTK = qkv_BHTK.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        q_BHTK, k_BGTK = self.qk(q_BHTK, k_BGTK)
        q_BHTK, k_BGTK = self.taps["q"](rope(q_BHTK)), self.taps["k"](rope(k_BGTK))
        out_BHTK = self.scores(q_BHTK, k_BGTK, self.taps["v"](v_BGTK))
        mix_BTD = self.gate(out_BHTK.transpose(1, 2).reshape(B, T, D), x_BTD)
        out: Tensor = self.out(self.taps["attn_mix"](mix_BTD))
        return out


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) · W_up x)`` (Shazeer 2020, arXiv 2002.05202).

    The rows of ``inner.weight`` are the F gate rows, then the F up rows.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.inner = make("linear", place, spec.d_model, 2 * spec.d_ff, "mlp_in")
        self.out = make("linear", place, spec.d_ff, spec.d_model, "mlp_out")
        self.taps = _identities("mlp_hidden")

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.inner(x_BTD).chunk(2, -1)
        out: Tensor = self.out(self.taps["mlp_hidden"](F.silu(gate_BTF) * up_BTF))
        return out


class GELU(nn.Module):
    """``W_out gelu(W_in x)`` (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    The exact form: on a CPU torch's tanh approximation takes three times as long.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.inner = make("linear", place, spec.d_model, spec.d_ff, "mlp_in")
        self.out = make("linear", place, spec.d_ff, spec.d_model, "mlp_out")
        self.taps = _identities("mlp_hidden")

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.out(self.taps["mlp_hidden"](F.gelu(self.inner(x_BTD))))
        return out


MLPS: Final[Mapping[str, Callable[[Place], nn.Module]]] = {"swiglu": SwiGLU, "gelu": GELU}


class Block(nn.Module):
    """One layer: attention, then MLP, each as a branch of the residual stream."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        attn = Place(place.spec, place.layer, "attn")
        mlp = Place(place.spec, place.layer, "mlp")
        self.attn_in, self.mlp_in = make("branch_in", attn), make("branch_in", mlp)
        self.attn, self.mlp = Attention(attn), MLPS[place.spec.mlp](mlp)
        self.attn_branch, self.mlp_branch = make("branch_out", attn), make("branch_out", mlp)
        self.attn_add, self.mlp_add = make("residual", attn), make("residual", mlp)
        self.taps = _identities("attn_in", "attn_out", "mlp_in", "mlp_out", "residual")

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        attn_BTD = self.attn(self.taps["attn_in"](self.attn_in(x_BTD)), rope)
        x_BTD = self.attn_add(x_BTD, self.taps["attn_out"](self.attn_branch(attn_BTD)))
        mlp_BTD = self.mlp(self.taps["mlp_in"](self.mlp_in(x_BTD)))
        x_BTD = self.mlp_add(x_BTD, self.taps["mlp_out"](self.mlp_branch(mlp_BTD)))
        out: Tensor = self.taps["residual"](x_BTD)
        return out


def _identities(*names: str) -> nn.ModuleDict:
    """Modules that do nothing and exist to be listened to."""
    return nn.ModuleDict({name: nn.Identity() for name in names})
