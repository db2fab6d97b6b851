"""Twins of the placement methods: where the norms stand."""

from __future__ import annotations

from typing import Final

import numpy as np
from tests.model.reference_decoder import Reference
from tests.model.twin import Twin

from poise.model.spec import Part


class PostLN(Reference):
    """x <- norm(weight · x + f(x)); the final norm only where the spec has it."""

    def stream_weight(self):
        return 1.0

    def attn_in(self, x_TD):
        return x_TD

    def mlp_in(self, x_TD):
        return x_TD

    def add(self, x_TD, out_TD, branch):
        return self.norm(self.stream_weight() * x_TD + out_TD, f"{self.at}{branch}_add.norm")

    def final(self, x_TD):
        return x_TD if self.spec.final_norm.name == "none" else super().final(x_TD)


class DeepNorm(PostLN):
    def stream_weight(self):
        return np.sqrt(np.sqrt(2.0 * self.spec.n_layers))


class SandwichLN(Reference):
    def branch_out(self, out_TD, branch):
        return self.norm(out_TD, f"{self.at}{branch}_branch")


class PeriLN(SandwichLN):
    def embed(self, ids):
        return self.norm(super().embed(ids), "embed_out")


class Olmo2Norm(SandwichLN):
    def attn_in(self, x_TD):
        return x_TD

    def mlp_in(self, x_TD):
        return x_TD


class MixLN(Reference):
    """A quarter of the blocks is Post-LN; of the tests' two blocks the first."""

    def post(self):
        return self.layer == 1

    def attn_in(self, x_TD):
        return x_TD if self.post() else super().attn_in(x_TD)

    def mlp_in(self, x_TD):
        return x_TD if self.post() else super().mlp_in(x_TD)

    def add(self, x_TD, out_TD, branch):
        total_TD = x_TD + out_TD
        return self.norm(total_TD, f"{self.at}{branch}_add.norm") if self.post() else total_TD


class HeadNorms(Reference):
    """Norms per head on queries, keys and values."""

    def shape_qkv(self, q_HTK, k_GTK, v_GTK, a_TD):
        q_HTK, k_GTK = self.norm(q_HTK, self.at + "attn.qk.q"), self.norm(k_GTK, self.at + "attn.qk.k")
        return q_HTK, k_GTK, self.norm(v_GTK, self.at + "attn.values.v")


class QKVNorm(HeadNorms):
    def attn_in(self, x_TD):
        return x_TD


class HybridNorm(HeadNorms):
    """y = x + attention, x <- norm(y) + MLP(norm(y))."""

    def block(self, x_TD):
        y_TD = x_TD + self.attention(x_TD)
        y_TD = self.norm(y_TD, self.at + "attn_add.norm")
        return y_TD + self.mlp(y_TD)


class HybridNormStar(HybridNorm):
    def block(self, x_TD):
        if self.layer > 1:
            return super().block(x_TD)
        y_TD = x_TD + self.attention(self.norm(x_TD, self.at + "attn_in"))
        return y_TD + self.mlp(self.norm(y_TD, self.at + "mlp_in"))


class QKFCNorm(SandwichLN):
    def shape_qkv(self, q_HTK, k_GTK, v_GTK, a_TD):
        return self.norm(q_HTK, self.at + "attn.qk.q"), self.norm(k_GTK, self.at + "attn.qk.k"), v_GTK


class WidthQKNorm(Reference):
    """OLMo 2: one norm over all heads of a position."""

    def shape_qkv(self, q_HTK, k_GTK, v_GTK, a_TD):
        out = []
        for name, x_HTK in (("q", q_HTK), ("k", k_GTK)):
            rows_TD = np.concatenate(list(x_HTK), -1)
            normed_TD = self.norm(rows_TD, f"{self.at}attn.qk.{name}")
            out.append(np.stack(np.split(normed_TD, len(x_HTK), -1)))
        return *out, v_GTK


class SubLN(Reference):
    def after_mix(self, out_TD, a_TD):
        return self.norm(out_TD, self.at + "attn.mid")

    def mlp_mid(self, hidden_TF):
        return self.norm(hidden_TF, self.at + "mlp.mid")


class LayerNormScaling(Reference):
    def attn_in(self, x_TD):
        return self.norm(x_TD, self.at + "attn_in.norm") / np.sqrt(self.layer)

    def mlp_in(self, x_TD):
        return self.norm(x_TD, self.at + "mlp_in.norm") / np.sqrt(self.layer)


_NO_INPUT_NORM = {"attn_in.weight": "there is no norm before attention", "mlp_in.weight": "nor before the MLP"}
_XAVIER = dict.fromkeys(
    ("embedding.weight", "qkv.weight", "attn.out.weight", "mlp.inner.weight", "mlp.out.weight"),
    "the method has starting values of its own",
)

TWINS: Final = {
    "pre_ln": Twin(Reference, sizes={"branch_in": Part("none")}),
    "post_ln": Twin(PostLN, replaces=_NO_INPUT_NORM),
    "peri_ln": Twin(PeriLN),
    "sandwich_ln": Twin(SandwichLN),
    "olmo2_norm": Twin(Olmo2Norm, replaces=_NO_INPUT_NORM),
    "mix_ln": Twin(
        MixLN,
        identity=("mix_ln:a=0",),
        replaces={"blocks.0.attn_in.weight": "the first block is Post-LN", "blocks.0.mlp_in.weight": "the same"},
    ),
    "hybrid_norm": Twin(HybridNorm, replaces=_NO_INPUT_NORM),
    "deep_norm": Twin(DeepNorm, replaces=_NO_INPUT_NORM | _XAVIER),
    "sub_ln": Twin(SubLN, replaces=_XAVIER),
    "layer_norm_scaling": Twin(
        LayerNormScaling,
        replaces={
            "attn_in.weight": "is now attn_in.norm.weight",
            "mlp_in.weight": "is now mlp_in.norm.weight",
            "attn.out.weight": "starts unscaled",
            "mlp.out.weight": "starts unscaled",
        },
    ),
    "qkv_norm": Twin(QKVNorm, replaces={"attn_in.weight": "there is no norm before attention"}),
    "qk_fc_norm": Twin(QKFCNorm),
}
