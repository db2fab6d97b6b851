"""Parameter groups: who is decayed and who is not.

Weight decay pulls matrices back whose scale a following norm does not see; on norms, gains and biases it only
biases the function, and on embeddings it shrinks the rows of rare tokens towards zero, where the gradients
through the first norm grow. So those four roles are not decayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from poise.core.errors import UserError, nearest

NO_DECAY = frozenset({"embedding", "norm", "gain", "bias"})
"""Roles without weight decay. Every other role has it."""

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def groups(
    named_parameters: Iterable[tuple[str, Tensor]], roles: Mapping[str, str] | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, decayed first; an empty group is left out.

    Frozen parameters are left out. A parameter that comes under several names counts once, and without
    decay if any of its roles says so (a tied head is an embedding).

    Args:
        named_parameters: e.g. ``model.named_parameters()``.
        roles: name to role, e.g. of ``infer_roles(model)``. ``None`` knows no embeddings: then everything
            with fewer than two dimensions goes without decay, and only that.
        weight_decay: for the decayed group.

    Raises:
        UserError: a parameter without a role, a weight decay that is negative or not finite, or no
            parameters.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0.0):
        raise UserError(f"optim.weight_decay is {weight_decay}; use a finite number of 0 or more")
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not named:
        raise UserError("no parameter wants a gradient; check that the model is not frozen")
    plain = {id(p) for name, p in named if _no_decay(name, p, roles)}
    unique = {id(p): (name, p) for name, p in reversed(named)}  # of several names the first
    ordered = [(name, p) for name, p in named if unique[id(p)][0] == name]
    decayed = [(name, p) for name, p in ordered if id(p) not in plain]
    rest = [(name, p) for name, p in ordered if id(p) in plain]
    both = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def infer_roles(model: nn.Module) -> dict[str, str]:
    """Return a role for every parameter of any model, by the type of the module that holds it.

    ``embedding`` (``nn.Embedding``, and a head tied to it), ``norm`` (torch's norms, and any module whose
    class name ends in ``Norm``), ``bias``, ``gain`` (everything else with fewer than two dimensions), else
    ``linear``.
    """
    role_of: dict[int, str] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                role_of[id(p)] = "embedding"  # also where a head came first: tied means embedding
            else:
                role_of.setdefault(id(p), _role(module, name, p))
    return {name: role_of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _role(module: nn.Module, name: str, p: Tensor) -> str:
    if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
        return "norm"
    if p.ndim >= 2:
        return "linear"
    return "bias" if name.endswith("bias") else "gain"


def _no_decay(name: str, p: Tensor, roles: Mapping[str, str] | None) -> bool:
    if roles is None:
        return p.ndim < 2
    if name not in roles:
        raise UserError(f"parameter '{name}' has no role{nearest(name, roles)}; give it one, e.g. 'linear'")
    return roles[name] in NO_DECAY
