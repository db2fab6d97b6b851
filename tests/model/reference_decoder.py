"""The decoder written out in NumPy, float64, one sequence, by the formulas of the papers; nothing of poise in it but
the sizes. A method's transcription is a subclass that replaces the steps which its paper changes.

Shapes: T positions, D width, F MLP width, I inner MLP activations, H heads, G key/value heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logsumexp(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class Reference:
    """``Reference(weights, spec).loss(ids, targets)``.

    ``self.w`` holds the weights (and buffers) of the model by name. ``at`` is the prefix of the block that is being
    computed, ``trunk.blocks.3.``, and ``layer`` its 1-based number; steps outside the blocks do not use them.
    """

    def __init__(self, w: Mapping[str, Array], spec: Any) -> None:
        self.w, self.spec, self.at, self.layer = w, spec, "", 0
        self.penalties: list[float] = []

    # -- norms and products --

    def norm(self, x: Array, name: str) -> Array:
        """The model's norm; ``name`` is that of its module."""
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.spec.norm_eps) * self.w[name + ".weight"]

    def weight(self, name: str) -> Array:
        """The matrix that a linear module multiplies by."""
        return self.w[name + ".weight"]

    def linear(self, x_TD: Array, name: str) -> Array:
        return x_TD @ self.weight(name).T

    # -- the ends --

    def embed(self, ids: NDArray[np.int64]) -> Array:
        return self.w["embedding.weight"][ids]

    def head_weight(self) -> Array:
        return self.w["embedding.weight"] if self.spec.tied else self.w["head.weight"]

    def final(self, x_TD: Array) -> Array:
        return self.norm(x_TD, "trunk.norm")

    def logits(self, x_TD: Array) -> Array:
        return self.final(x_TD) @ self.head_weight().T

    def terms(self, logits_TV: Array) -> float:
        return 0.0

    # -- attention --

    def attn_in(self, x_TD: Array) -> Array:
        return self.norm(x_TD, self.at + "attn_in")

    def qkv(self, a_TD: Array) -> tuple[Array, Array, Array]:
        H, G, K = self.spec.n_heads, self.spec.n_kv_heads, self.spec.head_dim
        rows = self.linear(a_TD, self.at + "attn.qkv").T
        q, k, v = (part.reshape(-1, K, len(a_TD)).swapaxes(1, 2) for part in np.split(rows, [H * K, (H + G) * K]))
        return q, k, v

    def shape_qkv(self, q_HTK: Array, k_GTK: Array, v_GTK: Array, a_TD: Array) -> tuple[Array, Array, Array]:
        """Whatever happens to queries, keys and values before the rotation."""
        return q_HTK, k_GTK, v_GTK

    def rope(self, x_HTK: Array) -> Array:
        half = x_HTK.shape[-1] // 2
        speed = self.spec.rope_theta ** (-np.arange(half) / half)
        z = (x_HTK[..., :half] + 1j * x_HTK[..., half:]) * np.exp(1j * np.arange(x_HTK.shape[1])[:, None] * speed)
        return np.concatenate([z.real, z.imag], -1)

    def scale(self) -> float:
        return float(self.spec.head_dim**-0.5)

    def probabilities(self, logits_TT: Array, head: int) -> Array:
        """Softmax over the visible keys of one head; the future is -inf already."""
        return np.exp(logits_TT - logsumexp(logits_TT)[:, None])

    def cap(self, logits_TT: Array) -> Array:
        """What is done to the scaled logits before the future is hidden."""
        return logits_TT

    def mix(self, q_HTK: Array, k_GTK: Array, v_GTK: Array) -> Array:
        heads = []
        for head in range(self.spec.n_heads):
            group = head // (self.spec.n_heads // self.spec.n_kv_heads)
            logits_TT = self.cap(self.scale() * (q_HTK[head] @ k_GTK[group].T))
            logits_TT[np.triu_indices(len(logits_TT), 1)] = -np.inf
            heads.append(self.probabilities(logits_TT, head) @ v_GTK[group])
        return np.concatenate(heads, -1)

    def after_mix(self, out_TD: Array, a_TD: Array) -> Array:
        """Gates and norms between the attention output and its output matrix."""
        return out_TD

    def after_attn_out(self, out_TD: Array, a_TD: Array) -> Array:
        return out_TD

    def attention(self, a_TD: Array) -> Array:
        q_HTK, k_GTK, v_GTK = self.shape_qkv(*self.qkv(a_TD), a_TD)
        out_TD = self.after_mix(self.mix(self.rope(q_HTK), self.rope(k_GTK), v_GTK), a_TD)
        return self.after_attn_out(self.linear(out_TD, self.at + "attn.out"), a_TD)

    # -- MLP --

    def mlp_in(self, x_TD: Array) -> Array:
        return self.norm(x_TD, self.at + "mlp_in")

    def activation(self, inner_TI: Array) -> Array:
        assert self.spec.mlp == "swiglu"
        gate_TF, up_TF = np.split(inner_TI, 2, -1)
        return gate_TF * sigmoid(gate_TF) * up_TF

    def mlp_mid(self, hidden_TF: Array) -> Array:
        return hidden_TF

    def mlp(self, a_TD: Array) -> Array:
        hidden_TF = self.mlp_mid(self.activation(self.linear(a_TD, self.at + "mlp.inner")))
        return self.linear(hidden_TF, self.at + "mlp.out")

    # -- residual stream --

    def branch_out(self, out_TD: Array, branch: str) -> Array:
        """``branch`` is ``attn`` or ``mlp``."""
        return out_TD

    def add(self, x_TD: Array, out_TD: Array, branch: str) -> Array:
        return x_TD + out_TD

    def block(self, x_TD: Array) -> Array:
        x_TD = self.add(x_TD, self.branch_out(self.attention(self.attn_in(x_TD)), "attn"), "attn")
        return self.add(x_TD, self.branch_out(self.mlp(self.mlp_in(x_TD)), "mlp"), "mlp")

    def loss(self, ids: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        x_TD = self.embed(ids)
        for number in range(self.spec.n_layers):
            self.at, self.layer = f"trunk.blocks.{number}.", number + 1
            x_TD = self.block(x_TD)
        logits_TV = self.logits(x_TD)
        ce = (logsumexp(logits_TV) - logits_TV[np.arange(len(ids)), targets]).mean()
        return float(ce + self.terms(logits_TV) + sum(self.penalties))
