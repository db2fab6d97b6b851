"""Attention sink: each head has a logit in its softmax that has no value, so that it can attend to nothing.

Citation: gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925: a learned bias in the
    denominator of each head's softmax); with a fixed logit of 0 Miller 2023, "Attention Is Off By One",
    evanmiller.org/attention-is-off-by-one.html. That heads otherwise make a sink of the first tokens: Xiao et al. 2023,
    "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, who compare a fixed sink ("zero sink")
    with a learnable token that, unlike here, has a value.
Formula: p_j = exp(z_j) / (exp(s_h) + sum_k exp(z_k)); output = softmax(z) v · sigmoid(logsumexp(z) - s_h).
Differs from the paper in: the model card gives no starting value; ours is s_h = 0, where Miller's is fixed.
Cost: H parameters a block. On a GPU flex_attention and its log-sum-exp; on a CPU blocks of scores with their own
    backward, which computes them again.
Acts: in every block, every step, in the normaliser of the attention softmax.
Off: leave `attention_sink` out of the methods. A logit of -inf would be the same.

Numerics: in bf16 the logits, the softmax and the sink's share are in fp32.
There is another way to the same numbers: a key of zeros with a value of zeros in front, and one more coordinate of
queries and keys that carries s_h, so that a fused kernel serves. It copies queries, keys and values, widens the heads
past their power of two and rounds s_h to bf16; the blocks take about as long as the fused kernel alone.

Shapes: B batch, T positions, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.blockwise import Maps
from poise.model.documents import Documents
from poise.model.flex import changed_attention
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="attention_sink",
    kind="model",
    title="Gives each head a logit without a value, so that it can attend to nothing",
    citation="gpt-oss, OpenAI 2025, arXiv 2508.10925; Miller 2023, Attention Is Off By One; see also arXiv 2309.17453",
    formula="p_j = exp(z_j) / (exp(s_h) + sum_k exp(z_k))",
    acts="in every block, every step, in the normaliser of the attention softmax",
    cost="H parameters a block; attention leaves torch's fused kernel: flex_attention on a GPU, blocks on a CPU",
    off="leave `attention_sink` out of the methods",
    differs="the model card gives no starting value for the learned logit; ours is 0",
)

EXCLUDES: Final[Mapping[str, str]] = {}

KERNEL: Final = (
    "flex_attention on a GPU, its output times sigmoid(lse - s); "
    "on a CPU blocks of scores, computed again in the backward pass"
)


class AttentionSink(nn.Module):
    """Causal attention with ``exp(s)`` of each query head added to the softmax's normaliser."""

    def __init__(self, place: Place, scale: float, init: float, learned: bool) -> None:
        super().__init__()
        self.maps, self.start = Maps(scale), init
        self.sink: Tensor
        empty_H = torch.empty(place.spec.n_heads)
        if learned:
            self.sink = nn.Parameter(empty_H)
            self.param_roles, self.param_fill = {"sink": "gain"}, {"sink": init}
        else:  # a function of the spec, so it is not saved
            self.register_buffer("sink", empty_H, persistent=False)

    def fill_buffers(self) -> None:
        """Set a sink that is not learned."""
        if not isinstance(self.sink, nn.Parameter):
            self.sink.fill_(self.start)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents | None = None) -> Tensor:
        first_BT = None if documents is None else documents.first
        return changed_attention(q_BHTK, k_BGTK, v_BGTK, self.maps, self.sink, first_BT=first_BT)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"scores": {"attention_sink": AttentionSink}}


def apply(spec: Spec, *, init: float = 0.0, learned: bool = True) -> Spec:
    """Return ``spec`` with a sink in every head.

    Args:
        spec: the model without it.
        init: the sinks' logit at the start.
        learned: whether it is a parameter; fixed at 0 it is Miller's softmax1.

    Raises:
        UserError: a starting value that is not finite.
    """
    if not abs(init) < float("inf"):
        raise UserError(f"attention_sink init is {init}; give a finite number, e.g. 0, or leave attention_sink out")
    return spec.claim("scores", Part.of("attention_sink", {"init": init, "learned": learned}), "attention_sink")
