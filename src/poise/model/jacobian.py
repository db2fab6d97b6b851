"""The true norm of every branch's Jacobian, measured on a model: what ``bound`` is an upper bound of.

Power iteration on JᵀJ, with J the Jacobian of what a branch adds with respect to the residual stream that enters it,
over whole sequences: Jv from a central difference (in float64 exact to about 1e-8), Jᵀu from autograd. It goes through
hooks, so every method of the model is in it, and custom backward functions need no forward mode. The result is below
the norm until the iteration has converged, never above. Where the residual connection is no sum (Post-LN) it says
nothing.

Shapes: B sequences, T positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from poise.model.decoder import Decoder


def branch_norms(model: Decoder, ids_BT: Tensor, *, rounds: int = 20, seed: int = 0) -> dict[tuple[int, str], float]:
    """Return (1-based layer, ``attn`` or ``mlp``) -> norm of the branch's Jacobian; waits for the device.

    Args:
        model: built with ``compute_dtype=torch.float64``.
        ids_BT: token ids (B, T).
        rounds: of the power iteration, each three forwards and a backward.
        seed: of the first vector.
    """
    assert model.compute_dtype == torch.float64, "differences need float64"
    taps, out = model.taps(), dict[tuple[int, str], float]()
    for number, block in enumerate(cast(list[Any], model.trunk.blocks)):
        before = taps["embed"] if number == 0 else taps[f"block.{number - 1}.residual"]
        for branch, source, add in (("attn", before, block.attn_add), ("mlp", block.attn_add, block.mlp_add)):
            route = _Route(model, ids_BT, source, taps[f"block.{number}.{branch}_out"], add)
            out[number + 1, branch] = _norm(route, rounds, seed)
    return out


@dataclass(frozen=True)
class _Route:
    """From the output of ``source`` to that of ``target``, and on through the residual connection ``add``."""

    model: Decoder
    ids: Tensor
    source: nn.Module
    target: nn.Module
    add: nn.Module

    def __call__(self, shift_BTD: Tensor) -> Tensor:
        """What is added to the stream when ``shift_BTD`` is added to the stream that enters."""
        kept: list[Tensor] = []
        handles = [
            self.source.register_forward_hook(lambda module, args, out: out + shift_BTD),
            self.target.register_forward_hook(lambda module, args, out: kept.append(out)),
        ]
        try:
            self.model.hidden(self.ids)
        finally:
            for handle in handles:
                handle.remove()
        added: Tensor = self.add(torch.zeros_like(kept[-1]), kept[-1])
        return added


def _norm(route: _Route, rounds: int, seed: int) -> float:
    shape = (*route.ids.shape, route.model.spec.d_model)
    generator, step = torch.Generator().manual_seed(seed), 1e-5
    v_BTD = torch.randn(shape, generator=generator, dtype=torch.float64).to(route.ids.device)
    size = 0.0
    for _ in range(rounds):
        v_BTD = v_BTD / v_BTD.norm()
        with torch.no_grad():
            push_BTD = (route(step * v_BTD) - route(-step * v_BTD)) / (2 * step)
        shift_BTD = torch.zeros_like(v_BTD, requires_grad=True)
        (v_BTD,) = torch.autograd.grad(route(shift_BTD), shift_BTD, push_BTD)
        size = math.sqrt(float(v_BTD.norm()))
        if size == 0.0:
            break
    return size
