"""L2 norm and RMS of every linear layer's output, input, input gradient and weight, of any model.

    norms = LinearNorms(model, every=10)
    for step, batches in enumerate(loader):
        with norms.step(step):                  # hooks are there only at every 10th step
            for batch in batches:               # micro-batches count as one batch
                loss(model, batch).backward()
        if norms.measured == step:
            print(norms.readings())             # {"linear_out_norm@block.3.attn.qkv": 41.2, ...}

The diagnostic of Rybakov et al. 2024 (arXiv 2410.16682): at too high a learning rate the outputs of all linear layers
grow step by step, those of QKV, Proj and FC2 most, and the gradients with respect to the inputs of QKV and FC1 explode.

| reading | of |
|---|---|
| ``linear_out_norm@``, ``linear_out_rms@PLACE`` | the layer's output |
| ``linear_in_norm@``, ``linear_in_rms@PLACE`` | its input |
| ``linear_in_grad_norm@``, ``linear_in_grad_rms@PLACE`` | the gradient that it gives back to its input |
| ``linear_weight_norm@``, ``linear_weight_rms@PLACE`` | its weight as it acts (``effective_weight`` if it offers one) |

Norms are over all tokens of the step, all micro-batches and ranks, so they grow with the batch; RMS = norm / √elements
does not. The gradient is of this layer alone: where q, k and v are three layers with one input, each has its own. Ranks
count as parts of one batch whose loss is the mean of theirs, as gradients are averaged: the readings are those of one
process with the whole batch. The paper does not say how it normalises.

Linear layers are ``nn.Linear`` and whatever else holds a 2-D ``weight`` (transformers' ``Conv1D``, poise's ``Linear``)
or offers ``effective_weight``, embeddings aside. PLACE is the block's place and the layer's name in it; outside blocks
the layer's name; ``head`` for the output layer. A layer that was not called has its weight only (poise's decoder
multiplies by its head in the loss). What runs in the backward pass is a recomputation (activation checkpointing, both
kinds) and does not count twice. Nothing is changed: losses and gradients are bit-equal. Not measured: compiled code,
and the weights of FSDP 1.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from poise.core.errors import UserError
from poise.guard.signals.gradient import local_part
from poise.guard.signals.listen import Once, has_compiled_parts, inner_of
from poise.guard.signals.places import WRAPPERS, place_of
from poise.guard.signals.probe import is_aside

KINDS: Final = ("out", "in", "in_grad", "weight")
"""Of each four: sum of squares and number of elements, of parts that ranks hold; then of wholes, and their holders."""

_WIDTH: Final = 2 * len(KINDS) + 3

_Heard = dict[tuple[str, str], list[tuple[Tensor, float]]]


def find_linears(model: nn.Module, names: Iterable[str] | None = None) -> tuple[tuple[nn.Module, str], ...]:
    """Return the linear layers of ``model`` with their places; shared layers once.

    Args:
        model: any module; DDP and ``torch.compile`` wrappers are looked through.
        names: shell patterns of places, such as ``block.0.*`` or ``*.qkv``; by default all.

    Raises:
        UserError: a pattern that fits no layer; something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"linear layers are those of a torch module, not of a {type(model).__name__}; give the model")
    at: dict[str, nn.Module] = {}
    for raw, module in inner_of(model).named_modules():
        name = ".".join(part for part in raw.split(".") if part not in WRAPPERS)
        if _is_linear(module) and place_of(f"{name}.weight") != "embed":
            place = _place(name)
            at[name if place in at else place] = module
    found = [(module, place) for place, module in at.items()]
    if names is None:
        return tuple(found)
    wanted = list(names)
    for pattern in wanted:
        if not fnmatch.filter([place for _, place in found], pattern):
            known = ", ".join(place for _, place in found[:6])
            there_are = f"there are {known}, ..." if found else "this model has no linear layer at all"
            raise UserError(f"no linear layer is at '{pattern}'; {there_are}")
    return tuple((m, place) for m, place in found if any(fnmatch.fnmatchcase(place, one) for one in wanted))


class LinearNorms:
    """Measures every linear layer of a model at every ``every``-th step; the head of this file has the readings.

    Between measured steps the model has no hook. Call ``step`` on every rank alike.

    Args:
        model: any module; compiled parts are not heard.
        every: steps from one measurement to the next; those whose number is a multiple of it are measured.
        names: as in ``find_linears``.
        group: the ranks whose batches make up the step's batch (data parallel); by default all.

    Attributes:
        places: the places, in the model's order.
        measured: number of the step that the readings belong to; ``None`` before the first.

    Raises:
        UserError: ``every`` below 1, a name that fits no layer, or something else than a module.

    A model without linear layers gets a warning, and no readings.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        names: Iterable[str] | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every is {every}; give a whole number of at least 1")
        self._model, self._every, self._group = model, every, group
        self._sites = find_linears(model, names)
        self.places = tuple(place for _, place in self._sites)
        self.measured: int | None = None
        self._once = Once()
        if not self._sites:
            self._once.warn("linears", "this model has no linear layers, so there are no norms of them to measure")
        self._all_places: tuple[str, ...] = ()
        self._loss_scale: Tensor | float = 1.0
        self._stack: contextlib.ExitStack | None = None
        self._reset()

    def _reset(self) -> None:
        self._heard: _Heard = defaultdict(list)
        self._weights: list[tuple[Tensor, float, bool] | None] = []

    @contextlib.contextmanager
    def step(self, number: int, *, loss_scale: Tensor | float = 1.0) -> Iterator[bool]:
        """Listen while the ``with`` lasts if step ``number`` is one to measure; yields whether it is.

        It goes around all forward and backward passes of the step, and ends before the optimizer's step.

        Args:
            number: of the step.
            loss_scale: what the loss was multiplied by before ``backward`` (``GradScaler.get_scale()``).
        """
        if number % self._every:
            yield False
            return
        self.open(loss_scale)
        self.measured = None
        try:
            yield True
            self.measured = number
        finally:
            self.close()
            if self.measured is None:  # half a step is no measurement
                self._reset()

    def open(self, loss_scale: Tensor | float = 1.0) -> None:
        """Forget what was heard and attach the hooks; for callers that know themselves when a step begins."""
        self.close()
        self._reset()
        self._loss_scale = loss_scale
        if has_compiled_parts(self._model):
            self._once.warn("compiled", "linear norms: parts of the model are compiled, so their layers are not heard")
        self._stack = contextlib.ExitStack()
        for module, place in self._sites:
            before = module.register_forward_pre_hook(self._before(place), with_kwargs=True)
            self._stack.callback(before.remove)
            self._stack.callback(module.register_forward_hook(self._after(place)).remove)

    def close(self) -> None:
        """Take the hooks off the model and read the weights; nothing if they are off."""
        stack, self._stack = self._stack, None
        if stack is None:
            return
        stack.close()
        self.read_weights()

    def read_weights(self) -> None:
        """Read the weights as they are now; ``close`` does it, sooner is for who closes after the optimizer's step."""
        if not self._weights:
            self._weights = [self._weight(module, place) for module, place in self._sites]

    def readings(self) -> dict[str, float]:
        """Return the last measurement over all ranks, equal on each; empty before the first.

        One wait for the device. With several ranks one collective (two the first time): every rank has to call.
        """
        ranks = _ranks(self._group)
        places, rows_PW = self.places, self._rows()
        if ranks > 1:
            if not self._all_places:
                every: list[Any] = [None] * ranks
                distributed.all_gather_object(every, self.places, group=self._group)
                self._all_places = tuple(dict.fromkeys(place for one in every for place in one))
            places = self._all_places
            if places != self.places:
                own_P = torch.tensor([places.index(place) for place in self.places], dtype=torch.int64)
                rows_PW = rows_PW.new_zeros(len(places), _WIDTH).index_copy(0, own_P.to(rows_PW.device), rows_PW)
            if distributed.get_backend(self._group) == "nccl" and not rows_PW.is_cuda:
                rows_PW = rows_PW.cuda()
            distributed.all_reduce(rows_PW, group=self._group)
        table: list[list[tuple[float, float]]] = _finished(rows_PW, ranks).tolist()  # the one wait for the device
        return {
            name: value
            for place, row in zip(places, table, strict=True)
            for kind, pair in zip(KINDS, row, strict=True)
            for name, value in zip(_names(kind, place), pair, strict=True)
            if pair[1] >= 0 or math.isnan(pair[1])
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the readings of this rank alone, 0-dim float64 on the device; nothing waits for it."""
        done_PK2 = _finished(self._rows(), 1)
        heard = {(place, "weight") for place, weight in zip(self.places, self._weights, strict=False) if weight}
        heard |= self._heard.keys()
        return {
            name: value
            for place, row in zip(self.places, done_PK2, strict=True)
            for kind, pair in zip(KINDS, row, strict=True)
            if (place, kind) in heard
            for name, value in zip(_names(kind, place), pair, strict=True)
        }

    # -- hooks ------------------------------------------------------------------------------------------

    def _before(self, place: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or is_aside(self._model):
                return None
            found = _first(args, kwargs)
            if found is None:
                return None
            key, x = found
            if not in_backward():
                self._hear(place, "in", x)
            if not (torch.is_grad_enabled() and x.requires_grad):
                return None
            # A view of the input: the gradient that arrives at it is this layer's own, whoever else reads the input.
            # In a recomputation whose graph is not gone through its hook is never called.
            own = x.view_as(x)
            heard = self._heard  # a graph that is gone through later than its step speaks for its step
            hooked: Any = own
            hooked.register_hook(lambda grad: self._hear(place, "in_grad", grad, heard))
            if isinstance(key, int):
                return (*args[:key], own, *args[key + 1 :]), kwargs
            return args, {**kwargs, key: own}

        return hook

    def _after(self, place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or is_aside(self._model) or in_backward():
                return
            value = output[0] if isinstance(output, tuple | list) else output
            if isinstance(value, Tensor) and value.is_floating_point():
                self._hear(place, "out", value)

        return hook

    def _hear(self, place: str, kind: str, x: Tensor, heard: _Heard | None = None) -> None:
        try:
            with torch.no_grad():
                part, copies = local_part(x), _copies(x)
                into = self._heard if heard is None else heard
                into[place, kind].append((_norm(part) / math.sqrt(copies), part.numel() / copies))
        except Exception as error:  # a reading is never worth a run
            self._drop(place, error)

    def _weight(self, module: nn.Module, place: str) -> tuple[Tensor, float, bool] | None:
        """Norm and number of elements of this rank's part of a weight, and whether that is the whole."""
        try:
            with torch.no_grad():
                effective = getattr(module, "effective_weight", None)
                weight = effective() if callable(effective) else getattr(module, "weight", None)
                if not isinstance(weight, Tensor) or weight.dim() != 2:
                    return None
                part, copies = local_part(weight), _copies(weight)
                whole = not hasattr(weight, "device_mesh")
                return _norm(part) / math.sqrt(copies), part.numel() / copies, whole
        except Exception as error:
            self._drop(place, error)
            return None

    def _drop(self, place: str, error: Exception) -> None:
        self._once.warn("reader", f"linear norms: a reading at {place} was dropped: {type(error).__name__}: {error}")

    # -- sums -------------------------------------------------------------------------------------------

    def _rows(self) -> Tensor:
        """This rank's sums, (P, W) float64: see ``KINDS``; made on the device, without waiting for it."""
        cells: list[int] = []
        norms: list[Tensor] = []
        counts = [[0.0] * _WIDTH for _ in self.places]
        index = {place: number for number, place in enumerate(self.places)}
        for (place, kind), heard in self._heard.items():
            column = 2 * KINDS.index(kind)
            for norm, count in heard:
                cells.append(index[place] * _WIDTH + column)
                norms.append(norm / self._loss_scale if kind == "in_grad" else norm)
                counts[index[place]][column + 1] += count
        for number, weight in enumerate(self._weights):
            if weight is None:
                continue
            norm, count, whole = weight
            column = 2 * len(KINDS) if whole else 2 * KINDS.index("weight")
            cells.append(number * _WIDTH + column)
            norms.append(norm)
            counts[number][column + 1] += count
            counts[number][-1] += float(whole)
        device = norms[0].device if norms else torch.device("cpu")
        device = torch.device("cpu") if device.type in ("mps", "meta") else device  # MPS has no float64
        sums = torch.tensor(counts, dtype=torch.float64).reshape(-1).to(device, non_blocking=True)
        if norms:
            one = torch.stack([norm.to(device=device, dtype=torch.float64, non_blocking=True) for norm in norms])
            sums = sums.index_add(0, torch.tensor(cells).to(device, non_blocking=True), one.square())
        return sums.reshape(-1, _WIDTH)


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: then a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _finished(rows_PW: Tensor, ranks: int) -> Tensor:
    """Return norm and RMS of every place and kind, (P, K, 2); -1 where there is nothing."""
    parts_PK2 = rows_PW[:, : 2 * len(KINDS)].reshape(len(rows_PW), len(KINDS), 2)
    square_PK, count_PK = parts_PK2.unbind(-1)
    whole_P, whole_count_P, holders_P = rows_PW[:, 2 * len(KINDS) :].unbind(1)
    weight, grad = KINDS.index("weight"), KINDS.index("in_grad")
    square_PK, count_PK = square_PK.clone(), count_PK.clone()
    square_PK[:, weight] += whole_P / holders_P.clamp(min=1)
    count_PK[:, weight] += whole_count_P / holders_P.clamp(min=1)
    square_PK[:, grad] /= ranks**2  # each rank's loss is one of ``ranks`` in the mean
    there_PK = count_PK > 0
    norm_PK = square_PK.sqrt()
    rms_PK = (square_PK / count_PK.clamp(min=1e-300)).sqrt()
    return torch.stack([norm_PK, rms_PK], -1).where(there_PK[..., None], -1.0)


def _names(kind: str, place: str) -> tuple[str, str]:
    return f"linear_{kind}_norm@{place}", f"linear_{kind}_rms@{place}"


def _norm(x: Tensor) -> Tensor:
    """L2 norm in at least fp32, row by row: in one go a CPU is 1e-3 off at 10 million elements."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return torch.zeros((), dtype=wide, device=x.device)
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=wide) if x.dim() else x.to(wide)
    out: Tensor = torch.linalg.vector_norm(rows)
    return out


def _copies(x: Any) -> float:
    """How many ranks hold the same part of a DTensor, 1 for a plain tensor."""
    if not hasattr(x, "device_mesh"):
        return 1.0
    return float(math.prod(x.device_mesh.size(dim) for dim, kind in enumerate(x.placements) if not kind.is_shard()))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """The first floating-point tensor among the arguments, and where it is."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next(((key, x) for key, x in named if isinstance(x, Tensor) and x.is_floating_point()), None)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or callable(getattr(type(module), "effective_weight", None)):
        return True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _place(name: str) -> str:
    """Return the place of a linear layer and, inside a block, its name there.

    >>> _place("model.layers.3.self_attn.q_proj"), _place("trunk.blocks.0.mlp.inner"), _place("lm_head")
    ('block.3.self_attn.q_proj', 'block.0.mlp.inner', 'head')
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        place = place_of(".".join(parts[: position + 1]))
        if part.isdecimal() and place.removeprefix("encoder.").startswith("block."):
            return ".".join([place, *parts[position + 1 :]])
    return "head" if place_of(f"{name}.weight") == "head" else name or "model"


def _ranks(group: ProcessGroup | None) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(group)
