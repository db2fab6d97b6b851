"""Norms of a model's tensors one by one, and sums over its places, sharded or whole. Imports torch only when called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from poise.guard.signals.places import place_of

if TYPE_CHECKING:
    from torch import Tensor, nn


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory; another tensor as it is. Detached."""
    own: Any = tensor.detach()
    if hasattr(own, "to_local"):
        if any(placement.is_partial() for placement in own.placements):
            own = own.redistribute(  # a sum that is still to be done: its parts mean nothing alone
                placements=[_replicate() if p.is_partial() else p for p in own.placements]
            )
        own = own.to_local()
    found: Tensor = own
    return found


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


class Parts:
    """The parameters that want a gradient, and how sums over one tensor each become sums over places.

    A tensor is *whole* where every rank holds it, and *sharded* where ranks hold parts of it: a DTensor, or a
    parameter of FSDP 1. Of whole tensors the largest value over ranks counts, of sharded ones the sum.

    Attributes:
        names, params: one per tensor, tied weights once; in the model's order.
        places: the places, in the order of their first tensor.
        sharded: whether each tensor is.
        device: where readings are put together.
    """

    def __init__(self, model: nn.Module) -> None:
        import torch

        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in named)
        self.params: tuple[Tensor, ...] = tuple(p for _, p in named)
        self.place_of = tuple(place_of(name) for name in self.names)
        self.places = tuple(dict.fromkeys(self.place_of))
        old = _fsdp1_copies(model)
        copies = [old.get(id(p)) or _copies(p) for p in self.params]
        self.sharded = tuple(each is not None for each in copies)
        self.share = tuple(1.0 / each if each else 1.0 for each in copies)
        self.times = tuple(
            p.numel() / max(local_part(p).numel(), 1) if sharded else 1.0
            for p, sharded in zip(self.params, self.sharded, strict=True)
        )
        device = self.params[0].device if named else torch.device("cpu")
        self.device = torch.device("cpu") if device.type in ("mps", "meta") else device  # MPS has no float64
        self._index: Tensor | None = None
        self._share: Tensor | None = None

    def norms(
        self, grads: Sequence[Tensor | None], order: float = 2.0, known: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """Return the norm of this rank's part of each gradient, (T,) float64 on ``device``; 0 where there is none.

        ``known`` has L2 norms that somebody has computed, by ``id`` of the parameter; used where it has them all.
        """
        import torch

        there = [(number, grad) for number, grad in enumerate(grads) if grad is not None and grad.numel()]
        if not there:
            return torch.zeros(len(grads), dtype=torch.float64, device=self.device)
        ids = [id(self.params[number]) for number, _ in there]
        if known and all(one in known for one in ids):
            each = [known[one] for one in ids]
        else:
            # fp32 accumulation: the norm of a bf16 tensor in bf16 has two or three digits
            wide = {grad.dtype for _, grad in there} & {torch.float64, torch.complex128}
            each = list(torch._foreach_norm([grad for _, grad in there], order, dtype=None if wide else torch.float32))
        found = self.gather(each)
        if len(there) == len(grads):
            return found
        out = torch.zeros(len(grads), dtype=torch.float64, device=self.device)
        numbers = torch.tensor([number for number, _ in there], device="cpu")
        return out.index_copy_(0, numbers.to(self.device, non_blocking=True), found)

    def local_params(self) -> list[Tensor]:
        """Return this rank's part of every parameter, detached."""
        return [local_part(p) for p in self.params]

    def largest(self, values_T: Tensor) -> Tensor:
        """Return the largest of per-tensor values (0 or more) at each of ``places``, (P,); NaN wins."""
        import torch

        rows = [[n for n, own in enumerate(self.place_of) if own == place] for place in self.places]
        return torch.stack([torch.stack([values_T[n] for n in row]).amax() for row in rows])

    def gather(self, scalars: Sequence[Tensor]) -> Tensor:
        """Return 0-dim tensors of any devices and precisions as one float64 vector on ``device``."""
        import torch

        kinds = {(one.device, one.dtype) for one in scalars}
        if len(kinds) > 1:
            scalars = [one.to(device=self.device, dtype=torch.float64, non_blocking=True) for one in scalars]
        return torch.stack(list(scalars)).to(device=self.device, dtype=torch.float64, non_blocking=True)

    def by_place(self, values_QT: Tensor, places: Sequence[str]) -> Tensor:
        """Return sums of per-tensor values over places: (Q, 2 P), whole tensors first, then sharded ones.

        Gathered and summed, not scattered, so that a GPU gives the same bits every time.
        """
        import torch

        if self._index is None or self._share is None:
            row_of = [
                places.index(place) + len(places) * sharded
                for place, sharded in zip(self.place_of, self.sharded, strict=True)
            ]
            rows: list[list[int]] = [[] for _ in range(2 * len(places))]
            for number, row in enumerate(row_of):
                rows[row].append(number)
            most = max((len(row) for row in rows), default=0)
            nothing = len(row_of)  # the number of a column of zeros
            padded = [row + [nothing] * (most - len(row)) for row in rows]
            self._index = torch.tensor(padded, dtype=torch.int64, device=self.device).reshape(len(rows), most)
            self._share = torch.tensor(self.share, dtype=torch.float64, device=self.device)
        values = values_QT * self._share
        return torch.nn.functional.pad(values, (0, 1))[:, self._index].sum(-1)


def _copies(p: Any) -> float | None:
    """Return how many ranks hold the same part of a DTensor; ``None`` where a tensor is whole."""
    if not hasattr(p, "device_mesh"):
        return None
    copies = 1
    for dim, placement in enumerate(p.placements):
        if not placement.is_shard():
            copies *= p.device_mesh.size(dim)
    return float(copies)


def _fsdp1_copies(model: nn.Module) -> dict[int, float]:
    """Return the same for the parameters of the first FSDP, which are plain tensors with a part of the values."""
    found: dict[int, float] = {}
    for module in model.modules():
        if type(module).__name__ != "FullyShardedDataParallel":
            continue
        strategy = getattr(getattr(module, "sharding_strategy", None), "name", "")
        if strategy == "NO_SHARD":
            continue
        replicas = 1.0
        if "HYBRID" in strategy:
            from torch import distributed

            replicas = distributed.get_world_size() / distributed.get_world_size(module.process_group)  # type: ignore[arg-type]
        found |= {id(p): replicas for p in module.parameters()}
    return found
