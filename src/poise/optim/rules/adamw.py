"""AdamW: the direction of Adam, with decoupled weight decay.

Citation: Loshchilov and Hutter 2019, Decoupled weight decay regularization, arXiv 1711.05101; Adam: Kingma
and Ba 2015, arXiv 1412.6980.
Formula: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
+ wd p; p = p - lr u.
Differs from the paper in: decay is multiplied by the learning rate, as in every current library; moments
are at least fp32, also for 16-bit weights, because a bf16 second moment stops decaying.
Acts: on every update. Cost: two moments per parameter; 28 bytes moved per fp32 parameter and step at the
least.
Switch off: choose another direction.

``Chain`` runs [ClipGlobalNorm,] AdamW on fp32 weights through torch's fused kernel instead of this file;
the numbers agree to rounding, and the state has the same names as that of ``torch.optim.AdamW``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.optim.facts import working_dtype
from poise.optim.transform import Info, Stage

CARD = Card(
    name="adamw",
    kind="optimizer",
    title="Adam with decoupled weight decay",
    citation="Loshchilov and Hutter 2019, Decoupled weight decay regularization, arXiv 1711.05101",
    formula="u = mhat / (sqrt(vhat) + eps) + wd p; p = p - lr u",
    acts="every update",
    cost="two moments per parameter; torch's fused kernel where weights are fp32",
    off="choose another optimizer",
    differs="decay is multiplied by the learning rate; moments are at least fp32",
)


@dataclass(frozen=True)
class AdamW:
    """The AdamW direction; ``weight_decay`` is the default of the chain's groups."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    name: ClassVar[str] = "adamw"
    stage: ClassVar[Stage] = "direction"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; use at least 0, less than 1")
        for name in ("eps", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise UserError(f"optim.{name} is {value}; use a finite number of 0 or more")

    def init(self, p: Tensor) -> dict[str, Tensor]:
        """Return zero moments in the shape of ``p``."""
        dtype = working_dtype(p)
        return {
            "exp_avg": torch.zeros_like(p, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype),
        }

    def update(self, u: Tensor, state: dict[str, Any], p: Tensor, info: Info) -> Tensor:
        """Return the direction, decay included."""
        m = state["exp_avg"] * self.beta1 + u * (1 - self.beta1)
        v = state["exp_avg_sq"] * self.beta2 + u * u * (1 - self.beta2)
        state["exp_avg"], state["exp_avg_sq"] = m, v
        step = info.step.to(u.dtype)
        m_hat = m / _correction(self.beta1, step)
        v_hat = v / _correction(self.beta2, step)
        direction: Tensor = m_hat / (v_hat.sqrt() + self.eps)
        return direction + p * info.weight_decay if info.weight_decay else direction


def _correction(beta: float, step: Tensor) -> Tensor:
    """Return 1 - beta^step; through expm1, because 1 - 0.999^1 in fp32 has only four good digits."""
    return -torch.expm1(step * math.log(beta)) if beta > 0.0 else torch.ones_like(step)
