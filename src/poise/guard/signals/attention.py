"""Largest logit, entropy and first-key share of softmax attention, exact, without a T × T tensor for all heads.

Formulas, with logits z over the keys S that a query may see, p = softmax(z), n = number of visible keys:

    max logit    max of z over everything visible
    entropy      mean over queries of (−Σ p ln p) / ln n, so 0 is one key and 1 is all keys alike
    first key    mean over queries of p at key 0

Queries that see fewer than two keys are left out of both means: their entropy says nothing. Everything is computed
in float32, a block of queries of all heads at a time. Memory beyond q and k: about four times ``BUDGET`` float32
numbers (4 MiB on a CPU, 64 MiB elsewhere), whatever the sequence length. float32 products follow the user's setting of
TF32; bf16 queries and keys are not affected by it.

What is measured is what enters the softmax. Soft-capped attention (Gemma 2): the logits after the cap. Attention
sinks (GPT-OSS), written as one more column of logits: that column counts as a visible key. Keys hidden by a mask value
of −1e8 or lower (fp16: half of its range) count as hidden; a milder additive mask counts as visible.

``Intercept`` sees ``F.scaled_dot_product_attention`` and 4-D softmax over the last dimension, called from Python. It
cannot see the flash-attn and xformers packages, flex attention, ``nn.MultiheadAttention``, fused kernels outside torch,
and anything inside a compiled region. Their readings are absent, not wrong.

Shapes: B sequences, H query heads, G key heads (H a multiple of G), R = H / G, T queries, S keys, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

BUDGET: Final[Mapping[str, int]] = {"cpu": 1 << 18, "other": 1 << 22}
"""Logits that are held at once, by device type; on a CPU about a second-level cache."""

_SOFTMAX: Final = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


@dataclass
class AttentionTally:
    """Sums over blocks, heads, sequences and calls; all entries are 0-dim float32 tensors on the device."""

    tops: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    firsts: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)

    def readings(self) -> dict[str, Tensor]:
        """Return ``attn_logit_max``, ``attn_entropy`` and ``first_token``; empty if nothing was added."""
        if not self.tops:
            return {}
        n = torch.stack(self.queries).sum()
        return {
            "attn_logit_max": torch.stack(self.tops).amax(),
            "attn_entropy": torch.stack(self.entropies).sum() / n,
            "first_token": torch.stack(self.firsts).sum() / n,
        }

    def add(self, logits_BHTS: Tensor) -> None:
        """Count one block of float32 logits in which hidden keys are −inf."""
        hidden_BHTS = logits_BHTS == float("-inf")
        visible_BHT = (~hidden_BHTS).sum(-1)
        log_p_BHTS = torch.log_softmax(logits_BHTS, -1)
        p_BHTS = log_p_BHTS.exp()
        entropy_BHT = -(p_BHTS * log_p_BHTS.masked_fill_(hidden_BHTS, 0.0)).sum(-1)
        counted_BHT = visible_BHT >= 2
        share_BHT = entropy_BHT / visible_BHT.clamp(min=2).log()
        self.tops.append(logits_BHTS.amax())
        self.entropies.append(share_BHT.where(counted_BHT, 0.0).sum())
        self.firsts.append(p_BHTS[..., 0].where(counted_BHT, 0.0).sum())
        self.queries.append(counted_BHT.sum())


def tally_queries_keys(
    tally: AttentionTally,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    budget: int | None = None,
) -> None:
    """Count the attention of queries and keys as the scores see them: after RoPE and any norm.

    Args:
        tally: what to add to.
        q_BHTK: queries (B, H, T, K), any floating dtype.
        k_BGSK: keys (B, G, S, K); query head h uses key head h // (H / G).
        scale: factor on q · k; ``None`` is 1 / √K.
        causal: query t sees keys 0 .. t, counted from the top left, as in torch.
        mask: like ``attn_mask`` of ``F.scaled_dot_product_attention``: bool (true takes part) or added; broadcast.
        budget: logits held at once; ``None`` is ``BUDGET``.
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1], k_BGSK.shape[2]
    k_BGSK = k_BGSK.float()
    factor = K**-0.5 if scale is None else scale
    device = q_BHTK.device
    mask_4D = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    queries = max(1, (budget or _budget(device)) // (B * H * S))
    for first in range(0, T, queries):
        last = min(first + queries, T)
        keys = min(S, last) if causal else S
        q_BGtK = (q_BHTK[:, :, first:last].float() * factor).reshape(B, G, H // G * (last - first), K)
        logits_BHtS = (q_BGtK @ k_BGSK[:, :, :keys].mT).view(B, H, last - first, keys)
        if mask_4D is not None:
            part = _part(mask_4D, first, last, keys)
            if part.dtype == torch.bool:
                logits_BHtS.masked_fill_(~part, float("-inf"))
            else:
                logits_BHtS.add_(part).masked_fill_(part <= _hidden_below(part.dtype), float("-inf"))
        if causal and keys > first + 1:
            future_tS = torch.arange(keys, device=device) > torch.arange(first, last, device=device)[:, None]
            logits_BHtS.masked_fill_(future_tS, float("-inf"))
        tally.add(logits_BHtS)


def tally_logits(tally: AttentionTally, logits_BHTS: Tensor, *, budget: int | None = None) -> None:
    """Count logits (B, H, T, S) that a model has computed itself and is about to give to softmax."""
    B, H, T, S = logits_BHTS.shape
    bar = _hidden_below(logits_BHTS.dtype)
    queries = max(1, (budget or _budget(logits_BHTS.device)) // (B * H * S))
    for first in range(0, T, queries):
        part_BHtS = logits_BHTS[:, :, first : first + queries]
        tally.add(part_BHtS.float().masked_fill(part_BHtS <= bar, float("-inf")))


class Intercept(TorchFunctionMode):
    """While entered, hand the arguments of every attention to a reader, then call torch unchanged.

    Args:
        on_attention: called with (query, key, scale, causal, mask) before ``F.scaled_dot_product_attention``.
        on_logits: called with the input of a 4-D softmax over the last dimension.
    """

    def __init__(
        self,
        on_attention: Callable[[Tensor, Tensor, float | None, bool, Tensor | None], None],
        on_logits: Callable[[Tensor], None],
    ) -> None:
        super().__init__()
        self._on_attention, self._on_logits = on_attention, on_logits

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if torch.compiler.is_compiling():  # a function is compiled while we listen: stay out of its graph
            return func(*args, **named)
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | named
            if given["query"].dim() == 4:
                causal, mask = bool(given.get("is_causal", False)), given.get("attn_mask")
                self._on_attention(given["query"], given["key"], given.get("scale"), causal, mask)
        elif func in _SOFTMAX:
            logits = args[0] if args else named.get("input")
            dim = args[1] if len(args) > 1 else named.get("dim")
            if isinstance(logits, Tensor) and logits.dim() == 4 and dim in (-1, 3):
                self._on_logits(logits)
        return func(*args, **named)


def _budget(device: torch.device) -> int:
    return BUDGET["cpu" if device.type == "cpu" else "other"]


def _hidden_below(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).min / 2, -1e8)


def _part(mask_4D: Tensor, first: int, last: int, keys: int) -> Tensor:
    """Cut the queries and keys of one block out of a mask, leaving broadcast dimensions alone."""
    if mask_4D.shape[2] > 1:
        mask_4D = mask_4D[:, :, first:last]
    return mask_4D[..., :keys] if mask_4D.shape[3] > 1 else mask_4D
