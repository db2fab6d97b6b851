"""Twins of the methods of weights: starting values, scalars on branches, reparametrised matrices, penalties on them."""

from __future__ import annotations

from typing import Final

import numpy as np
from tests.model.reference_decoder import Reference
from tests.model.twin import Twin

from poise.model.spec import Part

MATRICES: Final = ("attn.qkv.weight", "attn.out.weight", "mlp.inner.weight", "mlp.out.weight")
RESIDUAL: Final = ("attn.out.weight", "mlp.out.weight")


class ScalarAdd(Reference):
    def add(self, x_TD, out_TD, branch):
        return x_TD + self.w[f"{self.at}{branch}_add.scale"] * out_TD


class ReZero(ScalarAdd):
    def attn_in(self, x_TD):
        return x_TD

    def mlp_in(self, x_TD):
        return x_TD


class LayerScale(Reference):
    def add(self, x_TD, out_TD, branch):
        return x_TD + self.w[f"{self.at}{branch}_add.weight"] * out_TD


class SigmaReparam(Reference):
    """Evaluation: one step from the stored u, which is not kept."""

    def weight(self, name):
        w_OD, u_D = self.w[name + ".weight"], self.w[name + ".u_D"]
        v_O = w_OD @ u_D
        v_O = v_O / np.linalg.norm(v_O)
        u_D = w_OD.T @ v_O
        u_D = u_D / np.linalg.norm(u_D)
        return self.w[name + ".gamma"] / (v_O @ w_OD @ u_D) * w_OD


class WeSaR(Reference):
    def weight(self, name):
        gate, w_OD = self.w[name + ".gate"], self.w[name + ".weight"].copy()
        H, G, K, F = self.spec.n_heads, self.spec.n_kv_heads, self.spec.head_dim, self.spec.d_ff
        ends = {"attn.qkv": [H * K, (H + G) * K], "mlp.inner": [F]}.get(name[len(self.at) :], [])
        return np.concatenate([a * part for a, part in zip(gate, np.split(w_OD, ends), strict=True)])

    def embed(self, ids):
        return self.w["embed_out.gate"] * super().embed(ids)

    def logits(self, x_TD):
        return (self.w["head_in.gate"] * self.final(x_TD)) @ self.head_weight().T


class LowRank(Reference):
    def weight(self, name):
        if not name.endswith("attn.qkv"):
            return super().weight(name)
        return np.concatenate([self.w[f"{name}.up.{s}"] @ self.w[f"{name}.down.{s}"] for s in "qkv"])


class Locater(Reference):
    """With the full (D, D) matrix of every head."""

    def qkv(self, a_TD):
        H, G, K = self.spec.n_heads, self.spec.n_kv_heads, self.spec.head_dim
        w_OD = self.weight(self.at + "attn.qkv")
        for head in range(H):
            key = H + head // (H // G)
            m_DD = w_OD[head * K : (head + 1) * K].T @ w_OD[key * K : (key + 1) * K]
            self.penalties.append(0.1 * ((m_DD**2).sum() + 0.5 * (np.trace(m_DD) - 1) ** 2))
        return super().qkv(a_TD)


TWINS: Final = {
    "small_init": Twin(
        Reference, replaces={"embedding.weight": "another deviation"} | dict.fromkeys(MATRICES, "another deviation")
    ),
    "scaled_init": Twin(
        Reference,
        sizes={"init": Part.of("default", {"scale_residual": False})},
        replaces=dict.fromkeys(RESIDUAL, "smaller"),
    ),
    "embed_std": Twin(Reference, sizes={"tied": False}, replaces={"embedding.weight": "another deviation"}),
    "zero_init": Twin(Reference, replaces=dict.fromkeys(RESIDUAL, "zero")),
    "rezero": Twin(
        ReZero,
        replaces={"attn_in.weight": "no norm before a branch", "mlp_in.weight": "no norm before a branch"},
    ),
    "skip_init": Twin(ScalarAdd, identity=("skip_init:init=1",)),
    "layer_scale": Twin(LayerScale, identity=("layer_scale:init=1",)),
    "sigma_reparam": Twin(SigmaReparam),
    "wesar": Twin(
        WeSaR,
        settings=("wesar:embed_gate=true",),
        outside=("embedding.weight", *MATRICES),  # gates of 40 times larger weights would saturate attention
        replaces={"embedding.weight": "another deviation"} | dict.fromkeys(MATRICES, "another deviation"),
    ),
    "mlra": Twin(LowRank, replaces={"attn.qkv.weight": "two factors for each projection"}),
    "locater": Twin(
        Locater, settings=("locater:coefficient=0.1,rho=0.5,target=1",), identity=("locater:coefficient=0",)
    ),
}
