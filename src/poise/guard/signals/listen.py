"""Readings of every layer during a forward pass, of any model, without changing what it computes.

    with listening(model) as heard:
        loss = model(inputs, targets).loss
    heard.readings()   # {"out_rms@block.0.qkv": tensor(1.02), ...}, still on the device

Modules are found by name and role (``guard/signals/places.py``): poise's own decoder, transformers' Llama, Qwen and
GPT-2, nanoGPT-like models. Hooks and the attention intercept exist only inside the ``with``; they read detached values,
draw no random numbers and return nothing, so losses and gradients are bit-equal to those of a run without.

| reading | from | tokens |
|---|---|---|
| ``out_rms@``, ``out_max@block.N.qkv|proj|fc1|fc2`` | outputs of linear layers, experts together | all |
| ``residual_rms@block.N`` | output of the block | all |
| ``attn_logit_max@``, ``attn_entropy@``, ``first_token@block.N`` | ``guard/signals/attention.py`` | first ``rows`` |
| ``dead@block.N.fc2`` | hidden units with max over tokens of abs(h) <= 1e-3 × RMS of the layer's h | all |
| ``router_balance@block.N`` | largest over mean load of the experts, of the tokens heard | all |
| ``embed_variability`` | mean over dimensions of the std over tokens, over the matrix's RMS; at most 4096 rows | |

A reading that cannot be taken is absent. Values are of this rank and, under tensor parallelism, of its shard. Several
forwards in one ``with`` are taken together: RMS over all, maximum over all. In the table ``all`` are all tokens of
the micro-batch. Experts held as one 3-D parameter are no linear layers and have no output readings.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from poise.guard.signals.attention import AttentionTally, Intercept, tally_logits, tally_queries_keys
from poise.guard.signals.places import WRAPPERS, output_place, place_of

DEAD_BELOW: Final = 1e-3
EMBED_ROWS: Final = 4096


class Once:
    """Says each thing once on the logger ``poise``."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warn(self, key: str, message: str) -> None:
        """Log ``message`` unless something was said under ``key`` before."""
        if key not in self._said:
            self._said.add(key)
            logging.getLogger("poise").warning(message)


def inner_of(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether the model or a module in it was compiled; hooks inside compiled code are not called."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@dataclass(frozen=True)
class Sites:
    """What there is to listen to in a model: (module, place) pairs. ``find_sites`` makes one."""

    linears: tuple[tuple[nn.Module, str], ...]
    blocks: tuple[tuple[nn.Module, str], ...]
    routers: tuple[tuple[nn.Module, str, nn.Module], ...]
    embedding: nn.Module | None


def find_sites(model: nn.Module) -> Sites:
    """Find the linear layers, blocks, routers and the token embedding of a model by name and role."""
    linears, blocks, routers, embeddings = [], [], [], []
    roots: tuple[str, ...] = ()
    modules = dict(inner_of(model).named_modules())
    for raw, module in modules.items():
        name = ".".join(part for part in raw.split(".") if part not in WRAPPERS)
        if raw.rpartition(".")[2] in WRAPPERS:
            continue  # the wrapper around it has the same name and stands for it
        place = place_of(f"{name}.weight")
        matrix = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or (place == "embed" and _is_matrix(matrix)):
            embeddings += [module] if place == "embed" else []
        elif place.removeprefix("encoder.").startswith("block."):
            if name.rpartition(".")[2].isdigit() and not name.startswith(roots or ("\0",)):
                roots += (f"{name}.",)
                blocks.append((module, place))
            output = output_place(name)
            if output is not None and _is_matrix(matrix):
                linears.append((module, output))
            parent = modules.get(raw.rpartition(".")[0])
            if name.rpartition(".")[2] in ("gate", "router") and hasattr(parent, "experts"):
                assert parent is not None
                routers.append((module, place, parent))
    largest = max(embeddings, key=lambda module: module.weight.numel(), default=None)
    return Sites(tuple(linears), tuple(blocks), tuple(routers), largest)


class Heard:
    """What was heard so far. ``readings`` may be asked at any time, also after the ``with``."""

    def __init__(self, sites: Sites, rows: int, once: Once) -> None:
        self._sites, self._rows, self._once = sites, rows, once
        self._outputs: dict[str, list[tuple[Tensor, int, Tensor]]] = defaultdict(list)
        self._residuals: dict[str, list[tuple[Tensor, int, Tensor]]] = defaultdict(list)
        self._units: dict[tuple[str, int], Tensor] = {}
        self._hidden: dict[str, list[tuple[Tensor, int, Tensor]]] = defaultdict(list)
        self._attention: dict[str, AttentionTally] = defaultdict(AttentionTally)
        self._loads: dict[str, Tensor] = {}
        self._running: list[str] = []

    @property
    def anything(self) -> bool:
        """Whether any module of the model was heard."""
        return bool(self._outputs or self._residuals or self._attention)

    def readings(self) -> dict[str, Tensor]:
        """Return the readings as 0-dim float32 tensors on their device; nothing waits for it."""
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            for place, norms in self._outputs.items():
                out[f"out_rms@{place}"] = _rms(norms)
                out[f"out_max@{place}"] = torch.stack([top for _, _, top in norms]).amax()
            for place, norms in self._residuals.items():
                out[f"residual_rms@{place}"] = _rms(norms)
            for place, tally in self._attention.items():
                out |= {f"{name}@{place}": value for name, value in tally.readings().items()}
            for place, norms in self._hidden.items():
                bar = DEAD_BELOW * _rms(norms)
                tops = [top for (at, _), top in self._units.items() if at == place]
                out[f"dead@{place}"] = (torch.cat(tops) <= bar).float().mean()
            for place, load in self._loads.items():
                out[f"router_balance@{place}"] = load.amax() / load.mean()
            self._guarded("the embedding", self._embedding, out)
        return out

    # -- hooks ------------------------------------------------------------------------------------------

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Register all hooks and the attention intercept; leaving ``stack`` removes them."""
        for module, place in self._sites.linears:
            stack.callback(module.register_forward_hook(self._hook(place, self._on_linear)).remove)
            if place.endswith(".fc2"):
                stack.callback(module.register_forward_hook(self._hook(place, self._on_hidden)).remove)
        for module, place, parent in self._sites.routers:
            # The number of experts a token goes to is a fact of the parent; bound here, used at each call.
            hook = self._hook(place, lambda at, m, a, out, parent=parent: self._on_router(at, out, parent))
            stack.callback(module.register_forward_hook(hook).remove)
        for module, place in self._sites.blocks:
            stack.callback(module.register_forward_hook(self._hook(place, self._on_block)).remove)
            stack.callback(module.register_forward_pre_hook(self._enter(place)).remove)
            stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        stack.enter_context(Intercept(self._on_attention, self._on_logits))

    def _hook(self, place: str, reader: Callable[..., None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling():
                self._guarded(place, reader, place, module, args, output)

        return hook

    def _enter(self, place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append(place)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def _guarded(self, what: str, reader: Callable[..., None], *arguments: Any) -> None:
        """Run a reader so that nothing it does reaches the model: no graph, no autocast, no exception."""
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for kind in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(kind):
                        stack.enter_context(torch.autocast(kind, enabled=False))
                reader(*arguments)
        except Exception as error:  # a reading is never worth a run
            self._once.warn("reader", f"a reading at {what} was dropped: {type(error).__name__}: {error}")

    # -- readers ----------------------------------------------------------------------------------------

    def _on_linear(self, place: str, module: nn.Module, args: Any, output: Any) -> None:
        size = _size(_first_tensor(output))  # before the list is made: a reader that fails leaves no empty one
        self._outputs[place].append(size)

    def _on_block(self, place: str, module: nn.Module, args: Any, output: Any) -> None:
        size = _size(_first_tensor(output))
        self._residuals[place].append(size)

    def _on_hidden(self, place: str, module: nn.Module, args: Any, output: Any) -> None:
        hidden_NF = _local(args[0]).flatten(0, -2)
        if not hidden_NF.shape[0]:
            return  # an expert without tokens
        tops_F = torch.maximum(hidden_NF.amax(0), -hidden_NF.amin(0)).float()
        norm = _norm(hidden_NF)
        key = (place, id(module))
        self._units[key] = torch.maximum(self._units[key], tops_F) if key in self._units else tops_F
        self._hidden[place].append((norm, hidden_NF.numel(), norm))

    def _on_router(self, place: str, output: Any, parent: nn.Module) -> None:
        parts = [_local(part) for part in (output if isinstance(output, tuple) else (output,)) if _is_tensor(part)]
        chosen = next((part for part in parts if not part.is_floating_point()), None)
        experts = getattr(parent, "num_experts", None) or parts[0].shape[-1]
        if chosen is None:
            k = getattr(parent, "top_k", None) or getattr(parent, "num_experts_per_tok", None) or 1
            chosen = parts[0].topk(int(k), -1).indices
        load_E = (chosen.reshape(-1, 1) == torch.arange(int(experts), device=chosen.device)).sum(0).float()
        self._loads[place] = self._loads[place] + load_E if place in self._loads else load_E

    def _on_attention(self, q: Tensor, k: Tensor, scale: float | None, causal: bool, mask: Tensor | None) -> None:
        if not self._running or k.shape[2] < 2:
            return

        def read() -> None:
            rows = slice(0, self._rows)
            seen = mask[rows] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask
            new = AttentionTally()  # aside, so that a reader that fails half-way leaves nothing behind
            tally_queries_keys(new, _local(q)[rows], _local(k)[rows], scale=scale, causal=causal, mask=seen)
            self._add_attention(new)

        self._guarded(self._running[-1], read)

    def _on_logits(self, logits: Tensor) -> None:
        if not self._running or logits.shape[-1] < 2:
            return

        def read() -> None:
            new = AttentionTally()
            tally_logits(new, _local(logits)[: self._rows])
            self._add_attention(new)

        self._guarded(self._running[-1], read)

    def _add_attention(self, new: AttentionTally) -> None:
        tally = self._attention[self._running[-1]]
        tally.tops += new.tops
        tally.entropies += new.entropies
        tally.firsts += new.firsts
        tally.queries += new.queries

    def _embedding(self, out: dict[str, Tensor]) -> None:
        module = self._sites.embedding
        if module is None or not self.anything:
            return
        table_VD = _local(module.weight)
        table_VD = table_VD[:: max(1, math.ceil(table_VD.shape[0] / EMBED_ROWS))].float()
        if table_VD.dim() == 2 and table_VD.shape[0] > 1:  # FSDP frees the whole matrix after use
            centred_VD = table_VD - table_VD.mean(0)  # not std(): its one-pass rule is ten times slower on a CPU
            spread_D = torch.linalg.vector_norm(centred_VD, dim=0) / math.sqrt(table_VD.shape[0] - 1)
            out["embed_variability"] = spread_D.mean() / _rms([_size(table_VD)])


@contextlib.contextmanager
def listening(
    model: nn.Module, rows: int = 2, *, sites: Sites | None = None, once: Once | None = None
) -> Iterator[Heard]:
    """Listen to every layer of ``model`` while the ``with`` lasts.

    Args:
        model: any module; DDP and ``torch.compile`` wrappers are looked through. Compiled code is not heard: see
            ``guard/signals/probe.py``, which runs it uncompiled.
        rows: sequences of each batch whose attention is measured, the first ones.
        sites: what ``find_sites`` found, to save the search.
        once: who warns about readings that could not be taken; by default one warning for each ``with``.
    """
    heard = Heard(sites or find_sites(model), rows, once or Once())
    with contextlib.ExitStack() as stack:
        heard.attach(stack)
        yield heard


def floats(readings: Mapping[str, Tensor]) -> dict[str, float]:
    """Return readings as floats, with one wait for each device they are on."""
    groups: dict[torch.device, list[str]] = defaultdict(list)
    for name, value in readings.items():
        groups[value.device].append(name)
    out: dict[str, float] = {}
    for names in groups.values():
        stacked = torch.stack([readings[name].detach().float() for name in names])
        out |= dict(zip(names, stacked.tolist(), strict=True))
    return {name: out[name] for name in readings}


def _size(x: Tensor) -> tuple[Tensor, int, Tensor]:
    """Return L2 norm, number of elements and largest magnitude, in two passes; NaN stays NaN."""
    if not x.numel():
        return torch.zeros((), device=x.device), 0, torch.zeros((), device=x.device)
    low, high = torch.aminmax(x)  # many times faster than the infinity norm on a CPU, and no copy
    return _norm(x), x.numel(), torch.maximum(high, -low).float()


def _norm(x: Tensor) -> Tensor:
    """Return the L2 norm in float32, row by row: in one go a CPU is 1e-3 off at 10 million elements."""
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) if x.dim() else x.float()
    out: Tensor = torch.linalg.vector_norm(rows)
    return out


def _rms(norms: list[tuple[Tensor, int, Tensor]]) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm for norm, _, _ in norms]))
    return total / math.sqrt(max(1, sum(count for _, count, _ in norms)))


def _first_tensor(output: Any) -> Tensor:
    """Return the tensor of a block's or layer's output, which may be the first member of a tuple."""
    value = output[0] if isinstance(output, tuple | list) else output
    if not (_is_tensor(value) and value.is_floating_point()):
        raise TypeError(f"its output is a {type(value).__name__}, not a floating-point tensor")
    return _local(value)


def _local(x: Any) -> Tensor:
    """Return a detached tensor; of a sharded one (DTensor) this rank's part."""
    value: Tensor = x.detach()
    to_local = getattr(value, "to_local", None)
    return value if to_local is None else cast(Tensor, to_local())


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2
