"""The largest attention logit of a model on a few tokens, exactly.

Shapes: B sequences, T positions, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from poise.model.decoder import Decoder
from poise.model.documents import first_positions
from poise.model.methods.logit_tap import largest


@torch.no_grad()
def largest_logits(model: Decoder, inputs_BT: Tensor, documents_BT: Tensor | None = None) -> list[float]:
    """Return the largest attention logit of each block on these tokens, exactly; empty where there is none.

    A logit is ``scale · q·k`` of a query and a key that it may see, before any cap: one of its own document where
    ``documents_BT`` names them as ``Decoder.forward`` has it. It is made from the taps ``block.N.q`` and
    ``block.N.k``, listened to in here only.
    """
    taps = model.taps()
    numbers = [n for n in range(model.spec.n_layers) if {f"block.{n}.q", f"block.{n}.k"} <= taps.keys()]
    if not numbers:
        return []
    found: dict[int, Tensor] = {}
    first_BT = None if documents_BT is None else first_positions(documents_BT)
    with contextlib.ExitStack() as listening:
        for number in numbers:
            attn = cast(Any, model.trunk.blocks[number]).attn
            pair = _Pair(found, number, attn.scale, first_BT)
            for part in ("q", "k"):
                handle = taps[f"block.{number}.{part}"].register_forward_hook(pair.listener(part))
                listening.callback(handle.remove)
        training = model.training
        model.eval()
        model.hidden(inputs_BT, documents_BT=documents_BT)
        model.train(training)
    if len(found) < len(numbers):  # taps that nothing goes through
        return []
    values: list[float] = torch.stack([found[number] for number in numbers]).tolist()
    return values


class _Pair:
    """Waits for the queries and the keys of one block."""

    def __init__(self, found: dict[int, Tensor], number: int, scale: float, first_BT: Tensor | None) -> None:
        self._found, self._number, self._scale, self._first_BT = found, number, scale, first_BT
        self._heard: dict[str, Tensor] = {}

    def listener(self, part: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Return the hook of one of the two taps."""

        def hear(module: nn.Module, args: Any, out: Tensor) -> None:
            self._heard[part] = out
            if len(self._heard) == 2:
                q_BHTK, k_BGTK = self._heard.pop("q"), self._heard.pop("k")
                self._found[self._number] = largest(q_BHTK, k_BGTK, self._scale, first_BT=self._first_BT).amax()

        return hear
