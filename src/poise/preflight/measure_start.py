"""The start of a model: sizes of weights, stream, branches and logits by layer, and one backward pass.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.model.build import build
from poise.model.decoder import Decoder
from poise.model.spec import Spec
from poise.studies.attention_logits import largest_logits


@dataclass(frozen=True, slots=True)
class Layer:
    """One block before the first step. Deviations are root mean squares.

    Attributes:
        number: from 0.
        weights: role of a matrix -> its deviation.
        stream: deviation of the residual stream behind the block.
        attn, mlp: of what the two branches add.
        entering: of the stream that enters the block.
        logit: largest attention logit; ``nan`` where the model has none.
        gradient: norm of the gradient of all its weights.
    """

    number: int
    weights: dict[str, float]
    stream: float
    attn: float
    mlp: float
    entering: float
    logit: float
    gradient: float


@dataclass(frozen=True, slots=True)
class Start:
    """A model before its first step.

    Attributes:
        loss: cross-entropy in nats.
        nothing: ln V, that of knowing nothing.
        logits: deviation of the output logits.
        embedded: deviation of the stream behind the embedding.
        layers: the blocks.
        embedding: share of the squared norm of the whole gradient that the embedding's weights have.
        gradient: norm of the whole gradient.
    """

    loss: float
    nothing: float
    logits: float
    embedded: float
    layers: tuple[Layer, ...]
    embedding: float
    gradient: float

    @property
    def profile(self) -> float:
        """Norm of the first block's gradient over the last one's."""
        last = self.layers[-1].gradient
        return self.layers[0].gradient / last if last > 0 else math.inf

    @property
    def first_branch(self) -> float:
        """The larger branch of the first block over the stream that enters it."""
        first = self.layers[0]
        return max(first.attn, first.mlp) / first.entering if first.entering > 0 else math.inf


def start(spec: Spec, batch: tuple[Tensor, Tensor], seed: int, device: torch.device) -> Start:
    """Build a model, send one batch forward and backward, and look at it."""
    model = build(spec, seed=seed, device=device)
    inputs_BT, targets_BT = (part.to(device) for part in batch)
    sizes = _deviations(model, inputs_BT)
    logits = largest_logits(model, inputs_BT)
    out = model(inputs_BT, targets_BT)
    out.loss.backward()
    squares = {
        name: 0.0 if p.grad is None else float(p.grad.double().square().sum()) for name, p in model.named_parameters()
    }
    roles, total = model.roles(), sum(squares.values())
    embedding = sum(square for name, square in squares.items() if roles[name] in ("embedding", "head"))
    layers = []
    for n in range(spec.n_layers):
        inside = f"trunk.blocks.{n}."
        weights = {
            roles[name]: _rms(p.detach())
            for name, p in model.named_parameters()
            if name.startswith(inside) and p.ndim == 2
        }
        layers.append(
            Layer(
                n,
                weights,
                stream=sizes.get(f"block.{n}.residual", math.nan),
                attn=sizes.get(f"block.{n}.attn_out", math.nan),
                mlp=sizes.get(f"block.{n}.mlp_out", math.nan),
                entering=sizes.get("embed" if n == 0 else f"block.{n - 1}.residual", math.nan),
                logit=logits[n] if n < len(logits) else math.nan,
                gradient=math.sqrt(sum(square for name, square in squares.items() if name.startswith(inside))),
            )
        )
    share = embedding / total if total > 0 and math.isfinite(total) else math.nan
    return Start(
        loss=float(out.ce.detach()),
        nothing=math.log(spec.vocab_size),
        logits=sizes["logits"],
        embedded=sizes.get("embed", math.nan),
        layers=tuple(layers),
        embedding=share,
        gradient=math.sqrt(total) if total >= 0 else math.nan,
    )


@torch.no_grad()
def _deviations(model: Decoder, inputs_BT: Tensor) -> dict[str, float]:
    """Return the root mean square of what goes through every tap, and of the logits."""
    found: dict[str, float] = {}

    def listener(name: str) -> Callable[[Any, Any, Tensor], None]:
        def listen(module: Any, args: Any, out: Tensor) -> None:
            found[name] = _rms(out)

        return listen

    handles = [tap.register_forward_hook(listener(name)) for name, tap in model.taps().items()]
    try:
        logits_BTV = model.logits(inputs_BT)
    finally:
        for handle in handles:
            handle.remove()
    found["logits"] = float(logits_BTV.float().std())
    return found


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
