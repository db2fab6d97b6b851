"""Nested training state as a flat table of tensors plus a description of everything else.

A checkpoint stores tensors by name and the rest (containers, integer keys, learning rates, strings) as JSON,
so that what comes back is exactly what was given: an optimizer's integer keys stay integers, tuples stay
tuples, and Python floats keep every digit. A node of the description is a plain value, or one of
``{"tensor": name}``, ``{"dict": [[key, node], ...]}``, ``{"list": [...]}``, ``{"tuple": [...]}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Node = Any
SEPARATOR: Final = "/"
_PLAIN_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flatten(tree: Any) -> tuple[dict[str, Tensor], Node]:
    """Split a nested state into named tensors (the same objects) and the JSON description of the rest.

    >>> tensors, node = flatten({"a": torch.ones(2), "group": {0: (0.9, None)}})
    >>> list(tensors), node["dict"][1]
    (['a'], ['group', {'dict': [[0, {'tuple': [0.9, None]}]]}])

    Raises:
        TypeError: a value that is neither a tensor nor plain data, with its name.
    """
    tensors: dict[str, Tensor] = {}
    node = _flatten(tree, "", tensors)
    return tensors, node


def unflatten(node: Node, tensors: Mapping[str, Any]) -> Any:
    """Rebuild the nested state that ``flatten`` described, with the given tensors in it."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: unflatten(inner, tensors) for key, inner in content}
        case "list":
            return [unflatten(inner, tensors) for inner in content]
        case _:
            return tuple(unflatten(inner, tensors) for inner in content)


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Node:
    if isinstance(value, Tensor):
        assert path not in tensors, f"two tensors are called '{path}'"
        tensors[path] = value.detach()
        return {"tensor": path}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"state '{path}' has the key {key!r}; keys are text or whole numbers")
        return {"dict": [[key, _flatten(value[key], _join(path, key), tensors)] for key in value]}
    if isinstance(value, list | tuple):
        items = [_flatten(inner, _join(path, i), tensors) for i, inner in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise TypeError(f"state '{path}' is a {type(value).__name__}; a checkpoint holds tensors and plain values")


def _join(path: str, key: str | int) -> str:
    return f"{path}{SEPARATOR}{key}" if path else str(key)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold a NaN or an infinity; one host sync a device.

    A sharded tensor is looked at where it is: only this rank's part.
    """
    flags: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_complex():
            local = torch.view_as_real(local)
        elif local.is_floating_point() and local.dtype not in _PLAIN_FLOATS:
            if "float4" in str(local.dtype):  # has no encoding for NaN or infinity
                continue
            local = local.float()
        if local.is_floating_point() and local.numel():
            # The extremes of a tensor carry its NaNs and infinities, and finding them needs no second copy.
            low, high = torch.aminmax(local)
            flags.setdefault(local.device, []).append((name, low.isfinite() & high.isfinite()))
    bad: set[str] = set()
    for named in flags.values():
        finite = torch.stack([flag for _, flag in named]).tolist()
        bad.update(name for (name, _), ok in zip(named, finite, strict=True) if not ok)
    return [name for name in tensors if name in bad]


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of a model and its optimizer as ``CheckpointStore.save`` takes it (no copies)."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_class": type(optimizer).__name__,
    }


def unpack(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a state made by ``pack`` back, bit for bit.

    ``Optimizer.load_state_dict`` casts moments to the dtype of their parameter, which loses the digits of
    float32 moments of bfloat16 weights; a moment that was cast is replaced by the saved one.
    """
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for index, parameter in enumerate(parameters(optimizer)):
        own = optimizer.state.get(parameter, {})
        for key, saved in state["optimizer"]["state"].get(index, {}).items():
            now = own.get(key)
            if isinstance(saved, Tensor) and isinstance(now, Tensor) and now.dtype != saved.dtype:
                own[key] = saved.to(now.device)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order in which ``optimizer.state_dict()`` numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_targets(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, tuple[Sequence[int], str]], prefix: str
) -> dict[str, Tensor]:
    """Return tensors to load an optimizer's saved moments into; missing ones are allocated.

    An optimizer makes its moments in its first step, so a fresh process has none. What is as large as
    its parameter is made like it (device and sharding included), the rest lies beside it, and scalars on
    the CPU, from where ``load_state_dict`` moves them.

    Args:
        optimizer: where the state will go.
        saved: name to (shape, dtype name) of the tensors in the checkpoint.
        prefix: what the names of this optimizer's tensors begin with, e.g. ``optimizer``.
    """
    present, _ = flatten({prefix: optimizer.state_dict()})
    own = parameters(optimizer)
    targets: dict[str, Tensor] = {}
    for name, (shape, dtype) in saved.items():
        if not name.startswith(f"{prefix}{SEPARATOR}state{SEPARATOR}"):
            continue
        if name in present:
            targets[name] = present[name]
            continue
        index = int(name.split(SEPARATOR)[2])
        targets[name] = _moment_like(own[index], tuple(shape), dtype_named(dtype))
    return targets


def optimizer_mismatch(node: Node, names: Iterable[str], optimizer: torch.optim.Optimizer) -> str | None:
    """Return in words why a packed state (description, tensor names) is of another optimizer, or None."""
    saved = unflatten(node, dict.fromkeys(names))
    own_class = type(optimizer).__name__
    if saved.get("optimizer_class") != own_class:
        return f"its optimizer is {saved.get('optimizer_class')}, here it is {own_class}"
    there = [len(group["params"]) for group in saved["optimizer"]["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if there != here:
        return f"its optimizer has parameter groups of {there} parameters, here they have {here}"
    return None


def _moment_like(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if shape == tuple(parameter.shape) and shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device if shape else "cpu")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype with this name.

    >>> dtype_named("bfloat16")
    torch.bfloat16
    """
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), f"'{name}' is no dtype"
    return dtype


def first_mismatch(
    saved: Mapping[str, tuple[Sequence[int], str]],
    targets: Mapping[str, Tensor],
) -> str | None:
    """Return in words the first difference between saved and wanted tensors, or None."""
    for name, tensor in targets.items():
        if name not in saved:
            return f"'{name}' is not in it"
        shape, dtype = saved[name]
        if tuple(shape) != tuple(tensor.shape):
            return f"'{name}' is {_size(shape)} there and {_size(tensor.shape)} here"
        if dtype != (here := str(tensor.dtype).removeprefix("torch.")):
            return f"'{name}' is {dtype} there and {here} here"
    for name in saved:
        if name not in targets:
            return f"it has '{name}', which is not wanted here"
    return None


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
