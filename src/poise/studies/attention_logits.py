"""The largest attention logit of a model on a few tokens, exactly.

Shapes: B sequences, T positions, H query heads, G key heads, K head width, R query rows of a block of work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from poise.model.decoder import Decoder

BLOCK_ROWS: Final = 256


@torch.no_grad()
def largest_logits(model: Decoder, inputs_BT: Tensor) -> list[float]:
    """Return the largest attention logit of each block on these tokens, exactly; empty where there is none.

    A logit is ``scale · q·k`` of a query and a key that it may see, before any cap. It is made from the taps
    ``block.N.q`` and ``block.N.k``, listened to in here only.
    """
    taps = model.taps()
    numbers = [n for n in range(model.spec.n_layers) if {f"block.{n}.q", f"block.{n}.k"} <= taps.keys()]
    if not numbers:
        return []
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as listening:
        for number in numbers:
            attn = cast(Any, model.trunk.blocks[number]).attn
            scale = getattr(attn, "scale", None)
            pair = _Pair(found, number, scale if isinstance(scale, float) else None)
            for part in ("q", "k"):
                handle = taps[f"block.{number}.{part}"].register_forward_hook(pair.listener(part))
                listening.callback(handle.remove)
        training = model.training
        model.eval()
        model.hidden(inputs_BT)
        model.train(training)
    if len(found) < len(numbers):  # taps that nothing goes through
        return []
    values: list[float] = torch.stack([found[number] for number in numbers]).tolist()
    return values


class _Pair:
    """Waits for the queries and the keys of one block."""

    def __init__(self, found: dict[int, Tensor], number: int, scale: float | None) -> None:
        self._found, self._number, self._scale = found, number, scale
        self._heard: dict[str, Tensor] = {}

    def listener(self, part: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Return the hook of one of the two taps."""

        def hear(module: nn.Module, args: Any, out: Tensor) -> None:
            self._heard[part] = out
            if len(self._heard) == 2:
                q_BHTK, k_BGTK = self._heard.pop("q"), self._heard.pop("k")
                scale = self._scale if self._scale is not None else q_BHTK.shape[-1] ** -0.5
                self._found[self._number] = largest_product(q_BHTK, k_BGTK) * scale

        return hear


def largest_product(q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
    """Return the largest ``q·k`` over keys at or before the query, 0-dim fp32; at no time all T x T products exist."""
    H, T, G = q_BHTK.shape[1], q_BHTK.shape[2], k_BGTK.shape[1]
    k_BHTK = k_BGTK.float().repeat_interleave(H // G, 1)
    best = torch.full((), -math.inf, device=q_BHTK.device)
    for start in range(0, T, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, T)
        products_BHRT = q_BHTK[:, :, start:end].float() @ k_BHTK[:, :, :end].mT
        later_RT = torch.ones(end - start, end, dtype=torch.bool, device=q_BHTK.device).triu(start + 1)
        best = torch.maximum(best, products_BHRT.masked_fill_(later_RT, -math.inf).amax())
    return best
