"""Twins of mup, depth_mup, u_mup, ngpt, dyt, gated_attention, value_residual, logit_tap, embed_detach,
output_centering and swiglu_clamp.

Shapes: as in ``reference_decoder``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from tests.model.reference_decoder import Reference, sigmoid
from tests.model.twin import Twin

HIDDEN: Final = ("attn.qkv.weight", "attn.out.weight", "mlp.inner.weight", "mlp.out.weight")


class Mup(Reference):
    def scale(self):
        return np.sqrt(2) / self.spec.head_dim

    def final(self, x_TD):
        return super().final(x_TD) / 2


class DepthMup(Reference):
    def add(self, x_TD, out_TD, branch):
        return x_TD + out_TD / np.sqrt(self.spec.n_layers / 1)


class UMup(Reference):
    """With residual_mult 0.5 and attn_ratio 2: α_mlp² = 0.5² · 2 / 5 = 0.1, α_attn² = 0.4."""

    def weight(self, name):
        w = super().weight(name)
        return w / np.sqrt(w.shape[1])

    def scale(self):
        return 1 / self.spec.head_dim

    def final(self, x_TD):
        return super().final(x_TD) / self.spec.d_model

    def add(self, x_TD, out_TD, branch):
        attn, mlp = 0.4, 0.1
        before = (self.layer - 1) * (attn + mlp) + (attn if branch == "mlp" else 0)
        tau2 = (attn if branch == "attn" else mlp) / (2 * self.spec.n_layers / 2 + before)
        return np.sqrt(1 / (1 + tau2)) * x_TD + np.sqrt(tau2 / (1 + tau2)) * out_TD


class NGPT(Reference):
    def scaled(self, name, init, start):
        return self.w[name + ".scale.weight"] * (init / start)

    @staticmethod
    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def attn_in(self, x_TD):
        return x_TD

    def mlp_in(self, x_TD):
        return x_TD

    def final(self, x_TD):
        return x_TD

    def scale(self):
        return np.sqrt(self.spec.head_dim)

    def shape_qkv(self, q_HTK, k_GTK, v_GTK, a_TD):
        s_G1K = self.scaled(self.at + "attn.qk", 1.0, self.spec.d_model**-0.5)[:, None]
        s_H1K = np.repeat(s_G1K, self.spec.n_heads // self.spec.n_kv_heads, 0)
        return s_H1K * self.unit(q_HTK), s_G1K * self.unit(k_GTK), v_GTK

    def activation(self, inner_TI):
        return super().activation(np.sqrt(self.spec.d_model) * self.scaled(self.at + "mlp.activation", 1, 1) * inner_TI)

    def add(self, x_TD, out_TD, branch):
        alpha_D = np.abs(self.w[f"{self.at}{branch}_add.alpha.weight"] * 0.05 * np.sqrt(self.spec.d_model))
        here_TD = self.unit(x_TD)
        return self.unit(here_TD + alpha_D * (self.unit(out_TD) - here_TD))

    def logits(self, x_TD):
        return self.scaled("head_map", 1.0, self.spec.d_model**-0.5) * super().logits(x_TD)


class DyT(Reference):
    def norm(self, x, name):
        return np.tanh(self.w[name + ".alpha"] * x) * self.w[name + ".weight"]


class GatedAttention(Reference):
    def after_mix(self, out_TD, a_TD):
        return out_TD * sigmoid(self.linear(a_TD, self.at + "attn.gate.gate.linear"))


class ValueResidual(Reference):
    def shape_qkv(self, q_HTK, k_GTK, v_GTK, a_TD):
        if self.layer == 1:
            self.first_GTK = v_GTK
        return q_HTK, k_GTK, (v_GTK + self.first_GTK) / 2


class OutputCentering(Reference):
    def head_weight(self):
        return super().head_weight() - super().head_weight().mean(0)


class SwigluClamp(Reference):
    def activation(self, inner_TI):
        gate_TF, up_TF = np.split(inner_TI, 2, -1)
        return super().activation(np.concatenate([np.minimum(gate_TF, 0.05), np.clip(up_TF, -0.05, 0.05)], -1))


_WIDTH = "hidden matrices start at 1 / sqrt(m) of the base's deviation"
_DEPTH = "residual outputs start as those of the base depth"
_UNIT = "every matrix starts with deviation 1"
_SPHERE = "matrices start as unit vectors, about"
_NORMLESS = "there are no norms"

TWINS: Final = {
    "mup": Twin(
        Mup,
        settings=("mup:base_width=8,base_head_dim=2",),
        identity=("mup:base_width=16",),
        replaces=dict.fromkeys(HIDDEN, _WIDTH),
    ),
    "depth_mup": Twin(
        DepthMup,
        settings=("depth_mup:base_depth=1",),
        identity=("depth_mup:base_depth=2",),
        replaces=dict.fromkeys(("attn.out.weight", "mlp.out.weight"), _DEPTH),
    ),
    "u_mup": Twin(
        UMup,
        settings=("u_mup:residual_mult=0.5,attn_ratio=2",),
        replaces=dict.fromkeys((*HIDDEN, "embedding.weight"), _UNIT),
    ),
    "ngpt": Twin(
        NGPT,
        replaces={
            **dict.fromkeys((*HIDDEN, "embedding.weight"), _SPHERE),
            **dict.fromkeys(("attn_in.weight", "mlp_in.weight", "trunk.norm.weight"), _NORMLESS),
        },
    ),
    "dyt": Twin(DyT),
    "gated_attention": Twin(GatedAttention),
    "value_residual": Twin(ValueResidual, identity=("value_residual:share=0",)),
    "logit_tap": Twin(Reference, identity=("logit_tap",)),
    "embed_detach": Twin(Reference, identity=("embed_detach:gamma=1",)),
    "output_centering": Twin(OutputCentering),
    "swiglu_clamp": Twin(SwigluClamp, settings=("swiglu_clamp:limit=0.05",)),
}
