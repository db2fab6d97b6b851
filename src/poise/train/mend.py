"""Mending a model in place: clip runaway attention, compute a layer in fp32, forget moments.

Places are ``embed``, ``block.N`` (0-based), ``final`` and ``head``, as in ``Signals.extra``. Everything here works on
whole and on sharded (FSDP2) parameters; with several ranks all of them call a function together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from poise.core.errors import UserError, nearest
from poise.model.decoder import Decoder
from poise.model.layers import Linear, SamePair
from poise.optim.chain import Chain
from poise.optim.weights.qk_clip import HeadRows, QKLayer, gammas, scale_heads

READING = "attn_logit_max"
"""Name of the reading that ``qk_clip`` goes by; its full name has the place behind an ``@``."""


def place_of(parameter: str) -> str:
    """Return the place of a parameter of our decoder.

    >>> [place_of(name) for name in ("embedding.weight", "trunk.blocks.3.attn.qkv.weight", "trunk.norm.weight")]
    ['embed', 'block.3', 'final']
    """
    match parameter.split("."):
        case ["trunk", "blocks", number, *_]:
            return f"block.{number}"
        case ["trunk", "norm", *_]:
            return "final"
        case ["embedding" | "embed_out", *_]:
            return "embed"
        case _:
            return "head"


def parameters_of(model: Decoder, places: Sequence[str]) -> list[Tensor]:
    """Return the parameters at ``places``, all where empty. A tied head is the embedding.

    Raises:
        UserError: the model has no such place.
    """
    by_place: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        by_place.setdefault(place_of(name), []).append(parameter)
    if model.head is None and "head" not in by_place:
        by_place["head"] = [model.embedding.weight]
    _check_places(places, by_place)
    chosen = dict.fromkeys(p for place in places or by_place for p in by_place[place])
    return list(chosen)


def reset_moments(optimizer: torch.optim.Optimizer, model: Decoder, places: Sequence[str] = ()) -> None:
    """Forget the optimizer's state of ``places`` (all where empty); it starts anew with the next gradient.

    Step counts go with the moments, so that the bias correction is that of a first step.

    Raises:
        UserError: the model has no such place; nothing was forgotten.
    """
    parameters = parameters_of(model, places)
    if isinstance(optimizer, Chain):
        optimizer.reset_moments(parameters)
        return
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def qk_clip(
    model: Decoder, places: Sequence[str], threshold: float, logit_max: Mapping[str, float]
) -> dict[str, float]:
    """Scale queries and keys of blocks down so that their largest attention logit becomes ``threshold``.

    QK-Clip (Kimi K2, Kimi Team 2025, arXiv 2507.20534): with gamma = min(1, threshold / largest logit), W_q and W_k
    are multiplied by sqrt(gamma) each, and every logit with gamma. Where the block normalises queries and keys,
    their matrices have no say in the logits; then the gains of both norms are multiplied instead. Differs from the
    paper in: one gamma a block, not one a head, because one maximum a block is what is read (and with grouped
    queries the heads of a group share their keys anyway); applied on request, not after every step.

    Args:
        model: our decoder.
        places: blocks, e.g. ``block.3``.
        threshold: where the largest logit shall be, in the units of the logits (after the division by sqrt(K)).
        logit_max: the largest logit last seen, by place or by reading (``attn_logit_max@block.3``).

    Returns:
        gamma of each place; 1 where nothing had to be done.

    Raises:
        UserError: a place that is no block, no (finite) reading, or queries and keys of a kind that cannot be
            scaled; nothing was changed.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise UserError(f"the threshold of qk_clip is {threshold}; use a finite number above 0, e.g. 100")
    blocks, found = _blocks(model), dict[str, float]()
    _check_places(places, blocks)
    for place in places:
        seen = logit_max.get(place, logit_max.get(f"{READING}@{place}"))
        if seen is None or not math.isfinite(seen):
            raise UserError(f"the largest attention logit of {place} is {seen}; qk_clip needs a finite reading of it")
        _check_scalable(blocks[place].attn, place)
        found[place] = seen
    for place, seen in found.items():
        layer = _pair(blocks[place].attn, place)
        scale_heads(layer, gammas(layer, torch.tensor(seen), threshold))
    return {place: min(1.0, threshold / seen) if seen > 0 else 1.0 for place, seen in found.items()}


def qk_layers(model: Decoder) -> list[QKLayer]:
    """Return what decides the size of queries and keys, block by block (``block.0``, ...).

    Raises:
        UserError: queries and keys of a kind that cannot be scaled.
    """
    blocks = _blocks(model)
    for place, block in blocks.items():
        _check_scalable(block.attn, place)
    return [_pair(block.attn, place) for place, block in blocks.items()]


def _check_scalable(attention: Any, place: str) -> None:
    gains = [getattr(getattr(attention.qk, name, None), "weight", None) for name in ("q", "k")]
    if not isinstance(attention.qk, SamePair) and not all(isinstance(gain, Tensor) for gain in gains):
        raise UserError(
            f"{place} has {type(attention.qk).__name__} on its queries and keys, which qk_clip cannot scale"
        )
    if isinstance(attention.qk, SamePair) and not isinstance(attention.qkv, Linear):
        raise UserError(
            f"{place} makes queries and keys with {type(attention.qkv).__name__}, whose rows qk_clip cannot scale; "
            "use it without the method that put it there"
        )


def _pair(attention: Any, place: str) -> QKLayer:
    """Return what decides the size of queries and keys in this block: their matrix, or the gains of their norms."""
    size = attention.head_dim
    if not isinstance(attention.qk, SamePair):
        return QKLayer(
            place,
            (HeadRows.even(attention.qk.q.weight, 1, size),),
            (HeadRows.even(attention.qk.k.weight, 1, size),),
        )
    weight, heads = attention.qkv.weight, attention.n_heads
    keys = HeadRows.even(weight, attention.n_kv_heads, size, first=heads * size)
    return QKLayer(place, (HeadRows.even(weight, heads, size),), (keys,))


# -- precision -------------------------------------------------------------------------------------------------


def raise_precision(model: Decoder, places: Sequence[str]) -> None:
    """Compute ``places`` (blocks and ``head``) in fp32 from now on, besides those that do already.

    Weights are fp32 masters that every module casts to the dtype of its input, so it is enough to widen the
    input. A block's output is rounded back to the compute dtype: outside, the residual stream is what it was. A
    trunk that was compiled is compiled anew at its next use, which takes about half a minute.

    Raises:
        UserError: a place that cannot be raised, or a model whose computation would not change; nothing was changed.
    """
    set_precision(model, tuple(dict.fromkeys((*fp32_places(model), *places))))


def fp32_places(model: Decoder) -> tuple[str, ...]:
    """Return the places that were raised to fp32, in the order of the model."""
    return tuple(place for place, module in _sites(model).items() if _widened(module) is not None)


def set_precision(model: Decoder, places: Sequence[str]) -> None:
    """Compute exactly ``places`` in fp32 and all others in the compute dtype; what a resumed run calls.

    Raises:
        UserError: as of ``raise_precision``.
    """
    present = fp32_places(model)
    if set(places) == set(present):
        return
    sites = _sites(model)
    if places:
        _check_can_widen(model, places, sites)
    for place in present:
        widen = _widened(sites[place])
        assert widen is not None
        for handle in widen.handles:
            handle.remove()
    for place in dict.fromkeys(places):
        _widen(sites[place], model.compute_dtype, back=place != "head")
    if getattr(model.trunk, "_compiled_call_impl", None) is not None:
        torch.compiler.reset()  # compiled code does not look for new hooks
        model.compile_trunk()


class _Widen:
    """A forward pre-hook that turns the module's first input into fp32."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].float(), *args[1:])


def _widen(module: nn.Module, dtype: torch.dtype, back: bool) -> None:
    widen = _Widen()
    widen.handles.append(module.register_forward_pre_hook(widen))
    if back:  # first of all hooks: whoever listens to the block hears the stream as it goes on
        narrow = lambda module, args, out: (out[0].to(dtype), *out[1:])  # noqa: E731
        widen.handles.append(module.register_forward_hook(narrow, prepend=True))


def _widened(module: nn.Module) -> _Widen | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Widen)), None)


def _check_can_widen(model: Decoder, places: Sequence[str], sites: Mapping[str, nn.Module]) -> None:
    for place in places:
        if place in ("embed", "final"):
            raise UserError(f"'{place}' is computed in fp32 already; raise the precision of head or of a block")
    _check_places(places, sites)
    if model.compute_dtype != torch.bfloat16:
        raise UserError(f"the model computes in {model.compute_dtype} already; there is no precision to raise")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UserError(
            "the weights of a sharded model are gathered in the dtype that was fixed when it was sharded, so one "
            "layer's precision cannot be raised; start the run with train.dtype = fp32 instead"
        )


# -- places ----------------------------------------------------------------------------------------------------


def _sites(model: Decoder) -> dict[str, nn.Module]:
    """Return the modules whose input decides the dtype of a place; the head's is the tap before it."""
    return {**_blocks(model), "head": model.taps()["final"]}


def _blocks(model: Decoder) -> dict[str, Any]:
    return {f"block.{number}": block for number, block in enumerate(cast(Iterable[Any], model.trunk.blocks))}


def _check_places(places: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for place in places:
        if place not in known:
            raise UserError(f"there is no '{place}' here{nearest(place, known)}; use {', '.join(known)}")
