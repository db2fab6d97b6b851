"""Which kernel computes the attention of a spec, in words."""

from __future__ import annotations

import torch

from poise.model.attention import SoftmaxScores, use_matmul
from poise.model.blockwise import Maps
from poise.model.flex import why_not_flex
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Spec


def attention_path(
    spec: Spec,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seq_len: int | None = None,
    *,
    documents: bool = False,
) -> str:
    """Return one sentence: how the attention of ``spec`` is computed, and why so.

    Args:
        spec: the model with its methods.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        dtype: the compute dtype.
        seq_len: positions in a sequence; the spec's own by default.
        documents: whether rows hold several documents that do not see each other.

    >>> from poise.model.presets import PRESETS
    >>> attention_path(PRESETS["7m"], "cuda", torch.bfloat16)
    "Torch's fused attention (SDPA): plain softmax attention."
    >>> attention_path(PRESETS["7m"], "cuda", torch.bfloat16, documents=True)
    "A compiled flex_attention kernel: torch's fused attention has no mask of documents."
    """
    place, kind = Place(spec, 1, "attn"), torch.device(device).type
    with torch.device("meta"):
        scores = make("scores", place, make("attn_scale", place))
    if isinstance(scores, SoftmaxScores) and (kind == "cpu" or not documents):
        return _plain(use_matmul(spec.seq_len if seq_len is None else seq_len, dtype, kind), documents)
    maps = Maps(scores.scale) if isinstance(scores, SoftmaxScores) else getattr(scores, "maps", None)
    if not isinstance(maps, Maps):
        return f"What the part '{spec.scores.name}' of the slot 'scores' computes by itself."
    change = "mask of documents" if isinstance(scores, SoftmaxScores) else _change(maps)
    reason = why_not_flex(maps, kind, dtype, spec.head_dim)
    if not reason:
        return f"A compiled flex_attention kernel: torch's fused attention has no {change}."
    blocks = "Blocks of scores, computed again in the backward pass"
    return f"{blocks}: torch's fused attention has no {change}, and {reason}."


def _plain(matmul: bool, documents: bool) -> str:
    """Plain softmax attention; with documents on a CPU."""
    if matmul:
        mask = " A mask of each row keeps documents apart." if documents else ""
        return "Plain matrix products: on a CPU they are faster for short sequences in this dtype." + mask
    if documents:
        return (
            "Torch's fused attention (SDPA), one call for each document; over whole rows with a mask where documents "
            "are many and short, or the trunk is compiled."
        )
    return "Torch's fused attention (SDPA): plain softmax attention."


def _change(maps: Maps) -> str:
    if maps.clips:
        return "clip of probabilities"
    return "cap of logits" if maps.cap else "sink"
