"""Starting values: every parameter from a random stream of its own name.

A parameter's values depend on (seed, its name) only: adding a module or a method leaves
the others as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.rng import derive
from poise.model.init import RESIDUAL_ROLES, Init, shares
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Spec

MATRICES: Final = ("qkv", "attn_out", "mlp_in", "mlp_out", "embedding", "head")
"""Roles of the matrices that every decoder has, the last one untied."""


class Stds:
    """The standard deviation of each role at the start: slots ``init``, ``residual_init`` and ``embed_std``."""

    def __init__(self, spec: Spec) -> None:
        place = Place(spec)
        self._init: Init = make("init", place)
        residual: float | None = make("residual_init", place)
        self._residual = self._init.residual if residual is None else residual
        self._embed: float | None = make("embed_std", place)

    def __getitem__(self, role: str) -> float:
        if role == "embedding" and self._embed is not None:
            return self._embed
        return self._init.std(role) * (self._residual if role in RESIDUAL_ROLES else 1.0)


def stds(spec: Spec) -> dict[str, float]:
    """Return the standard deviation at the start of every matrix of ``spec`` by role.

    Shared matrices come as their shares: ``q``, ``k``, ``v``, and with SwiGLU ``mlp_gate`` and ``mlp_up``. A tied head
    is the embedding. Matrices that a method adds, or whose values a method decides by itself, are not among them.

    >>> from poise.model.presets import PRESETS
    >>> {role: round(std, 4) for role, std in stds(PRESETS["7m"]).items()}["mlp_out"]
    0.0058
    """
    table = Stds(spec)
    roles = [role for role in MATRICES if role != "head" or not spec.tied]
    return {share: table[share] for role in roles for share, _ in shares(spec, role)}


def initialise(model: nn.Module, spec: Spec, seed: int) -> None:
    """Fill every parameter and every computed buffer of ``model`` in place.

    Matrices are normal, cut off at three standard deviations (which makes the true deviation 1.3 % smaller).
    Random numbers are drawn on the CPU, so that they are the same on every device. A module says in ``param_fill``
    which of its parameters start as a constant, in ``param_std`` which have a deviation of their own, and in
    ``fill_buffers`` how its buffers are computed, once the parameters have their values.
    """
    fills, own = (dict(_declared(model, table)) for table in ("param_fill", "param_std"))
    roles, table = roles_of(model), Stds(spec)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in fills:
                param.fill_(fills[name])
                continue
            parts = [("", -1)] if name in own else shares(spec, roles[name])
            deviations = [own[name] if name in own else table[role] for role, _ in parts]
            param.copy_(_normal(param.shape, deviations, [rows for _, rows in parts], derive(seed, "init", name)))
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


def _normal(shape: torch.Size, stds: list[float], rows: list[int], seed: int) -> Tensor:
    """Draw values, the rows of each share with its deviation."""
    generator = torch.Generator().manual_seed(seed)
    if len(set(stds)) == 1:
        (std,) = set(stds)
        if std == 0:
            return torch.zeros(shape)
        return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -3 * std, 3 * std, generator=generator)
    assert sum(rows) == shape[0], f"shares of {rows} rows do not make a matrix of {shape[0]}"
    unit = nn.init.trunc_normal_(torch.empty(shape), 0.0, 1.0, -3.0, 3.0, generator=generator)
    return torch.cat([part * std for part, std in zip(unit.split(rows), stds, strict=True)])


def _declared(model: nn.Module, attribute: str) -> Iterator[tuple[str, Any]]:
    for prefix, module in model.named_modules():
        table: Mapping[str, Any] = getattr(module, attribute, {})
        for local, value in table.items():
            yield f"{prefix}.{local}" if prefix else local, value
