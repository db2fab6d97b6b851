"""Logit tap: read the largest attention logit of every head in the forward pass, exactly; QK-Clip goes by it.

Citation: Kimi Team 2025, "Kimi K2: Open Agentic Intelligence", arXiv 2507.20534 (the reading that QK-Clip needs).
Formula: S_h = max over sequences and visible pairs of scale · q_i·k_j, per query head h, over all training forward
    passes since the last reset.
Differs from the paper in: nothing known in what is read. The clip itself is no model method: it is the optimizer's
    hook `poise.optim.weights.qk_clip`, which changes the weights after a step by these readings.
Cost: a second product of queries and keys, forward only, a few rows at a time in at least fp32 (BUDGET bytes of
    logits at most, or one row); H numbers a block.
Acts: in every block, in forward passes of training (`model.train()`). It changes neither loss nor gradients.
Off: leave `logit_tap` out of the methods.
Numerics: logits are computed in at least fp32 from queries and keys in the compute dtype.

`readings(model)` returns the largest logits by block, `reset(model)` forgets them: whoever uses them resets once a
step, so that they are the largest of all micro-batches. They are of this rank alone; reduce them with MAX over ranks.
Activation checkpointing computes a block twice, which does no harm: the largest of the same is the same. Where a
method caps logits, the reading is before the cap.

Shapes: B batch, T positions, t positions of one piece, H query heads, G key/value heads, R = H / G, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.documents import Documents
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="logit_tap",
    kind="model",
    title="Reads the largest attention logit of every head in the forward pass, for QK-Clip to go by",
    citation="Kimi Team 2025, Kimi K2, arXiv 2507.20534",
    formula="S_h = max over visible pairs of scale <q_i, k_j>, since the last reset",
    acts="in every block, in training forward passes; the clip itself is the optimizer's hook `qk_clip`",
    cost="a second product of queries and keys, forward only, in pieces",
    off="leave `logit_tap` out of the methods",
)

_NORMED = "with normalised queries and keys the logits do not depend on the size of W_q and W_k, which QK-Clip scales"
_NORMING: Final = ("qk_norm", "qkv_norm", "qk_fc_norm", "hybrid_norm", "ngpt")
EXCLUDES: Final[Mapping[str, str]] = {
    **dict.fromkeys(_NORMING, _NORMED),
    "sigma_reparam": "queries, keys and values share one spectral norm, by which the matrix is divided: rows that "
    "QK-Clip scales down would make the values larger, and might themselves come back",
    "wesar": "QK-Clip scales rows of a matrix, and WeSaR's even updates rest on rows that all start with one "
    "deviation; the hook cannot scale the gates in their place",
    "mlra": "queries and keys come from two factors, and QK-Clip scales the rows of one plain matrix",
}

ACTS_LATER: Final = "it only reads; the optimizer's hook qk_clip changes weights once a logit is above the threshold"

BUDGET: Final = 16 << 20
"""Bytes of fp32 logits held at once."""


class LogitTap(nn.Module):
    """(q, k) -> the same, after taking note of the largest logit of every query head.

    Attributes:
        threshold: where QK-Clip shall begin; kept here for the hook, the tap has no use of it.
        largest_H: the largest logits since the last reset; -inf where there was none. Not saved.
    """

    def __init__(self, place: Place, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.scale: float = make("attn_scale", place)
        self.largest_H: Tensor
        self.register_buffer("largest_H", torch.empty(place.spec.n_heads), persistent=False)

    def fill_buffers(self) -> None:
        """Forget what was read."""
        self.largest_H.fill_(-math.inf)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, documents: Documents | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            first_BT = None if documents is None else documents.first
            with torch.no_grad():
                seen_H = largest(q_BHTK.detach(), k_BGTK.detach(), self.scale, first_BT=first_BT)
                self.largest_H.copy_(torch.maximum(self.largest_H, seen_H.to(self.largest_H.dtype)))
        return q_BHTK, k_BGTK


def largest(
    q_BHTK: Tensor, k_BGTK: Tensor, scale: float, budget: int = BUDGET, first_BT: Tensor | None = None
) -> Tensor:
    """Return the largest causal logit of every query head, (H,), at least fp32; with the first positions of documents
    the largest within documents."""
    B, H, T, K = q_BHTK.shape
    G = k_BGTK.shape[1]
    exact = torch.promote_types(q_BHTK.dtype, torch.float32)
    k_BG1TK = k_BGTK[:, :, None].to(exact)
    rows = max(1, budget // (4 * B * H * T))
    tops = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        q_BGRtK = q_BHTK[:, :, start:stop].reshape(B, G, H // G, stop - start, K).to(exact)
        logit_BGRtT = q_BGRtK @ k_BG1TK[:, :, :, :stop].mT
        future_tT = torch.ones(stop - start, stop, dtype=torch.bool, device=q_BHTK.device).triu(start + 1)
        logit_BGRtT = logit_BGRtT.masked_fill(future_tT, -math.inf)
        if first_BT is not None:
            foreign_BtT = torch.arange(stop, device=q_BHTK.device) < first_BT[:, start:stop, None]
            logit_BGRtT = logit_BGRtT.masked_fill(foreign_BtT[:, None, None], -math.inf)
        tops.append(logit_BGRtT.amax((0, 3, 4)).view(H))
    return torch.stack(tops).amax(0) * scale


def readings(model: nn.Module) -> dict[str, Tensor]:
    """Return the largest logits of every head since the last reset by block (``block.0``, ...), (H,), copies.

    -inf where there was no training forward pass; empty where the model has no taps.
    """
    return {f"block.{number}": tap.largest_H.detach().clone() for number, tap in enumerate(_taps(model))}


def reset(model: nn.Module) -> None:
    """Forget all readings."""
    for tap in _taps(model):
        tap.fill_buffers()


def _taps(model: nn.Module) -> list[LogitTap]:
    return [module for module in model.modules() if isinstance(module, LogitTap)]


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"qk_tap": {"logit_tap": LogitTap}}


def apply(spec: Spec, *, threshold: float = 100.0) -> Spec:
    """Return ``spec`` with logit taps.

    Args:
        spec: the model.
        threshold: logit above which the hook `qk_clip` is to scale queries and keys down.

    Raises:
        UserError: a threshold that is not above 0.
    """
    if not 0 < threshold < math.inf:
        raise UserError(f"logit_tap threshold is {threshold}; give a finite number above 0, e.g. 100")
    return spec.claim("qk_tap", Part.of("logit_tap", {"threshold": threshold}), "logit_tap")
