"""One row of numbers per rank, gathered and made into values that are equal on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, distributed

from poise.core.errors import UserError
from poise.guard.signals.fingerprint import combine_ints
from poise.guard.signals.optimizer_state import CHANGES

SUMS: Final = ("grad", *CHANGES, "ratio", "of")
"""The per-place sums in a row; see ``optimizer_state``."""


class RanksDisagree(RuntimeError):  # noqa: N818 - it says what happened
    """The ranks are at different steps or decided differently: going on would train different models."""


@dataclass(frozen=True)
class Host:
    """A step's values on the host; ``sums`` per place."""

    norm: float
    means: dict[str, float]
    highest: dict[str, float]
    fingerprint: int | None
    sums: dict[str, list[float]]


@dataclass(frozen=True)
class Found:
    """A step's values over all ranks, still on the device but for the names.

    Attributes:
        norm: 0-dim.
        values: norm, means, largest values and sums, one after the other.
        ids: of each rank the step, the token and the fingerprint; ``None`` when alone.
    """

    norm: Tensor
    values: Tensor
    ids: Tensor | None
    means: tuple[str, ...]
    highest: tuple[str, ...]
    known: dict[str, float]
    fingerprint: bool
    n_places: int

    def to_host(self) -> Host:
        """Wait for the device and return the values.

        Raises:
            RanksDisagree: the ranks brought different steps or tokens.
        """
        flat = self.values if self.ids is None else torch.cat([self.values, self.ids.flatten()])
        numbers: list[float] = flat.tolist()  # the step's one wait for the device
        it = iter(numbers)
        norm = next(it)
        means = {name: next(it) for name in self.means}
        highest = {name: next(it) for name in self.highest}
        sums = {name: [next(it) for _ in range(self.n_places)] for name in SUMS}
        rest = list(it)
        prints = [int(rest[0])] if self.fingerprint else []
        if self.ids is not None:
            rows = [rest[n : n + 3] for n in range(0, len(rest), 3)]
            _check(rows)
            prints = [int(row[2]) for row in rows] if self.fingerprint else []
        return Host(norm, means | self.known, highest, combine_ints(prints) if prints else None, sums)


@dataclass
class Row:
    """What one rank brings.

    Attributes:
        own: step and token.
        fingerprint: an integer below 2**53, as tensor or number.
        means, highest: of these the mean and the largest value over ranks count.
        sums: (len(SUMS), 2 P) float64: whole tensors, of which the largest counts, then sharded ones, which add up.
    """

    device: torch.device
    own: list[float] = field(default_factory=list)
    fingerprint: Tensor | float | None = None
    means: dict[str, Any] = field(default_factory=dict)
    highest: dict[str, Any] = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))

    def exchange(self, sharded: bool) -> Found:
        """Return the values over all ranks; one collective, none when alone. ``sharded``: of any rank."""
        known: dict[str, float] = {}
        if ranks() == 1:  # numbers that are on the host need not go to the device and back
            known = {name: float(v) for name, v in self.means.items() if not isinstance(v, Tensor)}
        means = tuple(sorted(self.means.keys() - known.keys()))
        highest = tuple(sorted(self.highest))
        n_places = self.sums.shape[1] // 2
        head = [scalar(self.means[name], self.device) for name in means]
        head += [scalar(self.highest[name], self.device) for name in highest]
        head += [] if self.fingerprint is None else [scalar(self.fingerprint, self.device)]
        sums, ids = self.sums, None
        if ranks() > 1:
            prints = head.pop() if self.fingerprint is not None else self.sums.new_zeros(())
            own = torch.tensor(self.own, dtype=torch.float64).to(self.device)
            sent = sums if sharded else sums[:, :n_places]
            rows = gathered(torch.cat([own, torch.stack([prints, *head]), sent.flatten()]))
            ids = rows[:, :3]
            split = 3 + len(means)
            first = [rows[:, 3:split].mean(0), rows[:, split : split + len(highest)].amax(0)]
            sums = join(rows[:, split + len(highest) :].reshape(len(rows), *sent.shape), n_places)
        else:
            first = [torch.stack(head)] if head else []
            sums = sums[:, :n_places] + sums[:, n_places:]
        middle = torch.cat(first)
        n_print = int(self.fingerprint is not None and ids is None)
        norm = sums[0].sum().sqrt()
        if "norm" in highest:
            norm = middle[len(means) + highest.index("norm")]
        tail = middle[len(middle) - n_print :]
        values = torch.cat([norm[None], middle[: len(middle) - n_print], sums.flatten(), tail])
        return Found(norm, values, ids, means, highest, known, self.fingerprint is not None, n_places)


def join(rows: Tensor, n_places: int) -> Tensor:
    """Return (Q, P) from (ranks, Q, P or 2 P): of whole tensors the largest, of sharded ones the sum. NaN wins."""
    whole, sharded = rows[..., :n_places].amax(0), rows[..., n_places:].sum(0)
    return whole + sharded if sharded.shape[-1] else whole


def ranks() -> int:
    """Return the number of ranks, 1 when alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def gathered(row: Tensor) -> Tensor:
    """Return the rows of all ranks, stacked by rank; every rank calls this."""
    if distributed.get_backend() == "nccl" and not row.is_cuda:
        row = row.cuda()
    row = row.contiguous()
    every = [torch.empty_like(row) for _ in range(ranks())]
    distributed.all_gather(every, row)
    return torch.stack(every)


def is_largest(name: str) -> bool:
    """Whether of a reading the largest over ranks counts, not the mean."""
    return "_max" in name.partition("@")[0]


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """Return a value as 0-dim float64 on ``device``; of many elements the mean."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=torch.float64, device=device)
    value = value.detach()
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    value = value.to(device=device, dtype=torch.float64, non_blocking=True)
    return value.mean() if value.numel() != 1 else value.reshape(())


def value_of(loss: Any) -> Tensor | float:
    """Return the number in what a loop calls its loss: a tensor, a number, ``loss["loss"]`` or ``loss.loss``.

    Raises:
        UserError: none of these.
    """
    found = loss
    if not isinstance(loss, Tensor | float | int):
        if isinstance(loss, Mapping) and "loss" in loss:
            found = loss["loss"]
        elif getattr(loss, "loss", None) is not None:
            found = loss.loss
        elif hasattr(loss, "item"):  # a NumPy number
            found = loss.item()
    if isinstance(found, Tensor) and found.numel() and not found.is_complex():
        return found
    if isinstance(found, float | int) and not isinstance(found, bool):
        return float(found)
    raise UserError(
        f"the loss is a {type(loss).__name__} without a number in it; give the guard a tensor, a float, a dict with "
        "'loss' or an object with .loss"
    )


def _check(rows: list[list[float]]) -> None:
    steps = [int(row[0]) for row in rows]
    if len(set(steps)) > 1:
        raise RanksDisagree(
            f"the ranks are at different steps ({_by_rank(steps)}); ask the guard once a step on every rank"
        )
    if len({row[1] for row in rows}) > 1:
        odd = _by_rank([int(row[1]) for row in rows])
        raise RanksDisagree(
            f"step {steps[0]}: the ranks decided differently at the step before (decision hashes: {odd}); "
            "stop the run and restart all ranks from the last checkpoint"
        )


def _by_rank(values: list[int]) -> str:
    shown = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values[:8]))
    return shown + (", ..." if len(values) > 8 else "")
