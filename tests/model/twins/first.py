"""Twins of qk_norm, z_loss, embed_norm and embed_scale."""

from __future__ import annotations

from typing import Final

import numpy as np
from tests.model.reference_decoder import Reference, logsumexp
from tests.model.twin import Twin


class QKNorm(Reference):
    def shape_qkv(self, q_HTK, k_GTK, v_GTK, a_TD):
        return self.norm(q_HTK, self.at + "attn.qk.q"), self.norm(k_GTK, self.at + "attn.qk.k"), v_GTK


class ZLoss(Reference):
    def terms(self, logits_TV):
        return 1e-4 * (logsumexp(logits_TV) ** 2).mean()


class EmbedNorm(Reference):
    def embed(self, ids):
        return self.norm(super().embed(ids), "embed_out")


class EmbedScale(Reference):
    def embed(self, ids):
        return np.sqrt(self.spec.d_model) * super().embed(ids)


TWINS: Final = {
    "qk_norm": Twin(QKNorm),
    "z_loss": Twin(ZLoss, identity=("z_loss:coefficient=0",)),
    "embed_norm": Twin(EmbedNorm),
    "embed_scale": Twin(EmbedScale, identity=("embed_scale:factor=1",)),
}
