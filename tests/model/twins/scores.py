"""Twins of soft_temp, soft_cap, soft_clip, attention_sink and final_soft_cap."""

from __future__ import annotations

from typing import Final

import numpy as np
from tests.model.reference_decoder import Reference
from tests.model.twin import Twin

from poise.model.spec import Part


class SoftTemp(Reference):
    def scale(self):
        return 0.5 / np.sqrt(self.spec.head_dim)


class SoftCap(Reference):
    def cap(self, logits_TT):
        return 2 * np.tanh(logits_TT / 2)


class SoftClip(Reference):
    def probabilities(self, logits_TT, head):
        return np.clip((1.03 - -0.03) * super().probabilities(logits_TT, head) - 0.03, 0, 1)


class AttentionSink(Reference):
    def probabilities(self, logits_TT, head):
        sink_T1 = np.full((len(logits_TT), 1), self.w[self.at + "attn.scores.sink"][head])
        return super().probabilities(np.concatenate([logits_TT, sink_T1], -1), head)[:, :-1]


class FinalSoftCap(Reference):
    def logits(self, x_TD):
        return 3 * np.tanh(super().logits(x_TD) / 3)


TWINS: Final = {
    "soft_temp": Twin(SoftTemp, identity=("soft_temp:beta=1",)),
    # At the usual start logits are so small that a cap changes no bit.
    "soft_cap": Twin(SoftCap, settings=("soft_cap:cap=2",), sizes={"init": Part.of("default", {"std": 0.3})}),
    "soft_clip": Twin(SoftClip),
    "attention_sink": Twin(AttentionSink),
    "final_soft_cap": Twin(FinalSoftCap, settings=("final_soft_cap:cap=3",)),
}
