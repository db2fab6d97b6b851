"""The two branches of a block, and the block.

Shapes: B batch, T positions, D width, F MLP width, I inner MLP activations (2 F with a gate), H query heads,
G key/value heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from poise.model.attention import Rope
from poise.model.documents import Documents
from poise.model.place import Place
from poise.model.slots import make


class Carry(NamedTuple):
    """What goes from block to block beside the residual stream. A tuple, so that FSDP2 finds the tensors in it.

    Attributes:
        values: the first block's values (B, G, T, K), where a method asks for them.
        penalty: sum of the blocks' penalties so far, a scalar, where a method has any.
    """

    values: Tensor | None = None
    penalty: Tensor | None = None


class Attention(nn.Module):
    """Causal self-attention; with fewer key/value heads than query heads, grouped-query attention.

    The rows of ``qkv.weight`` are the H·K query rows, then the G·K key rows, then the G·K value rows.

    Attributes:
        scale: factor of the attention logits.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.n_heads, self.n_kv_heads, self.head_dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
        rows = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
        self.scale: float = make("attn_scale", place)
        self.qkv = make("linear", place, spec.d_model, rows, "qkv")
        self.qk = make("qk", place)
        self.values = make("values", place)
        self.qkv_gate = make("qkv_gate", place)
        self.qk_tap = make("qk_tap", place)
        self.penalty = make("qk_penalty", place)
        self.scores = make("scores", place, self.scale)
        self.gate = make("attn_gate", place)
        self.mid = make("attn_mid", place)
        self.out = make("linear", place, spec.d_model, spec.d_model, "attn_out")
        self.out_gate = make("attn_out_gate", place)
        self.taps = _identities("q", "k", "v", "attn_mix")

    def forward(
        self, x_BTD: Tensor, rope: Rope, carry: Carry, documents: Documents | None = None
    ) -> tuple[Tensor, Carry]:
        B, T, D = x_BTD.shape
        heads = self.n_heads + 2 * self.n_kv_heads
        qkv_BHTK = self.qkv(x_BTD).view(B, T, heads, self.head_dim).transpose(1, 2)
        q_BHTK, k_BGTK, v_BGTK = qkv_BHTK.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        q_BHTK, k_BGTK = self.qk(q_BHTK, k_BGTK)
        v_BGTK, first_BGTK = self.values(v_BGTK, carry.values)
        q_BHTK, k_BGTK, v_BGTK = self.qkv_gate(q_BHTK, k_BGTK, v_BGTK, x_BTD)
        q_BHTK, k_BGTK = self.taps["q"](rope(q_BHTK, documents)), self.taps["k"](rope(k_BGTK, documents))
        q_BHTK, k_BGTK = self.qk_tap(q_BHTK, k_BGTK, documents)
        out_BHTK = self.scores(q_BHTK, k_BGTK, self.taps["v"](v_BGTK), documents)
        mix_BTD = self.mid(self.gate(out_BHTK.transpose(1, 2).reshape(B, T, D), x_BTD))
        out_BTD = self.out_gate(self.out(self.taps["attn_mix"](mix_BTD)), x_BTD)
        return out_BTD, Carry(first_BGTK, self.penalty(self.qkv, carry.penalty))


class MLP(nn.Module):
    """``W_out activation(W_inner x)``.

    With SwiGLU the rows of ``inner.weight`` are the F gate rows, then the F up rows.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        spec = place.spec
        self.inner = make("linear", place, spec.d_model, spec.d_inner, "mlp_in")
        self.activation = make("activation", place)
        self.mid = make("mlp_mid", place)
        self.out = make("linear", place, spec.d_ff, spec.d_model, "mlp_out")
        self.taps = _identities("mlp_hidden")

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.mid(self.activation(self.inner(x_BTD)))
        out: Tensor = self.out(self.taps["mlp_hidden"](hidden_BTF))
        return out


class Block(nn.Module):
    """One layer: attention, then MLP, each as a branch of the residual stream."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        attn = Place(place.spec, place.layer, "attn")
        mlp = Place(place.spec, place.layer, "mlp")
        self.attn_in, self.mlp_in = make("branch_in", attn), make("branch_in", mlp)
        self.attn, self.mlp = Attention(attn), MLP(mlp)
        self.attn_branch, self.mlp_branch = make("branch_out", attn), make("branch_out", mlp)
        self.attn_add, self.mlp_add = make("residual", attn), make("residual", mlp)
        self.taps = _identities("attn_in", "attn_out", "mlp_in", "mlp_out", "residual")

    def forward(
        self, x_BTD: Tensor, rope: Rope, carry: Carry, documents: Documents | None = None
    ) -> tuple[Tensor, Carry]:
        attn_BTD, carry = self.attn(self.taps["attn_in"](self.attn_in(x_BTD)), rope, carry, documents)
        x_BTD = self.attn_add(x_BTD, self.taps["attn_out"](self.attn_branch(attn_BTD)))
        mlp_BTD = self.mlp(self.taps["mlp_in"](self.mlp_in(x_BTD)))
        x_BTD = self.mlp_add(x_BTD, self.taps["mlp_out"](self.mlp_branch(mlp_BTD)))
        return self.taps["residual"](x_BTD), carry


def _identities(*names: str) -> nn.ModuleDict:
    """Modules that do nothing and exist to be listened to."""
    return nn.ModuleDict({name: nn.Identity() for name in names})
