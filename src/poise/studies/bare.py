"""The optimizer of a loop without protection: torch's AdamW after ``clip_grad_norm_``, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.optim.build import OptimConfig
from poise.optim.chain import Chain


class BareAdamW(torch.optim.AdamW):
    """Takes the place of a run's ``Chain``, with its groups; a non-finite gradient goes straight into the weights."""

    def __init__(self, chain: Chain, config: OptimConfig) -> None:
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in chain.param_groups]
        super().__init__(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
        self._max_norm = config.clip_norm

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.param_groups[0]["lr"])

    def set_lr(self, value: float) -> None:
        """Set it in all groups."""
        for group in self.param_groups:
            group["lr"] = value

    def measure(self) -> Tensor:
        """Return the global norm of the gradient."""
        return torch.nn.utils.get_total_norm(
            [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        )

    def step(self, closure: Any = None, *, max_norm: float | None = None) -> Any:
        """Clip and step, as most loops do."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm or self._max_norm)
        return super().step(closure)
