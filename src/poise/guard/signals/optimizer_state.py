"""What the optimizer did, from a fixed sample of every parameter: update, Adam's ratio, stale second moments.

Of each parameter (of this rank's part of it) at most ``SAMPLE`` elements are looked at, always the same ones: runs of
16 neighbours, spread evenly, so that reading them touches few cache lines. Weights, second moments and gradients of
the sample are copied at every reading; a step later they say what has changed. Nothing is ever written to the
optimizer, and no state is made in it.

Formulas, over the sample of a tensor with n of N elements, each sum times N / n:
    update: sum (p' - p)^2, and sum p^2 of the weights before
    Adam's ratio (StableAdamW's RMS; Wortsman et al. 2023, arXiv 2304.13013): sum g^2 / max(v, eps^2), where v includes
        this g and is bias-corrected: v = (b2 v + (1 - b2) g^2) / (1 - b2^t)
    stale: elements whose second moment is bit for bit what it was although g^2 differs from it by over a tenth

Differs from the paper in: g is what the optimizer will see only if nothing clips after the reading; therefore the
clipping is inferred from the last step, see ``ClipEstimate``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from poise.guard.signals.gradient import Parts, local_part

if TYPE_CHECKING:
    from torch.optim import Optimizer

SAMPLE: Final = 1024
RUN: Final = 16
"""Neighbouring elements in the sample: 64 bytes of fp32, a cache line."""

CHANGES: Final = ("update", "weight", "measured", "stale", "moving", "taken_in", "offered")
"""What ``changes`` returns, per tensor."""

_DIFFERS: Final = 0.1
_TINY: Final = 1e-30
"""A second moment below this no longer matters, and in fp32 it cannot decay any further."""


class OptimizerState:
    """Samples of weights, second moments and gradients, from one reading to the next.

    Args:
        parts: the parameters.
        optimizer: any; one that keeps ``exp_avg_sq`` (Adam and its kin, ``poise.optim.chain.Chain``) is read.
        beta2, eps: of the second moment; taken from the optimizer's groups or links where not given.
    """

    def __init__(
        self, parts: Parts, optimizer: Optimizer, beta2: float | None = None, eps: float | None = None
    ) -> None:
        self._parts, self._optimizer = parts, optimizer
        self._given = (beta2, eps)
        local = [local_part(p) for p in parts.params]
        self._plans = [_Plan(p) for p in local]
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in local) else torch.float32
        # weights, second moments and gradients: now, and at the last reading; then scratch
        longest = max((plan.runs for plan in self._plans), default=0)
        shape = len(self._plans), longest * RUN  # a row per tensor; small ones are filled up with zeros
        self._p, self._v, self._g, self._p0, self._v0, self._g0, self._x, self._y = (
            _Rows(shape, self._dtype, parts.device) for _ in range(8)
        )
        zeros = torch.zeros(longest, RUN, dtype=self._dtype, device=parts.device)
        self._zeros = [zeros[: plan.runs] for plan in self._plans]
        self._fill = [zeros[plan.runs :] for plan in self._plans]
        self._views: tuple[_Views, _Views] = _Views(self._plans), _Views(self._plans)
        weights = [plan.numel / plan.size if plan.size else 0.0 for plan in self._plans]
        self._weight = torch.tensor(weights, dtype=torch.float64, device=parts.device)
        self._numel = torch.tensor([float(p.numel) for p in self._plans], dtype=torch.float64, device=parts.device)
        self._moments: list[Tensor | None] = [None] * len(self._plans)
        self._had: tuple[bool, ...] | None = None
        """Of which tensors a second moment was there at the last reading; ``None`` before the first."""
        self._graded: tuple[bool, ...] = (False,) * len(self._plans)
        """Of which tensors there was a gradient: the others are left alone by the optimizer."""
        self._graded_now = self._graded
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._seen: tuple[tuple[float, float], ...] = ()
        self._beta2_T = self._eps_T = self._weight
        self._steps: Tensor | None = None
        self._steps_T = self._weight

    @property
    def steps(self) -> Tensor | None:
        """How many steps the optimizer has counted, 0-dim float64, as of ``changes``; ``None`` where it counts none."""
        return self._steps

    def changes(self) -> Tensor | None:
        """Return what has changed since ``remember``, (len(CHANGES), T) float64; ``None`` without a memory.

        Looks at weights and second moments as they are now.
        """
        self._look()
        if self._had is None:
            return None
        rows = torch.zeros(len(CHANGES), len(self._plans), dtype=torch.float64, device=self._parts.device)
        torch.sub(self._p.TK, self._p0.TK, out=self._x.TK)
        rows[0] = self._total(self._x)
        rows[1] = self._p0.total
        rows[2] = self._numel
        there = [moment is not None for moment in self._moments]
        if any(there):
            now = self._mask(there) * self._mask(self._graded)
            both = now * self._mask(self._had)
            g2_TK = torch.mul(self._g0.TK, self._g0.TK, out=self._x.TK)
            least_TK = torch.mul(self._v0.TK, _DIFFERS, out=self._y.TK).clamp_(min=_TINY)
            moving_TK = g2_TK.sub_(self._v0.TK).abs_() > least_TK
            rows[4] = moving_TK.sum(1) * self._weight * both
            rows[3] = moving_TK.logical_and_(self._v.TK == self._v0.TK).sum(1) * self._weight * both
            rows[5] = (self._v.total - self._v0.total * self._beta2_T) / (1 - self._beta2_T) * now
            rows[6] = self._g0.total * now
        return rows

    def ratio(self, grads: Sequence[Tensor | None], factor: Tensor | float, clip: Tensor | float | None) -> Tensor:
        """Return Adam's ratio of this step, (2, T) float64: the sum, and of how many elements it is.

        Call ``changes`` first, which looks at the second moments.

        Args:
            grads: local parts; ``None`` where there is none, or a sparse one.
            factor: what makes them true gradients, the inverse of a loss scale.
            clip: what the optimizer will multiply the true gradients by; ``None``: not known, no ratio.
        """
        self._graded_now = tuple(grad is not None for grad in grads)
        views = [None if grad is None else plan.view(grad) for grad, plan in zip(grads, self._plans, strict=True)]
        self._join(views, self._g.TK)
        if isinstance(factor, Tensor) or factor != 1.0:
            self._g.TK.mul_(factor)
        out = torch.zeros(2, len(self._plans), dtype=torch.float64, device=self._parts.device)
        fit = [g is not None and v is not None for g, v in zip(grads, self._moments, strict=True)]
        self._g.total = self._total(self._g)
        if clip is None or not any(fit):
            return out
        correction_T = self._correction()
        beta2_T1 = self._beta2_T.to(self._dtype)[:, None]
        floor_T1 = (correction_T * self._eps_T.square()).clamp(min=1e-36).to(self._dtype)[:, None]
        torch.mul(self._g.TK, clip, out=self._y.TK)
        torch.mul(self._y.TK, self._y.TK, out=self._x.TK)
        torch.lerp(self._x.TK, self._v.TK, beta2_T1, out=self._x.TK)
        self._y.TK.div_(self._x.TK.clamp_(min=floor_T1).sqrt_())
        mask = self._mask(fit)
        out[0] = torch.where(mask > 0, self._total(self._y) * correction_T, 0.0)
        out[1] = self._numel * mask
        return out

    def remember(self) -> None:
        """Keep what ``changes`` and ``ratio`` looked at, for the next reading."""
        self._p, self._p0 = self._p0, self._p
        self._v, self._v0 = self._v0, self._v
        self._g, self._g0 = self._g0, self._g
        self._had = tuple(moment is not None for moment in self._moments)
        self._graded = self._graded_now

    def forget(self) -> None:
        """Drop the memory: weights or moments were set by something else than a step."""
        self._had = None

    # -- parts -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Sample weights and second moments as they are."""
        params = self._parts.params
        self._join(self._views[0].of(params), self._p.TK)
        self._p.total = self._total(self._p)
        states = [self._optimizer.state.get(p, _NOTHING) for p in params]  # never [p]: that would make one
        self._moments = [state.get("exp_avg_sq") for state in states]
        views = self._views[1].of(self._moments)
        self._moments = [None if view is None else v for v, view in zip(self._moments, views, strict=True)]
        self._steps = None
        if not any(moment is not None for moment in self._moments):
            self._v.TK.zero_()
            self._v.total = self._weight.new_zeros(())
            return
        self._join(views, self._v.TK)
        self._v.total = self._v.TK.sum(1) * self._weight
        self._steps_T = self._counted(states)
        self._steps = self._steps_T.amax()
        self._find_rates()

    def _counted(self, states: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return each tensor's step count, (T,) float64."""
        found = [local_part(s) if isinstance(s := state.get("step", 0), torch.Tensor) else s for state in states]
        if not all(isinstance(step, torch.Tensor) for step in found):
            found = [torch.as_tensor(step, dtype=torch.float64) for step in found]
        return self._parts.gather([step if step.ndim == 0 else step.reshape(()) for step in found])

    def _correction(self) -> Tensor:
        """Return 1 - b2^t of each tensor, t counting this step; (T,) float64."""
        return -torch.expm1((self._steps_T + 1) * self._beta2_T.log())

    def _join(self, views: Sequence[Tensor | None], out: Tensor) -> None:
        """Put the samples of all tensors, each (runs, RUN), into the rows of ``out``."""
        blocks: list[Tensor] = []
        for view, zeros, fill in zip(views, self._zeros, self._fill, strict=True):
            blocks.append(zeros if view is None else view)
            if fill.shape[0]:
                blocks.append(fill)
        if any(block.device != out.device for block in blocks):
            blocks = [block.to(out.device, non_blocking=True) for block in blocks]
        if blocks:
            torch.cat(blocks, out=out.view(-1, RUN))

    def _total(self, rows: _Rows) -> Tensor:
        """Return the sum of squares of each tensor, from its sample; (T,) float64."""
        norms_T: Tensor = torch.linalg.vector_norm(rows.TK, dim=1)
        return norms_T.to(torch.float64).square_().mul_(self._weight)

    def _mask(self, there: Sequence[bool]) -> Tensor:
        """Return ones and zeros, (T,) float64 on the device; the few that occur are kept there."""
        key = tuple(there)
        if key not in self._masks:
            self._masks[key] = torch.tensor(key, dtype=torch.float64, device=self._parts.device)
        return self._masks[key]

    def _find_rates(self) -> None:
        """Learn beta2 and eps of each tensor; a learning loop may change them."""
        seen = _rates_of(self._optimizer, self._parts.params, *self._given)
        if seen == self._seen:
            return
        self._seen = seen
        per_tensor = torch.tensor(seen, dtype=torch.float64).to(self._parts.device)
        self._beta2_T, self._eps_T = per_tensor[:, 0], per_tensor[:, 1]


@dataclass
class ClipEstimate:
    """At which global norm somebody clips between the guard's reading and the optimizer, inferred.

    The guard reads raw gradients, while Adam's ``v`` is made of clipped ones, and nobody says where clipping happens
    or at what norm. But ``v`` tells: over the sample, sum (v' - b2 v) / (1 - b2) is the sum of the g^2 that the
    optimizer took in, and the raw g^2 are known from the reading. Where the square root of their quotient is below
    0.97, the bound is that times the norm; a larger norm that came through whole says that there is none.

    Attributes:
        bound: ``None``: nothing is known yet; ``inf``: nobody clips.
    """

    bound: float | None = None

    def learn(self, taken_in: float, offered: float, norm: float) -> None:
        """Take in the sums of a step that was taken, and its raw gradient norm."""
        if not (taken_in > 0.0 and offered > 0.0 and math.isfinite(taken_in + offered) and math.isfinite(norm)):
            return
        share = math.sqrt(taken_in / offered)
        if share < 0.97:
            self.bound = share * norm
        elif self.bound is None or norm > 1.03 * self.bound:
            self.bound = math.inf

    def factor(self, norm: Tensor) -> Tensor | float | None:
        """Return what a gradient of this norm (0-dim) is multiplied by; ``None`` while that is not known."""
        if self.bound is None or self.bound == math.inf:
            return None if self.bound is None else 1.0
        return (self.bound / norm).clamp(max=1.0)


class _Rows:
    """The samples of all tensors, one a row, and what they add up to.

    Attributes:
        TK: (T, K), zeros behind small tensors.
        total: (T,) float64, the sum of squares of each tensor, or of a second moment the sum.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.TK = torch.zeros(shape, dtype=dtype, device=device)
        self.total = torch.zeros(shape[0], dtype=torch.float64, device=device)


class _Plan:
    """Which elements of one tensor are looked at: all, or runs of neighbours at a fixed distance in memory."""

    def __init__(self, p: Tensor) -> None:
        self.numel, self.shape, self.stride = p.numel(), p.shape, p.stride()
        self.dense = _is_dense(p)
        self.size, self.runs, distance = p.numel(), -(-p.numel() // RUN), RUN
        if p.numel() > SAMPLE:
            self.size, self.runs = SAMPLE, SAMPLE // RUN
            distance = p.numel() // self.runs
            width = p.shape[-1]
            if 1 < width <= distance - RUN:
                # From run to run the column moves on by the golden section, so that few runs see all columns.
                distance -= (distance - round(0.618 * width)) % width
                while math.gcd(distance, width) > 1 and distance > RUN:
                    distance -= 1
        self.distance = distance

    def fits(self, tensor: Tensor) -> bool:
        """Whether the sample of ``tensor`` can be a view of its memory."""
        return self.dense and self.size % RUN == 0 and tensor.stride() == self.stride

    def view(self, tensor: Tensor) -> Tensor:
        """Return the sample of ``tensor``, which has the parameter's shape: (runs, RUN), with zeros at the end."""
        if not self.dense:
            tensor = tensor.contiguous()
        elif tensor.stride() != self.stride:  # e.g. a gradient that was set by hand
            tensor = torch.empty_strided(self.shape, self.stride, dtype=tensor.dtype, device=tensor.device).copy_(
                tensor
            )
        if self.size % RUN:
            flat = tensor.as_strided((self.size,), (1,), tensor.storage_offset())
            return torch.nn.functional.pad(flat, (0, self.runs * RUN - self.size)).view(self.runs, RUN)
        return tensor.as_strided((self.runs, RUN), (self.distance, 1), tensor.storage_offset())


class _Views:
    """The samples of tensors that stay where they are from step to step, as views that need not be made again."""

    def __init__(self, plans: Sequence[_Plan]) -> None:
        self._plans = plans
        self._kept: list[tuple[Any, int, Tensor] | None] = [None] * len(plans)

    def of(self, tensors: Sequence[Any]) -> list[Tensor | None]:
        """Return the sample of each tensor; ``None`` for what is no plain tensor of the parameter's shape."""
        return [self._one(number, tensor) for number, tensor in enumerate(tensors)]

    def _one(self, number: int, tensor: Any) -> Tensor | None:
        if not isinstance(tensor, Tensor):
            return None
        kept = self._kept[number]
        address = getattr(tensor, "_local_tensor", tensor).data_ptr()
        if kept is not None and kept[0] is tensor and kept[1] == address:
            return kept[2]
        plan, local = self._plans[number], local_part(tensor)
        plain = type(local) in (Tensor, torch.nn.Parameter)  # not a quantized subclass
        if not (plain and local.shape == plan.shape and local.is_floating_point()):
            return None
        view = plan.view(local)
        self._kept[number] = (tensor, address, view) if plan.fits(local) else None
        return view


def _is_dense(p: Tensor) -> bool:
    """Whether the elements of ``p`` fill its stretch of memory without gaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


_NOTHING: Final[Mapping[str, Any]] = {}


def _rates_of(
    optimizer: Optimizer, params: Sequence[Tensor], beta2: float | None, eps: float | None
) -> tuple[tuple[float, float], ...]:
    """Return (beta2, eps) of every parameter: as given, else of its group, else of the chain's links, else Adam's."""
    links = [link for link in getattr(optimizer, "links", ()) if hasattr(link, "beta2")]
    of: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        betas = group.get("betas") or (0.9, getattr(links[-1], "beta2", 0.999) if links else 0.999)
        own_beta2 = float(betas[1]) if beta2 is None else beta2
        own_eps = float(group.get("eps", getattr(links[-1], "eps", 1e-8) if links else 1e-8)) if eps is None else eps
        of |= dict.fromkeys(map(id, group["params"]), (own_beta2, own_eps))
    return tuple(of.get(id(p), (beta2 or 0.999, eps or 1e-8)) for p in params)
