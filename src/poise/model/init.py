"""Starting values by role of a parameter, each parameter from a random stream of its own name.

A parameter's values depend on (seed, its name) only: adding a module or a method leaves
the others as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.rng import derive
from poise.model.place import Place

RESIDUAL_ROLES: Final = ("attn_out", "mlp_out")
"""Matrices whose output is added to the residual stream."""


class Init(Protocol):
    """What an ``init`` slot builds: the standard deviation of each matrix role."""

    def std(self, role: str) -> float:
        """Return the standard deviation of a parameter with this role."""
        ...


class DefaultInit:
    """``std`` everywhere; residual outputs times ``1 / sqrt(2 N)`` (GPT-2, Radford et al. 2019).

    Args:
        place: outside the blocks.
        std: of every matrix, the untied head included.
        embedding_std: of the embedding; a tied head is the embedding.
        scale_residual: whether ``attn_out`` and ``mlp_out`` are divided by sqrt(2 N).
    """

    def __init__(
        self, place: Place, std: float = 0.02, embedding_std: float = 0.02, scale_residual: bool = True
    ) -> None:
        for name, value in (("std", std), ("embedding_std", embedding_std)):
            if not value > 0:
                raise UserError(f"init {name} is {value}; give a number above 0")
        self._std, self._embedding_std = std, embedding_std
        self._residual = std / math.sqrt(2 * place.spec.n_layers) if scale_residual else std

    def std(self, role: str) -> float:
        if role == "embedding":
            return self._embedding_std
        return self._residual if role in RESIDUAL_ROLES else self._std


class SmallInit:
    """``sqrt(2 / (5 D))`` everywhere, residual outputs times ``1 / sqrt(2 N)``.

    Nguyen and Salazar 2019 (arXiv 1910.05895); the vanilla initialisation of Takase et al.
    (arXiv 2312.16903).
    """

    def __init__(self, place: Place) -> None:
        self._std = math.sqrt(2 / (5 * place.spec.d_model))
        self._residual = self._std / math.sqrt(2 * place.spec.n_layers)

    def std(self, role: str) -> float:
        return self._residual if role in RESIDUAL_ROLES else self._std


def initialise(model: nn.Module, init: Init, seed: int) -> None:
    """Fill every parameter and every computed buffer of ``model`` in place.

    Matrices are normal, cut off at three standard deviations (which makes the true deviation 1.3 % smaller).
    Random numbers are drawn on the CPU, so that they are the same on every device.
    """
    fills = dict(_declared(model, "param_fill"))
    roles = dict(_declared(model, "param_roles"))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in fills:
                param.fill_(fills[name])
            else:
                param.copy_(_normal(param.shape, init.std(roles[name]), derive(seed, "init", name)))
        for module in model.modules():
            fill = getattr(module, "fill_buffers", None)
            if fill is not None:
                fill()


def roles_of(model: nn.Module) -> dict[str, str]:
    """Return the role of every parameter by its full name."""
    roles = dict(_declared(model, "param_roles"))
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in roles]
    assert not missing, f"parameters without a role: {missing}"
    return {name: roles[name] for name in names}


def _normal(shape: torch.Size, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -3 * std, 3 * std, generator=generator)


def _declared(model: nn.Module, attribute: str) -> Iterator[tuple[str, Any]]:
    for prefix, module in model.named_modules():
        table: Mapping[str, Any] = getattr(module, attribute, {})
        for local, value in table.items():
            yield f"{prefix}.{local}" if prefix else local, value
